"""DLRM-v3 against float64 NumPy: layers, masks, positions and times, heads, and its refusals."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankjax import flops
from rankjax.layers import sequence, swish_norm
from rankjax.models import dlrm_v3
from rankjax.packing import pack
from tests import builders, finite_differences
from tests.references import dlrm_v3 as reference

SMALL = dlrm_v3.Config(history=8, layers=2, width=8, heads=2, tasks=2, time_buckets=12)
CONFIGS = {
    "default": SMALL,
    "full context, window, groups, hour and weekday": dataclasses.replace(
        SMALL,
        **{"context_mask": "full", "attn_window": 2, "group_norm": True, "postprocessor": "time"},
        **{"qk_width": 3, "v_width": 5, "heads": 3, "attn_norm": "const", "norm_constant": 3.0},
        **{"context_min_history": 4, "layers": 1},
    ),
    "causal window, no context, short tables, unit length": dataclasses.replace(
        SMALL,
        **{"attn_window": 1, "context": "none", "positions": 4, "time_buckets": 3},
        **{"postprocessor": "l2", "qk_scale": 0.3, "attn_norm": "valid_len", "layers": 1},
        **{"head_hidden": 5, "content_hidden": 3},
    ),
}
CONFIGS["full context, no times"] = dataclasses.replace(
    SMALL, context_mask="full", time_embedding=False, implementation="reference"
)
LENGTHS, CANDIDATES = (5, 0, 3, 6), (4, 2, 1, 3)
FIELDS = ("user", "history", "candidate")
# Programs this small run once: compiling them is what takes time, and this halves it.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def batch(seed=0, time_exact=True, one_time=True):
    """Four unpacked rows of NumPy embeddings: events seconds to days before the request, some at
    one time."""
    rng = np.random.default_rng(seed)
    b = builders.batch(
        rng, lengths=LENGTHS, candidates=CANDIDATES, S=7, C=4, tasks=2, one_time=one_time
    )
    gaps = rng.choice([0, 100, 2000, 30_000], (4, 7))
    ages = 5 + np.cumsum(gaps[:, ::-1], axis=1)[:, ::-1]
    # The schema's hour is the clock's, so that "time" has something to read.
    clocked = tuple(
        dataclasses.replace(f, derive="hour") if f.name == "hour" else f for f in b.schema.features
    )
    return dataclasses.replace(
        b,
        schema=dataclasses.replace(b.schema, features=clocked, time_exact=time_exact),
        history_time=np.where(b.history_mask, 500 - ages, 0).astype(np.int32),
        candidate_time=np.where(b.candidate_mask, 500, 0).astype(np.int32),
    )


BATCH = batch()


@functools.cache
def scorer(config):
    return quick(lambda p, f: dlrm_v3.DLRMv3(config).apply({"params": p}, f, train=False)[0])


@functools.cache
def params_of(config, time_exact=True):
    """Random parameters off their initial values, else a forgotten bias or scale goes unseen."""
    f = jax.eval_shape(lambda: builders.features(batch(time_exact=time_exact)))
    init = functools.partial(dlrm_v3.DLRMv3(config).init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), f)["params"]
    rng = np.random.default_rng(1)

    def draw(path, x):
        value = rng.normal(size=x.shape) * (0.3 if x.ndim == 1 else x.shape[0] ** -0.5)
        return np.float32(value + ("scale" in path[-1].key))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def score(b, config=SMALL):
    params = params_of(config, b.schema.time_exact)
    return np.asarray(scorer(config)(params, builders.features(b)))


def settings_of(config, exact, n):
    """The Config as the reference takes it, for a sample of n events."""
    Q, V = config.head_widths
    context = 2 if config.context == "prefix" else 0
    normalizers = {
        "static_max": context + config.history + 1,
        "const": config.norm_constant,
        "valid_len": context + n + 1,
    }
    return {
        **{"heads": config.heads, "qk": Q, "v": V, "layers": config.layers},
        "scale": Q**-0.5 if config.qk_scale is None else config.qk_scale,
        "normalizer": normalizers[config.attn_norm],
        "window": config.attn_window,
        "full": config.context_mask == "full" and context > 0,
        "group_norm": config.group_norm,
        "buckets": config.time_buckets if exact and config.time_embedding else None,
        "post": config.postprocessor,
        "enough": n >= config.context_min_history,
    }


def expected(b, config, row, params):
    """The reference's logits of one unpacked row's valid candidates; embeddings as b holds them."""
    side = lambda values, names, i: np.concatenate([np.float64(values[n][row, i]) for n in names])
    item = ["item", "price", "tag"]
    hour = lambda i: side(b.candidate, ["hour"], i)
    events = [
        (side(b.history, item, i), side(b.history, ["action"], i), b.history_time[row, i])
        for i in np.flatnonzero(b.history_mask[row])
    ]
    candidates = [
        (side(b.candidate, item, i), hour(i), hour(i), b.candidate_time[row, i])
        for i in np.flatnonzero(b.candidate_mask[row])
    ]
    user = [(n, side(b.user, [n], 0)) for n in ("age", "spend")]
    user = user if config.context == "prefix" else []
    c = settings_of(config, b.schema.time_exact, len(events))
    return reference.logits(params, c, user, events, candidates)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_references(name):
    b, config = batch(), CONFIGS[name]
    got, params = score(b, config), builders.float64(params_of(config))
    assert got.shape == (4, 4, 2) and got.dtype == np.float32
    for row, n in enumerate(CANDIDATES):
        np.testing.assert_allclose(got[row, :n], expected(b, config, row, params), atol=1e-5)


WEIGHTS = np.random.default_rng(3).normal(size=(4, 4, 2))
WEIGHTS[2:] = 0


@functools.cache
def gradients(config):
    """(d parameters, d embeddings) of a weighted sum of the logits of rows 0 and 1."""
    b = batch()

    @quick
    @jax.grad
    def gradient(at):
        f = dataclasses.replace(builders.features(b), **at[1])
        logits, _ = dlrm_v3.DLRMv3(config).apply({"params": at[0]}, f, train=False)
        return jnp.sum(jnp.where(f.candidate_mask[..., None], logits * WEIGHTS, 0))

    return gradient((params_of(config), {field: getattr(b, field) for field in FIELDS}))


@pytest.mark.parametrize("name", list(CONFIGS)[:3])
def test_gradients_are_the_references(name):
    """By parameters and by every feature's embeddings, along a random direction of each."""
    b, config = batch(), CONFIGS[name]

    def loss(at):
        embedded = dataclasses.replace(b, **at[1])
        # Row 1 has no history.
        found = [(expected(embedded, config, row, at[0]), WEIGHTS[row]) for row in (0, 1)]
        return sum(float((logits * w[: len(logits)]).sum()) for logits, w in found)

    at = (params_of(config), {field: getattr(b, field) for field in FIELDS})
    unread = lambda name: config.context == "none" and "'user'" in name
    rng = np.random.default_rng(3)
    finite_differences.check(loss, at, gradients(config), rng, zero=unread)


