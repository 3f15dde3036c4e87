"""GRAB against float64 NumPy, its masks, who reaches whom, and the two phases of training."""

import dataclasses
import functools
import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from rankjax import flops, papers
from rankjax.batch import Features
from rankjax.layers import sequence
from rankjax.models import grab
from rankjax.packing import pack
from tests import builders
from tests.references import grab as reference

SMALL = grab.Config(history=4, realtime=3, layers=2, width=8, heads=2, tasks=2)
CONFIGS = {
    "three channels": SMALL,
    "pre-norm, window, shared weights": dataclasses.replace(
        SMALL,
        **{"norm_place": "pre", "norm": "rms", "share_channels": True, "attn_window": 2},
        **{"mix": "last", "readout": "mean", "channels": 2, "channel_starts": (3,)},
        **{"head_width": 3, "latent": 5, "implementation": "reference", "token_norm": "rms"},
    ),
    "one channel, vectors nearby": dataclasses.replace(
        SMALL,
        **{"channels": 1, "rab_window": 3, "positions": 2, "action_ids": 3, "layers": 1},
        **{"token_norm": "none", "prune_last": False},
    ),
}
LENGTHS, CANDIDATES = (5, 0, 3, 4), (4, 2, 1, 3)
S, C = 7, 4
EMBEDDED = ("user", "history", "candidate")
# Compiles in half the time; test_all_models.py has the compiler's full effort.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def window(*, seed: int = 0, time_exact: bool = True) -> Features:
    """Four unpacked rows; candidates of several times among the events, some at an event's time."""
    return builders.features(batch_of_window(seed, time_exact))


@functools.cache
def batch_of_window(seed=0, time_exact=True):
    rng = np.random.default_rng(seed)
    b = builders.batch(rng, lengths=LENGTHS, candidates=CANDIDATES, S=S, C=C, one_time=False)
    gaps = rng.choice([5, 40, 400, 90_000], (4, S))
    history_time = np.cumsum(gaps, axis=1) - gaps[:, :2].sum(axis=1, keepdims=True) - 1
    # From the third event on, events stand between candidates or at a candidate's very time.
    candidate_time = np.concatenate([np.zeros((4, 1)), history_time[:, 2:4] + [[0, 1]]], axis=1)
    candidate_time = np.concatenate([candidate_time, candidate_time[:, 2:]], axis=1)
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


@functools.cache
def scorer(config):
    return quick_jit(lambda p, f: grab.GRAB(config).apply({"params": p}, f, train=False)[0])


def shapes_of(config, features, *, train=True):
    init = functools.partial(grab.GRAB(config).init, train=train)
    return jax.eval_shape(init, jax.random.key(0), features)["params"]


@functools.cache
def params_of(config, time_exact=True):
    """Random parameters off their initial values, else a forgotten bias or gate goes unseen."""
    rng = np.random.default_rng(1)

    def draw(path, x):
        names = [entry.key for entry in path]
        if names[-1] in ("bias", "scale"):
            return np.float32(rng.normal(size=x.shape) * 0.3 + (names[-1] == "scale"))
        return np.float32(
            rng.normal(size=x.shape) / (1 if "relative" in names else x.shape[-2] ** 0.5)
        )

    return jax.tree_util.tree_map_with_path(draw, shapes_of(config, window(time_exact=time_exact)))


def score(features, config=SMALL):
    params = params_of(config, features.schema.time_exact)
    return np.asarray(scorer(config)(params, features))


def settings(config, time_exact=True):
    """What the reference is told."""
    same = ("heads", "layers", "channels", "attn_window", "rab_window", "mix", "readout")
    same += ("norm", "norm_place", "token_norm")
    return {name: getattr(config, name) for name in same} | {
        "starts": config.channel_starts or tuple(range(2, config.channels + 1)),
        "positions": config.positions or config.history + config.realtime + 1,
        "actions": config.action_ids,
        "times": 64 if time_exact else 0,
        "shared": config.share_channels,
    }


def side(values, names, *at):
    return np.concatenate([np.asarray(values[name][at], np.float64) for name in names])


