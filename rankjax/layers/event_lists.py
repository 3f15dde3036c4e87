"""One list of event tokens per sample, merged of one or several sequences of its events.

An event's sequence is what the user did (its action id). Lists are laid out so that the last
tokens of all samples stand at the end of the row: cutting every list to its last n tokens, as
OneTrans' pyramid does layer by layer, is then a slice of the row, packed or not.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax import batch
from rankjax.batch import Features, Tokens
from rankjax.layers import initializers, sequence

RULES = ("time", "intent")
ALWAYS = jnp.iinfo(jnp.int32).min  # a separator's time: before every candidate's


class Lists(NamedTuple):
    """The lists of a row's samples, each array [R, M].

    tokens: role HISTORY (or PAD), segment, rule time, and position = place in the sample's list,
    from its first token on. age: tokens of the sample that follow in its list. slot: the history
    slot of an event. sequence: 0 .. n - 1 of an event, and of the events before a separator.
    separator: the token is none of the events, but stands between two sequences.
    """

    tokens: Tokens
    age: jax.Array
    slot: jax.Array
    sequence: jax.Array
    separator: jax.Array


def length(history: int, sequences: int, by: str) -> int:
    """The longest list of one sample, in tokens."""
    return history + (sequences - 1 if by == "intent" else 0)


def merge(features: Features, *, history: int, sequences: int = 1, by: str = "time") -> Lists:
    """The lists of every row; M = min(slots and separators of the row, G * `length`).

    Args:
      history: a list holds the newest so many events of its sample.
      sequences: n; an event is of sequence clip(action - 1, 0, n - 1).
      by: "time", the stored order, which is that of time, events of one time as the log has
        them; "intent", sequence after sequence, 0 first, each in stored order, with a separator
        between two neighbours, also where one is empty.
    """
    sample_rm, G = features.history_sample, sequence.samples(features)
    R, S = sample_rm.shape
    sequence_rm = jnp.clip(features.history_action - 1, 0, sequences - 1)
    if history < S:  # events older than the newest `history` become padding, of no sample
        newer_rs, _ = _around(sample_rm, jnp.zeros_like(sample_rm))
        sample_rm = jnp.where(newer_rs < history, sample_rm, -1)
    rank_rm, separators = jnp.zeros_like(sample_rm), 0
    if by == "intent":
        separators = G * (sequences - 1)
        fill = lambda x_n: jnp.broadcast_to(x_n.astype(jnp.int32), (R, separators))
        before_n = jnp.tile(jnp.arange(sequences - 1), G)
        rank_rm = jnp.concatenate([2 * sequence_rm, fill(2 * before_n + 1)], axis=1)
        sequence_rm = jnp.concatenate([sequence_rm, fill(before_n)], axis=1)
        of_sample = fill(jnp.repeat(jnp.arange(G), sequences - 1))
        sample_rm = jnp.concatenate([sample_rm, of_sample], axis=1)
    age_rm, position_rm = _around(sample_rm, rank_rm)
    M = S + separators
    kept = min(M, G * length(history, sequences, by))
    # The oldest first, across samples; padding before all.
    order_rm = jnp.argsort(jnp.where(sample_rm >= 0, -age_rm, -M - 1), axis=1, stable=True)
    order_rm = order_rm[:, M - kept :]
    at = lambda x_rm: jnp.take_along_axis(x_rm, order_rm, axis=1)
    wide = lambda x_rs, fill: jnp.pad(x_rs, [(0, 0), (0, separators)], constant_values=fill)
    segment = at(sample_rm)
    tokens = Tokens(
        segment=segment,
        role=jnp.where(segment >= 0, batch.HISTORY, batch.PAD),
        time=at(wide(sequence.rule_times(features)[0], ALWAYS)),
        position=at(position_rm),
        group=jnp.full_like(segment, -1),
        bias_time=at(wide(features.history_time, 0)),
    )
    return Lists(
        tokens=tokens,
        age=at(age_rm),
        slot=jnp.minimum(order_rm, S - 1),
        sequence=at(sequence_rm),
        separator=order_rm >= S,
    )


def last(lists: Lists, most: int, samples: int) -> Tokens:
    """The last `most` tokens of every list, which are among the row's last min(M, G * most)."""
    rows = min(lists.age.shape[1], samples * most)
    tokens = sequence.last(lists.tokens, rows)
    stays_rn = lists.age[:, lists.age.shape[1] - rows :] < most
    return dataclasses.replace(tokens, role=jnp.where(stays_rn, tokens.role, batch.PAD))


