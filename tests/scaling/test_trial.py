"""A trial's sizes against direct counts, its row of results, and its alarm on the world."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

from rankjax import embedding, flops, optim, train
from rankjax.data import event_log, samples, split
from rankjax.data.sources import synthetic
from rankjax.models import dcnv2, dlrm, hstu, rankmixer
from rankjax.scaling import presets, trial
from rankjax.schema import Feature, Table
from tests import tiny

CONFIGS = {
    "dlrm_mlp": dlrm.Config(layers=2, width=8, tasks=2),
    "dcnv2_din": dcnv2.Config(
        layers=2, width=8, rank=4, tasks=2, pooling=("target",), attention_hidden=(4,)
    ),
    "rankmixer": rankmixer.Config(
        tokens=4, layers=2, width=8, tasks=2, pooling=("mean", "target"), attention_hidden=(4,)
    ),
    "hstu": hstu.Config(history=10, layers=2, width=8, heads=2, tasks=2),
}
E = 4


def spec_of(model, organisation="request", history=10, budget=None, **training):
    config = train.TrainConfig(
        **({"batch": 32, "tables": embedding.TableConfig(width=E, init_std=0.3)} | training)
    )
    chosen = samples.SampleConfig(organisation=organisation, history=history, max_candidates=4)
    return trial.Trial(model=model, training=config, samples=chosen, budget=budget)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log") / "log"
    return event_log.EventLog.open(tiny.log(folder, requests=150, events=400))


def test_mfu_is_padded_flops_over_the_peak(log, tmp_path, monkeypatch):
    spec = spec_of(CONFIGS["dlrm_mlp"])
    _, timing = trial.run(spec, log, tmp_path / "a", test=False)
    assert timing["mfu"] is None  # nobody prints a CPU's peak
    monkeypatch.setitem(flops.PEAK, timing["device"], 1e9)
    result, timing = trial.run(spec, log, tmp_path / "b", test=False)
    assert timing["mfu"] == pytest.approx(result["flops"] * timing["samples_per_second"] / 1e9)
    assert timing["mfu"] > 0


def test_a_folder_of_another_trial_is_refused(log, tmp_path):
    """Its checkpoint would pass for what was asked."""
    spec = spec_of(CONFIGS["dlrm_mlp"])
    trial.run(spec, log, tmp_path, test=False)
    faster = spec_of(CONFIGS["dlrm_mlp"], optimizer=optim.OptimConfig(learning_rate=0.02))
    with pytest.raises(ValueError, match=r"another trial lies here; found training=.*0\.001"):
        trial.run(faster, log, tmp_path, test=False)
    other = event_log.EventLog.open(tiny.log(tmp_path / "log", requests=150, events=401))
    with pytest.raises(ValueError, match="another trial lies here; found log="):
        trial.run(spec, other, tmp_path, test=False)


def test_a_log_in_shards_trains_alike(log, tmp_path):
    spec = spec_of(CONFIGS["dlrm_mlp"])
    parts = split.split(log.folder, tmp_path / "shards", 3)
    whole = trial.run(spec, log, tmp_path / "a", test=False)[0]
    assert trial.run(spec, event_log.EventLog.open(parts), tmp_path / "b", test=False)[0] == whole
    some = event_log.EventLog.open(parts, shards=(0, 2))
    result = trial.run(spec, some, tmp_path / "c", test=False)[0]
    assert result["trial"] == whole["trial"] and 0 < result["samples"] < whole["samples"]
    with pytest.raises(ValueError, match="another trial lies here; found log="):
        trial.run(spec, some, tmp_path / "a", test=False)


def test_a_metric_without_a_value_keeps_its_reason(tmp_path):
    """No click in the validation span: its AUC does not exist, and the row says why."""
    log = event_log.EventLog.open(tiny.log(tmp_path / "log", requests=150, events=400))
    files = {name: dict(log.columns[name]) for name in event_log.FILES}
    files["impressions"]["click"] = np.where(
        files["impressions"]["span"] == 1, 0, files["impressions"]["click"]
    ).astype(np.int8)
    path = event_log.write_log(tmp_path / "none", log.schema, **files, fingerprint={"clicks": 0})
    spec = spec_of(CONFIGS["dlrm_mlp"])
    result, _ = trial.run(spec, event_log.EventLog.open(path), tmp_path / "trial", test=True)
    assert result["validation_auc"] is None and result["test_auc"] is not None
    reasons = json.loads(result["undefined"])
    assert "auc" in reasons["validation"] and "test" not in reasons


COLUMNS = [
    "trial",
    "architecture",
    "seed",
    "budget",
    "samples",
    "batch",
    "learning_rate",
    "table_learning_rate",
    "embedding_std",
    "dense_params",
    "embedding_params",
    "tokens",
    "layers",
    "width",
    "flops",
    "flops_valid",
    "training_flops",
    "padding_share",
    "paper_params",
    "paper_flops",
    "paper_scope",
    "config",
    "oracle_ne",
    "alarm",
    "test_read",
    "failed",
]
TIMES = [
    "trial",
    "seconds_total",
    "seconds_train",
    "seconds_compile",
    "seconds_eval",
    "step_ms",
    "loader_wait_share",
    "samples_per_second",
    "mfu",
]


def test_a_run_fills_its_row(log, tmp_path):
    spec = spec_of(CONFIGS["dlrm_mlp"], budget=200)
    steps = []
    result, timing = trial.run(
        spec, log, tmp_path, test=True, on_step=lambda done, total: steps.append((done, total))
    )
    scores = {f"{s}_{m}" for s in ("validation", "test", "progressive") for m in trial.METRICS}
    assert set(COLUMNS) | scores <= result.keys()
    assert set(TIMES) <= timing.keys()
    assert (result["trial"], result["samples"], result["budget"]) == (spec.id, 200, 200)
    assert all(math.isfinite(result[f"{s}_ne"]) for s in ("validation", "test", "progressive"))
    assert result["failed"] is None and result["test_read"] is True
    assert result["oracle_ne"] is None and result["alarm"] is None  # no truth beside this log
    assert steps[-1][0] == steps[-1][1]
    json.dumps(result), json.dumps(timing)
    assert json.loads((tmp_path / "trial.json").read_text())["budget"] == 200
    # Trained already: only evaluated, to the same numbers, here without the test span.
    again, _ = trial.run(spec, log, tmp_path, test=False)
    for key in result:
        hidden = key.startswith("test_")
        assert again[key] == (result[key] if not hidden else False if key == "test_read" else None)


def test_restored_state_scores_as_the_run_did(log, tmp_path):
    spec = spec_of(CONFIGS["dlrm_mlp"])
    result, _ = trial.run(spec, log, tmp_path, test=False)
    state = trial.restore(spec, log, tmp_path)
    scored = trial.score_span(spec, log, state, "validation")
    rows = np.flatnonzero(log.column("impressions", "span") == 1)
    np.testing.assert_array_equal(np.sort(scored.impression), rows)
    again, undefined = trial._metrics(log, "validation", scored)
    assert again["validation_ne"] == result["validation_ne"] and undefined == {}


def test_a_diverged_run_is_a_row(log, tmp_path):
    wild = optim.OptimConfig(learning_rate=1e38, warmup=0.0)
    spec = spec_of(CONFIGS["dlrm_mlp"], optimizer=wild)
    result, _ = trial.run(spec, log, tmp_path, test=True)
    assert "expected finite numbers" in result["failed"]
    assert result["validation_ne"] is None and result["test_ne"] is None
    assert result["dense_params"] > 0


# On the world: many updates at high rates, so that a leak would be found within few samples.
MODEL = dlrm.Config(layers=1, width=8, tasks=2)
EAGER = {
    "batch": 16,
    "optimizer": optim.OptimConfig(learning_rate=1e-2),
    "tables": embedding.TableConfig(width=E, init_std=0.05, learning_rate=0.3),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = synthetic.World(users=40, requests=6)
    return synthetic.prepare(config, tmp_path_factory.mktemp("world"), workers=1)


def run_on(folder, tmp_path, organisation="request"):
    log = event_log.EventLog.open(folder)
    spec = spec_of(MODEL, organisation, **EAGER)
    return trial.run(spec, log, tmp_path / "trial", test=True)[0]


@pytest.mark.slow
@pytest.mark.parametrize("organisation", ["impression", "request"])
def test_an_honest_model_rings_no_alarm(organisation, world, tmp_path):
    result = run_on(world, tmp_path, organisation)
    assert result["alarm"] is False
    assert result["oracle_ne"] == pytest.approx(synthetic.floors(world)["click"]["oracle_ne"])


def leaking(world, folder):
    """The world's log with the label as one more feature of the candidate, and the same truth."""
    log = event_log.EventLog.open(world)
    leak = Feature(name="leak", side="context", group="context", table="leak")
    schema = dataclasses.replace(
        log.schema,
        tables=(*log.schema.tables, Table(name="leak", rows=3)),
        features=(*log.schema.features, leak),
    )
    files = {name: dict(log.columns[name]) for name in event_log.FILES}
    files["impressions"]["leak"] = 1 + files["impressions"]["click"].astype(np.int32)
    path = event_log.write_log(folder / "log", schema, **files, fingerprint={"leak": 1})
    shutil.copy(synthetic.truth_path(world), folder / "truth.arrow")
    return path