def expected(features, config, params, row, candidate):
    """The reference's logits [K] of one candidate; params float64."""
    f, item = features, ["item", "price", "tag"]
    exact = f.schema.time_exact
    history, candidates = (np.asarray(x)[row] for x in sequence.rule_times(f))
    events = [
        (
            side(f.history, [*item, "action"], row, s),
            int(f.history_action[row, s]),
            history[s],
            when,
        )
        for s, when in enumerate(np.asarray(f.history_time)[row])
        if f.history_mask[row, s]
    ]
    own = side(f.candidate, [*item, "hour"], row, candidate)
    one = (own, candidates[candidate], int(f.candidate_time[row, candidate]))
    user = side(f.user, ["age", "spend"], row, 0)
    return reference.logits(params, settings(config, exact), user, events, one)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_references(name):
    f, config = window(), CONFIGS[name]
    got = score(f, config)
    assert got.shape == (4, C, 2) and got.dtype == np.float32
    params = builders.float64(params_of(config))
    for row, k in np.argwhere(f.candidate_mask):
        want = expected(f, config, params, row, k)
        np.testing.assert_allclose(got[row, k], want, rtol=0, atol=1e-5)
    assert np.unique(got[f.candidate_mask]).size == 2 * sum(CANDIDATES)


def test_without_exact_times_the_order_cuts_and_times_are_off():
    f, config = window(time_exact=False), CONFIGS["one channel, vectors nearby"]
    params = params_of(config, False)
    assert set(params["layer_0"]["read"]["relative"]) == {"position", "action"}
    got = score(f, config)
    params_64 = builders.float64(params)
    for k in range(CANDIDATES[0]):
        want = expected(f, config, params_64, 0, k)
        np.testing.assert_allclose(got[0, k], want, rtol=0, atol=1e-5)
    seconds = {"history_time": f.history_time * 0, "candidate_time": f.candidate_time * 0 + 1}
    np.testing.assert_array_equal(score(dataclasses.replace(f, **seconds), config), got)


SCORED = ((1, 0), (0, 1), (0, 3))  # whose logits enter the losses: they read 0, 2, 4 events


@functools.cache
def loss_weights():
    weights = np.zeros((4, C, 2), np.float32)
    weights[tuple(zip(*SCORED))] = np.random.default_rng(5).normal(size=(len(SCORED), 2))
    return weights


def values_of(features):
    return {x: getattr(features, x) for x in EMBEDDED}


def expected_loss(params, values):
    f = dataclasses.replace(window(), **values)
    return sum(loss_weights()[at] @ expected(f, SMALL, params, *at) for at in SCORED)


def without_sparse(params):
    return {name: x for name, x in params.items() if name != "sparse"}


@functools.cache
def gradients():
    """Of sum(weights * logits) by (parameters, inputs), in joint training."""
    f, model = window(), grab.GRAB(dataclasses.replace(SMALL, sts="joint"))

    @quick_jit
    def run(params, values):
        def loss(params, values):
            own = dataclasses.replace(f, **values)
            logits, aux = model.apply({"params": params}, own, train=True)
            assert aux == {}
            return jnp.sum(loss_weights() * logits)

        return jax.grad(loss, argnums=(0, 1))(params, values)

    return run(without_sparse(params_of(SMALL)), values_of(f))


def slopes(loss, at, gradient, rng):
    """(name, gradient . direction, its central difference of the float64 loss) for every leaf."""
    step = 1e-5
    leaves, tree = jax.tree_util.tree_flatten_with_path(at)
    for i, ((path, x), g) in enumerate(zip(leaves, jax.tree.leaves(gradient))):
        direction = rng.normal(size=x.shape)
        moved = []
        for sign in (1, -1):
            new = [x for _, x in leaves]
            new[i] = x + sign * step * direction
            moved.append(loss(jax.tree.unflatten(tree, new)))
        got = np.sum(np.float64(g) * direction)
        yield jax.tree_util.keystr(path), got, (moved[0] - moved[1]) / (2 * step)


def check_slopes(found):
    for name, got, want in found:
        assert abs(got - want) < 1e-5 * max(1, abs(want)), name


def test_gradients_by_parameters_are_the_references():
    params, values = builders.float64(without_sparse(params_of(SMALL))), float64_values()
    rng = np.random.default_rng(6)
    found = list(slopes(lambda p: expected_loss(p, values), params, gradients()[0], rng))
    check_slopes(found)
    assert len(found) == len(jax.tree.leaves(params))
    assert all(abs(want) > 1e-6 for _, _, want in found), "a parameter without gradient"


def test_gradients_by_inputs_are_the_references():
    params, values = builders.float64(params_of(SMALL)), float64_values()
    rng = np.random.default_rng(7)
    check_slopes(slopes(lambda v: expected_loss(params, v), values, gradients()[1], rng))


def float64_values():
    return builders.float64(values_of(window()))


# --- masks ---------------------------------------------------------------------------------------


