"""What every architecture must hold, through the one scoring function: from ids to logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rankjax import embedding, evaluate, loss, models
from rankjax.batch import Batch
from rankjax.data import event_log, loader, samples
from rankjax.models import (
    autoint,
    dcnv2,
    din,
    dlrm,
    dlrm_v3,
    grab,
    hhft,
    hiformer,
    hstu,
    longer,
    mtgr,
    onetrans,
    rankmixer,
    tokenmixer_large,
    transformer,
    wukong,
)
from rankjax.packing import pack, pack_jagged
from rankjax.scaling import presets, sizes
from tests import tiny

S, C, R = 10, 4, 6
# Quick to compile, slow to run: what fits tiny batches.
QUICK = {"xla_backend_optimization_level": 0}
NOON = 3 * 86400 // 2  # of the second day of tiny's log
CONFIGS = {
    "dlrm_mlp": dlrm.Config(layers=2, width=8, tasks=2, pooling=("mean", "target")),
    "dlrm": dlrm.DotConfig(layers=2, width=6, expansion=2, tasks=2, pooling=("mean", "target")),
    "dcnv2_din": dcnv2.Config(layers=2, width=8, tasks=2),
    "din": din.Config(layers=2, width=8, tasks=2),
    "autoint": autoint.Config(layers=2, width=8, tasks=2, pooling=("mean", "target")),
    "wukong": wukong.Config(layers=2, width=8, rank=4, hidden=8, attentive=True, tasks=2),
    "transformer": transformer.Config(layers=2, width=8, heads=2, expansion=2, tasks=2),
    "heteroatt": hiformer.HeteroAttConfig(layers=2, width=8, heads=2, expansion=2, tasks=2),
    "hiformer": hiformer.HiformerConfig(
        tokenizer="group", layers=2, width=8, heads=2, expansion=2, rank_value=6, tasks=2
    ),
    "hhft": hhft.Config(width=8, heads=2, virtual_tokens=4, tower=(8,), tasks=2),
    "rankmixer": rankmixer.Config(
        tokens=4, layers=2, width=8, expansion=2, tasks=2, pooling=("mean", "target")
    ),
    "tokenmixer_large": tokenmixer_large.Config(layers=2, width=10, tasks=2),
    "dlrm_v3": dlrm_v3.Config(history=16, layers=2, width=8, heads=2, time_buckets=30, tasks=2),
    "hstu": hstu.Config(history=16, realtime=16, layers=2, width=8, heads=2, tasks=2),
    "longer": longer.Config(history=16, layers=2, width=8, heads=2, merge=2, recent=3, tasks=2),
    "mtgr": mtgr.Config(history=16, realtime=16, layers=2, width=8, heads=2, tasks=2),
    "grab": grab.Config(history=16, realtime=16, layers=2, width=8, heads=2, tasks=2),
    "onetrans": onetrans.Config(
        history=16, tokens=4, layers=2, width=8, heads=2, expansion=2, tasks=2
    ),
}
TABLES = embedding.TableConfig(width=4, init_std=0.3)
EACH = pytest.mark.parametrize("name", sorted(models.MODELS))


def config_of(name: str):
    """The Config that the suite tests; without an entry above, the small one of the presets."""
    return CONFIGS.get(name) or presets.model(name, tasks=2, history=16)


def test_every_config_is_of_an_architecture():
    assert CONFIGS.keys() <= models.MODELS.keys()


@functools.cache
def made(name: str, dtype: str = "float32", **changes):
    """(model, layout, params, tables): every parameter drawn, none at its initial 0 or 1."""
    config = dataclasses.replace(config_of(name), dtype=dtype, **changes)
    model = models.MODELS[name](config)
    schema = tiny.batch().schema
    layout = embedding.plan(schema, TABLES)
    params = sizes.abstract_params(config, schema, TABLES.width)
    tables = jax.eval_shape(lambda: embedding.init(jax.random.key(0), schema, TABLES))
    rng = np.random.default_rng(0)

    def draw(path, x):
        values = rng.normal(size=x.shape)
        if x.ndim > 1:
            values /= np.sqrt(x.shape[-2])
        else:
            values = 0.3 * values + (path[-1].key == "scale")
        return values.astype(np.float32)

    def rows(x):
        values = 0.3 * rng.normal(size=x.shape).astype(np.float32)
        values[0] = 0  # of what is missing
        return values

    params = jax.tree_util.tree_map_with_path(draw, params)
    return model, layout, params, jax.tree.map(rows, tables)


@functools.cache
def scorer(name: str, dtype: str = "float32"):
    """Batch -> logits [R, C, K]."""
    model, layout, params, tables = made(name, dtype)
    score = jax.jit(functools.partial(evaluate.score, model, layout), compiler_options=QUICK)
    return lambda batch: np.asarray(score(params, tables, batch.without_impression()))


def random_batch(**options) -> Batch:
    return tiny.batch(**({"samples": R, "history": S, "candidates": C} | options))


def part(batch: Batch, change, *, of: tuple[str, ...]) -> Batch:
    """`change(array)` applied to every array of these sides and their sample, time and order."""
    new = {}
    for side in of:
        new[side] = {k: change(x) for k, x in getattr(batch, side).items()}
        for name in (f"{side}_sample", f"{side}_time", f"{side}_order"):
            new[name] = change(getattr(batch, name))
        if side == "candidate":
            new |= {k: change(getattr(batch, k)) for k in ("labels", "weights", "impression")}
    return dataclasses.replace(batch, **new)


@EACH
def test_padding_changes_nothing(name):
    batch = random_batch()

    def longer(x):
        fill = -1 if x is batch.history_sample or x is batch.candidate_sample else 0
        width = [(0, 0), (0, 3), *[(0, 0)] * (x.ndim - 2)]
        return np.pad(x, width, constant_values=fill)

    padded = part(batch, longer, of=("history", "candidate"))
    want, got = scorer(name)(batch), scorer(name)(padded)
    valid = batch.candidate_mask
    np.testing.assert_allclose(got[:, :C][valid], want[valid], rtol=1e-5, atol=1e-5)


@EACH
def test_what_stands_at_padding_changes_nothing(name):
    batch = random_batch()
    rng = np.random.default_rng(1)

    def scribble(x, mask):
        noise = rng.integers(1, 4, x.shape).astype(x.dtype)
        return np.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, noise)

    dirty = dataclasses.replace(
        batch,
        history={k: scribble(x, batch.history_mask) for k, x in batch.history.items()},
        history_time=scribble(batch.history_time, batch.history_mask),
        history_order=scribble(batch.history_order, batch.history_mask),
    )
    valid = batch.candidate_mask
    np.testing.assert_array_equal(scorer(name)(dirty)[valid], scorer(name)(batch)[valid])


@EACH
def test_other_samples_of_the_batch_change_nothing(name):
    batch, other = random_batch(), random_batch(seed=1)
    mixed = jax.tree.map(lambda a, b: np.concatenate([a[:3], b[3:]]), batch, other)
    np.testing.assert_allclose(
        scorer(name)(mixed)[:3], scorer(name)(batch)[:3], rtol=1e-5, atol=1e-6
    )


@EACH
def test_candidates_do_not_see_each_other(name):
    batch = random_batch(full=True)
    order = np.array([2, 0, 3, 1])
    shuffled = part(batch, lambda x: x[:, order], of=("candidate",))
    want = scorer(name)(batch)
    np.testing.assert_allclose(scorer(name)(shuffled), want[:, order], rtol=1e-5, atol=1e-6)
    changed = {k: x.copy() for k, x in batch.candidate.items()}
    changed["item"][:, 1] = changed["item"][:, 1] % 29 + 1
    got = scorer(name)(dataclasses.replace(batch, candidate=changed))
    np.testing.assert_array_equal(got[:, [0, 2, 3]], want[:, [0, 2, 3]])
    assert np.abs(got[:, 1] - want[:, 1]).min() > 0


@EACH
def test_candidates_score_alike_alone_in_any_microbatch_and_all_at_once(name):
    """So that a server may read the user's side once and candidates in parts, in any order."""
    one_time = not models.MODELS[name].windows
    batch = random_batch(full=True, one_time=one_time, seed=2)
    want, rng = scorer(name)(batch), np.random.default_rng(0)
    parts = [np.array([k]) for k in range(C)] + [rng.permutation(C)[:2] for _ in range(3)]
    for kept in parts:
        order = np.concatenate([kept, np.setdiff1d(np.arange(C), kept)])
        moved = part(batch, lambda x, order=order: x[:, order], of=("candidate",))
        there = np.arange(C) < len(kept)
        sample = np.where(there, moved.candidate_sample, -1).astype(np.int32)
        got = scorer(name)(dataclasses.replace(moved, candidate_sample=sample))
        np.testing.assert_allclose(got[:, : len(kept)], want[:, kept], rtol=1e-5, atol=1e-6)


