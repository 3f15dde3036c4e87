"""A large file of wide rows, and a script that measures what importing it takes."""

import pathlib

import numpy as np
import polars as pl
import pyarrow.parquet

SCHEMA = """
name = "wide"
[[impressions]]
files = "shown*"
user = "u"
item = "i"
time = "t"
request = "r"
position = "p"
labels = {y = "y"}
[impressions.features]
a = {}
b = {}
c = {}
d = {}
price = {kind = "dense", transform = "quantile"}
tags = {kind = "ids", separator = "|", values = 4}
[[events]]
files = "shown*"
user = "u"
item = "i"
time = "t"
where = {column = "y", equals = 1}
"""

# Arguments: file, folder of the log. Prints the most bytes held beyond those before the import.
MEASURE = f"""
import pathlib, sys, threading, tomllib
from rankjax.data import importer
from rankjax.data.own import formats, schema_file

formats.BLOCK = 1 << 20  # dozens of blocks are read ahead

def held():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))

first, most, done = held(), [0], threading.Event()

def watch():
    while not done.wait(0.01):
        most[0] = max(most[0], held())

threading.Thread(target=watch, daemon=True).start()
schema = schema_file.parse(tomllib.loads({SCHEMA!r}), "schema")
importer.run(schema, [sys.argv[1]], sys.argv[2], chunk=50_000)
done.set()
print(most[0] - first)
"""


def is_measurable() -> bool:
    status = pathlib.Path("/proc/self/status")
    return status.exists() and "RssAnon" in status.read_text()


def write_rows(path: pathlib.Path, n: int) -> None:
    """Requests of five rows, 100 of them a second; some 230 bytes a row."""
    rng, request = np.random.default_rng(0), np.arange(n) // 5

    def word() -> pl.Series:
        return "a-category-with-a-long-name-" + pl.Series(rng.integers(0, 999, n)).cast(pl.String)

    rows = {
        "u": request * 7919 % 20_000,
        "i": rng.integers(0, 20_000, n),
        "t": 1_600_000_000 + request // 100,
        "r": request,
        "p": np.arange(n) % 5,
        "y": (rng.integers(0, 8, n) == 0).astype(np.int8),
        "price": rng.normal(size=n).round(3),
        "tags": word() + "|" + word(),
    }
    pl.DataFrame(rows | {name: word() for name in "abcd"}).write_csv(path)


# Arguments: file, folder of the log, "import" or "read", MiB that may be taken beyond those before.
LIMITED = f"""
import pathlib, resource, sys, tomllib
import polars as pl
from rankjax.data import importer
from rankjax.data.own import formats, schema_file

formats.BATCH = 1 << 16
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
data = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmData"))
most = data + int(sys.argv[4]) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
if sys.argv[3] == "read":
    pl.read_parquet(sys.argv[1], memory_map=False)
else:
    schema = schema_file.parse(tomllib.loads({SCHEMA!r}), "schema")
    importer.run(schema, [sys.argv[1]], sys.argv[2], chunk=50_000)
"""


def write_parquet(path: pathlib.Path, n: int) -> None:
    """The rows of `write_rows` as Parquet, neither compressed nor in dictionaries."""
    write_rows(path.with_suffix(".csv"), n)
    table = pl.read_csv(path.with_suffix(".csv")).to_arrow(compat_level=pl.CompatLevel.oldest())
    options = {"compression": "none", "use_dictionary": False, "row_group_size": 100_000}
    pyarrow.parquet.write_table(table, path, **options)
    path.with_suffix(".csv").unlink()
