"""What an import learns: spans, users and items, vocabularies and moments of the training span."""

import itertools
import pathlib
import tomllib

import numpy as np
import polars as pl
import pytest

from rankjax.data.own import encoding, learning, plan, schema_file

SCHEMA = """
name = "x"
[impressions]
files = "shown*"
user = "u"
item = "i"
time = "t"
labels = {y = "y"}
features = {place = {}, price = {kind = "dense"}, tags = {kind = "ids"}}
[[events]]
files = "acts"
user = "u"
item = "i"
time = "t"
features = {last = {table = "item"}, price = {kind = "dense", transform = "log"}}
[[events]]
files = "lists"
user = "u"
item = "past"
list = true
[items]
files = "things"
id = "i"
features = {brand = {ids = "hash", rows = 9}}
"""


def schema(text: str = SCHEMA, more: str = "") -> schema_file.ImportSchema:
    text = text.replace('name = "x"', 'name = "x"\ntime_exact = false')
    return plan.resolve(schema_file.parse(tomllib.loads(text + more), "schema"))


def split(text: str) -> schema_file.ImportSchema:
    given = 'split = "part"\n' if "values" in text else ""
    text = f'labels = {{y = "y"}}\n{given}\n[split]\n{text}'
    return schema('name = "x"\n[impressions]\nfiles = "a"\ntime = "t"\n', text)


def counted(rows: dict[tuple[int, str | None], int]) -> pl.DataFrame:
    """{time, split, n} from {(time, value): rows}."""
    times, values = zip(*rows)
    return pl.DataFrame(
        {"time": times, "split": pl.Series(values, dtype=pl.String), "n": list(rows.values())}
    )


@pytest.mark.parametrize(
    ("text", "train", "validation"),
    [
        ("", 3, 4),  # 8 and 9 of 10
        ("train = 0.75\nvalidation = 0.1", 3, 4),  # more than 7, and more than 8
        ("train = 0.7\nvalidation = 0.1", 2, 3),
        ("train = 0.1\nvalidation = 0.1", 1, 2),
    ],
)
def test_shares_are_of_impressions_and_cut_where_the_time_changes(text, train, validation):
    times = counted({(1, None): 1, (2, None): 6, (3, None): 1, (4, None): 1, (9, None): 1})
    assert learning.cut(split(text), times) == learning.Cuts(train, validation)


def test_shares_that_add_up_to_a_little_more_cut_where_they_say():
    times = counted({(t, None): 1 for t in range(1, 61)})
    assert (0.8 + 0.05) * 60 > 51
    found = learning.cut(split("train = 0.8\nvalidation = 0.05"), times)
    assert found == learning.Cuts(48, 51)


def test_instants_are_inclusive():
    cuts = learning.cut(
        split("train_until = 1970-01-01T00:00:02Z\nvalidation_until = 5"),
        counted({(t, None): 1 for t in (2, 3, 5, 6)}),
    )
    assert cuts == learning.Cuts(2, 5)
    assert cuts.span(np.array([1, 2, 3, 5, 6]), None).tolist() == [0, 0, 1, 1, 2]


def test_values_name_the_spans_and_the_newest_of_train_are_validation():
    rows = {(t, "a"): 2 for t in range(10)} | {(t, "b"): 5 for t in (0, 12)}
    cuts = learning.cut(
        split('train_values = "a"\ntest_values = "b"\nvalidation = 0.25'), counted(rows)
    )
    assert (cuts.train, cuts.values) == (7, {"a": 0, "b": 2})
    times, values = np.array([7, 8, 7, 8]), pl.Series(["a", "a", "b", "b"])
    assert cuts.span(times, values).tolist() == [0, 1, 2, 2]
    assert cuts.named(values).tolist() == [0, 0, 2, 2]


