"""The token stream of a hand-made packed row with several candidate times."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.batch import CANDIDATE, CONTEXT, HISTORY, PAD
from rankjax.layers import sequence
from rankjax.masks import MaskRule
from tests import builders


def row(time_exact=True):
    """One row of two samples: events at -9, -5, 2 and at -1; candidates at 0, 3 and at 0."""
    features = builders.features(builders.batch(np.random.default_rng(0)))
    one = lambda *x: jnp.asarray([x], jnp.int32)
    return dataclasses.replace(
        features,
        user={name: jnp.zeros((1, 2, 4)) for name in features.user},
        schema=builders.schema(time_exact=time_exact),
        history_sample=one(0, 0, 0, -1, 1, -1),
        history_time=one(-9, -5, 2, 0, -1, 0),
        history_order=one(-2, -1, 0, 0, -1, 0),
        candidate_sample=one(0, 0, -1, 1),
        candidate_time=one(0, 3, 0, 0),
        candidate_order=one(0, 1, 0, 0),
    )


@pytest.mark.parametrize("time_exact", [True, False])
def test_tokens_of_a_packed_row(time_exact):
    t = sequence.tokens(row(time_exact), context=2)
    U, E, C, o = CONTEXT, HISTORY, CANDIDATE, PAD
    assert t.role[0].tolist() == [U, U, U, U, E, E, E, o, E, o, C, C, o, C]
    assert t.segment[0].tolist() == [0, 0, 1, 1, 0, 0, 0, -1, 1, -1, 0, 0, -1, 1]
    assert t.group[0].tolist() == [-1] * 10 + [0, 1, 2, 3]
    read = np.asarray(t.role[0]) != PAD
    # Positions count within the sample; a candidate stands after the events that it may read.
    assert t.position[0][read].tolist() == [0, 1, 0, 1, 2, 3, 4, 2, 4, 5, 3]
    seconds = [0, 0, 0, 0, -9, -5, 2, -1, 0, 3, 0]
    assert t.bias_time[0][read].tolist() == seconds
    assert t.time[0][read].tolist() == (
        seconds if time_exact else [0, 0, 0, 0, -2, -1, 0, -1, 0, 1, 0]
    )


def test_an_event_may_take_two_tokens():
    t = sequence.tokens(row(), context=0, per_event=2)
    read = np.asarray(t.role[0]) != PAD
    assert t.position[0][read].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 4, 6, 2]
    assert t.time[0][read].tolist() == [-9, -9, -5, -5, 2, 2, -1, -1, 0, 3, 0]
    assert t.role.shape == (1, 2 * 6 + 4)


def test_last():
    t = sequence.tokens(row(), context=2)
    assert sequence.last(t, 4).position.tolist() == t.position[:, -4:].tolist()


def test_interleave():
    x = jnp.arange(4).reshape(1, 2, 2)
    assert sequence.interleave(x, 10 + x).tolist() == [[[0, 1], [10, 11], [2, 3], [12, 13]]]


def test_concat_keeps_the_order_of_names():
    values = {"a": jnp.ones((1, 1, 2)), "b": jnp.zeros((1, 1, 1))}
    assert sequence.concat(values, ["b", "a"], "float32").tolist() == [[[0, 1, 1]]]


def test_lengths_count_the_samples_own_context_and_events():
    t = sequence.tokens(row(), context=2)
    read = np.asarray(t.role[0]) != PAD
    assert sequence.lengths(t)[0][read].tolist() == [5, 5, 3, 3, 5, 5, 5, 3, 5, 5, 3]
    assert sequence.context_tokens(row(), "prefix") == 2
    assert sequence.context_tokens(row(), "none") == 0


@pytest.mark.parametrize("per_event", [1, 2])
def test_a_query_may_have_the_next_tokens_time(per_event):
    one = dataclasses.replace(row(), candidate_time=jnp.asarray([[7, 7, 0, 8]]))
    t = sequence.tokens(one, context=2, per_event=per_event)
    got = sequence.next_times(t)
    read = np.asarray(t.role[0]) >= HISTORY
    # The hole between the samples is no next token; the newest event has the candidates' time.
    want = [-5, 2, 7, 8] if per_event == 1 else [-9, -5, -5, 2, 2, 7, -1, 8]
    assert got.bias_time[0][read].tolist() == [*want, 7, 7, 8]
    assert got.time is t.time


def test_layer_masks():
    t, rule = sequence.tokens(row(), context=2), MaskRule()
    whole = sequence.layer_masks(t, t, rule, layers=3, rows=14)
    assert list(whole) == ["all layers"] and whole["all layers"] == (t, t, rule)
    pruned = sequence.layer_masks(t, t, rule, layers=3, rows=4)
    assert list(pruned) == ["layers before the last", "last layer"]
    assert pruned["last layer"][0].segment.shape == (1, 4) and pruned["last layer"][1] is t
    assert list(sequence.layer_masks(t, t, rule, layers=1, rows=4)) == ["last layer"]


def test_samples_come_from_the_users_features_or_the_candidates():
    features = builders.packed(builders.batch(np.random.default_rng(0)), 2)
    assert sequence.samples(features) == 2
    assert sequence.samples(dataclasses.replace(features, user={})) == 8
