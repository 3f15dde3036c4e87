"""HeteroAtt and Hiformer against float64 NumPy, and against each other where they are equal."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import flops
from rankjax.models import hiformer, transformer
from tests import builders, oracles
from tests.references import hiformer as reference

# Head widths that differ from D / H and from each other, so that no two may be mixed up.
HETERO = hiformer.HeteroAttConfig(
    layers=2, width=6, heads=2, qk_width=2, v_width=5, expansion=2, dense_tokens=2, tasks=2
)
FULL = hiformer.HiformerConfig(
    layers=2, width=6, heads=2, qk_width=2, v_width=5, expansion=2, dense_tokens=2, tasks=2
)
LOW = dataclasses.replace(FULL, rank_query=2, rank_key=3, rank_value=4)
OWN = dataclasses.replace(FULL, rank_value=4, composite_query=False)
EACH = pytest.mark.parametrize("config", [HETERO, LOW], ids=["heteroatt", "hiformer"])
MODULES = {
    hiformer.HeteroAttConfig: hiformer.HeteroAtt,
    hiformer.HiformerConfig: hiformer.Hiformer,
}


def model(config):
    return MODULES[type(config)](config)


def batch(seed=0):
    """Three candidates of two samples, one without any history."""
    sizes = dict(lengths=(2, 0), candidates=(2, 1), S=3, C=2)
    return builders.batch(np.random.default_rng(seed), **sizes, tasks=2)


@functools.cache
def drawn(config):
    return oracles.drawn(functools.partial(model(config).init, train=False), features())


@functools.cache
def features():
    return builders.features(batch())


def forward(config, params, features):
    return model(config).apply({"params": params}, features, train=False)[0]


score = oracles.jit(forward, static_argnums=0)


def settings(c):
    return {
        **{name: getattr(c, name) for name in ("heads", "layers", "tasks", "norm", "norm_place")},
        **{name: getattr(c, name) for name in ("tokenizer", "tokens", "dense_tokens")},
        **{"prune": c.prune_last, "poolings": c.pooling},
    }


def wanted(config, params, batch):
    """The reference's logits of the valid candidates, [n, K]."""
    found = [
        reference.logits(builders.one(batch, r, c), params, settings(config))
        for r, c in np.argwhere(batch.candidate_mask)
    ]
    return np.stack(found)


@pytest.mark.parametrize(
    "config",
    [
        HETERO,
        LOW,
        dataclasses.replace(FULL, norm_place="post", layers=1, dense_tokens=0),
        dataclasses.replace(OWN, norm="rms", tokenizer="group", prune_last=False),
        dataclasses.replace(HETERO, norm_place="post", tokenizer="even_split", tokens=3),
        dataclasses.replace(LOW, norm="none", tokenizer="auto_split", tokens=3),
        dataclasses.replace(HETERO, norm="none", pooling=("mean", "target"), prune_last=False),
    ],
)
def test_logits_are_the_papers(config):
    params = drawn(config)
    got = np.asarray(score(config, params, features()))[batch().candidate_mask]
    want = wanted(config, builders.float64(params), batch())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize(
    "config", [HETERO, LOW, dataclasses.replace(OWN, norm_place="post")], ids=["h", "low", "own"]
)
def test_gradients_of_parameters_and_inputs(config):
    weights_nk = np.random.default_rng(3).normal(size=(3, 2))
    mask, sides = batch().candidate_mask, ("user", "history", "candidate")
    at = (drawn(config), {side: getattr(batch(), side) for side in sides})

    def loss(at):
        logits = forward(config, at[0], dataclasses.replace(features(), **at[1]))
        return (logits[mask] * weights_nk).sum()

    def reference_loss(at):
        moved = dataclasses.replace(batch(), **at[1])
        return float((wanted(config, at[0], moved) * weights_nk).sum())

    oracles.gradients(loss, reference_loss, at, np.random.default_rng(4))