@EACH
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_padding_and_any_packing_score_alike(name, data):
    """Any events and candidates of any sample may be missing, rows of their own or packed."""
    holes = arrays(bool, (R, S), elements=st.booleans()), arrays(bool, (R, C))
    no_event, no_candidate = (data.draw(x) for x in holes)
    batch = random_batch(full=True, seed=data.draw(st.integers(0, 3)))
    holed = dataclasses.replace(
        batch,
        history_sample=np.where(no_event, -1, batch.history_sample).astype(np.int32),
        candidate_sample=np.where(no_candidate, -1, batch.candidate_sample).astype(np.int32),
    )
    rank = np.argsort(no_event, axis=1, kind="stable")  # the same events, moved to the front
    tight = part(holed, lambda x: _take(x, rank), of=("history",))
    want = scorer(name)(tight)[~no_candidate]
    assert np.isfinite(want).all()
    got = scorer(name)(holed)[~no_candidate]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    packed = scorer(name)(pack(holed, 2)).reshape(R, C, -1)[~no_candidate]
    np.testing.assert_allclose(packed, want, rtol=2e-5, atol=2e-5)


def _take(x, rank):
    return np.take_along_axis(x, rank.reshape(*rank.shape, *(1,) * (x.ndim - 2)), axis=1)


