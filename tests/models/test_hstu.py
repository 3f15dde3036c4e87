"""HSTU's ranking form against float64 NumPy, and what must hold for windows and packed rows."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import flops
from rankjax.models import hstu
from rankjax.packing import pack
from tests import builders, finite_differences
from tests.references import hstu as reference

FIELDS = ("user", "history", "candidate")
SMALL = hstu.Config(history=4, realtime=4, layers=2, width=8, heads=2, tasks=2)
CONFIGS = {
    "merged": SMALL,
    "interleaved, no context, recency": dataclasses.replace(
        SMALL,
        **{"tokens": "interleaved", "context": "none", "position_init": "recency", "layers": 1},
        token_norm="sqrt_width",
    ),
    "DLRM-v3 projections, affine norms, constant normaliser": dataclasses.replace(
        *(SMALL,),
        **{"proj_activation": "u", "qk_scale": 0.5, "norm_affine": True, "qk_width": 3},
        **{"attn_norm": "const", "norm_constant": 3.0, "v_width": 5, "heads": 3, "layers": 1},
    ),
}
CONFIGS["RMS norms after the residual sum, no relative bias"] = dataclasses.replace(
    *(SMALL,),
    **{"norm": "rms", "norm_place": "post", "norm_affine": True, "layers": 1},
    **{"position_bias": False, "time_bias": False, "implementation": "reference"},
)
# Programs this small run once: compiling them is what takes time, and this halves it.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LENGTHS, CANDIDATES = (5, 0, 3, 4), (4, 2, 1, 3)


def window(seed=0, time_exact=True, one_time=False):
    """Four unpacked rows of NumPy embeddings; candidates of several times among the events."""
    rng = np.random.default_rng(seed)
    b = builders.batch(rng, lengths=LENGTHS, candidates=CANDIDATES, S=7, C=4, one_time=one_time)
    R, S, C = 4, 7, 4
    gaps = rng.choice([5, 40, 400, 90_000], (R, S))
    history_time = np.cumsum(gaps, axis=1) - gaps[:, :2].sum(axis=1, keepdims=True) - 1
    # From the third event on, events stand between candidates or at a candidate's very time.
    candidate_time = np.concatenate([np.zeros((R, 1)), history_time[:, 2:4] + [[0, 1]]], axis=1)
    candidate_time = np.concatenate([candidate_time, candidate_time[:, 2:]], axis=1)
    if one_time:
        history_time, candidate_time = history_time - 10**6, np.zeros((R, C))
    earlier = (history_time[:, None] < candidate_time[:, :, None]) & b.history_mask[:, None]
    order = earlier.sum(axis=2)
    return dataclasses.replace(
        b,
        schema=dataclasses.replace(b.schema, time_exact=time_exact),
        history_time=np.where(b.history_mask, history_time, 0).astype(np.int32),
        candidate_time=np.where(b.candidate_mask, candidate_time, 0).astype(np.int32),
        history_order=(np.arange(S) - order[:, :1]).astype(np.int32) * b.history_mask,
        candidate_order=(order - order[:, :1]).astype(np.int32) * b.candidate_mask,
    )


NEXT = dataclasses.replace(SMALL, rab_query_time="next")


@functools.cache
def scorer(config):
    return quick(lambda p, f: hstu.HSTU(config).apply({"params": p}, f, train=False)[0])


@functools.cache
def params_of(config, time_exact=True):
    """Random parameters off their initial values, else a forgotten bias or scale goes unseen."""
    f = jax.eval_shape(lambda: builders.features(window(time_exact=time_exact, one_time=True)))
    init = functools.partial(hstu.HSTU(config).init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), f)["params"]
    rng = np.random.default_rng(1)

    def draw(path, x):
        value = rng.normal(size=x.shape) * (0.3 if x.ndim == 1 else x.shape[0] ** -0.5)
        return np.float32(value + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def score(b, config=SMALL):
    """Logits [R, C, K] of a batch of embeddings, NumPy."""
    params = params_of(config, b.schema.time_exact)
    return np.asarray(scorer(config)(params, builders.features(b)))


def expected(b, config, row, params=None):
    """The reference's logits of one unpacked row's valid candidates, with float64 `params`."""
    Q, V = config.head_widths
    context = 2 if config.context == "prefix" else 0
    static = context + config.per_event * (config.history + config.realtime) + 1
    c = {
        "heads": config.heads,
        "qk": Q,
        "v": V,
        "layers": config.layers,
        "per_event": config.per_event,
        "normalizer": config.norm_constant if config.attn_norm == "const" else static,
        "scale": config.qk_scale or 1.0,
        "activation": config.proj_activation,
        "affine": config.norm_affine,
        "token_norm": config.token_norm,
        "norm": config.norm,
        "norm_place": config.norm_place,
        "query_time": config.rab_query_time,
    }
    exact = b.schema.time_exact
    p = builders.float64(params_of(config, exact)) if params is None else params
    side = lambda values, names, i: np.concatenate([np.float64(values[n][row, i]) for n in names])
    item = ["item", "price", "tag"]
    cut = (b.history_time, b.candidate_time) if exact else (b.history_order, b.candidate_order)
    events = [
        (side(b.history, item, i), side(b.history, ["action"], i), cut[0][row, i], t)
        for i, t in enumerate(b.history_time[row])
        if b.history_mask[row, i]
    ]
    candidates = [
        (side(b.candidate, item, i), side(b.candidate, ["hour"], i), cut[1][row, i], t)
        for i, t in enumerate(b.candidate_time[row])
        if b.candidate_mask[row, i]
    ]
    user = [(n, side(b.user, [n], 0)) for n in ("age", "spend")] if context else []
    return reference.logits(p, c, user, events, candidates)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_references(name):
    b = window()
    got = score(b, CONFIGS[name])
    assert got.shape == (4, 4, 2) and got.dtype == np.float32
    for row, n in enumerate(CANDIDATES):
        np.testing.assert_allclose(got[row, :n], expected(b, CONFIGS[name], row), atol=1e-5)


WEIGHTS = np.random.default_rng(3).normal(size=(4, 4, 2))
WEIGHTS[2:] = 0


@functools.cache
def gradients(config):
    """(d parameters, d embeddings) of a weighted sum of the logits of rows 0 and 1."""
    b = window()

    @quick
    @jax.grad
    def gradient(at):
        f = dataclasses.replace(builders.features(b), **at[1])
        logits, _ = hstu.HSTU(config).apply({"params": at[0]}, f, train=False)
        return jnp.sum(jnp.where(f.candidate_mask[..., None], logits * WEIGHTS, 0))

    return gradient((params_of(config), {field: getattr(b, field) for field in FIELDS}))


@pytest.mark.parametrize("name", list(CONFIGS)[:3])
def test_gradients_are_the_references(name):
    """By parameters and by every feature's embeddings, along a random direction of each."""
    b, config = window(), CONFIGS[name]

    def loss(at):
        embedded = dataclasses.replace(b, **at[1])
        # Row 1 has no history.
        found = [(expected(embedded, config, row, at[0]), WEIGHTS[row]) for row in (0, 1)]
        return sum(float((logits * w[: len(logits)]).sum()) for logits, w in found)

    at = (params_of(config), {field: getattr(b, field) for field in FIELDS})
    unread = lambda name: config.context == "none" and "'user'" in name
    rng = np.random.default_rng(3)
    finite_differences.check(loss, at, gradients(config), rng, zero=unread)


