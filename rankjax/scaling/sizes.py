"""Parameters and FLOPs of a model on a schema: shapes only, nothing is computed.

Design: per valid impression, training = 3 x forward, look-up and optimizer left out.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rankjax import embedding, flops, models, train
from rankjax.batch import Features
from rankjax.data import loader
from rankjax.scaling import ladder
from rankjax.schema import Schema


def columns(
    config: Any, training: train.TrainConfig, schema: Schema, batches: loader.Batches
) -> dict[str, Any]:
    """The columns of a trial's row that follow from its sizes and the lengths of its samples."""
    fields = dataclasses.asdict(config)
    axes = type(config).axes
    history, candidates = batches.samples.event_counts, batches.samples.candidate_counts
    valid = max(int(candidates.sum()), 1)
    one_time = batches.samples.one_time
    per_sample = forward_flops(config, schema, training.tables.width, one_time)
    shapes = np.array([batches.shape(step) for step in range(len(batches))])
    padded = np.repeat(shapes, batches.batch_samples, axis=0).T  # (S, C) of each row
    matmul = forward_flops(config, schema, training.tables.width, one_time, "matmul")
    flops_valid = 3 * float(per_sample((history, candidates)).sum()) / valid
    return {
        "dense_params": dense_params(config, schema, training.tables.width),
        "embedding_params": embedding.count(schema, training.tables),
        "tokens": fields.get(axes.get("T", axes.get("S", ""))),
        "history": fields.get(axes.get("S", "")),
        "layers": fields.get(axes.get("L", "")),
        "width": fields.get(axes.get("D", "")),
        "flops": 3 * float(per_sample(tuple(padded)).sum()) / valid,
        "flops_valid": flops_valid,
        "flops_matmul": 3 * float(matmul((history, candidates)).sum()) / valid,  # of flops_valid
        "training_flops": flops_valid * valid,
        "padding_share": 1 - float((history.sum() + valid) / padded.sum()),
        "learning_rate": training.optimizer.learning_rate,
        "table_learning_rate": training.tables.learning_rate,
        "embedding_std": training.tables.init_std,
        "paper_params": config.paper_params(),
        "paper_flops": config.paper_flops(),
        "paper_scope": type(config).paper_scope,
        "config": json.dumps(fields, sort_keys=True),
    }


def forward_flops(
    config: Any, schema: Schema, width: int, one_time: bool, part: str = "total"
) -> flops.Piecewise:
    """Forward FLOPs of one sample as an exact function of its (history, candidates) lengths.

    Counted over the jaxpr of the training forward, look-up excluded, heads and pruning included,
    attention as its reference writes it, whatever runs. part: "total", "matmul" or "elementwise".
    A Config that rounds or cuts its history says where: history_pieces() -> (unit, breaks).
    """
    unit, breaks = config.history_pieces() if hasattr(config, "history_pieces") else (1, ())

    def count(history: int, candidates: int) -> float:
        counted = forward_count(config, schema, width, one_time, history, candidates)
        return getattr(counted, part)

    return flops.Piecewise.fit(count, unit=unit, breaks=breaks)


@functools.lru_cache(maxsize=4096)
def forward_count(
    config: Any, schema: Schema, width: int, one_time: bool, history: int, candidates: int
) -> flops.Flops:
    """Forward FLOPs of one sample with these lengths; see `forward_flops`."""
    if "implementation" in dataclasses.asdict(config):
        config = dataclasses.replace(config, implementation="reference")
    model = models.MODELS[ladder.architecture_of(config)](config)

    def forward(features: Features, params: Any) -> jax.Array:
        return model.apply(
            {"params": params}, features, train=True, rngs={"dropout": jax.random.key(0)}
        )[0]

    features = abstract_features(schema, width, 1, history, candidates, one_time)
    return flops.count(forward, features, abstract_params(config, schema, width))


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
