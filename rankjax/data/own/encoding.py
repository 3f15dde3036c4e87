"""From values to ids and numbers: vocabularies, hashing, and what dense features learn.

Everything that is learned (which ids are known, means, quantiles) comes from the rows that the
caller passes to `count` and `Moments.add`, which are those of the training span. Memory grows with
the number of distinct values, not with rows.
"""

import dataclasses
import hashlib
import math

import numpy as np
import polars as pl

from rankjax.data.own import schema_file

MISSING, UNKNOWN, KNOWN = 0, 1, 2  # ids of a vocabulary; its words are KNOWN, KNOWN + 1, ...
SAMPLE = 200_000  # values that a quantile transform is learned from
KNOTS = 256


def hash_64(x: pl.Series) -> np.ndarray:
    """uint64 [n] of whole numbers or text, the same on every machine; null hashes to 0.

    Numbers: splitmix64 (Steele, Lea, Flood, Fast splittable pseudorandom number generators, 2014,
    fig. 14). Text: the first 8 bytes of its BLAKE2b.
    """
    if x.dtype == pl.Int64:
        z = x.fill_null(0).to_numpy().view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found = z ^ (z >> np.uint64(31))
    else:
        words = x.drop_nulls().unique().sort()
        digests = [hashlib.blake2b(w.encode(), digest_size=8).digest() for w in words]
        of_word = np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
        found = np.append(of_word, np.uint64(0))[place(words, x)]
    return np.where(x.is_null().to_numpy(), np.uint64(0), found)


def hash_ids(x: pl.Series, rows: int) -> np.ndarray:
    """int32 ids 1 .. rows - 1 [n]; null gives 0. Raises ValueError when rows < 2."""
    if rows < 2:
        raise ValueError(f"hash_ids: rows={rows}, expected >= 2")
    ids = (hash_64(x) % np.uint64(rows - 1) + np.uint64(1)).astype(np.int32)
    return ids * x.is_not_null().to_numpy()


def place(words: pl.Series, x: pl.Series) -> np.ndarray:
    """int64 [n]: where each value stands in the sorted distinct `words`, -1 where it does not."""
    if not len(words):
        return np.full(len(x), -1)
    if words.dtype == pl.Int64:
        known, values = words.to_numpy(), x.cast(pl.Int64).fill_null(0).to_numpy()
        at = np.minimum(np.searchsorted(known, values), len(known) - 1)
        return np.where((known[at] == values) & x.is_not_null().to_numpy(), at, -1)
    codes = x.cast(pl.String).cast(pl.Enum(words), strict=False).to_physical()
    return codes.cast(pl.Int64).fill_null(-1).to_numpy()


def distinct(known: pl.Series | None, x: pl.Series) -> pl.Series:
    """The distinct values of both, without null, sorted."""
    new = x.drop_nulls().unique()
    return (new if known is None else pl.concat([known, new]).unique()).sort()


def count(counted: pl.DataFrame | None, x: pl.Series) -> pl.DataFrame:
    """Adds the values of `x` (a list's elements too) to {word, n}, sorted by word."""
    if isinstance(x.dtype, pl.List):
        x = x.explode()
    new = pl.DataFrame({"word": x.drop_nulls()}).group_by("word").agg(pl.len().alias("n"))
    if counted is not None:
        new = pl.concat([counted, new]).group_by("word").agg(pl.col("n").sum())
    return new.sort("word")


def vocabulary(counted: pl.DataFrame, min_count: int) -> pl.Series:
    """The words seen often enough, sorted."""
    return counted.filter(pl.col("n") >= min_count)["word"]


def vocabulary_ids(words: pl.Series, x: pl.Series) -> np.ndarray:
    """int32 [n]: 0 where null, 1 where not among the words, else 2 + the word's place."""
    at = place(words, x)
    ids = np.where(at < 0, UNKNOWN, at + KNOWN)
    return np.where(x.is_null().to_numpy(), MISSING, ids).astype(np.int32)


