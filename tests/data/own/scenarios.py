"""A few hundred random rows of one's own files, and schemas that read them in many ways."""

import pathlib
import tomllib
from typing import Any

import numpy as np
import polars as pl

from rankjax.data import event_log, importer
from rankjax.data.own import schema_file

START = 1_600_000_000
Rows = list[dict[str, Any]]

SHOWN = """
[[impressions]]
files = "shown*"
user = "u"
item = "i"
time = "t"
labels = {y = "y", like = {column = "stars", at_least = 4, weight = "y"}}
"""
FEATURES = """
[impressions.features]
place = {}
position = {column = "pos"}
row = {column = "place", table = "place"}
price = {kind = "dense", transform = "quantile"}
heat = {kind = "dense", transform = "symlog"}
tags = {kind = "ids", separator = "|", values = 2}
last = {table = "item"}
hour = {derive = "hour"}
"""
ACTS = """
[[events]]
files = "acts*"
user = "u"
item = "i"
time = "t"
[events.features]
kind = {action = true}
dwell = {kind = "dense", transform = "log", action = true}
log_age = {derive = "log_age"}
"""
CLICKS = """
[[events]]
files = "shown*"
user = "u"
item = "i"
time = "t"
where = {column = "y", equals = 1}
"""
CATALOGUES = """
[users]
files = "people*"
id = "u"
features = {town = {}, age = {kind = "dense"}}

[items]
files = "things*"
id = "i"
birth = "born"
[items.features]
brand = {}
topics = {column = "tags", kind = "ids", separator = "|", values = 2, table = "tags"}
cost = {column = "price", kind = "dense", transform = "none"}
"""
ALL = ACTS + CATALOGUES
INEXACT = "time_exact = false\n"
TIMED = ACTS.replace('log_age = {derive = "log_age"}\n', "")
LISTS = """
[[events]]
files = "lists*"
user = "u"
item = "past"
list = true
"""
VALUES = '[split]\ntrain_values = ["a", "b"]\n'

