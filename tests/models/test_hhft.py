"""HHFT against float64 NumPy, its closed forms, and the special cases of its Hiformer layers."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import flops
from rankjax.models import hhft
from tests import builders, oracles
from tests.references import hhft as reference
from tests.references import hiformer as google

# Head widths that differ from D / H and from each other, so that no two may be mixed up.
SMALL = hhft.Config(
    hetero_layers=2,
    layers=2,
    virtual_tokens=3,
    width=6,
    heads=2,
    qk_width=2,
    v_width=5,
    expansion=2,
    hiformer_expansion=3,
    tower=(4, 3),
    tasks=2,
)
N, D, M, H, V = 5, SMALL.width, SMALL.virtual_tokens, SMALL.heads, SMALL.v_width
BIG = dict(width=256, heads=4, qk_width=64, v_width=64, norm="none")


def batch(seed=0):
    """Three candidates of two samples, one without any history."""
    sizes = dict(lengths=(2, 0), candidates=(2, 1), S=3, C=2)
    return builders.batch(np.random.default_rng(seed), **sizes, tasks=2)


@functools.cache
def features():
    return builders.features(batch())


def shapes(config):
    init = functools.partial(hhft.HHFT(config).init, train=False)
    return jax.eval_shape(init, jax.random.key(0), features())["params"]


@functools.cache
def drawn(config):
    return oracles.drawn(functools.partial(hhft.HHFT(config).init, train=False), features())


def forward(config, params, features):
    return hhft.HHFT(config).apply({"params": params}, features, train=False)[0]


score = oracles.jit(forward, static_argnums=0)


def wanted(c, params, batch):
    """The reference's logits of the valid candidates, [n, K]."""
    names = ("heads", "hetero_layers", "layers", "virtual_tokens", "pool", "tower", "tasks")
    settings = {name: getattr(c, name) for name in (*names, "norm", "norm_place", "tokenizer")}
    settings |= {"prune": c.prune_last, "tokens": c.tokens, "poolings": c.pooling}
    found = [
        reference.logits(builders.one(batch, row, candidate), params, settings)
        for row, candidate in np.argwhere(batch.candidate_mask)
    ]
    return np.stack(found)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm_place": "post", "pool": "mean", "tokenizer": "per_feature"},
        {"norm": "none", "pool": "sum", "tasks": 1, "tower": ()},
        {"norm": "rms", "pool": "concat", "tokenizer": "even_split", "tokens": 3},
        {"prune_last": False, "layers": 0, "tokenizer": "auto_split", "tokens": 3},
        {"hetero_layers": 0, "pool": "mean", "layers": 1},
        {"norm_place": "post", "norm": "rms", "pooling": ("mean", "target")},
    ],
)
def test_logits_are_the_specs(change):
    config = dataclasses.replace(SMALL, **change)
    params = drawn(config)
    got = np.asarray(score(config, params, features()))[batch().candidate_mask]
    want = wanted(config, builders.float64(params), batch())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize(
    "change", [{}, {"norm_place": "post", "pool": "concat", "hetero_layers": 1, "layers": 1}]
)
def test_gradients_of_parameters_and_inputs(change):
    config = dataclasses.replace(SMALL, **change)
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
    "change", [{"layers": 1}, {"norm_place": "post", "hetero_layers": 1, "layers": 0}]
)
def test_a_pruned_last_layer_scores_and_learns_as_a_full_one(change):
    """The full one's further parameters get no gradient: the pruned layer does not have them."""
    pruned = dataclasses.replace(SMALL, **change)
    full = dataclasses.replace(pruned, prune_last=False)
    params = drawn(full)
    assert builders.count(shapes(pruned)) < builders.count(params)
    cut = jax.tree.map(lambda p, s: p[tuple(map(slice, s.shape))], params, shapes(pruned))

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


@pytest.mark.parametrize("pool", ["mean", "sum", "concat"])
def test_other_pools_prune_nothing(pool):
    config = dataclasses.replace(SMALL, pool=pool)
    assert shapes(config) == shapes(dataclasses.replace(config, prune_last=False))


def apply_layer(config, params, t_nw):
    return hhft.HiformerLayer(config).apply({"params": params}, t_nw)


layer = oracles.jit(apply_layer, static_argnums=0)


def a_layer(config, W=D):
    """t [N, W] and the parameters of one Hiformer layer."""
    t_nw = np.random.default_rng(1).normal(size=(N, W)).astype("f4")
    return t_nw, oracles.drawn(hhft.HiformerLayer(config).init, t_nw)


