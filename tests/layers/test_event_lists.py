"""Lists of event tokens: merged per sample, cut at their old end, packed or not."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from rankjax.batch import HISTORY, PAD
from rankjax.layers import event_lists, sequence
from tests import builders
from tests.references import din
from tests.references import onetrans as reference

G, S = 2, 10
CASES = [("time", 1, 4), ("time", 3, 20), ("intent", 1, 4), ("intent", 3, 4), ("intent", 2, 20)]


def row(sample, action, users=G, candidates=4):
    """Features of one row; an event's time is its slot, its features tell its slot apart."""
    base = builders.features(builders.batch(np.random.default_rng(0)))
    rng = np.random.default_rng(1)
    one = lambda *x: jnp.asarray([x], jnp.int32)
    sample = np.asarray(sample, np.int32)
    width = {"item": 4, "price": 1, "tag": 4, "action": 4}
    return dataclasses.replace(
        base,
        user={"age": jnp.zeros((1, users, 4))} if users else {},
        history={k: jnp.asarray(rng.normal(size=(1, S, w)), "f4") for k, w in width.items()},
        history_sample=one(*sample),
        history_action=one(*action),
        history_time=one(*range(-S, 0)),
        history_order=one(*range(-S, 0)),
        candidate_sample=one(*[0] * candidates),
        candidate_time=one(*[0] * candidates),
    )


@functools.cache
def lists_of(by, sequences, history):
    def run(features):
        found = event_lists.merge(features, history=history, sequences=sequences, by=by)
        ends = [event_lists.last(found, n, sequence.samples(features)) for n in range(S)]
        return found, ends

    return jax.jit(run)


def listed(found, g):
    """[(event slot or None for a separator, sequence)] of sample g, by position."""
    t = jax.tree.map(lambda x: np.asarray(x[0]), found.tokens)
    at = np.flatnonzero((t.segment == g) & (t.role == HISTORY))
    at = at[np.argsort(t.position[at])]
    assert t.position[at].tolist() == list(range(len(at)))
    slot, sequence, separator = (np.asarray(x[0]) for x in found[2:])
    return [(None if separator[i] else int(slot[i]), int(sequence[i])) for i in at]


@pytest.mark.parametrize("by, sequences, history", CASES)
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    sample=st.lists(st.integers(-1, G - 1), min_size=S, max_size=S),
    action=st.lists(st.integers(0, 4), min_size=S, max_size=S),
)
def test_lists_are_stable_merges_of_the_newest_events(by, sequences, history, sample, action):
    found, ends = lists_of(by, sequences, history)(row(sample, action))
    c = {"merge": by, "sequences": sequences, "history": history}
    for g in range(G):
        slots = [s for s in range(S) if sample[s] == g]
        want = [
            (None if e is None else slots[e], i)
            for e, i in reference.merged([action[s] for s in slots], c)
        ]
        got = listed(found, g)
        assert got == want
        events = [s for s, _ in got if s is not None]
        assert sorted(events) == slots[-history:]  # a permutation of the newest
        if by == "time":
            assert events == sorted(events)
        age = np.asarray(found.age[0])[np.asarray(found.tokens.segment[0]) == g]
        assert sorted(age) == list(range(len(want)))
        for most, t in enumerate(ends):
            mine = (np.asarray(t.segment[0]) == g) & (np.asarray(t.role[0]) == HISTORY)
            kept = np.asarray(t.position[0])[mine]
            assert sorted(kept) == list(range(len(want)))[max(len(want) - most, 0) :]
    M = found.age.shape[1]
    separators = G * (sequences - 1) * (by == "intent")
    assert min(S + separators, G * event_lists.length(history, sequences, by)) == M
    assert [t.role.shape[1] for t in ends] == [min(M, G * most) for most in range(S)]
    # One sample a row: the list stands right-aligned and in order.
    alone, _ = lists_of(by, sequences, history)(row([min(g, 0) for g in sample], action))
    position = np.asarray(alone.tokens.position[0])[np.asarray(alone.tokens.segment[0]) == 0]
    assert by == "intent" or position.tolist() == sorted(position)


