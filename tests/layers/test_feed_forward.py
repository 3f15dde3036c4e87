"""The shared MLP against NumPy, with norms before and after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import feed_forward
from tests import builders
from tests.references import dlrm as reference


@pytest.mark.parametrize("norm_place", ["pre", "post"])
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_mlp_is_the_references(norm, norm_place):
    rng = np.random.default_rng(0)
    mlp = feed_forward.MLP((6, 3), norm, norm_place)
    x_nd = rng.normal(size=(5, 4)).astype("f4")
    params = builders.moved(mlp.init(jax.random.key(0), x_nd)["params"], rng)
    p = builders.float64(params)
    want = [reference.mlp(x_d.astype(float), p, 2, norm, norm_place) for x_d in x_nd]
    np.testing.assert_allclose(mlp.apply({"params": params}, x_nd), np.stack(want), atol=1e-5)


def test_without_widths_returns_its_input_in_dtype():
    x_nd = np.ones((2, 3), np.float32)
    got, variables = feed_forward.MLP((), dtype="bfloat16").init_with_output(
        jax.random.key(0), x_nd
    )
    assert got.dtype == jnp.bfloat16 and not variables
    np.testing.assert_array_equal(np.asarray(got, np.float32), x_nd)
