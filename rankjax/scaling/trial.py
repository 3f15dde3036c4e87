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
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rankjax import checkpoint, embedding, evaluate, flops, models, train
from rankjax.batch import Features
from rankjax.data import event_log, loader, samples
from rankjax.data.sources import synthetic
from rankjax.scaling import folders, ladder
from rankjax.schema import Schema

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
        """As JSON; without what does not change the outcome (log lines, checkpoints)."""
        training = dataclasses.asdict(self.training)
        for key in ("checkpoint_seconds", "log_every"):
            del training[key]
        return {
            "architecture": self.architecture,
            "model": dataclasses.asdict(self.model),
            "training": training,
            "samples": dataclasses.asdict(self.samples),
            "budget": self.budget,
        }

    @property
    def id(self) -> str:
        text = json.dumps(self.describe(), sort_keys=True)
        return f"{self.architecture}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@functools.lru_cache(maxsize=4)
def _samples(
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
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains (or resumes, or finds trained) and evaluates; returns (result, timing) of one row.

    The held-out metrics are of the validation span and, only if `test`, of the test span; the
    progressive ones of the training span, each batch predicted before it was learned from.
    Raises ValueError where the folder holds another trial.
    """
    began = time.monotonic()
    train_samples = _samples(log, spec.samples, "train", spec.budget)
    result = {"trial": spec.id, "architecture": spec.architecture, "seed": spec.training.seed}
    result |= sizes(spec, log.schema, train.batches(log, spec.training, train_samples))
    result |= {"samples": len(train_samples.impressions), "budget": spec.budget}
    result |= {"batch": spec.training.batch, "test_read": test, "failed": None}
    _claim(spec, log, folder)  # only what can be trained
    scored, seconds, trained = {}, {"total": 0.0, "first": 0.0, "wait": 0.0}, began
    steps = 0
    try:
        done = train.run(log, spec.model, spec.training, train_samples, folder, on_step=on_step)
        trained, seconds, steps = time.monotonic(), done.seconds, done.steps_now
        scored["progressive"] = done.progressive
        for span in ("validation", "test") if test else ("validation",):
            scored[span] = score_span(spec, log, done.state, span)
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
    learning = max(seconds["total"] - seconds["first"], 1e-9)
    speed = spec.training.batch * max(steps - 1, 0) / learning
    device = jax.devices()[0].device_kind
    peak = flops.PEAK.get(device)
    timing = {
        "trial": spec.id,
        "seconds_total": time.monotonic() - began,
        "seconds_train": seconds["total"],
        "seconds_compile": seconds["first"],
        "seconds_eval": time.monotonic() - trained,
        "step_ms": 1e3 * learning / max(steps - 1, 1),
        "loader_wait_share": seconds["wait"] / max(seconds["total"], 1e-9),
        "samples_per_second": speed,
        # Of padded shapes, which the step computes; None where the device's peak is not known.
        "mfu": result["flops"] * speed / peak if peak else None,
        "device": device,
    }
    return result, timing


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
    spec: Trial, log: event_log.EventLog, state: train.State, span: str
) -> evaluate.Scored:
    """Held-out predictions of a trained state for every impression of a span."""
    prog = train.program(spec.model, log.schema, spec.training)
    held_out = _samples(log, spec.samples, span, None)
    batches = train.batches(log, dataclasses.replace(spec.training, order="time"), held_out)
    score = functools.partial(prog.score, state.params, state.tables)
    return evaluate.stream(score, loader.stream(batches), len(log.schema.tasks))


def restore(spec: Trial, log: event_log.EventLog, folder: pathlib.Path) -> train.State:
    """The trained state that `run` left in the trial's folder."""
    train_samples = _samples(log, spec.samples, "train", spec.budget)
    batch = train.batches(log, spec.training, train_samples)[0]
    like = train.init(spec.model, log.schema, spec.training, batch)
    return checkpoint.restore(folder / "checkpoints", like)[0]


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
    if path is None or not scored:
        return {"oracle_ne": None, "alarm": None}
    truth = synthetic.load_truth(log.folder)
    spans = [s for s in scored if s != "progressive" or ordered]
    rang = any(a.alarm for s in spans for a in evaluate.alarms(log, scored[s], truth).values())
    held_out = scored.get("test", scored["validation"])
    p = truth[f"p_{log.schema.primary_task}"][held_out.impression]
    logits = np.repeat(np.log(p / (1 - p))[:, None], len(log.schema.tasks), 1)
    oracle = evaluate.summarize(log, evaluate.Scored(held_out.impression, logits))
    return {"oracle_ne": oracle[log.schema.primary_task]["ne"], "alarm": rang}


def sizes(spec: Trial, schema: Schema, batches: loader.Batches) -> dict[str, Any]:
    """Parameters and FLOPs on the common footing (design: per valid impression, training = 3x)."""
    config = spec.model
    fields = dataclasses.asdict(config)
    axes = type(config).axes
    history, candidates = batches.samples.event_counts, batches.samples.candidate_counts
    valid = max(int(candidates.sum()), 1)
    one_time = batches.samples.one_time
    per_sample = forward_flops(config, schema, spec.training.tables.width, one_time)
    shapes = np.array([batches.shape(step) for step in range(len(batches))])
    padded = np.repeat(shapes, batches.batch_samples, axis=0).T  # (S, C) of each row
    matmul = forward_flops(config, schema, spec.training.tables.width, one_time, "matmul")
    flops_valid = 3 * float(per_sample((history, candidates)).sum()) / valid
    return {
        "dense_params": dense_params(config, schema, spec.training.tables.width),
        "embedding_params": embedding.count(schema, spec.training.tables),
        "tokens": fields.get(axes.get("T", axes.get("S", ""))),
        "layers": fields.get(axes.get("L", "")),
        "width": fields.get(axes.get("D", "")),
        "flops": 3 * float(per_sample(tuple(padded)).sum()) / valid,
        "flops_valid": flops_valid,
        "flops_matmul": 3 * float(matmul((history, candidates)).sum()) / valid,  # of flops_valid
        "training_flops": flops_valid * valid,
        "padding_share": 1 - float((history.sum() + valid) / padded.sum()),
        "learning_rate": spec.training.optimizer.learning_rate,
        "table_learning_rate": spec.training.tables.learning_rate,
        "embedding_std": spec.training.tables.init_std,
        "paper_params": config.paper_params(),
        "paper_flops": config.paper_flops(),
        "paper_scope": type(config).paper_scope,
        "config": json.dumps(fields, sort_keys=True),
    }


def forward_flops(
    config: Any, schema: Schema, width: int, one_time: bool, part: str = "total"
) -> flops.Polynomial:
    """Forward FLOPs of one sample as an exact polynomial in its (history, candidates) lengths.

    Counted over the jaxpr of the training forward, look-up excluded, heads and pruning included,
    attention as its reference writes it, whatever runs. part: "total", "matmul" or "elementwise".
    """
    points = _forward_counts(config, schema, width, one_time)
    return flops.Polynomial.fit([(at, getattr(counted, part)) for at, counted in points])


@functools.lru_cache(maxsize=64)
def _forward_counts(
    config: Any, schema: Schema, width: int, one_time: bool
) -> list[tuple[tuple[int, int], flops.Flops]]:
    """Counts at enough lengths for a polynomial of degree 2 in each."""
    if "implementation" in dataclasses.asdict(config):
        config = dataclasses.replace(config, implementation="reference")
    model = models.MODELS[ladder.architecture_of(config)](config)

    def forward(features: Features, params: Any) -> jax.Array:
        return model.apply(
            {"params": params}, features, train=True, rngs={"dropout": jax.random.key(0)}
        )[0]

    params = abstract_params(config, schema, width)
    points = []
    for s, c in [(s, c) for s in (1, 2, 3) for c in (1, 2, 3)] + [(5, 4)]:
        features = abstract_features(schema, width, 1, s, c, one_time)
        points.append(((s, c), flops.count(forward, features, params)))
    return points


def dense_params(config: Any, schema: Schema, width: int) -> int:
    """Number of dense (Flax) parameters; `width` is E."""
    return sum(x.size for x in jax.tree.leaves(abstract_params(config, schema, width)))


@functools.lru_cache(maxsize=256)
def abstract_params(config: Any, schema: Schema, width: int) -> Any:
    """The dense parameters as shapes only."""
    model = models.MODELS[ladder.architecture_of(config)](config)
    features = abstract_features(schema, width, 1, 2, 2, True)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    init = functools.partial(model.init, train=True)  # what only training uses counts too
    return nn.unbox(jax.eval_shape(init, keys, features))["params"]


def abstract_features(
    schema: Schema, width: int, rows: int, history: int, candidates: int, one_time: bool
) -> Features:
    """Features as shapes only: [R, 1 | S | C, E], dense ones [..., 1]."""

    def of(features: tuple, slots: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            f.name: jax.ShapeDtypeStruct(
                (rows, slots, 1 if f.kind == "dense" else width), jnp.float32
            )
            for f in features
        }

    def numbers(slots: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, slots), jnp.int32)

    return Features(
        user=of(schema.user, 1),
        history=of(schema.history, history),
        candidate=of(schema.candidate, candidates),
        history_sample=numbers(history),
        candidate_sample=numbers(candidates),
        history_time=numbers(history),
        candidate_time=numbers(candidates),
        history_order=numbers(history),
        candidate_order=numbers(candidates),
        history_action=numbers(history),
        schema=schema,
        one_time=one_time,
    )