def test_without_exact_times_there_are_no_times():
    b = batch(time_exact=False)
    params = params_of(SMALL, False)
    assert list(params["places"]) == ["positions"]
    got = score(b)
    want = expected(b, SMALL, 0, builders.float64(params))
    np.testing.assert_allclose(got[0], want, atol=1e-5)
    np.testing.assert_array_equal(
        got, score(dataclasses.replace(b, history_time=b.history_time * 7))
    )
    exact = batch()
    moved = score(dataclasses.replace(exact, history_time=exact.history_time * 7))
    assert np.any(moved != score(exact))
    later = dataclasses.replace(
        exact, history_time=exact.history_time + 999, candidate_time=exact.candidate_time + 999
    )
    valid = exact.candidate_mask
    np.testing.assert_array_equal(score(later)[valid], score(exact)[valid])


def allowed(config, b):
    """{title: bool [R, N, M]} of the tokens that are no padding."""
    found = {}
    for title, (q, k, rule) in dlrm_v3.masks_of(config, builders.features(b)).items():
        found[title] = np.asarray(rule.allow(q, k))
    return found


@pytest.mark.parametrize("window", [None, 0, 1, 3])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_masks_are_the_codes(mask, window):
    b = batch()
    config = dataclasses.replace(SMALL, context_mask=mask, attn_window=window, prune_last=False)
    table = allowed(config, b)["all layers"]
    for row, (n, m) in enumerate(zip(LENGTHS, CANDIDATES)):
        there = [0, 1, *range(2, 2 + n), *range(9, 9 + m)]
        want = reference.allow(2, n, m, mask == "full", window)
        np.testing.assert_array_equal(table[row][np.ix_(there, there)], want)
        absent = np.setdiff1d(np.arange(13), there)
        assert not table[row][absent].any() and not table[row][:, absent].any()


