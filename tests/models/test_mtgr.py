"""MTGR against float64 NumPy, its dynamic mask, its closed forms, and what windows must hold."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankjax import batch as batches
from rankjax import flops, loss
from rankjax.models import mtgr
from rankjax.packing import pack
from tests import builders
from tests.references import mtgr as reference

SMALL = mtgr.Config(history=4, realtime=4, layers=2, width=8, heads=2, tasks=2)
CONFIGS = {
    "text": SMALL,
    "as drawn, without biases": dataclasses.replace(
        *(SMALL,),
        **{"residual_from": "normed", "projection_bias": False, "attn_norm": "const"},
        **{"norm_constant": 300.0, "prune_last": False, "layers": 1},
    ),
    "norm before the gate, one pair for all, a small head": dataclasses.replace(
        *(SMALL,),
        **{"norm_before_gate": True, "group_norm": False, "output_norm": "none", "experts": 2},
        **{"expert_hidden": 5, "tower_hidden": 3, "implementation": "reference", "layers": 1},
    ),
}
VALID_LEN = dataclasses.replace(SMALL, attn_norm="valid_len", layers=1)
LENGTHS, CANDIDATES, S, C = (6, 0, 4, 5), (4, 2, 1, 3), 7, 4
SEEDS = st.integers(0, 10**6)
few = settings(max_examples=8, deadline=None, derandomize=True)


def window(seed=0, *, one_time=False, time_exact=True):
    """Four unpacked rows of NumPy embeddings; events and candidates interleave, and often tie."""
    rng = np.random.default_rng(seed)
    b = builders.batch(rng, lengths=LENGTHS, candidates=CANDIDATES, S=S, C=C, one_time=one_time)
    history_time = np.sort(rng.integers(0, 9, (4, S)), axis=1)
    candidate_time = np.sort(rng.integers(3, 8, (4, C)), axis=1)
    if one_time:
        history_time, candidate_time = history_time - 99, 0 * candidate_time
    earlier = (history_time[:, None] < candidate_time[:, :, None]) & b.history_mask[:, None]
    order, first = earlier.sum(axis=2), candidate_time[:, :1]
    return dataclasses.replace(
        b,
        schema=dataclasses.replace(b.schema, time_exact=time_exact),
        history_time=((history_time - first) * b.history_mask).astype(np.int32),
        candidate_time=((candidate_time - first) * b.candidate_mask).astype(np.int32),
        history_order=((np.arange(S) - order[:, :1]) * b.history_mask).astype(np.int32),
        candidate_order=((order - order[:, :1]) * b.candidate_mask).astype(np.int32),
    )


@functools.cache
def scorer(config):
    return jax.jit(lambda p, f: mtgr.MTGR(config).apply({"params": p}, f, train=False)[0])


@functools.cache
def shapes_of(config):
    f = jax.eval_shape(lambda: builders.features(window(one_time=True)))
    init = functools.partial(mtgr.MTGR(config).init, train=False)
    return jax.eval_shape(init, jax.random.key(0), f)["params"]


@functools.cache
def params_of(config):
    """Random parameters off their initial values, else a forgotten bias or scale goes unseen."""
    rng = np.random.default_rng(1)

    def draw(path, x):
        affine = path[-1].key in ("scale", "bias", "experts_bias")
        value = rng.normal(size=x.shape) * (0.3 if affine else x.shape[-2] ** -0.5)
        return np.float32(value + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes_of(config))


def score(b, config=SMALL):
    """Logits [R, C, K] of a batch of embeddings, NumPy."""
    return np.asarray(scorer(config)(params_of(config), builders.features(b)))


def sides_of(b):
    return {name: getattr(b, name) for name in ("user", "history", "candidate")}


def expected(b, config, p, sides):
    """The reference's logits [valid candidates, K] of an unpacked batch, float64, row by row."""
    static = 2 + config.history + config.realtime + 1
    normalizer = {"static_max": static, "const": config.norm_constant, "valid_len": None}
    fields = ("heads", "layers", "residual_from", "norm_before_gate", "output_norm")
    c = {name: getattr(config, name) for name in fields}
    c["normalizer"] = normalizer[config.attn_norm]
    side = lambda side, names, at: np.concatenate([np.float64(sides[side][n][at]) for n in names])
    item = ["item", "price", "tag"]
    exact = b.schema.time_exact
    event_time, time = (
        (b.history_time, b.candidate_time) if exact else (b.history_order, b.candidate_order)
    )
    found = []
    for row in range(4):
        user = [(name, side("user", [name], (row, 0))) for name in ("age", "spend")]
        events = [
            (side("history", [*item, "action"], (row, i)), event_time[row, i])
            for i in np.flatnonzero(b.history_mask[row])
        ]
        candidates = [
            (side("candidate", [*item, "hour"], (row, k)), time[row, k])
            for k in np.flatnonzero(b.candidate_mask[row])
        ]
        found.append(reference.logits(p, c, user, events, candidates))
    return np.concatenate(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_references(name):
    b, config = window(), CONFIGS[name]
    assert np.ptp(b.candidate_time, axis=1).max() > 0 and b.history_order.max() > 0
    got = score(b, config)
    assert got.shape == (4, C, 2) and got.dtype == np.float32
    want = expected(b, config, builders.float64(params_of(config)), sides_of(b))
    np.testing.assert_allclose(got[b.candidate_mask], want, rtol=0, atol=1e-5)


def test_the_number_of_tokens_as_the_normalizer():
    b = window(one_time=True)
    want = expected(b, VALID_LEN, builders.float64(params_of(VALID_LEN)), sides_of(b))
    got = score(b, VALID_LEN)
    np.testing.assert_allclose(got[b.candidate_mask], want, rtol=0, atol=1e-5)
    assert np.isfinite(got).all()
    with pytest.raises(ValueError, match="mtgr with attn_norm='valid_len': the batch holds"):
        score(window(), VALID_LEN)


def test_without_exact_times_the_order_cuts():
    b = window(time_exact=False)
    got = score(b)
    want = expected(b, SMALL, builders.float64(params_of(SMALL)), sides_of(b))
    np.testing.assert_allclose(got[b.candidate_mask], want, rtol=0, atol=1e-5)
    seconds = dataclasses.replace(b, history_time=b.history_time * 0 + 7)
    np.testing.assert_array_equal(score(seconds), got)


@functools.cache
def differentiated(config):
    def loss(params, sides, features, weight):
        features = dataclasses.replace(features, **sides)
        logits, aux = mtgr.MTGR(config).apply({"params": params}, features, train=False)
        assert aux == {}
        return (weight * logits).sum(), logits

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def gradients(b, config):
    """((of params, of sides), logits, weight): gradients of sum(weight * logits)."""
    weight = np.random.default_rng(2).normal(size=(4, C, 2)) * b.candidate_mask[..., None]
    f = builders.features(b)
    found = differentiated(config)(params_of(config), sides_of(f), f, weight.astype("f4"))
    return *jax.tree.map(np.asarray, found), weight


def test_gradients_are_the_references():
    """Along a random direction in every parameter and every input, by central differences."""
    b, config = window(), SMALL
    (of_params, of_sides), _, weight = gradients(b, config)
    p, sides = builders.float64(params_of(config)), sides_of(b)
    rng, step = np.random.default_rng(3), 1e-6

    def loss(p, sides):
        return (expected(b, config, p, sides) * weight[b.candidate_mask]).sum()

    def check(tree, gradient, loss):
        leaves, structure = jax.tree.flatten(tree)
        for i, (x, g) in enumerate(zip(leaves, jax.tree.leaves(gradient))):
            towards = rng.normal(size=x.shape) * (x != 0)  # padding stays 0
            there, back = (
                loss(structure.unflatten([*leaves[:i], x + by * towards, *leaves[i + 1 :]]))
                for by in (step, -step)
            )
            want = (there - back) / (2 * step)
            size = 1 + np.linalg.norm(g) * np.linalg.norm(towards)
            assert np.abs(want) > 1e-4, "a direction that shows nothing"
            # All but one lie within 5e-6; the first query's bias sums rounding over rows of
            # attention near 0, which the norm behind it divides by their small size: 1.2e-5.
            np.testing.assert_allclose((g * towards).sum(), want, rtol=0, atol=1.5e-5 * size)

    check(p, of_params, lambda p: loss(p, sides))
    check(sides, of_sides, lambda sides: loss(p, sides))
    for x in of_sides["history"].values():
        assert np.all(x[~b.history_mask] == 0)


def test_the_last_layer_may_compute_the_candidates_only():
    b, full = window(), dataclasses.replace(SMALL, prune_last=False)
    (mine, pruned, _), (other, whole, _) = gradients(b, SMALL), gradients(b, full)
    valid = b.candidate_mask
    np.testing.assert_allclose(pruned[valid], whole[valid], rtol=0, atol=1e-6)
    for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(other)):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_pruning_leaves_rows_out():
    """Products of one layer: K and V of all tokens, all else of the candidates only."""
    f = jax.eval_shape(lambda: builders.features(window()))

    def products(config):
        model = mtgr.MTGR(dataclasses.replace(config, implementation="reference", layers=1))
        params = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), f)
        return flops.count(functools.partial(model.apply, train=False), params, f).matmul

    d, rows, n = SMALL.width, 2 + S, 2 + S + C
    less = products(dataclasses.replace(SMALL, prune_last=False)) - products(SMALL)
    assert less == 4 * (3 * 2 * rows * d**2 + 4 * rows * n * d)


