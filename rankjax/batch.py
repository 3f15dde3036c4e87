"""Batch, Tokens and Features: the pytrees that every model and metric takes.

Rows R (unpacked: R = B, one sample a row; packed: a row holds up to G samples, see packing.py),
S history slots, C candidate slots, M values of a multi-valued feature, K tasks, E embedding width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rankjax.schema import Schema

Array = jax.Array | np.ndarray


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("user", "history", "candidate", "history_sample", "candidate_sample"),
        *("history_time", "candidate_time", "history_order", "candidate_order"),
        *("labels", "weights", "impression"),
    ],
    meta_fields=["schema", "one_time"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Ids, times, masks and labels of R rows. The history runs old -> new from slot 0 on.

    user {name: [R, G]}, history {name: [R, S]}, candidate {name: [R, C]}: int32 ids (0 = missing),
      [..., M] for kind "ids", float32 for kind "dense".
    history_sample [R, S], candidate_sample [R, C]: int32, which of the row's G samples an entry
      belongs to; -1 = padding.
    history_time, candidate_time: int32 seconds after the sample's reference time (its first
      candidate's time), so that events in a window at or after its first candidate have time >= 0.
    history_order, candidate_order: int32. An event's order is its index among the user's events,
      a candidate's the number of the user's events strictly before it, both minus the first
      candidate's order: the candidate may read exactly the events with a smaller order.
    labels, weights: float32 [R, C, K]; weight 0 where a label is undefined or padding.
    impression: int64 [R, C] row in the log, -1 = padding; joins request, user and truth. It stays
      on the host: `without_impression` before a jitted call.
    one_time: every sample's candidates share one time (static, checked at trace time).
    """

    user: dict[str, Array]
    history: dict[str, Array]
    candidate: dict[str, Array]
    history_sample: Array
    candidate_sample: Array
    history_time: Array
    candidate_time: Array
    history_order: Array
    candidate_order: Array
    labels: Array
    weights: Array
    impression: np.ndarray | None
    schema: Schema
    one_time: bool

    @property
    def candidate_mask(self) -> Array:
        return self.candidate_sample >= 0

    @property
    def history_mask(self) -> Array:
        return self.history_sample >= 0

    def without_impression(self) -> "Batch":
        return dataclasses.replace(self, impression=None)

    def check(self, schema: Schema) -> None:
        """Raises ValueError without a slot of either side, or a feature of `schema`."""
        for side, slots in (("candidate", self.candidate_sample), ("history", self.history_sample)):
            if slots.shape[1] == 0:
                raise ValueError(
                    f"batch: {side}_sample has shape {slots.shape}, expected at least one {side} "
                    "slot (padding has sample -1)"
                )
        for side in ("user", "history", "candidate"):
            there, wanted = getattr(self, side), [f.name for f in getattr(schema, side)]
            if missing := [name for name in wanted if name not in there]:
                raise ValueError(
                    f"batch: {side} lacks {missing}; found {sorted(there)}, expected the schema's "
                    f"{wanted}"
                )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("user", "history", "candidate", "history_sample", "candidate_sample"),
        *("history_time", "candidate_time", "history_order", "candidate_order", "history_action"),
    ],
    meta_fields=["schema", "one_time"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """The Batch with every id replaced by its embedding row; what a model is called with.

    user {name: [R, G, E]}, history {name: [R, S, E]}, candidate {name: [R, C, E]}; multi-valued
    ids are mean-pooled over their non-zero values; dense features are [..., 1].
    history_action: int32 [R, S], the id of the schema's `action` feature, for models that route
    events by what the user did; 0 = missing, and everywhere for a schema without one. The other
    fields are the Batch's.
    """

    user: dict[str, jax.Array]
    history: dict[str, jax.Array]
    candidate: dict[str, jax.Array]
    history_sample: jax.Array
    candidate_sample: jax.Array
    history_time: jax.Array
    candidate_time: jax.Array
    history_order: jax.Array
    candidate_order: jax.Array
    history_action: jax.Array
    schema: Schema
    one_time: bool

    @property
    def candidate_mask(self) -> jax.Array:
        return self.candidate_sample >= 0

    @property
    def history_mask(self) -> jax.Array:
        return self.history_sample >= 0

    def user_of_candidate(self, name: str) -> jax.Array:
        """The user feature of each candidate's sample, [R, C, ...]; padding reads sample 0."""
        x_rge = self.user[name]
        if x_rge.shape[1] == 1:
            C = self.candidate_sample.shape[1]
            return jnp.broadcast_to(x_rge, (x_rge.shape[0], C, *x_rge.shape[2:]))
        return jnp.take_along_axis(x_rge, jnp.maximum(self.candidate_sample, 0)[..., None], axis=1)

    def require_one_time(
        self, model: str, why: str = "it reads the history once per sample"
    ) -> None:
        """Raises ValueError where a sample's candidates have several times (windows).

        For models whose user side reads all of the history: with several times an early candidate
        would read it through tokens that have read events at or after that candidate's own time.
        why: what of the model it is, for the message.
        """
        if not self.one_time:
            raise ValueError(
                f"{model}: the batch holds samples whose candidates have different times "
                f"(organisation 'window'); {why}, so an early candidate would see later events. "
                "Use 'request' or 'impression' samples."
            )


# Roles of tokens, for mask rules.
PAD, CONTEXT, HISTORY, CANDIDATE, GLOBAL = 0, 1, 2, 3, 4


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["segment", "role", "time", "position", "group", "bias_time"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """What mask rules and relative biases know of a token; each int32 [R, N].

    segment: the sample within the row. role: PAD, CONTEXT, HISTORY, CANDIDATE, or GLOBAL (made of
    the user's side, and reading all of the sample's history).
    time: what rules compare: seconds where the log's times are exact, else the order.
    position: counts from the sample's oldest token; a candidate's is the number of tokens that it
      may read, whatever stands after them. group: tokens of one candidate share one, and see each
    other.
    bias_time: seconds, for biases made of time differences.
    """

    segment: jax.Array
    role: jax.Array
    time: jax.Array
    position: jax.Array
    group: jax.Array
    bias_time: jax.Array