def test_m_falcons_mask_without_context():
    """allow[i, j] = (j <= i) and not (i >= n and j >= n and i != j), for 5 events, 4 candidates."""
    config = dataclasses.replace(SMALL, context="none")
    found = allowed(config, batch())
    i, j = np.mgrid[:9, :9]
    want = (j <= i) & ~((i >= 5) & (j >= 5) & (i != j))
    there = [*range(5), *range(7, 11)]
    assert list(found) == ["layers before the last", "last layer"]
    np.testing.assert_array_equal(found["layers before the last"][0][np.ix_(there, there)], want)
    np.testing.assert_array_equal(found["last layer"][0][:, there], want[5:])


@pytest.mark.parametrize("group", [1, 2])
def test_micro_batches_of_candidates_score_like_all_at_once(group):
    """M-FALCON with b_m = `group`."""
    b = batch()
    whole = score(b)
    for start in range(0, 4, group):
        cut = slice(start, start + group)
        fields = ("candidate_sample", "candidate_time", "candidate_order", "labels", "weights")
        part = dataclasses.replace(
            b,
            candidate={k: x[:, cut] for k, x in b.candidate.items()},
            **{name: getattr(b, name)[:, cut] for name in fields},
        )
        valid = part.candidate_mask
        np.testing.assert_allclose(score(part)[valid], whole[:, cut][valid], rtol=0, atol=1e-6)


def test_a_later_token_changes_no_earlier_row():
    """The rows of the first layer: causal, candidates apart, and nothing from padding."""
    config = dataclasses.replace(SMALL, prune_last=False)
    f = builders.features(batch())
    (mask,) = dlrm_v3.masks_of(config, f).values()
    layer, params = dlrm_v3.STULayer(config), {"params": params_of(SMALL)["layer_0"]}
    x = np.random.default_rng(0).normal(size=(4, 13, 8)).astype("f4")
    run = jax.jit(lambda x: layer.apply(params, x, mask, 9.0, train=False))
    before = np.asarray(run(x))
    for j in range(13):
        moved = x.copy()
        moved[0, j] += np.arange(8) % 3  # a constant would be lost in the norm
        changed = (np.asarray(run(moved)) != before).any(axis=-1)
        allow = np.asarray(mask[2].allow(mask[0], mask[1]))[0, :, j]
        np.testing.assert_array_equal(changed[0], allow | (np.arange(13) == j))
        assert not changed[1:].any()


@pytest.mark.parametrize("name", ["default", "full context, no times"])
def test_the_last_layer_may_compute_the_candidates_only(name):
    pruned, b = CONFIGS[name], batch()
    whole = dataclasses.replace(pruned, prune_last=False)
    valid, params = b.candidate_mask, params_of(pruned)
    want = np.asarray(scorer(whole)(params, builders.features(b)))
    np.testing.assert_allclose(score(b, pruned)[valid], want[valid], rtol=0, atol=2e-6)
    if name == "default":
        for got, want in zip(*(jax.tree.leaves(gradients(c)) for c in (pruned, whole))):
            scale = np.abs(want).max()
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_holes_in_the_history_and_what_stands_there_change_nothing(data):
    """Events keep their order, slots between them are padding that holds anything."""
    b, want = BATCH, score(BATCH)
    width, fields = 11, {}
    slots = [
        np.sort(data.draw(st.permutations(range(width)).map(lambda p, n=n: p[:n]))).astype(int)
        for n in LENGTHS
    ]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))

    def spread(x, noise):
        out = noise
        for row, n in enumerate(LENGTHS):
            out[row, slots[row]] = x[row, :n]
        return out

    for name in ("history_time", "history_order"):
        noise = rng.integers(-50, 50, (4, width)).astype(np.int32)
        fields[name] = spread(getattr(b, name), noise)
    fields["history_sample"] = spread(b.history_sample, np.full((4, width), -1, np.int32))
    fields["history"] = {
        k: spread(x, rng.normal(size=(4, width, x.shape[-1])).astype("f4"))
        for k, x in b.history.items()
    }
    got = score(dataclasses.replace(b, **fields))
    valid = b.candidate_mask
    np.testing.assert_allclose(got[valid], want[valid], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("per_row", "name"), zip((2, 4, 2), CONFIGS))
