"""The plain Transformer against float64 NumPy, its closed forms, pruning, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import flops
from rankjax.models import transformer
from tests import builders, interaction
from tests.references import transformer as reference

SMALL = transformer.Config(layers=2, width=8, heads=2, expansion=2, tasks=2)
T = 10  # the tests' schema, with the mean of the history
VARIANTS = {
    "pre, task tokens": {},
    "post, mean": {"norm_place": "post", "readout": "mean", "layers": 1},
    "rms, own head widths": {"norm": "rms", "key_width": 3, "value_width": 5, "heads": 3},
    "post, task tokens, one task": {"norm_place": "post", "tasks": 1},
    "no norm, mean, two poolings": {
        **{"norm": "none", "readout": "mean", "pooling": ("mean", "target"), "layers": 1}
    },
}


def model(**change):
    return transformer.Transformer(dataclasses.replace(SMALL, **change))


def referenced(config):
    c = config
    return lambda sample, p: reference.logits(
        *(sample, p, c.layers, c.heads, c.pooling, c.readout, c.norm, c.norm_place)
    )


@pytest.mark.parametrize("kind", VARIANTS)
def test_logits_are_the_references(kind):
    rng = np.random.default_rng(1)
    net = model(**VARIANTS[kind])
    params = interaction.drawn(net, rng)
    interaction.assert_is(referenced(net.config), net, params, builders.batch(rng))


@pytest.mark.parametrize("kind", ["pre, task tokens", "post, mean"])
def test_gradients_are_the_references(kind):
    rng = np.random.default_rng(2)
    net = model(**VARIANTS[kind])
    interaction.check_gradients(referenced(net.config), net, rng)


@pytest.mark.parametrize("norm_place", ["pre", "post"])
def test_a_pruned_block_gives_the_same_values_and_gradients(norm_place):
    rng = np.random.default_rng(3)
    block = transformer.Block(dataclasses.replace(SMALL, norm_place=norm_place))
    x_tnd, weights = (rng.normal(size=(n, 3, 8)).astype("f4") for n in (5, 2))
    params = interaction.drawn(block, rng, x_tnd)

    def difference(params, x_tnd):
        pruned, whole = (block.apply({"params": params}, x_tnd, rows)[:2] for rows in (2, None))
        return (weights * pruned - weights * whole).sum()

    value, gradients = jax.jit(jax.value_and_grad(difference, argnums=(0, 1)))(params, x_tnd)
    assert abs(value) < 1e-5
    for gradient in jax.tree.leaves(gradients):
        assert np.abs(gradient).max() < 1e-5


def test_the_last_block_is_pruned_and_scores_the_same():
    rng = np.random.default_rng(3)
    params, features = interaction.drawn(model(), rng), builders.features(builders.batch(rng))
    want = interaction.score(model(prune_last=False), params, features)
    got = interaction.score(model(), params, features)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_pruned_last_block_computes_less():
    def matmul(prune):
        net = model(prune_last=prune)
        features = builders.features(builders.batch(np.random.default_rng(0)))
        params = {"params": interaction.shapes(net)}
        apply = lambda p, f: net.apply(p, f, train=False)[0]
        return flops.count(apply, params, features).matmul

    # All but K rows of queries, output, feed-forward, scores and values of one block.
    D, H, q, K, candidates = 8, 2, 4, 2, 16
    saved = 2 * T * (2 * D * H * q + 4 * D * D) + 4 * T * (T + K) * H * q
    assert matmul(False) - matmul(True) == candidates * saved


@pytest.mark.parametrize(
    ("norm", "norm_place", "readout"),
    [("layer", "pre", "task"), ("rms", "pre", "mean"), ("layer", "post", "mean")],
)
def test_parameter_count(norm, norm_place, readout):
    net = model(**{"norm": norm, "norm_place": norm_place, "readout": readout, "key_width": 3})
    params = interaction.shapes(net)
    blocks = [params[f"block_{i}"] for i in range(2)]
    D, H, q, v, F, K = 8, 2, 3, 4, 16, 2
    affine = {"none": 0, "rms": D, "layer": 2 * D}[norm]
    want = 2 * (D * H * (2 * q + v) + H * v * D + 2 * D * F + F + D + 2 * affine)
    assert builders.count(blocks) == net.config.paper_params() == want
    inputs = 4 + 1 + 4 + 1 + 4 + 4 + (4 + 1 + 4 + 4)
    ends = inputs * D + T * D + D * K + K + (affine if norm_place == "pre" else 0)
    assert builders.count(params) == want + ends + (K * D if readout == "task" else 0)


@pytest.mark.parametrize("readout", transformer.READOUTS)
def test_blocks_multiply_as_often_as_the_closed_form_says(readout):
    config = dataclasses.replace(SMALL, tokens=5, readout=readout, tokenizer="group", key_width=3)
    block, N = transformer.Block(config), 3
    rows = 5 + (2 if readout == "task" else 0)
    x_tnd = jax.ShapeDtypeStruct((rows, N, 8), jnp.float32)
    params = jax.eval_shape(block.init, jax.random.key(0), x_tnd)
    counted = flops.count(block.apply, params, x_tnd).matmul
    assert config.layers * counted == N * config.paper_flops()
    assert SMALL.paper_flops() is None  # the data decide T


def test_hiformers_sizes():
    D, F = 128, 512
    layer = D * 4 * (2 * 16 + 64) + 256 * D + 2 * D * F + F + D + 4 * D
    assert layer == 214_144 and round(38 * layer, -4) == 8_140_000  # HeteroAtt's, per token
    sizes = (transformer.TRANSFORMER_1, transformer.TRANSFORMER_2, transformer.TRANSFORMER_3)
    assert [size.paper_params() for size in sizes] == [layer, 2 * layer, 3 * layer]


def test_a_block_knows_no_order_of_tokens():
    rng = np.random.default_rng(4)
    block = transformer.Block(SMALL)
    x_tnd = rng.normal(size=(5, 2, 8)).astype("f4")
    params, order = {"params": interaction.drawn(block, rng, x_tnd)}, rng.permutation(5)
    apply = jax.jit(block.apply)
    want = apply(params, x_tnd)[order]
    np.testing.assert_allclose(apply(params, x_tnd[order]), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tokenizer", "tokens"), [("group", None), ("even_split", 4), ("auto_split", 3)]
)
def test_every_tokenizer(tokenizer, tokens):
    rng = np.random.default_rng(5)
    net = model(tokenizer=tokenizer, tokens=tokens)
    params, batch = interaction.drawn(net, rng), builders.batch(rng)
    logits = interaction.score(net, params, builders.features(batch))
    packed = interaction.score(net, params, builders.packed(batch, 2)).reshape(logits.shape)
    valid = batch.candidate_mask
    assert np.unique(logits[valid]).size == 2 * valid.sum()
    interaction.close(packed, logits, valid)


def test_small_residual_divides_what_writes_to_the_stream():
    x_tnd = np.zeros((3, 1, 8), np.float32)
    small, lecun = (
        interaction.initial(transformer.Block(dataclasses.replace(SMALL, init=init)), x_tnd)
        for init in ("small_residual", "lecun")
    )
    for name, by in (("attention_out", 2), ("ffn_in", 1), ("ffn_out", 2)):
        np.testing.assert_allclose(small[name]["kernel"], lecun[name]["kernel"] / by, rtol=1e-6)
    for name in ("query", "value"):
        np.testing.assert_array_equal(*(x["attention"][name]["kernel"] for x in (small, lecun)))


def test_bfloat16_is_near_float32():
    rng = np.random.default_rng(6)
    net = model()
    features = builders.features(builders.batch(rng))
    interaction.bfloat16_is_near(net, interaction.drawn(net, rng), features)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 9}, "width=9 is no multiple of heads=2; set key_width"),
        ({"width": 9, "key_width": 4}, "width=9 is no multiple of heads=2; set value_width"),
        ({"key_width": 0}, "key_width=0"),
        ({"value_width": -1}, "value_width=-1"),
        ({"heads": 0}, "heads=0"),
        ({"layers": 0}, "layers=0"),
        ({"expansion": 0}, "expansion=0"),
        ({"readout": "cls"}, "readout='cls'"),
        ({"prune_last": None}, "prune_last=None"),
        ({"tokenizer": "words"}, "tokenizer='words'"),
        ({"tokenizer_hidden": -1}, "tokenizer_hidden=-1"),
        ({"pooling": ()}, r"pooling=\(\)"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"norm_place": "mid"}, "norm_place='mid'"),
        ({"init": "he"}, "init='he'"),
        ({"tasks": 0}, "tasks=0"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_a_bad_config_is_refused(change, match):
    with pytest.raises(ValueError, match="transformer.Config: " + match):
        dataclasses.replace(SMALL, **change)


def test_a_config_goes_to_json_and_back():
    for config in (SMALL, transformer.TRANSFORMER_3):
        assert transformer.Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_windows_are_refused():
    features = builders.features(builders.batch(np.random.default_rng(0), one_time=False))
    with pytest.raises(ValueError, match=r"transformer: .* different times"):
        model().init(jax.random.key(0), features, train=False)
