"""DIN against float64 NumPy, its parameter count, and what it refuses."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from rankjax.models import din
from tests import builders, interaction
from tests.references import din as reference
from tests.references import feature_tokens

SMALL = din.Config(layers=2, width=8, attention_hidden=(6,), tasks=2)
ITEM, OWN = 4 + 1 + 4, 4  # an item's features, and the action, which an event alone has
INPUTS = (4 + 1) + ITEM + 4 + (ITEM + OWN)  # user, item, context, pooled history
VARIANTS = {
    "dice": {},
    "prelu, sigmoid attention, rms before": {
        **{"activation": "prelu", "attention_activation": "sigmoid", "norm": "rms"},
        "norm_place": "pre",
    },
    "relu, both poolings, layer norm, two hidden layers of attention": {
        **{"activation": "relu", "pooling": ("mean", "target"), "norm": "layer"},
        **{"attention_hidden": (6, 3), "layers": 1},
    },
}


def model(**change):
    return din.DIN(dataclasses.replace(SMALL, **change))


def referenced(config):
    c = config
    norm = functools.partial(feature_tokens.normalise, kind=c.norm)
    return lambda sample, p: reference.logits(
        *(sample, p, c.layers, c.pooling, c.activation, c.attention_activation, norm, c.norm_place)
    )


@pytest.mark.parametrize("kind", VARIANTS)
def test_logits_are_the_papers(kind):
    rng = np.random.default_rng(1)
    net = model(**VARIANTS[kind])
    params = interaction.drawn(net, rng)
    interaction.assert_is(referenced(net.config), net, params, builders.batch(rng))


@pytest.mark.parametrize("kind", list(VARIANTS)[:2])
def test_gradients_are_the_references(kind):
    rng = np.random.default_rng(2)
    net = model(**VARIANTS[kind])
    interaction.check_gradients(referenced(net.config), net, rng)


@pytest.mark.parametrize(
    ("norm", "activation"), [("none", "dice"), ("rms", "prelu"), ("layer", "relu")]
)
def test_parameter_count(norm, activation):
    net = model(norm=norm, activation=activation, attention_hidden=(6, 3), layers=3)
    params = interaction.shapes(net)
    D, K, F, last = 8, 2, 6, 3
    attention = (4 * ITEM + OWN) * F + F + (F * last + last) + (last + 1) + 3 * (F + last)
    assert builders.count(params["history"]) == attention
    own = {"dice": 3 * D, "prelu": D, "relu": 0}[activation]
    own += {"none": 0, "rms": D, "layer": 2 * D}[norm]
    want = INPUTS * D + D + 2 * (D * D + D) + D * K + K + 3 * own
    assert builders.count(params) == attention + want


def test_alpha_starts_as_printed():
    x_nw = np.zeros((1, 3), np.float32)
    for activation, alpha in (("dice", 0.0), ("prelu", 0.25)):
        layer = din.Layer(dataclasses.replace(SMALL, activation=activation))
        params = interaction.initial(layer, x_nw)
        np.testing.assert_array_equal(params["alpha"], np.full(8, alpha, np.float32))


def test_bfloat16_is_near_float32():
    rng = np.random.default_rng(5)
    net = model()
    features = builders.features(builders.batch(rng))
    interaction.bfloat16_is_near(net, interaction.drawn(net, rng), features)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"attention_activation": "relu"}, "attention_activation='relu'"),
        ({"pooling": ("mean",)}, r"pooling=\('mean',\), expected 'target' among them"),
        ({"attention_hidden": ()}, r"attention_hidden=\(\)"),
        ({"layers": 0}, "layers=0"),
        ({"width": 0}, "width=0"),
        ({"tasks": -1}, "tasks=-1"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"norm_place": "mid"}, "norm_place='mid'"),
        ({"init": "he"}, "init='he'"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_a_bad_config_is_refused(change, match):
    with pytest.raises(ValueError, match="din.Config: " + match):
        dataclasses.replace(SMALL, **change)


def test_a_config_goes_to_json_and_back():
    assert din.Config(**json.loads(json.dumps(dataclasses.asdict(SMALL)))) == SMALL
    assert SMALL.paper_params() is None and SMALL.paper_flops() is None


def test_windows_are_refused():
    features = builders.features(builders.batch(np.random.default_rng(0), one_time=False))
    with pytest.raises(ValueError, match=r"din: .* different times"):
        model().init(jax.random.key(0), features, train=False)
