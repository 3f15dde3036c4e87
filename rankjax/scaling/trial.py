"""A trial: one model of one size trained once on one data budget with one seed."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rankjax import checkpoint, embedding, evaluate, flops, hosts, sharding, train
from rankjax.data import event_log, loader, samples
from rankjax.data.sources import synthetic
from rankjax.layers import stack
from rankjax.scaling import folders, ladder, sizes

METRICS = ("ne", "auc", "log_loss", "gauc", "pcoc", "request_auc", "request_mrr", "request_ndcg10")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """Everything that decides the outcome of a training run on a given log."""

    model: Any  # the architecture's Config
    training: train.TrainConfig
    samples: samples.SampleConfig
    budget: int | None  # the newest n valid impressions of the train span; None = all

    @property
    def architecture(self) -> str:
        return ladder.architecture_of(self.model)

    def describe(self) -> dict[str, Any]:
        """As JSON; without what does not change the outcome (log lines, saves, how tables lie)."""
        training = dataclasses.asdict(self.training)
        for key in ("checkpoint_seconds", "log_every"):
            del training[key]
        del training["tables"]["pack"]
        return {
            "architecture": self.architecture,
            "model": ladder.identity(self.model),
            "training": training,
            "samples": dataclasses.asdict(self.samples),
            "budget": self.budget,
        }

    @property
    def id(self) -> str:
        text = json.dumps(self.describe(), sort_keys=True)
        return f"{self.architecture}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@functools.lru_cache(maxsize=4)
def samples_of(
    log: event_log.EventLog, config: samples.SampleConfig, span: str, newest: int | None
) -> samples.Samples:
    """Trials of one process share the sample pointers, which take seconds to build."""
    return samples.build(log, config, span, newest)


def run(
    spec: Trial,
    log: event_log.EventLog,
    folder: pathlib.Path,
    *,
    test: bool,
    on_step: Callable[[int, int], None] | None = None,
    place: sharding.Placement | None = None,
    compute: stack.Compute = stack.PLAIN,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains (or resumes, or finds trained) and evaluates; returns (result, timing) of one row.

    The held-out metrics are of the validation span and, only if `test`, of the test span; the
    progressive ones of the training span, each batch predicted before it was learned from.
    Raises ValueError where the folder holds another trial.
    """
    began = time.monotonic()
    train_samples = samples_of(log, spec.samples, "train", spec.budget)
    result = {"trial": spec.id, "architecture": spec.architecture, "seed": spec.training.seed}
    epoch = train.batches(log, spec.training, train_samples)
    result |= sizes.columns(spec.model, spec.training, log.schema, epoch)
    result |= {"samples": len(train_samples.impressions), "budget": spec.budget}
    result |= {"batch": spec.training.batch, "test_read": test, "failed": None}
    hosts.check_same({"trial": spec.describe(), "test": test})
    hosts.first_does(lambda: _claim(spec, log, folder))  # only what can be trained
    scored, seconds, trained = {}, {"total": 0.0, "first": 0.0, "wait": 0.0}, began
    steps, exchanged = 0, {}
    try:
        done = train.run(
            log,
            spec.model,
            spec.training,
            train_samples,
            folder,
            on_step=on_step,
            place=place,
            compute=compute,
        )
        trained, seconds, steps = time.monotonic(), done.seconds, done.steps_now
        exchanged = {f"exchange_{key}": value for key, value in done.exchanged.items()}
        scored["progressive"] = done.progressive
        with hosts.watched(folder):
            for span in ("validation", "test") if test else ("validation",):
                scored[span] = score_span(spec, log, done.state, span, place, compute)
    except train.NonFiniteLoss as error:  # an outcome (a rate too high), not an accident
        result["failed"] = str(error)
    undefined = {}
    for span in ("validation", "test", "progressive"):
        found, undefined[span] = _metrics(log, span, scored.get(span))
        result |= found
    undefined = {span: reasons for span, reasons in undefined.items() if reasons}
    result["undefined"] = json.dumps(undefined) if undefined else None
    ordered = spec.samples.organisation != "window" and spec.training.order == "time"
    result |= _oracle(log, scored, ordered)
    now = time.monotonic()
    seconds = {**seconds, "all": now - began, "eval": now - trained}
    return result, _timing(spec, seconds, steps, result["flops"], place) | exchanged