@EACH
def test_a_flag_that_is_text_is_refused(name):
    config = config_of(name)
    for field in dataclasses.fields(config):
        if field.type is bool:
            with pytest.raises(ValueError, match=f"{field.name}='false', expected True or False"):
                dataclasses.replace(config, **{field.name: "false"})


@EACH
def test_bad_batches_are_refused_before_compiling(name):
    batch = random_batch()
    none = part(batch, lambda x: x[:, :0], of=("candidate",))
    with pytest.raises(ValueError, match="expected at least one candidate slot"):
        scorer(name)(none)
    candidate = {k: x for k, x in batch.candidate.items() if k != "category"}
    with pytest.raises(ValueError, match=r"candidate lacks \['category'\]"):
        scorer(name)(dataclasses.replace(batch, candidate=candidate))


@EACH
@pytest.mark.parametrize("per_row", [2, 3])
def test_packed_rows_score_like_rows_of_their_own(name, per_row):
    batch = random_batch()
    got = scorer(name)(pack(batch, per_row)).reshape(R, C, -1)
    valid = batch.candidate_mask
    np.testing.assert_allclose(got[valid], scorer(name)(batch)[valid], rtol=2e-5, atol=2e-5)


def different_lengths(*, one_time: bool = True) -> Batch:
    """Samples of no event, of few and of a full history, with 1 .. C candidates each."""
    batch = random_batch(full=True, seed=5, one_time=one_time)
    there = np.arange(S) < np.array([0, 3, 6, 10, 2, 10])[:, None]
    shown = np.arange(C) < np.array([3, 1, 2, 4, 3, 1])[:, None]
    return dataclasses.replace(
        batch,
        history_sample=np.where(there, 0, -1).astype(np.int32),
        candidate_sample=np.where(shown, 0, -1).astype(np.int32),
        weights=np.where(shown[..., None], batch.weights, 0).astype(np.float32),
        impression=np.where(shown, batch.impression, -1),
    )


