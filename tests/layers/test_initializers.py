"""The spread of each initialisation, and that a per-token kernel's does not depend on T."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import initializers

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("lecun", 1 / 64),
        ("xavier", 2 / (64 + 256)),
        # a normal of scale .02 cut at 2 scales keeps .774 of its variance
        ("truncated_normal", 0.774 * 0.02**2),
        ("small_residual", 1 / 64),
    ],
)
@pytest.mark.parametrize("T", [1, 16])
def test_variance_per_slice_does_not_depend_on_the_number_of_tokens(name, variance, T):
    init = initializers.kernel(name, batch_axis=(0,))
    kernel_tdf = np.asarray(init(KEY, (T, 64, 256), jnp.float32))
    assert kernel_tdf.dtype == np.float32
    np.testing.assert_allclose(kernel_tdf.var(axis=(1, 2)), variance, rtol=0.05)
    np.testing.assert_allclose(kernel_tdf.mean(axis=(1, 2)), 0, atol=5e-3)


def test_truncated_normal_is_cut_at_two_sigma():
    kernel = initializers.kernel("truncated_normal")(KEY, (64, 256), jnp.float32)
    assert np.abs(kernel).max() <= 2 * initializers.SIGMA


@pytest.mark.parametrize("name", initializers.NAMES)
def test_only_small_residual_looks_at_the_layers(name):
    plain = initializers.kernel(name, batch_axis=(0,))(KEY, (2, 8, 8), jnp.float32)
    writes = initializers.kernel(name, residual_layers=8, batch_axis=(0,))
    divisor = 4 if name == "small_residual" else 1
    np.testing.assert_allclose(writes(KEY, (2, 8, 8), jnp.float32), plain / divisor, rtol=1e-6)


def test_unknown_names_are_refused():
    initializers.check("a.Config", "lecun")
    with pytest.raises(ValueError, match=r"a.Config: init='he', expected one of"):
        initializers.check("a.Config", "he")
    with pytest.raises(ValueError, match="name='he'"):
        initializers.kernel("he")
