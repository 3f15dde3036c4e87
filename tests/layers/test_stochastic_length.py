"""Stochastic length: how many events are kept, which, and what is left alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import stochastic_length
from tests import builders

S, DRAWS = 16, 4000
ALPHA = 1.5  # 16^.75 = 8 events are kept of more than 8


def features(lengths=(16, 12, 8, 0), late=0, time_exact=True, times=None):
    """Rows of so many events, oldest first, the last `late` of each at or after the candidates."""
    R = len(lengths)
    b = builders.batch(np.random.default_rng(0), lengths=lengths, candidates=(1,) * R, S=S, C=1)
    order = np.arange(S) - (np.array(lengths)[:, None] - late)
    time = order * 60 if times is None else np.broadcast_to(times, order.shape)
    return builders.features(
        dataclasses.replace(
            b,
            schema=dataclasses.replace(b.schema, time_exact=time_exact),
            history_order=np.where(b.history_mask, order, 0).astype(np.int32),
            history_time=np.where(b.history_mask, time, 0).astype(np.int32),
        )
    )


@functools.cache
def draws(alpha=ALPHA, **options):
    """The kept slots of many draws, bool [draws, R, S], and the features."""
    f = features(**options)
    keys = jax.random.split(jax.random.key(0), DRAWS)
    one = lambda key: stochastic_length.subsample(f, key, alpha=alpha, longest=S).history_sample
    return np.asarray(jax.jit(jax.vmap(one))(keys)) >= 0, f


def test_kept():
    assert stochastic_length.kept(1.6, 4096) == 776
    assert [stochastic_length.kept(2.0, n) for n in (1, 2, 100, 4097)] == [1, 2, 100, 4097]
    assert stochastic_length.kept(1.5, 16) == 8 and stochastic_length.kept(4 / 3, 1000) == 100


def test_as_many_events_are_kept_as_the_formula_says():
    kept, _ = draws()
    counts = kept.sum(axis=2)
    for row, n in enumerate((16, 12)):
        whole = 16**ALPHA / n**2
        assert set(counts[:, row]) == {8, n}
        share = (counts[:, row] == n).mean()
        assert abs(share - whole) < 4 * np.sqrt(whole * (1 - whole) / DRAWS)
    assert set(counts[:, 2]) == {8} and set(counts[:, 3]) == {0}


def test_alpha_2_keeps_everything():
    kept, f = draws(alpha=2.0)
    np.testing.assert_array_equal(kept, np.broadcast_to(f.history_mask, kept.shape))


def test_newer_events_are_kept_more_often_as_drawn_one_by_one():
    """Against drawing without replacement with the weights 1 - f_i / sum f, one event at a time."""
    ages = (700, 300, 260, 200, 170, 150, 99, 80, 60, 31, 30, 20, 9, 4, 2, 1)
    times = -np.array(ages)
    kept, _ = draws(lengths=(16,), times=tuple(times.tolist()))
    chosen = kept[kept.sum(axis=2)[:, 0] == 8, 0].mean(axis=0)
    rng, found, age = np.random.default_rng(1), np.zeros(16), times.max() - times
    weights = 1 - age / age.sum()
    for _ in range(2000):
        found[rng.choice(16, 8, replace=False, p=weights / weights.sum())] += 1 / 2000
    np.testing.assert_allclose(chosen, found, atol=0.06)
    assert chosen[0] < 0.45 < 0.51 < chosen[-1]  # uniform would give .5 to all


def test_one_event_is_drawn_with_exactly_its_weight():
    """Of three events one is kept; ages 9, 1, 0 give the weights .1, .9, 1."""
    f = features(lengths=(3,), times=(-10, -2, -1, *[0] * 13))
    one = lambda key: stochastic_length.subsample(f, key, alpha=1.2, longest=2).history_sample
    kept = (
        np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 40_000)))[:, 0] >= 0
    )
    assert stochastic_length.kept(1.2, 2) == 1 and set(kept.sum(axis=1)) == {1, 3}
    share = kept[kept.sum(axis=1) == 1, :3].mean(axis=0)
    np.testing.assert_allclose(share, [0.05, 0.45, 0.5], atol=0.01)  # std of 30 000 draws: .003


def test_order_times_and_everything_else_stay():
    _, f = draws()
    got = stochastic_length.subsample(f, jax.random.key(1), alpha=ALPHA, longest=S)
    assert np.any(got.history_sample != f.history_sample)
    for field in dataclasses.fields(f):
        if field.name != "history_sample":
            assert getattr(got, field.name) is getattr(f, field.name)


def test_events_after_the_first_candidate_stay_and_do_not_count():
    early, _ = draws(lengths=(12,))
    both, _ = draws(lengths=(16,), late=4)
    assert both[:, 0, 12:16].all()
    assert set(both[:, 0, :12].sum(axis=1)) == {8, 12}
    np.testing.assert_array_equal(both[:, 0, :12], early[:, 0, :12])


def test_samples_of_a_packed_row_are_drawn_apart():
    """Two samples side by side, padding between them: each keeps its own share."""
    f = features(lengths=(16,))
    sample = jnp.asarray([[0, 0, -1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    f = dataclasses.replace(f, history_sample=sample)
    keys = jax.random.split(jax.random.key(0), 500)
    one = lambda key: stochastic_length.subsample(f, key, alpha=1.2, longest=S).history_sample
    got = np.asarray(jax.jit(jax.vmap(one))(keys))[:, 0]
    assert stochastic_length.kept(1.2, S) == 5
    assert (got[:, :2] == 0).all() and (got[:, 2] == -1).all()
    assert set((got == 1).sum(axis=1)) == {5, 13}
    # 16^1.2 / 13^2
    assert abs(((got == 1).sum(axis=1) == 13).mean() - 0.165) < 0.07


@pytest.mark.parametrize("time_exact", [True, False])
def test_inexact_times_count_events(time_exact):
    """All ages of one event and of none: without exact times the order weighs."""
    times = (-(10**6), *[-1] * 15)
    kept, _ = draws(lengths=(16,), times=times, time_exact=time_exact)
    sparse = kept[kept.sum(axis=2)[:, 0] == 8, 0].mean(axis=0)
    # By time the oldest event has all of the age, so weight 0; by order a weight near the others'.
    assert (sparse[0] == 0) if time_exact else (0.35 < sparse[0] < 0.5)


def test_events_of_one_time_are_drawn_evenly():
    kept, _ = draws(lengths=(16,), times=(-5,) * 16)
    sparse = kept[kept.sum(axis=2)[:, 0] == 8, 0].mean(axis=0)
    np.testing.assert_allclose(sparse, 0.5, atol=0.05)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.1])
def test_refused(alpha):
    with pytest.raises(ValueError, match=f"x: stochastic_length={alpha}, expected None or 1 <"):
        stochastic_length.check("x", alpha)
    stochastic_length.check("x", None)
    stochastic_length.check("x", 2)