# {name: schema.toml}; the files are those of `world`.
SCHEMAS = {
    "requests": SHOWN + 'request = "r"\nposition = "pos"\n' + FEATURES + ALL,
    "text_requests": SHOWN + 'request = "rt"\nposition = "pos"\n' + FEATURES + ALL,
    "composite_ids": (SHOWN + 'request = "rt"\n' + CATALOGUES)
    .replace('user = "u"', 'user = ["u", "place2"]')
    .replace('item = "i"', 'item = ["i", "sort"]')
    .replace('id = "i"', 'id = ["i", "sort"]')
    .replace('id = "u"', 'id = ["u", "place2"]'),
    "gap": SHOWN + "request_gap = 30\n" + ACTS,
    "one_second": SHOWN + 'position = "pos"\n',
    "rows": SHOWN + 'request = "@row"\n' + ACTS,
    "milliseconds": SHOWN.replace('"t"', '"ms"\ntime_unit = "ms"') + 'request = "r"\n' + ACTS,
    "several_events": SHOWN + 'request = "r"\n' + ACTS + CLICKS + "features = {place = {}}\n",
    "lists": INEXACT + SHOWN + 'request = "r"\n' + LISTS + CLICKS,
    "lists_only": INEXACT + "users_share = 0.7\n" + SHOWN + 'request = "r"\n' + LISTS,
    "orders": INEXACT
    + SHOWN
    + 'order = "o"\nrequest = "r"\n'
    + TIMED.replace('"t"', '"t"\norder = "o"'),
    "two_impressions": SHOWN
    + 'request = "r"\nfeatures = {place = {}, heat = {kind = "dense"}}\n'
    + SHOWN.replace("shown", "ads")
    + 'request = "r"\nposition = "pos"\nfeatures = {tags = {kind = "ids", separator = "|"}}\n',
    "mixed_impressions": SHOWN
    + 'request = "r"\nfeatures = {place = {}}\n'
    + SHOWN.replace("shown", "ads")
    + "request_gap = 20\n"
    + ALL,
    "hash": SHOWN + 'request = "r"\n' + FEATURES + ALL + '[ids]\nids = "hash"\nrows = 50\n',
    "given": SHOWN
    + 'request = "r"\nfeatures = {pos = {ids = "given", rows = 10}}\n'
    + ACTS
    + CATALOGUES
    + '[user]\nids = "given"\nrows = 40\n[item]\nids = "given"\nrows = 100\n',
    "share": "users_share = 0.5\n" + SHOWN + 'request = "r"\nposition = "pos"\n' + FEATURES + ALL,
    "shares": SHOWN + 'request = "r"\n' + ACTS + "[split]\ntrain = 0.5\nvalidation = 0.2\n",
    "instants": SHOWN
    + 'request = "r"\n'
    + ALL
    + f"[split]\ntrain_until = {START + 40_000}\nvalidation_until = {START + 60_000}\n",
    "values": SHOWN + 'request = "@row"\nsplit = "part"\n' + ACTS + VALUES + 'test_values = "c"\n',
    "named_values": SHOWN
    + 'request = "@row"\nsplit = "part"\n'
    + ACTS
    + VALUES.replace(', "b"', "")
    + 'validation_values = "b"\ntest_values = "c"\n',
    "boolean_values": SHOWN
    + 'request = "@row"\nsplit = "held"\n'
    + "[split]\ntrain_values = false\ntest_values = true\n",
    "min_count": "task = 'like'\n"
    + SHOWN
    + 'request = "r"\n'
    + FEATURES.replace("place = {}", "place = {min_count = 3}").replace(', table = "place"', "")
    + ALL.replace("kind = {", "kind = {min_count = 40, ")
    + "[ids]\nmin_count = 3\n",
    "learn_all": SHOWN + 'request = "r"\n' + FEATURES + ALL + '[ids]\nlearn = "all"\n',
    "anonymous": INEXACT
    + SHOWN.replace('user = "u"\nitem = "i"\ntime = "t"', 'time = "@row"')
    + 'request = "@row"\nfeatures = {place = {}, heat = {kind = "dense"}}\n',
    "no_users": SHOWN.replace('user = "u"\n', ""),
    "no_items": SHOWN.replace('item = "i"\n', "") + ACTS.replace('item = "i"\n', ""),
    "clicks": ACTS
    + CATALOGUES
    + '[negatives]\nwithin = "day"\nof = {column = "kind", one_of = ["view", "buy"]}\n'
    + 'features = {kind = {}, dwell = {kind = "dense"}}\n',
}


def _maybe(rng: np.random.Generator, x: Any, share: float = 0.2) -> Any:
    return None if rng.random() < share else x


def _tags(rng: np.random.Generator) -> str | None:
    return _maybe(rng, "|".join(f"t{x}" for x in rng.integers(0, 9, rng.integers(1, 5))))


def _shown(rng: np.random.Generator, requests: int) -> Rows:
    """Requests of one to four rows a few seconds apart, rows in random order."""
    rows = []
    for request in rng.permutation(3 * requests)[:requests].tolist():
        user, at = int(rng.integers(1, 15)), START + int(rng.integers(0, 800)) * 100
        for pos in rng.permutation(4)[: rng.integers(1, 5)].tolist():
            t = at + int(rng.integers(0, 20)) * (request % 3 > 0)
            rows.append(
                {
                    "u": user + 10,
                    "i": int(rng.integers(30)) + 40,
                    "t": t,
                    "ms": t * 1000 + int(rng.integers(1000)),
                    "o": (at - START) // 1000,
                    "r": request + 7,
                    "rt": f"q{request}",
                    "pos": 3 - pos,
                    "y": int(rng.random() < 0.3),
                    "stars": int(rng.integers(6)),
                    "place": _maybe(rng, f"p{rng.geometric(0.4)}"),
                    "place2": f"p{user % 3}",
                    "sort": int(rng.integers(2)),
                    "price": _maybe(rng, float(rng.integers(5))),
                    "heat": _maybe(rng, float(rng.normal() * 9)),
                    "tags": _tags(rng),
                    "last": _maybe(rng, int(rng.integers(40)) + 40),
                    "part": "c" if t > START + 60_000 else str(rng.choice(["a", "b"])),
                    "held": t > START + 60_000,
                }
            )
    return [rows[i] for i in rng.permutation(len(rows))]