def plain_ffn(x_nf, params):
    first, second = (builders.float64(params)[name] for name in ("ffn_in", "ffn_out"))
    h_nf = google.gelu(x_nf @ first["kernel"] + first["bias"])
    return h_nf @ second["kernel"] + second["bias"]


BARE = dataclasses.replace(SMALL, norm="none")


def test_one_virtual_token_is_a_feed_forward_of_its_values():
    """Softmax over one key is 1: queries and keys do nothing, and get no gradient."""
    config = dataclasses.replace(BARE, virtual_tokens=1)
    t_nw, params = a_layer(config)
    want = t_nw + plain_ffn(t_nw @ params["value"]["kernel"].astype(float), params)
    np.testing.assert_allclose(layer(config, params, t_nw), want, rtol=0, atol=1e-5)
    grads = oracles.jit(jax.grad(lambda p: jnp.square(apply_layer(config, p, t_nw)).sum()))(params)
    for name in ("query", "key"):
        np.testing.assert_allclose(grads[name]["kernel"], 0, atol=1e-6)
    assert np.abs(grads["value"]["kernel"]).max() > 1e-3


def test_virtual_tokens_permuted_with_their_parameters_change_nothing():
    t_nw, params = a_layer(SMALL)
    order = np.array([2, 0, 1])
    permuted = jax.tree.map(np.copy, params)
    for name in ("query", "key", "value"):
        kernel = params[name]["kernel"]
        permuted[name]["kernel"] = kernel.reshape(D, M, -1)[:, order].reshape(kernel.shape)
    rows = params["ffn_in"]["kernel"]
    permuted["ffn_in"]["kernel"] = rows.reshape(M, H * V, -1)[order].reshape(rows.shape)
    want = layer(SMALL, params, t_nw)
    np.testing.assert_allclose(layer(SMALL, permuted, t_nw), want, rtol=0, atol=1e-5)


def test_zero_queries_read_the_mean_of_the_values():
    t_nw, params = a_layer(BARE)
    params["query"]["kernel"] = np.zeros_like(params["query"]["kernel"])
    values_nmf = (t_nw @ params["value"]["kernel"].astype(float)).reshape(N, M, H * V)
    a_nf = np.tile(values_nmf.mean(axis=1), (1, M))
    want = t_nw + plain_ffn(a_nf, params)
    np.testing.assert_allclose(layer(BARE, params, t_nw), want, rtol=0, atol=1e-5)


def test_a_zero_second_matrix_makes_the_identity():
    t_nw, params = a_layer(SMALL)
    params["ffn_out"] = jax.tree.map(np.zeros_like, params["ffn_out"])
    np.testing.assert_array_equal(layer(SMALL, params, t_nw), t_nw)


@pytest.mark.parametrize("pool", ["concat", "mean"])
def test_attention_of_a_pool_of_all_tokens_is_googles_composite_projection(pool):
    """concat with M = T: the same matrices. mean: the matrix once per token, each times 1 / T."""
    config = dataclasses.replace(BARE, pool=pool)
    x_tnd = np.random.default_rng(2).normal(size=(M, N, D)).astype("f4")
    t_nw = np.asarray(hhft.pool(jnp.asarray(x_tnd), pool, 2))[0]
    _, params = a_layer(config, t_nw.shape[1])
    p = builders.float64({name: params[name] for name in ("query", "key", "value")})
    if pool == "mean":
        p = jax.tree.map(lambda kernel: np.tile(kernel / M, (M, 1)), p)
    p["out"] = {"kernel": np.stack([np.eye(H * V)] * M)}
    attended = [google.attention(x_td, p, H, M).ravel() for x_td in x_tnd.swapaxes(0, 1)]
    want = t_nw + plain_ffn(np.stack(attended), params)
    np.testing.assert_allclose(layer(config, params, t_nw), want, rtol=0, atol=1e-5)