@pytest.mark.parametrize(
    ("config", "norm_place"),
    [
        (HETERO, "pre"),
        (dataclasses.replace(LOW, layers=1), "post"),
        (dataclasses.replace(OWN, layers=1), "pre"),
    ],
    ids=["heteroatt", "low rank", "own query"],
)
def test_a_pruned_last_layer_scores_and_learns_as_a_full_one(config, norm_place):
    """The full one's further parameters get no gradient: the pruned layer does not have them."""
    pruned = dataclasses.replace(config, norm_place=norm_place)
    full = dataclasses.replace(pruned, prune_last=False)
    params = drawn(full)
    shapes = drawn(pruned)
    assert builders.count(shapes) < builders.count(params)
    cut = jax.tree.map(lambda p, s: p[tuple(map(slice, s.shape))], params, shapes)

    def loss(config, params):
        logits = forward(config, params, features())
        return jnp.square(logits).sum(), logits

    grad = oracles.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
    (got, logits), (want, full_logits) = grad(pruned, cut), grad(full, params)
    np.testing.assert_allclose(logits, full_logits, rtol=1e-5, atol=1e-5)

    def compare(path, g, w):
        inside = np.zeros(w.shape, bool)
        inside[tuple(map(slice, g.shape))] = True
        scale = max(1, np.abs(g).max())
        np.testing.assert_allclose(np.ravel(g), w[inside], rtol=1e-4, atol=1e-5 * scale)
        assert not np.any(w[~inside]), path

    jax.tree_util.tree_map_with_path(compare, got, want)


def test_block_diagonal_projections_make_hiformer_heteroatt():
    own = drawn(HETERO)
    params = jax.tree.map(np.copy, own)
    for layer in range(HETERO.layers):
        attention = own[f"block_{layer}"]["attention"]
        for name in ("query", "key", "value"):
            blocks = attention[name]["kernel"]
            T, D, F = len(attention["key"]["kernel"]), *blocks.shape[1:]
            kernel = np.zeros((T * D, len(blocks) * F), np.float32)
            for t, block in enumerate(blocks):
                kernel[t * D : (t + 1) * D, t * F : (t + 1) * F] = block
            params[f"block_{layer}"]["attention"][name] = {"kernel": kernel}
    want, got = score(HETERO, own, features()), score(FULL, params, features())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_full_rank_factors_make_the_full_hiformer():
    params = drawn(FULL)
    factored, T, D = jax.tree.map(np.copy, params), 2 + 9, FULL.width
    ranks = {"query": T * 4, "key": T * 4, "value": T * D}  # min(T D, T H d)
    for layer in range(FULL.layers):
        for name, rank in ranks.items():
            kernel = params[f"block_{layer}"]["attention"][name]["kernel"]
            u, s, vt = np.linalg.svd(np.asarray(kernel, float), full_matrices=False)
            missing = rank - len(s)  # the pruned query has fewer columns than T H d
            left, right = np.pad(u * s, ((0, 0), (0, missing))), np.pad(vt, ((0, missing), (0, 0)))
            own = {"left": left.astype("f4"), "right": right.astype("f4")}
            factored[f"block_{layer}"]["attention"][name] = own
    low = dataclasses.replace(FULL, **{f"rank_{name}": rank for name, rank in ranks.items()})
    want, got = score(FULL, params, features()), score(low, factored, features())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_feature_tokens_permuted_with_their_parameters_change_nothing():
    """HeteroAtt knows tokens by their parameters only: slices of an even split, reordered."""
    config = dataclasses.replace(HETERO, tokenizer="auto_split", tokens=4)
    params, order = drawn(config), np.array([2, 0, 3, 1])
    tokens = np.concatenate([[0, 1], 2 + order])

    def permuted(path, p):
        names = [key.key for key in path]
        if names[0] == "tokenizer":
            return p.reshape(*p.shape[:-1], 4, -1)[..., order, :].reshape(p.shape)
        return p[tokens] if names[0].startswith("block") and len(p) == 6 else p

    got = score(config, jax.tree_util.tree_map_with_path(permuted, params), features())
    want = score(config, params, features())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@EACH
def test_every_task_reads_its_own_token(config):
    params = drawn(config)
    changed = jax.tree.map(np.copy, params)
    changed["heads"]["logits"]["kernel"][1] += 1
    before, after = (score(config, p, features()) for p in (params, changed))
    np.testing.assert_array_equal(after[..., 0], before[..., 0])
    assert np.abs(after[..., 1] - before[..., 1]).min() > 1e-4


def at_tokens(config):
    """The config with its T told, as the closed forms need it: 10 inputs, 3 of them dense."""
    return dataclasses.replace(config, tokens=7 + (config.dense_tokens or 3))


CLOSED = pytest.mark.parametrize(
    "change",
    [{}, {"norm": "rms", "norm_place": "post"}, {"prune_last": False}, {"layers": 1}],
)