def whole_mask(f):
    """(queries, keys, rule) of a layer that computes all rows."""
    return next(iter(mtgr.masks_of(dataclasses.replace(SMALL, prune_last=False), f).values()))


def nine_tokens():
    """The paper's example: rt2 before rt1; targets after both, between them, and before both."""
    b = builders.batch(np.random.default_rng(0), lengths=(4,), candidates=(3,), S=4, C=3)
    return dataclasses.replace(
        b,
        one_time=False,
        history_time=np.array([[-90, -50, 20, 10]], np.int32),  # seq1, seq2, rt1, rt2
        history_order=np.array([[-2, -1, 1, 0]], np.int32),
        candidate_time=np.array([[30, 15, 0]], np.int32),
        candidate_order=np.array([[2, 1, 0]], np.int32),
    )


@pytest.mark.parametrize("exact", [True, False])
def test_the_papers_nine_tokens(exact):
    f = builders.features(nine_tokens())
    f = dataclasses.replace(f, schema=dataclasses.replace(f.schema, time_exact=exact))
    q, k, rule = whole_mask(f)
    want = [
        # age ctr seq1 seq2 rt1 rt2 target1-3
        "1111 00 000",
        "1111 00 000",
        "1111 00 000",
        "1111 00 000",
        "1111 11 000",  # rt1 is the later one
        "1111 01 000",
        "1111 11 100",
        "1111 01 010",
        "1111 00 001",
    ]
    table = np.array([[int(x) for x in row.replace(" ", "")] for row in want])
    np.testing.assert_array_equal(rule.allow(q, k)[0], table)
    np.testing.assert_array_equal(mtgr.groups(f)[0], [0, 0, 1, 1, 2, 2, 3, 3, 3])
    *_, (q, k, rule) = mtgr.masks_of(SMALL, f).values()
    np.testing.assert_array_equal(rule.allow(q, k)[0], table[6:])


