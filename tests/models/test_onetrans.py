"""OneTrans against float64 NumPy, the identities that its structure promises, its closed forms."""

import dataclasses
import functools
import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import linen as nn
from hypothesis import strategies as st

from rankjax import flops
from rankjax.batch import CANDIDATE, HISTORY
from rankjax.layers import initializers, inputs, tokenizers
from rankjax.models import onetrans
from rankjax.packing import pack
from tests import builders
from tests.references import onetrans as reference

R, S, C, K = 4, 8, 3, 2
# A history shorter than some samples', and a pyramid that cuts to 4 S tokens in the first block.
SMALL = onetrans.Config(
    history=5, tokens=3, layers=2, width=8, heads=2, expansion=2, tasks=K, pyramid_round=2
)
CONFIGS = {
    "one stream": SMALL,
    "sequences by time, post-norm": dataclasses.replace(
        *(SMALL,),
        **{"sequences": 3, "tokenizer": "even_split", "tokenizer_hidden": 5},
        **{"norm": "layer", "norm_place": "post", "token_norm": "layer", "heads": 4},
    ),
    "sequences by intent, SwiGLU, own W_O, no pyramid": dataclasses.replace(
        *(SMALL,),
        **{"sequences": 3, "merge": "intent", "ffn": "swiglu", "own_output": True},
        **{
            "pyramid": False,
            "tokenizer": "per_feature",
            "tokens": 6,
            "implementation": "reference",
        },
    ),
    "shared weights, groups, no norm of tokens, no positions": dataclasses.replace(
        *(SMALL,),
        **{"sequences": 2, "merge": "intent", "tokenizer": "group", "tokens": None},
        **{"own_weights": False, "token_norm": "none", "pos_emb": "none", "tokenizer_hidden": 4},
        **{"layers": 3, "head_hidden": 5},
    ),
}
EACH = pytest.mark.parametrize("name", CONFIGS)


def random_batch(seed=0, holes=True):
    """Rows of 7, 0, 3 and 5 events, padding among them where `holes`, something in every slot."""
    rng = np.random.default_rng(seed)
    batch = builders.batch(rng, lengths=(7, 0, 3, 5), candidates=(3, 2, 1, 3), S=S, C=C, tasks=K)
    if not holes:
        return batch
    order = np.stack([rng.permutation(S) for _ in range(R)])
    for row in range(R):  # valid slots stay in order
        valid = np.sort(np.flatnonzero(batch.history_mask[row][order[row]]))
        order[row, valid] = np.arange(len(valid))
    at = lambda x: np.take_along_axis(x, order.reshape(R, S, *(1,) * (x.ndim - 2)), axis=1)
    sample = at(batch.history_sample)
    scribble = lambda x: np.where(
        (sample >= 0).reshape(R, S, *(1,) * (x.ndim - 2)), x, rng.integers(-9, 9, x.shape)
    ).astype(x.dtype)
    return dataclasses.replace(
        batch,
        history={name: scribble(at(x)) for name, x in batch.history.items()},
        history_sample=sample,
        **{name: scribble(at(getattr(batch, name))) for name in ("history_time", "history_order")},
    )


