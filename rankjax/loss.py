"""Multi-task losses, and the auxiliary terms that models return beside their logits."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from rankjax.schema import Schema


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
    aux: Mapping[str, jax.Array],
    schema: Schema,
    *,
    task_weights: Mapping[str, float | jax.Array] | None = None,
    aux_weights: Mapping[str, float | jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """sum_k lambda_k (sum w BCE / sum w) + sum_a mu_a aux_a, over the whole (global) batch.

    A task whose weights are all 0 adds 0 to the loss and to every gradient. An entry of weight 0
    (padding, undefined label) is never read, so that a NaN there does no harm.

    Args:
      logits, labels, weights: [R, C, K], any float dtype (computed in float32).
      aux: named scalar terms of the model.
      task_weights: lambda by task name, 1 where not named.
      aux_weights: mu by name; every term of `aux` needs one.
    Returns: (total float32 [], {"task/<name>": loss, "aux/<name>": term}), the parts unweighted.
    Raises: ValueError for shapes, an unknown task, or a term without a weight.
    """
    task_weights, aux_weights = task_weights or {}, aux_weights or {}
    names = [task.name for task in schema.tasks]
    if not logits.shape == labels.shape == weights.shape or logits.shape[-1] != len(names):
        raise ValueError(
            f"loss.multi_task: logits {logits.shape}, labels {labels.shape}, weights "
            f"{weights.shape}, expected [R, C, {len(names)}] for tasks {names}"
        )
    if unknown := sorted(set(task_weights) - set(names)):
        raise ValueError(f"loss.multi_task: task_weights names {unknown}, expected some of {names}")
    if missing := sorted(set(aux) - set(aux_weights)):
        raise ValueError(
            f"loss.multi_task: no weight for the auxiliary terms {missing}, "
            f"found weights for {sorted(aux_weights)}"
        )
    w = weights.astype(jnp.float32)
    # Replaced before the loss, not after: the gradient of a NaN times 0 would still be NaN.
    x, y = jnp.where(w > 0, logits, 0), jnp.where(w > 0, labels, 0)
    axes = tuple(range(w.ndim - 1))
    weighted, total_weight = jnp.sum(w * binary_cross_entropy(x, y), axes), jnp.sum(w, axes)
    loss_k = weighted / jnp.where(total_weight > 0, total_weight, 1)
    parts = {f"task/{name}": loss_k[k] for k, name in enumerate(names)}
    total = sum(task_weights.get(name, 1.0) * parts[f"task/{name}"] for name in names)
    for name, term in aux.items():
        parts[f"aux/{name}"] = jnp.asarray(term, jnp.float32)
        total = total + aux_weights[name] * parts[f"aux/{name}"]
    return jnp.asarray(total, jnp.float32), parts