@pytest.mark.parametrize("tokens", ["merged", "interleaved"])
def test_a_query_may_have_the_next_tokens_time(tokens):
    config, b = dataclasses.replace(NEXT, tokens=tokens), window(one_time=True)
    got = score(b, config)
    for row, n in enumerate(CANDIDATES):
        np.testing.assert_allclose(got[row, :n], expected(b, config, row), atol=1e-5)
    own = np.asarray(
        scorer(dataclasses.replace(config, rab_query_time="own"))(
            params_of(config), builders.features(b)
        )
    )
    valid = b.candidate_mask & (np.array(LENGTHS) > 1)[:, None]
    assert np.all(np.abs(own - got)[valid].max(axis=1) > 1e-6)
    together = score(pack(b, 2), config).reshape(4, 4, 2)
    np.testing.assert_allclose(together[b.candidate_mask], got[b.candidate_mask], atol=2e-6)


def test_the_next_tokens_time_takes_no_windows():
    b = window()
    with pytest.raises(ValueError, match=r"hstu with rab_query_time='next'.*different times"):
        score(b, NEXT)
    # Without exact times there is no bias that could tell; windows are refused all the same.
    b = window(one_time=True, time_exact=False)
    own = scorer(dataclasses.replace(NEXT, rab_query_time="own"))
    want = np.asarray(own(params_of(NEXT, False), builders.features(b)))
    np.testing.assert_array_equal(score(b, NEXT), want)