def test_packed_rows_score_as_separate_rows(per_row, name):
    b, config = batch(), CONFIGS[name]
    together = score(pack(b, per_row), config).reshape(4, 4, 2)
    valid = b.candidate_mask
    np.testing.assert_allclose(together[valid], score(b, config)[valid], rtol=0, atol=5e-6)


def test_user_features_count_from_a_number_of_events_on():
    b = batch()
    other = dataclasses.replace(b, user={k: x + 1 for k, x in b.user.items()})
    for least, counted in ((0, [1, 1, 1, 1]), (5, [1, 0, 0, 1])):
        config = dataclasses.replace(SMALL, context_min_history=least)
        moved = (score(b, config) != score(other, config)).any(axis=2)
        np.testing.assert_array_equal(moved[:, 0], np.bool_(counted))


def test_a_candidates_action_is_one_learned_vector():
    b = batch()
    assert "action" not in b.candidate
    params = dict(params_of(SMALL))
    assert params["target_action"].shape == (4,)
    f, before = builders.features(b), score(b)
    params["target_action"] = params["target_action"] + 1
    moved = np.asarray(scorer(SMALL)(params, f)) != before
    assert moved.any(axis=2)[b.candidate_mask].all()


def counted(config, **options):
    b = builders.features(batch(**options))
    init = functools.partial(dlrm_v3.DLRMv3(config).init, train=False)
    return jax.eval_shape(init, jax.random.key(0), b)["params"]


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts(name):
    c, params = CONFIGS[name], counted(CONFIGS[name])
    d, F, M = c.width, c.content_hidden or c.width // 2, c.head_hidden or c.width
    network = lambda W, F: F * (W + d + 3) + 3 * d
    I, A, X, U, context = 9, 4, 4, (4, 1), 2 if c.context == "prefix" else 0
    want = network(I, F) + network(A, F) + A + network(X, F) + network(I, M)
    want += sum(u * d + d for u in U) if context else 0
    want += (c.positions or context + c.history + 1) * d + c.paper_params()
    want += (c.time_buckets + 1) * d if c.time_embedding else 0
    want += {"l2": 0, "layer": 2 * d, "time": 2 * d + (d + 4) * d + d}[c.postprocessor]
    want += M * d + 3 * M + M * c.tasks + c.tasks
    assert builders.count(params) == want
    assert network(I, F) == swish_norm.parameters(I, F, d)
    layers = [x for key, x in params.items() if key.startswith("layer_")]
    assert builders.count(layers) == c.paper_params()


def test_figures_and_sizes():
    for figure in dlrm_v3.PAPER.figures:
        assert figure.ours() == figure.printed
    size = dlrm_v3.DLRM_V3_MLPERF
    assert size.paper_params() == 9_195_520
    n, d = 1000, 512
    assert size.paper_flops(n) == 5 * (14 * n * d**2 + 4 * n**2 * d)
    assert size.paper_flops() == size.paper_flops(16_385)
    params = counted(dataclasses.replace(size, layers=1))
    assert builders.count(params["layer_0"]) == 1_839_104
    assert params["places"]["positions"].shape == (8192, 512)
    assert params["content"]["in"]["kernel"].shape == (9, 256)
    assert params["head_in"]["kernel"].shape == (512, 512)


def test_a_layer_multiplies_as_often_as_the_closed_form_says():
    config = dataclasses.replace(
        SMALL, **{"layers": 1, "implementation": "reference", "qk_width": 3, "v_width": 5}
    )
    n = config.static_max()
    x_rnd = jax.ShapeDtypeStruct((1, n, config.width), jnp.float32)
    numbers = jax.ShapeDtypeStruct((1, n), jnp.int32)
    names = [f.name for f in dataclasses.fields(sequence.Tokens)]
    tokens = jax.eval_shape(lambda x: sequence.Tokens(**dict.fromkeys(names, x)), numbers)
    layer, rule = dlrm_v3.STULayer(config), dlrm_v3.MaskRule()

    def run(params, x, tokens):
        return layer.apply(params, x, (tokens, tokens, rule), 9.0, train=False)

    init = lambda key, x, tokens: layer.init(key, x, (tokens, tokens, rule), 9.0, train=False)
    params = jax.eval_shape(init, jax.random.key(0), x_rnd, tokens)
    assert flops.count(run, params, x_rnd, tokens).matmul == config.paper_flops()