@functools.cache
def params_of(config):
    """Random parameters off their initial values, else a forgotten bias or scale goes unseen."""
    features = builders.features(random_batch())
    init = functools.partial(onetrans.OneTrans(config).init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), features)["params"]
    rng = np.random.default_rng(1)

    def draw(path, x):
        value = rng.normal(size=x.shape) * (0.3 if x.ndim == 1 else x.shape[-2] ** -0.5)
        return np.float32(value + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def scorer(config):
    return jax.jit(lambda p, f: onetrans.OneTrans(config).apply({"params": p}, f, train=False)[0])


def score(batch, config=SMALL, params=None):
    params = params_of(config) if params is None else params
    return np.asarray(scorer(config)(params, builders.features(batch)))


def sample_of(batch, actions, row, candidate):
    found = builders.one(batch, row, candidate)
    return found | {"actions": actions[row][batch.history_mask[row]].tolist()}


def samples(batch):
    """[(row, candidate, the sample as the reference takes it)] of all valid candidates."""
    actions = np.asarray(builders.features(batch).history_action)
    at = np.argwhere(batch.candidate_mask)
    return [(row, k, sample_of(batch, actions, row, k)) for row, k in at]


@EACH
def test_logits_are_the_papers(name):
    config, batch = CONFIGS[name], random_batch()
    c, p = dataclasses.asdict(config), builders.float64(params_of(config))
    got = score(batch, config)
    assert got.shape == (R, C, K) and got.dtype == np.float32
    for row, k, sample in samples(batch):
        want = reference.logits(sample, p, c)
        np.testing.assert_allclose(got[row, k], want, rtol=0, atol=1e-5 * max(1, abs(want).max()))


@functools.cache
def gradients(config):
    """(params, features, weights [R, C, K]) -> gradient of sum(weights * logits) by the first two,
    the features as their three dicts."""

    def loss(params, sides, features, weights):
        features = dataclasses.replace(features, **sides)
        logits, _ = onetrans.OneTrans(config).apply({"params": params}, features, train=True)
        return jnp.sum(logits * weights)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    sides = ("user", "history", "candidate")
    return lambda p, f, w: grad(p, {name: getattr(f, name) for name in sides}, f, w)


@pytest.mark.parametrize(("name", "together"), [("one stream", False), (list(CONFIGS)[3], True)])
def test_gradients_are_those_of_the_reference(name, together):
    """Of every parameter and every input, along random directions, of each alone or of all
    together; inputs at padding have none."""
    batch, rng = random_batch(), np.random.default_rng(2)
    config = dataclasses.replace(CONFIGS[name], layers=1 if together else 2)
    c, p = dataclasses.asdict(config), builders.float64(params_of(config))
    actions = np.asarray(builders.features(batch).history_action)
    read = [(0, 1), (1, 0), (3, 0)]  # rows and candidates
    weights = np.zeros((R, C, K), np.float32)
    weights[tuple(np.transpose(read))] = rng.normal(size=(len(read), K))
    got = gradients(config)(params_of(config), builders.features(batch), weights)
    sides = {
        side: {n: np.float64(x) for n, x in getattr(batch, side).items()}
        for side in ("user", "history", "candidate")
    }
    leaves, tree = jax.tree.flatten((p, sides))
    found = jax.tree.leaves(got)

    def loss(directions, step):
        moved = [leaf + step * d for leaf, d in zip(leaves, directions)]
        p, sides = jax.tree.unflatten(tree, moved)
        at = dataclasses.replace(batch, **sides)
        each = (reference.logits(sample_of(at, actions, *rc), p, c) for rc in read)
        return sum(weights[rc] @ logits for rc, logits in zip(read, each))

    def unit(x):
        direction = rng.normal(size=x.shape)
        return direction / np.linalg.norm(direction)

    none = [0.0] * len(leaves)
    if together:
        directions = [[unit(x) for x in leaves] for _ in range(5)]
    else:
        directions = [[*none[:i], unit(x), *none[i + 1 :]] for i, x in enumerate(leaves)]
    checked = 0
    for direction in directions:
        want = (loss(direction, 1e-5) - loss(direction, -1e-5)) / 2e-5
        gradient = sum(np.sum(g * d) for g, d in zip(found, direction))
        tolerance = 1e-5 * max(
            1, max(np.linalg.norm(g) for g, d in zip(found, direction) if np.any(d))
        )
        np.testing.assert_allclose(gradient, want, rtol=0, atol=tolerance)
        checked += want != 0
    assert checked > 0.8 * len(directions)
    for x in got[1]["history"].values():
        assert np.all(x[~batch.history_mask] == 0)


def single(batch, row=0, k=0):
    return next(x for r, c, x in samples(batch) if (r, c) == (row, k))


FULL = dataclasses.replace(SMALL, pyramid=False, history=8)


@pytest.mark.parametrize("config", [FULL, CONFIGS[list(CONFIGS)[2]]])
def test_two_stages_score_as_the_whole(config):
    """S tokens once per request, then each candidate on their cached keys and values."""
    c, p = dataclasses.asdict(config), builders.float64(params_of(config))
    batch = random_batch()
    got = score(batch, config)
    for row, k, sample in samples(batch):
        s_nd, ns_td = reference.start(sample, p, c)
        if len(s_nd):
            want = reference.stage_two(ns_td, reference.stage_one(s_nd, p, c), p, c)
            np.testing.assert_allclose(got[row, k], want, atol=2e-5 * max(1, abs(want).max()))


def test_events_that_came_since_extend_the_cache_of_an_earlier_request():
    c, p = dataclasses.asdict(FULL), builders.float64(params_of(FULL))
    batch = random_batch()
    sample = single(batch)
    s_nd, ns_td = reference.start(sample, p, c)
    early = sample | {"history": {n: x[:4] for n, x in sample["history"].items()}}
    early["actions"] = sample["actions"][:4]
    earlier_nd, _ = reference.start(early, p, c)  # positions count from the oldest
    cache = reference.stage_one(s_nd[4:], p, c, reference.stage_one(earlier_nd, p, c))
    want = reference.stage_two(ns_td, cache, p, c)
    np.testing.assert_allclose(score(batch, FULL)[0, 0], want, rtol=0, atol=1e-5)


def block_io(config=SMALL, seed=3):
    """(block, params, x, tokens of all): 5 S tokens and T = 3 of 2 candidates, one row."""
    rng = np.random.default_rng(seed)
    batch = builders.batch(rng, lengths=(5,), candidates=(2,), S=5, C=2)
    full = dataclasses.replace(config, pyramid=False, prune_last=False)
    _, tokens, _ = onetrans.masks_of(full, builders.features(batch))["layer 1"]
    x = rng.normal(size=(1, 5, 8)).astype("f4"), rng.normal(size=(3, 2, 8)).astype("f4")
    return onetrans.Block(config), {"params": params_of(config)["block_0"]}, x, tokens


@functools.cache
def apply_block(config=SMALL):
    return jax.jit(onetrans.Block(config).apply)


@pytest.mark.parametrize("rows", [0, 2, 4])
def test_a_pyramids_rows_are_those_of_the_whole_block(rows):
    _, params, x, tokens = block_io()
    kept = jax.tree.map(lambda x_rn: x_rn[:, 5 - rows :], tokens)
    whole_s, whole_ns = apply_block()(params, x, tokens, tokens)
    s_rnd, ns_tmd = apply_block()(params, x, kept, tokens)
    assert s_rnd.shape == (1, rows, 8)
    np.testing.assert_allclose(s_rnd, whole_s[:, 5 - rows :], rtol=0, atol=1e-6)
    np.testing.assert_allclose(ns_tmd, whole_ns, rtol=0, atol=1e-6)


def test_who_reads_whom_within_a_block():
    """Exactly: j <= i over [S; NS] of one candidate, nothing across candidates."""
    _, params, x, tokens = block_io()
    before = apply_block()(params, x, tokens, tokens)
    for j in range(5):
        changed = x[0].copy()
        changed[0, j] += 1
        s, ns = apply_block()(params, (changed, x[1]), tokens, tokens)
        moved = np.any(s != before[0], axis=-1)[0]
        np.testing.assert_array_equal(moved, np.arange(5) >= j)
        assert np.all(np.any(ns != before[1], axis=-1))
    for t in range(3):
        changed = x[1].copy()
        changed[t, 0] += 1
        s, ns = apply_block()(params, (x[0], changed), tokens, tokens)
        np.testing.assert_array_equal(s, before[0])
        moved = np.any(ns != before[1], axis=-1)
        np.testing.assert_array_equal(moved[:, 0], np.arange(3) >= t)
        assert not moved[:, 1].any()


def test_with_tied_weights_it_is_a_causal_transformer():
    _, params, x, tokens = block_io()
    p = params["params"]

    def tie(path, leaf):
        if path[-2].key != "own":
            return leaf
        shared = functools.reduce(lambda node, key: node[key.key], path[:-2], p)["shared"]
        return np.broadcast_to(shared[path[-1].key], leaf.shape)

    tied = jax.tree_util.tree_map_with_path(tie, p)
    s, ns = apply_block()({"params": tied}, x, tokens, tokens)
    flat = {n: builders.float64(tied["mha"][n]["shared"]) for n in tied["mha"]}
    flat |= {n: builders.float64(tied["ffn"][n]["shared"]) for n in tied["ffn"]}
    flat |= {n: np.float64(tied[n]["scale"]) for n in ("mha_norm", "ffn_norm")}
    for k in range(2):
        want = reference.transformer(np.concatenate([x[0][0], x[1][:, k]]).astype(float), flat, 2)
        np.testing.assert_allclose(s[0], want[:5], rtol=0, atol=1e-5)
        np.testing.assert_allclose(ns[:, k], want[5:], rtol=0, atol=1e-5)
    shared = dataclasses.replace(SMALL, own_weights=False)
    same = apply_block(shared)({"params": _shared(tied)}, x, tokens, tokens)
    np.testing.assert_allclose(same[1], ns, rtol=0, atol=1e-6)


def _shared(p):
    """The tree without the own weights."""
    return {k: _shared(v) if isinstance(v, dict) else v for k, v in p.items() if k != "own"}


def test_auto_split_with_block_diagonal_layers_is_group_wise():
    rng, names = np.random.default_rng(5), list(reference.GROUPS)  # in the order of the inputs
    widths = (5, 9, 4)
    layer = lambda w, f: {"kernel": rng.normal(size=(w, f)), "bias": rng.normal(size=f)}
    p = {f"{name}.hidden": layer(w, 4) for name, w in zip(names, widths)}
    p |= {name: layer(4, 8) for name in names}
    diagonal = {}
    for to, of in (("all.hidden", "{}.hidden"), ("all", "{}")):
        parts = [p[of.format(name)] for name in names]
        kernel = scipy.linalg.block_diag(*(x["kernel"] for x in parts))
        diagonal[to] = {"kernel": kernel, "bias": np.concatenate([x["bias"] for x in parts])}

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def tokens(kind, hidden, params):
        found = inputs.collect(builders.features(random_batch()), [])
        return tokenizers.Tokenizer(kind, 3, 8, hidden).apply({"params": params}, found)

    got, want = tokens("auto_split", 12, diagonal), tokens("group", 4, p)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith(("one", "shared"))])