def test_an_event_at_a_candidates_time_is_not_read():
    """Nor at the first candidate's: it is a real-time event, and no static one."""
    b = nine_tokens()
    f = builders.features(dataclasses.replace(b, candidate_time=np.array([[20, 10, 0]], np.int32)))
    q, k, rule = whole_mask(f)
    np.testing.assert_array_equal(rule.allow(q, k)[0, 6:, 4:6], [[0, 1], [0, 0], [0, 0]])
    time = np.array([[-90, -50, 0, 0]], np.int32)
    tied = dataclasses.replace(b, history_time=time, history_order=np.array([[-2, -1, 0, 1]], "i4"))
    q, k, rule = whole_mask(builders.features(tied))
    allow = np.asarray(rule.allow(q, k)[0])
    assert not allow[8, 4:6].any() and allow[4:6, 4:6].all() and allow[6:8, 4:6].all()


@few
@given(seed=SEEDS)
def test_candidates_together_score_as_each_in_a_sample_of_its_own(seed):
    """With the same S and the same constant normaliser; a sample's own R ends before its one
    candidate. (Cut anew at that candidate, R would be S and attend in full: another score.)"""
    b = window(seed)
    together = score(b)
    for k in range(C):
        only = np.arange(C) == k
        before = b.history_time < b.candidate_time[:, k : k + 1]
        kept = before | (b.history_order < 0)
        alone = dataclasses.replace(
            b,
            candidate_sample=np.where(only, b.candidate_sample, -1).astype(np.int32),
            history_sample=np.where(kept, b.history_sample, -1).astype(np.int32),
        )
        valid = b.candidate_mask[:, k]
        np.testing.assert_array_equal(score(alone)[valid, k], together[valid, k])