def of_events(times, actions, candidates=None, slots=(10, 10)):
    """One row of events at these times with these actions, and candidates (default: as many)."""
    at = times if candidates is None else candidates
    rng = np.random.default_rng(0)
    b = builders.batch(rng, lengths=(len(times),), candidates=(len(at),), S=slots[0], C=slots[1])
    row = lambda x, width: jnp.asarray([[*x, *[0] * (width - len(x))]], jnp.int32)
    return dataclasses.replace(
        builders.features(b),
        **{"history_time": row(times, slots[0]), "history_action": row(actions, slots[0])},
        **{"candidate_time": row(at, slots[1]), "one_time": False},
    )


@functools.cache
def allowed(config):
    """features -> {title: bool [R, N, M]}, compiled."""

    def of(features):
        masks = grab.masks_of(config, features)
        return {title: rule.allow(q, k) for title, (q, k, rule) in masks.items()}

    return jax.jit(of)


def cells(config, features):
    """{title: bool [N, M]} of the only row, without its padding (which is in no cell)."""
    events, own = (np.asarray(x[0]) for x in (features.history_mask, features.candidate_mask))
    found = {}
    for title, cells_1nm in allowed(config)(features).items():
        partial = title == "partial tokens"
        rows, columns = (events, events) if partial else (own, np.concatenate([events, own]))
        whole_nm = np.asarray(cells_1nm[0])
        found[title] = whole_nm[np.ix_(rows, columns)]
        assert whole_nm.sum() == found[title].sum()
    return found


ONE = dataclasses.replace(SMALL, channels=1)


def test_mask_rows_of_the_figure():
    found = cells(ONE, of_events([10, 20, 30, 40], [1, 1, 2, 3]))
    assert set(found) == {"partial tokens", "full tokens, channel 0"}
    partial, full = found["partial tokens"], found["full tokens, channel 0"]
    np.testing.assert_array_equal(partial, np.tri(4))
    np.testing.assert_array_equal(full, np.concatenate([np.tri(4, k=-1), np.eye(4)], axis=1))
    assert partial.sum() + full.sum() == 20
    # Interleaved as the figure draws it: h1 h'1 h2 h'2 ..
    want = reference.allowed("PFPFPFPF", np.repeat([10, 20, 30, 40], 2))
    stream = np.zeros((8, 8), bool)
    stream[::2, ::2], stream[1::2, ::2], stream[1::2, 1::2] = partial, full[:, :4], full[:, 4:]
    np.testing.assert_array_equal(stream, want)


@pytest.mark.parametrize("E", [1, 2, 4, 7, 50])
def test_one_channel_allows_e_times_e_plus_1_cells(E):
    found = cells(ONE, of_events(list(range(E)), [1] * E, slots=(50, 50)))
    assert sum(x.sum() for x in found.values()) == E * (E + 1)


def test_the_packing_example_allows_19_of_81_cells():
    b = builders.batch(np.random.default_rng(0), lengths=(3, 2, 4), candidates=(1, 1, 1), S=4, C=1)
    f = builders.packed(b, 3)
    found = cells(ONE, f)["partial tokens"]
    assert found.size == 81 and found.sum() == 19


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(1, 4))
def test_cells_of_channels_are_the_closed_form(actions, channels):
    E = len(actions)
    config = dataclasses.replace(SMALL, channels=channels)
    f = of_events(list(range(E)), actions)
    channel = np.clip(np.array(actions) - 1, 0, channels - 1)
    np.testing.assert_array_equal(grab.channel_of(config, f)[0, :E], channel)
    found = cells(config, f)
    count = np.bincount(channel)
    assert found["partial tokens"].sum() == (count * (count + 1)).sum() // 2
    full = sum(x.sum() for title, x in found.items() if title != "partial tokens")
    assert full == E * (E - 1) // 2 + channels * E
    for a in range(channels):
        np.testing.assert_array_equal(
            found[f"full tokens, channel {a}"],
            np.concatenate([np.tri(E, k=-1) * (channel == a), np.eye(E)], axis=1),
        )


def test_cells_of_the_examples_channels():
    found = cells(SMALL, of_events(list(range(6)), [1, 2, 1, 3, 2, 1]))
    assert sum(x.sum() for x in found.values()) == 43


def test_a_window_counts_events_of_all_channels_and_never_hides_a_token_from_itself():
    config = dataclasses.replace(SMALL, channels=2, attn_window=2)
    found = cells(config, of_events([1, 2, 3, 4], [1, 2, 1, 1], candidates=[1, 5]))
    same = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(found["partial tokens"], same)
    # The second candidate has position 4, the last event 3, the one before it 2: distance 2 = w.
    full = [[0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1]]
    np.testing.assert_array_equal(found["full tokens, channel 0"], full)


def test_events_at_a_candidates_time_are_not_read():
    found = cells(ONE, of_events([10, 20, 20, 30], [1] * 4, candidates=[10, 20, 30, 31]))
    readable = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(found["full tokens, channel 0"][:, :4], readable)