def test_masks_of_a_window_and_m_falcons():
    """M-FALCON's allow[i, j] = (j <= i) and not (i >= n and j >= n and i != j), 5 events."""
    config = dataclasses.replace(SMALL, context="none")
    found = hstu.masks_of(config, builders.features(window(one_time=True)))
    assert list(found) == ["layers before the last", "last layer"]
    i, j = np.mgrid[:9, :9]
    want = (j <= i) & ~((i >= 5) & (j >= 5) & (i != j))
    there = [*range(5), *range(7, 11)]
    tables = {k: np.asarray(rule.allow(q, t))[0] for k, (q, t, rule) in found.items()}
    np.testing.assert_array_equal(tables["layers before the last"][np.ix_(there, there)], want)
    np.testing.assert_array_equal(tables["last layer"][:, there], want[5:])
    # In the window: the candidates of row 0 stand before the events 2, 2, 4 and 3 in order.
    b = window()
    (q, t, rule) = hstu.masks_of(config, builders.features(b))["last layer"]
    read = np.asarray(rule.allow(q, t))[0][:, :5]
    np.testing.assert_array_equal(read, b.history_time[0, :5] < b.candidate_time[0][:, None])
    twice = dataclasses.replace(config, tokens="interleaved", prune_last=False)
    (q, t, rule) = hstu.masks_of(twice, builders.features(b))["all layers"]
    assert q.segment.shape == t.segment.shape == (4, 2 * 7 + 4)
    np.testing.assert_array_equal(
        np.asarray(rule.allow(q, t))[0][14:, :10], np.repeat(read, 2, axis=1)
    )


def test_scoring_is_not_random():
    f, params = builders.features(window()), {"params": params_of(SMALL)}

    def program(config):
        return str(
            jax.make_jaxpr(functools.partial(hstu.HSTU(config).apply, train=False))(params, f)
        )

    random = dataclasses.replace(SMALL, dropout=0.5, stochastic_length=1.2)
    assert program(random) == program(SMALL)


def test_stochastic_length_in_training():
    """It scores as if the kept events were the history; later events stay unseen in windows."""
    config = dataclasses.replace(SMALL, history=1, layers=1, stochastic_length=1.2)
    b = window()
    rngs = lambda seed: {"dropout": jax.random.key(seed)}
    apply = functools.partial(hstu.HSTU(config).apply, {"params": params_of(config)}, train=True)
    run = quick(lambda f, seed: apply(f, rngs=rngs(seed))[0])

    class Draw(hstu.nn.Module):
        def __call__(self):
            return self.make_rng("dropout")

    dropped = 0
    for seed in range(6):
        f = builders.features(b)
        key = Draw().apply({}, rngs=rngs(seed))
        kept = hstu.stochastic_length.subsample(f, key, alpha=1.2, longest=1).history_sample
        dropped += np.sum((f.history_sample != kept) & (f.history_order < 0))
        assert np.all((f.history_sample == kept) | (f.history_order < 0))
        want = score(dataclasses.replace(b, history_sample=np.asarray(kept)), config)
        got = np.asarray(run(f, seed))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
        late = edit(b, 0, 3, "perturb", np.random.default_rng(0))
        moved = np.asarray(run(builders.features(late), seed))
        unread = b.candidate_time[0] <= b.history_time[0, 3]
        np.testing.assert_array_equal(moved[0, unread], got[0, unread])
        assert unread.any() and np.any(moved[0, ~unread] != got[0, ~unread])
    assert dropped > 6


def test_without_exact_times_the_order_cuts_and_time_differences_are_off():
    b = window(time_exact=False)
    assert "time_bias" not in params_of(SMALL, False)["layer_0"]
    got = score(b)
    np.testing.assert_allclose(got[0], expected(b, SMALL, 0), atol=1e-5)
    seconds = dataclasses.replace(
        b, history_time=b.history_time * 0, candidate_time=b.labels[..., 0]
    )
    np.testing.assert_array_equal(got, score(seconds))