def world(seed: int = 0) -> dict[str, Rows]:
    """{file: rows}. Some users and items have no row in their file, others appear only there."""
    rng = np.random.default_rng(seed)
    acts = [
        {
            "u": int(rng.integers(1, 17)) + 10,
            "i": int(rng.integers(35)) + 40,
            "t": (t := START + int(rng.integers(0, 800)) * 100),
            "o": (t - START) // 1000,
            "kind": _maybe(rng, str(rng.choice(["view", "buy", "like"], p=[0.7, 0.2, 0.1]))),
            "dwell": _maybe(rng, float(rng.integers(100))),
        }
        for _ in range(250)
    ]
    people = [
        {
            "u": u + 10,
            "place2": f"p{u % 3}",
            "town": _maybe(rng, f"w{u % 4}"),
            "age": _maybe(rng, 20 + u),
        }
        for u in rng.permutation(20)[:12].tolist()
    ]
    things = [
        {
            "i": i + 40,
            "sort": i % 2,
            "brand": _maybe(rng, int(rng.integers(4))),
            "tags": _tags(rng),
            "price": _maybe(rng, i / 4),
            "born": _maybe(rng, START - 1000 * i),
        }
        for i in rng.permutation(38)[:28].tolist()
    ]
    lists = [
        {"u": u + 10, "past": (40 + rng.integers(0, 36, rng.integers(0, 6))).tolist()}
        for u in (3, 5, 3, 8, 19, 5, 1)
    ]
    return {
        "shown.csv": _shown(rng, 120),
        "acts.parquet": acts,
        "people.csv": people,
        "things.parquet": things,
        "lists.parquet": lists,
        "ads.parquet": [],
    }


def split_off(files: dict[str, Rows], seed: int = 0) -> dict[str, Rows]:
    """A third of the impressions moved to ads.parquet, parts of requests among them."""
    rng = np.random.default_rng(seed)
    to_ads = rng.random(len(files["shown.csv"])) < 0.3
    ads = [row for row, x in zip(files["shown.csv"], to_ads) if x]
    shown = [row for row, x in zip(files["shown.csv"], to_ads) if not x]
    return files | {"shown.csv": shown, "ads.parquet": ads}


def config(name: str) -> dict[str, Any]:
    """The schema as TOML gives it."""
    text = SCHEMAS[name]
    top = text[: text.index("\n[")] + "\n"  # keys of the document stand above its first table
    return tomllib.loads(f'name = "{name}"\n{top}{text.removeprefix(top)}')


def used(config: dict[str, Any], files: dict[str, Rows]) -> dict[str, Rows]:
    """The files that the schema names."""
    tables = [config.get(x, []) for x in ("users", "items", "events", "impressions")]
    specs = [s for x in tables for s in (x if isinstance(x, list) else [x])]
    starts = tuple(s["files"].removesuffix("*") for s in specs)
    return {name: rows for name, rows in files.items() if name.startswith(starts)}


def write(folder: pathlib.Path, files: dict[str, Rows]) -> list[pathlib.Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        frame = pl.DataFrame(rows, infer_schema_length=None)
        if name.endswith(".csv"):
            frame.write_csv(folder / name)
        else:
            frame.write_parquet(folder / name)
    return [folder / name for name in files]


def run(
    folder: pathlib.Path, config: dict[str, Any], files: dict[str, Rows], **options: Any
) -> event_log.EventLog:
    """Writes the files that the schema names into `folder`, imports and opens them."""
    paths = write(folder / "raw", used(config, files))
    schema = schema_file.parse(config, "schema")
    return event_log.EventLog.open(
        importer.run(schema, paths, folder / "log", **options), verify=True
    )