def jagged(batch: Batch) -> Batch:
    """Rows of two, one, three and no samples, each with room for four."""
    found = pack_jagged(batch, history=S + 1, candidates=2 * C, rows=R, samples=4)
    assert [len(set(row) - {-1}) for row in found.candidate_sample] == [2, 1, 3, 0, 0, 0]
    # Where a row has fewer samples than G stands a user, whom nobody may read.
    unused = np.arange(4) > found.candidate_sample.max(axis=1, keepdims=True)
    stranger = {"user": 8, "segment": 7, "activity": 5.0}
    user = {k: np.where(unused, stranger[k], x).astype(x.dtype) for k, x in found.user.items()}
    return dataclasses.replace(found, user=user)


def apart(batch: Batch) -> Batch:
    """Rows of one sample each, as large as those of `jagged`, so that both compile once."""

    def pad(x, slots):
        fill = -1 if x is batch.history_sample or x is batch.candidate_sample else 0
        return np.pad(
            *(x, [(0, 0), (0, slots - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]), constant_values=fill
        )

    found = part(batch, functools.partial(pad, slots=S + 1), of=("history",))
    found = part(found, functools.partial(pad, slots=2 * C), of=("candidate",))
    user = {k: pad(x, 4) for k, x in batch.user.items()}
    return dataclasses.replace(found, user=user)


def by_impression(batch: Batch, x_rck: np.ndarray) -> np.ndarray:
    valid = batch.impression >= 0
    return np.asarray(x_rck)[valid][np.argsort(batch.impression[valid])]


@EACH
def test_jagged_rows_score_like_rows_of_their_own(name):
    batch = different_lengths(one_time=not models.MODELS[name].windows)
    rows = jagged(batch)
    want, got = (by_impression(b, scorer(name)(b)) for b in (batch, rows))
    assert np.isfinite(want).all() and len(want) == 14
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@EACH
def test_jagged_rows_are_learned_from_like_rows_of_their_own(name):
    """The same loss and gradients; none of what stands where a row has fewer samples than G."""
    batch, learn = different_lengths(), learner(name)
    same_step(learn(jagged(batch)), learn(apart(batch)))


def same_step(got, want) -> None:
    """What `learner` found of two layouts is the same."""
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, got[1], want[1])
    # Row 0, of missing ids, never learns.
    jax.tree.map(lambda a, b: close(a[1:], b[1:]), got[2], want[2])


def learner(name: str, **changes):
    """Batch -> (loss, gradients of the parameters, gradients of whole tables)."""
    model, layout, params, tables = made(name, **changes)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, tables, batch):
        ids = embedding.deduplicate(layout, batch, "whole")

        def objective(params, rows):
            rngs = {"dropout": jax.random.key(0)}
            logits, aux = evaluate.apply(
                model, layout, params, rows, ids, batch, train=True, rngs=rngs
            )
            given = logits, batch.labels, batch.weights, aux, batch.schema
            return loss.multi_task(*given, aux_weights=loss.first_weights(aux, {}))[0]

        rows = embedding.gather(tables, ids)
        total, gradients = jax.value_and_grad(objective, argnums=(0, 1))(params, rows)
        return total, *gradients

    return lambda batch: step(params, tables, batch.without_impression())


@EACH
def test_reads_the_history_and_the_user(name):
    batch = random_batch(full=True)
    want = scorer(name)(batch)
    history = {k: x.copy() for k, x in batch.history.items()}
    history["item"][:, 4] = history["item"][:, 4] % 29 + 1
    user = {k: x.copy() for k, x in batch.user.items()}
    user["segment"] = user["segment"] % 6 + 1
    for change in ({"history": history}, {"user": user}):
        got = scorer(name)(dataclasses.replace(batch, **change))
        assert np.abs(got - want).max() > 1e-6


@EACH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finite_without_any_history(name, dtype):
    batch = random_batch()
    none = dataclasses.replace(batch, history_sample=np.full_like(batch.history_sample, -1))
    logits = scorer(name, dtype)(none)
    assert logits.dtype == np.float32 and np.isfinite(logits).all()