# --- what reaches what ---------------------------------------------------------------------------


def test_a_windows_candidate_scores_as_the_last_token_of_its_own_instance():
    """Which is why one segment may stand for all the impressions of a user."""
    f, want = window(), score(window())
    for row, k in np.argwhere(f.candidate_mask):
        keep = f.history_mask & (f.history_time < f.candidate_time[row, k])
        alone = jnp.zeros((4, C), bool).at[row, k].set(True)
        instance = dataclasses.replace(
            f,
            history_sample=jnp.where(keep, f.history_sample, -1),
            candidate_sample=jnp.where(alone, f.candidate_sample, -1),
        )
        np.testing.assert_allclose(score(instance)[row, k], want[row, k], rtol=0, atol=1e-6)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.data())
def test_what_a_user_does_reaches_later_candidates_only(data):
    """Another action (so another channel), item or time of an event: earlier bits stay."""
    f, before = window(), score(window())
    row = data.draw(st.sampled_from([0, 2, 3]))
    slot = data.draw(st.integers(0, LENGTHS[row] - 1))
    what = data.draw(st.sampled_from(["action", "item", "time"]))
    at = np.s_[row, slot]
    time = int(f.history_time[at])
    if what == "action":
        other = f.history_action[at] % 3 + 1
        value = f.history["action"].at[at].add(1.0)
        change = {
            "history_action": f.history_action.at[at].set(other),
            "history": f.history | {"action": value},
        }
    elif what == "item":
        change = {"history": f.history | {"item": f.history["item"].at[at].add(3.0)}}
    else:  # as late as the next event allows
        change = {"history_time": f.history_time.at[at].add(3)}
    after = score(dataclasses.replace(f, **change))
    early = np.asarray(f.candidate_time)[row, : CANDIDATES[row]] <= time
    np.testing.assert_array_equal(
        after[row, : CANDIDATES[row]][early], before[row, : CANDIDATES[row]][early]
    )
    np.testing.assert_array_equal(np.delete(after, row, 0), np.delete(before, row, 0))
    if what != "time":
        assert (
            after[row, : CANDIDATES[row]][~early] != before[row, : CANDIDATES[row]][~early]
        ).all()


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(st.permutations(range(C)), st.integers(0, C - 1), st.booleans())
def test_candidates_do_not_see_each_other(order, changed, removed):
    f, before = window(), score(window())
    order = np.array(order)
    names = ("candidate_sample", "candidate_time", "candidate_order")
    shuffled = dataclasses.replace(
        f,
        candidate={k: x[:, order] for k, x in f.candidate.items()},
        **{name: getattr(f, name)[:, order] for name in names},
    )
    valid = np.asarray(shuffled.candidate_mask)
    np.testing.assert_allclose(score(shuffled)[valid], before[:, order][valid], rtol=0, atol=1e-6)
    other = {k: x.at[:, changed].add(5.0) for k, x in f.candidate.items()}
    sample = f.candidate_sample.at[:, changed].set(-1) if removed else f.candidate_sample
    after = score(dataclasses.replace(f, candidate=other, candidate_sample=sample))
    rest = np.arange(C) != changed
    np.testing.assert_array_equal(after[:, rest], before[:, rest])


@functools.cache
def streams(config):
    """(params, features) -> what enters the first layer [R, N, D], and every layer's streams."""
    model = grab.GRAB(dataclasses.replace(config, prune_last=False))

    @quick_jit
    def run(params, features):
        own = lambda module, _: isinstance(module, grab.Layer) or module.name == "token_norm"
        _, found = model.apply(
            {"params": params},
            *(features,),
            **{"train": False, "capture_intermediates": own, "mutable": ["intermediates"]},
        )
        names = ("token_norm", *(f"layer_{i}" for i in range(config.layers)))
        return [found["intermediates"][name]["__call__"][0] for name in names]

    return run


def test_channels_meet_in_the_candidates_only():
    f = window()
    action = jnp.asarray(np.tile([1, 2, 3, 1, 2, 3, 1], (4, 1)), jnp.int32)
    f = dataclasses.replace(f, history_action=action)
    other = {k: x.at[:, 2].add(1.0) for k, x in f.history.items()}  # an event of channel 2
    run = functools.partial(streams(SMALL), params_of(SMALL))
    before, after = (
        np.stack(run(dataclasses.replace(f, history=x))[1:]) for x in (f.history, other)
    )
    channel, row = np.array([0, 1, 2, 0, 1, 2, 0]), 0  # row 0 has five events
    for a in (0, 1):
        own = np.flatnonzero(channel[:5] == a)
        np.testing.assert_array_equal(after[:, a, row, own], before[:, a, row, own])
    assert (after[:, 2, row, 2] != before[:, 2, row, 2]).all()
    late = S + 3  # a candidate after that event
    first, last = after[0, :, row, late] != before[0, :, row, late], None
    assert not first[:2].any() and first[2].all(), "its copy in channel 2 alone, after one layer"
    last = after[1, :, row, late] != before[1, :, row, late]
    assert last.all(), "every copy, once mixed"