def test_a_value_that_names_validation_leaves_train_whole():
    rows = {(1, "1"): 1, (9, "1"): 1, (4, "2"): 1, (5, "0"): 1}
    cuts = learning.cut(
        split("train_values = 1\nvalidation_values = 2\ntest_values = [0, 5]"), counted(rows)
    )
    values = pl.Series([1, 1, 2, 0])  # whole numbers, as the column holds them
    assert cuts.span(np.array([1, 9, 4, 5]), values).tolist() == [0, 0, 1, 2]


def test_truth_values_name_spans():
    rows = {(1, "false"): 1, (2, "false"): 1, (2, "true"): 1}
    cuts = learning.cut(
        split("train_values = false\ntest_values = true\nvalidation = 0.5"), counted(rows)
    )
    values = pl.Series([False, False, True])
    assert cuts.span(np.array([1, 2, 2]), values).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "rows", "message"),
    [
        ("", {(5, None): 20}, r"\[split\]: found {'train': 20, 'validation': 0, 'test': 0} impr"),
        (
            "train_until = 3\nvalidation_until = 4",
            {(4, None): 2, (7, None): 1},
            r"found {'train': 0, 'validation': 2, 'test': 1} impressions from time 4 to 7, exp",
        ),
        (
            'train_values = "a"\ntest_values = "b"',
            {(1, "b"): 3},
            r"found {'train': 0, 'validation': 0, 'test': 3}",
        ),
        (
            'train_values = "a"\ntest_values = "b"',
            {(1, "a"): 3, (2, "c"): 1},
            r"\[impressions\] split: found \['c'\], expected one of \['a', 'b'\]",
        ),
    ],
)
def test_a_span_without_rows_and_values_without_span_are_refused(text, rows, message):
    with pytest.raises(ValueError, match=message):
        learning.cut(split(text), counted(rows))


def part(one: schema_file.ImportSchema, table: str, number: int = 0, file: int = 0) -> plan.Part:
    found = getattr(one, table)
    order = ["items", "events", "impressions"].index(table) * 10 + number * 3 + file
    spec = found[number] if isinstance(found, tuple) else found
    return plan.Part(table, number, file, order, pathlib.Path(f"{table}{number}{file}"), spec)


def frames(rows: dict[str, list], size: int = 100, **dtypes) -> list[pl.DataFrame]:
    frame = pl.DataFrame(rows, schema_overrides=dtypes, strict=False).with_row_index("row")
    frame = frame.cast({"row": pl.Int64})
    return [frame.slice(i, size) for i in range(0, max(frame.height, 1), size)]


SHOWN = {
    "user": [5, 7, 5, 6, 5, 5],
    "item": [1, 1, 2, 3, 4, 8],
    "time": [1, 1, 2, 2, 3, 4],
    "f:place": ["a", "b", "a", None, "c", "d"],
    "f:price": [1.0, 3.0, None, 8.0, 100.0, 1000.0],
    "f:tags": [["t", "u"], [], None, ["u"], ["v"], ["w"]],
}
ACTS = {
    "user": [9, 9, 4],
    "item": [2, 11, 12],
    "time": [0, 2, 3],
    "f:last": [21, None, 22],
    "f:price": [1.0, 2.0, 9.0],
}
LISTS = {"user": [3, 5], "item": [[2, 31], []]}
THINGS = {"id": [2, 41], "f:brand": ["x", None]}
UNTIL = "[split]\ntrain_until = 2\nvalidation_until = 3\n"


def learn(folder, one, tables: dict, size: int = 100) -> learning.Learned:
    """tables: {(table, number, file): rows by role, or frames}."""
    made = [
        (part(one, *key), x if isinstance(x, list) else frames(x, size))
        for key, x in tables.items()
    ]
    by_tag = {p.tag: x for p, x in made}
    return learning.learn(one, [p for p, _ in made], lambda p: iter(by_tag[p.tag]), folder)


WHOLE = {
    ("items", 0, 0): THINGS,
    ("events", 0, 0): ACTS,
    ("events", 1, 0): LISTS,
    ("impressions", 0, 0): SHOWN,
}