@EACH
def test_a_row_of_padding_is_zero_and_leaves_every_gradient_finite(name):
    """In bfloat16, where a NaN that only padding sees would come first."""
    batch = random_batch()
    empty = np.arange(R)[:, None] == 2
    batch = dataclasses.replace(
        batch,
        history_sample=np.where(empty, -1, batch.history_sample).astype(np.int32),
        candidate_sample=np.where(empty, -1, batch.candidate_sample).astype(np.int32),
        weights=np.where(empty[..., None], 0, batch.weights).astype(np.float32),
    )
    model, layout, params, tables = made(name, "bfloat16")
    ids = embedding.deduplicate(layout, batch.without_impression())

    def objective(params, rows, batch):
        rngs = {"dropout": jax.random.key(0)}
        logits, aux = evaluate.apply(model, layout, params, rows, ids, batch, train=True, rngs=rngs)
        weights = loss.first_weights(aux, {})
        found = loss.multi_task(
            logits, batch.labels, batch.weights, aux, batch.schema, aux_weights=weights
        )
        return found[0], logits

    step = jax.jit(
        jax.value_and_grad(objective, argnums=(0, 1), has_aux=True), compiler_options=QUICK
    )
    rows = embedding.gather(tables, ids)
    (total, logits), gradients = step(params, rows, batch.without_impression())
    assert np.isfinite(total) and not np.asarray(logits)[2].any()
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(gradients))
    assert all(g.dtype == np.float32 for g in jax.tree.leaves(gradients))
    moved = [np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(gradients[0])]
    assert np.mean(moved) > 0.7  # pruned parts and unused table rows may stand still


@EACH
def test_bfloat16_is_near_float32(name):
    batch = random_batch(full=True)
    want, got = scorer(name)(batch), scorer(name, "bfloat16")(batch)
    assert np.abs(got - want).max() < 0.05 * max(1, np.abs(want).max())


@EACH
def test_windows_are_taken_or_refused(name):
    batch = random_batch(one_time=False)
    if models.MODELS[name].windows:
        assert np.isfinite(scorer(name)(batch)).all()
    else:
        with pytest.raises(ValueError, match="different times"):
            scorer(name)(batch)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """{what was done to all events from `NOON` on: the log}, otherwise equal."""
    schema, files = tiny.columns(requests=60, events=400)
    rng, events = np.random.default_rng(5), files["events"]
    late = events["time"] >= NOON
    item = rng.integers(1, 30, len(late), dtype=np.int32)
    changed = events | {
        "item": np.where(late, item, events["item"]),
        "action": np.where(late, events["action"] % 3 + 1, events["action"]),
    }
    # Every third event from noon on once more, a minute later.
    again = np.flatnonzero(late)[::3]
    order = np.argsort(np.concatenate([np.arange(len(late)), again + 0.5]), kind="stable")
    more = {k: np.concatenate([x, x[again]])[order] for k, x in events.items()}
    found = {}
    for what, kept in (
        ("nothing", events),
        ("perturb", changed),
        ("insert", more),
        ("delete", {k: x[~late] for k, x in events.items()}),
    ):
        folder = tmp_path_factory.mktemp("logs") / "log"
        own = files | {"events": kept}
        found[what] = event_log.EventLog.open(
            event_log.write_log(folder, schema, **own, fingerprint={"what": what})
        )
    return found


@EACH
@pytest.mark.parametrize("what", ["perturb", "insert", "delete"])
def test_later_events_of_the_log_change_no_logit(name, what, logs):
    """From the files on: candidates up to `NOON` do not know what stands in the log after it."""

    def logits(log):
        config = samples.SampleConfig(organisation="request", history=S, max_candidates=C)
        batches = loader.Batches(log, samples.build(log, config, "train"), batch_samples=R)
        found = evaluate.stream(scorer(name), enumerate(batches[i] for i in range(len(batches))), 2)
        return found.logits[np.argsort(found.impression)], np.sort(found.impression)

    (want, rows), (got, same) = logits(logs["nothing"]), logits(logs[what])
    np.testing.assert_array_equal(same, rows)
    early = logs[what].column("impressions", "time")[rows] <= NOON
    assert 0.1 < early.mean() < 0.9
    if what == "perturb":  # equal shapes, so equal bits
        np.testing.assert_array_equal(got[early], want[early])
    else:
        np.testing.assert_allclose(got[early], want[early], rtol=1e-5, atol=1e-5)
    assert np.abs(got[~early] - want[~early]).max() > 1e-3