def test_packed_rows_score_as_separate_rows():
    b = batch_of_window()
    f = builders.features(b)
    for config in (SMALL, CONFIGS["one channel, vectors nearby"]):
        together = score(builders.features(pack(b, 2)), config).reshape(4, C, 2)
        valid = np.asarray(f.candidate_mask)
        np.testing.assert_allclose(together[valid], score(f, config)[valid], rtol=0, atol=2e-6)


def test_what_stands_at_padding_changes_nothing():
    f, rng = window(), np.random.default_rng(3)
    scribble = lambda x, mask: jnp.where(
        mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)),
        x,
        jnp.asarray(rng.integers(1, 9, x.shape), x.dtype),
    )
    dirty = dataclasses.replace(
        f,
        history={k: scribble(x, f.history_mask) for k, x in f.history.items()},
        candidate={k: scribble(x, f.candidate_mask) for k, x in f.candidate.items()},
        **{n: scribble(getattr(f, n), f.history_mask) for n in ("history_time", "history_action")},
        candidate_time=scribble(f.candidate_time, f.candidate_mask),
    )
    valid = np.asarray(f.candidate_mask)
    np.testing.assert_array_equal(score(dirty)[valid], score(f)[valid])


def test_shifting_all_times_changes_nothing():
    f = window()
    later = {x: getattr(f, x) + 12_345 for x in ("history_time", "candidate_time")}
    np.testing.assert_array_equal(score(dataclasses.replace(f, **later)), score(f))
    stretched = {x: getattr(f, x) * 7 for x in ("history_time", "candidate_time")}
    assert np.any(score(dataclasses.replace(f, **stretched)) != score(f))


# --- special cases -------------------------------------------------------------------------------


def test_one_channel_without_gate_and_vectors_is_a_plain_transformer():
    config = dataclasses.replace(ONE, latent=8)
    params = jax.tree.map(np.array, params_of(config))
    for layer in (params["layer_0"], params["layer_1"]):
        layer["mix"]["value"]["kernel"][:] = 0
        layer["read"]["down"]["kernel"][:] = np.eye(8)
        for table in layer["read"]["relative"].values():
            table[:] = 0
    f = window()
    x_rnd, _, (got,) = streams(config)(params, f)

    def plain(layer):
        p = builders.float64({**layer["read"], **layer["update"]})
        kernels = {n: p[n]["kernel"][0] for n in ("query", "key", "value", "out")}
        rest = ("attention_norm", "ffn_in", "ffn_out", "ffn_norm")
        return kernels | {n: {k: x[0] for k, x in p[n].items()} for n in rest}

    masks = allowed(config)(f)
    for row in (0, 3):
        allow = np.zeros((S + C, S + C), bool)
        allow[:S, :S] = masks["partial tokens"][row]
        allow[S:] = masks["full tokens, channel 0"][row]
        there = np.flatnonzero(np.concatenate([f.history_mask[row], f.candidate_mask[row]]))
        layers = [plain(params[f"layer_{i}"]) for i in range(2)]
        x_nd = np.float64(x_rnd[row][there])
        want = reference.transformer(x_nd, allow[np.ix_(there, there)], layers, 2)
        np.testing.assert_allclose(got[row][there], want, rtol=0, atol=1e-5)


def test_windows_as_wide_as_the_sequence_hide_nothing_and_without_vectors_attention_is_plain():
    f, want = window(), score(window())
    wide = dataclasses.replace(SMALL, attn_window=S + 1)
    np.testing.assert_array_equal(scorer(wide)(params_of(SMALL), f), want)
    narrow = scorer(dataclasses.replace(SMALL, attn_window=1))(params_of(SMALL), f)
    assert np.abs(narrow - want).max() > 1e-3
    params = jax.tree.map(np.array, params_of(SMALL))
    for layer in ("layer_0", "layer_1"):
        for table in params[layer]["read"]["relative"].values():
            table[:] = 0
    plain = np.asarray(scorer(SMALL)(params, f))
    nowhere = scorer(dataclasses.replace(SMALL, rab_window=0))(params_of(SMALL), f)
    np.testing.assert_allclose(nowhere, plain, rtol=0, atol=1e-6)
    assert np.abs(plain - want).max() > 1e-3


