"""Projection and SiLU attention, against NumPy, and what is particular to SiLU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import pointwise_attention, sequence
from rankjax.masks import MaskRule
from tests import builders
from tests.references.hstu_attention import silu

HEADS, QK, V, D = 2, 3, 4, 5
WIDTH = sum(pointwise_attention.widths(HEADS, QK, V))


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    f = builders.features(builders.batch(rng))
    tokens = sequence.tokens(f, context=2)
    draw = lambda *shape: rng.normal(size=shape).astype("f4")
    return tokens, draw(4, 12, D), draw(D, WIDTH), draw(WIDTH)


def attend(rows=12, activation="uvqk", with_bias=True, normalizer=7.0):
    tokens, h_rnd, kernel_df, bias_f = inputs()
    return pointwise_attention.attend(
        *(h_rnd, kernel_df, (sequence.last(tokens, rows), tokens, MaskRule())),
        **{"heads": HEADS, "qk": QK, "v": V, "normalizer": normalizer, "scale": 0.7},
        activation=activation,
        bias_f=bias_f if with_bias else None,
    )


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("activation", pointwise_attention.ACTIVATIONS)
def test_against_numpy(activation, with_bias):
    h_rnd, kernel_df, bias_f = (np.float64(x) for x in inputs()[1:])
    x = h_rnd @ kernel_df + (bias_f if with_bias else 0)
    u, v, q, k = np.split(x, np.cumsum([HEADS * V, HEADS * V, HEADS * QK]), axis=-1)
    u = silu(u)
    if activation == "uvqk":
        v, q, k = silu(v), silu(q), silu(k)
    heads = lambda x: x.reshape(4, 12, HEADS, -1)
    scores = np.einsum("rnhq,rmhq->rhnm", heads(q), heads(k)) * 0.7
    allow = np.asarray(MaskRule().allow(*[inputs()[0]] * 2))[:, None]
    want = np.einsum("rhnm,rmhv->rnhv", silu(scores) * allow / 7, heads(v)).reshape(4, 12, -1)
    got_u, got_a = attend(activation=activation, with_bias=with_bias)
    np.testing.assert_allclose(got_u, u, rtol=0, atol=2e-6)
    np.testing.assert_allclose(got_a, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", pointwise_attention.ACTIVATIONS)
def test_rows_that_are_not_asked_for_change_nothing(activation):
    per_row = jnp.arange(48.0).reshape(4, 12) + 1
    whole = attend(activation=activation, normalizer=per_row)
    part = attend(rows=4, activation=activation, normalizer=per_row)
    for a, b in zip(whole, part):
        np.testing.assert_allclose(a[:, 8:], b, rtol=0, atol=1e-6)


def test_every_key_twice_doubles_the_output():
    """The sum is not normalised over the keys, as a softmax's would be."""
    tokens, h_rnd, kernel_df, _ = inputs()
    twice = lambda x: jnp.concatenate([x, x], axis=1)
    keys = jax.tree.map(twice, tokens)
    once, double = (
        pointwise_attention.attend(
            *(x, kernel_df, (sequence.last(k, 12), k, MaskRule())),
            **{"heads": HEADS, "qk": QK, "v": V, "normalizer": 7.0},
        )[1]
        for x, k in ((h_rnd, tokens), (twice(jnp.asarray(h_rnd)), keys))
    )
    np.testing.assert_allclose(double, 2 * once, rtol=1e-5, atol=1e-6)


def test_normalizers():
    tokens, *_ = inputs()
    found = functools.partial(pointwise_attention.normalizer, static_max=9, constant=2.5)
    assert found("static_max", tokens) == 9.0 and found("const", tokens) == 2.5
    lengths = found("valid_len", tokens)
    # Two context tokens, 5, 0, 3, 1 events, and the candidate.
    assert lengths[:, 0].tolist() == [8, 3, 6, 4] and lengths[0, 8] == 8


def test_refusals():
    tokens, *_ = inputs()
    with pytest.raises(ValueError, match="activation='v', expected one of"):
        attend(activation="v")
    with pytest.raises(ValueError, match="kind='batch_max', expected one of"):
        pointwise_attention.normalizer("batch_max", tokens, static_max=1, constant=1.0)
    with pytest.raises(ValueError, match="it: width=9 is no multiple of heads=2"):
        pointwise_attention.check_widths("it", 9, 2, 3, None)
    pointwise_attention.check_widths("it", 9, 2, 3, 4)
