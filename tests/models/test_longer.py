"""LONGER against float64 NumPy in both conventions, and what its masks and its merging promise."""

import dataclasses
import functools
import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from rankjax import flops
from rankjax.layers import transformer_block
from rankjax.models import longer
from tests import builders
from tests.references import longer as reference

SMALL = longer.Config(
    **{"history": 6, "layers": 2, "width": 8, "heads": 2, "merge": 2, "recent": 2, "tasks": 2},
    **{"inner_heads": 2, "cls_tokens": 2, "head_hidden": 5, "input_hidden": 6},
)
PAPER_ORDER = dataclasses.replace(SMALL, global_order="paper", norm="rms", history_mean=True)
POST = dataclasses.replace(
    *(SMALL,),
    **{"merge": 4, "recent": 1, "layers": 3, "inner": False, "cls_tokens": 0, "tasks": 1},
    **{"norm_place": "post", "token_norm": "none", "implementation": "reference"},
)
UNPRUNED = dataclasses.replace(SMALL, prune_last=False)
CONFIGS = {"cacheable": SMALL, "paper's order, RMS norms, mean": PAPER_ORDER, "post-norm": POST}
# Compiled for one call each: the time goes into compiling.
quick = functools.partial(
    *(jax.jit,),
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
LENGTHS, CANDIDATES = (5, 0, 3, 6), (3, 2, 1, 3)


@functools.cache
def data(time_exact=True):
    """Four unpacked rows, events at the front, with NumPy embeddings."""
    rng = np.random.default_rng(0)
    b = builders.batch(rng, lengths=LENGTHS, candidates=CANDIDATES, tasks=2)
    seconds = -np.sort(-rng.integers(1, 10**7, b.history_time.shape), axis=1)
    return dataclasses.replace(
        b,
        history_time=np.where(b.history_mask, -seconds, 0).astype(np.int32),
        schema=dataclasses.replace(b.schema, time_exact=time_exact),
    )


@functools.cache
def params_of(config, time_exact=True):
    """Every parameter off its initial 0 or 1, else a forgotten bias or scale goes unseen."""
    f = jax.eval_shape(lambda: builders.features(data(time_exact)))
    init = functools.partial(longer.LONGER(config).init, train=False)
    rng = np.random.default_rng(1)

    def draw(path, x):
        value = rng.normal(size=x.shape) * (0.3 if x.ndim == 1 else x.shape[0] ** -0.5)
        return np.float32(value + (path[-1].key == "scale"))

    shapes = jax.eval_shape(init, jax.random.key(0), f)["params"]
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def scorer(config):
    model = longer.LONGER(config)
    return quick(lambda p, f: model.apply({"params": p}, f, train=False)[0])


def score(b, config=SMALL):
    return np.asarray(scorer(config)(params_of(config, b.schema.time_exact), builders.features(b)))


@functools.cache
def captured(config):
    """(params, features) -> {module: its output} of the blocks."""
    model, names = longer.LONGER(config), ("inner_trans", "layer_1", "layer_2")

    def run(params, f):
        kept = lambda module, _: module.name in names
        _, found = model.apply({"params": params}, f, train=False, capture_intermediates=kept)
        return {k: x["__call__"][0] for k, x in found["intermediates"].items()}

    run = quick(run)
    return lambda params, f: jax.device_get(run(params, f))


@functools.cache
def derivatives(config):
    """(params, features) -> (loss, logits), gradients in both; only row 0 counts."""
    model = longer.LONGER(config)

    def loss(params, values, f):
        f = dataclasses.replace(f, **values)
        logits, aux = model.apply({"params": params}, f, train=False)
        assert aux == {} and logits.dtype == jnp.float32
        return jnp.sum(jnp.sin(logits[0, : CANDIDATES[0]])), logits

    found = quick(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return lambda params, f: jax.device_get(found(params, inputs(f), f))


def inputs(f):
    return {side: getattr(f, side) for side in ("user", "history", "candidate")}


def described(c):
    """A Config as the reference takes it."""
    names = ("merge", "recent", "heads", "inner", "inner_heads", "layers", "token_norm")
    found = {name: getattr(c, name) for name in (*names, "norm", "norm_place")}
    return found | {"cls": c.cls_tokens, "order": c.global_order, "mean": c.history_mean}


def sample(b, row):
    """(events, seconds before the request, user, candidates) of a row, for the reference."""
    side = lambda values, names, i: np.concatenate([np.float64(values[n][row, i]) for n in names])
    item = ["item", "price", "tag"]
    slots = np.flatnonzero(b.history_mask[row])
    events = [side(b.history, [*item, "action"], i) for i in slots]
    ago = list(-b.history_time[row, slots].astype(float)) if b.schema.time_exact else None
    user = side(b.user, ["age", "spend"], 0)
    own = [side(b.candidate, [*item, "hour"], i) for i in np.flatnonzero(b.candidate_mask[row])]
    return events, ago, user, own


def expected(b, config, row, params=None, **options):
    """The reference's logits of a row's valid candidates."""
    p = builders.float64(params or params_of(config, b.schema.time_exact))
    events, ago, user, candidates = sample(b, row)
    given = p, described(config), events, ago, user
    return np.stack([reference.logits(*given, x, **options) for x in candidates])


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_references(name):
    config = CONFIGS[name]
    got = score(data(), config)
    assert got.shape == (4, 4, config.tasks) and got.dtype == np.float32
    for row, n in enumerate(CANDIDATES):
        np.testing.assert_allclose(got[row, :n], expected(data(), config, row), atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_printed_convention_is_ours_reversed(name):
    """[G; H newest first] with j >= i, and [H old -> new; G] with j <= i."""
    for row in range(4):
        ours = expected(data(), CONFIGS[name], row)
        printed = expected(data(), CONFIGS[name], row, convention="printed")
        np.testing.assert_allclose(printed, ours, rtol=0, atol=1e-12)


def test_the_orders_of_globals_differ():
    p = builders.float64(params_of(SMALL))
    given = [*sample(data(), 0)[:3], sample(data(), 0)[3][0]]
    found = [
        reference.logits(p, described(SMALL) | {"order": order}, *given)
        for order in ("cacheable", "paper")
    ]
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize("config", [SMALL, POST])
def test_the_users_side_may_be_cached(config):
    p = builders.float64(params_of(config))
    got = score(data(), config)
    for row, n in enumerate(CANDIDATES):
        want = reference.logits_cached(p, described(config), *sample(data(), row))
        np.testing.assert_allclose(got[row, :n], want, rtol=0, atol=1e-5)


def test_without_exact_times_there_is_no_time_difference():
    b = data(time_exact=False)
    exact, order = (params_of(SMALL, x)["positions"].shape for x in (True, False))
    assert exact == (6, 4 + 1 + 4 + 4 + 1) and order == (6, 4 + 1 + 4 + 4)
    got = score(b)
    np.testing.assert_allclose(got[0, :3], expected(b, SMALL, 0), atol=1e-5)
    later = dataclasses.replace(b, history_time=b.history_time - 1000)
    np.testing.assert_array_equal(score(later), got)
    exact = dataclasses.replace(data(), history_time=data().history_time - 1000)
    assert np.any(score(exact) != score(data()))


@pytest.mark.parametrize("config", [SMALL, PAPER_ORDER])
def test_gradients_are_the_references(config):
    """Directional derivatives in every parameter and in every input."""
    rng, b = np.random.default_rng(2), data()
    params = params_of(config)
    _, found = derivatives(config)(params, builders.features(b))
    p, x = builders.float64(params), jax.tree.map(np.float64, inputs(b))

    def difference(leaf, direction, step=1e-5):
        """Central, of the reference; the leaf is moved in place and put back."""
        start, ends = leaf.copy(), []
        for sign in (1, -1):
            leaf[...] = start + sign * step * direction
            moved = dataclasses.replace(b, **x)
            ends.append(np.sum(np.sin(expected(moved, config, 0, params=p))))
        leaf[...] = start
        return (ends[0] - ends[1]) / (2 * step)

    moved = 0
    for leaf, got in zip(jax.tree.leaves((p, x)), jax.tree.leaves(found), strict=True):
        direction = rng.normal(size=leaf.shape)
        got = np.asarray(got, np.float64)
        want = difference(leaf, direction)
        atol = 1e-5 * np.linalg.norm(got) * np.linalg.norm(direction) + 1e-6
        np.testing.assert_allclose(np.sum(got * direction), want, rtol=1e-5, atol=atol)
        moved += abs(want) > 1e-4
    assert moved > 0.8 * len(jax.tree.leaves(found))  # biases of keys shift all logits of a row


def lay_out(b, rows, slots, S):
    """One row that holds samples `rows` of b; slots: per sample, where its events lie in order."""
    rng = np.random.default_rng(3)
    G = len(rows)
    padded = lambda x: rng.normal(size=(S, *x.shape[2:])).astype(x.dtype) if x.ndim > 2 else None
    history = {k: padded(x) for k, x in b.history.items()}
    where = np.full(S, -1, np.int32)
    times = {k: rng.integers(-9, 9, S).astype(np.int32) for k in ("history_time", "history_order")}
    for g, (row, at) in enumerate(zip(rows, slots, strict=True)):
        n = LENGTHS[row]
        where[at] = g
        for k, x in history.items():
            x[at] = b.history[k][row, :n]
        for k, x in times.items():
            x[at] = getattr(b, k)[row, :n]
    flat = lambda x: x[list(rows)].reshape(1, -1, *x.shape[2:])
    candidate = np.where(b.candidate_mask[list(rows)], np.arange(G)[:, None], -1)
    return dataclasses.replace(
        builders.features(b),
        user={k: flat(x) for k, x in b.user.items()},
        history={k: x[None] for k, x in history.items()},
        candidate={k: flat(x) for k, x in b.candidate.items()},
        history_sample=where[None],
        candidate_sample=candidate.reshape(1, -1).astype(np.int32),
        **{k: x[None] for k, x in times.items()},
        **{k: flat(getattr(b, k)) for k in ("candidate_time", "candidate_order")},
        history_action=np.zeros((1, S), np.int32),
    )


@pytest.mark.parametrize("config", [SMALL, PAPER_ORDER])
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(draw=strategies.data())
def test_a_score_does_not_depend_on_where_events_lie(config, draw):
    """Three samples in one row, one without events, shuffled into each other and into padding.

    In a row so tight an older group stands among the newest ones.
    """
    S = 11
    rows = [1, *draw.draw(strategies.sampled_from([(0, 2), (3, 2), (0, 3)]))]
    rows = draw.draw(strategies.permutations(rows))
    total = sum(LENGTHS[row] for row in rows)
    owner = [g for g, row in enumerate(rows) for _ in range(LENGTHS[row])] + [3] * (S - total)
    owner = np.array(draw.draw(strategies.permutations(owner)))
    slots = [np.flatnonzero(owner == g) for g in range(3)]
    got = scorer(config)(params_of(config), lay_out(data(), rows, slots, S)).reshape(3, 4, -1)
    want = score(data(), config)
    for g, row in enumerate(rows):
        n = CANDIDATES[row]
        np.testing.assert_allclose(got[g, :n], want[row, :n], rtol=0, atol=2e-6)


def test_only_its_own_group_sees_an_event_before_the_layers():
    b = data()
    run = functools.partial(captured(UNPRUNED), params_of(SMALL))
    before = np.asarray(run(builders.features(b))["inner_trans"])
    for slot in range(5):  # row 0 holds five events: [., e0] [e1, e2] [e3, e4]
        history = {k: x.copy() for k, x in b.history.items()}
        history["item"][0, slot] += 1
        after = run(builders.features(dataclasses.replace(b, history=history)))["inner_trans"]
        changed = (before != np.asarray(after)).reshape(4, 3, -1).any(axis=2)
        want = np.zeros((4, 3), bool)
        want[0, (slot + 1) // 2] = True
        np.testing.assert_array_equal(changed, want)


def test_the_users_side_does_not_know_the_candidates():
    b = data()
    other = {k: x + 1 for k, x in b.candidate.items()}
    for order, user_side in (("cacheable", 2 + 3), ("paper", 2)):
        config = dataclasses.replace(UNPRUNED, global_order=order)
        run = functools.partial(captured(config), params_of(config))
        before = run(builders.features(b))
        after = run(builders.features(dataclasses.replace(b, candidate=other)))
        for name in ("layer_1", "layer_2"):
            same = np.asarray(before[name] == after[name]).all(axis=2)
            assert same[:, :user_side].all(), "history, then the user's globals"
            rest = same[:, user_side:]
            valid = np.repeat(b.candidate_mask, 1 if order == "cacheable" else 4, axis=1)
            assert not rest[valid].any()


def test_recent_queries_are_the_newest_rows_of_full_self_attention():
    every = dataclasses.replace(UNPRUNED, recent=3)
    f, params = builders.features(data()), params_of(SMALL)
    full = captured(every)(params, f)["layer_1"]
    some = captured(UNPRUNED)(params, f)["layer_1"]
    assert full.shape[1] == 3 + 3 + 4 and some.shape[1] == 2 + 3 + 4
    groups = -(-np.array(LENGTHS) // 2)  # of each row; empty slots hold nothing
    there = np.arange(9) >= 2 - np.minimum(groups, 2)[:, None]
    there[:, 5:] &= data().candidate_mask
    np.testing.assert_allclose(some[there], full[:, 1:][there], rtol=0, atol=1e-6)
    more = dataclasses.replace(every, recent=50)  # no more than there are
    shape = lambda c: jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda: layer_tokens(c)))
    assert shape(more) == shape(every)


def layer_tokens(config):
    return [mask[:2] for mask in longer.masks_of(config, builders.features(data())).values()]


def test_inner_trans_that_adds_nothing_leaves_the_concatenation():
    silent = jax.tree.map(np.copy, params_of(SMALL))
    for name in ("out", "ffn_out"):
        silent["inner_trans"][name] = jax.tree.map(np.zeros_like, silent["inner_trans"][name])
    got = scorer(SMALL)(silent, builders.features(data()))
    plain = dataclasses.replace(SMALL, inner=False)
    for row, n in enumerate(CANDIDATES):
        want = expected(data(), plain, row, params=silent)
        np.testing.assert_allclose(got[row, :n], want, rtol=0, atol=1e-5)


def test_merging_by_one_is_not_merging_and_old_events_share_the_last_position():
    config = dataclasses.replace(SMALL, merge=1, inner=False, recent=9, history=3)
    b, params = data(), params_of(config)
    got = score(b, config)
    p = params | {"positions": params["positions"][[0, 1, 2, 2, 2, 2]]}
    for row in range(4):
        events, ago, *_ = sample(b, row)
        assert len(reference.merged(events, ago, p, described(config))) == len(events)
        want = expected(b, config, row, params=p)
        np.testing.assert_allclose(got[row, : CANDIDATES[row]], want, rtol=0, atol=1e-5)
    reads = allowed(config, builders.features(data()))["layer 1"]
    assert reads.shape == (6 + 3 + 4, 6 + 3 + 4) and reads[-4, :6].sum() == 5


def allowed(config, f):
    """{title: who reads whom, [N, M]} of the first row."""
    masks = lambda f: {
        k: rule.allow(q, m)[0] for k, (q, m, rule) in longer.masks_of(config, f).items()
    }
    return quick(masks)(f)


def table(*rows):
    return np.array([[x == "1" for x in row.replace(" ", "")] for row in rows])


def small_row():
    """One row: five events of sample 0, one of sample 1, candidates of 0, 1 and 0."""
    features = builders.features(builders.batch(np.random.default_rng(0)))
    one = lambda *x: jnp.asarray([x], jnp.int32)
    order = {"history_order": one(-5, -4, -3, -1, -2, -1), "candidate_order": one(0, 0, 0)}
    return dataclasses.replace(
        features,
        user={name: jnp.zeros((1, 2, 4)) for name in features.user},
        history_sample=one(0, 0, 0, 1, 0, 0),
        history_time=one(-50, -40, -30, -10, -20, -10),
        candidate_sample=one(0, 1, 0),
        candidate_time=one(0, 0, 0),
        **order,
    )


def test_the_mask_of_a_packed_row():
    config = dataclasses.replace(SMALL, cls_tokens=1, inner=False, prune_last=False)
    found = allowed(config, small_row())
    assert list(found) == ["layer 1", "layer 2"]
    # Groups a1 (oldest) of sample 0, then a2, a3 and b1 of sample 1; globals ua, ca, ub, cb;
    # candidates A, B, A'. Layer 1's queries are the two newest groups of each sample: of b there
    # is one only, so a1's slot stands among them and reads nothing.
    first = table(
        "0000 0000 000",
        "1100 0000 000",
        "1110 0000 000",
        "0001 0000 000",
        "1110 1000 000",
        "1110 1100 000",
        "0001 0010 000",
        "0001 0011 000",
        "1110 1100 100",
        "0001 0011 010",
        "1110 1100 001",
    )
    np.testing.assert_array_equal(found["layer 1"], first)
    later = first.copy()
    later[:, 0] = False  # nobody keeps a1
    np.testing.assert_array_equal(found["layer 2"], later)
    pruned = allowed(dataclasses.replace(config, prune_last=True), small_row())
    np.testing.assert_array_equal(pruned["layer 2"], later[4:])


def test_the_mask_in_the_papers_order():
    config = dataclasses.replace(SMALL, cls_tokens=1, global_order="paper", layers=1)
    found = allowed(config, small_row())
    # Each candidate, then its copies of the user's token and of CLS, which read it.
    want = table(
        "1110 100 000 000",
        "1110 110 000 000",
        "1110 111 000 000",
        "0001 000 100 000",
        "0001 000 110 000",
        "0001 000 111 000",
        "1110 000 000 100",
        "1110 000 000 110",
        "1110 000 000 111",
    )
    np.testing.assert_array_equal(found["layer 1"], want)


def test_the_last_layer_may_compute_the_globals_only():
    params, f = params_of(SMALL), builders.features(data())
    pruned, full = (derivatives(c)(params, f) for c in (SMALL, UNPRUNED))
    np.testing.assert_allclose(pruned[0][1], full[0][1], rtol=0, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (pruned[1], full[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


def test_what_is_pruned():
    for config, rows in ((SMALL, 3 + 4), (UNPRUNED, 2 + 3 + 4), (PAPER_ORDER, 2 + 4 * 4)):
        queries, _ = jax.eval_shape(functools.partial(layer_tokens, config))[-1]
        assert queries.role.shape == (4, rows)


@functools.cache
def shapes(config, user=True, time_exact=True):
    f = jax.eval_shape(lambda: builders.features(data(time_exact)))
    if not user:
        kept = tuple(x for x in f.schema.features if x.side != "user")
        f = dataclasses.replace(f, user={}, schema=dataclasses.replace(f.schema, features=kept))
    init = functools.partial(longer.LONGER(config).init, train=False)
    return jax.eval_shape(init, jax.random.key(0), f)["params"]


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("merge", [1, 2, 4])
def test_paper_params_is_the_count_of_the_blocks(norm, merge):
    for inner in (False, True):
        config = dataclasses.replace(SMALL, norm=norm, merge=merge, inner=inner)
        params = shapes(config)
        blocks = [x for name, x in params.items() if name.startswith(("layer_", "inner_trans"))]
        assert builders.count(blocks) == config.paper_params()
    w, d = 8, 8 // merge
    if norm == "layer":
        assert config.paper_params() == 2 * (12 * w**2 + 13 * w) + 12 * d**2 + 13 * d


@pytest.mark.parametrize("time_exact", [True, False])
@pytest.mark.parametrize("user", [True, False])
def test_dense_parameters(user, time_exact):
    c = dataclasses.replace(SMALL, history_mean=True, cls_tokens=3)
    W_e, W_u, W_c = 4 + 1 + 4 + 4 + time_exact, 4 + 1, 4 + 1 + 4 + 4
    w, d, h, F, m = 8, 4, 6, 5, 3 + user
    events = (W_e + 1) * h + (h + 1) * d + 6 * W_e + 2 * d
    tokens = (W_u + 1) * w * user + 3 * w + (W_c + 1) * w + 2 * w
    head = 2 * w + 2 * (((m + 2) * w + 1) * F + F + 1)
    assert builders.count(shapes(c, user, time_exact)) == c.paper_params() + events + tokens + head
    assert dataclasses.replace(c, input_hidden=None, head_hidden=None) != c
    wide = shapes(dataclasses.replace(c, input_hidden=None, head_hidden=None), user, time_exact)
    assert wide["event_in"]["kernel"].shape == (W_e, 8)
    assert wide["head"]["hidden_0"]["kernel"].shape == ((m + 2) * 8, 8)


def matmul(function, *args):
    return flops.count(function, *args).matmul


@pytest.mark.parametrize(
    ("merge", "total"), [(1, 587_202_560), (4, 335_544_320)], ids=["plain", "merged by 4"]
)
def test_a_layer_multiplies_as_often_as_the_paper_says(merge, total):
    config = longer.Config(history=2048, layers=1, width=32 * merge, merge=merge, inner=False)
    N, w = 2048 // merge, config.width
    block = transformer_block.Block(config.heads, implementation="reference")
    x = jax.ShapeDtypeStruct((1, N, w), jnp.float32)
    tokens = jax.eval_shape(lambda: longer.masks_of(*bare(config, N * merge))["layer 1"][1])
    tokens = jax.tree.map(lambda t: jax.ShapeDtypeStruct((1, N), t.dtype), tokens)
    run = functools.partial(block.apply, rule=longer.RULE, train=False)
    init = functools.partial(block.init, rule=longer.RULE, train=False)
    params = jax.eval_shape(init, jax.random.key(0), x, tokens, tokens)
    L, K, d = 2048, merge, 32
    assert matmul(run, params, x, tokens, tokens) == config.paper_flops(2048) == total
    assert total == 24 * L * K * d**2 + 4 * L**2 * d // K
    assert builders.count(params) == 12 * K**2 * d**2 + 13 * K * d == config.paper_params()
    # Layer 1 with fewer queries than keys.
    some = jax.tree.map(lambda t: jax.ShapeDtypeStruct((1, 103), t.dtype), tokens)
    q, s = 103, N
    want = 2 * q * w**2 + 4 * s * w**2 + 2 * q * w**2 + 16 * q * w**2 + 4 * q * s * w
    assert matmul(run, params, x, some, tokens) == want == transformer_block.flops(w, q, s)


def bare(config, S, C=1):
    """(config, features) of one row of S events, as `jax.eval_shape` takes them."""
    f = builders.features(
        builders.batch(np.random.default_rng(0), lengths=(S,), candidates=(C,), S=S, C=C)
    )
    return config, f


def test_inner_trans_adds_what_the_closed_form_says():
    with_, without = (
        dataclasses.replace(longer.LONGER_2000, inner=x).paper_flops() for x in (True, False)
    )
    L, d, K = 2000, 32, 8
    assert with_ - without == 24 * L * d**2 + 4 * K * L * d
    # Lengths that K does not divide are rounded up.
    assert longer.LONGER_2000.paper_flops(1993) == longer.LONGER_2000.paper_flops()


@pytest.mark.parametrize(("S", "C"), [(1, 1), (4, 2), (5, 3), (11, 2)])
@pytest.mark.parametrize("order", ["cacheable", "paper"])
def test_how_flops_depend_on_the_lengths(S, C, order):
    """Through M = ceil(S / K) and Q = min(k, M), and through C."""
    c = dataclasses.replace(SMALL, implementation="reference", global_order=order, layers=3)
    f = jax.eval_shape(lambda: bare(c, S, C)[1])
    params = shapes(c)
    got = matmul(functools.partial(longer.LONGER(c).apply, train=False), {"params": params}, f)
    K, k, w, d, h, F, m = 2, 2, 8, 4, 6, 5, 3
    M = -(-S // K)
    Q = min(k, M)
    G = m + C if order == "cacheable" else C * (1 + m)
    want = 2 * K * M * (14 * h + h * d) + M * transformer_block.flops(d, K, K)
    want += 2 * 5 * w + 2 * 13 * w * C  # user's and candidates' tokens
    layers = [(Q + G, M + G), (Q + G, Q + G), (G, Q + G)]
    want += sum(transformer_block.flops(w, q, s) for q, s in layers)
    want += 2 * C * c.tasks * ((m + 1) * w * F + F)
    assert got == want
    assert c.history_pieces() == (K, (K * k,))


def test_padding_is_finite_in_bfloat16_with_gradients():
    """Row 0 without any history, and a row without candidates."""
    config = dataclasses.replace(SMALL, dtype="bfloat16", history_mean=True, layers=1)
    b, params = data(), params_of(config)
    sample = np.array(b.candidate_sample)
    sample[2] = -1
    b = dataclasses.replace(b, candidate_sample=sample)
    (_, logits), full = derivatives(config)(params, builders.features(b))
    assert not [x.shape for x in jax.tree.leaves(full[0]) if not np.any(x != 0)]
    for row, n in enumerate(CANDIDATES):
        if row != 2:
            want = expected(b, config, row)
            np.testing.assert_allclose(logits[row, :n], want, rtol=0.05, atol=0.1)
            assert np.abs(logits[row, :n] - want).max() > 1e-4  # it is not float32
    empty = dataclasses.replace(b, history_sample=np.full_like(b.history_sample, -1))
    (_, logits_of_none), none = derivatives(config)(params, builders.features(empty))
    for x in jax.tree.leaves((logits, full, logits_of_none, none)):
        assert np.all(np.isfinite(x))


def test_without_history_the_globals_still_score():
    b = data()
    none = dataclasses.replace(b, history_sample=np.full_like(b.history_sample, -1))
    got = score(none)
    np.testing.assert_allclose(got[0, :3], expected(none, SMALL, 0), rtol=0, atol=1e-5)


def test_a_schema_without_user_features_packs_too():
    b = data()
    kept = tuple(x for x in b.schema.features if x.side != "user")
    b = dataclasses.replace(b, user={}, schema=dataclasses.replace(b.schema, features=kept))
    rows = params_of(SMALL)["head"]["hidden_0"]["kernel"]
    params = {k: x for k, x in params_of(SMALL).items() if k != "user"}
    head = params["head"] | {f"hidden_{k}": {"kernel": rows[:24], "bias": rows[0]} for k in (0, 1)}
    params |= {"head": head}
    together = scorer(SMALL)(params, builders.packed(b, 2)).reshape(4, 4, 2)
    for row, n in enumerate(CANDIDATES):
        p = builders.float64(params)
        events, ago, _, candidates = sample(data(), row)
        given = p, described(SMALL), events, ago, None
        want = [reference.logits(*given, x) for x in candidates]
        np.testing.assert_allclose(together[row, :n], want, rtol=0, atol=1e-5)


def test_dropout_acts_in_training_only():
    model = longer.LONGER(dataclasses.replace(SMALL, dropout=0.5, layers=1))
    f, params = builders.features(data()), {"params": params_of(SMALL)}

    @quick
    def run(seed):
        return model.apply(params_jax, f, train=True, rngs={"dropout": jax.random.key(seed)})[0]

    params_jax = jax.tree.map(jnp.asarray, params)
    assert np.any(run(0) != run(1))
    jax.eval_shape(lambda: model.apply(params_jax, f, train=False))  # asks for no random bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": 0}, "history=0, expected an integer >= 1"),
        ({"layers": 0}, "layers=0, expected an integer >= 1"),
        ({"history": 1}, "history=1, expected at least self.merge=2"),
        ({"recent": 0}, "recent=0, expected an integer >= 1"),
        ({"merge": 3}, "width=8, expected a multiple of merge=3"),
        ({"heads": 3}, "width=8, expected a multiple of heads=3"),
        ({"inner_heads": 3}, "inner_heads=3, expected a divisor of width / merge = 4"),
        ({"cls_tokens": -1}, "cls_tokens=-1, expected an integer >= 0"),
        ({"global_order": "printed"}, "global_order='printed', expected one of"),
        ({"inner": "yes"}, "inner='yes', expected True or False"),
        ({"input_hidden": 0}, "input_hidden=0, expected an integer >= 1"),
        ({"head_hidden": 0}, "head_hidden=0, expected an integer >= 1"),
        ({"tasks": 0}, "tasks=0, expected an integer >= 1"),
        ({"token_norm": "batch"}, "token_norm='batch', expected one of"),
        ({"norm": "batch"}, "norm='batch', expected one of"),
        ({"norm_place": "both"}, "norm_place='both', expected one of"),
        ({"init": "he"}, "init='he', expected one of"),
        ({"dropout": 1.0}, "dropout=1.0, expected 0 <= dropout < 1"),
        ({"implementation": "cuda"}, "implementation='cuda', expected one of"),
        ({"dtype": "float16"}, "dtype='float16', expected one of"),
    ],
)
def test_refused_configurations(change, message):
    with pytest.raises(ValueError, match=rf"longer\.Config: {message}"):
        dataclasses.replace(SMALL, **change)


def test_a_config_goes_to_json_and_back():
    for config in CONFIGS.values():
        assert longer.Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def init(f):
    model = longer.LONGER(SMALL)
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), f)


def test_windows_are_refused():
    f = builders.features(builders.batch(np.random.default_rng(0), one_time=False))
    assert not longer.LONGER.windows
    with pytest.raises(ValueError, match=r"longer: .* different times"):
        init(f)


def test_a_schema_without_item_features_is_refused():
    f = builders.features(data())
    kept = tuple(x for x in f.schema.features if x.side != "item")
    f = dataclasses.replace(f, schema=dataclasses.replace(f.schema, features=kept))
    with pytest.raises(ValueError, match="longer: the schema has no item feature"):
        init(f)