def test_the_last_layer_may_compute_the_candidates_only():
    pruned = dataclasses.replace(SMALL, layers=1, channels=2)
    params, f = params_of(pruned), window()

    def run(config):
        @quick_jit
        def of(params):
            def loss(params):
                logits, _ = grab.GRAB(config).apply({"params": params}, f, train=False)
                return jnp.sum(loss_weights() * logits), logits

            return jax.grad(loss, has_aux=True)(params)

        return of(without_sparse(params))

    found = run(pruned), run(dataclasses.replace(pruned, prune_last=False))
    for a, b in zip(*map(jax.tree.leaves, found)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


# --- two phases ----------------------------------------------------------------------------------


@functools.cache
def training():
    """Gradients of both losses by (parameters, embeddings), and the logits of each."""
    model, f = grab.GRAB(SMALL), window()

    @quick_jit
    def run(params, values):
        def losses(params, values):
            own = dataclasses.replace(f, **values)
            logits, aux = model.apply({"params": params}, own, train=True)
            assert list(aux) == ["sparse_phase"] and aux["sparse_phase"].owns_tables
            assert aux["sparse_phase"].weight == 1.0
            own = aux["sparse_phase"].logits
            both = jnp.sum(loss_weights() * logits), jnp.sum(loss_weights() * own)
            return both, (logits, own)

        _, pull, logits = jax.vjp(losses, params, values, has_aux=True)
        return pull((1.0, 0.0)), pull((0.0, 1.0)), logits

    return run


def test_the_sequence_phase_moves_no_table_and_the_sparse_phase_no_sequence():
    params, f = params_of(SMALL), window()
    (by_main, rows_main), (by_sparse, rows_sparse), (logits, _) = training()(params, values_of(f))
    zero = lambda tree: all(not np.any(x) for x in jax.tree.leaves(tree))
    assert zero(rows_main) and zero(by_main["sparse"])
    assert zero(without_sparse(by_sparse))
    assert not any(zero(x) for x in jax.tree.leaves(rows_sparse)), "an input that trains no table"
    assert not any(zero(x) for x in jax.tree.leaves(by_sparse["sparse"]))
    for a, b in zip(jax.tree.leaves(without_sparse(by_main)), jax.tree.leaves(gradients()[0])):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits, score(f), rtol=0, atol=1e-6)


def test_one_step_of_both_losses_is_one_phase_after_the_other():
    """With an optimizer that looks at each parameter alone."""
    params, values = params_of(SMALL), values_of(window())
    numpy = functools.partial(jax.tree.map, np.asarray)
    move = lambda tree, by: jax.tree.map(
        lambda p, g: p - 0.1 * g / (np.abs(g) + 1e-3), numpy(tree), numpy(by)
    )
    main, sparse, _ = training()(params, values)
    together = move((params, values), jax.tree.map(np.add, numpy(main), numpy(sparse)))
    first = move(without_sparse(params), without_sparse(main[0])) | {"sparse": params["sparse"]}
    _, (by_params, by_values), _ = training()(first, values)
    second = first | move({"sparse": params["sparse"]}, {"sparse": by_params["sparse"]})
    one_by_one = (second, move(values, by_values))
    assert jax.tree.structure(together) == jax.tree.structure(one_by_one)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(one_by_one)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def sparse_groups(f, row, k):
    """Inputs of a candidate by semantic group, float64."""
    item = ["item", "price", "tag"]
    earlier = np.asarray(f.history_mask[row] & (f.history_time[row] < f.candidate_time[row, k]))
    history = [side(f.history, [*item, "action"], row, s) for s in np.flatnonzero(earlier)]
    width = side(f.history, [*item, "action"], row, 0).size
    return [
        side(f.user, ["age", "spend"], row, 0),
        side(f.candidate, item, row, k),
        side(f.candidate, ["hour"], row, k),
        np.mean(history, axis=0) if history else np.zeros(width),
    ]


def test_sparse_phase_is_the_references_and_reads_the_past_only():
    f, params = window(), params_of(SMALL)
    (_, (by_params, by_values), (_, got)) = training()(params, values_of(f))
    params_64, values = builders.float64(params["sparse"]), float64_values()
    for row, k in np.argwhere(f.candidate_mask):
        want = reference.sparse_logits(params_64, sparse_groups(f, row, k))
        np.testing.assert_allclose(got[row, k], want, rtol=0, atol=1e-5)

    def loss(params, values):
        own = dataclasses.replace(f, **values)
        logits = [reference.sparse_logits(params, sparse_groups(own, *at)) for at in SCORED]
        return sum(loss_weights()[at] @ x for at, x in zip(SCORED, logits))

    rng = np.random.default_rng(8)
    check_slopes(slopes(lambda p: loss(p, values), params_64, by_params["sparse"], rng))
    check_slopes(slopes(lambda v: loss(params_64, v), values, by_values, rng))


