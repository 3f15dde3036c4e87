"""Ids and numbers against Python's integers, dictionaries and exact fractions."""

import collections
import hashlib
import math
import random

import numpy as np
import polars as pl
import pytest

from rankjax.data.own import encoding, schema_file
from tests.references import encoding as reference

EDGES = [0, 1, -1, 2**63 - 1, -(2**63), 12345]


def text_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def test_hashes_of_numbers():
    # The generator's first published output for seed 0.
    assert reference.splitmix64(0) == 0xE220A8397B1DCDAF
    found = encoding.hash_64(pl.Series([*EDGES, None]))
    assert found.dtype == np.uint64
    assert found.tolist() == [*(reference.splitmix64(v % 2**64) for v in EDGES), 0]


def test_hashes_of_text():
    words = ["b", "", "a", "ü", None, "b", "\x1f", "a" * 1000]
    found = encoding.hash_64(pl.Series(words))
    assert found.dtype == np.uint64
    assert found.tolist() == [0 if w is None else text_hash(w) for w in words]
    assert encoding.hash_64(pl.Series([None, None], dtype=pl.String)).tolist() == [0, 0]
    assert encoding.hash_64(pl.Series([], dtype=pl.String)).tolist() == []


@pytest.mark.parametrize("rows", [2, 3, 100, 2**31 - 1])
def test_hash_ids(rows):
    found = encoding.hash_ids(pl.Series([*EDGES, None]), rows)
    want = [reference.splitmix64(v % 2**64) % (rows - 1) + 1 for v in EDGES]
    assert found.dtype == np.int32 and found.tolist() == [*want, 0]
    found = encoding.hash_ids(pl.Series(["a", None, "b"]), rows)
    assert found.tolist() == [text_hash("a") % (rows - 1) + 1, 0, text_hash("b") % (rows - 1) + 1]


def test_hash_ids_are_uniform():
    x = pl.Series(range(100_000))
    for ids in (x, x.cast(pl.String)):
        many = encoding.hash_ids(ids, 2**31 - 1)
        assert many.min() >= 1 and len(np.unique(many)) > 99_990
        counts = np.bincount(encoding.hash_ids(ids, 11), minlength=11)
        assert len(counts) == 11 and counts[0] == 0 and abs(counts[1:] - 10_000).max() < 500
    with pytest.raises(ValueError, match="hash_ids: rows=1, expected >= 2"):
        encoding.hash_ids(x, 1)


WORDS = {
    "numbers": (pl.Int64, [5, -3, 2**60, 0, -(2**63)], [4, 1, None, 2**60 + 1, 2**63 - 1]),
    "text": (pl.String, ["b", "", "ab", "ü", "zz"], ["a", "B", None, "zzz"]),
}


@pytest.mark.parametrize("kind", WORDS)
def test_places_and_vocabulary_ids(kind):
    dtype, known, others = WORDS[kind]
    ordered = sorted(known, key=lambda w: w.encode() if isinstance(w, str) else w)
    words = pl.Series(ordered, dtype=dtype)
    cells = random.Random(0).choices([*known, *others], k=200)
    x = pl.Series(cells, dtype=dtype)
    place = {w: i for i, w in enumerate(ordered)}
    found = encoding.place(words, x)
    assert found.dtype == np.int64 and found.tolist() == [place.get(c, -1) for c in cells]
    ids = encoding.vocabulary_ids(words, x)
    want = [0 if c is None else place.get(c, -1) + 2 for c in cells]
    assert ids.dtype == np.int32 and ids.tolist() == want
    assert {0, 1, 2, len(known) + 1} <= set(want)
    nothing = pl.Series([], dtype=dtype)
    assert encoding.place(words, nothing).tolist() == []
    for empty in (nothing, pl.Series([], dtype=pl.Int64)):  # what no row had a value of
        assert encoding.vocabulary_ids(empty, x).tolist() == [int(c is not None) for c in cells]


@pytest.mark.parametrize("kind", WORDS)
def test_places_in_an_empty_cell_are_unknown_though_zero_is_known(kind):
    dtype, known, _ = WORDS[kind]
    words = encoding.distinct(None, pl.Series(known, dtype=dtype))
    assert encoding.place(words, pl.Series([None], dtype=dtype)).tolist() == [-1]


