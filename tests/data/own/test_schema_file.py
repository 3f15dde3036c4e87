"""schema.toml: a whole example becomes the dataclasses written out here; errors name the key."""

import datetime
import textwrap
import tomllib

import pytest

from rankjax.data import counters
from rankjax.data.own import schema_file

Input, Condition, Label = schema_file.Input, schema_file.Condition, schema_file.Label

WHOLE = """
name = "shop"
task = "click"
users_share = 0.5
earliest = 2001-02-03
order = ["user.user", "item.item"]

[users]
files = "people.csv"
separator = ";"
header = ["who", "age"]
id = "who"
[users.features]
age = {kind = "dense", transform = "quantile", group = "person"}

[items]
files = ["things-*.parquet"]
id = ["shop", "thing"]
birth = "listed"
time_unit = "%Y-%m-%d"
time_zone = "Europe/Berlin"
[items.features]
brand = "brand name"
tags = {kind = "ids", separator = "|", values = 3, min_count = 5}
fit = {kind = "dense", column = "fits", at = "size"}

[[events]]
files = "sales.csv"
user = "who"
item = ["shop", "thing"]
time = "at"
time_unit = "ms"
where = {column = "kind", one_of = ["sale", "return"]}
features.kind = {action = true}
features.log_age = {derive = "log_age"}

[[events]]
files = "visits.csv"
user = "who"
time = "at"

[impressions]
files = "shown.parquet"
user = "who"
item = ["shop", "thing"]
time = "at"
request = "page"
position = "slot"
split = "part"
[impressions.labels]
click = "clicked"
like = {column = "stars", at_least = 4, weight = "click"}
[impressions.features]
surface = {ids = "hash", rows = 100, table = "place"}
item_age = {derive = "item_age"}

[split]
train_values = ["a", 1]
test_values = "b"
validation = 0.2

[ids]
ids = "hash"
rows = 1000
learn = "all"

[user]
ids = "given"
rows = 50

[tables]
place = {rows = 100, hashed = true}

[info]
notes = ["Made up."]

[counters]
delay = 60
"""


def write(folder, text):
    path = folder / "schema.toml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def test_a_whole_file(tmp_path):
    thing = ("shop", "thing")
    assert schema_file.load(write(tmp_path, WHOLE)) == schema_file.ImportSchema(
        name="shop",
        task="click",
        users_share=0.5,
        earliest=datetime.date(2001, 2, 3),
        order=("user.user", "item.item"),
        users=schema_file.Catalogue(
            files=("people.csv",),
            separator=";",
            header=("who", "age"),
            id="who",
            features={
                "age": Input(column="age", kind="dense", transform="quantile", group="person")
            },
        ),
        items=schema_file.Catalogue(
            files=("things-*.parquet",),
            id=thing,
            birth="listed",
            time_unit="%Y-%m-%d",
            time_zone="Europe/Berlin",
            features={
                "brand": Input(column="brand name"),
                "tags": Input(column="tags", kind="ids", separator="|", values=3, min_count=5),
                "fit": Input(column="fits", kind="dense", at="size"),
            },
        ),
        events=(
            schema_file.Events(
                files=("sales.csv",),
                user="who",
                item=thing,
                time="at",
                time_unit="ms",
                where=Condition(column="kind", one_of=("sale", "return")),
                features={
                    "kind": Input(column="kind", action=True),
                    "log_age": Input(derive="log_age"),
                },
            ),
            schema_file.Events(files=("visits.csv",), user="who", time="at"),
        ),
        impressions=(
            schema_file.Impressions(
                files=("shown.parquet",),
                user="who",
                item=thing,
                time="at",
                request="page",
                position="slot",
                split="part",
                labels={
                    "click": Label(column="clicked"),
                    "like": Label(column="stars", at_least=4.0, weight="click"),
                },
                features={
                    "surface": Input(column="surface", ids="hash", rows=100, table="place"),
                    "item_age": Input(derive="item_age"),
                },
            ),
        ),
        split=schema_file.Split(train_values=("a", 1), test_values=("b",), validation=0.2),
        ids=schema_file.Ids(ids="hash", rows=1000, learn="all"),
        user=Input(ids="given", rows=50),
        tables={"place": schema_file.Table(rows=100, hashed=True)},
        info={"notes": ["Made up."]},
        counters=counters.CounterConfig(delay=60),
    )


