"""The training step: whole, in parts, and as the real loop runs it.

A part is compiled by itself, so that the parts need not add up to the whole, which XLA fuses.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rankjax import embedding, loss, optim, train
from rankjax.batch import Batch
from rankjax.bench import rounds
from rankjax.data import event_log, loader, samples

BATCHES = 4  # distinct batches that a timed step cycles through
ROWS = ("user", "history", "candidate")  # of Features: embedding rows, in the Batch ids
PARTS = ("lookup", "forward", "forward_backward", "dense_update", "table_update")


def run(
    log: event_log.EventLog,
    models: dict[str, Any],
    config: rounds.Rounds,
    *,
    organisation: str = "request",
    history: int = 50,
    batch: int = 512,
    steps: int = 60,
) -> dict[str, Any]:
    """Each model's training step on batches of about `batch` valid impressions.

    Args:
      models: {name of rankjax.models.MODELS: its Config}.
      organisation: how impressions are grouped into samples.
      steps: of the real loop (loader included), run twice, the second time timed.

    Returns: {"shape", "models": {name: {"dense_parameters", "seconds": {"whole": figure,
      "blocks": ..., each of PARTS}, "backward_seconds" (forward_backward - forward, medians),
      "impressions_per_second" of the whole step, "loop": {...}, and with peers "peer_seconds",
      "peer_parameters", "peer_seconds_over_ours"}}, "peers"}.
    "blocks" is forward, backward, clipping and Adam on given embedding rows: what the PyTorch peer
    does. "lookup" goes from ids to embedding rows (finding the distinct ids included),
    "table_update" from the gradients of the embedding rows to new tables.
    """
    shape = samples.SampleConfig(organisation=organisation, history=history)
    train_rows = int(np.count_nonzero(log.column("impressions", "span") == 0))
    chosen = samples.build(log, shape, "train", min(steps * batch, train_rows))
    settings = train.TrainConfig(batch=batch)
    size = loader.batch_samples_for(chosen, batch)
    batches = loader.Batches(log, chosen, batch_samples=size)
    timed, counts = same_shape(batches)
    benches = {n: _Bench(model, log.schema, settings, timed) for n, model in models.items()}
    jobs = {f"{n}/{part}": job for n, b in benches.items() for part, job in b.jobs().items()}
    items = [_peer(name, models[name], b) for name, b in benches.items()]
    seconds, peers = rounds.measure(jobs, items, config)
    out: dict[str, Any] = {}
    for name, b in benches.items():
        own = {part: rounds.figure(seconds[f"{name}/{part}"]) for part in b.jobs()}
        mean_impressions = float(np.mean(counts))
        out[name] = {
            "dense_parameters": b.parameters,
            "seconds": own,
            "backward_seconds": own["forward_backward"]["median"] - own["forward"]["median"],
            "impressions_per_second": mean_impressions / own["whole"]["median"],
            "loop": loop(log, models[name], settings, chosen),
        }
        if "results" in peers:
            found = peers["results"][name]
            peer = rounds.figure(found["seconds"])
            out[name] |= {
                "peer_seconds": peer,
                "peer_parameters": found["parameters"],
                "peer_seconds_over_ours": peer["median"] / own["blocks"]["median"],
            }
    R, C = timed[0].candidate_sample.shape
    layout = {"organisation": organisation, "R": R, "C": C, "S": timed[0].history_sample.shape[1]}
    layout |= {"valid_impressions": counts, "steps_of_loop": len(batches)}
    peers = {key: value for key, value in peers.items() if key != "results"}
    return {"shape": layout, "models": out, "peers": peers}


def same_shape(batches: loader.Batches) -> tuple[list[Batch], list[int]]:
    """Up to BATCHES batches of the commonest shape, and their valid impressions."""
    shapes = [batches.shape(step) for step in range(len(batches))]
    common = max(batches.shapes, key=shapes.count)
    found = [batches[step] for step in range(len(batches)) if shapes[step] == common][:BATCHES]
    counts = [int(b.candidate_mask.sum()) for b in found]
    return [jax.device_put(b.without_impression()) for b in found], counts


def loop(
    log: event_log.EventLog, model: Any, config: train.TrainConfig, chosen: samples.Samples
) -> dict[str, float]:
    """The real training loop over `chosen`, compiled by a first pass that is not timed."""
    train.run(log, model, config, chosen)
    found = train.run(log, model, config, chosen).seconds
    return {
        "impressions_per_second": len(chosen.impressions) / found["total"],
        "loader_wait_share": found["wait"] / found["total"],
    }


class _Bench:
    """One model's compiled step and parts, on its own state."""

    def __init__(self, model: Any, schema: Any, config: train.TrainConfig, batches: list[Batch]):
        self.config, self.schema = config, schema
        self.program = train.program(model, schema, config)
        self.state = train.init(model, schema, config, batches[0])
        leaves = jax.tree.leaves(self.state.params)
        self.parameters = sum(x.size for x in leaves)
        self.batches = itertools.cycle(batches)
        self.first = batches[0]
        # Copies, because the whole step and the updates donate theirs.
        copy = lambda tree: jax.tree.map(jnp.array, tree)
        self.params, self.moments = copy(self.state.params), copy(self.state.optimizer)
        self.tables = copy((self.state.tables, self.state.table_optimizer))
        self.features, self.bias_rck = jax.jit(self._lookup)(self.tables[0], self.first)
        peaks = (1e-3, config.tables.learning_rate, config.tables.bias_learning_rate)
        names = ("dense", "tables", "biases")
        self.rates = {name: np.float32(x) for name, x in zip(names, peaks)}

    def jobs(self) -> dict[str, Callable[[], float]]:
        """{"whole", "blocks", *PARTS: a timed call}."""
        lookup, forward = jax.jit(self._lookup), jax.jit(self._loss)
        backward = jax.jit(jax.value_and_grad(self._loss, argnums=(0, 1, 2)))
        update = jax.jit(self._dense_update)
        blocks = jax.jit(self._blocks, donate_argnums=(0, 1))
        tables = jax.jit(self._table_update, donate_argnums=(0,))
        rows, bias_rck, batch = embedding_rows(self.features), self.bias_rck, self.first
        _, (gradient, *row_gradient) = backward(self.params, rows, bias_rck, batch)
        held = jax.tree.map(jnp.array, (self.params, self.moments))
        ids = jax.jit(lambda batch: embedding.deduplicate(self.program.layout, batch))(batch)

        def whole() -> Any:
            key = jax.random.key(0)
            self.state, out = self.program.step(self.state, next(self.batches), self.rates, key)
            return self.state, out["loss"]

        def all_blocks() -> Any:
            nonlocal held
            held, row_gradients = blocks(*held, rows, bias_rck, batch)
            return held, row_gradients

        def table_update() -> Any:
            self.tables = tables(self.tables, ids, batch, tuple(row_gradient))
            return self.tables

        calls = {
            "whole": whole,
            "blocks": all_blocks,
            "lookup": lambda: lookup(self.tables[0], batch),
            "forward": lambda: forward(self.params, rows, bias_rck, batch),
            "forward_backward": lambda: backward(self.params, rows, bias_rck, batch),
            "dense_update": lambda: update(self.params, self.moments, gradient),
            "table_update": table_update,
        }
        return {name: rounds.timed(call) for name, call in calls.items()}

    def _lookup(self, tables: Any, batch: Batch) -> Any:
        layout = self.program.layout
        ids = embedding.deduplicate(layout, batch)
        return embedding.features(layout, embedding.gather(tables, ids), ids, batch)

    def _loss(self, params: Any, rows: Any, bias_rck: jax.Array, batch: Batch) -> jax.Array:
        features = dataclasses.replace(self.features_of(batch), **rows)
        logits_rck, aux = self.program.model.apply(
            {"params": params}, features, train=True, rngs={"dropout": jax.random.key(0)}
        )
        total, _ = loss.multi_task(
            logits_rck + bias_rck,
            batch.labels,
            batch.weights,
            aux,
            batch.schema,
            task_weights={},
            aux_weights=loss.first_weights(aux, dict(self.config.aux_weights)),
        )
        return total

    def features_of(self, batch: Batch) -> Any:
        """Features of the batch's masks and times; `_loss` puts the rows in.

        The actions are those of the first batch, the only one that parts are timed on.
        """
        names = [f.name for f in dataclasses.fields(self.features)]
        return dataclasses.replace(
            self.features,
            **{n: getattr(batch, n) for n in names if hasattr(batch, n) and n not in ROWS},
        )

    def _dense_update(self, params: Any, moments: Any, gradient: Any) -> Any:
        updates, moments = optim.transform(self.config.optimizer).update(gradient, moments, params)
        return jax.tree.map(lambda p, u: p - 1e-3 * u, params, updates), moments

    def _blocks(self, params: Any, moments: Any, rows: Any, bias_rck: Any, batch: Batch) -> Any:
        gradient, row_gradient = jax.grad(self._loss, argnums=(0, 1))(params, rows, bias_rck, batch)
        return self._dense_update(params, moments, gradient), row_gradient

    def _table_update(self, tables: Any, ids: Any, batch: Batch, gradient: Any) -> Any:
        values, optimizer = tables
        layout = self.program.layout

        def embedded(looked_up: Any) -> Any:
            features, bias_rck = embedding.features(layout, looked_up, ids, batch)
            return embedding_rows(features), bias_rck

        # Linear in the rows: only the transpose is computed, not the look-up itself.
        _, transpose = jax.vjp(embedded, embedding.gather(values, ids))
        (row_gradients,) = transpose(gradient)
        return embedding.update(values, optimizer, ids, row_gradients, self.config.tables)


def embedding_rows(features: Any) -> dict[str, Any]:
    """The float part of Features, which gradients are taken with respect to."""
    return {"user": features.user, "history": features.history, "candidate": features.candidate}


def _peer(name: str, model: Any, bench: _Bench) -> dict[str, Any]:
    """An entry of torch_peers.py's WORK.json: the shapes of the bench's features, the Config."""
    schema, features = bench.schema, bench.features
    width = lambda values, side: sum(values[f.name].shape[-1] for f in schema.of(side))
    R, C = features.candidate_sample.shape
    shapes = {
        "R": R,
        "S": features.history_sample.shape[1],
        "C": C,
        "users": [features.user[f.name].shape[-1] for f in schema.user],
        "item": width(features.candidate, "item"),
        "event": width(features.history, "event"),
        "context": width(features.candidate, "context"),
    }
    fields = {**dataclasses.asdict(model), "name": name}
    if name == "hstu":
        fields["time_bias"] = model.time_bias and schema.time_exact
    return {"name": name, "kind": "blocks", "shapes": shapes, "model": fields}
