"""The network that trains GRAB's tables: what it reads, and its formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rankjax.layers import sparse_phase
from rankjax.packing import pack
from tests import builders
from tests.references import grab as reference

NAMES = ("item", "price", "tag", "action")


def window():
    """Candidates of several times among the events, two of them at an event's time."""
    b = builders.batch(np.random.default_rng(0), one_time=False)
    R, S = b.history_sample.shape
    times = np.tile(10 * np.arange(S), (R, 1))
    own = np.tile([0, 10, 25, 40], (R, 1))
    return dataclasses.replace(
        b,
        history_time=np.where(b.history_mask, times, 7).astype(np.int32),
        candidate_time=np.where(b.candidate_mask, own, 0).astype(np.int32),
        history_order=np.where(b.history_mask, np.arange(S), 0).astype(np.int32),
        candidate_order=np.where(b.candidate_mask, [0, 1, 3, 4], 0).astype(np.int32),
    )


def test_mean_of_the_earlier_events_alone():
    b = window()
    f = builders.features(b)
    whole = np.concatenate([b.history[name] for name in NAMES], axis=-1)
    run = jax.jit(sparse_phase.earlier_mean, static_argnums=1)
    got = np.asarray(run(f, "float32"))
    for row, k in np.argwhere(b.candidate_mask):
        earlier = b.history_mask[row] & (b.history_time[row] < b.candidate_time[row, k])
        want = whole[row][earlier].mean(axis=0) if earlier.any() else np.zeros(whole.shape[-1])
        np.testing.assert_allclose(got[row, k], want, rtol=0, atol=1e-6)
    by_order = dataclasses.replace(f, schema=dataclasses.replace(f.schema, time_exact=False))
    np.testing.assert_allclose(run(by_order, "float32"), got, rtol=0, atol=1e-6)
    together = np.asarray(run(builders.features(pack(b, 2)), "float32")).reshape(got.shape)
    valid = b.candidate_mask
    np.testing.assert_allclose(together[valid], got[valid], rtol=0, atol=1e-6)
    nan = {k: jnp.where(f.history_mask[..., None], x, jnp.nan) for k, x in f.history.items()}
    dirty = np.asarray(run(dataclasses.replace(f, history=nan), "float32"))
    np.testing.assert_array_equal(dirty, got)


def test_logits_are_a_gate_for_each_group_and_three_layers():
    rng = np.random.default_rng(1)
    b = window()
    f = builders.features(b)
    module = sparse_phase.SparsePhase(tasks=2, hidden=5)
    params = builders.moved(jax.jit(module.init)(jax.random.key(0), f)["params"], rng)
    got = jax.jit(module.apply)({"params": params}, f)
    assert got.shape == (4, 4, 2) and got.dtype == jnp.float32
    pooled = np.float64(jax.jit(sparse_phase.earlier_mean, static_argnums=1)(f, "float32"))
    p = builders.float64(params)
    for row, k in np.argwhere(b.candidate_mask):
        x = builders.one(b, row, k)
        groups = [
            np.concatenate([x["user"][name] for name in ("age", "spend")]),
            np.concatenate([x["candidate"][name] for name in NAMES[:3]]),
            x["candidate"]["hour"],
            pooled[row, k],
        ]
        want = reference.sparse_logits(p, groups)
        np.testing.assert_allclose(got[row, k], want, rtol=0, atol=1e-5)
    w = 5 + 9 + 4 + 13
    assert builders.count(params) == w * 4 + 4 + w * 5 + 5 + 5 * 5 + 5 + 5 * 2 + 2


def test_bfloat16_gives_float32_logits():
    f = builders.features(window())
    module = sparse_phase.SparsePhase(tasks=1, hidden=5, dtype="bfloat16")
    logits = jax.eval_shape(module.init_with_output, jax.random.key(0), f)[0]
    assert logits.dtype == jnp.float32
