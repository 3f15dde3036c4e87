"""MLP & Gate against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from rankjax.layers.mlp_gate import MLPGate
from tests import builders
from tests.references import grab as reference


def test_token_is_a_gated_mlp_with_the_exact_gelu():
    rng = np.random.default_rng(0)
    x_rsw = 2 * rng.normal(size=(2, 3, 5)).astype("f4")
    module = MLPGate(4)
    params = builders.moved(jax.jit(module.init)(jax.random.key(0), x_rsw)["params"], rng)
    got = jax.jit(module.apply)({"params": params}, x_rsw)
    want = reference.token(np.float64(x_rsw), builders.float64(params))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert builders.count(params) == 2 * (5 * 4 + 4) + 4 * 4 + 4


def test_bfloat16_in_and_out_with_float32_parameters():
    x = jax.ShapeDtypeStruct((2, 5), jnp.bfloat16)
    out, variables = jax.eval_shape(
        MLPGate(4, dtype="bfloat16").init_with_output, jax.random.key(0), x
    )
    assert out.dtype == jnp.bfloat16
    assert all(y.dtype == jnp.float32 for y in jax.tree.leaves(variables))