def test_the_last_layer_may_compute_the_candidates_only():
    full = dataclasses.replace(SMALL, prune_last=False)
    f = builders.features(window())
    pruned, whole = (scorer(c)(params_of(SMALL), f) for c in (SMALL, full))
    np.testing.assert_allclose(pruned, whole, rtol=0, atol=1e-6)
    for got, want in zip(*(jax.tree.leaves(gradients(c)) for c in (SMALL, full))):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def edit(b, row, slot, kind, rng):
    """The batch with the event in a slot perturbed, deleted, or another inserted before it."""
    n = LENGTHS[row]

    def change(x, new):
        x = np.array(x)
        if kind == "perturb":
            x[row, slot] = new if new is not None else x[row, slot]
        elif kind == "delete":
            x[row, slot : n - 1] = x[row, slot + 1 : n]
            x[row, n - 1] = 0
        else:
            x[row, slot + 1 : n + 1] = x[row, slot:n]
            x[row, slot] = new if new is not None else x[row, slot]
        return x

    history = {k: change(x, rng.normal(size=x.shape[-1]) * 9) for k, x in b.history.items()}
    sample = np.array(b.history_sample)
    sample[row] = np.where(
        np.arange(sample.shape[1]) < n + {"perturb": 0, "delete": -1, "insert": 1}[kind], 0, -1
    )
    return dataclasses.replace(
        b, history=history, history_sample=sample, history_time=change(b.history_time, None)
    )


@pytest.mark.parametrize("samples_per_row", [1, 2])
@pytest.mark.parametrize("kind", ["perturb", "delete", "insert"])
def test_what_happens_at_or_after_a_candidates_time_changes_nothing(kind, samples_per_row):
    rng = np.random.default_rng(2)
    b = window()
    lay_out = lambda x: pack(x, samples_per_row) if samples_per_row > 1 else x
    flat = lambda logits: logits.reshape(4, 4, -1)
    before = flat(score(lay_out(b)))
    moved = np.zeros(4, bool)
    for row in (0, 3):
        for slot in range(LENGTHS[row]):
            time = b.history_time[row, slot]
            after = flat(score(lay_out(edit(b, row, slot, kind, rng))))
            for k in range(CANDIDATES[row]):
                if b.candidate_time[row, k] <= time:
                    np.testing.assert_array_equal(before[row, k], after[row, k])
                else:
                    assert np.any(before[row, k] != after[row, k])
                    moved[k] = True
            other = np.arange(4) != row
            valid = b.candidate_mask[other]
            np.testing.assert_array_equal(before[other][valid], after[other][valid])
    assert moved.all()


def test_candidates_do_not_see_each_other():
    b = window()
    before = score(b)
    shuffle = lambda x: x[:, [2, 0, 3, 1]]
    fields = ("candidate_sample", "candidate_time", "candidate_order", "labels", "weights")
    shuffled = dataclasses.replace(
        b,
        candidate={k: shuffle(x) for k, x in b.candidate.items()},
        **{name: shuffle(getattr(b, name)) for name in fields},
    )
    after = score(shuffled)
    valid = shuffled.candidate_mask
    np.testing.assert_allclose(after[valid], shuffle(before)[valid], rtol=0, atol=1e-6)
    # Removing one and changing another, the rest in their slots.
    sample = np.array(b.candidate_sample)
    sample[0, 1] = -1
    other = {k: np.array(x) for k, x in b.candidate.items()}
    for x in other.values():
        x[0, 2] += 5
    changed = score(dataclasses.replace(b, candidate=other, candidate_sample=sample))
    np.testing.assert_array_equal(changed[0, [0, 3]], before[0, [0, 3]])
    assert np.all(changed[0, 2] != before[0, 2])


def test_a_candidate_has_no_place_for_what_the_user_does():
    """The action reaches a logit only through events of an earlier time."""
    b = window()
    assert "action" not in b.candidate
    history = b.history | {"action": b.history["action"] + 1}
    moved = score(dataclasses.replace(b, history=history)) != score(b)
    earlier = (b.history_time[:, None] < b.candidate_time[..., None]) & b.history_mask[:, None]
    valid = b.candidate_mask
    np.testing.assert_array_equal(moved.any(axis=2)[valid], earlier.any(axis=2)[valid])