def padded(lists: pl.Series, values: int) -> tuple[pl.Series, np.ndarray, int]:
    """The first `values` elements of every list, flat, and the slot of each in [n, values].

    Also how many elements did not fit.
    """
    length = lists.list.len().fill_null(0)
    kept = lists.list.head(values)
    count_ = kept.list.len().fill_null(0).to_numpy().astype(np.int64)
    start = np.cumsum(count_) - count_
    row = np.repeat(np.arange(len(lists)), count_)
    slot = row * values + np.arange(len(row)) - np.repeat(start, count_)
    flat = kept.filter(kept.list.len() > 0).explode()
    return flat, slot, int(length.sum()) - int(count_.sum())


def linear(x: pl.Series, transform: str) -> np.ndarray:
    """float64 [n] before anything learned: log, symlog or the number; null is NaN."""
    values = x.cast(pl.Float64).fill_null(math.nan).to_numpy()
    if transform == "log":
        return np.log1p(values)
    if transform == "symlog":
        return np.sign(values) * np.log1p(np.abs(values))
    return values


@dataclasses.dataclass(frozen=True)
class Moments:
    """What a dense feature learns in one pass: count, mean, squared deviations; a sample.

    sample: float64 [<= SAMPLE], the values whose rows have the smallest hashes (uint64, `hashes`),
      so that which are taken depends neither on chunks nor on order.
    """

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0
    hashes: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))
    sample: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))

    def add(self, x: np.ndarray, rows: np.ndarray) -> "Moments":
        """x float64 [n], NaN = missing; rows int64 [n], distinct over the whole import."""
        known = np.isfinite(x)
        x, rows = x[known], rows[known]
        if not len(x):
            return self
        n = self.n + len(x)
        shift = float(x.mean()) - self.mean
        squares = self.squares + float(((x - x.mean()) ** 2).sum())
        hashes = np.concatenate([self.hashes, hash_64(pl.Series(rows))])
        sample = np.concatenate([self.sample, x])
        if len(hashes) > SAMPLE:
            kept = np.argpartition(hashes, SAMPLE)[:SAMPLE]
            hashes, sample = hashes[kept], sample[kept]
        return Moments(
            n=n,
            mean=self.mean + shift * len(x) / n,
            squares=squares + shift**2 * self.n * len(x) / n,
            hashes=hashes,
            sample=sample,
        )

    def learned(self, transform: str) -> dict[str, list[float]]:
        """JSON: {"shift", "scale"}, or {"knots", "levels"}, of this transform."""
        if transform == "none" or not self.n:
            return {"shift": [0.0], "scale": [1.0]}
        if transform == "quantile":
            ordered = np.sort(self.sample)
            # Values of the sample, not between them: few distinct ones then get their exact levels.
            shares = np.linspace(0, 1, KNOTS + 1)
            knots = np.unique(np.quantile(ordered, shares, method="inverted_cdf"))
            low, high = (np.searchsorted(ordered, knots, side) for side in ("left", "right"))
            levels = (low + high) / (2 * len(ordered))
            return {"knots": knots.tolist(), "levels": levels.tolist()}
        deviation = math.sqrt(self.squares / self.n)
        # The mean of one number many times is rounded, so that its deviation is not quite 0.
        constant = deviation <= 1e-12 * abs(self.mean)
        return {"shift": [self.mean], "scale": [1.0 if constant else deviation]}


def dense(x: pl.Series, spec: schema_file.Input, learned: dict[str, list[float]]) -> np.ndarray:
    """float32 [n]; a missing value is 0, the middle of what was learned."""
    values = linear(x, spec.transform)
    if "knots" in learned:
        level = np.interp(values, learned["knots"], learned["levels"])
        values = (level - 0.5) * math.sqrt(12)  # uniform, variance 1
    else:
        values = (values - learned["shift"][0]) / learned["scale"][0]
    return np.nan_to_num(values, nan=0.0).astype(np.float32)
