"""The stream of tokens: what stands where, of which features."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from rankjax.layers import linear_tokens
from tests import builders


class Model(nn.Module):
    layout: str
    context: bool
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features):
        return linear_tokens.embed(
            features,
            **{"where": "it", "width": 3, "layout": self.layout, "context": self.context},
            dtype=self.dtype,
        )


@functools.cache
def run(layout, context, samples=1):
    b = builders.batch(np.random.default_rng(0))
    f = builders.packed(b, samples)
    model = Model(layout, context)
    params = model.init(jax.random.key(0), f)["params"]
    params = builders.moved(params, np.random.default_rng(1))
    return b, builders.float64(params), np.asarray(model.apply({"params": params}, f))


def side(values, names, *at):
    return np.concatenate([np.float64(values[n][at]) for n in names])


def linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


@pytest.mark.parametrize("context", [True, False])
def test_merged(context):
    b, p, x = run("merged", context)
    first = 2 if context else 0
    assert x.shape == (4, first + 6 + 4, 3) and "bias" not in p["event"]
    for name, i in (("age", 0), ("spend", 1)) if context else ():
        want = linear(np.float64(b.user[name][2, 0]), p[f"context_{name}"])
        np.testing.assert_allclose(x[2, i], want, atol=1e-6)
    item = ["item", "price", "tag"]
    want = linear(side(b.history, item, 2, 1), p["content"])
    want = want + linear(side(b.history, ["action"], 2, 1), p["event"])
    np.testing.assert_allclose(x[2, first + 1], want, atol=1e-6)
    want = linear(side(b.candidate, item, 3, 2), p["content"])
    want = want + linear(side(b.candidate, ["hour"], 3, 2), p["candidate_context"])
    np.testing.assert_allclose(x[3, first + 6 + 2], want, atol=1e-6)


def test_interleaved():
    b, p, x = run("interleaved", False)
    assert x.shape == (4, 2 * 6 + 4, 3)
    want = linear(side(b.history, ["item", "price", "tag"], 2, 1), p["content"])
    np.testing.assert_allclose(x[2, 2], want, atol=1e-6)
    want = linear(side(b.history, ["action"], 2, 1), p["event"])
    np.testing.assert_allclose(x[2, 3], want, atol=1e-6)
    assert "bias" in p["event"]


def test_context_of_packed_rows_is_sample_major():
    _, _, alone = run("merged", True)
    _, _, packed = run("merged", True, 2)
    np.testing.assert_allclose(packed[1, :4].reshape(2, 2, 3), alone[2:, :2], atol=1e-6)


@pytest.mark.parametrize(
    ("without", "message"),
    [("item", "it: the schema has no item feature"), ("event", "it: .* needs event features")],
)
def test_schemas_that_make_no_tokens_are_refused(without, message):
    f = builders.features(builders.batch(np.random.default_rng(0)))
    kept = tuple(x for x in f.schema.features if x.side != without)
    f = dataclasses.replace(f, schema=dataclasses.replace(f.schema, features=kept))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Model("interleaved", True).init, jax.random.key(0), f)


def test_bfloat16():
    f = builders.features(builders.batch(np.random.default_rng(0)))
    model = Model("merged", True, "bfloat16")
    params = jax.eval_shape(model.init, jax.random.key(0), f)
    assert jax.eval_shape(model.apply, params, f).dtype == "bfloat16"
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
