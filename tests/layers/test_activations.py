"""activations: the GELU is the exact one, in every dtype, with its derivative."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import activations

X = np.linspace(-12, 12, 481)


def phi(x):
    """(Phi(x), its density), float64."""
    cdf = np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in x])
    return cdf, np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)


def test_gelu_is_x_times_the_normal_distribution():
    """Far closer than the tanh approximation, which is off by up to 5e-4."""
    got = activations.gelu(jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(got, X * phi(X)[0], rtol=2e-7, atol=1e-6)


def test_its_derivative():
    cdf, density = phi(X)
    got = jax.vmap(jax.grad(activations.gelu))(jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(got, cdf + X * density, atol=1e-6)


@pytest.mark.parametrize("jitted", [False, True])
def test_bfloat16_is_rounded_once(jitted):
    """Computed in bfloat16, 1 + erf alone would be off by 2^-9."""
    x = jnp.asarray(X, jnp.bfloat16)
    got = (jax.jit(activations.gelu) if jitted else activations.gelu)(x)
    want = activations.gelu(x.astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8, atol=1e-6)


def test_dice_is_the_papers_mix_of_identity_and_leak():
    rng = np.random.default_rng(0)
    x, alpha, center, scale = rng.normal(size=(5, 3)), *rng.normal(size=(3, 3))
    p = 1 / (1 + np.exp(-scale * (x - center)))
    got = activations.dice(*(jnp.asarray(v, jnp.float32) for v in (x, alpha, center, scale)))
    np.testing.assert_allclose(got, p * x + (1 - p) * alpha * x, atol=1e-6)
