"""Norms against float64 NumPy, over every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import norms
from tests import builders


def reference(x_nd, kind, epsilon):
    if kind == "layer":
        x_nd = x_nd - x_nd.mean(axis=-1, keepdims=True)
    return x_nd / np.sqrt((x_nd**2).mean(axis=-1, keepdims=True) + epsilon)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_is_the_equation(kind):
    rng = np.random.default_rng(0)
    x_nd = rng.normal(3, 2, (2, 5, 8)).astype("f4")
    norm = norms.Norm(kind, epsilon=0.01)
    params = builders.moved(norm.init(jax.random.key(0), x_nd)["params"], rng)
    want = reference(x_nd.astype(float), kind, 0.01) * params["scale"] + params.get("bias", 0)
    np.testing.assert_allclose(norm.apply({"params": params}, x_nd), want, atol=2e-6)
    plain = norms.Norm(kind, affine=False)
    assert not plain.init(jax.random.key(0), x_nd)
    np.testing.assert_allclose(
        plain.apply({}, x_nd), reference(x_nd.astype(float), kind, 1e-6), atol=2e-6
    )


@pytest.mark.parametrize("kind", norms.KINDS)
def test_parameter_count_and_dtype(kind):
    x_nd = jnp.ones((3, 8), jnp.bfloat16)
    got, variables = norms.Norm(kind).init_with_output(jax.random.key(0), x_nd)
    assert builders.count(variables) == norms.parameters(kind, 8)
    assert {p.dtype for p in jax.tree.leaves(variables)} <= {np.dtype("float32")}
    assert got.dtype == jnp.bfloat16 and got.shape == (3, 8)


def test_none_returns_its_input():
    x_nd = np.random.default_rng(0).normal(size=(3, 8))
    assert norms.Norm("none").apply({}, x_nd) is x_nd


def test_a_large_common_offset_does_no_harm():
    x_nd = np.random.default_rng(0).normal(size=(3, 64)).astype("f4") + np.float32(10_000)
    got = norms.Norm(affine=False).apply({}, x_nd)
    np.testing.assert_allclose(got, reference(x_nd.astype(float), "layer", 1e-6), atol=2e-3)


def test_constant_and_zero_rows_stay_finite_with_finite_gradients():
    for kind in ("layer", "rms"):
        norm = norms.Norm(kind, affine=False)
        grad = jax.grad(lambda x, norm=norm: norm.apply({}, x).sum())(jnp.zeros((2, 8)))
        assert np.isfinite(grad).all()


def test_unknown_names_are_refused():
    norms.check("a.Config", "rms", "pre")
    with pytest.raises(ValueError, match=r"a.Config: norm='batch'"):
        norms.check("a.Config", "batch", "pre")
    with pytest.raises(ValueError, match=r"a.Config: norm_place='inside'"):
        norms.check("a.Config", "rms", "inside")
    with pytest.raises(ValueError, match="kind='batch'"):
        norms.Norm("batch").apply({}, jnp.ones(3))