def test_padding_to_any_length_changes_nothing():
    b = window()
    wide = lambda x, n, fill=0: np.pad(
        x, [(0, 0), (0, n)] + [(0, 0)] * (x.ndim - 2), constant_values=fill
    )
    padded = dataclasses.replace(
        b,
        history={k: wide(x, 6, 3.0) for k, x in b.history.items()},
        candidate={k: wide(x, 3, 3.0) for k, x in b.candidate.items()},
        history_sample=wide(b.history_sample, 6, -1),
        candidate_sample=wide(b.candidate_sample, 3, -1),
        **{name: wide(getattr(b, name), 6) for name in ("history_time", "history_order")},
        **{name: wide(getattr(b, name), 3) for name in ("candidate_time", "candidate_order")},
    )
    valid = b.candidate_mask
    np.testing.assert_allclose(score(padded)[:, :4][valid], score(b)[valid], rtol=0, atol=2e-6)


def test_packed_rows_score_as_separate_rows():
    b = window()
    together = score(pack(b, 2)).reshape(4, 4, 2)
    valid = b.candidate_mask
    np.testing.assert_allclose(together[valid], score(b)[valid], rtol=0, atol=2e-6)


def test_shifting_all_times_changes_nothing():
    b = window()
    later = dataclasses.replace(
        b, history_time=b.history_time + 12_345, candidate_time=b.candidate_time + 12_345
    )
    np.testing.assert_array_equal(score(later), score(b))
    stretched = dataclasses.replace(
        b, history_time=b.history_time * 7, candidate_time=b.candidate_time * 7
    )
    assert np.any(score(stretched) != score(b))


def test_a_layer_sees_only_the_direction_of_its_input():
    f = builders.features(window())
    bare = dataclasses.replace(SMALL, context="none", prune_last=False)
    (mask,) = hstu.masks_of(bare, f).values()
    layer = hstu.Layer(SMALL, 11, True)
    x = np.random.default_rng(0).normal(size=(4, 11, 8)).astype("f4") * 10
    params = {"params": params_of(SMALL)["layer_0"]}
    step = jax.jit(lambda x: layer.apply(params, x, mask, 9.0, train=False) - x)
    np.testing.assert_allclose(step(4 * x), step(x), rtol=0, atol=5e-5)
    assert np.abs(step(x)).max() > 0.05


def layer_parameters(config):
    f = jax.eval_shape(lambda: builders.features(window()))
    shapes = jax.eval_shape(
        functools.partial(hstu.HSTU(config).init, train=False), jax.random.key(0), f
    )
    layers = [x for name, x in shapes["params"].items() if name.startswith("layer_")]
    return sum(x.size for x in jax.tree.leaves(layers))


@pytest.mark.parametrize(
    ("config", "count"), [(hstu.HSTU_ML1M, 26_200), (hstu.HSTU_ML1M_LARGE, 104_800)]
)
def test_published_parameter_counts(config, count):
    assert config.paper_params() == count == layer_parameters(config)


@pytest.mark.parametrize("name", ["interleaved, no context, recency", "merged"])
def test_parameter_count_of_other_sizes(name):
    config = dataclasses.replace(CONFIGS[name], context="none", norm_affine=True)
    config = dataclasses.replace(config, qk_width=3, v_width=7)
    assert config.paper_params() == layer_parameters(config)