def test_empty_histories_and_rows_are_finite_in_bfloat16_with_gradients():
    config = dataclasses.replace(SMALL, dtype="bfloat16", layers=1)
    b = batch()
    sample = np.array(b.candidate_sample)
    sample[2] = -1
    zero = lambda values: {k: x * 0 for k, x in values.items()}
    b = dataclasses.replace(b, candidate_sample=sample, candidate=zero(b.candidate))
    f, params = builders.features(b), params_of(config)

    def loss(params, history):
        g = dataclasses.replace(f, history=history)
        logits, aux = dlrm_v3.DLRMv3(config).apply({"params": params}, g, train=False)
        assert aux == {} and logits.dtype == jnp.float32
        return jnp.sum(jnp.where(f.candidate_mask[..., None], logits, 0) ** 2), logits

    step = quick(jax.grad(loss, argnums=(0, 1), has_aux=True))
    gradients, logits = step(params, f.history)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((gradients, logits)))
    exact = score(b, dataclasses.replace(config, dtype="float32"))
    valid = b.candidate_mask & (sample >= 0)
    np.testing.assert_allclose(logits[valid], exact[valid], rtol=0.1, atol=0.15)


def test_unit_length_of_a_row_of_zeros_has_a_gradient():
    config = dataclasses.replace(SMALL, postprocessor="l2")
    model = dlrm_v3.DLRMv3(config)

    def length(x_rcd):
        return jnp.sum(model.apply({}, x_rcd, None, method="_postprocess"))

    assert np.isfinite(jax.grad(length)(jnp.zeros((1, 1, 8)))).all()


RANDOM = {"dropout": 0.5, "input_dropout": 0.5, "stochastic_length": 1.2}


def test_scoring_is_not_random():
    f, params = builders.features(batch()), {"params": params_of(SMALL)}

    def program(config):
        run = functools.partial(dlrm_v3.DLRMv3(config).apply, train=False)
        return str(jax.make_jaxpr(run)(params, f))

    assert program(dataclasses.replace(SMALL, **RANDOM)) == program(SMALL)