# The least that is valid; {} takes what a test adds to the table named there.
TABLES = {
    "top": "",
    "users": '[users]\nfiles = "u.csv"\nid = "u"\n',
    "items": '[items]\nfiles = "i.csv"\nid = "i"\n',
    "events": '[[events]]\nfiles = "e.csv"\nuser = "u"\nitem = "i"\ntime = "t"\n',
    "impressions": '[impressions]\nfiles = "x.csv"\nuser = "u"\nitem = "i"\ntime = "t"\n'
    'labels = {click = "c"}\n',
    "negatives": "[negatives]\n",
    "split": "[split]\n",
}


def text(**added):
    """A schema of the tables named, with what each of them gets; `top` stands above all."""
    order = ["top", *(name for name in TABLES if name != "top" and name in added)]
    return 'name = "x"\n' + "".join(TABLES[n] + added.get(n, "") + "\n" for n in order)


@pytest.mark.parametrize(
    "added",
    [
        {"impressions": ""},
        {"events": "", "negatives": ""},
        {"users": "", "items": "", "events": "", "impressions": "request_gap = 0"},
        {"impressions": "request = '@row'", "split": "train_until = 5\nvalidation_until = 6"},
        {"top": "time_exact = false", "events": "order = 'o'", "impressions": "time_zone = 'UTC'"},
        {"top": "time_exact = false", "impressions": "", "events": "features.h={derive='hour'}"},
        {"impressions": "split = 's'", "split": "train_values=[0]\ntest_values=[2]"},
        {"items": "birth = 'b'", "impressions": "features.a = {derive = 'item_age'}"},
        {"top": "earliest = '1960-01-01T00:00:00+01:00'", "impressions": "time_unit = '%Y'"},
    ],
)
def test_valid(added, tmp_path):
    found = schema_file.load(write(tmp_path, text(**added)))
    assert found.tasks == ("click",)
    assert len(found.events) == ("events" in added)


