"""Batches gathered from a log: pure functions of (seed, step), prefetched through Grain.

A batch is gathered whole with vectorised NumPy from memory-mapped columns. Nothing about it depends
on the number of threads or of hosts: host p of P takes rows p R / P .. (p + 1) R / P of the global
batch, and a run that stopped goes on with `stream(batches, start=step)`.
"""

from collections.abc import Iterator
from typing import Literal

import grain
import numpy as np

from rankjax import packing
from rankjax.batch import Batch
from rankjax.data import event_log
from rankjax.data import samples as samples_module
from rankjax.schema import Feature

MAX_SHAPES = 4
FRACTIONS = (0.125, 0.25, 0.5, 1.0)  # of the longest history and the most candidates
WORTH = 0.02  # a further shape (a further compilation) must save this share of all slots
INT32 = np.iinfo(np.int32)


def batch_samples_for(samples: samples_module.Samples, impressions: int) -> int:
    """How many samples hold about `impressions` impressions on average; at least 1."""
    mean = len(samples.impressions) / max(len(samples), 1)
    return max(1, round(impressions / max(mean, 1.0)))


def _choose_shapes(history: np.ndarray, candidates: np.ndarray) -> tuple[tuple[int, int], ...]:
    """At most four padded shapes (S, C) for steps that need `history` x `candidates` [steps].

    The largest, then greedily from the grid of FRACTIONS whichever saves most slots (S + C).
    Ascending by slots.
    """
    most = max(int(history.max(initial=1)), 1), max(int(candidates.max(initial=1)), 1)
    grid = [
        (-int(-most[0] * s // 1), -int(-most[1] * c // 1)) for s in FRACTIONS for c in FRACTIONS
    ]
    chosen, cost = [most], np.full(len(history), sum(most))
    while len(chosen) < MAX_SHAPES:
        costs = [
            np.where((history <= S) & (candidates <= C), np.minimum(cost, S + C), cost)
            for S, C in grid
        ]
        totals = [int(c.sum()) for c in costs]
        best = int(np.argmin(totals))
        if totals[best] >= (1 - WORTH) * cost.sum():
            break
        chosen.append(grid[best])
        cost = costs[best]
    return tuple(sorted(set(chosen), key=lambda shape: (sum(shape), shape)))


class Batches:
    """The batches of one pass over some samples; `batches[step]` gathers one.

    Args:
      log, samples: what `EventLog.open` and `samples.build` gave.
      batch_samples: samples of the global batch B; the last batch is filled up with empty rows
        (no history, no candidates), so that nothing is dropped.
      shares: of equally many rows, one for each device; the batch's samples are dealt out so that
        shares have about equally many entries, and empty rows fill up to R, a multiple of them.
        Which samples a step holds does not depend on it.
      order: "time", the order of the samples; "shuffled", a permutation drawn from `seed`.
      process_index, process_count: this host's part, rows [p R / P, (p + 1) R / P) of each batch.
    Attributes:
      shapes: at most four (S, C); a step takes the smallest that holds its global batch, so that
        all hosts agree.
    Raises:
      ValueError: rows that are no multiple of process_count, an unknown order, a derived feature
        that this log cannot give.
    """

    def __init__(
        self,
        log: event_log.EventLog,
        samples: samples_module.Samples,
        *,
        batch_samples: int,
        shares: int = 1,
        order: Literal["time", "shuffled"] = "time",
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_samples < 1 or shares < 1:
            raise ValueError(
                f"Batches: batch_samples={batch_samples}, shares={shares}, expected at least 1"
            )
        rows = batch_samples + -batch_samples % shares
        if process_count < 1 or rows % process_count:
            raise ValueError(
                f"Batches: batch_samples={batch_samples}, {rows} rows in {shares} shares, expected "
                f"a multiple of process_count={process_count}"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(
                f"Batches: process_index={process_index}, expected 0 .. {process_count - 1}"
            )
        if order not in ("time", "shuffled"):
            raise ValueError(f"Batches: order={order!r}, expected 'time' or 'shuffled'")
        samples_module.check_derived(log)
        self.log, self.samples, self.schema = log, samples, log.schema
        self.batch_samples, self.order, self.seed = batch_samples, order, seed
        self.rows, self.shares = rows, shares
        part = rows // process_count
        self._part = slice(process_index * part, (process_index + 1) * part)
        self._permutation = None
        if order == "shuffled":
            self._permutation = np.random.default_rng(seed).permutation(len(samples))
        self.shapes = _choose_shapes(
            self._step_most(samples.event_counts), self._step_most(samples.candidate_counts)
        )

    def __len__(self) -> int:
        """Steps."""
        return (len(self.samples) + self.batch_samples - 1) // self.batch_samples

    def _step_most(self, counts: np.ndarray) -> np.ndarray:
        """The largest count among the samples of each step, [steps]."""
        if not len(counts):
            return counts
        if self._permutation is not None:
            counts = counts[self._permutation]
        return np.maximum.reduceat(counts, np.arange(0, len(counts), self.batch_samples))

    def sample_ids(self, step: int) -> np.ndarray:
        """Which sample each row of the global batch holds: int64 [R], -1 = an empty row."""
        if not 0 <= step < len(self):
            raise IndexError(f"Batches: found step {step}, expected 0 .. {len(self) - 1}")
        at = np.arange(step * self.batch_samples, (step + 1) * self.batch_samples)
        inside = at < len(self.samples)
        at = np.minimum(at, len(self.samples) - 1)
        ids = at if self._permutation is None else self._permutation[at]
        ids = np.where(inside, ids, -1)
        if self.shares == 1:
            return ids
        ids = np.concatenate([ids, np.full(self.rows - self.batch_samples, -1)])
        events, candidates = self._sizes(ids)
        return ids[packing.dealt(np.where(ids >= 0, events + candidates, 0), self.shares)]

    def shape(self, step: int) -> tuple[int, int]:
        """(S, C) of a step's batch."""
        return self._shape(self.sample_ids(step))

    def _shape(self, ids: np.ndarray) -> tuple[int, int]:
        S, C = (sizes.max() for sizes in self._sizes(ids[ids >= 0]))
        return next(shape for shape in self.shapes if shape[0] >= S and shape[1] >= C)

    def _sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(events, candidates) of these samples."""
        samples, offsets = self.samples, self.samples.candidate_offsets
        events = samples.event_end[ids] - samples.event_start[ids]
        return events, offsets[ids + 1] - offsets[ids]

    def _take(self, file: str, name: str, rows: np.ndarray) -> np.ndarray:
        """Values of `rows`, whatever for rows outside the file (the caller masks them)."""
        column = self.log.column(file, name)
        if not len(column):
            return np.zeros((*rows.shape, *column.shape[1:]), column.dtype)
        return column.take(rows, axis=0, mode="clip")

    def _scaled(self, f: Feature, file: str, rows: np.ndarray) -> np.ndarray:
        """A stored feature of `rows` as models read it."""
        values = self._take(file, f.name, rows)
        if f.kind != "dense":
            return values
        return (values - np.float32(f.shift)) / np.float32(f.scale)

    def __getitem__(self, step: int) -> Batch:
        """This host's rows of the batch: arrays [R / P, ...] as `Batch` says, NumPy."""
        ids = self.sample_ids(step)
        S, C = self._shape(ids)
        ids = ids[self._part]
        samples, real = self.samples, ids >= 0
        ids = np.maximum(ids, 0)
        user = np.where(real, samples.user[ids], 0)
        reference, time = samples.reference[ids][:, None], samples.time[ids][:, None]
        return Batch(
            user={f.name: self._scaled(f, "users", user[:, None]) for f in self.schema.user},
            **self._history(ids, real, S, reference, time),
            **self._candidates(ids, real, C, time),
            schema=self.schema,
            one_time=samples.one_time,
        )

    def _history(
        self, ids: np.ndarray, real: np.ndarray, S: int, reference: np.ndarray, time: np.ndarray
    ) -> dict[str, object]:
        """The history fields [B, S], for samples `ids` [B] with reference [B, 1], time [B, 1]."""
        start, end = self.samples.event_start[ids], self.samples.event_end[ids]
        rows = start[:, None] + np.arange(S)
        mask = (rows < end[:, None]) & real[:, None]
        item = self._take("events", "item", rows) * mask
        happened = self._take("events", "time", rows)
        return {
            "history": self._features(
                self.schema.history, "events", rows, mask, item, happened, time
            ),
            "history_sample": mask.astype(np.int32) - 1,
            "history_time": _int32(happened - time, mask),
            "history_order": _int32(rows - reference, mask),
        }

    def _candidates(
        self, ids: np.ndarray, real: np.ndarray, C: int, time: np.ndarray
    ) -> dict[str, object]:
        """The candidate fields [B, C], for samples `ids` [B] with reference time [B, 1]."""
        samples = self.samples
        at = samples.candidate_offsets[ids][:, None] + np.arange(C)
        mask = (at < samples.candidate_offsets[ids + 1][:, None]) & real[:, None]
        rows = samples.impressions.take(at, mode="clip")
        item = self._take("impressions", "item", rows) * mask
        shown = self._take("impressions", "time", rows)
        labels = {
            task.name: self._take("impressions", task.name, rows) * mask
            for task in self.schema.tasks
        }
        weights = [labels[t.weight] if t.weight else mask for t in self.schema.tasks]
        return {
            "candidate": self._features(
                self.schema.candidate, "impressions", rows, mask, item, shown, time
            ),
            "candidate_sample": mask.astype(np.int32) - 1,
            "candidate_time": _int32(shown - time, mask),
            "candidate_order": samples.order.take(at, mode="clip") * mask,
            "labels": np.stack([x.astype(np.float32) for x in labels.values()], axis=-1),
            "weights": np.stack([x.astype(np.float32) for x in weights], axis=-1),
            "impression": np.where(mask, rows, -1),
        }

    def _features(
        self,
        features: tuple[Feature, ...],
        file: str,
        rows: np.ndarray,
        mask: np.ndarray,
        item: np.ndarray,
        when: np.ndarray,
        reference: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """{name: [B, N] or [B, N, M]} of event or impression `rows` [B, N] and their items."""
        found = {}
        item = item.astype(np.intp)  # once, not once per column
        for f in features:
            if f.side == "item":
                found[f.name] = self._scaled(f, "items", item)  # row 0 is zeros
                continue
            if f.derive:
                rule = samples_module.DERIVED[f.derive]
                birth = self._take("items", "birth", item) if rule.birth else when
                values = rule.rule(when, reference, birth)
                if f.kind == "dense":
                    values = ((values - f.shift) / f.scale).astype(np.float32)
                else:
                    values = values.astype(np.int32)
            else:
                values = self._scaled(f, file, rows)
            values *= mask[..., None] if f.kind == "ids" else mask
            found[f.name] = values
        return found


def _int32(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """As int32, clipped (times more than 68 years apart), 0 where masked."""
    return np.clip(x, INT32.min, INT32.max).astype(np.int32) * mask


def stream(
    batches: Batches, start: int = 0, *, threads: int = 2, prefetch: int = 4
) -> Iterator[tuple[int, Batch]]:
    """(step, batch) from step `start` on, gathered ahead of time by Grain.

    threads: 0 gathers in the caller's thread. prefetch: batches held ready; at least 1.
    Raises ValueError where `start` lies outside 0 .. steps.
    """
    if not 0 <= start <= len(batches):
        raise ValueError(f"loader.stream: start={start}, expected 0 .. {len(batches)}")
    if threads < 0 or prefetch < 1:
        raise ValueError(
            f"loader.stream: threads={threads}, prefetch={prefetch}, expected threads >= 0 and "
            "prefetch >= 1"
        )
    return _stream(batches, start, threads, prefetch)


def _stream(
    batches: Batches, start: int, threads: int, prefetch: int
) -> Iterator[tuple[int, Batch]]:
    if start == len(batches):
        return
    steps = grain.MapDataset.range(start, len(batches))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    iterator = iter(steps.map(lambda step: (step, batches[step])).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
