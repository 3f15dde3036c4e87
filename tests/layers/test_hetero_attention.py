"""Attention with matrices of every token's own, against float64 NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import flops
from rankjax.layers import hetero_attention
from tests import builders, oracles
from tests.references import hiformer as reference

T, N, D, H, Q, V = 4, 3, 6, 2, 3, 5
FULL = hetero_attention.HeteroAttention(H, Q, V, T)
PRUNED = dataclasses.replace(FULL, outputs=2)


def tokens(rng):
    return rng.normal(size=(T, N, D)).astype("f4")


score = oracles.jit(
    lambda layer, params, x_tnd: layer.apply({"params": params}, x_tnd), static_argnums=0
)


@functools.cache
def made():
    """x [T, N, D] and the parameters of the full layer, moved."""
    rng = np.random.default_rng(0)
    x_tnd = tokens(rng)
    return x_tnd, oracles.drawn(FULL.init, x_tnd)


def cut(params, outputs):
    """The parameters of the layer that computes the first tokens only."""
    kept = {name: params[name]["kernel"][:outputs] for name in ("query", "out")}
    return {name: {"kernel": kept.get(name, p["kernel"])} for name, p in params.items()}


def wanted(x_tnd, params, outputs):
    p = builders.float64(params)
    rows = [reference.attention(x_td, p, H, outputs) for x_td in x_tnd.astype(float).swapaxes(0, 1)]
    return np.stack(rows, axis=1)


@pytest.mark.parametrize("outputs", [T, 2])
def test_attention_is_the_papers(outputs):
    x_tnd, params = made()
    layer, params = dataclasses.replace(FULL, outputs=outputs), cut(params, outputs)
    got = score(layer, params, x_tnd)
    assert got.shape == (outputs, N, D)
    np.testing.assert_allclose(got, wanted(x_tnd, params, outputs), rtol=0, atol=1e-5)


def test_tied_parameters_make_the_vanilla_attention():
    x_tnd, params = made()
    tied = jax.tree.map(lambda p: np.broadcast_to(p[:1], p.shape), params)
    w = {name: np.asarray(p["kernel"][0], float) for name, p in params.items()}
    got = score(FULL, tied, x_tnd)
    for n in range(N):
        x_td, heads = x_tnd[:, n].astype(float), []
        for h in range(H):
            qk, v = slice(h * Q, h * Q + Q), slice(h * V, h * V + V)
            scores = (x_td @ w["query"][:, qk]) @ (x_td @ w["key"][:, qk]).T / Q**0.5
            weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            heads.append(weights @ (x_td @ w["value"][:, v]))
        np.testing.assert_allclose(got[:, n], np.hstack(heads) @ w["out"], rtol=0, atol=1e-5)


def test_tokens_permuted_with_their_parameters_permute_the_outputs():
    x_tnd, params = made()
    order = np.array([2, 0, 3, 1])
    want = score(FULL, params, x_tnd)
    permuted = jax.tree.map(lambda p: p[order], params)
    got = score(FULL, permuted, x_tnd[order])
    np.testing.assert_allclose(got, want[order], rtol=0, atol=1e-5)
    alone = score(FULL, params, x_tnd[order])  # the parameters are the tokens' own
    assert np.abs(alone - want[order]).min(axis=(1, 2)).max() > 1e-3


def test_a_pruned_layer_computes_the_first_tokens_exactly():
    x_tnd, params = made()
    got = score(PRUNED, cut(params, 2), x_tnd)
    np.testing.assert_allclose(got, score(FULL, params, x_tnd)[:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", [FULL, PRUNED])
def test_closed_forms(layer):
    x_tnd = jax.ShapeDtypeStruct((T, N, D), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x_tnd)
    P = layer.outputs
    weights = hetero_attention.weights(T, P, D, H, Q, V)
    assert builders.count(params) == weights == D * H * (P * Q + T * Q + T * V) + P * H * V * D
    scores = hetero_attention.score_flops(T, P, H, Q, V)
    assert flops.count(layer.apply, params, x_tnd).matmul == N * (2 * weights + scores)


def test_hhfts_example_has_its_attention_weights():
    total = hetero_attention.weights(16, 16, 256, 4, 64, 64) + 16 * (2 * 256 * 1024 + 1024 + 256)
    assert total == 12_603_392


def test_large_scores_stay_finite_in_bfloat16():
    q_tnf = jnp.full((T, N, H * Q), 300.0, jnp.bfloat16)
    v_tnf = jnp.arange(T * N * H * V, dtype=jnp.bfloat16).reshape(T, N, H * V)
    got = oracles.jit(functools.partial(hetero_attention.attend, heads=H))(q_tnf, q_tnf, v_tnf)
    assert got.dtype == jnp.bfloat16
    mean = np.broadcast_to(np.asarray(v_tnf, float).mean(axis=0), got.shape)
    np.testing.assert_allclose(np.asarray(got, float), mean, rtol=0.02)


def test_computes_in_dtype_with_float32_parameters():
    x_tnd, _ = made()
    layer = dataclasses.replace(FULL, dtype="bfloat16")
    got, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x_tnd)
    assert got.dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(variables)} == {np.dtype("float32")}


def test_only_the_output_matrices_write_to_the_residual(monkeypatch):
    x_tnd, _ = made()
    found = oracles.asked(monkeypatch, dataclasses.replace(FULL, residual_layers=2).init, x_tnd)
    assert found.pop("out/kernel") == (2, (0,))
    assert found == {f"{name}/kernel": (0, (0,)) for name in ("query", "key", "value")}


@pytest.mark.parametrize(("kind", "count"), [("layer", 2), ("rms", 1), ("none", 0)])
def test_every_token_has_a_norm_of_its_own(kind, count):
    rng = np.random.default_rng(0)
    x_tnd, norm = tokens(rng), hetero_attention.TokenNorm(kind)
    params = oracles.drawn(norm.init, x_tnd)
    got = norm.apply({"params": params}, x_tnd)
    p = builders.float64(params)
    want = [reference.own_norms(x_td, p, kind) for x_td in x_tnd.astype(float).swapaxes(0, 1)]
    np.testing.assert_allclose(got, np.stack(want, axis=1), rtol=0, atol=1e-5)
    assert builders.count(params) == count * T * D


def test_residual_norms_after_the_sum_or_before_the_sublayer():
    x_tnd = tokens(np.random.default_rng(0))
    sublayer, norm = (lambda x: 3 * x[:2]), (lambda x: x + 7)
    post = hetero_attention.residual(x_tnd, sublayer, norm, "post", 2)
    pre = hetero_attention.residual(x_tnd, sublayer, norm, "pre", 2)
    np.testing.assert_allclose(post, 4 * x_tnd[:2] + 7, rtol=1e-5)
    np.testing.assert_allclose(pre, 4 * x_tnd[:2] + 21, rtol=1e-5)


def test_head_widths_that_do_not_fit_are_refused():
    hetero_attention.check("a.Config", 8, 3, 4, 4)
    for widths in ((None, 4), (4, None), (None, None)):
        with pytest.raises(ValueError, match=r"a.Config: width=8 is no multiple of heads=3"):
            hetero_attention.check("a.Config", 8, 3, *widths)
    with pytest.raises(ValueError, match=r"a.Config: qk_width=0"):
        hetero_attention.check("a.Config", 8, 2, 0, None)
    with pytest.raises(ValueError, match=r"a.Config: v_width=0"):
        hetero_attention.check("a.Config", 8, 2, None, 0)
