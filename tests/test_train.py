"""The step changes what it should, the loop resumes to the same bits, and NaN stops it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rankjax import checkpoint, embedding, evaluate, loss, models, optim, sharding, train
from rankjax.data import event_log, samples
from rankjax.layers import auxiliary
from rankjax.models import dcnv2, dlrm, grab, hstu, mtgr, rankmixer
from tests import tiny

CONFIG = train.TrainConfig(
    batch=64,
    log_every=2,
    tables=embedding.TableConfig(width=4, init_std=0.3),
    optimizer=optim.OptimConfig(learning_rate=3e-3),
)
MODEL = dlrm.Config(layers=1, width=8, tasks=2)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log") / "log"
    return event_log.EventLog.open(tiny.log(folder, requests=200, events=400))


@pytest.fixture(scope="module")
def chosen(log):
    config = samples.SampleConfig(organisation="request", history=10)
    return samples.build(log, config, "train")


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_tables_rates_stand_still_unless_they_are_scheduled(scheduled):
    tables = dataclasses.replace(CONFIG.tables, scheduled=scheduled, bias_learning_rate=0.2)
    rates = train.rates_of(dataclasses.replace(CONFIG, tables=tables), 100)
    first, peak, last = rates(0), rates(5), rates(99)
    assert first["dense"] == pytest.approx(3e-3 / 5)  # five steps of warm-up
    assert peak["dense"] == pytest.approx(3e-3)
    assert last["dense"] < 1e-5
    for at in (first, peak, last):
        share = at["dense"] / 3e-3 if scheduled else 1.0
        assert at["tables"] == pytest.approx(0.1 * share)
        assert at["biases"] == pytest.approx(0.2 * share)


def leaves(tree):
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}


def assert_same_bits(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        dcnv2.Config(layers=1, width=8, tasks=2),
        rankmixer.Config(tokens=4, layers=1, width=8, tasks=2, pooling=("mean", "target")),
        hstu.Config(history=10, layers=2, width=8, tasks=2),
        mtgr.Config(history=10, layers=1, width=8, heads=2, tasks=2),
        grab.Config(history=10, layers=1, width=8, heads=2, tasks=2),
    ],
    ids=lambda m: type(m).__module__.rsplit(".", 1)[1],
)
def test_a_step_changes_every_parameter_and_only_the_rows_of_its_batch(model, log, chosen):
    prog = train.program(model, log.schema, CONFIG)
    batch = train.batches(log, CONFIG, chosen)[1]
    state = train.init(model, log.schema, CONFIG, batch)
    before = jax.tree.map(np.array, state)
    rates = {"dense": np.float32(1e-2), "tables": np.float32(0.1), "biases": np.float32(0.1)}
    after, out = prog.step(state, batch.without_impression(), rates, jax.random.key(0))
    assert bool(out["ok"]) and int(after.step) == 1
    # Two steps: biases that start at 0 behind a zero gradient (a first ReLU) move in the second.
    after, _ = prog.step(after, batch.without_impression(), rates, jax.random.key(0))
    old, new = leaves(before.params), leaves(after.params)
    still = [k for k in old if np.array_equal(old[k], new[k])]
    assert not still
    ids = embedding.deduplicate(prog.layout, batch.without_impression())
    for name, table in before.tables.items():
        named = np.unique(np.concatenate([np.ravel(x) for x in ids.inverse[name]]))
        if ids.unique[name] is not None:
            named = np.asarray(ids.unique[name])[named]
        moved = np.flatnonzero((table["embedding"] != after.tables[name]["embedding"]).any(-1))
        assert set(moved) == set(named.tolist()) - {0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    target: float = 0.5


class Toy(nn.Module):
    """One number that a penalty measures, and a head that only training has."""

    config: ToyConfig
    windows = False

    @nn.compact
    def __call__(self, features, *, train):
        size = self.param("size", nn.initializers.ones, ())
        logits_rck = jnp.zeros((*features.candidate_sample.shape, 2)) + size
        if not train:
            return logits_rck, {}
        extra = self.param("extra", nn.initializers.zeros, ())
        return logits_rck, {
            "held": auxiliary.Penalty(size, 0.1, size, self.config.target),
            "head": auxiliary.Logits(0 * logits_rck + extra, 0.25),
        }


def test_auxiliary_weights_live_in_the_state_and_are_adapted(log, chosen, monkeypatch):
    monkeypatch.setitem(models.MODELS, "toy", Toy)
    config = dataclasses.replace(CONFIG, aux_weights=(("head", 0.5),))
    batch = train.batches(log, config, chosen)[0]
    state = train.init(ToyConfig(), log.schema, config, batch)
    assert {k: float(v) for k, v in state.aux_weights.items()} == pytest.approx(
        {"held": 0.1, "head": 0.5}
    )
    assert set(state.params) == {"size", "extra"}
    prog = train.program(ToyConfig(), log.schema, config)
    rates = dict.fromkeys(("dense", "tables", "biases"), np.float32(0.01))
    new, out = prog.step(state, batch.without_impression(), rates, jax.random.key(0))
    assert float(new.aux_weights["held"]) == pytest.approx(0.1 * loss.ADAPT)
    assert float(new.aux_weights["head"]) == pytest.approx(0.5)
    assert {"aux/held", "aux/head"} < set(out["parts"])
    assert float(new.params["extra"]) != 0
    with pytest.raises(ValueError, match=r"aux_weights names \['tail'\]"):
        train.init(
            ToyConfig(),
            log.schema,
            dataclasses.replace(CONFIG, aux_weights=(("tail", 1.0),)),
            batch,
        )


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_grabs_tables_learn_from_the_sparse_phase_alone(weight, log, chosen):
    """And its sequence network from the other loss alone: with a step of both."""
    model = grab.Config(history=10, layers=1, width=8, heads=2, tasks=2)
    whole = dataclasses.replace(CONFIG, optimizer=optim.OptimConfig(clip=None))
    config = dataclasses.replace(whole, aux_weights=(("sparse_phase", weight),))
    batch = train.batches(log, config, chosen)[1]
    first = train.init(model, log.schema, config, batch)
    before = jax.tree.map(np.array, first)
    rates = {"dense": np.float32(1e-2), "tables": np.float32(0.1), "biases": np.float32(0.1)}
    step, after = train.program(model, log.schema, config).step, first
    for _ in range(2):  # what starts at 0 behind a zero gradient moves in the second
        after, _ = step(after, batch.without_impression(), rates, jax.random.key(0))
    tables = [
        np.array_equal(x["embedding"], after.tables[name]["embedding"])
        for name, x in before.tables.items()
    ]
    assert all(tables) if weight == 0 else not any(tables)
    old, new = leaves(before.params), leaves(after.params)
    still = {k for k in old if np.array_equal(old[k], new[k])}
    sparse = {k for k in old if k.startswith("['sparse']")}
    assert sparse and (sparse <= still if weight == 0 else not sparse & still)
    assert sparse < old.keys() and not (old.keys() - sparse) & still


def test_one_scoring_function(log, chosen):
    """What the step predicted before its update is what evaluation predicts from that state."""
    prog = train.program(MODEL, log.schema, CONFIG)
    batch = train.batches(log, CONFIG, chosen)[0]
    state = train.init(MODEL, log.schema, CONFIG, batch)
    score = np.asarray(prog.score(state.params, state.tables, batch.without_impression()))
    rates = dict.fromkeys(("dense", "tables", "biases"), np.float32(0.1))
    _, out = prog.step(state, batch.without_impression(), rates, jax.random.key(0))
    np.testing.assert_allclose(out["logits"], score, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("field", [{"dropout": 0.5}, {"stochastic_length": 1.2}])
def test_random_bits_of_training_never_enter_a_prediction(field, log, chosen):
    model = hstu.Config(history=10, layers=1, width=8, tasks=2, **field)
    prog = train.program(model, log.schema, CONFIG)
    batch = train.batches(log, CONFIG, chosen)[1]
    state = train.init(model, log.schema, CONFIG, batch)
    want = np.asarray(prog.score(state.params, state.tables, batch.without_impression()))
    rates = dict.fromkeys(("dense", "tables", "biases"), np.float32(0.1))
    _, out = prog.step(state, batch.without_impression(), rates, jax.random.key(0))
    np.testing.assert_allclose(out["logits"], want, rtol=0, atol=1e-5)


def test_learning_goes_on_from_a_trained_state(log, chosen):
    """As on the next day: predicted with what was known, then learned from."""
    before = train.run(log, MODEL, CONFIG, chosen).state
    later = samples.build(log, chosen.config, "validation")
    steady = dataclasses.replace(CONFIG.optimizer, schedule="constant", warmup=0.0)
    config = dataclasses.replace(CONFIG, optimizer=steady)
    went_on = train.run(log, MODEL, config, later, start_from=before)
    batches = train.batches(log, config, later)
    assert int(went_on.state.step) == len(batches) > 1
    score = train.program(MODEL, log.schema, config).score
    first = evaluate.Scored.of(
        [(batches[0].impression, score(before.params, before.tables, batches[0]))], 2
    )
    n = len(first.impression)
    np.testing.assert_array_equal(went_on.progressive.impression[:n], first.impression)
    np.testing.assert_allclose(went_on.progressive.logits[:n], first.logits, rtol=1e-5, atol=1e-6)
    held_out = evaluate.stream(
        lambda batch: score(before.params, before.tables, batch), enumerate(batches), 2
    )
    assert np.abs(held_out.logits[n:] - went_on.progressive.logits[n:]).max() > 1e-3


class Killed(Exception):
    pass


@pytest.mark.parametrize("how", [Killed, KeyboardInterrupt])
def test_a_stopped_run_ends_with_the_same_bits(how, log, chosen, tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_seconds=0.0)
    whole = train.run(log, MODEL, config, chosen, tmp_path / "whole")

    def stop(done, total):
        if done >= 4:
            raise how

    with pytest.raises(how):
        train.run(log, MODEL, config, chosen, tmp_path / "stopped", on_step=stop)
    at = checkpoint.latest(tmp_path / "stopped" / "checkpoints")
    assert 0 < at < len(train.batches(log, config, chosen))
    again = train.run(log, MODEL, config, chosen, tmp_path / "stopped")
    assert again.steps_now == len(train.batches(log, config, chosen)) - at
    assert_same_bits(again.state, whole.state)
    np.testing.assert_array_equal(again.progressive.impression, whole.progressive.impression)
    np.testing.assert_array_equal(again.progressive.logits, whole.progressive.logits)
    lines = [json.loads(x) for x in (tmp_path / "stopped" / "metrics.jsonl").open()]
    steps = [x["step"] for x in lines]
    assert steps == sorted(set(steps))
    assert {"loss", "padding_share", "loader_wait_share", "task/click"} <= lines[0].keys()
    assert list((tmp_path / "stopped" / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_and_from_a_copy(log, chosen, tmp_path):
    """8 -> 4 -> 2 -> 1 devices, a step or two on each; what comes out is that of one device."""
    config = dataclasses.replace(
        CONFIG,
        checkpoint_seconds=0.0,
        log_every=1,
        # Adam with its usual eps steps by the sign of what is rounding.
        optimizer=dataclasses.replace(CONFIG.optimizer, eps=1e-3),
    )
    want = train.run(log, MODEL, config, chosen)
    total = len(train.batches(log, config, chosen))
    assert total >= 4
    meshes = [
        (sharding.MeshConfig(data=4, model=2, strategy="fsdp_tensor"), 8),
        (sharding.MeshConfig(), 4),
        (sharding.MeshConfig(model=2, strategy="tensor"), 2),
    ]
    for index, (mesh, devices) in enumerate(meshes):
        folder, last = tmp_path / str(index), index + 1

        def stop(done, total, last=last):
            if done == last:
                raise Killed

        place = sharding.placement(mesh, jax.devices()[:devices])
        with pytest.raises(Killed):
            train.run(log, MODEL, config, chosen, folder, on_step=stop, place=place)
        assert checkpoint.latest(folder / "checkpoints") == last
        shutil.move(folder, tmp_path / str(index + 1))
    got = train.run(log, MODEL, config, chosen, tmp_path / "3")
    assert got.steps_now == total - 3
    a, b = leaves(got.state), leaves(want.state)
    for key, x in b.items():
        np.testing.assert_allclose(a[key], x, rtol=2e-3, atol=2e-4, err_msg=key)
    orders = [np.argsort(x.progressive.impression) for x in (got, want)]
    for field, tolerance in (("impression", 0), ("logits", 1e-3)):
        x, y = (getattr(r.progressive, field)[o] for r, o in zip((got, want), orders))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)
    lines = [json.loads(x) for x in (tmp_path / "3" / "metrics.jsonl").open()]
    assert ["exchange/bytes" in line for line in lines[:4]] == [True, True, True, False]


def test_a_run_of_other_tables_is_refused(log, chosen, tmp_path):
    train.run(log, MODEL, CONFIG, chosen, tmp_path)
    plan = embedding.plan

    def other(schema, config):
        layout = plan(schema, config)
        arrays = tuple((name, rows - 1) for name, rows in layout.arrays)
        return dataclasses.replace(layout, arrays=arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "plan", other)
        with pytest.raises(ValueError, match=r"found tables of .*rows, expected"):
            train.run(log, MODEL, CONFIG, chosen, tmp_path)


def test_a_ctrl_c_while_results_are_fetched_loses_none(log, chosen, tmp_path, monkeypatch):
    """Nearly all of a run's time is spent there."""
    whole = train.run(log, MODEL, CONFIG, chosen, tmp_path / "whole")
    fetch, left = np.asarray, [5]

    def interrupted(x, *args, **kwargs):
        if isinstance(x, jax.Array) and x.ndim == 3:  # logits
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return fetch(x, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train.np, "asarray", interrupted)
        train.run(log, MODEL, CONFIG, chosen, tmp_path / "stopped")
    again = train.run(log, MODEL, CONFIG, chosen, tmp_path / "stopped")
    assert again.steps_now < len(train.batches(log, CONFIG, chosen))
    np.testing.assert_array_equal(again.progressive.impression, whole.progressive.impression)
    np.testing.assert_array_equal(again.progressive.logits, whole.progressive.logits)