def test_the_number_of_tokens_as_the_normalizer_ties_candidates_together():
    b = window(one_time=True)
    one = np.arange(C) == 0
    alone = dataclasses.replace(b, candidate_sample=np.where(one, b.candidate_sample, -1))
    # The norm behind the attention takes a factor out again, but for small outputs: its epsilon.
    params = params_of(VALID_LEN)
    gate = jax.tree.map(lambda x: 1e-3 * x, params["layer_0"]["gate"])
    params = params | {"layer_0": params["layer_0"] | {"gate": gate}}
    run = lambda b: np.asarray(scorer(VALID_LEN)(params, builders.features(b)))[:, 0]
    moved = np.max(np.abs(run(alone) - run(b)), axis=-1) > 1e-4
    np.testing.assert_array_equal(moved, np.array(CANDIDATES) > 1)


@few
@given(seed=SEEDS, row=st.sampled_from([0, 2, 3]), slot=st.integers(0, S - 1))
def test_an_event_moves_the_later_candidates_and_no_other(seed, row, slot):
    b = window(seed)
    slot = slot % LENGTHS[row]
    history = {k: np.array(x) for k, x in b.history.items()}
    history["action"][row, slot] += 3  # what a label would tell
    history["item"][row, slot] += 3
    before, after = score(b), score(dataclasses.replace(b, history=history))
    reads = np.zeros((4, C), bool)
    reads[row] = b.history_time[row, slot] < b.candidate_time[row]
    moved = np.any(before != after, axis=-1)
    np.testing.assert_array_equal(moved[b.candidate_mask], reads[b.candidate_mask])


@few
@given(seed=SEEDS)
def test_slots_of_the_history_and_of_candidates_have_no_order(seed):
    """Times decide; padding stands anywhere, with anything in it."""
    b, rng = window(seed), np.random.default_rng(seed)
    to, at = rng.permutation(S), rng.permutation(C)
    noise = rng.integers(-9, 9, (4, S)).astype(np.int32)
    dirty = lambda x: np.where(b.history_mask, x, noise)[:, to]
    other = dataclasses.replace(
        b,
        history={k: np.where(b.history_mask[..., None], x, 5)[:, to] for k, x in b.history.items()},
        history_sample=b.history_sample[:, to],
        history_time=dirty(b.history_time),
        history_order=dirty(b.history_order),
        candidate={k: x[:, at] for k, x in b.candidate.items()},
        candidate_sample=b.candidate_sample[:, at],
        candidate_time=b.candidate_time[:, at],
        candidate_order=b.candidate_order[:, at],
    )
    valid = other.candidate_mask
    np.testing.assert_allclose(score(other)[valid], score(b)[:, at][valid], rtol=0, atol=1e-5)


def test_packed_windows_score_as_separate_rows():
    b = window()
    together = score(pack(b, 2)).reshape(4, C, 2)
    valid = b.candidate_mask
    np.testing.assert_allclose(together[valid], score(b)[valid], rtol=0, atol=2e-6)
    one = window(one_time=True)
    together = score(pack(one, 2), VALID_LEN).reshape(4, C, 2)
    np.testing.assert_allclose(together[valid], score(one, VALID_LEN)[valid], rtol=0, atol=2e-6)


def test_rows_of_a_layer_depend_on_what_their_group_may_read():
    f = builders.features(window())
    group, (q, k, rule) = np.asarray(mtgr.groups(f)), whole_mask(f)
    pad = np.asarray(q.role) == batches.PAD
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 2 + S + C, 8)).astype("f4")
    layer, params = mtgr.Layer(SMALL), {"params": params_of(SMALL)["layer_0"]}
    step = jax.jit(lambda x: layer.apply(params, x, mtgr.groups(f), (q, k, rule), 9.0))
    reads = {0: {0, 1}, 1: {0, 1}, 2: {0, 1, 2}, 3: {0, 1, 2, 3}}
    for changed in range(4):
        there = (group == changed) & ~pad
        y = np.asarray(step(x + there[..., None] * rng.normal(size=x.shape).astype("f4")))
        moved = np.any(y != step(x), axis=-1)
        for g in range(4):
            rows = (group == g) & ~pad
            assert rows.any() and moved[rows].any() == (changed in reads[g]), (changed, g)
        assert not moved[pad & (group != changed)].any()


