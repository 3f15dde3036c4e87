"""What a model may return beside its logits, {name: Logits or Penalty}, for `rankjax.loss`.

A term's weight is the trainer's (`TrainConfig.aux_weights`), by default the one that it names.
"""

import dataclasses
import functools

import jax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["logits"],
    meta_fields=["weight", "owns_tables"],
)
@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits [R, C, K] of an auxiliary head: its loss is the multi-task loss of the main ones.

    The per-id biases are added to it as to the main logits. owns_tables: this head alone trains the
    tables; then the biases that the main logits get are constants to them (GRAB's two phases).
    """

    logits: jax.Array
    weight: float = 1.0
    owns_tables: bool = False


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "measured"],
    meta_fields=["weight", "target"],
)
@dataclasses.dataclass(frozen=True)
class Penalty:
    """A scalar that the loss adds, float32 [].

    target: where given, the trainer adapts the weight so that `measured`, also a scalar, comes to
    the target: a step multiplies it by `loss.ADAPT` where `measured` is larger, else divides by it.
    """

    value: jax.Array
    weight: float = 1.0
    measured: jax.Array | None = None
    target: float | None = None
