"""Mixed layers against loops over tokens in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.batch import CANDIDATE, HISTORY, PAD, Tokens
from rankjax.layers import mixed
from rankjax.masks import MaskRule
from tests import builders
from tests.references import onetrans as reference

R, N, T, C, D = 2, 4, 3, 2, 6
RULE = MaskRule(candidates="causal")


def stream(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (R, N, D), (T, R * C, D)
    return tuple(rng.normal(size=shape).astype("f4") for shape in shapes)


def made(layer, *tokens):
    """Random parameters, and what the layer gives for the stream."""
    x, rng = stream(), np.random.default_rng(1)
    run = (lambda *x: layer.init(*x, *tokens)), (lambda p, *x: layer.apply(p, *x, *tokens))
    shapes = jax.eval_shape(run[0], jax.random.key(0), *x)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype("f4"), shapes["params"])
    return params, jax.jit(run[1])({"params": params}, *x)


def tokens():
    """Queries and keys: the last two of N shared tokens, whose first is padding, and all slots."""
    role = np.full((R, N + C * T), CANDIDATE)
    role[:, :N] = HISTORY
    role[:, 0] = PAD
    group = np.concatenate([np.full(N, -1), np.repeat(np.arange(C), T)])
    position = np.concatenate([np.arange(N), np.tile(N + np.arange(T), C)])
    whole = lambda x: jnp.asarray(np.broadcast_to(x, role.shape), jnp.int32)
    keys = Tokens(
        segment=whole(0),
        role=whole(role),
        time=whole(np.where(group >= 0, 1, 0)),
        position=whole(position),
        group=whole(group),
        bias_time=whole(0),
    )
    return jax.tree.map(lambda x: x[:, 2:], keys), keys, RULE


@pytest.mark.parametrize("own", [True, False])
def test_dense(own):
    x_rnd, x_tmd = stream()
    params, (y_rnf, y_tmf) = made(mixed.Dense(5, own))
    p = builders.float64(params)
    for n, x_d in enumerate(x_rnd.reshape(-1, D)):
        want = reference.mixed(x_d, p, None)
        np.testing.assert_allclose(y_rnf.reshape(-1, 5)[n], want, rtol=0, atol=1e-5)
    for t, m in np.ndindex(T, R * C):
        want = reference.mixed(x_tmd[t, m], p, t)
        np.testing.assert_allclose(y_tmf[t, m], want, rtol=0, atol=1e-5)
    assert builders.count(params) == (1 + T * own) * (D * 5 + 5)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", mixed.KINDS)
def test_feed_forward(kind, own):
    x_rnd, x_tmd = stream()
    params, (y_rnd, y_tmd) = made(mixed.FeedForward(2, kind, own))
    p = builders.float64(params)
    assert y_rnd.shape == x_rnd.shape and y_tmd.shape == x_tmd.shape
    for y_d, x_d in zip(y_rnd.reshape(-1, D), x_rnd.reshape(-1, D)):
        want = reference.feed_forward(x_d, p, None, {"ffn": kind})
        np.testing.assert_allclose(y_d, want, rtol=1e-5, atol=2e-5)
    for t, m in np.ndindex(T, R * C):
        want = reference.feed_forward(x_tmd[t, m], p, t, {"ffn": kind})
        np.testing.assert_allclose(y_tmd[t, m], want, rtol=1e-5, atol=2e-5)
    assert builders.count(params) == (1 + T * own) * mixed.parameters(kind, D, 2)


def test_the_printed_count_of_a_feed_forward():
    assert mixed.parameters("gelu", D, 4) == 8 * D**2 + 5 * D
    assert mixed.parameters("swiglu", D, 4) == 12 * D**2 + 9 * D


@pytest.mark.parametrize("own, own_output", [(True, False), (True, True), (False, False)])
def test_attention(own, own_output):
    x_rnd, x_tmd = stream()
    params, (y_rnd, y_tmd) = made(mixed.Attention(2, own, own_output), *tokens())
    p = builders.float64(params)
    assert y_rnd.shape == (R, 2, D) and y_tmd.shape == (T, R * C, D)
    for r, c in np.ndindex(R, C):
        m = r * C + c
        x = [*x_rnd[r, 1:], *x_tmd[:, m]]  # the first is padding
        slots = [None] * (N - 1) + list(range(T))
        keys, values = (
            np.stack([reference.mixed(x_d, p[name], slot) for x_d, slot in zip(x, slots)])
            for name in ("key", "value")
        )
        for i in range(1, len(x)):
            q_d = reference.mixed(x[i], p["query"], slots[i])
            out_d = reference.attend(q_d, keys[: i + 1], values[: i + 1], 2)
            want = reference.mixed(out_d, p["out"], slots[i])
            got = y_rnd[r, i - 1] if slots[i] is None else y_tmd[slots[i], m]
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
    sets = 3 * (1 + T * own) + 1 + T * own_output
    assert builders.count(params) == sets * (D**2 + D)


def test_computes_in_dtype_with_float32_parameters():
    layer = mixed.FeedForward(2, dtype="bfloat16")
    shapes, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), *stream())
    assert {x.dtype for x in shapes} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_an_unknown_feed_forward_is_refused():
    layer = mixed.FeedForward(2, "relu")
    with pytest.raises(ValueError, match="kind='relu', expected one of"):
        jax.eval_shape(layer.init, jax.random.key(0), *stream())