def test_figures_and_sizes():
    for figure in hstu.PAPER.figures:
        assert figure.ours() == figure.printed
    assert {
        k: (c.history, c.layers, c.width, c.heads, c.head_widths, c.positions)
        for k, c in ((k, size.config) for k, size in hstu.PAPER.sizes.items())
    } == {
        "hstu_ml1m": (200, 2, 50, 1, (50, 50), 211),
        "hstu_ml1m_large": (200, 8, 50, 2, (25, 25), 211),
        "hstu_ml20m_large": (200, 16, 256, 8, (32, 32), 211),
        "hstu_books_large": (50, 16, 64, 8, (8, 8), 61),
    }
    for name, size in hstu.PAPER.sizes.items():
        assert getattr(hstu, name.upper()) == size.config
        assert size.config.dropout == (0.5 if "books" in name else 0.2)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts_outside_the_layers(name):
    c = CONFIGS[name]
    f = jax.eval_shape(lambda: builders.features(window()))
    init = functools.partial(hstu.HSTU(c).init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), f)["params"]
    d, F, interleaved = c.width, c.head_hidden or c.width, c.tokens == "interleaved"
    want = 9 * d + d + 4 * d + d * interleaved + 4 * d + c.tasks * (d * F + 2 * F + 1)
    want += (4 * d + d + d + d) * (c.context == "prefix")
    want += 2 * d * (c.token_norm == "layer") + 2 * d * (c.output_norm == "layer")
    rest = [x for key, x in params.items() if not key.startswith("layer_")]
    assert builders.count(rest) == want


@pytest.mark.parametrize("config", [*CONFIGS.values(), NEXT, hstu.HSTU_BOOKS_LARGE])
def test_a_config_goes_to_json_and_back(config):
    assert hstu.Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_paper_flops():
    n, d, L = 201, 50, 8
    assert hstu.HSTU_ML1M_LARGE.paper_flops() == L * (10 * n * d**2 + 4 * n**2 * d)
    assert hstu.HSTU_ML1M_LARGE.paper_flops(9) == L * (90 * d**2 + 324 * d)
    assert dataclasses.replace(SMALL, tokens="interleaved").static_max(2) == 2 + 2 * 8 + 1


def test_a_layer_multiplies_as_often_as_the_closed_form_says():
    config = dataclasses.replace(SMALL, layers=1, implementation="reference")
    n = config.static_max()
    x_rnd = jax.ShapeDtypeStruct((1, n, config.width), jnp.float32)
    numbers = jax.ShapeDtypeStruct((1, n), jnp.int32)
    tokens = jax.eval_shape(
        lambda x: hstu.Tokens(**{f.name: x for f in dataclasses.fields(hstu.Tokens)}), numbers
    )
    layer = hstu.Layer(config, n, True)

    def run(params, x, tokens):
        return layer.apply(params, x, (tokens, tokens, hstu.RULE), 9.0, train=False)

    init = lambda key, x, tokens: layer.init(key, x, (tokens, tokens, hstu.RULE), 9.0, train=False)
    params = jax.eval_shape(init, jax.random.key(0), x_rnd, tokens)
    assert flops.count(run, params, x_rnd, tokens).matmul == config.paper_flops()


def test_empty_histories_and_padding_rows_are_finite_in_bfloat16_with_gradients():
    config = dataclasses.replace(SMALL, dtype="bfloat16", context="none", layers=1)
    b = window()
    sample = np.array(b.candidate_sample)
    sample[2] = -1
    f = builders.features(dataclasses.replace(b, candidate_sample=sample))
    model, params = hstu.HSTU(config), params_of(config)

    def loss(params):
        logits, aux = model.apply({"params": params}, f, train=False)
        assert aux == {} and logits.dtype == jnp.float32
        return jnp.sum(jnp.where(f.candidate_mask[..., None], logits, 0) ** 2), logits

    gradients, logits = quick(jax.grad(loss, has_aux=True))(params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((gradients, logits)))
    assert all(np.any(x != 0) for x in jax.tree.leaves(gradients)), "a parameter without gradient"
    exact = score(b, dataclasses.replace(config, dtype="float32"))
    # LN of the attention output of a candidate that reads itself alone divides by next to nothing.
    np.testing.assert_allclose(logits[0, :], exact[0, :], rtol=0.1, atol=0.1)


def test_dropout_acts_in_training_only():
    config = dataclasses.replace(SMALL, dropout=0.5, layers=1)
    f = builders.features(window())
    params = {"params": params_of(config)}

    @functools.partial(jax.jit, static_argnums=1)
    def run(seed, train):
        rngs = {"dropout": jax.random.key(seed)}
        return hstu.HSTU(config).apply(params, f, train=train, rngs=rngs)[0]

    np.testing.assert_array_equal(run(0, False), run(1, False))
    assert np.any(run(0, True) != run(1, True))


