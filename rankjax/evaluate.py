"""The scoring function, and the metrics of a scored stream.

`apply` is the one place where a batch becomes logits: training, evaluation and serving all call it,
so that they cannot disagree.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rankjax import embedding, hosts, metrics, sharding
from rankjax.batch import Batch
from rankjax.data import event_log
from rankjax.layers import auxiliary


def apply(
    model: nn.Module,
    layout: embedding.Layout,
    params: Any,
    rows: Any,
    ids: Any,
    batch: Batch,
    *,
    train: bool = False,
    rngs: dict[str, jax.Array] | None = None,
    lib: Any = embedding,
) -> tuple[jax.Array, dict[str, Any]]:
    """Looked-up rows -> (logits [R, C, K] float32, auxiliary terms).

    lib: `embedding`, or a `sharded_embedding.Sharded` on a mesh.

    The logits are the model's plus the additive part that is the same for every architecture: the
    sum of per-id scalar biases of the user's and the candidate's features. Auxiliary heads get it
    too. Padding candidates get 0.
    """
    features, bias_rck = lib.features(layout, rows, ids, batch)
    with sharding.on(lib.place):
        logits_rck, aux = model.apply({"params": params}, features, train=train, rngs=rngs or {})

    def biased(x_rck: jax.Array, bias_rck: jax.Array) -> jax.Array:
        # Broadcast against the biases, a model's wrong shape would pass unseen.
        chex.assert_shape(x_rck, bias_rck.shape)
        return jnp.where(batch.candidate_mask[..., None], x_rck.astype(jnp.float32) + bias_rck, 0)

    heads = {name: term for name, term in aux.items() if isinstance(term, auxiliary.Logits)}
    found = dict(aux)
    for name, head in heads.items():
        found[name] = dataclasses.replace(head, logits=biased(head.logits, bias_rck))
    if any(head.owns_tables for head in heads.values()):
        bias_rck = jax.lax.stop_gradient(bias_rck)
    return biased(logits_rck, bias_rck), found


def score(
    model: nn.Module,
    layout: embedding.Layout,
    params: Any,
    tables: Any,
    batch: Batch,
    lib: Any = embedding,
) -> jax.Array:
    """Batch -> logits [R, C, K] float32, as training computes them but with train=False."""
    ids = lib.deduplicate(layout, batch)
    logits_rck, _ = apply(model, layout, params, lib.gather(tables, ids), ids, batch, lib=lib)
    return logits_rck


@dataclasses.dataclass(frozen=True)
class Scored:
    """Predictions in the order in which they were made: impression int64 [n], logits f32 [n, K]."""

    impression: np.ndarray
    logits: np.ndarray

    @classmethod
    def of(cls, pairs: Iterable[tuple[np.ndarray, Any]], tasks: int) -> "Scored":
        """Joins (impression [R, C], logits [R, C, K]) of batches, without the padding."""
        rows, logits = [np.zeros(0, np.int64)], [np.zeros((0, tasks), np.float32)]
        for impression_rc, logits_rck in pairs:
            valid = impression_rc >= 0
            rows.append(impression_rc[valid])
            logits.append(np.asarray(logits_rck)[valid])
        return cls(np.concatenate(rows), np.concatenate(logits))


def stream(
    scorer: Callable[[Batch], jax.Array],
    batches: Iterable[tuple[int, Batch]],
    tasks: int,
    place: sharding.Placement | None = None,
) -> Scored:
    """Scores every valid impression of `batches` ((step, Batch) pairs) with `scorer`.

    place: of a mesh, where `batches` are this host's rows; every host gets what all have scored.
    """

    sizes: list[int] = []

    def pairs():
        waiting = None  # one batch in flight: the host gathers while the device scores
        for _, batch in batches:
            rows = batch.without_impression()
            logits = scorer(rows if place is None else place.put(rows))
            if waiting is not None:
                yield waiting
            waiting = (batch.impression, logits)
        if waiting is not None:
            yield waiting

    def local():
        for rows, logits in pairs():
            sizes.append(int(np.count_nonzero(rows >= 0)))
            yield rows, sharding.local(logits)

    own = Scored.of(local(), tasks)
    return _of_all(own, np.repeat(np.arange(len(sizes)), sizes))


def joined(pairs: Iterable[tuple[np.ndarray, Any]], tasks: int, steps: list[np.ndarray]) -> Scored:
    """`Scored.of` the pairs of all hosts, step by step; steps: of every valid impression, its."""
    return _of_all(Scored.of(pairs, tasks), np.concatenate([np.zeros(0, np.int64), *steps]))


def _of_all(own: Scored, step: np.ndarray) -> Scored:
    """By all hosts together: what all of them scored, by step, and within a step by host."""
    if hosts.alone():
        return own
    parts = (hosts.gathered(x) for x in (step.astype(np.int64), own.impression, own.logits))
    step, impression, logits = map(np.concatenate, parts)
    order = np.argsort(step, kind="stable")
    return Scored(impression[order], logits[order])


def labels_of(log: event_log.EventLog, impression: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """labels, weights float64 [n, K] of these rows of the log (weight: see schema.Task)."""
    columns = {t.name: log.column("impressions", t.name)[impression] for t in log.schema.tasks}
    labels = np.stack([columns[t.name] for t in log.schema.tasks], -1).astype(np.float64)
    ones = np.ones(len(impression))
    weights = [columns[t.weight] if t.weight else ones for t in log.schema.tasks]
    return labels, np.stack(weights, -1).astype(np.float64)


def summarize(log: event_log.EventLog, scored: Scored) -> dict[str, Any]:
    """Every metric of every task, with users and requests joined from the log.

    Returns what `metrics.summarize` returns; an undefined metric is None, its reason beside it.
    """
    labels, weights = labels_of(log, scored.impression)
    return metrics.summarize(
        scored.logits,
        labels,
        weights,
        log.column("impressions", "user")[scored.impression],
        log.column("impressions", "request")[scored.impression],
        log.schema,
    )


def alarms(
    log: event_log.EventLog, scored: Scored, truth: dict[str, np.ndarray]
) -> dict[str, metrics.OracleAlarm]:
    """Both alarm rules for every task whose true probability is known (`p_<task>` in `truth`)."""
    labels, weights = labels_of(log, scored.impression)
    found = {}
    for k, task in enumerate(log.schema.tasks):
        if f"p_{task.name}" in truth:
            p = truth[f"p_{task.name}"][scored.impression]
            found[task.name] = metrics.oracle_alarm(
                scored.logits[:, k], labels[:, k], p, weights[:, k]
            )
    return found
