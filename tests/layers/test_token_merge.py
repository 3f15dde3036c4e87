"""Groups of adjacent events in packed rows, against loops over samples."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from rankjax.batch import CANDIDATE, GLOBAL, HISTORY, PAD
from rankjax.layers import token_merge
from rankjax.layers.transformer_block import Block
from tests import builders

S, G = 11, 3
MERGES = [(1, 2), (3, 1), (4, 2), (3, 50)]


@functools.cache
def grouped(merge, recent, samples=G):
    return jax.jit(lambda x: token_merge.groups(x, samples, merge, recent))


def by_loops(sample_s, merge, recent, samples=G):
    """[(sample, index from the newest, its events)], older groups of all samples in front."""
    old, new = [], []
    for g in range(samples):
        slots = list(np.flatnonzero(sample_s == g))
        found = []
        while slots:
            slots, group = slots[:-merge], slots[-merge:]
            padding = [-1] * (merge - len(group))
            found.append((g, len(found), [*padding, *map(int, group)]))
        old += found[recent:][::-1]
        new += found[:recent][::-1]
    return old, new


@pytest.mark.parametrize(("merge", "recent"), MERGES)
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(row=strategies.lists(strategies.integers(-1, G - 1), min_size=S, max_size=S))
def test_groups_of_a_packed_row(merge, recent, row):
    rows = np.array([row, [-1] * S, [1] * S], np.int32)
    found = grouped(merge, recent)(rows)
    M = min((S + G * (merge - 1)) // merge, S)
    assert found.event.shape == (3, M, merge) and found.recent == min(G * recent, M)
    for r, sample_s in enumerate(rows):
        old, new = by_loops(sample_s, merge, recent)
        empty = [(-1, 0, [-1] * merge)] * (M - len(old) - len(new))
        want = [*old, *empty, *new]
        got = list(zip(found.sample[r].tolist(), found.index[r].tolist(), found.event[r].tolist()))
        assert got == want and len(new) <= found.recent
        counts = [-(-int((sample_s == g).sum()) // merge) for g in range(G)]
        assert found.count[r].tolist() == counts


def test_one_sample_a_row_has_no_more_slots_than_groups():
    found = grouped(4, 2, samples=1)(np.array([[0, -1, 0, 0, 0, 0, 0, -1, 0, 0, 0]], np.int32))
    assert found.event[0].tolist() == [[-1, -1, -1, 0], [2, 3, 4, 5], [6, 8, 9, 10]]
    assert found.recent == 2 and found.count.tolist() == [[3]]
    by_one = grouped(1, 99, samples=1)(np.zeros((1, S), np.int32))
    assert by_one.event[0, :, 0].tolist() == list(range(S))


def test_gather_fills_what_no_event_stands_at():
    found = grouped(4, 2)(np.array([[0, 2, 2, -1, 2, 2, 2, 0, -1, -1, -1]], np.int32))
    x = np.arange(100, 100 + S)[None]
    flat = np.asarray(found.gather(jnp.asarray(x), -7))
    assert flat[0, -3:].tolist() == [[-7, -7, 100, 107], [-7, -7, -7, 101], [102, 104, 105, 106]]
    assert (flat[0, :-3] == -7).all()
    wide = np.asarray(found.gather(jnp.asarray(np.stack([x, -x], axis=-1))))
    np.testing.assert_array_equal(wide[..., 0], np.where(flat == -7, 0, flat))
    np.testing.assert_array_equal(wide[..., 1], -wide[..., 0])


def test_newer_counts_the_events_behind_in_the_same_sample():
    row = np.array([[0, 1, -1, 0, 0, 1, -1, 2]], np.int32)
    assert token_merge.newer(row, G)[0].tolist() == [2, 1, 0, 1, 0, 0, 0, 0]


def test_tokens_of_a_packed_row():
    """Sample 0 has three events in two groups, sample 1 has none, sample 2 one; K = 2, k = 1."""
    features = builders.features(builders.batch(np.random.default_rng(0)))
    one = lambda *x: jnp.asarray([x], jnp.int32)
    features = dataclasses.replace(
        features,
        history_sample=one(0, 0, 2, -1, 0),
        history_time=one(-9, -7, -5, 4, -3),
        history_order=one(-3, -2, -1, 4, -1),
        candidate_sample=one(2, -1, 0),
        candidate_time=one(6, 0, 7),
        candidate_order=one(0, 0, 0),
    )
    groups = grouped(2, 1)(features.history_sample)
    t = token_merge.tokens(features, groups, in_front=2, per_candidate=2)
    h, g, c, o = HISTORY, GLOBAL, CANDIDATE, PAD
    # a1, nothing, a2 and b; two globals of each sample; two tokens of each candidate.
    assert t.role[0].tolist() == [h, o, h, h, g, g, g, g, g, g, c, c, o, o, c, c]
    there = np.asarray(t.role[0]) != PAD
    read = lambda x: np.asarray(x[0])[there].tolist()
    assert read(t.segment) == [0, 0, 2, 0, 0, 1, 1, 2, 2, 2, 2, 0, 0]
    assert read(t.time) == [-9, -3, -5, 0, 0, 0, 0, 0, 0, 6, 6, 7, 7]
    assert read(t.position) == [0, 1, 0, 2, 3, 0, 1, 1, 2, 3, 4, 4, 5]
    assert read(t.group) == [-1] * 9 + [0, 0, 2, 2]
    assert read(t.bias_time) == read(t.time)
    # Without exact times what is compared is the order.
    inexact = dataclasses.replace(features, schema=builders.schema(time_exact=False))
    t = token_merge.tokens(inexact, groups, in_front=2, per_candidate=2)
    assert read(t.time) == [-3, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert read(t.bias_time)[:3] == [-9, -3, -5]


def test_the_mask_inside_groups():
    groups = grouped(2, 2)(np.array([[0, 0, 0, 1, 0, -1, 0, 1, -1, -1, -1]], np.int32))
    queries, keys, rule = groups.inner_mask()
    found = np.asarray(rule.allow(queries, keys)[0])
    # Sample 0: an event alone in its oldest group, and two pairs; sample 1: a pair.
    alone, pair, none = np.array([[0, 0], [0, 1]]), np.ones((2, 2)), np.zeros((2, 2))
    want = [alone, none, none, none, pair, pair, pair]
    assert found.shape == (14, 14)
    for m, block in enumerate(want):
        np.testing.assert_array_equal(found[2 * m : 2 * m + 2, 2 * m : 2 * m + 2], block)
    assert found.sum() == sum(x.sum() for x in want)


def test_inner_trans_stays_in_the_group_and_off_the_padding():
    rng = np.random.default_rng(0)
    rows = np.array([[0, 0, 1, 0, 1, 1, 1, -1, 1, -1, 0]], np.int32)
    groups = grouped(4, 2)(rows)
    x = rng.normal(size=(1, S, 6)).astype("f4")
    block = Block(heads=2)

    @jax.jit
    def run(params, x):
        bound = block.bind({"params": params})
        return token_merge.inner_trans(bound, groups.gather(x), groups, train=False)

    places, _, rule = groups.inner_mask()
    one_group = jax.tree.map(lambda x: x[:, :4], places)
    init = functools.partial(block.init, rule=rule, train=False)
    params = init(jax.random.key(0), x[:, :4], one_group, one_group)["params"]
    params = builders.moved(params, rng)
    before = np.asarray(run(params, x))
    event = np.asarray(groups.event)
    assert (before[event < 0] == 0).all() and (before[event >= 0] != 0).all()
    for slot in range(S):
        other = x.copy()
        other[0, slot, 0] += 1
        changed = (np.asarray(run(params, other)) != before).any(axis=3)[0]
        own = (event[0] == slot).any(axis=1)
        np.testing.assert_array_equal(changed, own[:, None] & (event[0] >= 0))
    silent = dict(params)
    for name in ("out", "ffn_out"):
        silent[name] = jax.tree.map(jnp.zeros_like, params[name])
    np.testing.assert_array_equal(run(silent, x), groups.gather(jnp.asarray(x)))


def test_of_candidate():
    features = builders.packed(builders.batch(np.random.default_rng(0)), 2)
    x = np.arange(2 * 2 * 3).reshape(2, 2, 3, 1)
    got = np.asarray(token_merge.of_candidate(features, jnp.asarray(x)))
    sample = np.maximum(features.candidate_sample, 0)
    np.testing.assert_array_equal(got, np.stack([x[r][sample[r]] for r in range(2)]))
    alone = builders.features(builders.batch(np.random.default_rng(0)))
    x = np.arange(4)[:, None]
    np.testing.assert_array_equal(
        token_merge.of_candidate(alone, jnp.asarray(x)), np.repeat(x, 4, axis=1)
    )


def test_whole_pads_behind_to_a_multiple():
    features = builders.features(builders.batch(np.random.default_rng(0)))
    assert token_merge.whole(features, 3).history_sample.shape == (4, 6)
    padded = token_merge.whole(features, 4)
    assert (padded.history_sample[:, 6:] == -1).all()
    for name in ("history_time", "history_order", "history_action"):
        assert getattr(padded, name).shape == (4, 8)
    for name, x in padded.history.items():
        assert x.shape[:2] == (4, 8)
        np.testing.assert_array_equal(x[:, :6], features.history[name])