def test_normaliser_by_valid_length_takes_no_windows():
    config = dataclasses.replace(SMALL, attn_norm="valid_len", layers=1)
    one = window(one_time=True)
    params = params_of(dataclasses.replace(config, attn_norm="static_max"))
    found = np.asarray(scorer(config)(params, builders.features(one)))
    # Two context tokens, the events, the candidate itself.
    same = dataclasses.replace(config, attn_norm="const", norm_constant=2.0 + LENGTHS[0] + 1)
    want = np.asarray(scorer(same)(params, builders.features(one)))
    np.testing.assert_allclose(found[0], want[0], rtol=0, atol=1e-6)
    assert np.abs(found[3, :3] - want[3, :3]).max() > 1e-6
    with pytest.raises(ValueError, match=r"hstu with attn_norm='valid_len'.*different times"):
        scorer(config)(params, builders.features(window()))


def test_initialisation():
    config = dataclasses.replace(SMALL, width=64, layers=8, position_init="recency")
    f = builders.features(window())
    x, bare = np.zeros((4, 11, 64), np.float32), {"context": "none", "prune_last": False}
    (mask,) = hstu.masks_of(dataclasses.replace(config, **bare), f).values()

    @functools.partial(jax.jit, static_argnums=0)
    def init(config):
        layer = hstu.Layer(config, 9, True)
        return layer.init(jax.random.key(0), x, mask, 9.0, train=False)["params"]

    found = {x: init(dataclasses.replace(config, init=x)) for x in ("research", "small_residual")}
    w1, w2 = (lambda p: np.std(p["w1"])), (lambda p: np.std(p["w2"]["kernel"]))
    np.testing.assert_allclose(w1(found["research"]), 0.02, rtol=0.05)
    np.testing.assert_allclose(w2(found["research"]), 1 / 8, rtol=0.05)  # 2 / (64 + 64) xavier
    np.testing.assert_allclose(w1(found["small_residual"]), 1 / 8, rtol=0.05)
    np.testing.assert_allclose(w2(found["small_residual"]), 1 / 8 / 4, rtol=0.05)
    np.testing.assert_allclose(np.std(found["research"]["time_bias"]), 0.02, rtol=0.3)
    np.testing.assert_allclose(found["research"]["position_bias"][8], 2)
    # Interleaved, an event's two tokens are half an event apart.
    f = builders.features(window(one_time=True))
    twice = dataclasses.replace(
        SMALL, **{"tokens": "interleaved", "position_init": "recency", "context": "none"}
    )
    init_all = functools.partial(hstu.HSTU(twice).init, train=False)
    only = lambda key: init_all(key, f)["params"]["layer_0"]["position_bias"]
    table = quick(only)(jax.random.key(0))
    np.testing.assert_allclose(table[len(table) // 2 + np.arange(3)], 2 * np.exp(-np.arange(3) / 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 9}, "width=9 is no multiple of heads=2"),
        ({"tokens": "split"}, "tokens='split', expected one of"),
        ({"attn_norm": "batch_max"}, "attn_norm='batch_max', expected one of"),
        ({"history": 0}, "history=0, expected an integer >= 1"),
        ({"dropout": 1.0}, "dropout=1.0, expected 0 <= dropout < 1"),
        ({"norm_constant": 0}, "norm_constant=0, expected > 0"),
        ({"rab_query_time": "last"}, "rab_query_time='last', expected one of"),
        ({"stochastic_length": 2.5}, "stochastic_length=2.5, expected None or 1 < alpha <= 2"),
        ({"implementation": "cuda"}, "implementation='cuda', expected one of"),
        ({"dtype": "float16"}, "dtype='float16', expected one of"),
    ],
)
def test_refused_configurations(change, message):
    with pytest.raises(ValueError, match=rf"hstu\.Config: {message}"):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    ("without", "message"), [("item", "has no item feature"), ("event", "needs event features")]
)
def test_schemas_that_make_no_tokens_are_refused(without, message):
    f = builders.features(window())
    kept = tuple(x for x in f.schema.features if x.side != without)
    f = dataclasses.replace(f, schema=dataclasses.replace(f.schema, features=kept))
    model = hstu.HSTU(dataclasses.replace(SMALL, tokens="interleaved"))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), f)