@pytest.mark.parametrize("field", RANDOM)
def test_training_is_random(field):
    config = dataclasses.replace(
        SMALL, **{"layers": 1, "history": 5, "attn_norm": "valid_len", field: RANDOM[field]}
    )
    b = batch()
    f, apply = builders.features(b), functools.partial(dlrm_v3.DLRMv3(config).apply, train=True)
    params = {"params": params_of(config)}
    run = quick(lambda seed: apply(params, f, rngs={"dropout": jax.random.key(seed)})[0])
    drawn = [np.asarray(run(seed)) for seed in range(4)]
    assert np.isfinite(drawn).all() and any(np.any(x != drawn[0]) for x in drawn)
    if field != "stochastic_length":
        return
    for seed, got in enumerate(drawn):
        kept = dlrm_v3.stochastic_length.subsample(f, key_of(seed), alpha=1.2, longest=5)
        counts = np.sum(np.asarray(kept.history_mask), axis=1).tolist()
        # 5^(1.2 / 2) = 2.6: two of five, three and six are kept, or all of them.
        assert all(n in either for n, either in zip(counts, ({2, 5}, {0}, {2, 3}, {2, 6})))
        # It scores as if what was kept were the history: positions and counts are of that.
        want = score(dataclasses.replace(b, history_sample=np.asarray(kept.history_sample)), config)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def key_of(seed):
    """The key that a model draws first of the rng `seed`."""

    class Draw(dlrm_v3.nn.Module):
        def __call__(self):
            return self.make_rng("dropout")

    return Draw().apply({}, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 9}, "width=9 is no multiple of heads=2"),
        ({"history": 0}, "history=0, expected an integer >= 1"),
        ({"heads": 0}, "heads=0, expected an integer >= 1"),
        ({"layers": 0}, "layers=0, expected an integer >= 1"),
        ({"tasks": 0}, "tasks=0, expected an integer >= 1"),
        ({"qk_width": 0}, "qk_width=0, expected an integer >= 1"),
        ({"positions": 0}, "positions=0, expected an integer >= 1"),
        ({"head_hidden": 0}, "head_hidden=0, expected an integer >= 1"),
        ({"content_hidden": 1.5}, "content_hidden=1.5, expected an integer >= 1"),
        ({"time_buckets": 0}, "time_buckets=0, expected an integer >= 1"),
        ({"attn_window": -1}, "attn_window=-1, expected an integer >= 0"),
        ({"context_min_history": -1}, "context_min_history=-1, expected an integer >= 0"),
        ({"context": "suffix"}, "context='suffix', expected one of"),
        ({"context_mask": "none"}, "context_mask='none', expected one of"),
        ({"attn_norm": "batch_max"}, "attn_norm='batch_max', expected one of"),
        ({"postprocessor": "softmax"}, "postprocessor='softmax', expected one of"),
        ({"init": "he"}, "init='he', expected one of"),
        ({"implementation": "cuda"}, "implementation='cuda', expected one of"),
        ({"dtype": "float16"}, "dtype='float16', expected one of"),
        ({"dropout": 1.0}, "dropout=1.0, expected 0 <= dropout < 1"),
        ({"input_dropout": -0.1}, "input_dropout=-0.1, expected 0 <= input_dropout < 1"),
        ({"norm_constant": 0}, "norm_constant=0, expected > 0"),
        ({"action_std": 0}, "action_std=0, expected > 0"),
        ({"stochastic_length": 1}, "stochastic_length=1, expected None or 1 < alpha <= 2"),
    ],
)
def test_refused_configurations(change, message):
    with pytest.raises(ValueError, match=rf"dlrm_v3\.Config: {message}"):
        dataclasses.replace(SMALL, **change)


def test_windows_are_refused():
    f = builders.features(batch(one_time=False))
    with pytest.raises(ValueError, match=r"dlrm_v3: .*different times"):
        jax.eval_shape(
            functools.partial(dlrm_v3.DLRMv3(SMALL).init, train=False), jax.random.key(0), f
        )


def test_schemas_lacking_a_side():
    f = builders.features(batch())

    def params(*without):
        kept = tuple(x for x in f.schema.features if x.side not in without)
        g = dataclasses.replace(f, schema=dataclasses.replace(f.schema, features=kept))
        init = functools.partial(dlrm_v3.DLRMv3(SMALL).init, train=False)
        return jax.eval_shape(init, jax.random.key(0), g)["params"]

    with pytest.raises(ValueError, match="dlrm_v3: the schema has no item feature"):
        params("item")
    bare = params("event", "context", "user")
    assert sorted(k for k in bare if not k.startswith(("layer", "head"))) == [
        *("content", "item", "output_norm", "places")
    ]


def test_initialisation():
    config = dataclasses.replace(SMALL, width=64, layers=1, action_std=2.0)
    f, x_rnd = builders.features(batch()), np.zeros((4, 13, 64), np.float32)
    (mask,) = dlrm_v3.masks_of(dataclasses.replace(config, prune_last=False), f).values()
    layer = dlrm_v3.STULayer(config)
    params = layer.init(jax.random.key(0), x_rnd, mask, 9.0, train=False)["params"]
    for x in (params["uvqk_kernel"], params["output"]["kernel"]):
        np.testing.assert_allclose(np.std(x), (2 / sum(x.shape)) ** 0.5, rtol=0.05)
        np.testing.assert_allclose(np.abs(x).max(), (6 / sum(x.shape)) ** 0.5, rtol=0.01)
    assert np.all(params["uvqk_bias"] == 0) and "bias" not in params["output"]
    init = functools.partial(dlrm_v3.DLRMv3(config).init, train=False)
    target = quick(lambda key: init(key, f)["params"]["target_action"])(jax.random.key(0))
    assert 0.5 < np.std(target) < 5


@pytest.mark.parametrize("config", [*CONFIGS.values(), dlrm_v3.DLRM_V3_MLPERF])
def test_a_config_goes_to_json_and_back(config):
    assert dlrm_v3.Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