def test_a_line_of_metrics_that_was_cut_off_is_dropped(log, chosen, tmp_path):
    train.run(log, MODEL, CONFIG, chosen, tmp_path)
    lines = tmp_path / "metrics.jsonl"
    written = lines.read_text()
    lines.write_text(written + '{"step": 7, "lo')
    train.run(log, MODEL, CONFIG, chosen, tmp_path)
    assert lines.read_text() == written


def test_predictions_without_their_checkpoint_are_dropped(log, chosen, tmp_path):
    """Killed between the predictions' file and the checkpoint that covers it."""
    whole = train.run(log, MODEL, CONFIG, chosen, tmp_path)
    stray = tmp_path / "progressive" / "00000000-00999999.npz"
    np.savez(stray, impression=np.arange(3), logits=np.ones((3, 2), np.float32))
    again = train.run(log, MODEL, CONFIG, chosen, tmp_path)
    np.testing.assert_array_equal(again.progressive.logits, whole.progressive.logits)
    assert not stray.exists()


def test_another_seed_in_the_folder_is_refused(log, chosen, tmp_path):
    train.run(log, MODEL, CONFIG, chosen, tmp_path)
    with pytest.raises(ValueError, match="found a run of"):
        train.run(log, MODEL, dataclasses.replace(CONFIG, seed=1), chosen, tmp_path)


