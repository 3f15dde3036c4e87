"""DLRM-MLP and DLRM against float64 NumPy, their parameter counts, and what they refuse."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.models import dlrm
from tests import builders, interaction
from tests.references import dlrm as reference

SMALL = dlrm.Config(layers=3, width=8, tasks=2)
WIDTH = (4 + 1) + (4 + 1 + 4) + 4  # user, item and context inputs of the tests' schema
POOLED = 4 + 1 + 4 + 4


@functools.cache
def initial(config):
    features = builders.features(builders.batch(np.random.default_rng(0)))
    model = dlrm.DLRMMLP(config)
    return jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), features)


def score(config, params, features):
    model = dlrm.DLRMMLP(config)
    return np.asarray(jax.jit(functools.partial(model.apply, train=False))(params, features)[0])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm": "layer"},
        {"norm": "rms", "norm_place": "pre"},
        {"pooling": ("target", "mean"), "attention_activation": "dice"},
    ],
)
def test_logits_are_the_references(change):
    rng = np.random.default_rng(1)
    config = dataclasses.replace(SMALL, **change)
    batch = builders.batch(rng)
    params = builders.moved(initial(config), rng)
    got = score(config, params, builders.features(batch))
    c, p = config, builders.float64(params["params"])
    for row, candidate in np.argwhere(batch.candidate_mask):
        want = reference.logits(
            *(builders.one(batch, row, candidate), p, c.layers, c.pooling),
            *(c.attention_activation, c.norm, c.norm_place),
        )
        np.testing.assert_allclose(got[row, candidate], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [0, 2])
def test_gradients_are_the_references_differences(layers):
    config = dataclasses.replace(SMALL, layers=layers, pooling=("mean", "target"))

    def expected(sample, p):
        return reference.logits(sample, p, layers, config.pooling)

    interaction.check_gradients(expected, dlrm.DLRMMLP(config), np.random.default_rng(4))


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_parameter_count(norm):
    params = initial(dataclasses.replace(SMALL, norm=norm))
    W, D, L, K = WIDTH + POOLED, 8, 3, 2
    want = W * D + D + (L - 1) * (D * D + D) + D * K + K
    assert builders.count(params) == want + L * {"none": 0, "rms": D, "layer": 2 * D}[norm]


def test_parameter_count_with_target_attention():
    params = initial(dataclasses.replace(SMALL, pooling=("mean", "target"), layers=1))
    items, own, F = 9, 4, 36
    attention = (4 * items + own) * F + F + F + 1
    assert builders.count(params["params"]["history"]) == attention
    assert builders.count(params) == attention + (WIDTH + 2 * POOLED) * 8 + 8 + 8 * 2 + 2


def test_only_float32_parameters_and_logits():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params = initial(config)
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}
    features = builders.features(builders.batch(np.random.default_rng(0)))
    assert score(config, params, features).dtype == np.float32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 0}, "width=0"),
        ({"layers": True}, "layers=True"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"pooling": ("mean", "mean")}, "pooling=.*different names"),
        ({"pooling": "mean"}, "pooling='mean', expected a tuple"),
        ({"init": "zeros"}, "init='zeros'"),
    ],
)
def test_a_bad_config_is_refused(change, match):
    with pytest.raises(ValueError, match="dlrm.Config: " + match):
        dataclasses.replace(SMALL, **change)


def test_a_config_goes_to_json_and_back():
    assert dlrm.Config(**json.loads(json.dumps(dataclasses.asdict(SMALL)))) == SMALL
    assert SMALL.paper_params() is None and SMALL.paper_flops() is None


def test_windows_are_refused():
    features = builders.features(builders.batch(np.random.default_rng(0), one_time=False))
    with pytest.raises(ValueError, match=r"dlrm_mlp: .* different times"):
        dlrm.DLRMMLP(SMALL).init(jax.random.key(0), features, train=False)


DOT = dlrm.DotConfig(layers=2, width=3, expansion=2, tasks=2)
DENSE, VECTORS = 3, 7 + 1  # inputs of the tests' schema with the mean of the history
DOT_VARIANTS = {
    "as printed": {},
    "layer, post, three layers at the bottom": {"norm": "layer", "bottom_layers": 3},
    "rms, pre, one layer at the bottom": {"norm": "rms", "norm_place": "pre", "bottom_layers": 1},
    "two poolings": {"pooling": ("mean", "target"), "layers": 1},
}


def dot_model(**change):
    return dlrm.DLRMDot(dataclasses.replace(DOT, **change))


def dot_referenced(config):
    c = config
    return lambda sample, p: reference.dot_logits(
        *(sample, p, c.layers, c.bottom_layers, c.pooling, c.norm, c.norm_place)
    )


@pytest.mark.parametrize("kind", DOT_VARIANTS)
def test_dot_logits_are_the_papers(kind):
    rng = np.random.default_rng(1)
    net = dot_model(**DOT_VARIANTS[kind])
    params = interaction.drawn(net, rng)
    interaction.assert_is(dot_referenced(net.config), net, params, builders.batch(rng))


@pytest.mark.parametrize("kind", list(DOT_VARIANTS)[:2])
def test_dot_gradients_are_the_references(kind):
    rng = np.random.default_rng(2)
    net = dot_model(**DOT_VARIANTS[kind], width=6)
    interaction.check_gradients(dot_referenced(net.config), net, rng)


@pytest.mark.parametrize(
    ("norm", "bottom_layers"), [("none", 2), ("rms", 1), ("layer", 3), ("none", 1)]
)
def test_dot_parameter_count(norm, bottom_layers):
    params = interaction.shapes(dot_model(norm=norm, bottom_layers=bottom_layers))
    D, H, L, K, B, V = 3, 6, 2, 2, bottom_layers, VECTORS
    affine = {"none": 0, "rms": 1, "layer": 2}[norm]
    hidden = DENSE * H + H + (B - 2) * (H * H + H) + H * D + D
    bottom = DENSE * D + D if B == 1 else hidden
    assert builders.count(params["bottom"]) == bottom + affine * ((B - 1) * H + D)
    top = (D + V * (V - 1) // 2) * H + H + (L - 1) * (H * H + H)
    assert builders.count(params["top"]) == top + affine * L * H
    assert builders.count(params["tokenizer"]) == (V - 1) * (4 * D + D)
    parts = [params[name] for name in ("bottom", "top", "tokenizer")]
    assert builders.count(params) == builders.count(parts) + H * K + K


def test_dots_are_those_of_all_pairs():
    x_vnd = np.random.default_rng(0).normal(size=(4, 2, 3)).astype("f4")
    want = [[x_vnd[i, n] @ x_vnd[j, n] for i in range(4) for j in range(i + 1, 4)] for n in (0, 1)]
    np.testing.assert_allclose(dlrm.dots(jnp.asarray(x_vnd)), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tokenizer", "tokens"), [("group", None), ("even_split", 4), ("auto_split", 3)]
)
def test_dot_with_every_tokenizer(tokenizer, tokens):
    rng = np.random.default_rng(4)
    net = dot_model(tokenizer=tokenizer, tokens=tokens)
    params, batch = interaction.drawn(net, rng), builders.batch(rng)
    logits = interaction.score(net, params, builders.features(batch))
    packed = interaction.score(net, params, builders.packed(batch, 2)).reshape(logits.shape)
    valid = batch.candidate_mask
    assert np.unique(logits[valid]).size == 2 * valid.sum()
    interaction.close(packed, logits, valid)


def features_of(keep):
    """Features of the schema's features for which keep(feature) holds."""
    batch = builders.batch(np.random.default_rng(0))
    kept = tuple(f for f in batch.schema.features if keep(f))
    found = builders.features(batch)
    return dataclasses.replace(found, schema=dataclasses.replace(batch.schema, features=kept))