def test_the_last_block_may_leave_out_the_s_tokens(name):
    config = CONFIGS[name]
    whole = dataclasses.replace(config, prune_last=False)
    pruned, full = (score(random_batch(), c, params_of(config)) for c in (config, whole))
    np.testing.assert_allclose(pruned, full, rtol=0, atol=1e-5)


def test_and_the_gradients_of_what_is_left_stay():
    block, params, x, tokens = block_io()
    w = np.random.default_rng(4).normal(size=x[1].shape).astype("f4")

    def gradient(rows):
        kept = jax.tree.map(lambda x_rn: x_rn[:, 5 - rows :], tokens)
        loss = lambda params, x: jnp.sum(block.apply(params, x, kept, tokens)[1] * w)
        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x))

    for pruned, whole in zip(gradient(0), gradient(5), strict=True):
        np.testing.assert_allclose(pruned, whole, rtol=0, atol=1e-5 * max(1, np.abs(whole).max()))


@pytest.mark.parametrize("name", list(CONFIGS)[:3:2])
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 10**6))
def test_packed_rows_score_as_separate_rows(name, seed):
    batch = random_batch(seed)
    want = score(batch, CONFIGS[name])
    got = score(pack(batch, 2), CONFIGS[name]).reshape(R, C, K)
    valid = batch.candidate_mask
    np.testing.assert_allclose(
        got[valid], want[valid], rtol=0, atol=2e-5 * max(1, np.abs(want).max())
    )


