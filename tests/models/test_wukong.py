"""Wukong against float64 NumPy with X X^T written out, its closed forms, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import flops
from rankjax.models import wukong
from tests import builders, interaction
from tests.references import wukong as reference

SMALL = wukong.Config(
    **{"layers": 2, "width": 6, "fm_tokens": 3, "linear_tokens": 2, "rank": 4, "hidden": 7},
    tasks=2,
)
T = 10  # the tests' schema, with the mean of the history
VARIANTS = {
    "as printed": {},
    "attentive": {"attentive": True, "mlp_layers": 2},
    "pre, rms": {"norm": "rms", "norm_place": "pre"},
    "no norm, half and half, no last MLP": {
        **{"norm": "none", "fm_tokens": None, "linear_tokens": None, "top_layers": 0, "layers": 1}
    },
    "two poolings": {"pooling": ("mean", "target"), "layers": 1, "top_layers": 2},
}


def model(**change):
    return wukong.Wukong(dataclasses.replace(SMALL, **change))


def referenced(config):
    c = config
    return lambda sample, p: reference.logits(
        *(sample, p, c.layers, c.mlp_layers, c.top_layers, c.pooling, c.norm, c.norm_place)
    )


@pytest.mark.parametrize("kind", VARIANTS)
def test_logits_are_the_papers(kind):
    rng = np.random.default_rng(1)
    net = model(**VARIANTS[kind])
    params = interaction.drawn(net, rng)
    interaction.assert_is(referenced(net.config), net, params, builders.batch(rng))


@pytest.mark.parametrize("kind", ["as printed", "attentive"])
def test_gradients_are_the_references(kind):
    rng = np.random.default_rng(2)
    net = model(**VARIANTS[kind])
    interaction.check_gradients(referenced(net.config), net, rng)


def closed_form(n, m_fm, m_linear, D, k, h, P, attentive, affine):
    """Of one layer, in the letters of the file's docstring."""
    y = n * k + ((k * D * h + h) + (h * n * k + n * k) if attentive else 0)
    fmb = n * k * h + h + (P - 1) * (h * h + h) + h * m_fm * D + m_fm * D
    made = m_fm + m_linear
    return y + fmb + n * m_linear + (n * made if n != made else 0) + affine * (n * k + D)


@pytest.mark.parametrize(
    ("norm", "attentive"), [("none", True), ("rms", False), ("layer", False), ("layer", True)]
)
def test_parameter_count(norm, attentive):
    net = model(norm=norm, attentive=attentive, mlp_layers=2, layers=3, top_layers=2)
    params = interaction.shapes(net)
    layers = [params[f"layer_{i}"] for i in range(3)]
    affine = {"none": 0, "rms": 1, "layer": 2}[norm]
    own = (3, 2, 6, 4, 7, 2, attentive, affine)
    want = closed_form(T, *own) + 2 * closed_form(5, *own)
    assert builders.count(layers) == want
    config = dataclasses.replace(net.config, tokens=T)
    assert config.paper_params() == want and net.config.paper_params() is None
    inputs, D, h, K = 4 + 1 + 4 + 1 + 4 + 4 + (4 + 1 + 4 + 4), 6, 7, 2
    ends = inputs * D + T * D + 5 * D * h + h + h * h + h + h * K + K
    assert builders.count(params) == want + ends


def test_half_and_half_keeps_the_number_of_tokens():
    whole = dataclasses.replace(SMALL, fm_tokens=None, linear_tokens=None)
    assert [whole.made_of(n) for n in (10, 9, 1)] == [(5, 5), (5, 4), (1, 1)]
    params = interaction.shapes(wukong.Wukong(whole))
    assert "residual" not in params["layer_0"] and "residual" not in params["layer_1"]
    assert params["layer_1"]["linear"]["kernel"].shape == (10, 5)
    counted = builders.count([params["layer_0"], params["layer_1"]])
    assert dataclasses.replace(whole, tokens=T).paper_params() == counted


@pytest.mark.parametrize("attentive", [False, True])
def test_layers_multiply_as_often_as_the_closed_form_says(attentive):
    config = dataclasses.replace(SMALL, tokens=9, tokenizer="group", attentive=attentive)
    config = dataclasses.replace(config, mlp_layers=2, norm="none")
    N, total = 3, 0
    for n in (9, 5):
        layer = wukong.Layer(config)
        x_tnd = jax.ShapeDtypeStruct((n, N, 6), jnp.float32)
        params = jax.eval_shape(layer.init, jax.random.key(0), x_tnd)
        total += flops.count(layer.apply, params, x_tnd).matmul
    assert total == N * config.paper_flops()
    assert SMALL.paper_flops() is None  # the data decide T