def test_uneven_shards_weighted_by_their_candidates_have_the_gradient_of_the_whole_batch():
    """As batches balanced by tokens have them: rows 0 and 1..3, with 4 and 6 candidates."""
    b = window()
    weights = b.candidate_mask[..., None].astype("f4")
    f, given = builders.features(b), (b.labels, weights)

    @jax.jit
    def gradient(params, f, labels, weights):
        def objective(params):
            logits, aux = mtgr.MTGR(SMALL).apply({"params": params}, f, train=True)
            return loss.multi_task(logits[..., :1], labels, weights, aux, b.schema)[0]

        return jax.grad(objective)(params)

    whole = gradient(params_of(SMALL), f, *given)
    parts = [
        gradient(params_of(SMALL), *jax.tree.map(lambda x, at=at: x[at], (f, *given)))
        for at in (slice(0, 1), slice(1, 4))
    ]
    shares = np.array([4, 6]) / 10
    for want, *got in zip(*map(jax.tree.leaves, (whole, *parts))):
        want, got = np.asarray(want), np.stack(got)
        near = dict(rtol=0, atol=1e-6 + 1e-5 * np.abs(want).max())
        np.testing.assert_allclose(np.tensordot(shares, got, 1), want, **near)
    assert any(
        np.abs(np.asarray(x + y) / 2 - z).max() > 1e-3
        for x, y, z in zip(*map(jax.tree.leaves, (*parts, whole)))
    ), "the plain mean of the shards would do as well"


def test_with_tied_groups_it_is_the_model_with_one_layer_norm():
    one = dataclasses.replace(SMALL, group_norm=False)
    tied = {name: params_of(one)[name] for name in params_of(one)}
    for name in ("layer_0", "layer_1"):
        tied[name] = dict(tied[name])
        for norm in ("input_norm", "attention_norm"):
            tied[name][norm] = {k: np.repeat(x, 4, axis=0) for k, x in tied[name][norm].items()}
    f, valid = builders.features(window()), window().candidate_mask
    got, want = scorer(SMALL)(tied, f), scorer(one)(params_of(one), f)
    np.testing.assert_allclose(got[valid], want[valid], rtol=0, atol=1e-6)


def test_a_history_may_be_empty_in_bfloat16_with_gradients():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    b = window()
    sample = np.array(b.candidate_sample)
    sample[2] = -1  # a row of padding alone
    b = dataclasses.replace(b, candidate_sample=sample)
    (of_params, of_sides), logits, _ = gradients(b, config)
    assert logits.dtype == np.float32 and np.isfinite(logits).all()
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((of_params, of_sides)))
    assert all(np.any(x != 0) for x in jax.tree.leaves(of_params)), "a parameter without gradient"
    valid = b.candidate_mask
    np.testing.assert_allclose(logits[valid], score(b)[valid], rtol=0.05, atol=0.05)
    empty = dataclasses.replace(b, history_sample=np.full_like(b.history_sample, -1))
    found = gradients(empty, config)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"projection_bias": False, "layers": 3},
        {"group_norm": False, "experts": 3, "expert_hidden": 5, "tower_hidden": 7, "tasks": 1},
    ],
)
def test_parameter_count(change):
    c = dataclasses.replace(SMALL, **change)
    params, d = shapes_of(c), c.width
    layers = [params[name] for name in params if name.startswith("layer_")]
    assert len(layers) == c.layers and builders.count(layers) == c.paper_params()
    G, b = (4 if c.group_norm else 1), int(c.projection_bias)
    assert c.paper_params() == c.layers * (5 * d * d + 5 * b * d + 2 * G * 2 * d)
    E = builders.E
    tokens = (E * d + d) + (1 * d + d) + 2 * ((E + 1 + E + E) * d + d)
    X, K, F, H = c.experts, c.tasks, c.expert_hidden or d, c.tower_hidden or d
    head = 2 * d + X * (d * F + F) + K * (d * X + F * H + 2 * H + 1)
    assert builders.count(params) == tokens + c.paper_params() + head