def _around(sample_rm: jax.Array, rank_rm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many tokens of a token's sample follow it and precede it, by (rank, slot); 0 for padding.

    int32 [R, M] each. Compares all pairs, which XLA does without holding them.
    """
    slot_m = jnp.arange(sample_rm.shape[1])
    i, j = (slice(None), slice(None), None), (slice(None), None)
    mate_rmm = (sample_rm[i] == sample_rm[j]) & (sample_rm >= 0)[i]
    same_rmm, before_mm = rank_rm[j] == rank_rm[i], slot_m[None, :] < slot_m[:, None]
    precedes_rmm = (rank_rm[j] < rank_rm[i]) | (same_rmm & before_mm)
    follows_rmm = (rank_rm[j] > rank_rm[i]) | (same_rmm & before_mm.T)
    count = lambda x_rmm: jnp.sum(mate_rmm & x_rmm, axis=-1, dtype=jnp.int32)
    return count(follows_rmm), count(precedes_rmm)


class Embed(nn.Module):
    """The features of events -> their tokens [R, M, D] in `dtype`, in the order of `lists`.

    A token is an MLP of its event's features, each sequence with one of its own (a ReLU layer of
    width `hidden`, or none where 0, then a linear one), plus, by "time", its sequence's type, or,
    by "intent", the learned separator; plus its position.
    positions: rows of the table of positions; 0 = without.
    Parameters, float32, W wide features, F = hidden or W: per sequence W F + F where hidden, and
    F D + D; several sequences by time: type [sequences, D], by intent: separator [D]; position
    [positions, D].
    Raises ValueError for a schema without features of events, or, with several sequences, without
    an action that is a single id.
    """

    width: int
    hidden: int = 0
    sequences: int = 1
    by: str = "time"
    positions: int = 0
    kernel_init: str = "lecun"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Features, lists: Lists) -> jax.Array:
        schema, names = features.schema, [f.name for f in features.schema.history]
        if not names:
            raise ValueError("event_lists: the schema has no item or event feature for a token")
        if self.sequences > 1 and schema.action is None:
            raise ValueError(
                f"event_lists: sequences={self.sequences}, expected 1: the schema has no action "
                "that is a single id, by which events are divided"
            )
        x_rsw = sequence.concat(features.history, names, self.dtype)
        x_rmw = jnp.take_along_axis(x_rsw, lists.slot[..., None], axis=1)
        x_rmd = self._mlp(0, x_rmw)
        for i in range(1, self.sequences):
            x_rmd = jnp.where(lists.sequence[..., None] == i, self._mlp(i, x_rmw), x_rmd)
        if self.sequences > 1 and self.by == "time":
            x_rmd += self._learned("type", self.sequences, self.width)[lists.sequence]
        if self.sequences > 1 and self.by == "intent":
            separator_d = self._learned("separator", self.width)
            x_rmd = jnp.where(lists.separator[..., None], separator_d, x_rmd)
        if self.positions:
            x_rmd += self._learned("position", self.positions, self.width)[lists.tokens.position]
        return x_rmd

    def _learned(self, name: str, *shape: int) -> jax.Array:
        init = nn.initializers.normal(initializers.SIGMA)
        return self.param(name, init, shape, jnp.float32).astype(self.dtype)

    def _mlp(self, i: int, x_rmw: jax.Array) -> jax.Array:
        init = initializers.kernel(self.kernel_init)
        dense = lambda width, name: nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)
        if self.hidden:
            x_rmw = nn.relu(dense(self.hidden, f"hidden_{i}")(x_rmw))
        return dense(self.width, f"sequence_{i}")(x_rmw)
