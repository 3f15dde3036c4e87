"""Experts of a token against a loop over them in float64 NumPy, and their dense limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import mixture, per_token
from tests import builders
from tests.references import rankmixer, tokenmixer_large

T, N, D, X = 3, 5, 4, 4


def made(module, *args, seed=0):
    """Random parameters, in float32 and float64."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    params = jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape).astype("f4"), shapes)
    return params, builders.float64(params)


def run(module, params, *args, **static):
    return jax.jit(functools.partial(module.apply, **static))({"params": params}, *args)


def random(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


def test_top_k_gates_are_the_softmax_of_the_largest():
    scores_tnx = random(T, N, X)
    for k in range(1, X + 1):
        got = np.asarray(mixture.top_k_gates(scores_tnx, k))
        for at in np.ndindex(T, N):
            s = scores_tnx[at].astype(float)
            weight = np.where(s >= np.sort(s)[-k], np.exp(s), 0)
            np.testing.assert_allclose(got[at], weight / weight.sum(), atol=1e-6)


def test_of_equal_scores_the_first_are_chosen():
    got = mixture.top_k_gates(jnp.array([[[2.0, 2.0, 0.0, 2.0]]]), 2)
    np.testing.assert_array_equal(got[0, 0], [0.5, 0.5, 0, 0])


def test_the_scores_of_experts_left_out_get_no_gradient():
    scores_tnx = jnp.array([[[1.0, 3.0, 2.0, -1.0]]])
    got = jax.grad(lambda s: (mixture.top_k_gates(s, 2) * jnp.arange(4.0)).sum())(scores_tnx)
    assert (np.asarray(got[0, 0]) != 0).tolist() == [False, True, True, False]


def test_feed_forward_experts_are_the_references():
    x_tnd, gate_tnx = random(T, N, D), np.maximum(random(T, N, X, seed=2), 0)
    module = mixture.FeedForwardExperts(3)
    params, p = made(module, x_tnd, gate_tnx)
    got = run(module, params, x_tnd, gate_tnx)
    for n in range(N):
        want = rankmixer.experts(x_tnd[:, n].astype(float), gate_tnx[:, n].astype(float), p)
        np.testing.assert_allclose(got[:, n], want, atol=1e-5)
    assert builders.count(params) == T * X * (2 * 12 * D + 12 + D)


def test_one_expert_with_a_gate_of_one_is_the_dense_feed_forward():
    x_tnd, ones = random(T, N, D), np.ones((T, N, 1), "f4")
    module = mixture.FeedForwardExperts(2)
    params, _ = made(module, x_tnd, ones)
    dense = jax.tree.map(lambda x: x[:, 0], params)
    np.testing.assert_array_equal(
        run(module, params, x_tnd, ones),
        run(per_token.FeedForward(2), dense, x_tnd),
    )


def swiglu(**options):
    sizes = {"experts": X, "active": 3, "hidden": 2, "scale": 1.5} | options
    return mixture.SwiGLUExperts(**sizes)


@pytest.mark.parametrize("active", [3, X])
def test_swiglu_experts_are_the_references(active):
    x_tnd, module = random(T, N, D), swiglu(active=active)
    params, p = made(module, x_tnd)
    got = run(module, params, x_tnd)
    for t, n in np.ndindex(T, N):
        want = tokenmixer_large.mixture(x_tnd[t, n].astype(float), p, t, active, 1.5)
        np.testing.assert_allclose(got[t, n], want, atol=1e-5)
    assert builders.count(params) == T * (X * (3 * D * 2 + 2 * 2 + D) + (X - 1) * (D + 1))


def test_experts_that_are_all_on_make_the_dense_swiglu_that_they_were_cut_from():
    """Equal scores and alpha = X - 1: every gate is 1, and the parts of one SwiGLU add up."""
    x_tnd, module = random(T, N, D), swiglu(active=X, scale=X - 1.0)
    params, _ = made(module, x_tnd)
    params["router"] = jax.tree.map(jnp.zeros_like, params["router"])

    def side_by_side(p):
        return {
            "kernel": p["kernel"].swapaxes(1, 2).reshape(T, D, -1),
            "bias": p["bias"].reshape(T, -1),
        }

    down = {"kernel": params["down"]["kernel"].reshape(T, -1, D)}
    down["bias"] = params["down"]["bias"].sum(axis=1)
    dense = {"gate": side_by_side(params["gate"]), "up": side_by_side(params["up"]), "down": down}
    np.testing.assert_allclose(
        run(module, params, x_tnd),
        run(per_token.SwiGLU(2 * X), dense, x_tnd),
        atol=1e-6,
    )


def test_a_part_of_tokens_and_columns_is_that_part_of_the_whole():
    x_tnd = random(T, N, D)
    params, _ = made(swiglu(), x_tnd)
    whole = run(swiglu(), params, x_tnd)
    part = run(swiglu(tokens=T), params, x_tnd[:2], first=3)
    np.testing.assert_allclose(part, whole[:2, :, :3], atol=1e-6)
    init = functools.partial(swiglu(tokens=T).init, first=3)
    shapes = jax.eval_shape(init, jax.random.key(0), x_tnd[:2])["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


def test_every_expert_starts_as_a_layer_of_its_own():
    """Neither T nor X is part of a fan-in; std overrides the name for the way back only."""
    x_tnd = random(2, 1, 64)
    for std in (None, 0.01):
        module = swiglu(experts=8, hidden=48, std=std)
        params = jax.jit(module.init)(jax.random.key(0), x_tnd)["params"]
        for name in ("gate", "up"):
            np.testing.assert_allclose(np.std(params[name]["kernel"]), 1 / 8, rtol=0.03)
        want = std or 48**-0.5
        np.testing.assert_allclose(np.std(params["down"]["kernel"]), want, rtol=0.03)
    small = swiglu(kernel_init="small_residual", residual_layers=8, hidden=48)
    params = jax.jit(small.init)(jax.random.key(0), x_tnd)["params"]
    np.testing.assert_allclose(np.std(params["down"]["kernel"]), 48**-0.5 / 4, rtol=0.03)
    np.testing.assert_allclose(np.std(params["up"]["kernel"]), 1 / 8, rtol=0.03)


def test_computes_in_dtype_and_routes_in_float32():
    x_tnd = jnp.asarray(random(T, N, D), jnp.bfloat16)
    params, _ = made(swiglu(), x_tnd)
    # Scores that bfloat16 takes for equal ones, of which it would choose the first two.
    params["router"] = jax.tree.map(jnp.zeros_like, params["router"])
    params["router"]["bias"] += jnp.array([1.0, 1.001, 1.002])
    got = run(swiglu(dtype="bfloat16"), params, x_tnd)
    want = run(swiglu(), params, x_tnd.astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0.02, atol=0.05)
