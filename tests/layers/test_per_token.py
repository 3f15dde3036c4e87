"""Per-token layers against a loop over tokens in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rankjax.layers import per_token
from tests import builders
from tests.references import rankmixer as reference
from tests.references import tokenmixer_large


def test_dense_is_one_layer_per_token():
    rng = np.random.default_rng(0)
    dense, x_tnd = per_token.Dense(6), rng.normal(size=(3, 5, 4)).astype("f4")
    params = builders.moved(dense.init(jax.random.key(0), x_tnd)["params"], rng)
    p = builders.float64(params)
    got = dense.apply({"params": params}, x_tnd)
    for t in range(3):
        np.testing.assert_allclose(got[t], x_tnd[t] @ p["kernel"][t] + p["bias"][t], atol=1e-5)
    assert builders.count(params) == 3 * (4 * 6 + 6)
    plain = per_token.Dense(6, use_bias=False)
    assert builders.count(plain.init(jax.random.key(0), x_tnd)) == 3 * 4 * 6
    got = plain.apply({"params": {"kernel": params["kernel"]}}, x_tnd)
    np.testing.assert_allclose(got, x_tnd @ p["kernel"], atol=1e-5)


def test_feed_forward_is_the_references():
    rng = np.random.default_rng(0)
    ffn, x_tnd = per_token.FeedForward(3), rng.normal(size=(2, 5, 4)).astype("f4")
    params = builders.moved(ffn.init(jax.random.key(0), x_tnd)["params"], rng)
    p = builders.float64(params)
    got = ffn.apply({"params": params}, x_tnd)
    for n in range(5):
        want = reference.feed_forward(x_tnd[:, n].astype(float), p)
        np.testing.assert_allclose(got[:, n], want, atol=1e-5)
    assert builders.count(params) == 2 * (2 * 3 * 4 * 4 + 3 * 4 + 4)


def test_swiglu_is_the_references():
    rng = np.random.default_rng(0)
    ffn, x_tnd = per_token.SwiGLU(6), rng.normal(size=(2, 5, 4)).astype("f4")
    params = builders.moved(ffn.init(jax.random.key(0), x_tnd)["params"], rng)
    p = builders.float64(params)
    got = ffn.apply({"params": params}, x_tnd)
    for t, n in np.ndindex(2, 5):
        want = tokenmixer_large.swiglu(x_tnd[t, n].astype(float), p, t)
        np.testing.assert_allclose(got[t, n], want, atol=1e-5)
    assert builders.count(params) == 2 * (3 * 4 * 6 + 2 * 6 + 4)


def test_a_part_of_tokens_and_columns_is_that_part_of_the_whole():
    rng = np.random.default_rng(0)
    x_tnd = rng.normal(size=(4, 5, 8)).astype("f4")
    whole, part = per_token.SwiGLU(6), per_token.SwiGLU(6, tokens=4)
    params = builders.moved(whole.init(jax.random.key(0), x_tnd)["params"], rng)
    want = whole.apply({"params": params}, x_tnd)[:2, :, :3]
    np.testing.assert_allclose(part.apply({"params": params}, x_tnd[:2], 3), want, atol=1e-6)
    init = functools.partial(part.init, first=3)
    shapes = jax.eval_shape(init, jax.random.key(0), x_tnd[:2])["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


def test_only_what_writes_to_the_residual_starts_smaller():
    x_tnd = jnp.ones((2, 3, 4))

    def initial(name):
        return per_token.SwiGLU(6, "float32", name, 8).init(jax.random.key(0), x_tnd)["params"]

    small, lecun = initial("small_residual"), initial("lecun")
    for name, divisor in (("gate", 1), ("up", 1), ("down", 4)):
        want = lecun[name]["kernel"] / divisor
        np.testing.assert_allclose(small[name]["kernel"], want, rtol=1e-6)


def test_computes_in_dtype_with_float32_parameters():
    x_tnd = jnp.ones((2, 3, 4))
    got, variables = jax.jit(per_token.FeedForward(2, "bfloat16").init_with_output)(
        jax.random.key(0), x_tnd
    )
    assert got.dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(variables)} == {np.dtype("float32")}


def test_spread_of_the_output_does_not_depend_on_the_number_of_tokens():
    for T in (1, 16):
        x_tnd = jax.random.normal(jax.random.key(1), (T, 256, 64))
        y_tnf, _ = per_token.Dense(64).init_with_output(jax.random.key(0), x_tnd)
        np.testing.assert_allclose(np.std(y_tnf), 1, rtol=0.05)