def test_scoring_knows_no_sparse_phase_and_joint_training_has_none():
    f, params = window(), params_of(SMALL)
    served = without_sparse(params)
    np.testing.assert_array_equal(scorer(SMALL)(served, f), score(f))
    assert "sparse" not in shapes_of(SMALL, f, train=False)
    joint = dataclasses.replace(SMALL, sts="joint")
    assert jax.tree.structure(shapes_of(joint, f)) == jax.tree.structure(served)
    assert all(np.any(x) for x in jax.tree.leaves(gradients()[1])), "joint training moves tables"


# --- sizes ---------------------------------------------------------------------------------------


def test_parameters_of_the_specs_example():
    one = dataclasses.replace(grab.GRAB_CHOSEN, layers=1)
    assert (one.positions, one.latent, one.widths) == (None, None, (64, 64))
    assert one.paper_params() == 3_266_304
    f = jax.eval_shape(window)
    assert builders.count(shapes_of(one, f)["layer_0"]) == 3_266_304
    assert grab.GRAB_CHOSEN.paper_params() == 4 * 3_266_304
    gate = one.paper_params() - dataclasses.replace(one, mix="last", layers=2).paper_params() / 2
    assert gate == 1_179_648 / 2


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_everything(name):
    c = dataclasses.replace(CONFIGS[name], head_hidden=5, sparse_hidden=6)
    params, count = shapes_of(c, jax.eval_shape(window)), builders.count
    D, K, norm = c.width, c.tasks, {"layer": 2, "rms": 1, "none": 0}
    user, event, candidate = 4 + 1, (4 + 1 + 4) + 4, (4 + 1 + 4) + 4
    for x, part in ((event, "partial"), (user + candidate, "full")):
        assert count(params[part]) == 2 * (x * D + D) + D * D + D
    assert count(params.get("token_norm", {})) == norm[c.token_norm] * D
    layers = {k: x for k, x in params.items() if k.startswith("layer_")}
    assert len(layers) == c.layers and count(layers) == c.paper_params()
    A = 1 if c.readout == "mean" else c.channels
    assert count(params["head"]) == K * (A * D * 5 + 2 * 5 + 1)
    assert count(params.get("output_norm", {})) == norm[c.norm] * D * (c.norm_place == "pre")
    w, g, X = user + event + candidate, 4, 6
    assert count(params["sparse"]) == w * g + g + w * X + X + X * X + X + X * K + K
    there = {"partial", "full", "token_norm", "head", "output_norm", "sparse", *layers}
    assert set(params) <= there


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_multiplies_as_often_as_the_closed_form_says(name):
    c = dataclasses.replace(CONFIGS[name], implementation="reference")
    f = jax.eval_shape(lambda: of_events(list(range(5)), [1] * 5, [9, 9, 9], slots=(5, 3)))
    S, C, A, D = 5, 3, c.channels, c.width
    dh, r = c.widths
    F, inner, tables = c.expansion * D, c.heads * dh, sum(c.tables().rows)
    x = jax.ShapeDtypeStruct((A, 1, S + C, D), jnp.float32)
    layer = grab.Layer(c, True, True)

    def run(method, *args, last=False):
        of = lambda x, f, *args: method(
            *args, x, grab.channel_of(c, f), grab.sights(c, f), last=last
        )
        return functools.partial(of)

    params = jax.eval_shape(run(layer.init), x, f, jax.random.key(0))
    whole = flops.count(run(layer.apply), x, f, params).matmul
    token = 2 * (D * r + 3 * r * inner + inner * D + 2 * D * F) + 2 * inner * tables
    pairs = S * S + A * C * (S + C)
    gates = 4 * A**2 * D**2 * C
    assert whole == A * (S + C) * token + 4 * inner * pairs + gates
    pruned = flops.count(run(layer.apply, last=True), x, f, params).matmul
    # Events need the latent, a key and a value.
    event = 2 * (D * r + 2 * r * inner)
    assert pruned == A * (C * token + S * event) + 4 * inner * A * C * (S + C) + gates


