"""AutoInt against float64 NumPy, its closed forms and the paper's count, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import flops
from rankjax.models import autoint
from tests import builders, interaction
from tests.references import autoint as reference

SMALL = autoint.Config(layers=2, width=8, heads=2, tasks=2)
T = 10  # the tests' schema, with the mean of the history
VARIANTS = {
    "as printed": {"head_width": 3},
    "layer, post": {"norm": "layer"},
    "rms, pre, one layer": {"norm": "rms", "norm_place": "pre", "layers": 1},
    "two poolings, three heads": {"pooling": ("mean", "target"), "heads": 3, "head_width": 2},
}


def model(**change):
    return autoint.AutoInt(dataclasses.replace(SMALL, **change))


def referenced(config):
    c = config
    return lambda sample, p: reference.logits(
        *(sample, p, c.layers, c.heads, c.pooling, c.norm, c.norm_place)
    )


@pytest.mark.parametrize("kind", VARIANTS)
def test_logits_are_the_papers(kind):
    rng = np.random.default_rng(1)
    net = model(**VARIANTS[kind])
    params = interaction.drawn(net, rng)
    interaction.assert_is(referenced(net.config), net, params, builders.batch(rng))


@pytest.mark.parametrize("change", [{"head_width": 3}, {"norm": "layer", "norm_place": "pre"}])
def test_gradients_are_the_references(change):
    rng = np.random.default_rng(2)
    net = model(**change)
    interaction.check_gradients(referenced(net.config), net, rng)


@pytest.mark.parametrize(
    ("norm", "place", "head_width"),
    [("none", "post", 3), ("layer", "post", 3), ("layer", "pre", 3), ("rms", "pre", None)],
)
def test_parameter_count(norm, place, head_width):
    net = model(norm=norm, norm_place=place, head_width=head_width, layers=3)
    params = interaction.shapes(net)
    layers = [params[f"layer_{i}"] for i in range(3)]
    assert builders.count(layers) == net.config.paper_params()
    D, F = 8, 8 if head_width is None else 6
    per_width = {"none": 0, "rms": 1, "layer": 2}[norm]
    affine = per_width * (D + 2 * F if place == "pre" else 3 * F)
    assert net.config.paper_params() == 4 * D * F + 2 * 4 * F * F + affine
    assert builders.count(params["heads"]) == T * F * 2 + 2
    inputs = 4 + 1 + 4 + 1 + 4 + 4 + (4 + 1 + 4 + 4)
    assert builders.count(params["tokenizer"]) == inputs * D + T * D
    out_norm = per_width * F if place == "pre" else 0
    parts = net.config.paper_params() + T * F * 2 + 2 + inputs * D + T * D + out_norm
    assert builders.count(params) == parts


def test_the_papers_size_has_the_papers_count():
    assert autoint.AUTOINT_CRITEO.paper_params() == 4 * 16 * 64 + 2 * 4 * 64 * 64
    (figure,) = autoint.PAPER.figures
    assert figure.ours() == 39_361


@pytest.mark.parametrize("head_width", [None, 3])
def test_layers_multiply_as_often_as_the_closed_form_says(head_width):
    config = dataclasses.replace(SMALL, tokens=5, head_width=head_width, tokenizer="group")
    N, total = 3, 0
    for width in (config.width, config.width_out):
        layer = autoint.Layer(config)
        x_tnw = jax.ShapeDtypeStruct((5, N, width), jnp.float32)
        params = jax.eval_shape(layer.init, jax.random.key(0), x_tnw)
        total += flops.count(layer.apply, params, x_tnw).matmul
    assert total == N * config.paper_flops()
    assert SMALL.paper_flops() is None  # the data decide T


def test_a_layer_knows_no_order_of_tokens():
    rng = np.random.default_rng(3)
    layer = autoint.Layer(SMALL)
    x_tnw = rng.normal(size=(5, 2, 8)).astype("f4")
    params, order = {"params": interaction.drawn(layer, rng, x_tnw)}, rng.permutation(5)
    want = layer.apply(params, x_tnw)[order]
    np.testing.assert_allclose(layer.apply(params, x_tnw[order]), want, rtol=0, atol=1e-6)


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


def test_small_residual_divides_only_values():
    x_tnd = np.zeros((3, 1, 8), np.float32)
    small, lecun = (
        interaction.initial(autoint.Layer(dataclasses.replace(SMALL, init=init)), x_tnd)
        for init in ("small_residual", "lecun")
    )
    for name, by in (("query", 1), ("value", 2)):
        want = lecun["attention"][name]["kernel"] / by
        np.testing.assert_allclose(small["attention"][name]["kernel"], want, rtol=1e-6)
    np.testing.assert_array_equal(small["residual"]["kernel"], lecun["residual"]["kernel"])


def test_bfloat16_is_near_float32():
    rng = np.random.default_rng(5)
    net = model(head_width=3)
    features = builders.features(builders.batch(rng))
    interaction.bfloat16_is_near(net, interaction.drawn(net, rng), features)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 9}, "width=9 is no multiple of heads=2; set head_width"),
        ({"heads": 0}, "heads=0"),
        ({"head_width": 0}, "head_width=0"),
        ({"layers": 0}, "layers=0"),
        ({"tasks": 1.0}, "tasks=1.0"),
        ({"tokenizer": "words"}, "tokenizer='words'"),
        ({"tokenizer": "even_split"}, "tokens=None, expected a number"),
        ({"tokenizer_hidden": -1}, "tokenizer_hidden=-1"),
        ({"pooling": ("sum",)}, "pooling='sum'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"norm_place": "mid"}, "norm_place='mid'"),
        ({"init": "he"}, "init='he'"),
        ({"dtype": "float64"}, "dtype='float64'"),
    ],
)
def test_a_bad_config_is_refused(change, match):
    with pytest.raises(ValueError, match="autoint.Config: " + match):
        dataclasses.replace(SMALL, **change)


def test_a_config_goes_to_json_and_back():
    for config in (SMALL, autoint.AUTOINT_CRITEO):
        assert autoint.Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_windows_are_refused():
    features = builders.features(builders.batch(np.random.default_rng(0), one_time=False))
    with pytest.raises(ValueError, match=r"autoint: .* different times"):
        model().init(jax.random.key(0), features, train=False)