@EACH
def test_where_padding_stands_and_what_it_holds_changes_nothing(name):
    clean, scribbled = random_batch(holes=False), random_batch()
    want, got = (score(b, CONFIGS[name])[b.candidate_mask] for b in (clean, scribbled))
    np.testing.assert_array_equal(got, want)


def test_masks_are_one_causal_mask_per_candidate():
    """What `masks_of` shows, against j <= i over [S; NS], in every layer of the pyramid."""
    config = dataclasses.replace(SMALL, prune_last=False)
    batch = random_batch(holes=False)

    @jax.jit
    def seen(features):
        masks = onetrans.masks_of(config, features)
        return {name: (q, k, rule.allow(q, k)) for name, (q, k, rule) in masks.items()}

    batch_features = builders.features(batch)
    masks = seen(batch_features)
    assert list(masks) == ["layer 1", "layer 2"]
    left = [5, 4, 3]
    for layer, (q, k, allow) in enumerate(masks.values()):
        n, rows = left[layer], left[layer + 1]
        assert q.role.shape == (R, rows + 3 * C) and k.role.shape == (R, n + 3 * C)
        for row, length in enumerate((7, 0, 3, 5)):
            valid = min(length, n)
            roles = [HISTORY] * min(valid, n)
            assert k.role[row, :n].tolist() == [0] * (n - valid) + roles
            s = np.tri(n, dtype=bool)[n - rows :]
            s[:, : n - valid] = False
            s[: rows - min(valid, rows)] = False
            np.testing.assert_array_equal(allow[row, :rows, :n], s)
            assert not allow[row, :rows, n:].any()
            for c in range(C):
                there = batch.candidate_mask[row, c]
                own = slice(3 * c, 3 * c + 3)
                assert np.all(q.role[row, rows:][own] == (CANDIDATE if there else 0))
                of_candidate = allow[row, rows:][own]
                reads = np.zeros((3, n + 3 * C), bool)
                if there:
                    reads[:, n - valid : n] = True
                    reads[:, n:][:, own] = np.tri(3)
                np.testing.assert_array_equal(of_candidate, reads)
    shapes = jax.eval_shape(lambda f: onetrans.masks_of(SMALL, f)["layer 2"][0], batch_features)
    assert shapes.role.shape == (R, 3 * C)