def test_paper_flops():
    c = dataclasses.replace(ONE, channels=1, layers=3)
    token = 2 * (8 * 2 + 3 * 2 * 8 + 8 * 8 + 2 * 8 * 32) + 2 * 8 * (8 + 16 + 64)
    layer = lambda n: 2 * n * token + 4 * 8 * (2 * n) ** 2 + 4 * 8**2 * n
    assert c.paper_flops(5) == 3 * layer(5) and c.paper_flops() == 3 * layer(4)
    three = dataclasses.replace(c, channels=3)
    assert three.paper_flops(6) == 3 * (24 * token + 4 * 8 * 3 * (6 + 2) ** 2 + 4 * 24**2 * 6)
    once = dataclasses.replace(three, mix="last").paper_flops(6)
    assert three.paper_flops(6) - once == 2 * 4 * 24**2 * 6


def test_paper_record():
    assert isinstance(grab.PAPER, papers.Paper) and not grab.PAPER.figures
    assert all(size.chosen for size in grab.PAPER.sizes.values())
    assert "figure-faithful" in grab.PAPER.evidence
    assert "figure-faithful" in grab.__doc__ and "figure-faithful" in grab.Config.__doc__


# --- the rest ------------------------------------------------------------------------------------


def test_bfloat16_is_finite_with_gradients_and_near_float32():
    """With a padding row and a user without events."""
    config = dataclasses.replace(SMALL, dtype="bfloat16", layers=1, channels=2)
    f = window()
    f = dataclasses.replace(f, candidate_sample=f.candidate_sample.at[2].set(-1))
    model, params = grab.GRAB(config), params_of(config)

    @quick_jit
    @functools.partial(jax.grad, has_aux=True)
    def run(params):
        logits, aux = model.apply({"params": params}, f, train=True)
        assert logits.dtype == aux["sparse_phase"].logits.dtype == jnp.float32
        both = logits + aux["sparse_phase"].logits
        return jnp.sum(jnp.where(f.candidate_mask[..., None], both, 0) ** 2), logits

    gradients, logits = run(params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((gradients, logits)))
    exact = score(f, dataclasses.replace(config, dtype="float32"))
    valid = np.asarray(f.candidate_mask)
    np.testing.assert_allclose(logits[valid], exact[valid], rtol=0.1, atol=0.15)


def test_gradients_are_finite_for_a_user_without_events_and_for_padding():
    f = window()
    empty = dataclasses.replace(f, history_sample=f.history_sample * 0 - 1)
    (by_main, _), (by_sparse, rows), logits = training()(params_of(SMALL), values_of(empty))
    found = jax.tree.leaves((by_main, by_sparse, rows, logits))
    assert all(np.all(np.isfinite(x)) for x in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 9}, "width=9, expected a multiple of heads=2"),
        ({"history": 0}, "history=0, expected an integer >= 1"),
        ({"realtime": -1}, "realtime=-1, expected an integer >= 0"),
        ({"channels": 0}, "channels=0, expected an integer >= 1"),
        ({"channel_starts": (3,)}, r"channel_starts=\(3,\), expected 2 increasing action ids"),
        ({"channel_starts": (3, 3)}, r"channel_starts=\(3, 3\), expected 2 increasing"),
        ({"action_ids": 1}, "action_ids=1, expected an integer >= 2"),
        ({"attn_window": 0}, "attn_window=0, expected an integer >= 1"),
        ({"rab_window": -1}, "rab_window=-1, expected an integer >= 0"),
        ({"latent": 0}, "latent=0, expected an integer >= 1"),
        ({"mix": "first"}, "mix='first', expected one of"),
        ({"readout": "sum"}, "readout='sum', expected one of"),
        ({"sts": "three_phase"}, "sts='three_phase', expected one of"),
        ({"norm": "batch"}, "norm='batch', expected one of"),
        ({"norm_place": "both"}, "norm_place='both', expected one of"),
        ({"token_norm": "batch"}, "token_norm='batch', expected one of"),
        ({"init": "ones"}, "init='ones', expected one of"),
        ({"implementation": "cuda"}, "implementation='cuda', expected one of"),
        ({"dtype": "float16"}, "dtype='float16', expected one of"),
    ],
)
def test_refused_configurations(change, message):
    with pytest.raises(ValueError, match=f"grab.Config: {message}"):
        dataclasses.replace(SMALL, **change)


def test_a_schema_without_items_is_refused():
    f = window()
    only = tuple(x for x in f.schema.features if x.side != "item")
    bare = dataclasses.replace(f, schema=dataclasses.replace(f.schema, features=only))
    with pytest.raises(ValueError, match="grab: the schema has no item feature"):
        jax.eval_shape(
            functools.partial(grab.GRAB(SMALL).init, train=False), jax.random.key(0), bare
        )


@pytest.mark.parametrize("config", [*CONFIGS.values(), grab.GRAB_CHOSEN])
def test_config_goes_to_json_and_back(config):
    assert grab.Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_windows_are_taken():
    assert grab.GRAB.windows and not window().one_time