@pytest.mark.parametrize("kind", WORDS)
def test_distinct_and_counts_whatever_the_chunks(kind):
    dtype, known, others = WORDS[kind]
    rng = random.Random(1)
    cells = rng.choices([*known, *others], k=100)
    key = lambda w: w.encode() if isinstance(w, str) else w
    want = sorted({c for c in cells if c is not None}, key=key)
    counted = collections.Counter(c for c in cells if c is not None)
    for cuts in ([], [50], [0, 1, 99, 100], sorted(rng.choices(range(101), k=20))):
        found, table = None, None
        for a, b in zip([0, *cuts], [*cuts, 100]):
            x = pl.Series(cells[a:b], dtype=dtype)
            found, table = encoding.distinct(found, x), encoding.count(table, x)
        assert found.to_list() == want and found.dtype == dtype
        assert table.rows() == [(w, counted[w]) for w in want]
        for least in (1, 2, max(counted.values()), 1000):
            kept = encoding.vocabulary(table, least)
            assert kept.to_list() == [w for w in want if counted[w] >= least]
            assert kept.dtype == dtype


def test_counts_of_lists():
    table = encoding.count(None, pl.Series([["a", "b"], None, [], ["b"]]))
    table = encoding.count(table, pl.Series([["b", "c"], [None]]))
    assert table.rows() == [("a", 1), ("b", 3), ("c", 1)]
    nothing = encoding.count(None, pl.Series([None, []], dtype=pl.List(pl.Int64)))
    assert nothing.rows() == [] and encoding.vocabulary(nothing, 1).dtype == pl.Int64


@pytest.mark.parametrize("values", [1, 2, 3, 10])
def test_padded(values):
    rng = random.Random(2)
    lists = [None if rng.random() < 0.2 else [*range(rng.randrange(6))] for _ in range(50)]
    flat, slot, cut = encoding.padded(pl.Series(lists, dtype=pl.List(pl.Int64)), values)
    out = np.full(50 * values, -1)
    out[slot] = flat.to_numpy()
    want = [((x or [])[:values] + [-1] * values)[:values] for x in lists]
    assert out.reshape(50, values).tolist() == want
    assert len(set(slot.tolist())) == len(slot) == len(flat)
    assert cut == sum(max(len(x or []) - values, 0) for x in lists)


@pytest.mark.parametrize("lists", [[], [None], [[]], [None, []]])
def test_padded_nothing(lists):
    flat, slot, cut = encoding.padded(pl.Series(lists, dtype=pl.List(pl.String)), 3)
    assert len(flat) == len(slot) == cut == 0 and flat.dtype == pl.String


def test_linear():
    x = pl.Series([0.0, 1.5, None, 1e9])
    with np.errstate(all="raise"):
        log = encoding.linear(x, "log")
    np.testing.assert_allclose(log, [0, math.log(2.5), math.nan, math.log(1 + 1e9)], rtol=1e-15)
    x = pl.Series([-3.0, 0.0, None, 3.0])
    found = encoding.linear(x, "symlog")
    np.testing.assert_allclose(found, [-math.log(4), 0, math.nan, math.log(4)], rtol=1e-15)
    for transform in ("none", "standard", "quantile"):
        np.testing.assert_array_equal(encoding.linear(x, transform), [-3, 0, math.nan, 3])


def pieces(x: np.ndarray, rng: random.Random, n: int) -> list[np.ndarray]:
    """Places of the rows of every chunk, in a random order of chunks."""
    cuts = sorted(rng.choices(range(len(x) + 1), k=n))
    found = [np.arange(a, b) for a, b in zip([0, *cuts], [*cuts, len(x)])]
    return rng.sample(found, len(found))


def taken(x: np.ndarray, chunks: list[np.ndarray]) -> encoding.Moments:
    found = encoding.Moments()
    for at in chunks:
        found = found.add(x[at], at.astype(np.int64))
    return found


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e9])
def test_moments_are_exact_whatever_the_chunks(offset):
    x = np.random.default_rng(0).normal(size=400) * 3 + offset
    x[::7] = math.nan
    known = x[np.isfinite(x)]
    mean, variance = reference.moments(known.tolist())
    rng = random.Random(0)
    for n in (0, 1, 5, 100, 500):
        found = taken(x, pieces(x, rng, n))
        assert found.n == len(known)
        assert found.mean == pytest.approx(float(mean), rel=1e-13, abs=1e-13)
        assert found.squares / found.n == pytest.approx(float(variance), rel=1e-6)
        got = found.learned("standard")
        assert got["shift"][0] == pytest.approx(known.mean(), rel=1e-12, abs=1e-12)
        assert got["scale"][0] == pytest.approx(known.std(), rel=1e-6)
        assert sorted(found.sample) == sorted(known)


