"""TokenMixer-Large against float64 NumPy, its closed forms, and what it refuses."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import flops
from rankjax.layers import auxiliary
from rankjax.models import tokenmixer_large
from tests import builders, interaction, oracles
from tests.references import tokenmixer_large as reference

# The schema of `builders` has four groups, the pooled history included.
SMALL = tokenmixer_large.Config(
    tokens=5, layers=3, width=10, expansion=2, inter_residual=2, tokenizer_hidden=6, tasks=2
)
SPARSE = dataclasses.replace(SMALL, experts=5, active=3)
CONFIGS = {
    "dense": SMALL,
    "post": dataclasses.replace(SMALL, norm="layer", norm_place="post", inter_residual=3),
    "without norm": dataclasses.replace(
        SMALL, norm="none", layers=2, inter_residual=0, tokenizer_hidden=0
    ),
    "both poolings, one block": dataclasses.replace(SMALL, layers=1, pooling=("mean", "target")),
    "every block": dataclasses.replace(SMALL, inter_residual=1, aux_layers=(2,)),
    "experts": SPARSE,
    "experts, post": dataclasses.replace(SPARSE, norm_place="post", active=4, routed_scale=0.7),
}


def model_of(config):
    return tokenmixer_large.TokenMixerLarge(config)


@functools.cache
def params_of(config):
    return interaction.drawn(model_of(config), np.random.default_rng(1))


def made(seed=1, **sizes):
    """A batch and its features."""
    batch = builders.batch(np.random.default_rng(seed), tasks=2, **sizes)
    return batch, builders.features(batch)


def score(config, features):
    return interaction.score(model_of(config), params_of(config), features)


@functools.cache
def trainer(config):
    model = model_of(config)
    return jax.jit(lambda params, features: model.apply({"params": params}, features, train=True))


def expected(config, batch, p):
    """(logits, {depth: auxiliary logits}), each [n, K], of the valid candidates, float64."""
    c = config
    options = {"norm": c.norm, "norm_place": c.norm_place, "active": c.active}
    options["alpha"] = c.routed_scale or c.experts / c.active
    found = [
        reference.logits(
            builders.one(batch, row, candidate),
            *(p, c.pooling, c.layers, c.inter_residual, c.depths),
            **options,
        )
        for row, candidate in np.argwhere(batch.candidate_mask)
    ]
    aux = {depth: np.stack([terms[depth] for _, terms in found]) for depth in c.depths}
    return np.stack([logits for logits, _ in found]), aux


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_training_heads_are_the_references(name):
    config, (batch, features) = CONFIGS[name], made()
    valid = batch.candidate_mask
    logits, aux = trainer(config)(params_of(config), features)
    want, want_aux = expected(config, batch, builders.float64(params_of(config)))
    np.testing.assert_allclose(logits[valid], want, rtol=1e-5, atol=1e-5)
    assert logits.dtype == jnp.float32 and np.ptp(want) > 0.5
    assert set(aux) == {f"layer_{depth}" for depth in config.depths}
    for depth, want in want_aux.items():
        term = aux[f"layer_{depth}"]
        assert isinstance(term, auxiliary.Logits)
        assert term.weight == tokenmixer_large.AUX_WEIGHT
        np.testing.assert_allclose(term.logits[valid], want, rtol=1e-5, atol=1e-5)


def test_auxiliary_heads_only_train():
    _, features = made()
    served = {k: x for k, x in params_of(SMALL).items() if not k.startswith("aux")}
    assert set(params_of(SMALL)) - set(served) == {"aux_norm_2", "aux_heads_2"}
    logits, aux = jax.jit(functools.partial(model_of(SMALL).apply, train=False))(
        {"params": served}, features
    )
    assert aux == {}
    want, _ = trainer(SMALL)(params_of(SMALL), features)
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-6)


def test_depths_of_the_auxiliary_heads():
    def depths(**change):
        return dataclasses.replace(SMALL, layers=7, **change).depths

    assert depths() == (2, 4, 6) and depths(inter_residual=3) == (3, 6)
    assert depths(inter_residual=7) == depths(inter_residual=0) == depths(aux_layers=()) == ()
    assert depths(aux_layers=(5, 1)) == (5, 1)


@pytest.mark.parametrize("config", [SMALL, SPARSE], ids=["dense", "experts"])
def test_gradients_are_the_references(config):
    """Of the logits and of a training head, in every parameter and every input."""
    rng = np.random.default_rng(1)
    batch, features = made(lengths=(3, 0), candidates=(2, 1), S=4, C=2)
    valid = batch.candidate_mask
    weight = rng.normal(size=(2, *valid.shape, 2)) * valid[..., None]

    def loss(at):
        given = dataclasses.replace(features, **at["inputs"])
        logits, aux = trainer(config)(at["params"], given)
        return (weight[0] * logits).sum() + (weight[1] * aux["layer_2"].logits).sum()

    def in_float64(at):
        given = dataclasses.replace(batch, **at["inputs"])
        logits, aux = expected(config, given, at["params"])
        return (weight[0][valid] * logits).sum() + (weight[1][valid] * aux[2]).sum()

    sides = {side: getattr(batch, side) for side in ("user", "history", "candidate")}
    at = {"params": params_of(config), "inputs": sides}
    oracles.gradients(loss, in_float64, at, rng, tolerance=1e-5)


@pytest.mark.parametrize("name", ["dense", "post", "experts"])
def test_the_last_block_may_compute_only_what_the_global_token_reads(name):
    """Values and all gradients; those of what is left out are 0 in the full block too."""
    config, rng = CONFIGS[name], np.random.default_rng(0)
    block, params = tokenmixer_large.Block(config), params_of(config)["block_2"]
    x_tnd, weight_nd = rng.normal(size=(5, 3, 10)).astype("f4"), rng.normal(size=(3, 10))

    @functools.partial(jax.jit, static_argnums=2)
    def of(params, x_tnd, global_only):
        def loss(params, x_tnd):
            y_tnd = block.apply({"params": params}, x_tnd, global_only)
            return (weight_nd * y_tnd[0]).sum(), y_tnd[0]

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x_tnd)

    got, want = of(params, x_tnd, True), of(params, x_tnd, False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    (of_params, of_x), _ = want
    kernel = of_params["mixed"]["down"]["kernel"]
    assert not np.any(kernel[..., 2:]) and np.any(kernel[..., :2]) and np.all(of_x)
    up = of_params["own"]["up"]["kernel"]
    assert not np.any(up[1:]) and np.any(up[0])


def test_a_model_that_computes_all_of_its_last_block_scores_the_same():
    batch, features = made()
    full = dataclasses.replace(SMALL, layers=2, prune_last=False)
    pruned = dataclasses.replace(SMALL, layers=2)
    interaction.close(score(full, features), score(pruned, features), batch.candidate_mask)


@pytest.mark.parametrize("config", [SMALL, SPARSE], ids=["dense", "experts"])
def test_the_model_multiplies_as_often_as_the_closed_form_says(config):
    """All rows of all blocks without pruning; with it, what the docstring says is left."""
    features = jax.eval_shape(lambda: made()[1])

    def products(**change):
        apply = functools.partial(
            model_of(dataclasses.replace(config, **change)).apply, train=False
        )
        shapes = interaction.shapes(model_of(config))
        return flops.count(apply, {"params": shapes}, features).matmul / candidates

    candidates = features.candidate_sample.size
    T, D, n, X = config.tokens, config.width, config.expansion, config.experts
    block = products(prune_last=False) - products(prune_last=False, layers=2, inter_residual=0)
    all_experts = dataclasses.replace(config, active=X, layers=1)
    gated_biases = 4 * T * D * X * (X > 1)
    assert block == all_experts.paper_flops() + gated_biases
    left = 4 * n * T * D * D + 2 * n * D * D + 6 * n * D * D  # gates, ups; downs; one token
    if X > 1:
        left += 2 * (T + 1) * D * (X - 1) + 4 * D * X  # routers; biases under their gates
    assert products(prune_last=False) - products() == block - left


def test_paper_flops_count_the_active_experts():
    assert SMALL.paper_flops() == 12 * 2 * 3 * 5 * 10**2
    routers = 4 * 3 * 5 * 10 * 4
    assert SPARSE.paper_flops() == pytest.approx(3 / 5 * SMALL.paper_flops() + routers)


@pytest.mark.parametrize(
    "change",
    [{}, {"norm": "layer"}, {"norm": "none"}, {"experts": 5, "active": 3}, {"expansion": 3}],
)
def test_paper_params_is_the_count_of_the_blocks(change):
    config = dataclasses.replace(SMALL, **change)
    shapes = interaction.shapes(model_of(config))
    assert builders.count([shapes[f"block_{i}"] for i in range(3)]) == config.paper_params()


def test_active_params_are_those_of_a_model_of_the_active_experts():
    """Two experts fewer, each as wide; the routers stay."""
    assert SMALL.active_params() == SMALL.paper_params()
    one = 3 * 10 * 4 + 2 * 4 + 10
    assert SPARSE.paper_params() - SPARSE.active_params() == 3 * 2 * 5 * 2 * one


def test_parameters_outside_the_blocks():
    """A token's MLP has one hidden layer of 6; inputs are 5, 9, 4 and 13 wide."""
    shapes = interaction.shapes(model_of(SMALL))
    assert builders.count(shapes["tokenizer"]) == 31 * 6 + 4 * (6 + 6 * 10 + 10)
    assert builders.count(shapes["global"]) == 31 * 6 + 6 + 6 * 10 + 10
    assert builders.count(shapes["heads"]) == builders.count(shapes["aux_heads_2"]) == 22
    assert builders.count(shapes["out_norm"]) == builders.count(shapes["aux_norm_2"]) == 10
    default = interaction.shapes(model_of(dataclasses.replace(SMALL, tokenizer_hidden=None)))
    assert default["global"]["all"]["kernel"].shape == (10, 10)
    linear = interaction.shapes(model_of(dataclasses.replace(SMALL, tokenizer_hidden=0)))
    assert set(linear["global"]) == {"all"} and len(linear["tokenizer"]) == 4