@pytest.mark.parametrize("size", [100, 2, 1])
def test_users_items_and_words_are_sorted_and_words_come_from_training_alone(size, tmp_path):
    found = learn(tmp_path, schema(SCHEMA, UNTIL), WHOLE, size)
    assert found.users.to_list() == [3, 4, 5, 6, 7, 9]
    assert found.items.to_list() == [1, 2, 3, 4, 8, 11, 12, 31, 41]
    assert found.cuts == learning.Cuts(2, 3)
    words = {name: x.to_list() for name, x in found.words.items()}
    assert words == {
        "user": [5, 6, 7, 9],  # of impressions and events until 2, and of their lists
        "item": [1, 2, 3, 11, 21],  # and of `last`
        "place": ["a", "b"],
        "tags": ["t", "u"],
    }
    (shift,), (scale,) = found.dense["context.price"].values()
    assert (shift, scale) == pytest.approx((4.0, np.std([1, 3, 8])))
    (shift,), (scale,) = found.dense["event.price"].values()
    logs = np.log1p([1.0, 2.0])
    assert (shift, scale) == pytest.approx((logs.mean(), logs.std()))


def test_what_is_seen_less_than_min_count_times_is_no_word(tmp_path):
    text = SCHEMA.replace("place = {}", "place = {min_count = 1}")
    one = schema(text, UNTIL + "[ids]\nmin_count = 2\n")
    found = learn(tmp_path, one, WHOLE)
    words = {name: x.to_list() for name, x in found.words.items()}
    assert words == {"user": [5, 9], "item": [1, 2], "place": ["a", "b"], "tags": ["u"]}
    assert learning.sizes(found) == {"user": 2, "item": 2, "place": 2, "tags": 1}


def test_learn_all_takes_words_of_every_span(tmp_path):
    one = schema(SCHEMA, UNTIL + '[ids]\nlearn = "all"\n')
    found = learn(tmp_path, one, WHOLE)
    assert found.words["place"].to_list() == ["a", "b", "c", "d"]
    assert found.words["item"].to_list() == [1, 2, 3, 4, 8, 11, 12, 21, 22, 31]


def test_what_was_learned_is_read_and_not_learned_again(tmp_path):
    one = schema(SCHEMA, UNTIL)
    first = learn(tmp_path, one, WHOLE)
    again = learning.learn(one, [part(one, "impressions")], None, tmp_path)
    assert (again.cuts, again.dense) == (first.cuts, first.dense)
    assert again.users.equals(first.users) and again.items.equals(first.items)
    assert {k: x.to_list() for k, x in again.words.items()} == {
        k: x.to_list() for k, x in first.words.items()
    }


def test_several_files_of_one_table_learn_as_one(tmp_path):
    text = SCHEMA[: SCHEMA.index("[[events]]")]
    one = schema(text, UNTIL)
    whole = learn(tmp_path, one, {("impressions", 0, 0): SHOWN})
    apart = {
        ("impressions", 0, i): {k: x[2 * i : 2 * i + 2] for k, x in SHOWN.items()} for i in range(3)
    }
    # A file without rows, and one without values, are of no type.
    apart[("impressions", 0, 3)] = frames({k: [] for k in SHOWN}, user=pl.String, item=pl.String)
    none = {"user": [5], "item": [1], "time": [1], "f:place": [None], "f:price": [None]}
    apart[("impressions", 0, 4)] = frames(none | {"f:tags": [None]})
    (tmp_path / "apart").mkdir()
    found = learn(tmp_path / "apart", one, apart)
    assert found.users.equals(whole.users) and found.items.equals(whole.items)
    assert {k: x.to_list() for k, x in found.words.items()} == {
        k: x.to_list() for k, x in whole.words.items()
    }


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user", ["5"], "impressions01: found user ids of type String, expected Int64 as in impr"),
        ("item", ["5"], "impressions01: found item ids of type String, expected Int64"),
        ("f:place", [5], "impressions01: found values of table 'place' of type Int64, expected St"),
        ("f:tags", [[5]], "found values of table 'tags' of type Int64, expected String"),
    ],
)
def test_ids_are_of_one_type_in_all_files_also_after_training(column, values, message, tmp_path):
    one = schema(SCHEMA[: SCHEMA.index("[[events]]")], UNTIL)
    late = {"user": [5], "item": [1], "time": [4], "f:place": ["a"], "f:price": [1.0]}
    late |= {"f:tags": [["t"]], column: values}
    with pytest.raises(ValueError, match=message):
        learn(tmp_path, one, {("impressions", 0, 0): SHOWN, ("impressions", 0, 1): late})
    assert not list(tmp_path.iterdir())