@pytest.mark.slow
def test_an_alarm_rings_when_a_feature_is_the_label(world, tmp_path):
    result = run_on(leaking(world, tmp_path), tmp_path)
    assert result["alarm"] is True


def test_control_rings_no_alarm(world, tmp_path):
    """Labels that nothing predicts; every model ends at or above the base rate."""
    result = run_on(synthetic.control(world, tmp_path), tmp_path)
    assert result["alarm"] is False
    assert result["validation_ne"] > 0.99


def test_progressive_predictions_of_windows_are_no_alarm(world, tmp_path, monkeypatch):
    """Batches of windows are not in time order over users; only held-out spans are judged."""
    log = event_log.EventLog.open(world)
    rows = {
        s: np.flatnonzero(log.column("impressions", "span") == k)
        for k, s in enumerate(("train", "validation"))
    }
    truth = synthetic.load_truth(world)

    def scored(span, cheat):
        r = rows[span]
        p = truth["p_click"][r]
        label = log.column("impressions", "click")[r]
        logits = np.where(label, 3.0, -3.0) if cheat else np.log(p / (1 - p))
        return trial.evaluate.Scored(r, np.stack([logits, logits], -1))

    spans = {"progressive": scored("train", True), "validation": scored("validation", False)}
    spans["validation"].logits[:, 1] = spans["validation"].logits[:, 0]
    assert trial._oracle(log, spans, True)["alarm"] is True
    assert trial._oracle(log, spans, False)["alarm"] is False
    spans["validation"] = scored("validation", True)
    assert trial._oracle(log, spans, False)["alarm"] is True


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "small"), [("rankmixer", 8), ("hstu", 4)])
def test_on_the_world_a_larger_size_comes_closer_to_the_oracle(architecture, small, tmp_path):
    """By more than .003 NE, and by more than two seeds of one size differ; the alarm is silent."""
    made = synthetic.prepare(synthetic.WORLD_SMALL, tmp_path / "world")
    log = event_log.EventLog.open(made)
    asked = presets.study_of(
        log, architectures=(architecture,), history=20, max_candidates=16,
        training=presets.WORLD_TRAINING,
    )  # fmt: skip
    gaps = {}
    for width in (small, 32):
        model = presets.model(architecture, 2, width=width, history=20)
        for seed in (0, 1):
            spec = asked.trial(model, rate=3e-3, table_rate=0.1, std=0.05, budget=None, seed=seed)
            row, _ = trial.run(spec, log, tmp_path / f"{width}-{seed}", test=True)
            assert row["alarm"] is False
            gaps[width, seed] = row["test_ne"] - row["oracle_ne"]
    spread = max(abs(gaps[width, 0] - gaps[width, 1]) for width in (small, 32))
    closer = (gaps[small, 0] + gaps[small, 1] - gaps[32, 0] - gaps[32, 1]) / 2
    assert closer > max(0.003, spread), gaps