def test_sizes_of_the_paper():
    sizes = {
        name: size.config.paper_params() for name, size in tokenmixer_large.PAPER.sizes.items()
    }
    assert sizes["tokenmixer_large_500m"] == 3 * (2 * 16 * (9 * 768**2 + 7 * 768) + 2 * 768)
    assert [round(n / 1e8) for n in sizes.values()] == [5, 41, 73, 41]
    dense, sparse = (
        tokenmixer_large.TOKENMIXER_LARGE_4B,
        tokenmixer_large.TOKENMIXER_LARGE_4B_SPARSE,
    )
    assert sparse.alpha == 2 and dense.alpha == 1
    assert dataclasses.replace(sparse, experts=16).alpha == 4


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "width"),
    [("per_feature", 11, 22), ("group", None, 10), ("even_split", 5, 10), ("auto_split", 5, 10)],
)
def test_every_tokenizer(tokenizer, tokens, width):
    config = dataclasses.replace(SMALL, tokenizer=tokenizer, tokens=tokens, width=width, layers=1)
    batch, features = made()
    logits, valid = score(config, features), batch.candidate_mask
    assert np.isfinite(logits).all() and np.unique(logits[valid]).size == 2 * valid.sum()


def test_token_zero_is_the_global_one():
    """It alone reads everything; the last block's second half is its own."""
    shapes = interaction.shapes(model_of(dataclasses.replace(SMALL, tokenizer="auto_split")))
    assert shapes["global"]["all.hidden"]["kernel"].shape == (31, 6)
    assert shapes["tokenizer"]["all"]["kernel"].shape == (6, 4 * 10)