def test_pyramid_of_the_papers_sizes():
    small, large = onetrans.ONETRANS_S, onetrans.ONETRANS_L
    assert small.schedule == (992, 800, 608, 416, 224, 12)
    assert large.schedule == (1312, 1120, 928, 768, 576, 384, 192, 16)
    assert dataclasses.replace(small, pyramid=False).schedule == (1190,) * 6
    for c in (small, large):
        ours = reference.schedule(c.history, c.tokens, c.layers, 32)
        assert list(c.schedule) == ours


def test_a_schedule_stays_between_t_and_s():
    at = lambda **change: dataclasses.replace(SMALL, **change).schedule
    assert SMALL.schedule == (4, 3)
    assert at(pyramid_round=32) == (3, 3)  # the nearest multiple is 0
    assert at(pyramid_round=32, history=25, layers=3) == (25, 3, 3)  # 17.7 -> 32, 10.3 -> 0
    assert at(history=2) == (2, 2)  # never more than there are
    assert at(sequences=3, merge="intent", pyramid=False) == (7, 7)
    assert at(tokens=None, tokenizer="group", history=50, pyramid_round=16) == (32, 16)


def leaves_of_blocks(config):
    return [x for name, x in params_of(config).items() if name.startswith("block_")]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"own_output": True, "ffn": "swiglu", "norm": "layer"},
        {"own_weights": False, "norm": "none"},
        {"sequences": 3, "merge": "intent"},
    ],
)
def test_paper_params_is_the_count_of_the_blocks(change):
    config = dataclasses.replace(SMALL, **change)
    assert builders.count(leaves_of_blocks(config)) == config.paper_params()