def test_tied_heterogeneous_layers_are_permutation_equivariant():
    config = dataclasses.replace(SMALL, tokens=3)
    T = config.tokens + config.tasks
    x_tnd = np.random.default_rng(2).normal(size=(T, N, D)).astype("f4")
    block = hhft.HeteroLayer(config, T)
    params = oracles.drawn(block.init, x_tnd)
    tied = jax.tree.map(lambda p: np.broadcast_to(p[:1], p.shape), params)
    order = np.array([3, 0, 4, 2, 1])
    run = oracles.jit(lambda params, x_tnd: block.apply({"params": params}, x_tnd))
    want = run(tied, x_tnd)
    np.testing.assert_allclose(run(tied, x_tnd[order]), want[order], rtol=0, atol=1e-5)
    permuted = jax.tree.map(lambda p: p[order], params)
    want = run(params, x_tnd)
    np.testing.assert_allclose(run(permuted, x_tnd[order]), want[order], rtol=0, atol=1e-5)


def test_closed_forms_of_the_specs_examples():
    hetero = hhft.Config(tokens=15, hetero_layers=1, layers=0, prune_last=False, **BIG)
    assert hetero.paper_params() == 12_603_392
    assert hetero.paper_flops() == 2 * 16 * (256 * 1024 + 2 * 256 * 1024) + 2 * 16**2 * 512

    def hiformer(**change):
        two, one = (
            hhft.Config(tokens=15, hetero_layers=1, layers=n, **BIG | change) for n in (2, 1)
        )
        return two.paper_params() - one.paper_params(), two.paper_flops() - one.paper_flops()

    assert hiformer(virtual_tokens=32) == (14_943_488, 30_932_992)
    doubled = hiformer(virtual_tokens=64)[0]
    assert doubled == hiformer(virtual_tokens=32, qk_width=128, v_width=128)[0]
    assert doubled > 1.9 * 14_943_488


CASES = [
    {},
    {"norm": "rms", "norm_place": "post"},
    {"prune_last": False},
    {"pool": "concat", "tasks": 1, "hetero_layers": 1},
    {"pool": "mean", "hetero_layers": 0},
    {"layers": 0, "tower": ()},
]


@pytest.mark.parametrize("change", CASES)
def test_closed_forms_are_exact(change):
    config = dataclasses.replace(SMALL, tokens=4, **change)
    params = shapes(config)
    layers = {k: v for k, v in params.items() if k.startswith(("hetero_", "hiformer_"))}
    assert len(layers) == config.hetero_layers + config.layers
    assert builders.count(layers) == config.paper_params()
    K = config.tasks
    W = (4 + K) * D if config.pool == "concat" else D
    outside = 31 * D + 4 * D + K * D  # tokenizer of 31 columns in 4 groups, [cls]
    outside += {"layer": 2, "rms": 1}[config.norm] * W * (config.norm_place == "pre")
    widths = (W, *config.tower, 1)
    outside += K * sum(a * b + b for a, b in itertools.pairwise(widths))
    assert builders.count(params) == config.paper_params() + outside
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize("change", CASES)
def test_the_layers_multiply_as_often_as_the_closed_form_says(change):
    """All matrix products of a forward, less those of tokenizer and towers (3 and 4 columns)."""
    pruned = dataclasses.replace(SMALL, tokens=4, **change)
    config = dataclasses.replace(pruned, prune_last=False)
    assert pruned.paper_flops() == config.paper_flops()
    forward = functools.partial(hhft.HHFT(config).apply, train=False)
    total = flops.count(forward, {"params": shapes(config)}, features()).matmul
    W, candidates = (4 + config.tasks) * D if config.pool == "concat" else D, 4
    widths = (W, *config.tower, 1)
    other = 31 * D + config.tasks * sum(a * b for a, b in itertools.pairwise(widths))
    sums = flops.count(lambda f: pooled_history(config, f), features()).matmul
    assert total - sums == candidates * (config.paper_flops() + 2 * other)


def pooled_history(config, features):
    module = hhft.history_pooling.HistoryPooling(config.pooling)
    return [x.value for x in module.apply({"params": {}}, features)]


@pytest.mark.parametrize("tokenizer", ["per_feature", "group", "even_split", "auto_split"])
def test_every_tokenizer_scores_packed_rows_alike(tokenizer):
    """The two that the survey disputes, and the others; packed rows hold padding in the middle."""
    tokens = 3 if tokenizer in ("even_split", "auto_split") else None
    config = dataclasses.replace(SMALL, tokenizer=tokenizer, tokens=tokens, layers=1, tower=())
    params, valid = drawn(config), batch().candidate_mask
    logits = np.asarray(score(config, params, features()))
    packed = np.asarray(score(config, params, builders.packed(batch(), 2))).reshape(logits.shape)
    assert np.isfinite(logits).all() and np.unique(logits[valid]).size == 2 * valid.sum()
    np.testing.assert_allclose(packed[valid], logits[valid], rtol=1e-5, atol=1e-5)


