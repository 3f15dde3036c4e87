"""Multi-task losses, and the auxiliary terms that models return beside their logits."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from rankjax.layers import auxiliary
from rankjax.schema import Schema

Aux = Mapping[str, auxiliary.Logits | auxiliary.Penalty]
ADAPT = 1.01  # by which a step moves the weight of a penalty with a target


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log p(label) in nats, float32, elementwise; finite in value and gradient for any logit."""
    x, y = logits.astype(jnp.float32), labels.astype(jnp.float32)
    # Not max(x, 0) - x y + log1p(exp(-|x|)): JAX's gradient of its kinks is -y at x = 0, where an
    # untrained head stands, and softplus(x) - x y loses small losses to cancellation.
    return y * jax.nn.softplus(-x) + (1 - y) * jax.nn.softplus(x)


def multi_task(
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    aux: Aux,
    schema: Schema,
    *,
    task_weights: Mapping[str, float | jax.Array] | None = None,
    aux_weights: Mapping[str, float | jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """sum_k lambda_k (sum w BCE / sum w) + sum_a mu_a aux_a, over the whole (global) batch.

    aux_a is a Penalty's value, or the first sum again with the logits of an auxiliary head.

    A task whose weights are all 0 adds 0 to the loss and to every gradient. An entry of weight 0
    (padding, undefined label) is never read, so that a NaN there does no harm.

    Args:
      logits, labels, weights: [R, C, K], any float dtype (computed in float32).
      aux: named terms of the model.
      task_weights: lambda by task name, 1 where not named.
      aux_weights: mu by name; every term of `aux` needs one.
    Returns: (total float32 [], {"task/<name>": loss, "aux/<name>": term}), the parts unweighted.
    Raises: ValueError for shapes, an unknown task, or a term without a weight.
    """
    task_weights, aux_weights = task_weights or {}, aux_weights or {}
    names = [task.name for task in schema.tasks]
    if unknown := sorted(set(task_weights) - set(names)):
        raise ValueError(f"loss.multi_task: task_weights names {unknown}, expected some of {names}")
    if missing := sorted(set(aux) - set(aux_weights)):
        raise ValueError(
            f"loss.multi_task: no weight for the auxiliary terms {missing}, "
            f"found weights for {sorted(aux_weights)}"
        )

    def of(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(weighted sum over tasks, loss of each task [K])."""
        loss_k = _per_task(logits, labels, weights, names)
        return sum(task_weights.get(n, 1.0) * loss_k[k] for k, n in enumerate(names)), loss_k

    total, loss_k = of(logits)
    parts = {f"task/{name}": loss_k[k] for k, name in enumerate(names)}
    for name, term in aux.items():
        value = of(term.logits)[0] if isinstance(term, auxiliary.Logits) else term.value
        parts[f"aux/{name}"] = jnp.asarray(value, jnp.float32)
        total = total + aux_weights[name] * parts[f"aux/{name}"]
    return jnp.asarray(total, jnp.float32), parts


def _per_task(
    logits: jax.Array, labels: jax.Array, weights: jax.Array, names: list[str]
) -> jax.Array:
    """sum w BCE / sum w of each task, float32 [K]; 0 where all weights are 0."""
    if not logits.shape == labels.shape == weights.shape or logits.shape[-1] != len(names):
        raise ValueError(
            f"loss.multi_task: logits {logits.shape}, labels {labels.shape}, weights "
            f"{weights.shape}, expected [R, C, {len(names)}] for tasks {names}"
        )
    w = weights.astype(jnp.float32)
    # Replaced before the loss, not after: the gradient of a NaN times 0 would still be NaN.
    x, y = jnp.where(w > 0, logits, 0), jnp.where(w > 0, labels, 0)
    axes = tuple(range(w.ndim - 1))
    weighted, total_weight = jnp.sum(w * binary_cross_entropy(x, y), axes), jnp.sum(w, axes)
    return weighted / jnp.where(total_weight > 0, total_weight, 1)


def first_weights(aux: Aux, given: Mapping[str, float]) -> dict[str, float]:
    """{term: its weight at the start}: the one given, else the one that the term names.

    Raises ValueError for a given name that the model has no term of.
    """
    if unknown := sorted(set(given) - set(aux)):
        raise ValueError(
            f"loss: aux_weights names {unknown}, expected some of the model's terms {sorted(aux)}"
        )
    return {name: given.get(name, term.weight) for name, term in aux.items()}


def adapt(aux_weights: Mapping[str, jax.Array], aux: Aux) -> dict[str, jax.Array]:
    """The weights of the next step: those of penalties with a target move by a factor ADAPT."""

    def next_weight(name: str, weight: jax.Array) -> jax.Array:
        term = aux.get(name)
        if not isinstance(term, auxiliary.Penalty) or term.target is None:
            return weight
        return jnp.where(term.measured > term.target, weight * ADAPT, weight / ADAPT)

    return {name: next_weight(name, weight) for name, weight in aux_weights.items()}