IMPRESSIONS = {"impressions": ""}
NAMED = "train_values = [0]\ntest_values = [1]\n"
REFUSED = [
    # unknown, missing, of a wrong type
    ({"top": "[clicks]\nfiles='x'"}, "unknown key 'clicks'"),
    ({"top": "[impresions]\nfiles='x'"}, "'impresions', .* did you mean 'impressions'"),
    ({"impressions": "users = 'u'"}, r"impressions\[0\]: found unknown key 'users'.*mean 'user'"),
    ({"impressions": "features.p = {colum = 'x'}"}, r"impressions\[0\], features.p: .*'column'"),
    ({"impressions": "request = ['a', 'b']"}, r"impressions\[0\], request: found .*expected str"),
    ({"impressions": "position = 3"}, r"impressions\[0\], position: found 3, expected str"),
    ({"impressions": "request_gap = 1.5"}, r"impressions\[0\], request_gap: found 1.5, expected"),
    ({"impressions": "", "events": "list = 'yes'"}, r"events\[0\], list: found 'yes', expected bo"),
    ({"top": "impressions = {files = 'x', labels = {c = 'c'}}"}, r"expected \['time'\] too"),
    ({"top": "impressions = {files = 'x', time = 't'}"}, r"expected \['labels'\] too"),
    ({"top": "users = {files = 'x'}", **IMPRESSIONS}, "users: expected `id`, the column that"),
    ({"top": "events = {files = 'x', time = 't'}", **IMPRESSIONS}, r"expected \['user'\] too"),
    ({"top": "events = {files = 'x', user = 'u'}", **IMPRESSIONS}, r"\[0\]: expected `time`, the"),
    (
        {"top": "events = {files = 'x', user = 'u', time = '@row'}", **IMPRESSIONS},
        "expected `time`, the column of when it happened, found '@row'",
    ),
    (
        {"top": "items = {files = [], id = 'i'}", **IMPRESSIONS},
        "items: files: found none, expected",
    ),
    # what contradicts something else
    ({}, r"expected either \[impressions\], or \[negatives\]"),
    ({"impressions": "", "negatives": ""}, r"expected either \[impressions\], or \[negatives\]"),
    ({"negatives": ""}, r"\[negatives\] draws from \[events\], found none"),
    ({"events": "", "negatives": "per_click = 0"}, "negatives: per_click: found 0, expected 1"),
    ({"events": "", "negatives": "within = 'week'"}, "within: found 'week', expected one of"),
    ({"impressions": "separator = '::'"}, "separator: found '::', expected one character"),
    ({"impressions": "time_unit = 'minutes'"}, "time_unit: found 'minutes', expected one of"),
    ({"impressions": "time_zone = 'Mars'"}, "time_zone: found 'Mars', expected a name such as"),
    ({"impressions": "request = 'r'\nrequest_gap = 1"}, "found both request and request_gap"),
    ({"impressions": "request_gap = -1"}, "request_gap: found -1, expected >= 0 seconds"),
    ({"impressions": "features.a = {action = true}"}, r"features.a: found an action"),
    ({"impressions": "features.a = {derive = 'log_age'}"}, "features.a: found derive='log_age'"),
    ({"impressions": "", "items": "features.a = {derive = 'hour'}"}, "features.a: found derive="),
    ({"impressions": "", "users": "features.a = {action = true}"}, "features.a: found an action"),
    ({"events": "", "negatives": "features.a = {action = true}"}, "features.a: found an action"),
    ({"impressions": "features.a = {derive = 'item_age'}"}, "'item_age' needs items.birth"),
    ({"impressions": "where = {column = 'w'}"}, r"\[0\], where: expected exactly one of equals"),
    ({"top": "time_exact = false", "events": "list = true", "impressions": ""}, "a list has no ti"),
    (
        {"top": "time_exact=false\nevents = {files='e', user='u', list=true}", **IMPRESSIONS},
        "a list is the column `item`, found none",
    ),
    (
        {"top": "events = {files = 'e', user = 'u', item = 'i', list = true}", **IMPRESSIONS},
        "found lists, .* with time_exact = true",
    ),
    ({"impressions": "order = 'o'"}, "found lists, order or time = '@row' with time_exact = true"),
    ({"impressions": "", "events": "order = 'o'"}, "order or time = '@row' with time_exact = true"),
    (
        {"top": "impressions = {files = 'x', time = '@row', labels = {c = 'c'}}"},
        "order or time = '@row' with time_exact = true",
    ),
    ({"top": "time_exact = false\n[counters]", **IMPRESSIONS}, r"\[counters\] need exact times"),
    (
        {"top": "time_exact = false", "events": "features.a={derive='log_age'}", **IMPRESSIONS},
        "derive='log_age' needs exact times",
    ),
    ({"top": "[counters]\nwindows = [0]", **IMPRESSIONS}, "counters: CounterConfig: windows"),
    ({"top": "users_share = 0", **IMPRESSIONS}, r"users_share: found 0.0, expected in \(0, 1\]"),
    ({"top": "task = 'like'", **IMPRESSIONS}, "task: found 'like', expected one of .*'click'"),
    (
        {"top": "earliest = 'long ago'", **IMPRESSIONS},
        "schema.toml: found 'long ago', expected an instant",
    ),
    ({"top": "item = {kind = 'dense'}", **IMPRESSIONS}, "item: found 'dense' '', expected an id"),
    ({"top": "user = {derive = 'hour'}", **IMPRESSIONS}, "user: found 'id' 'hour', expected an id"),
    (
        {"top": "item = {column = 'x'}", "users": "", **IMPRESSIONS},
        r"item.column: found 'x', expected \[items\] with it",
    ),
    ({"top": "[ids]\nmin_count = 0", **IMPRESSIONS}, "ids: min_count: found 0, expected >= 1"),
    # splits
    ({"impressions": "", "split": "train = 1.0"}, r"split: found train=1.0, .*shares in \(0, 1\)"),
    ({"impressions": "", "split": "train = 0.9"}, "split: .* the rest is test"),
    ({"impressions": "", "split": "train_until = 5"}, "train_until and validation_until together"),
    (
        {"impressions": "", "split": "train_until = 2020-01-02\nvalidation_until = 2020-01-02"},
        "split: found train_until=2020-01-02, expected it before",
    ),
    ({"impressions": "", "split": "train_values = [0]"}, "train_values and test_values together"),
    ({"impressions": "", "split": NAMED}, "expected impressions.split, the column, and split.tr"),
    ({"impressions": "split = 's'"}, "expected impressions.split, the column, and split.train_val"),
    ({"events": "", "negatives": "", "split": NAMED}, "expected impressions.split, the column"),
    (
        {"impressions": "split='s'", "split": NAMED + "train_until=1\nvalidation_until=2"},
        "found both train_values and train_until",
    ),
]


