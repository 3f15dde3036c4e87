"""Attention with shared weights among feature tokens against NumPy, head by head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import feature_attention
from tests import builders
from tests.references import feature_tokens as reference

T, N, D, H, Q, V = 5, 3, 6, 2, 4, 3


def module(**options):
    given = {"heads": H, "key_width": Q, "value_width": V, "scale": 0.7} | options
    return feature_attention.FeatureAttention(**given)


def made(rng, **options):
    x_tnd = rng.normal(size=(T, N, D)).astype("f4")
    attention = module(**options)
    return x_tnd, attention, attention.init(jax.random.key(0), x_tnd, x_tnd)["params"]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_is_the_references(scale):
    rng = np.random.default_rng(0)
    x_tnd, attention, params = made(rng, scale=scale)
    got_tnf = attention.apply({"params": params}, x_tnd, x_tnd)
    p = builders.float64(params)
    for n in range(N):
        want_tf = reference.attention(x_tnd[:, n].astype(float), p, H, scale)
        np.testing.assert_allclose(got_tnf[:, n], want_tf, rtol=0, atol=1e-5)


def test_some_queries_give_their_rows():
    rng = np.random.default_rng(1)
    x_tnd, attention, params = made(rng)
    whole = attention.apply({"params": params}, x_tnd, x_tnd)
    part = attention.apply({"params": params}, x_tnd[1:3], x_tnd)
    np.testing.assert_allclose(part, whole[1:3], rtol=0, atol=1e-6)


def test_permuting_tokens_permutes_the_output():
    rng = np.random.default_rng(2)
    x_tnd, attention, params = made(rng)
    order = rng.permutation(T)
    whole = attention.apply({"params": params}, x_tnd, x_tnd)
    got = attention.apply({"params": params}, x_tnd[order], x_tnd[order])
    np.testing.assert_allclose(got, whole[order], rtol=0, atol=1e-6)


def test_large_scores_stay_finite():
    x_tnd, attention, params = made(np.random.default_rng(3), scale=1e4)
    assert np.isfinite(attention.apply({"params": params}, x_tnd, x_tnd)).all()


def test_parameter_count():
    _, _, params = made(np.random.default_rng(0))
    assert {name: p["kernel"].shape for name, p in params.items()} == {
        "query": (D, H * Q),
        "key": (D, H * Q),
        "value": (D, H * V),
    }
    assert builders.count(params) == D * H * (2 * Q + V)


def test_only_values_write_to_a_residual_stream():
    small = {"kernel_init": "small_residual", "residual_layers": 2}
    _, _, got = made(np.random.default_rng(0), **small)
    _, _, want = made(np.random.default_rng(0))
    for name, by in (("query", 1), ("key", 1), ("value", 2)):
        np.testing.assert_allclose(got[name]["kernel"], want[name]["kernel"] / by, rtol=1e-6)


def test_bfloat16_sums_in_float32_and_runs_eagerly():
    x_tnd, attention, params = made(np.random.default_rng(4))
    want = attention.apply({"params": params}, x_tnd, x_tnd)
    got = module(dtype="bfloat16").apply({"params": params}, x_tnd, x_tnd)
    assert got.dtype == jnp.bfloat16 and got.shape == (T, N, H * V)
    assert np.abs(np.asarray(got, np.float32) - want).max() < 0.03
