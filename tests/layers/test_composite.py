"""Composite projections against float64 NumPy; what they are equal to in special cases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import flops
from rankjax.layers import composite, hetero_attention
from tests import builders, oracles
from tests.references import hiformer as reference

T, N, D, H, Q, V = 4, 3, 6, 2, 3, 5
FULL = composite.CompositeAttention(H, Q, V, T)
LOW = dataclasses.replace(FULL, rank_query=2, rank_key=3, rank_value=4)
OWN = dataclasses.replace(FULL, composite_query=False, rank_value=4)


score = oracles.jit(
    lambda layer, params, x_tnd: layer.apply({"params": params}, x_tnd), static_argnums=0
)


@functools.cache
def made(layer):
    """x [T, N, D] and the layer's parameters, moved."""
    rng = np.random.default_rng(0)
    x_tnd = rng.normal(size=(T, N, D)).astype("f4")
    return x_tnd, oracles.drawn(layer.init, x_tnd)


@pytest.mark.parametrize("rank", [None, 2])
def test_projection(rank):
    rng = np.random.default_rng(0)
    project, x_nw = composite.Projection(4, 3, rank), rng.normal(size=(5, 7)).astype("f4")
    params = oracles.drawn(project.init, x_nw)
    p, got = builders.float64(params), project.apply({"params": params}, x_nw)
    for n in range(5):
        want = reference.projected([x_nw[n].astype(float)], p, 4)
        np.testing.assert_allclose(got[:, n], want, rtol=0, atol=1e-5)
    assert builders.count(params) == composite.weights(7, 4, 3, rank)
    assert composite.weights(7, 4, 3, rank) == (7 * 12 if rank is None else 2 * (7 + 12))


@pytest.mark.parametrize("layer", [FULL, LOW, OWN])
@pytest.mark.parametrize("outputs", [T, 2])
def test_attention_is_the_papers(layer, outputs):
    layer = dataclasses.replace(layer, outputs=outputs)
    x_tnd, params = made(layer)
    p = builders.float64(params)
    got = score(layer, params, x_tnd)
    for n, x_td in enumerate(x_tnd.astype(float).swapaxes(0, 1)):
        want = reference.attention(x_td, p, H, outputs)
        np.testing.assert_allclose(got[:, n], want, rtol=0, atol=1e-5)


def test_block_diagonal_projections_make_the_heterogeneous_attention():
    hetero = hetero_attention.HeteroAttention(H, Q, V, T)
    x_tnd, params = made(FULL)
    own = oracles.drawn(hetero.init, x_tnd, seed=1)
    params = dict(params, out=own["out"])
    for name in ("query", "key", "value"):
        blocks_tdf = own[name]["kernel"]
        F = blocks_tdf.shape[-1]
        kernel = np.zeros((T * D, T * F), np.float32)
        for t in range(T):
            kernel[t * D : (t + 1) * D, t * F : (t + 1) * F] = blocks_tdf[t]
        params[name] = {"kernel": kernel}
    want = score(hetero, own, x_tnd)
    np.testing.assert_allclose(score(FULL, params, x_tnd), want, rtol=0, atol=1e-5)


def test_factors_of_enough_rank_are_the_full_projection():
    """Rank min(T D, T H d), from the singular values of the full matrix."""
    x_tnd, params = made(FULL)
    ranks, factored = {}, {"out": params["out"]}
    for name in ("query", "key", "value"):
        u, s, vt = np.linalg.svd(np.asarray(params[name]["kernel"], float), full_matrices=False)
        ranks[f"rank_{name}"] = len(s)
        factored[name] = {"left": (u * s).astype("f4"), "right": vt.astype("f4")}
    low = dataclasses.replace(FULL, **ranks)
    assert ranks["rank_query"] == min(T * D, T * H * Q) and ranks["rank_value"] == T * D
    want = score(FULL, params, x_tnd)
    np.testing.assert_allclose(score(low, factored, x_tnd), want, rtol=0, atol=2e-5)
    shapes = jax.eval_shape(low.init, jax.random.key(0), x_tnd)["params"]
    assert jax.tree.map(np.shape, factored) == jax.tree.map(lambda x: x.shape, shapes)


@pytest.mark.parametrize("layer", [FULL, LOW, OWN])
def test_a_pruned_layer_computes_the_first_tokens_exactly(layer):
    x_tnd, params = made(layer)
    pruned = dataclasses.replace(layer, outputs=2)
    shapes = jax.eval_shape(pruned.init, jax.random.key(0), x_tnd)["params"]
    cut = jax.tree.map(lambda p, s: p[tuple(map(slice, s.shape))], params, shapes)
    want = score(layer, params, x_tnd)[:2]
    np.testing.assert_allclose(score(pruned, cut, x_tnd), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("outputs", [T, 2])
def test_every_projection_has_its_own_rank(outputs):
    x_tnd = jax.ShapeDtypeStruct((T, N, D), jnp.float32)

    def counts(layer):
        layer = dataclasses.replace(layer, outputs=outputs)
        params = jax.eval_shape(layer.init, jax.random.key(0), x_tnd)["params"]
        return {name: builders.count(p) for name, p in params.items()}

    TD, P, q, v = T * D, outputs, H * Q, H * V
    key, value, out = TD * T * q, TD * T * v, P * v * D
    assert counts(FULL) == {"query": TD * P * q, "key": key, "value": value, "out": out}
    value = 4 * (TD + T * v)
    assert counts(OWN) == {"query": P * D * q, "key": key, "value": value, "out": out}
    query, key = 2 * (TD + P * q), 3 * (TD + T * q)
    assert counts(LOW) == {"query": query, "key": key, "value": value, "out": out}


@pytest.mark.parametrize("layer", [FULL, LOW, OWN])
def test_a_layer_multiplies_as_often_as_it_has_weights(layer):
    x_tnd = jax.ShapeDtypeStruct((T, N, D), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x_tnd)
    scores = hetero_attention.score_flops(T, T, H, Q, V)
    want = N * (2 * builders.count(params) + scores)
    assert flops.count(layer.apply, params, x_tnd).matmul == want


@pytest.mark.parametrize("rank", [None, 64])
def test_spread_of_the_output_does_not_depend_on_the_rank(rank):
    x_nw = jax.random.normal(jax.random.key(1), (256, 96))
    project = composite.Projection(4, 64, rank)
    y_tnf, _ = project.init_with_output(jax.random.key(0), x_nw)
    np.testing.assert_allclose(np.std(y_tnf), 1, rtol=0.1)


@pytest.mark.parametrize("layer", [LOW, OWN])
def test_only_the_output_matrices_write_to_the_residual(monkeypatch, layer):
    x_tnd, _ = made(layer)
    layer = dataclasses.replace(layer, residual_layers=2)
    found = oracles.asked(monkeypatch, layer.init, x_tnd)
    assert found.pop("out/kernel") == (2, (0,))
    if layer.rank_query is None:
        assert found.pop("query/kernel") == (0, (0,))
    assert set(found.values()) == {(0, ())}


def test_computes_in_dtype_with_float32_parameters():
    x_tnd, _ = made(LOW)
    layer = dataclasses.replace(LOW, dtype="bfloat16")
    got, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x_tnd)
    assert got.dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(variables)} == {np.dtype("float32")}


def test_bad_ranks_are_refused():
    composite.check("a.Config", rank_key=None, rank_value=3)
    with pytest.raises(ValueError, match=r"a.Config: rank_key=0, expected an integer >= 1"):
        composite.check("a.Config", rank_key=0)
