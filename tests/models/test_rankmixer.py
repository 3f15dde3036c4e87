"""RankMixer against float64 NumPy, its closed forms, and the configurations that it refuses."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import flops
from rankjax.models import rankmixer
from tests import builders
from tests.references import rankmixer as reference

SMALL = rankmixer.Config(tokens=4, layers=2, width=8, expansion=3, tasks=2)


@functools.cache
def initial(config):
    features = builders.features(builders.batch(np.random.default_rng(0)))
    model = rankmixer.RankMixer(config)
    return jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), features)


def blocks(params):
    return [params["params"][f"block_{i}"] for i in range(SMALL.layers)]


def score(config, params, features):
    model = rankmixer.RankMixer(config)
    return np.asarray(jax.jit(functools.partial(model.apply, train=False))(params, features)[0])


@pytest.mark.parametrize("norm_place", ["post", "pre"])
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_block_is_the_papers(norm, norm_place):
    rng = np.random.default_rng(0)
    config = dataclasses.replace(SMALL, norm=norm, norm_place=norm_place)
    block = rankmixer.Block(config)
    x_tnd = rng.normal(size=(4, 5, 8)).astype("f4")
    params = builders.moved(block.init(jax.random.key(0), x_tnd)["params"], rng)
    got = jax.jit(block.apply)({"params": params}, x_tnd)
    params_64 = builders.float64(params)
    want = [reference.block(x_td, params_64, norm, norm_place) for x_td in x_tnd.swapaxes(0, 1)]
    np.testing.assert_allclose(got, np.stack(want, axis=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [{}, {"norm_place": "pre"}, {"norm": "none"}, {"pooling": ("mean", "target"), "tokens": 8}],
)
def test_logits_are_the_papers(change):
    rng = np.random.default_rng(1)
    config = dataclasses.replace(SMALL, **change)
    batch = builders.batch(rng, tasks=2)
    params = builders.moved(initial(config), rng)
    got = score(config, params, builders.features(batch))
    c, p = config, builders.float64(params["params"])
    for row, candidate in np.argwhere(batch.candidate_mask):
        want = reference.logits(
            *(builders.one(batch, row, candidate), p, c.tokens, c.layers, c.pooling),
            *(c.norm, c.norm_place),
        )
        np.testing.assert_allclose(got[row, candidate], want, rtol=0, atol=2e-5)


def test_mixing_is_a_transpose_of_blocks_and_its_own_inverse():
    x_tnd = np.random.default_rng(0).normal(size=(4, 3, 12)).astype("f4")
    mixed_tnd = np.asarray(rankmixer.mix_tokens(jnp.asarray(x_tnd)))
    np.testing.assert_array_equal(rankmixer.mix_tokens(mixed_tnd), x_tnd)
    for t in range(4):
        for h in range(4):
            np.testing.assert_array_equal(
                mixed_tnd[h, :, 3 * t : 3 * t + 3], x_tnd[t, :, 3 * h : 3 * h + 3]
            )


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_paper_params_is_the_count_of_the_blocks(norm):
    config = dataclasses.replace(SMALL, norm=norm)
    assert builders.count(blocks(initial(config))) == config.paper_params()


def test_paper_params_and_flops_of_the_papers_sizes():
    def at(config, k):
        return dataclasses.replace(config, expansion=k).paper_params()

    small, large = rankmixer.RANKMIXER_100M, rankmixer.RANKMIXER_1B
    assert [at(small, k) for k in (2, 3, 4)] == [75_577_344, 113_350_656, 151_123_968]
    assert [at(large, k) for k in (2, 3, 4)] == [604_286_976, 906_375_168, 1_208_463_360]
    assert (small.expansion, large.expansion) == (3, 4)
    assert small.paper_flops() == 4 * 3 * 2 * 16 * 768**2


def test_a_block_multiplies_as_often_as_the_closed_form_says():
    block, N = rankmixer.Block(SMALL), 5
    x_tnd = jax.ShapeDtypeStruct((SMALL.tokens, N, SMALL.width), jnp.float32)
    params = jax.eval_shape(block.init, jax.random.key(0), x_tnd)
    one_layer = dataclasses.replace(SMALL, layers=1)
    assert flops.count(block.apply, params, x_tnd).matmul == N * one_layer.paper_flops()


def test_dense_parameters_outside_the_blocks():
    """Even split: T slices of the 30 wide inputs, and the heads."""
    params = initial(SMALL)["params"]
    width = 4 + 1 + (4 + 1 + 4) + 4 + (4 + 1 + 4 + 4)
    assert builders.count(params["tokenizer"]) == 4 * (-(-width // 4) * 8 + 8)
    assert builders.count(params["heads"]) == 8 * 2 + 2
    assert set(params) == {"tokenizer", "heads", "block_0", "block_1"}


def test_small_residual_divides_only_what_writes_to_the_residual():
    small = initial(dataclasses.replace(SMALL, init="small_residual"))["params"]
    lecun = initial(SMALL)["params"]
    for i in range(2):
        a, b = small[f"block_{i}"]["ffn"], lecun[f"block_{i}"]["ffn"]
        np.testing.assert_array_equal(a["ffn_in"]["kernel"], b["ffn_in"]["kernel"])
        np.testing.assert_allclose(a["ffn_out"]["kernel"], b["ffn_out"]["kernel"] / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("tokenizer", "tokens"),
    [("per_feature", 10), ("group", None), ("auto_split", 5)],
)
def test_every_tokenizer(tokenizer, tokens):
    rng = np.random.default_rng(2)
    config = dataclasses.replace(SMALL, tokenizer=tokenizer, tokens=tokens, width=20)
    batch = builders.batch(rng)
    params = builders.moved(initial(config), rng)
    logits = score(config, params, builders.features(batch))
    alone = score(config, params, builders.packed(batch, 2)).reshape(logits.shape)
    valid = batch.candidate_mask
    assert logits.shape == (4, 4, 2) and np.isfinite(logits).all()
    assert np.unique(logits[valid]).size == 2 * valid.sum()
    np.testing.assert_allclose(alone[valid], logits[valid], rtol=0, atol=1e-5)


def test_a_token_count_that_the_schema_contradicts_is_refused():
    with pytest.raises(ValueError, match="tokens=5, but tokenizer='group' makes 4 tokens"):
        initial(dataclasses.replace(SMALL, tokenizer="group", tokens=5, width=20))


def test_a_width_that_the_schemas_tokens_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"width=24 is no multiple of tokens=10.*20 and 30"):
        initial(dataclasses.replace(SMALL, tokenizer="per_feature", tokens=None, width=24))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 10}, "width=10 is no multiple of tokens=4"),
        ({"tokens": 0}, "tokens=0, expected an integer >= 1"),
        ({"tokens": None}, "tokens=None, expected a number with tokenizer='even_split'"),
        ({"tokenizer": "split"}, "tokenizer='split', expected one of"),
        ({"layers": 0}, "layers=0"),
        ({"expansion": 1.5}, "expansion=1.5"),
        ({"tasks": 0}, "tasks=0"),
        ({"pooling": ()}, r"pooling=\(\)"),
        ({"pooling": ("max",)}, "pooling='max'"),
        ({"attention_hidden": (0,)}, r"attention_hidden\[0\]=0"),
        ({"attention_activation": "relu"}, "attention_activation='relu'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"norm_place": "both"}, "norm_place='both'"),
        ({"init": "he"}, "init='he'"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"tokenizer_hidden": -1}, "tokenizer_hidden=-1"),
    ],
)
def test_a_bad_config_is_refused(change, match):
    with pytest.raises(ValueError, match="rankmixer.Config: " + match):
        dataclasses.replace(SMALL, **change)


def test_sizes_that_the_data_decide_have_no_closed_form():
    config = rankmixer.Config(tokens=None, tokenizer="group")
    assert config.paper_params() is None and config.paper_flops() is None


def test_a_config_goes_to_json_and_back():
    text = json.dumps(dataclasses.asdict(SMALL))
    assert rankmixer.Config(**json.loads(text)) == SMALL


def test_windows_are_refused():
    features = builders.features(builders.batch(np.random.default_rng(0), one_time=False))
    with pytest.raises(ValueError, match=r"rankmixer: .* different times"):
        rankmixer.RankMixer(SMALL).init(jax.random.key(0), features, train=False)