def test_the_sample_depends_on_rows_alone(monkeypatch):
    """It is of the smallest hashes, whatever the chunks and their order."""
    monkeypatch.setattr(encoding, "SAMPLE", 50)
    x = np.random.default_rng(0).normal(size=400)
    x[::7] = math.nan
    order = sorted(range(400), key=reference.splitmix64)
    want = sorted([x[i] for i in order if np.isfinite(x[i])][:50])
    rng = random.Random(0)
    for n in (0, 1, 5, 100, 500):
        found = taken(x, pieces(x, rng, n))
        assert sorted(found.sample) == want and found.n == np.isfinite(x).sum()
        assert found.learned("quantile") == taken(x, [np.arange(400)]).learned("quantile")


def test_moments_of_nothing():
    found = encoding.Moments().add(np.array([math.nan]), np.array([0]))
    assert found.n == 0
    for transform in ("standard", "quantile", "none"):
        assert found.learned(transform) == {"shift": [0.0], "scale": [1.0]}


def dense(x: list, transform: str, known: list | None = None) -> np.ndarray:
    """The column `x` after learning from `known` as learning.py does."""
    spec = schema_file.Input(column="c", kind="dense", transform=transform)
    known = x if known is None else known
    values = encoding.linear(pl.Series(known, dtype=pl.Float64), transform)
    found = encoding.Moments().add(values, np.arange(len(known)))
    learned = found.learned("standard" if transform.endswith("log") else transform)
    found = encoding.dense(pl.Series(x, dtype=pl.Float64), spec, learned)
    assert found.dtype == np.float32
    return found


X = [3.0, None, 0.0, 10.0, 3.0, 7.0]
GIVEN = np.array([x for x in X if x is not None])
PLACES = [0, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("transform", "before"),
    [
        ("standard", lambda v: v),
        ("log", np.log1p),
        ("symlog", lambda v: np.sign(v) * np.log1p(abs(v))),
    ],
)
def test_standard_and_logarithms(transform, before):
    found = dense(X, transform)
    y = before(GIVEN)
    np.testing.assert_allclose(found[PLACES], (y - y.mean()) / y.std(), rtol=1e-6, atol=1e-7)
    assert found[1] == 0  # missing is the mean
    later = dense([-5.0, None] if transform != "log" else [5.0, None], transform, X)
    want = (before(np.float64(-5 if transform != "log" else 5)) - y.mean()) / y.std()
    np.testing.assert_allclose(later, [want, 0], rtol=1e-6)


def test_none_keeps_the_number():
    assert dense(X, "none").tolist() == [3, 0, 0, 10, 3, 7]


@pytest.mark.parametrize("transform", ["standard", "symlog", "log", "quantile"])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, 1e9 + 0.1])
def test_a_constant_column_is_zero_and_stays_small(constant, transform):
    """Its mean is rounded, so that its deviation is not quite zero."""
    known = [constant] * 1001
    assert abs(dense(known, transform)).max() < 1e-6
    assert abs(dense([constant + 1], transform, known)) <= 2
    assert dense([None], transform, known).tolist() == [0]


@pytest.mark.parametrize("n", [10, 256, 300, 5000])
def test_quantiles_are_uniform(n):
    """The mid-rank of every value, scaled to variance 1."""
    rng = np.random.default_rng(0)
    x = np.exp(3 * rng.normal(size=n))
    found = dense(x.tolist(), "quantile")
    rank = np.argsort(np.argsort(x))
    want = ((rank + 0.5) / n - 0.5) * math.sqrt(12)
    exact = n <= encoding.KNOTS
    assert abs(found - want).max() < (1e-6 if exact else math.sqrt(12) / encoding.KNOTS)
    assert np.all(np.diff(found[np.argsort(x)]) >= 0)
    assert abs(found.mean()) < 0.01 and found.var() == pytest.approx(1, abs=0.02)
    beyond = dense([x.min() - 1, x.max() + 1, None], "quantile", x.tolist())
    np.testing.assert_allclose(beyond, [found.min(), found.max(), 0], rtol=1e-6)


def test_quantiles_of_ties():
    """Equal values share the middle of their ranks: 6 zeros, 3 ones, 1 five."""
    x = [0.0] * 6 + [1.0] * 3 + [5.0]
    levels = np.array([0.3] * 6 + [0.75] * 3 + [0.95])
    np.testing.assert_allclose(dense(x, "quantile"), (levels - 0.5) * math.sqrt(12), rtol=1e-6)
    between = dense([0.5], "quantile", x)
    assert dense([0.0], "quantile", x) < between < dense([1.0], "quantile", x)