@CLOSED
@pytest.mark.parametrize("config", [HETERO, FULL, LOW, OWN])
def test_closed_forms_are_exact(config, change):
    config = dataclasses.replace(at_tokens(config), **change)
    init = functools.partial(model(config).init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), features())["params"]
    blocks = {k: v for k, v in params.items() if k.startswith("block")}
    assert len(blocks) == config.layers and builders.count(blocks) == config.paper_params()
    T, D, K = config.tokens, config.width, config.tasks
    outside = 7 * 4 * D + 3 * config.dense_tokens * D + T * D  # tokenizer
    outside += K * D + K * (D + 1)  # task tokens, heads
    outside += {"layer": 2, "rms": 1}[config.norm] * K * D * (config.norm_place == "pre")
    assert builders.count(params) == config.paper_params() + outside
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}


@CLOSED
@pytest.mark.parametrize("config", [HETERO, FULL, LOW, OWN])
def test_a_block_multiplies_as_often_as_the_closed_form_says(config, change):
    config = dataclasses.replace(at_tokens(config), **change)
    total, T, N = 0, config.tokens + config.tasks, 5
    for _ in range(config.layers):  # all rows of all layers, pruned or not
        block = hiformer.Block(config, T)
        x_tnd = jax.ShapeDtypeStruct((T, N, config.width), jnp.float32)
        params = jax.eval_shape(block.init, jax.random.key(0), x_tnd)
        total += flops.count(block.apply, params, x_tnd).matmul
    assert total == N * config.paper_flops()


def test_heteroatt_costs_the_flops_of_a_plain_transformer():
    own = dict(tokens=37, layers=2, width=128, heads=4, expansion=4)
    plain = transformer.Config(**own, key_width=16, value_width=64)
    hetero = hiformer.HeteroAttConfig(**own, qk_width=16, v_width=64)
    assert hetero.paper_flops() == plain.paper_flops()
    assert hetero.paper_params() > 20 * plain.paper_params()


def test_a_full_heteroatt_layer_is_the_specs_closed_form():
    T, D, H, Q, V, k = 38, 128, 4, 16, 64, 4
    layer = T * (D * H * (2 * Q + V) + H * V * D + 2 * k * D**2 + k * D + D + 4 * D)
    one, two = (c.paper_params() for c in (hiformer.HETEROATT_1, hiformer.HETEROATT_2))
    assert two - one == layer == 8_137_472
    assert hiformer.HETEROATT_1.paper_params() == (
        T * D * H * (Q + V) + D * H * Q + H * V * D + 2 * k * D**2 + k * D + D + 4 * D
    )


def test_what_low_rank_saves_is_the_printed_difference():
    full, low = hiformer.HIFORMER_FULL, hiformer.HIFORMER_GOOGLE_PLAY
    composite = dataclasses.replace(low, composite_query=True)
    assert full.paper_params() - low.paper_params() == 43_270_144
    assert 40_960 * 38**2 - (128 * 192 + 1024 * 384) * 38 == 43_270_144
    # A full composite query of the task token would have 37 more tokens to read.
    assert composite.paper_params() - low.paper_params() == 37 * 128 * 64


def test_what_is_printed_beyond_the_layers_is_the_same_in_all_rows():
    totals = [x for x in hiformer.PAPER.figures if x.tolerance is None]
    beyond = [x.printed - x.ours() for x in totals]
    assert len(beyond) == 4 and max(beyond) - min(beyond) < 1e4  # printed to 10,000
    assert 0.62e6 < np.mean(beyond) < 0.64e6


@EACH
@pytest.mark.parametrize("tokenizer", ["per_feature", "group", "even_split", "auto_split"])
def test_every_tokenizer_scores_packed_rows_alike(config, tokenizer):
    """Packed rows hold padding in the middle; odd lengths and an empty history."""
    tokens = 3 if tokenizer in ("even_split", "auto_split") else None
    config = dataclasses.replace(config, tokenizer=tokenizer, tokens=tokens, layers=1)
    params, valid = drawn(config), batch().candidate_mask
    logits = np.asarray(score(config, params, features()))
    packed = np.asarray(score(config, params, builders.packed(batch(), 2))).reshape(logits.shape)
    assert np.isfinite(logits).all() and np.unique(logits[valid]).size == 2 * valid.sum()
    np.testing.assert_allclose(packed[valid], logits[valid], rtol=1e-5, atol=1e-5)