def test_dot_without_dense_features_reads_the_dots_alone():
    init = functools.partial(dot_model().init, train=False)
    features = features_of(lambda f: f.kind != "dense")
    params = jax.eval_shape(init, jax.random.key(0), features)["params"]
    assert "bottom" not in params
    assert params["top"]["dense_0"]["kernel"].shape == (7 * 6 // 2, 6)


def test_dot_refuses_a_schema_without_pairs():
    init = functools.partial(dot_model().init, train=False)
    with pytest.raises(ValueError, match="dlrm: the schema has no categorical feature"):
        jax.eval_shape(init, jax.random.key(0), features_of(lambda f: f.kind == "dense"))
    with pytest.raises(ValueError, match="dlrm: one vector, expected at least two"):
        jax.eval_shape(init, jax.random.key(0), features_of(lambda f: f.name == "hour"))


def test_dot_bfloat16_is_near_float32():
    rng = np.random.default_rng(5)
    net = dot_model(width=8)
    features = builders.features(builders.batch(rng))
    interaction.bfloat16_is_near(net, interaction.drawn(net, rng), features)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers": 0}, "layers=0"),
        ({"width": 0}, "width=0"),
        ({"expansion": 0}, "expansion=0"),
        ({"bottom_layers": 0}, "bottom_layers=0"),
        ({"tasks": 0}, "tasks=0"),
        ({"tokenizer": "words"}, "tokenizer='words'"),
        ({"tokenizer": "even_split"}, "tokens=None, expected a number"),
        ({"tokenizer_hidden": -1}, "tokenizer_hidden=-1"),
        ({"pooling": ()}, r"pooling=\(\)"),
        ({"attention_activation": "relu"}, "attention_activation='relu'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"init": "he"}, "init='he'"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_a_bad_dot_config_is_refused(change, match):
    with pytest.raises(ValueError, match="dlrm.DotConfig: " + match):
        dataclasses.replace(DOT, **change)


def test_a_dot_config_goes_to_json_and_back():
    assert dlrm.DotConfig(**json.loads(json.dumps(dataclasses.asdict(DOT)))) == DOT
    assert DOT.paper_params() is None and DOT.paper_flops() is None


def test_dot_refuses_windows():
    features = builders.features(builders.batch(np.random.default_rng(0), one_time=False))
    with pytest.raises(ValueError, match=r"dlrm: .* different times"):
        dot_model().init(jax.random.key(0), features, train=False)
