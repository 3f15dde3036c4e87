"""SwishLayerNorm and the network around it, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import swish_norm
from tests import builders
from tests.references import dlrm_v3 as reference


@functools.cache
def network():
    rng = np.random.default_rng(0)
    model = swish_norm.SwishNetwork(5, 4)
    x_nw = rng.normal(size=(3, 7)).astype("f4") * 2 + 1
    return model, builders.moved(model.init(jax.random.key(0), x_nw)["params"], rng), x_nw


def test_swish_layer_norm_is_x_times_a_gate_of_the_normalised_x():
    rng = np.random.default_rng(0)
    x_nd = rng.normal(size=(3, 6)).astype("f4") * 3 + 2
    model = swish_norm.SwishLayerNorm()
    params = builders.moved(model.init(jax.random.key(0), x_nd)["params"], rng)
    got = model.apply({"params": params}, x_nd)
    want = [reference.swish(np.float64(x_d), builders.float64(params)) for x_d in x_nd]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    # A tiny row shows the epsilon, 1e-5.
    small_nd = x_nd * 1e-3
    want = [reference.swish(np.float64(x_d), builders.float64(params)) for x_d in small_nd]
    np.testing.assert_allclose(model.apply({"params": params}, small_nd), want, rtol=1e-5)
    assert model.apply({"params": params}, x_nd.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_network_is_linear_swish_linear_norm():
    model, params, x_nw = network()
    got = jax.jit(model.apply)({"params": params}, x_nw)
    params_64 = builders.float64(params)
    want = [reference.network(np.float64(x_w), params_64) for x_w in x_nw]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert builders.count(params) == swish_norm.parameters(7, 5, 4) == 5 * (7 + 4 + 3) + 3 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(dtype):
    _, params, x_nw = network()
    model = swish_norm.SwishNetwork(5, 4, dtype=dtype)
    got = model.apply({"params": params}, x_nw.astype(dtype))
    assert got.dtype == dtype and np.isfinite(got.astype(np.float32)).all()
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