@EACH
def test_bfloat16_is_finite_and_near_float32(config):
    params = jax.tree.map(lambda p: p / 2, drawn(config))
    want = score(config, params, features())
    got = score(dataclasses.replace(config, dtype="bfloat16"), params, features())
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=0.05 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("config", [HETERO, LOW, OWN])
def test_what_writes_to_the_residual_is_initialised_as_such(monkeypatch, config):
    """And the T of per-token kernels stays out of their fan-in."""
    found = oracles.asked(
        monkeypatch, functools.partial(model(config).init, train=False), features()
    )
    for layer in range(config.layers):
        block = f"block_{layer}"
        for name in ("attention/out", "ffn/ffn_out"):
            assert found.pop(f"{block}/{name}/kernel") == (config.layers, (0,))
        assert found.pop(f"{block}/ffn/ffn_in/kernel") == (0, (0,))
        for name in ("query", "key", "value"):
            own = config is HETERO or (config is OWN and name == "query")
            for part in ("kernel", "left", "right"):
                path = f"{block}/attention/{name}/{part}"
                assert found.pop(path, (0, own * (0,))) == (0, own * (0,))
    assert found.pop("heads/logits/kernel") == (0, (0,))
    assert all(k.startswith("tokenizer/") and v == (0, ()) for k, v in found.items())


BAD = [
    ({"tokens": 0}, "tokens=0, expected an integer >= 1"),
    ({"tokenizer": "even_split"}, "tokens=None, expected a number with tokenizer='even_split'"),
    ({"tokenizer": "split"}, "tokenizer='split'"),
    ({"tokenizer_hidden": -1}, "tokenizer_hidden=-1"),
    ({"dense_tokens": -1}, "dense_tokens=-1"),
    ({"layers": 0}, "layers=0"),
    ({"width": 0}, "width=0"),
    ({"heads": 0}, "heads=0"),
    ({"heads": 4, "v_width": None}, "width=6 is no multiple of heads=4"),
    ({"qk_width": 0}, "qk_width=0"),
    ({"v_width": 2.5}, "v_width=2.5"),
    ({"expansion": 0}, "expansion=0"),
    ({"tasks": 0}, "tasks=0"),
    ({"pooling": ()}, r"pooling=\(\)"),
    ({"attention_hidden": (0,)}, r"attention_hidden\[0\]=0"),
    ({"prune_last": "yes"}, "prune_last='yes'"),
    ({"norm": "batch"}, "norm='batch'"),
    ({"norm_place": "both"}, "norm_place='both'"),
    ({"init": "he"}, "init='he'"),
    ({"dtype": "float16"}, "dtype='float16'"),
]
BAD_RANKS = [
    ({"rank_query": 0}, "rank_query=0"),
    ({"rank_key": 1.5}, "rank_key=1.5"),
    ({"rank_value": -1}, "rank_value=-1"),
    ({"composite_query": None}, "composite_query=None"),
    ({"composite_query": False}, "rank_query=2, expected None with composite_query=False"),
]


@pytest.mark.parametrize(
    ("config", "change", "match"),
    [(c, *bad) for c in (HETERO, LOW) for bad in BAD] + [(LOW, *bad) for bad in BAD_RANKS],
)
def test_a_bad_config_is_refused(config, change, match):
    with pytest.raises(ValueError, match=f"hiformer.{type(config).__name__}: {match}"):
        dataclasses.replace(config, **change)


@EACH
def test_a_token_count_that_the_schema_contradicts_is_refused(config):
    bad = model(dataclasses.replace(config, tokens=10))
    with pytest.raises(ValueError, match="tokens=10, but tokenizer='per_feature' makes 9 tokens"):
        jax.eval_shape(functools.partial(bad.init, train=False), jax.random.key(0), features())


@EACH
def test_sizes_that_the_data_decide_have_no_closed_form(config):
    assert config.paper_params() is None and config.paper_flops() is None


@EACH
def test_a_config_goes_to_json_and_back(config):
    config = dataclasses.replace(config, pooling=("mean", "target"))
    assert type(config)(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@EACH
def test_windows_are_refused(config):
    windows = dataclasses.replace(features(), one_time=False)
    name = type(model(config)).__name__.lower()
    with pytest.raises(ValueError, match=rf"{name}: .* different times"):
        model(config).init(jax.random.key(0), windows, train=False)
