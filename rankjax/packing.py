"""Several samples in one row of a Batch: side by side with their padding, or jagged, without it.

Models read within a sample only (`history_sample`, `Tokens.segment`), so that every layout of the
same samples gives the same scores and the same loss. `assign` needs nothing but lengths, to plan
with: how many rows a step takes.
"""

import dataclasses
import heapq
from typing import Any

import jax
import numpy as np

from rankjax.batch import Array, Batch


def pack(batch: Batch, samples_per_row: int) -> Batch:
    """Lays `samples_per_row` unpacked rows side by side into one row, the padding in between.

    The row count must be a multiple of `samples_per_row`; shapes become [R / G, G], [R / G, G * S]
    and [R / G, G * C]. NumPy in, NumPy out.
    """
    G = samples_per_row
    R = batch.candidate_sample.shape[0]
    if R % G or any(x.shape[1] != 1 for x in batch.user.values()):
        raise ValueError(f"pack: {R} unpacked rows expected to be a multiple of {G}")

    def side_by_side(x: np.ndarray) -> np.ndarray:
        return np.asarray(x).reshape(R // G, G * x.shape[1], *x.shape[2:])

    packed = jax.tree.map(side_by_side, batch)

    def number(sample: np.ndarray) -> np.ndarray:
        slot = np.repeat(np.arange(G, dtype=np.int32), sample.shape[1] // G)
        return np.where(sample >= 0, slot, -1).astype(np.int32)

    return dataclasses.replace(
        packed,
        history_sample=number(packed.history_sample),
        candidate_sample=number(packed.candidate_sample),
    )


def pack_jagged(
    batch: Batch,
    *,
    history: int,
    candidates: int,
    rows: int | None = None,
    samples: int | None = None,
) -> Batch:
    """Lays samples of any length directly behind each other; padding stands at a row's end only.

    `assign` says which samples share a row; there they are numbered in the order of the batch. A
    sample without a valid candidate (of a ragged last batch) is neither scored nor learned from,
    and takes no place. The same batch gives the same rows. NumPy in, NumPy out.

    Sizes for static shapes: as many history slots as the longest sample has (of 512 samples of 10
    to 1000 events, rows of 1000 slots are 2% padding, rows of 2000 under 1%); the most rows that
    any step needs, by `assign`; and about twice the mean of samples in a row as `samples`, since
    models that have context tokens compute them for all G.

    Args:
      batch: unpacked; its padding may stand in any slot.
      history, candidates: slots of a row, S and C of the result.
      rows: of the result; None = as few as `assign` needs, at least 1.
      samples: G of the result; None = as many as the fullest row has, at least 1.
    Returns: the Batch [rows, ...]. Padding is as the loader's, sample and impression -1, else 0;
      the users of unused samples are 0 too.
    Raises ValueError for a batch that is packed already, for capacities below 1, and for a sample
      that fits into no row.
    """
    for name, x in batch.user.items():
        if x.shape[1] != 1:
            raise ValueError(
                f"pack_jagged: user[{name!r}] has shape {x.shape}, expected [R, 1] of an unpacked "
                "batch"
            )
    masks = {"history": batch.history_mask, "candidate": batch.candidate_mask}
    for side in masks:
        if (most := getattr(batch, f"{side}_sample").max(initial=-1)) > 0:
            raise ValueError(
                f"pack_jagged: {side}_sample holds {most}, expected -1 and 0 of an unpacked batch"
            )
    slots = {"history": history, "candidate": candidates}
    row_r = assign(
        *(mask.sum(axis=1) for mask in masks.values()),
        **{"history_slots": history, "candidate_slots": candidates},
        **{"rows": rows, "samples": samples},
    )
    rows = max(1, row_r.max(initial=-1) + 1) if rows is None else rows
    placed = np.flatnonzero(row_r >= 0)
    number_r = np.full(len(row_r), -1, np.int32)
    number_r[placed] = _turn(row_r[placed])
    samples = max(1, number_r.max(initial=-1) + 1) if samples is None else samples

    def moved(x: Array, size: int, source: Any, target: Any, fill: int = 0) -> np.ndarray:
        laid = np.full((rows, size, *x.shape[2:]), fill, x.dtype)
        laid[target] = np.asarray(x)[source]
        return laid

    seats = samples, (placed, 0), (row_r[placed], number_r[placed])
    found = {"user": {name: moved(x, *seats) for name, x in batch.user.items()}}
    for side, mask in masks.items():
        entry = np.nonzero(mask & (row_r >= 0)[:, None])  # sample by sample, old -> new
        row_n = row_r[entry[0]]
        seats = slots[side], entry, (row_n, _turn(row_n))
        of_entry = np.broadcast_to(number_r[:, None], mask.shape)
        found[side] = {name: moved(x, *seats) for name, x in getattr(batch, side).items()}
        found[f"{side}_sample"] = moved(of_entry, *seats, fill=-1)
        own = ("time", "order")
        found |= {f"{side}_{x}": moved(getattr(batch, f"{side}_{x}"), *seats) for x in own}
    # `seats` are the candidates' now.
    found |= {name: moved(getattr(batch, name), *seats) for name in ("labels", "weights")}
    if batch.impression is not None:
        found["impression"] = moved(batch.impression, *seats, fill=-1)
    return dataclasses.replace(batch, **found)


def assign(
    history: np.ndarray,
    candidates: np.ndarray,
    *,
    history_slots: int,
    candidate_slots: int,
    rows: int | None = None,
    samples: int | None = None,
) -> np.ndarray:
    """The row of each sample, int64 [R]; -1 for one without candidates, which takes no place.

    Best fit, decreasing: the sample that takes most of a row (of its history or of its candidate
    slots) first, each into the row that it leaves least room in, or else into a new one. Ties go by
    order, so equal lengths give equal rows.

    Args:
      history, candidates: int [R], entries of each sample.
      history_slots, candidate_slots: of a row.
      rows, samples: at most so many rows, and samples in a row; None = any number.
    Raises ValueError for capacities below 1, and for a sample that fits into no row; it may be that
      a cleverer assignment to that many `rows` exists.
    """
    limits = {"history_slots": history_slots, "candidate_slots": candidate_slots}
    for name, limit in (limits | {"rows": rows, "samples": samples}).items():
        if limit is not None and limit < 1:
            raise ValueError(f"packing: {name}={limit}, expected at least 1")
    capacity = np.array([history_slots, candidate_slots], np.int64)
    size_r2 = np.stack([history, candidates], axis=1).astype(np.int64)
    # Shares of a row over a common denominator, so that ties are exact.
    share_r2 = size_r2 * capacity[::-1]
    row_r = np.full(len(size_r2), -1, np.int64)
    most = len(size_r2) if rows is None else min(rows, len(size_r2))
    free_n2, seats_n, opened = np.tile(capacity, (most, 1)), np.zeros(most, np.int64), 0
    for i in np.argsort(-share_r2.max(axis=1), kind="stable"):
        if not size_r2[i, 1]:
            continue
        fits_n = (free_n2[:opened] >= size_r2[i]).all(axis=1)
        if samples is not None:
            fits_n &= seats_n[:opened] < samples
        if fits_n.any():
            room_n = free_n2[:opened] @ capacity[::-1]
            row = np.argmin(np.where(fits_n, room_n, np.iinfo(np.int64).max))
        elif opened < most and (size_r2[i] <= capacity).all():
            row, opened = opened, opened + 1
        else:
            of_row = "" if samples is None else f" and {samples} samples"
            raise ValueError(
                f"packing: sample {i} has {size_r2[i, 0]} history entries and {size_r2[i, 1]} "
                f"candidates and fits into no row; expected room in {rows or 'any number of'} rows "
                f"of {history_slots} history slots, {candidate_slots} candidate slots{of_row}"
            )
        row_r[i] = row
        free_n2[row] -= size_r2[i]
        seats_n[row] += 1
    return row_r


def dealt(entries: np.ndarray, shares: int) -> np.ndarray:
    """An order of rows [R] in which `shares` equal parts have about equally many entries.

    The longest row first, each to the part with the least entries that has a place left. Equal
    input gives equal output. Raises ValueError for rows that are no multiple of `shares`.
    """
    if len(entries) % shares:
        raise ValueError(f"packing: {len(entries)} rows in {shares} shares, expected a multiple")
    places = len(entries) // shares
    loads, parts = [(0, share) for share in range(shares)], [[] for _ in range(shares)]
    for row in np.argsort(-entries, kind="stable").tolist():
        load, share = heapq.heappop(loads)
        parts[share].append(row)
        if len(parts[share]) < places:
            heapq.heappush(loads, (load + int(entries[row]), share))
    return np.concatenate([np.sort(part) for part in parts]).astype(np.int64)


def pack_shares(
    batch: Batch, shares: int, *, history: int, candidates: int, rows: int | None = None
) -> Batch:
    """`pack_jagged` for so many devices: each gets samples of about equally many entries.

    How many samples a device gets follows from their lengths, and so do its rows; all get as many
    rows as the one that needs most, or `rows`. The loss is a mean over all of them, so that a
    device's gradient counts by what it holds (MTGR's dynamic batch size, arXiv 2505.18654).
    Shapes: [shares * rows, history] and [shares * rows, candidates]; share s is rows s * rows to
    (s + 1) * rows - 1.
    """
    lengths = [mask.sum(axis=1) for mask in (batch.history_mask, batch.candidate_mask)]
    entries = np.where(lengths[1] > 0, lengths[0] + lengths[1], 0)
    load, share_r = np.zeros(shares, np.int64), np.zeros(len(entries), np.int64)
    for row in np.argsort(-entries, kind="stable"):
        share_r[row] = np.argmin(load)
        load[share_r[row]] += entries[row]
    sizes = {"history_slots": history, "candidate_slots": candidates}
    placed = [assign(*(x[share_r == s] for x in lengths), **sizes) for s in range(shares)]
    if rows is None:
        rows = max(1, *(1 + row.max(initial=-1) for row in placed))
    samples = max(1, *(np.bincount(row[row >= 0]).max(initial=1) for row in placed))
    packed = [
        pack_jagged(
            jax.tree.map(lambda x, s=s: x[share_r == s], batch),
            **{"history": history, "candidates": candidates},
            **{"rows": rows, "samples": int(samples)},
        )
        for s in range(shares)
    ]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *packed)


def padding_share(batch: Batch) -> dict[str, float]:
    """The share of the slots that are padding, of either side of a batch, packed or not."""
    masks = {"history": batch.history_mask, "candidate": batch.candidate_mask}
    return {side: 1 - float(np.mean(mask)) for side, mask in masks.items()}


def _turn(row_n: np.ndarray) -> np.ndarray:
    """How many entries of its own row stand before each one, int64 [n]."""
    order = np.argsort(row_n, kind="stable")
    ordered = row_n[order]
    turn = np.empty(len(row_n), np.int64)
    turn[order] = np.arange(len(row_n)) - np.searchsorted(ordered, ordered)
    return turn