@pytest.mark.parametrize("figure", mtgr.PAPER.figures, ids=lambda figure: figure.what)
def test_printed_flops(figure):
    if figure.tolerance is not None:
        assert figure.ours() == pytest.approx(figure.printed, rel=figure.tolerance)


@pytest.mark.parametrize("name", mtgr.PAPER.sizes)
def test_the_layers_multiply_as_often_as_printed(name):
    """Traced over the real layer at the printed sizes: nothing is computed."""
    size = mtgr.PAPER.sizes[name]
    n, c = size.n, dataclasses.replace(size.config, implementation="reference")
    numbers = jax.ShapeDtypeStruct((1, n), jnp.int32)
    fields = [field.name for field in dataclasses.fields(batches.Tokens)]
    tokens = batches.Tokens(**dict.fromkeys(fields, numbers))
    layer = mtgr.Layer(c)
    x = (jax.ShapeDtypeStruct((1, n, c.width), jnp.float32), numbers, tokens)
    bind = lambda f: lambda v, x, group, t: f(v, x, group, (t, t, mtgr.RULE), 500.0)
    params = jax.eval_shape(bind(layer.init), jax.random.key(0), *x)
    assert c.layers * builders.count(params) == c.paper_params()
    assert c.layers * flops.count(bind(layer.apply), params, *x).matmul == c.paper_flops(n)
    assert c.paper_flops() == c.paper_flops(c.static_max())


def test_small_residual_divides_only_what_writes_to_the_residual():
    f = builders.features(window())
    q, k, rule = whole_mask(f)
    x = jnp.ones((4, 2 + S + C, 8))

    def initial(init):
        layer = mtgr.Layer(dataclasses.replace(SMALL, init=init))
        make = lambda key: layer.init(key, x, mtgr.groups(f), (q, k, rule), 9.0)["params"]
        return jax.jit(make)(jax.random.key(0))

    small, lecun = initial("small_residual"), initial("lecun")
    for name in ("query", "key", "value", "gate", "out"):
        a, b = small[name]["kernel"], lecun[name]["kernel"]
        np.testing.assert_allclose(a, b / (2 if name == "out" else 1), rtol=1e-6)


def test_a_config_goes_to_json_and_back():
    for config in CONFIGS.values():
        assert mtgr.Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 9}, "width=9, expected a multiple of heads=2"),
        ({"heads": 0}, "heads=0, expected an integer >= 1"),
        ({"history": 0}, "history=0, expected an integer >= 1"),
        ({"realtime": -1}, "realtime=-1, expected an integer >= 0"),
        ({"experts": 0}, "experts=0, expected an integer >= 1"),
        ({"expert_hidden": 0}, "expert_hidden=0, expected an integer >= 1"),
        ({"tower_hidden": 2.5}, "tower_hidden=2.5, expected an integer >= 1"),
        ({"attn_norm": "batch_max"}, "attn_norm='batch_max', expected one of"),
        ({"norm_constant": 0}, "norm_constant=0, expected > 0"),
        ({"residual_from": "y"}, "residual_from='y', expected one of"),
        ({"output_norm": "group"}, "output_norm='group', expected one of"),
        ({"init": "zeros"}, "init='zeros', expected one of"),
        ({"implementation": "cuda"}, "implementation='cuda', expected one of"),
        ({"dtype": "float16"}, "dtype='float16', expected one of"),
    ],
)
def test_refused_configurations(change, message):
    with pytest.raises(ValueError, match=rf"mtgr\.Config: {message}"):
        dataclasses.replace(SMALL, **change)


def abstract(sides):
    """Shapes of the logits with the schema's features of these sides only."""
    f = builders.features(window())
    kept = tuple(x for x in f.schema.features if x.side in sides)
    f = dataclasses.replace(f, schema=dataclasses.replace(f.schema, features=kept))
    run = functools.partial(mtgr.MTGR(SMALL).init_with_output, train=False)
    return jax.eval_shape(run, jax.random.key(0), f)[0][0]


def test_schemas_without_some_sides():
    assert abstract({"item"}).shape == (4, C, 2)
    with pytest.raises(ValueError, match="mtgr: the schema has no item feature"):
        abstract({"user", "event", "context"})