def test_down_matrices_of_experts_start_small():
    def initial(config):
        block, x_tnd = tokenmixer_large.Block(config), jnp.zeros((5, 1, 20))
        return jax.jit(block.init)(jax.random.key(0), x_tnd)["params"]

    wide = dataclasses.replace(SMALL, width=20, expansion=10, init="small_residual")
    dense, sparse = initial(wide), initial(dataclasses.replace(wide, experts=5, active=3))
    for half in ("mixed", "own"):
        np.testing.assert_allclose(np.std(sparse[half]["down"]["kernel"]), 0.01, rtol=0.05)
        want = 200**-0.5 / 6**0.5  # lecun over sqrt(2 L)
        np.testing.assert_allclose(np.std(dense[half]["down"]["kernel"]), want, rtol=0.05)
        for p in (dense, sparse):
            np.testing.assert_allclose(np.std(p[half]["up"]["kernel"]), 20**-0.5, rtol=0.05)


def test_bfloat16_is_finite_and_near():
    _, features = made()
    half = dataclasses.replace(SPARSE, dtype="bfloat16")
    logits, aux = trainer(half)(params_of(SPARSE), features)
    want, terms = trainer(SPARSE)(params_of(SPARSE), features)
    pairs = (logits, want), (aux["layer_2"].logits, terms["layer_2"].logits)
    for a, b in pairs:
        assert a.dtype == jnp.float32
        assert 1e-4 < np.abs(a - b).max() < 0.05 * np.abs(b).max()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 12}, "width=12 is no multiple of tokens=5"),
        ({"tokens": 1}, "tokens=1, expected an integer >= 2"),
        (
            {"tokens": None, "tokenizer": "even_split"},
            "tokens=None, expected a number with tokenizer='even_split'",
        ),
        ({"tokenizer": "split"}, "tokenizer='split', expected one of"),
        ({"layers": 0}, "layers=0"),
        ({"expansion": 1.5}, "expansion=1.5"),
        ({"experts": 0}, "experts=0"),
        ({"active": 2}, r"active=2, expected 1 .. 1 with experts=1"),
        ({"experts": 5}, r"active=1, expected 3 .. 5 with experts=5"),
        ({"experts": 5, "active": 2}, r"active=2, expected 3 .. 5"),
        ({"experts": 5, "active": 6}, r"active=6, expected 3 .. 5"),
        ({"experts": 3, "active": 3}, "experts=3, expected a divisor of .* = 20"),
        ({"routed_scale": 0}, "routed_scale=0, expected > 0 or None"),
        ({"inter_residual": -1}, "inter_residual=-1"),
        ({"aux_layers": (3,)}, r"aux_layers=\(3,\), expected different depths in 1 .. 2"),
        ({"aux_layers": (0,)}, r"aux_layers=\(0,\)"),
        ({"aux_layers": (1, 1)}, r"aux_layers=\(1, 1\)"),
        ({"aux_layers": 1}, "aux_layers=1, expected different depths"),
        ({"prune_last": "no"}, "prune_last='no', expected True or False"),
        ({"tokenizer_hidden": -1}, "tokenizer_hidden=-1"),
        ({"tasks": 0}, "tasks=0"),
        ({"pooling": ()}, r"pooling=\(\)"),
        ({"attention_hidden": (0,)}, r"attention_hidden\[0\]=0"),
        ({"attention_activation": "relu"}, "attention_activation='relu'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"norm_place": "both"}, "norm_place='both'"),
        ({"init": "he"}, "init='he'"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_a_bad_config_is_refused(change, match):
    with pytest.raises(ValueError, match="tokenmixer_large.Config: " + match):
        dataclasses.replace(SMALL, **change)


def test_a_token_count_that_the_schema_contradicts_is_refused():
    match = "tokens=10, but tokenizer='group' makes 4 tokens .* set tokens=5 or tokens=None"
    with pytest.raises(ValueError, match=match):
        interaction.shapes(model_of(dataclasses.replace(SMALL, tokens=10)))


def test_a_width_that_the_schemas_tokens_do_not_divide_is_refused():
    match = r"tokenmixer_large: width=12 is no multiple of tokens=5.*10 and 15"
    with pytest.raises(ValueError, match=match):
        interaction.shapes(model_of(dataclasses.replace(SMALL, tokens=None, width=12)))


def test_sizes_that_the_data_decide_have_no_closed_form():
    config = tokenmixer_large.Config()
    assert config.paper_params() is config.active_params() is config.paper_flops() is None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_goes_to_json_and_back(name):
    config = CONFIGS[name]
    assert tokenmixer_large.Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_windows_are_refused():
    _, features = made(one_time=False)
    with pytest.raises(ValueError, match=r"tokenmixer_large: .* different times"):
        model_of(SMALL).init(jax.random.key(0), features, train=False)
