"""Samples side by side and jagged: every entry once and in its order, within every capacity."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankjax import loss, packing
from rankjax.packing import pack, pack_jagged
from tests import tiny

FEW = settings(max_examples=60, deadline=None, derandomize=True)


def holed(seed: int, samples: int, history: int = 7, candidates: int = 4):
    """A batch with padding in any slot, and some samples without any candidate."""
    rng = np.random.default_rng(seed)
    batch = tiny.batch(
        samples=samples, history=history, candidates=candidates, full=True, seed=seed
    )
    there = rng.random((samples, history)) < rng.random((samples, 1))
    shown = rng.random((samples, candidates)) < rng.random((samples, 1)) * 1.2
    return dataclasses.replace(
        batch,
        history_sample=np.where(there, 0, -1).astype(np.int32),
        candidate_sample=np.where(shown, 0, -1).astype(np.int32),
        weights=np.where(shown[..., None], batch.weights, 0).astype(np.float32),
        impression=np.where(shown, batch.impression, -1),
    )


def of_sample(batch, row: int, sample: int) -> dict:
    """All that one sample has, in its order; its user."""
    sides = {
        "history": (batch.history, batch.history_time, batch.history_order),
        "candidate": (
            *(batch.candidate, batch.candidate_time, batch.candidate_order),
            *(batch.labels, batch.weights, batch.impression),
        ),
    }
    found = {"user": jax.tree.map(lambda x: x[row, sample], batch.user)}
    for side, arrays in sides.items():
        mine = getattr(batch, f"{side}_sample")[row] == sample
        found[side] = jax.tree.map(lambda x, mine=mine: x[row][mine], arrays)
    return found


def test_pack_lays_rows_side_by_side():
    batch = tiny.batch(samples=6, history=3, candidates=2)
    packed = pack(batch, 3)
    assert packed.history["item"].shape == (2, 9) and packed.user["user"].shape == (2, 3)
    np.testing.assert_array_equal(
        packed.history["item"][0], np.concatenate(batch.history["item"][:3])
    )
    for row, sample in enumerate(batch.candidate_sample):
        mine = packed.candidate_sample[row // 3, row % 3 * 2 : row % 3 * 2 + 2]
        np.testing.assert_array_equal(mine, np.where(sample >= 0, row % 3, -1))


def test_pack_refuses_a_remainder():
    with pytest.raises(ValueError, match="multiple of 4"):
        pack(tiny.batch(samples=6), 4)


def test_a_jagged_row_by_hand():
    batch = tiny.batch(samples=4, history=5, candidates=2, full=True)
    lengths, counts = np.array([2, 5, 0, 3]), np.array([2, 1, 1, 0])
    batch = dataclasses.replace(
        batch,
        history_sample=np.where(np.arange(5) < lengths[:, None], 0, -1).astype(np.int32),
        candidate_sample=np.where(np.arange(2) < counts[:, None], 0, -1).astype(np.int32),
    )
    found = pack_jagged(batch, history=8, candidates=5, rows=2, samples=4)
    assert found.history_sample.tolist() == [[0, 0, 1, 1, 1, 1, 1, -1], [-1] * 8]
    assert found.candidate_sample.tolist() == [[0, 0, 1, 2, -1], [-1] * 5]
    item, row = batch.history["item"], found.history["item"]
    assert row.tolist() == [[*item[0, :2], *item[1], 0], [0] * 8]
    assert found.user["user"].tolist() == [[*batch.user["user"][:3, 0], 0], [0] * 4]
    assert found.impression.tolist() == [[0, 1, 2, 4, -1], [-1] * 5]
    assert found.history["tags"].shape == (2, 8, 3) and found.labels.shape == (2, 5, 2)
    # The three samples need no second row, and no fourth seat.
    least = pack_jagged(batch, history=8, candidates=5)
    assert least.user["user"].shape == (1, 3) and least.history_sample.shape == (1, 8)


@FEW
@given(
    seed=st.integers(0, 10**6),
    samples=st.integers(1, 12),
    history=st.integers(7, 20),
    candidates=st.integers(4, 12),
    most=st.one_of(st.none(), st.integers(1, 4)),
)
def test_every_sample_is_there_once_in_its_order(seed, samples, history, candidates, most):
    batch = holed(seed, samples)
    options = {"history": history, "candidates": candidates}
    found = pack_jagged(batch, **options, samples=most)
    assert found.history_sample.shape[1] == history
    assert found.candidate_sample.shape[1] == candidates
    assert found.schema is batch.schema and found.one_time == batch.one_time
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), found, batch)
    row_of = {
        tuple(found.impression[row][found.candidate_sample[row] == sample]): (row, sample)
        for row in range(len(found.impression))
        for sample in range(found.candidate_sample[row].max() + 1)
    }
    scored = np.flatnonzero(batch.candidate_mask.any(axis=1))
    assert len(row_of) == len(scored)
    for i in scored:
        own = of_sample(batch, i, 0)
        there = of_sample(found, *row_of[tuple(own["candidate"][-1])])
        jax.tree.map(np.testing.assert_array_equal, own, there)
    for side in ("history", "candidate"):
        number = getattr(found, f"{side}_sample")
        mask = number >= 0
        # Entries first and samples in turn, then padding; nobody else's entries.
        assert (mask == (np.arange(mask.shape[1]) < mask.sum(axis=1, keepdims=True))).all()
        assert all((np.diff(n[m]) >= 0).all() for n, m in zip(number, mask))
        assert mask.sum() == getattr(batch, f"{side}_mask")[scored].sum()
        for x in (*getattr(found, side).values(), getattr(found, f"{side}_time")):
            assert not x[~mask].any()
    assert not found.weights[~found.candidate_mask].any()
    assert (found.impression[~found.candidate_mask] == -1).all()
    width = next(iter(found.user.values())).shape[1]
    assert width == (most or max(1, found.candidate_sample.max() + 1))
    again = pack_jagged(batch, **options, samples=most)
    jax.tree.map(np.testing.assert_array_equal, found, again)
    # So the loss of the same logits is the same.
    logits = np.random.default_rng(0).normal(size=(samples * 4, 2))
    totals = [
        loss.multi_task(logits[b.impression], b.labels, b.weights, {}, b.schema)[0]
        for b in (batch, found)
    ]
    np.testing.assert_allclose(*totals, rtol=1e-6)


@FEW
@given(
    sizes=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 5)), max_size=30),
    samples=st.one_of(st.none(), st.integers(1, 5)),
)
def test_rows_hold_what_they_can(sizes, samples):
    history, candidates = np.array(sizes, int).reshape(-1, 2).T
    limits = {"history_slots": 12, "candidate_slots": 6, "samples": samples}
    row = packing.assign(history, candidates, **limits)
    np.testing.assert_array_equal(row < 0, candidates == 0)
    used = sorted(set(row) - {-1})
    assert used == list(range(len(used)))  # no row stays empty
    for r in used:
        mine = row == r
        assert history[mine].sum() <= 12 and candidates[mine].sum() <= 6
        assert samples is None or mine.sum() <= samples
    # Given exactly those rows it finds the same, and one row fewer is refused.
    if used:
        again = packing.assign(history, candidates, **limits, rows=len(used))
        np.testing.assert_array_equal(again, row)
    if len(used) > 1:
        with pytest.raises(ValueError, match=f"fits into no row; expected room in {used[-1]} rows"):
            packing.assign(history, candidates, **limits, rows=used[-1])


def test_long_samples_fill_up_with_short_ones():
    lengths = np.random.default_rng(0).integers(10, 1001, 512)
    row = packing.assign(lengths, np.ones(512, int), history_slots=1000, candidate_slots=64)
    # No assignment needs fewer rows: two samples of more than half a row share none.
    least = max(-(-lengths.sum() // 1000), (lengths > 500).sum())
    assert least <= row.max() + 1 <= 1.02 * least


def test_the_batch_needs_no_impressions_and_no_users():
    batch = tiny.batch().without_impression()
    found = pack_jagged(dataclasses.replace(batch, user={}), history=20, candidates=12)
    assert found.impression is None and found.user == {}


def test_a_batch_of_padding_is_one_row_of_padding():
    batch = tiny.batch(samples=2)
    none = np.full_like(batch.candidate_sample, -1)
    found = pack_jagged(dataclasses.replace(batch, candidate_sample=none), history=20, candidates=4)
    assert not found.candidate_mask.any() and not found.history_mask.any()
    assert found.user["user"].tolist() == [[0]] and found.labels.shape == (1, 4, 2)


def test_what_does_not_fit_is_named():
    batch = tiny.batch(samples=3, history=6, candidates=4, full=True)
    with pytest.raises(
        ValueError, match=r"sample 0 has 6 history entries and 4 candidates .* 5 history slots"
    ):
        pack_jagged(batch, history=5, candidates=4)
    with pytest.raises(ValueError, match=r"and 4 candidates and .* 3 candidate slots"):
        pack_jagged(batch, history=6, candidates=3)
    with pytest.raises(ValueError, match=r"sample 2 has .* expected room in 2 rows"):
        pack_jagged(batch, history=6, candidates=4, rows=2)
    with pytest.raises(ValueError, match=r"sample 2 has .* in 2 rows of .* and 1 samples"):
        pack_jagged(batch, history=99, candidates=99, rows=2, samples=1)
    for name in ("history", "candidates", "rows", "samples"):
        with pytest.raises(ValueError, match=f"{name[:7]}.*=0, expected at least 1"):
            pack_jagged(batch, **({"history": 6, "candidates": 4} | {name: 0}))


def test_a_packed_batch_is_refused():
    packed = pack(tiny.batch(), 2)
    with pytest.raises(
        ValueError, match=r"user\['activity'\] has shape \(3, 2\), expected \[R, 1\]"
    ):
        pack_jagged(packed, history=20, candidates=8)
    with pytest.raises(ValueError, match="history_sample holds 1, expected -1 and 0"):
        pack_jagged(dataclasses.replace(packed, user={}), history=20, candidates=8)


def test_padding_share():
    batch = holed(0, 8)
    want = {"history": 1 - batch.history_mask.mean(), "candidate": 1 - batch.candidate_mask.mean()}
    assert packing.padding_share(batch) == pytest.approx(want)
    tight = packing.padding_share(pack_jagged(batch, history=14, candidates=12))
    assert tight["history"] < want["history"]


def test_the_best_fit_is_the_row_with_least_room_left():
    """By hand: 6 and 5 open rows of 10; 4 fills the first, 3 goes where less is left, 2 behind."""
    ones = np.ones(5, int)
    row = packing.assign(np.array([6, 5, 4, 3, 2]), ones, history_slots=10, candidate_slots=9)
    np.testing.assert_array_equal(row, [0, 1, 0, 1, 1])
    # Candidates count too: of 2 slots a row the third sample finds none, whatever its history.
    row = packing.assign(np.array([1, 1, 1]), ones[:3], history_slots=10, candidate_slots=2)
    np.testing.assert_array_equal(row, [0, 0, 1])


def test_padding_is_counted_on_either_side():
    batch = tiny.batch(samples=4, history=5, candidates=3)
    found = packing.padding_share(batch)
    assert np.isclose(found["history"], np.mean(batch.history_sample < 0))
    assert np.isclose(found["candidate"], np.mean(batch.candidate_sample < 0))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 5))
@FEW
def test_dealt_rows_are_all_there_and_parts_about_equal(entries, shares):
    entries = np.asarray(entries + [0] * (-len(entries) % shares))
    order = packing.dealt(entries, shares)
    np.testing.assert_array_equal(np.sort(order), np.arange(len(entries)))
    load = entries[order].reshape(shares, -1).sum(axis=1)
    in_turn = entries.reshape(shares, -1).sum(axis=1)
    assert load.max() <= in_turn.max() + entries.max() and load.max() - load.min() <= 50
    np.testing.assert_array_equal(packing.dealt(entries, shares), order)


def test_dealt_refuses_rows_that_parts_cannot_share():
    with pytest.raises(ValueError, match="5 rows in 2 shares, expected a multiple"):
        packing.dealt(np.arange(5), 2)


@pytest.mark.parametrize("shares", [1, 3])
def test_shares_hold_every_sample_once_and_about_as_many_entries(shares):
    batch = holed(3, samples=24)
    found = packing.pack_shares(batch, shares, history=8, candidates=5)
    rows = len(found.candidate_sample) // shares
    assert len(found.candidate_sample) == shares * rows
    there = found.impression[found.impression >= 0]
    np.testing.assert_array_equal(np.sort(there), np.sort(batch.impression[batch.impression >= 0]))
    kept = (batch.candidate_mask.any(axis=1)[:, None] & batch.history_mask).sum()
    assert found.history_mask.sum() == kept
    entries = found.history_mask.sum(axis=1) + found.candidate_mask.sum(axis=1)
    load = entries.reshape(shares, rows).sum(axis=1)
    assert load.max() - load.min() <= 11  # of the longest sample
    more = packing.pack_shares(batch, shares, history=8, candidates=5, rows=rows + 1)
    assert len(more.candidate_sample) == shares * (rows + 1)
