"""Sorted runs merge into one sort of all rows, in frames of bounded size."""

import os
import random

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from rankjax.data.own import runs

KEYS = ("key", "row")


def frame(keys: list[int]) -> pl.DataFrame:
    """Rows of every type that runs hold; `row` orders them all."""
    n, rng = len(keys), np.random.default_rng(len(keys))
    words = [None if k % 5 == 0 else f"w{k} " * (abs(k) % 3) for k in keys]
    return pl.DataFrame(
        {
            "key": pl.Series(keys, dtype=pl.Int64),
            "row": pl.Series(range(n), dtype=pl.Int64),
            "word": pl.Series(words, dtype=pl.String),
            "x": pl.Series(rng.normal(size=n), dtype=pl.Float32),
            "ids": pl.Series(
                rng.integers(0, 9, (n, 3), dtype=np.int32), dtype=pl.Array(pl.Int32, 3)
            ),
            "list": pl.Series(
                [[w] * (i % 3) for i, w in enumerate(words)], dtype=pl.List(pl.String)
            ),
            "yes": pl.Series(rng.random(n) < 0.5),
            "span": pl.Series(rng.integers(0, 3, n), dtype=pl.Int8),
        }
    )


def cut(folder, everything: pl.DataFrame, rng: random.Random, n: int) -> list:
    """Writes the rows as runs of random places and sizes, some of them empty."""
    of_run = np.array(rng.choices(range(n), k=everything.height), np.int64)
    paths = []
    for i in range(n + 1):  # the last one is empty
        path = folder / f"run.{i}.arrow"
        part = everything.filter(pl.Series(of_run == i, dtype=pl.Boolean))
        runs.write_run(path, part.sample(fraction=1, shuffle=True, seed=i), KEYS)
        paths.append(path)
    return rng.sample(paths, len(paths))


KINDS = {
    "few keys": lambda rng: rng.randrange(5),
    "many keys": lambda rng: rng.randrange(-(10**12), 10**12),
    "skewed": lambda rng: int(rng.paretovariate(0.3)) % 10**9,
    "one key": lambda rng: -7,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "count", "rows"), [(300, 1, 10), (300, 7, 50), (300, 40, 1), (20, 3, 1000), (0, 2, 5)]
)
def test_merged_equals_one_sort(kind, n, count, rows, tmp_path):
    rng = random.Random(n + count)
    keys = [KINDS[kind](rng) for _ in range(n)]
    everything = frame(keys)
    want = everything.sort(KEYS)
    found = list(runs.merged(cut(tmp_path, everything, rng, count), KEYS, rows))
    assert sum(f.height for f in found) == n and all(f.height for f in found)
    if n:
        assert pl.concat(found).equals(want) and found[0].schema == want.schema
    # No key lies in two frames, and a frame is larger than asked by one key's rows at most.
    firsts = [set(f["key"]) for f in found]
    assert sum(map(len, firsts)) == len(set(keys))
    most = max((keys.count(k) for k in set(keys)), default=0)
    assert all(f.height <= rows + rows // 8 + count + most for f in found)


@pytest.mark.parametrize("count", [1, 5, 50])
def test_frames_are_of_about_the_size_asked_for(count, tmp_path):
    rng = random.Random(0)
    everything = pl.DataFrame({"key": rng.choices(range(10**9), k=40_000), "row": range(40_000)})
    sizes = [f.height for f in runs.merged(cut(tmp_path, everything, rng, count), KEYS, 1000)]
    assert max(sizes) <= 1000 * 9 // 8 + count and min(sizes[:-1]) >= 500 and len(sizes) < 60


def test_a_key_of_more_rows_than_a_frame_comes_whole(tmp_path):
    keys = [1] * 5 + [2] * 500 + [3] * 5
    paths = cut(tmp_path, frame(keys), random.Random(0), 4)
    sizes = {f["key"].unique().to_list()[-1]: f.height for f in runs.merged(paths, KEYS, 10)}
    assert sizes[2] in (500, 505) and sum(sizes.values()) == 510


def test_frames_do_not_depend_on_how_rows_were_cut_into_runs(tmp_path):
    """Their rows in order do; where the frames end may differ."""
    rng = random.Random(3)
    everything = frame([rng.randrange(60) for _ in range(200)])
    found = []
    for n in (1, 2, 9):
        (tmp_path / str(n)).mkdir()
        paths = cut(tmp_path / str(n), everything, rng, n)
        found.append(pl.concat(runs.merged(paths, KEYS, 17)).drop("list"))
    assert found[0].equals(found[1]) and found[0].equals(found[2])


def test_no_runs():
    assert list(runs.merged([], KEYS, 10)) == []


@pytest.mark.parametrize("n", [0, 1, 100])
def test_what_is_written_is_read(n, tmp_path):
    want = frame([*range(n)])
    path = tmp_path / "x.arrow"
    runs.write(path, pl.concat([want[: n // 2], want[n // 2 :]], rechunk=False))
    found = runs.read(path)
    assert found.equals(want) and found.schema == want.schema
    assert found.n_chunks() <= 1  # as merging takes it
    assert os.listdir(tmp_path) == ["x.arrow"]


def test_reading_maps_the_file(tmp_path):
    """Nothing is copied, and rows stay when the file's name is gone."""
    path = tmp_path / "x.arrow"
    runs.write(path, pl.DataFrame({"key": np.arange(10**6)}))
    before = pa.total_allocated_bytes()
    found = runs.read(path)
    assert pa.total_allocated_bytes() - before < 100_000  # of 8 MB
    path.unlink()
    assert found["key"].to_numpy().tolist() == [*range(10**6)]


def test_a_write_that_fails_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    path = tmp_path / "x.arrow"

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.pa.ipc, "new_file", fail)
    with pytest.raises(KeyboardInterrupt):
        runs.write(path, frame([1, 2]))
    assert not path.exists()
    monkeypatch.undo()
    runs.write(path, frame([1, 2]))
    assert runs.read(path).height == 2
    same = path.read_bytes()
    runs.write(path, frame([1, 2]))
    assert path.read_bytes() == same