# Models of one stream of events and candidates; LONGER and OneTrans cache in their own tests.
STREAMS = {
    "hstu": hstu.Layer,
    "dlrm_v3": dlrm_v3.STULayer,
    "mtgr": mtgr.Layer,
    "grab": grab.Layer,
}


@pytest.mark.parametrize("name", STREAMS)
def test_scores_from_a_cache_are_the_recomputed_ones(name):
    """Each layer's input of the user's side, read once for whichever candidates, is enough.

    Keys and values are made of its rows. It is read with noise as the candidates, of which it knows
    the time alone; they are then scored with noise in place of what only the user's side reads.
    """
    model, layout, params, tables = made(name)
    batch = random_batch(one_time=not model.windows, full=True, seed=4).without_impression()
    ids = embedding.deduplicate(layout, batch)
    given = jax.tree.map(jnp.asarray, (embedding.gather(tables, ids), ids, batch))
    features, _ = embedding.features(layout, *given)

    def run(params, f, cache=None):
        seen = {}

        def intercept(call, args, kwargs, context):
            if isinstance(context.module, STREAMS[name]) and context.method_name == "__call__":
                layer, (x, *rest) = context.module.name, args
                side = x[..., : x.shape[-2] - C, :]
                seen[layer] = side
                if cache is not None:
                    args = (jnp.concatenate([cache[layer], x[..., -C:, :]], axis=-2), *rest)
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            return model.apply({"params": params}, f, train=False)[0], seen

    run = jax.jit(run, compiler_options=QUICK)
    noise = lambda values: {
        k: np.random.default_rng(len(k)).normal(size=x.shape).astype("f4")
        for k, x in values.items()
    }
    _, cache = run(params, dataclasses.replace(features, candidate=noise(features.candidate)))
    own = {"history": noise(features.history)}
    if name != "grab":  # whose candidates' tokens hold the user's features
        own["user"] = noise(features.user)
    blind = dataclasses.replace(features, **own)
    (want, _), (without, _), (got, _) = (
        run(params, features),
        run(params, blind),
        run(params, blind, cache),
    )
    assert len(cache) == 2 and np.abs(without - want).max() > 1e-2
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


WINDOWED = pytest.mark.parametrize(
    "name", [k for k in sorted(models.MODELS) if models.MODELS[k].windows]
)


def window() -> Batch:
    """Full rows whose events and candidates interleave, with room for one more event."""
    batch = random_batch(one_time=False, full=True, seed=3)
    last = np.arange(S) == S - 1
    return dataclasses.replace(
        batch, history_sample=np.where(last, -1, batch.history_sample).astype(np.int32)
    )


@WINDOWED
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("what", ["perturb", "delete", "insert"])
def test_later_events_change_no_bit(name, what, packed):
    """Events at or after a candidate's time: changed, taken away, or one more of them."""
    batch = window()
    lay = functools.partial(pack, samples_per_row=2) if packed else lambda x: x
    want = scorer(name)(lay(batch)).reshape(R, C, -1)
    changed = 0
    for row in range(R):
        event = S - 2  # the newest
        history = {k: x.copy() for k, x in batch.history.items()}
        sample, time, order = (
            x.copy() for x in (batch.history_sample, batch.history_time, batch.history_order)
        )
        if what == "perturb":
            history["item"][row, event] = history["item"][row, event] % 29 + 1
            history["action"][row, event] = history["action"][row, event] % 3 + 1
            time[row, event] += 40
        elif what == "delete":
            sample[row, event] = -1
        else:
            sample[row, event + 1] = 0
            time[row, event + 1], order[row, event + 1] = time[row, event] + 5, order[row, event]
            order[row, event + 1] += 1
            event += 1
        new = dataclasses.replace(
            batch, history=history, history_sample=sample, history_time=time, history_order=order
        )
        got = scorer(name)(lay(new)).reshape(R, C, -1)
        at = batch.history_time[row, min(event, S - 2)] + (5 if what == "insert" else 0)
        before = batch.candidate_time[row] <= at
        np.testing.assert_array_equal(got[row][before], want[row][before])
        np.testing.assert_array_equal(np.delete(got, row, 0), np.delete(want, row, 0))
        changed += int((got[row][~before] != want[row][~before]).any())
        assert before.any()
    assert changed > 0  # a candidate after the event does read it