def test_interactions_double_their_order_with_every_layer():
    """Without norms, with ReLUs that stay open, layer L is a polynomial of degree 2^L in X."""
    config = dataclasses.replace(SMALL, norm="none", mlp_layers=1)
    rng = np.random.default_rng(3)
    x_nd = rng.normal(size=(5, 6))
    layer = wukong.Layer(config)
    p = interaction.drawn(layer, rng, jnp.zeros((5, 1, 6)))
    p = jax.tree.map(lambda x: 0.3 * x.astype(np.float64), p)
    p["fm"]["mlp"]["dense_0"]["bias"] += 100.0

    def at(scale):
        return reference.layer(reference.layer(scale * x_nd, p, 1, "none"), p, 1, "none")

    steps = np.arange(-3, 4) / 6
    values = np.stack([at(s).reshape(-1) for s in steps])
    for degree, fits in ((3, False), (4, True)):
        powers = np.vander(steps, degree + 1)
        rest = values - powers @ np.linalg.lstsq(powers, values, rcond=None)[0]
        assert (np.abs(rest).max() < 1e-8 * np.abs(values).max()) == fits
    got = values[-1]
    x_tnd = (steps[-1] * x_nd)[:, None].astype("f4")
    apply = jax.jit(lambda x_tnd: layer.apply({"params": p}, x_tnd))
    y_tnd = apply(apply(x_tnd))
    np.testing.assert_allclose(np.asarray(y_tnd)[:, 0].reshape(-1), got, rtol=1e-4, atol=1e-3)


def test_table_5_of_the_paper():
    """By hand for l = 8: n_F = n_L = 32, k = 24, MLP 3 x 2048, d = 160."""
    big = dataclasses.replace(wukong.WUKONG_2_GFLOP, tokens=720)
    own = (32, 32, 160, 24, 2048, 3, True, 2)
    want = closed_form(720, *own) + 7 * closed_form(64, *own)
    assert big.paper_params() == want


@pytest.mark.parametrize(
    ("tokenizer", "tokens"), [("group", None), ("even_split", 4), ("auto_split", 3)]
)
def test_every_tokenizer(tokenizer, tokens):
    rng = np.random.default_rng(4)
    net = model(tokenizer=tokenizer, tokens=tokens)
    params, batch = interaction.drawn(net, rng), builders.batch(rng)
    logits = interaction.score(net, params, builders.features(batch))
    packed = interaction.score(net, params, builders.packed(batch, 2)).reshape(logits.shape)
    valid = batch.candidate_mask
    assert np.unique(logits[valid]).size == 2 * valid.sum()
    interaction.close(packed, logits, valid)


def test_small_residual_divides_what_writes_to_the_stream():
    x_tnd = np.zeros((7, 1, 6), np.float32)
    small, lecun = (
        interaction.initial(wukong.Layer(dataclasses.replace(SMALL, init=init)), x_tnd)
        for init in ("small_residual", "lecun")
    )
    for found in (small, lecun):
        found |= found.pop("fm")
    for name, by in (("out", 2), ("linear", 2), ("residual", 1)):
        np.testing.assert_allclose(small[name]["kernel"], lecun[name]["kernel"] / by, rtol=1e-6)
    np.testing.assert_array_equal(small["projection"], lecun["projection"])


def test_bfloat16_is_near_float32():
    rng = np.random.default_rng(5)
    net = model(**VARIANTS["attentive"])
    features = builders.features(builders.batch(rng))
    interaction.bfloat16_is_near(net, interaction.drawn(net, rng), features)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fm_tokens": 0}, "fm_tokens=0"),
        ({"linear_tokens": 1.5}, "linear_tokens=1.5"),
        ({"rank": 0}, "rank=0"),
        ({"hidden": 0}, "hidden=0"),
        ({"mlp_layers": 0}, "mlp_layers=0"),
        ({"top_layers": -1}, "top_layers=-1"),
        ({"attentive": "yes"}, "attentive='yes'"),
        ({"layers": 0}, "layers=0"),
        ({"width": 0}, "width=0"),
        ({"tasks": 0}, "tasks=0"),
        ({"tokenizer": "words"}, "tokenizer='words'"),
        ({"tokenizer": "auto_split"}, "tokens=None, expected a number"),
        ({"pooling": ("mean", "mean")}, "pooling=.*different names"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"norm_place": "mid"}, "norm_place='mid'"),
        ({"init": "he"}, "init='he'"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_a_bad_config_is_refused(change, match):
    with pytest.raises(ValueError, match="wukong.Config: " + match):
        dataclasses.replace(SMALL, **change)


def test_a_config_goes_to_json_and_back():
    for config in (SMALL, wukong.WUKONG_1_GFLOP):
        assert wukong.Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_windows_are_refused():
    features = builders.features(builders.batch(np.random.default_rng(0), one_time=False))
    with pytest.raises(ValueError, match=r"wukong: .* different times"):
        model().init(jax.random.key(0), features, train=False)
