"""Positions that count backwards from the newest event, and square-root time buckets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rankjax.batch import CONTEXT, PAD
from rankjax.layers import sequence, timed_positions
from tests import builders


def tokens(context=2):
    """A packed row: events at -7200, -60, -59 (a hole before them) and -15; candidates at 0."""
    features = builders.features(builders.batch(np.random.default_rng(0)))
    one = lambda *x: jnp.asarray([x], jnp.int32)
    features = dataclasses.replace(
        features,
        user={name: jnp.zeros((1, 2, 4)) for name in features.user},
        history_sample=one(0, -1, 0, 0, -1, 1),
        history_time=one(-7200, 9, -60, -59, 5, -15),
        history_order=one(-3, 0, -2, -1, 0, -1),
        candidate_sample=one(0, 0, -1, 1),
        candidate_time=one(0, 0, 0, 0),
        candidate_order=one(0, 0, 0, 0),
    )
    return sequence.tokens(features, context=context)


def test_positions_count_backwards_from_the_newest_event():
    t = tokens()
    read = np.asarray(t.role[0]) != PAD
    got = timed_positions.position_index(t, 2)[0][read]
    # Context 0, 1 of either sample; three events and one; candidates stand at c = 2.
    assert got.tolist() == [0, 1, 0, 1, 5, 4, 3, 3, 2, 2, 2]
    t = tokens(context=0)
    read = np.asarray(t.role[0]) != PAD
    assert timed_positions.position_index(t, 0)[0][read].tolist() == [3, 2, 1, 1, 0, 0, 0]


def test_buckets_are_square_roots_of_minutes():
    t = tokens()
    read = np.asarray(t.role[0]) != PAD
    got = timed_positions.time_bucket(t, 9)[0][read]
    # 120 minutes have the root 10.95; context stands in the last bucket.
    assert got.tolist() == [9, 9, 9, 9, 9, 1, 0, 0, 0, 0, 0]
    assert timed_positions.time_bucket(t, 50)[0][read].tolist()[4] == 10
    later = dataclasses.replace(t, bias_time=t.bias_time + 10**6)
    np.testing.assert_array_equal(timed_positions.time_bucket(later, 9)[0][read], got)
    # Context tokens have the time 0, which here is after the request.
    early = dataclasses.replace(t, bias_time=t.bias_time - 10**6 * (t.role != CONTEXT))
    np.testing.assert_array_equal(timed_positions.time_bucket(early, 9)[0][read], got)


def test_a_request_long_after_the_events_keeps_whole_seconds():
    t = tokens()
    old = dataclasses.replace(t, bias_time=jnp.where(t.bias_time < 0, -60 * 44**2, t.bias_time))
    got = timed_positions.time_bucket(old, 2048)[0]
    assert got[4] == 44
    sooner = dataclasses.replace(old, bias_time=jnp.where(t.bias_time < 0, 1 - 60 * 44**2, 0))
    assert timed_positions.time_bucket(sooner, 2048)[0][4] == 43


def test_both_tables_are_added_and_clipped():
    t = tokens()
    layer = timed_positions.TimedPositions(4, 6, 3)
    params = layer.init(jax.random.key(0), t, 2)["params"]
    assert {k: x.shape for k, x in params.items()} == {"positions": (4, 3), "times": (7, 3)}
    got = layer.apply({"params": params}, t, 2)[0]
    np.testing.assert_allclose(got[4], params["positions"][3] + params["times"][6], rtol=1e-6)
    np.testing.assert_allclose(got[7], params["positions"][3] + params["times"][0], rtol=1e-6)
    np.testing.assert_allclose(got[10], params["positions"][2] + params["times"][0], rtol=1e-6)


def test_initial_tables_and_without_times():
    t = tokens()
    layer = timed_positions.TimedPositions(100, 400, 64)
    params = layer.init(jax.random.key(0), t, 2)["params"]
    for name, bound in (("positions", 0.1), ("times", 0.05)):
        assert 0.99 * bound < np.abs(params[name]).max() < bound
        np.testing.assert_allclose(np.std(params[name]), bound / np.sqrt(3), rtol=0.05)
    bare = timed_positions.TimedPositions(100, None, 64, "bfloat16")
    params = bare.init(jax.random.key(0), t, 2)["params"]
    assert list(params) == ["positions"]
    assert bare.apply({"params": params}, t, 2).dtype == jnp.bfloat16