def _timing(
    spec: Trial,
    seconds: dict[str, float],
    steps: int,
    flops_a_sample: float,
    place: sharding.Placement | None,
) -> dict[str, Any]:
    """The columns of timing.parquet that follow from the seconds that `steps` steps took.

    seconds: "all", of them "eval", and the "total" of training, of that "first" of its first step
      (compiling) and "wait" for batches.
    """
    learning = max(seconds["total"] - seconds["first"], 1e-9)
    speed = spec.training.batch * max(steps - 1, 0) / learning
    device, devices = jax.devices()[0].device_kind, 1 if place is None else place.mesh.size
    peak = flops.PEAK.get(device)
    return {
        "trial": spec.id,
        "seconds_total": seconds["all"],
        "seconds_train": seconds["total"],
        "seconds_compile": seconds["first"],
        "seconds_eval": seconds["eval"],
        "step_ms": 1e3 * learning / max(steps - 1, 1),
        "loader_wait_share": seconds["wait"] / max(seconds["total"], 1e-9),
        "samples_per_second": speed,
        # Of padded shapes, which the step computes; None where the device's peak is not known.
        "mfu": flops_a_sample * speed / (peak * devices) if peak else None,
        "device": device,
    }


def _claim(spec: Trial, log: event_log.EventLog, folder: pathlib.Path) -> None:
    """Writes trial.json, or checks that the one that lies there is of the same trial and log."""
    asked = json.loads(json.dumps({**spec.describe(), "log": log.fingerprint}))
    path = folder / "trial.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        folders.write_atomically(path, json.dumps(asked, indent=1).encode())
        return
    found = json.loads(path.read_text())
    for key, want in asked.items():
        if found.get(key) != want:
            raise ValueError(
                f"{path}: another trial lies here; found {key}={found.get(key)}, expected {want}. "
                "Use another folder, or the settings of this one."
            )


def score_span(
    spec: Trial,
    log: event_log.EventLog,
    state: train.State,
    span: str,
    place: sharding.Placement | None = None,
    compute: stack.Compute = stack.PLAIN,
) -> evaluate.Scored:
    """Held-out predictions of a trained state for every impression of a span."""
    prog = train.program(spec.model, log.schema, spec.training, place, compute)
    held_out = samples_of(log, spec.samples, span, None)
    in_time = dataclasses.replace(spec.training, order="time")
    batches = train.batches(log, in_time, held_out, place)
    score = functools.partial(prog.score, state.params, state.tables)
    return evaluate.stream(score, loader.stream(batches), len(log.schema.tasks), place)


def restore(
    spec: Trial,
    log: event_log.EventLog,
    folder: pathlib.Path,
    place: sharding.Placement | None = None,
    compute: stack.Compute = stack.PLAIN,
) -> train.State:
    """The trained state that `run` left in the trial's folder, whatever mesh it trained on."""
    train_samples = samples_of(log, spec.samples, "train", spec.budget)
    batch = train.batches(log, spec.training, train_samples, place)[0]
    like = train.init(spec.model, log.schema, spec.training, batch, place, compute)
    tables = spec.training.tables
    rows = dict(embedding.plan(log.schema, tables).arrays)
    return checkpoint.restore(folder / "checkpoints", like, rows=rows, pack=tables.pack)[0]


def _metrics(
    log: event_log.EventLog, span: str, scored: evaluate.Scored | None
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The primary task's metrics as columns `<span>_<metric>`; null where undefined or not read.

    And {metric: why it is undefined}.
    """
    found: dict[str, Any] = {}
    if scored is not None:
        found = evaluate.summarize(log, scored)[log.schema.primary_task]
    reasons = {k: v for k, v in found.get("undefined", {}).items() if k in METRICS}
    return {f"{span}_{name}": found.get(name) for name in METRICS}, reasons


def _oracle(
    log: event_log.EventLog,
    scored: dict[str, evaluate.Scored],
    ordered: bool,
) -> dict[str, Any]:
    """On the world: the oracle's NE on the evaluated impressions, and whether an alarm rang.

    ordered: training went in time order. A window is learned from whole, and a shuffled batch from
    any time, so that later batches know earlier times of other users: those progressive
    predictions are not from the past only, and the alarm skips them.
    """
    path = synthetic.truth_path(log.folder)
    if path is None or not scored or "shards" in log.fingerprint:  # the truth is of all rows
        return {"oracle_ne": None, "alarm": None}
    truth = synthetic.load_truth(log.folder)
    spans = [s for s in scored if s != "progressive" or ordered]
    rang = any(a.alarm for s in spans for a in evaluate.alarms(log, scored[s], truth).values())
    held_out = scored.get("test", scored["validation"])
    p = truth[f"p_{log.schema.primary_task}"][held_out.impression]
    logits = np.repeat(np.log(p / (1 - p))[:, None], len(log.schema.tasks), 1)
    oracle = evaluate.summarize(log, evaluate.Scored(held_out.impression, logits))
    return {"oracle_ne": oracle[log.schema.primary_task]["ne"], "alarm": rang}