def test_bfloat16_is_finite_and_near_float32():
    params = jax.tree.map(lambda p: p / 2, drawn(SMALL))
    want = score(SMALL, params, features())
    got = score(dataclasses.replace(SMALL, dtype="bfloat16"), params, features())
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=0.05 * max(1, np.abs(want).max()))


def test_what_writes_to_the_residual_is_initialised_as_such(monkeypatch):
    """And the T of per-token kernels stays out of their fan-in."""
    init = functools.partial(hhft.HHFT(SMALL).init, train=False)
    found, layers = oracles.asked(monkeypatch, init, features()), 4
    for i in range(2):
        for name in ("attention/out", "ffn/ffn_out"):
            assert found.pop(f"hetero_{i}/{name}/kernel") == (layers, (0,))
        for name in ("attention/query", "attention/key", "attention/value", "ffn/ffn_in"):
            assert found.pop(f"hetero_{i}/{name}/kernel") == (0, (0,))
        assert found.pop(f"hiformer_{i}/ffn_out/kernel") == (layers, ())
        for name in ("query", "key", "value", "ffn_in"):
            assert found.pop(f"hiformer_{i}/{name}/kernel") == (0, ())
    for name in ("hidden_0", "hidden_1", "logits"):
        assert found.pop(f"tower/{name}/kernel") == (0, (0,))
    assert all(k.startswith("tokenizer/") and v == (0, ()) for k, v in found.items())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hetero_layers": 0}, "hetero_layers=0 with pool='task', expected another pool"),
        ({"hetero_layers": -1}, "hetero_layers=-1, expected an integer >= 0"),
        ({"layers": -1}, "layers=-1, expected an integer >= 0"),
        ({"virtual_tokens": 0}, "virtual_tokens=0, expected an integer >= 1"),
        ({"width": 0}, "width=0"),
        ({"heads": 0}, "heads=0"),
        ({"heads": 4, "qk_width": None}, "width=6 is no multiple of heads=4"),
        ({"qk_width": 0}, "qk_width=0"),
        ({"v_width": -1}, "v_width=-1"),
        ({"expansion": 0}, "expansion=0"),
        ({"hiformer_expansion": 1.5}, "hiformer_expansion=1.5"),
        ({"pool": "max"}, "pool='max'"),
        ({"tower": 4}, "tower=4, expected a tuple"),
        ({"tower": (4, 0)}, r"tower\[1\]=0"),
        ({"tokens": 0}, "tokens=0"),
        ({"tokenizer": "even_split"}, "tokens=None, expected a number"),
        ({"tokenizer_hidden": -1}, "tokenizer_hidden=-1"),
        ({"tasks": 0}, "tasks=0"),
        ({"pooling": ("max",)}, "pooling='max'"),
        ({"prune_last": 3}, "prune_last=3"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"norm_place": "none"}, "norm_place='none'"),
        ({"init": "he"}, "init='he'"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_a_bad_config_is_refused(change, match):
    with pytest.raises(ValueError, match="hhft.Config: " + match):
        dataclasses.replace(SMALL, **change)


def test_a_token_count_that_the_schema_contradicts_is_refused():
    with pytest.raises(ValueError, match="tokens=5, but tokenizer='group' makes 4 tokens"):
        shapes(dataclasses.replace(SMALL, tokens=5))


def test_sizes_that_the_data_decide_have_no_closed_form():
    assert SMALL.paper_params() is None and SMALL.paper_flops() is None


def test_the_axis_T_is_the_number_of_virtual_tokens():
    assert hhft.Config.axes == {"T": "virtual_tokens", "L": "layers", "D": "width"}
    base = hhft.HHFT_BASE
    assert (base.width, base.heads, base.head_widths, base.virtual_tokens) == (256, 4, (64, 64), 16)
    assert (base.hetero_layers, base.layers, base.pool, base.tower) == (2, 2, "task", (256, 64))


def test_a_config_goes_to_json_and_back():
    text = json.dumps(dataclasses.asdict(SMALL))
    assert hhft.Config(**json.loads(text)) == SMALL


def test_windows_are_refused():
    windows = dataclasses.replace(features(), one_time=False)
    with pytest.raises(ValueError, match=r"hhft: .* different times"):
        hhft.HHFT(SMALL).init(jax.random.key(0), windows, train=False)