def test_nan_stops_with_step_and_batch_and_leaves_the_state(log, chosen, tmp_path):
    broken = dataclasses.replace(
        CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=1e38, warmup=0.0)
    )
    with pytest.raises(train.NonFiniteLoss, match=r"step \d+ \(batch \d+ of seed 0") as error:
        train.run(log, MODEL, broken, chosen, tmp_path)
    state = error.value.state
    assert int(state.step) == error.value.step and not bool(state.ok)
    assert all(np.isfinite(x).all() for x in leaves((state.params, state.tables)).values())
    assert checkpoint.latest(tmp_path / "checkpoints") == error.value.step


def test_every_impression_is_predicted_once_in_time_order(log, chosen):
    done = train.run(log, MODEL, CONFIG, chosen)
    np.testing.assert_array_equal(
        np.sort(done.progressive.impression), np.flatnonzero(log.column("impressions", "span") == 0)
    )
    times = log.column("impressions", "time")[done.progressive.impression]
    assert (np.diff(times) >= 0).all()


def test_learns_what_an_id_tells(tmp_path):
    """Labels that the item alone decides are learned in one pass; the held-out NE falls below 1."""
    schema, files = tiny.columns(requests=3000, items=20, seed=1)
    shown = files["impressions"]
    shown["click"] = (shown["item"] % 2).astype(np.int8)
    path = event_log.write_log(tmp_path / "log", schema, **files, fingerprint={})
    log = event_log.EventLog.open(path)
    config = samples.SampleConfig(organisation="request", history=10)
    parts = {span: samples.build(log, config, span) for span in ("train", "test")}
    done = train.run(log, MODEL, CONFIG, parts["train"])
    prog = train.program(MODEL, log.schema, CONFIG)
    scored = evaluate.stream(
        lambda b: prog.score(done.state.params, done.state.tables, b),
        enumerate(train.batches(log, CONFIG, parts["test"])[i] for i in range(3)),
        2,
    )
    assert evaluate.summarize(log, scored)["click"]["ne"] < 0.5