@pytest.mark.parametrize(("added", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_refused(added, message, tmp_path):
    path = write(tmp_path, text(**added))
    with pytest.raises(ValueError, match=message) as caught:
        schema_file.load(path)
    assert str(caught.value).startswith(str(path))


def labelled(labels):
    return f"impressions = {{files = 'x', time = 't', labels = {labels}}}"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("{}", "labels: found none, expected at least one"),
        ("{a = 'a', b = {weight = 'c'}}", r"labels.b.weight: found 'c', expected one of \['a'\]"),
        ("{a = {weight = 'a'}}", r"labels.a.weight: found 'a', expected one of \[\]"),
        ("{a = {equals = 1, above = 2}}", "labels.a: expected exactly one of equals"),
        ("{a = {equals = [1, 2]}}", "labels.a: equals: found .*, expected one value"),
        ("{a = ['x', 'y']}", "labels.a: found .*'x', 'y'.*, expected the name of a column"),
    ],
)
def test_labels_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        schema_file.parse(tomllib.loads('name = "x"\n' + labelled(labels)), "here")


def test_labels_of_several_impressions_are_the_same(tmp_path):
    one = "[[impressions]]\nfiles = 'x'\ntime = 't'\nlabels = "
    with pytest.raises(ValueError, match="found different labels, expected the same in each"):
        schema_file.load(write(tmp_path, f"name='x'\n{one}{{a='a'}}\n{one}{{b='a'}}"))
    found = schema_file.load(write(tmp_path, f"name='x'\n{one}{{a='a'}}\n{one}{{a='b'}}"))
    assert [x.labels["a"].column for x in found.impressions] == ["a", "b"]


def test_files_that_are_no_schema(tmp_path):
    with pytest.raises(
        ValueError, match=r"none.toml: found no readable file .*, expected a schema"
    ):
        schema_file.load(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="found no readable file"):
        schema_file.load(tmp_path)
    path = write(tmp_path, "name = \n")
    with pytest.raises(ValueError, match=r"schema.toml: found .*, expected valid TOML"):
        schema_file.load(path)
    with pytest.raises(ValueError, match=r"expected valid TOML"):
        schema_file.load(write(tmp_path, "name = 'a'\nname = 'b'\n"))
    path.write_bytes(b'name = "\xff"\n')
    with pytest.raises(ValueError, match=r"schema.toml: found .*, expected valid TOML"):
        schema_file.load(path)


@pytest.mark.parametrize(
    ("instant", "wanted"),
    [
        (7, 7),
        ("1970-01-02", 86_400),
        ("1970-01-01T01:00:00+01:00", 0),
        ("1970-01-01T00:00:01.9", 1),
        (datetime.date(1969, 12, 31), -86_400),
        (datetime.datetime(1970, 1, 1, 0, 0, 5), 5),
        (
            datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
            -7200,
        ),
    ],
)
def test_instants(instant, wanted):
    assert schema_file.seconds(instant) == wanted


def test_instants_of_a_zone():
    assert schema_file.seconds("1970-07-01", "America/New_York") == 181 * 86_400 + 4 * 3600
    with pytest.raises(ValueError, match="found 'yesterday', expected an instant"):
        schema_file.seconds("yesterday")


def test_a_window_may_be_ever():
    found = {"name": "x", "impressions": {"files": "f", "time": "t", "labels": {"y": "y"}}}
    read = lambda windows: (
        schema_file.parse(
            found | {"counters": {"windows": windows}}, "schema.toml"
        ).counters.windows
    )
    assert read([3600, "ever"]) == (3600, None) and read([60]) == (60,)
    with pytest.raises(ValueError, match=r"counters, windows\[1\]: found 'always'"):
        read([3600, "always"])


def test_two_columns_for_one_role(tmp_path):
    path = tmp_path / "schema.toml"
    text = 'name = "x"\n[impressions]\nfiles = "f"\ntime = "t"\nuser = "a"\nuser = "b"\n'
    path.write_text(text + 'labels.y = "y"\n')
    with pytest.raises(ValueError, match=r"schema.toml: .*line 6.*\(a key that stands twice\?\)"):
        schema_file.load(path)
    one = {"files": "f", "time": ["t", "s"], "labels": {"y": "y"}}
    with pytest.raises(ValueError, match=r"time: found \['t', 's'\], expected str"):
        schema_file.parse({"name": "x", "impressions": one}, "schema.toml")


def test_a_label_is_no_feature():
    one = {"files": "f", "time": "t", "labels": {"click": "y"}, "features": {"seen": "y"}}
    message = r"features.seen: found column 'y', which labels.click reads"
    with pytest.raises(ValueError, match=message):
        schema_file.parse({"name": "x", "impressions": one}, "schema.toml")
