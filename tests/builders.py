"""Small random Features for tests of layers and models, made without a log or tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rankjax import schema as schemas
from rankjax.batch import Batch, Features
from rankjax.packing import pack

E = 4  # embedding width


def schema(*, tasks: int = 1, time_exact: bool = True) -> schemas.Schema:
    """User, item, event and context features in four groups, one of them dense."""
    return schemas.Schema(
        tables=tuple(
            schemas.Table(name=name, rows=50) for name in ("item", "age", "tag", "action", "hour")
        ),
        features=(
            schemas.Feature(name="age", side="user", group="user", table="age"),
            schemas.Feature(name="item", side="item", group="item", table="item"),
            schemas.Feature(name="price", side="item", group="item", kind="dense"),
            schemas.Feature(
                name="tag", side="item", group="item", table="tag", kind="ids", values=3
            ),
            schemas.Feature(
                name="action", side="event", group="action", table="action", action=True
            ),
            schemas.Feature(name="hour", side="context", group="context", table="hour"),
            schemas.Feature(name="spend", side="user", group="user", kind="dense"),
        ),
        tasks=tuple(schemas.Task(name=f"task_{k}") for k in range(tasks)),
        primary_task="task_0",
        time_exact=time_exact,
    )


def batch(
    rng: np.random.Generator,
    *,
    lengths: tuple[int, ...] = (5, 0, 3, 1),
    candidates: tuple[int, ...] = (3, 2, 1, 3),
    S: int = 6,
    C: int = 4,
    tasks: int = 1,
    one_time: bool = True,
) -> Batch:
    """An unpacked batch, one row for each of `lengths`, with EMBEDDINGS in place of ids.

    So pack() lays embeddings side by side, and `features` only renames the type. Values at
    padding are 0, as look-ups of id 0 would give.
    """
    found = schema(tasks=tasks)
    R = len(lengths)
    history_valid = np.arange(S) < np.array(lengths)[:, None]
    candidate_valid = np.arange(C) < np.array(candidates)[:, None]

    def values(feature: schemas.Feature, valid: np.ndarray) -> np.ndarray:
        width = 1 if feature.kind == "dense" else E
        x = rng.normal(size=(*valid.shape, width)) * valid[..., None]
        return x.astype(np.float32)

    # One time per sample: events before it, candidates at it.
    seconds = np.where(history_valid, np.arange(S) * 60 - 60 * S, 0).astype(np.int32)
    order = np.where(history_valid, np.arange(S) - np.array(lengths)[:, None], 0).astype(np.int32)
    zeros = np.zeros((R, C), np.int32)
    return Batch(
        user={f.name: values(f, np.ones((R, 1), bool)) for f in found.user},
        history={f.name: values(f, history_valid) for f in found.history},
        candidate={f.name: values(f, candidate_valid) for f in found.candidate},
        history_sample=np.where(history_valid, 0, -1).astype(np.int32),
        candidate_sample=np.where(candidate_valid, 0, -1).astype(np.int32),
        history_time=seconds,
        candidate_time=zeros,
        history_order=order,
        candidate_order=zeros,
        labels=np.zeros((R, C, tasks), np.float32),
        weights=np.repeat(candidate_valid[..., None], tasks, axis=-1).astype(np.float32),
        impression=np.where(candidate_valid, np.arange(R * C).reshape(R, C), -1),
        schema=found,
        one_time=one_time,
    )


def features(batch: Batch) -> Features:
    """The Features of a `batch` made here: its arrays are embeddings already."""
    names = [field.name for field in dataclasses.fields(Features) if field.name != "history_action"]
    fields = {name: getattr(batch, name) for name in names}
    # Ids 1 .. 3 that go with the embeddings, whatever slot or row they lie in.
    done = 1 + np.floor(1e3 * np.abs(batch.history["action"].sum(axis=-1))).astype(np.int32) % 3
    fields["history_action"] = jnp.asarray(np.where(batch.history_mask, done, 0))
    for side in ("user", "history", "candidate"):
        fields[side] = {name: jnp.asarray(x) for name, x in fields[side].items()}
    for name in names[3:-2]:
        fields[name] = jnp.asarray(fields[name])
    return Features(**fields)


def packed(batch: Batch, samples_per_row: int) -> Features:
    return features(pack(batch, samples_per_row))


def one(batch: Batch, row: int, candidate: int) -> dict[str, dict[str, np.ndarray]]:
    """What one candidate of an unpacked batch may read, float64: history [n, E] without padding."""
    valid = batch.history_sample[row] >= 0
    return {
        "user": {k: np.asarray(x[row, 0], np.float64) for k, x in batch.user.items()},
        "candidate": {
            k: np.asarray(x[row, candidate], np.float64) for k, x in batch.candidate.items()
        },
        "history": {k: np.asarray(x[row][valid], np.float64) for k, x in batch.history.items()},
    }


def moved(params: dict, rng: np.random.Generator) -> dict:
    """Every parameter off its initial 0 or 1, else a forgotten bias or scale goes unseen."""
    return jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype("f4"), params)


def float64(params: dict) -> dict:
    return jax.tree.map(lambda p: np.asarray(p, np.float64), params)


def count(params: dict) -> int:
    return sum(p.size for p in jax.tree.leaves(params))