def test_hashed_values_are_of_one_type_too(tmp_path):
    one = schema(SCHEMA[: SCHEMA.index("[[events]]")] + SCHEMA[SCHEMA.index("[items]") :], UNTIL)
    tables = {("items", 0, 0): THINGS, ("impressions", 0, 0): SHOWN}
    tables[("items", 0, 1)] = {"id": [55], "f:brand": [7]}
    with pytest.raises(ValueError, match="found values of table 'brand' of type Int64, expected"):
        learn(tmp_path, one, tables)


def test_a_catalogue_holds_an_id_once(tmp_path):
    one = schema(SCHEMA[: SCHEMA.index("[[events]]")] + SCHEMA[SCHEMA.index("[items]") :], UNTIL)
    tables = {("impressions", 0, 0): SHOWN, ("items", 0, 0): THINGS}
    tables[("items", 0, 1)] = {"id": [2, 50, 2], "f:brand": ["x", "x", "x"]}
    message = r"items00, items01: found id 2 3 times in \[items\], expected once \(1 ids stand"
    with pytest.raises(ValueError, match=message):
        learn(tmp_path, one, tables)


def test_nothing_left_is_refused(tmp_path):
    one = schema(SCHEMA[: SCHEMA.index("[[events]]")], UNTIL)
    with pytest.raises(ValueError, match=r"\[impressions\]: found no row after filtering"):
        learn(tmp_path, one, {("impressions", 0, 0): frames({k: [] for k in SHOWN})})


def test_features_that_learn_together_agree():
    least, transforms = learning.settings(plan.slots(schema()))
    assert least == {"user": 1, "item": 1, "place": 1, "tags": 1}
    assert transforms == {"context.price": "standard", "event.price": "log"}
    more = '[[events]]\nfiles = "c"\nuser = "u"\ntime = "t"\nfeatures.price = {kind = "dense"}\n'
    with pytest.raises(ValueError, match="'price' of side 'event': found transform = 'standard'"):
        learning.settings(plan.slots(schema(SCHEMA, more)))
    text = SCHEMA.replace("{table = ", "{min_count = 3, table = ")
    with pytest.raises(ValueError, match="'last' of side 'event': found min_count = 3, expected 1"):
        learning.settings(plan.slots(schema(text)))


def test_pieces_are_merged_so_that_they_stay_few_and_small():
    rng, pieces, seen, merged = np.random.default_rng(0), [], set(), 0

    def together(one: pl.Series, other: pl.Series) -> pl.Series:
        nonlocal merged
        merged += len(one) + len(other)
        return encoding.distinct(one, other)

    for _ in range(300):
        new = np.unique(rng.zipf(1.3, 100) % 100_000)
        seen |= set(new.tolist())
        learning._add(pieces, pl.Series(new), together)
        assert sum(map(len, pieces)) <= 2 * len(seen)
        assert all(len(a) > 2 * len(b) for a, b in itertools.pairwise(pieces))
    assert set().union(*pieces) == seen
    assert merged < 300 * 100 * 10  # far less than 300 times all of them