def test_the_printed_closed_form():
    config = dataclasses.replace(SMALL, expansion=4)
    L, d, T = 2, 8, 3
    assert config.paper_params() == L * (d**2 * (12 + 11 * T) + d * (11 + 8 * T))
    assert dataclasses.replace(config, tokenizer="group", tokens=None).paper_params() is None


def test_parameters_outside_the_blocks():
    params, W = params_of(SMALL), 18  # user 5, item 9, context 4
    assert builders.count(params["tokenizer"]) == (W + 1) * 3 * 8
    assert builders.count(params["events"]) == (13 + 1) * 8 + 5 * 8
    assert builders.count(params["head"]) == K * (24 * 8 + 8 + 8 + 1)
    assert builders.count(params["token_norm"]) + builders.count(params["out_norm"]) == 16
    names = {"tokenizer", "events", "token_norm", "out_norm", "head", "block_0", "block_1"}
    assert set(params) == names
    narrow = params_of(CONFIGS[list(CONFIGS)[3]])["head"]
    assert builders.count(narrow) == K * (24 * 5 + 5 + 5 + 1)
    three = CONFIGS["sequences by time, post-norm"]
    events = 3 * ((13 + 1) * 5 + (5 + 1) * 8)
    assert builders.count(params_of(three)["events"]) == events + 3 * 8 + 5 * 8
    intent = dataclasses.replace(SMALL, sequences=3, merge="intent")
    assert builders.count(params_of(intent)["events"]) == 3 * (13 + 1) * 8 + 8 + 7 * 8


@pytest.mark.parametrize("change", [{}, {"ffn": "swiglu"}])
def test_blocks_multiply_as_often_as_the_closed_form_says(change):
    """But for the scores between S queries and NS keys, which no mask allows and we never form."""
    config = dataclasses.replace(SMALL, prune_last=False, implementation="reference", **change)
    T, d, total, skipped, n = 3, 8, 0, 0, 5
    for i, rows in enumerate(config.schedule):
        x = jnp.zeros((1, n, d)), jnp.zeros((T, 1, d))
        tokens = [
            onetrans.Tokens(**dict.fromkeys(_FIELDS, jnp.zeros((1, length), jnp.int32)))
            for length in (rows + T, n + T)
        ]
        block, params = onetrans.Block(config), {"params": params_of(config)[f"block_{i}"]}
        total += flops.count(block.apply, params, x, *tokens).matmul
        skipped += 4 * rows * T * d
        n = rows
    assert total + skipped == config.paper_flops()
    assert config.paper_flops(2) < config.paper_flops() == config.paper_flops(50 - 45)


_FIELDS = [field.name for field in dataclasses.fields(onetrans.Tokens)]


def test_figures():
    ours = {f.what: f.ours() / f.printed for f in onetrans.PAPER.figures}
    expected = [0.624, 0.78, 0.673, 0.759, 0.777, 19.06, 0.807]
    np.testing.assert_allclose(list(ours.values()), expected, rtol=2e-3)
    sizes = onetrans.PAPER.sizes
    assert (sizes["onetrans_s"].config, sizes["onetrans_l"].config) == (
        onetrans.ONETRANS_S,
        onetrans.ONETRANS_L,
    )


def test_where_flops_bend():
    unit, bends = onetrans.ONETRANS_S.history_pieces()
    assert unit == 1 and bends == (12, 224, 416, 608, 800, 992, 1190)
    intent = dataclasses.replace(SMALL, sequences=3, merge="intent", pyramid_round=1)
    assert intent.schedule == (5, 3) and intent.history_pieces() == (1, (1, 3, 5))


def no_candidates(row):
    """A batch whose row holds no candidate; row 1 of any holds no event."""
    batch = random_batch()
    sample = np.array(batch.candidate_sample)
    sample[row] = -1
    return dataclasses.replace(batch, candidate_sample=sample)