def test_times_and_padding():
    found, _ = lists_of("intent", 3, 20)(row([0, -1, 1] + [-1] * 7, [1, 1, 3] + [0] * 7))
    t = jax.tree.map(lambda x: np.asarray(x[0]), found.tokens)
    padding = t.segment < 0
    assert set(t.role[padding]) == {PAD} and not t.position[padding].any()
    separators = np.asarray(found.separator[0])
    assert separators.sum() == 4 and set(t.time[separators]) == {np.iinfo(np.int32).min}
    events = (t.role == HISTORY) & ~separators
    assert t.time[events].tolist() == [-10, -8] and set(t.group) == {-1}


def test_without_user_features_the_candidates_bound_the_samples():
    features = row([0, 1] * 5, [1] * S, users=0, candidates=3)
    assert sequence.samples(features) == 3
    found = event_lists.merge(features, history=2)
    assert found.age.shape == (1, 6)
    for g in range(2):
        assert listed(found, g) == [(6 + g, 0), (8 + g, 0)]


@pytest.mark.parametrize(
    "by, sequences, hidden", [("time", 1, 0), ("time", 2, 3), ("intent", 2, 0)]
)
def test_tokens_are_made_of_their_events(by, sequences, hidden):
    rng, features = np.random.default_rng(2), row([0, 1, -1, 0, 1] * 2, [1, 2, 3, 0, 1] * 2)
    embed = event_lists.Embed(6, hidden, sequences, by, positions=12)
    lists = event_lists.merge(features, history=20, sequences=sequences, by=by)
    shapes = jax.eval_shape(embed.init, jax.random.key(0), features, lists)["params"]
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), shapes)
    got = np.asarray(jax.jit(embed.apply)({"params": params}, features, lists))[0]
    names = (*din.ITEMS, *din.EVENTS)
    of_slot = np.concatenate([np.asarray(features.history[n][0], float) for n in names], axis=1)
    c = {"merge": by, "sequences": sequences, "history": 20, "pos_emb": "input"}
    t = jax.tree.map(lambda x: np.asarray(x[0]), lists.tokens)
    for g in range(G):
        slots = np.flatnonzero(np.asarray(features.history_sample[0]) == g)
        width = np.cumsum([4, 1, 4, 4])
        history = dict(zip(names, np.split(of_slot[slots], width[:-1], axis=1)))
        actions = np.asarray(features.history_action[0])[slots].tolist()
        sample = {"history": history, "actions": actions}
        want = reference.event_tokens(sample, {"events": builders.float64(params)}, c)
        at = np.flatnonzero((t.segment == g) & (t.role == HISTORY))
        np.testing.assert_allclose(got[at[np.argsort(t.position[at])]], want, rtol=0, atol=1e-5)
    F = hidden or 13
    count = sequences * (6 * F + 6 + (13 * F + F if hidden else 0)) + 12 * 6
    several = {"time": 6 * sequences, "intent": 6}[by] if sequences > 1 else 0
    assert builders.count(params) == count + several


@pytest.mark.parametrize(
    ("sides", "sequences", "match"),
    [(("item", "event"), 1, "no item or event feature"), (("event",), 2, "has no action")],
)
def test_schemas_that_make_no_tokens_are_refused(sides, sequences, match):
    features = row([0] * S, [1] * S)
    kept = tuple(f for f in features.schema.features if f.side not in sides)
    features = dataclasses.replace(
        features, schema=dataclasses.replace(features.schema, features=kept)
    )
    lists = event_lists.merge(features, history=4, sequences=sequences)
    with pytest.raises(ValueError, match=match):
        event_lists.Embed(6, 0, sequences).init(jax.random.key(0), features, lists)