def test_bfloat16_is_near_float32_and_finite_in_empty_rows():
    batch = no_candidates(2)
    near, got = (
        score(batch),
        score(batch, dataclasses.replace(SMALL, dtype="bfloat16"), params_of(SMALL)),
    )
    assert got.dtype == np.float32 and np.isfinite(got).all() and np.isfinite(near).all()
    np.testing.assert_allclose(got, near, rtol=0.05, atol=0.05 * np.abs(near).max())


def test_what_reaches_no_logit_has_no_gradient_and_the_rest_has():
    batch = no_candidates(2)
    weights = jnp.ones((R, C, K)) * batch.candidate_mask[..., None]
    found = gradients(SMALL)(params_of(SMALL), builders.features(batch), weights)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))
    still = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in jax.tree_util.tree_leaves_with_path(found[0])
        if not np.any(x)
    }
    # The last block's S tokens are keys and values only.
    dead = {"mha/query", "ffn/ffn_in", "ffn/ffn_out"}
    assert still == {f"block_1/{x}/shared/{w}" for x in dead for w in ("kernel", "bias")}


def test_how_weights_are_initialised(monkeypatch):
    """What writes to the residual stream knows L; slots are no part of the fan-in."""

    def told(name, *, residual_layers=0, batch_axis=()):
        assert name == "small_residual"
        return nn.initializers.constant(residual_layers + 100 * (batch_axis == (0,)))

    monkeypatch.setattr(initializers, "kernel", told)
    config = dataclasses.replace(
        SMALL, own_output=True, init="small_residual", layers=7, ffn="swiglu"
    )
    _, _, x, tokens = block_io()
    params = onetrans.Block(config).init(jax.random.key(0), x, tokens, tokens)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        _, name, part, kind = ([k.key for k in path] + [None] * 4)[:4]
        if kind == "kernel":
            want = 7 * (name in ("out", "ffn_out")) + 100 * (part == "own")
            assert np.all(leaf == want), path


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"history": 0}, "history=0, expected an integer >= 1"),
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": None}, "tokens=None, expected a number with tokenizer='auto_split'"),
        ({"layers": 0}, "layers=0"),
        ({"width": 9}, "width=9 is no multiple of heads=2"),
        ({"heads": 0}, "heads=0"),
        ({"expansion": 0}, "expansion=0"),
        ({"tokenizer": "split"}, "tokenizer='split', expected one of"),
        ({"tokenizer_hidden": -1}, "tokenizer_hidden=-1"),
        ({"sequences": 0}, "sequences=0"),
        ({"merge": "type"}, "merge='type', expected one of"),
        ({"pos_emb": "rope"}, "pos_emb='rope', expected one of"),
        ({"pyramid_round": 0}, "pyramid_round=0"),
        ({"ffn": "relu"}, "ffn='relu', expected one of"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"norm_place": "both"}, "norm_place='both'"),
        ({"token_norm": "batch"}, "token_norm='batch'"),
        ({"init": "he"}, "init='he'"),
        ({"head_hidden": 0}, "head_hidden=0"),
        ({"tasks": 0}, "tasks=0"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"implementation": "cuda"}, "implementation='cuda', expected one of"),
        ({"own_weights": False, "own_output": True}, "own_output=True, expected False"),
    ],
)
def test_a_bad_config_is_refused(change, match):
    with pytest.raises(ValueError, match="onetrans.Config: " + match):
        dataclasses.replace(SMALL, **change)


def test_a_config_goes_to_json_and_back():
    config = CONFIGS["sequences by time, post-norm"]
    assert onetrans.Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def refused(features, config, match):
    init = functools.partial(onetrans.OneTrans(config).init, train=False)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(init, jax.random.key(0), features)


def test_what_does_not_fit_the_data_is_refused():
    f = builders.features(random_batch())
    refused(dataclasses.replace(f, one_time=False), SMALL, "onetrans: .* different times")
    group = dataclasses.replace(SMALL, tokenizer="group", tokens=5)
    refused(f, group, "tokens=5, but tokenizer='group' makes 3 tokens")
