"""One token stream per row: [context | history old -> new | candidates].

What sequence models share: the `Tokens` that mask rules and biases read, and small moves of arrays.
Rows may be packed: every count is taken within a token's own sample.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rankjax import batch
from rankjax.batch import Features, Tokens
from rankjax.masks import MaskRule


def rule_times(features: Features) -> tuple[jax.Array, jax.Array]:
    """What the past is cut by, of events [R, S] and candidates [R, C], int32.

    Seconds where the log's times are exact, else the order within the user.
    """
    if features.schema.time_exact:
        return features.history_time, features.candidate_time
    return features.history_order, features.candidate_order


def ranks(features: Features) -> tuple[jax.Array, jax.Array]:
    """How many valid events of its sample stand before an event [R, S] or a candidate [R, C].

    An event counts the slots before its own, a candidate the events of an earlier time. Later
    events change neither. 0 for padding.
    """
    seen, of_candidate = features.history_sample, features.candidate_sample
    history_time, candidate_time = rule_times(features)
    S = seen.shape[1]
    earlier_ss = jnp.arange(S)[:, None] > jnp.arange(S)[None, :]
    valid_rs = (seen >= 0)[:, None, :]
    before_rss = (seen[:, :, None] == seen[:, None, :]) & valid_rs & earlier_ss
    readable_rcs = (of_candidate[:, :, None] == seen[:, None, :]) & valid_rs
    readable_rcs &= history_time[:, None, :] < candidate_time[:, :, None]
    return jnp.sum(before_rss, axis=-1, dtype=jnp.int32), jnp.sum(
        readable_rcs, axis=-1, dtype=jnp.int32
    )


def samples(features: Features) -> int:
    """G: at most so many samples lie in a row. Told by a user feature.

    A schema without any leaves the number of candidates, as every sample has at least one: exact
    too, but with room for more samples than there can be.
    """
    return next((x.shape[1] for x in features.user.values()), features.candidate_sample.shape[1])


def context_tokens(features: Features, context: str) -> int:
    """Context tokens per sample: one per user feature ("prefix"), or 0 ("none")."""
    return len(features.schema.user) if context == "prefix" else 0


def tokens(features: Features, *, context: int, per_event: int = 1) -> Tokens:
    """The Tokens of [context | history | candidates], each field int32 [R, N].

    Args:
      context: context tokens per sample, in sample-major order (G * context in a row).
      per_event: tokens that each event takes, side by side.
    Positions: a context token its index; an event's first token `context` + `per_event` times the
    events before it; a candidate the number of context and event tokens that it may read, so that
    all candidates of one time share it. A candidate's group is its slot; others have -1.
    """
    R, C = features.candidate_sample.shape
    samples = next(iter(features.user.values())).shape[1] if context else 0
    history_time, candidate_time = rule_times(features)
    history_rank, candidate_rank = ranks(features)

    def per_token(x_rs: jax.Array) -> jax.Array:
        return jnp.repeat(x_rs, per_event, axis=1)

    def stream(of_context: jax.Array, of_history: jax.Array, of_candidate: jax.Array) -> jax.Array:
        of_context = jnp.broadcast_to(of_context, (R, samples * context))
        parts = [of_context, of_history, jnp.broadcast_to(of_candidate, (R, C))]
        return jnp.concatenate([x.astype(jnp.int32) for x in parts], axis=1)

    zero = jnp.zeros((1, 1), jnp.int32)
    slot = jnp.tile(jnp.arange(per_event), features.history_sample.shape[1])
    history_mask = per_token(features.history_mask)
    return Tokens(
        segment=stream(
            jnp.repeat(jnp.arange(samples), context),
            per_token(features.history_sample),
            features.candidate_sample,
        ),
        role=stream(
            zero + batch.CONTEXT,
            jnp.where(history_mask, batch.HISTORY, batch.PAD),
            jnp.where(features.candidate_mask, batch.CANDIDATE, batch.PAD),
        ),
        time=stream(zero, per_token(history_time), candidate_time),
        position=stream(
            jnp.tile(jnp.arange(context), samples),
            context + per_event * per_token(history_rank) + slot,
            context + per_event * candidate_rank,
        ),
        group=stream(zero - 1, jnp.full_like(slot, -1)[None] + 0 * history_mask, jnp.arange(C)),
        bias_time=stream(zero, per_token(features.history_time), features.candidate_time),
    )


def lengths(tokens: Tokens) -> jax.Array:
    """How many context and history tokens each token's sample has, int32 [R, N]."""
    counted_rn = (tokens.role == batch.CONTEXT) | (tokens.role == batch.HISTORY)
    same_rnm = tokens.segment[:, :, None] == tokens.segment[:, None, :]
    return jnp.sum(same_rnm & counted_rn[:, None, :], axis=-1, dtype=jnp.int32)


def next_times(tokens: Tokens) -> Tokens:
    """The tokens with the bias_time of the one after them, as queries of a relative bias.

    The newest event's is the time of the sample's candidates, which must share one; candidates
    keep their own. `tokens` are those of `tokens()`, whose positions count without gaps.
    """
    same_rnm = tokens.segment[:, :, None] == tokens.segment[:, None, :]
    follows_rnm = tokens.position[:, None, :] == tokens.position[:, :, None] + 1
    follows_rnm &= same_rnm  # padding is of no sample
    least = jnp.iinfo(jnp.int32).min
    time_rn = jnp.max(jnp.where(follows_rnm, tokens.bias_time[:, None, :], least), axis=-1)
    time_rn = jnp.where(jnp.any(follows_rnm, axis=-1), time_rn, tokens.bias_time)
    return dataclasses.replace(tokens, bias_time=time_rn)


def layer_masks(
    q: Tokens, k: Tokens, rule: MaskRule, *, layers: int, rows: int
) -> dict[str, tuple[Tokens, Tokens, MaskRule]]:
    """{title: (queries, keys, rule)} of L layers of which the last computes the last `rows` rows.

    In the order of the layers: the first entry is every layer's but the last one's, which has the
    last entry.
    """
    found = {"all layers": (q, k, rule)}
    if rows < q.segment.shape[1]:
        found = {"layers before the last": (q, k, rule)} if layers > 1 else {}
        found["last layer"] = (last(q, rows), k, rule)
    return found


def mask_of_layers(masks: Sequence[object], layers: int) -> list[int]:
    """Which entry of `layer_masks` each of L layers has."""
    return [0] * (layers - 1) + [len(masks) - 1]


def last(tokens: Tokens, count: int) -> Tokens:
    """The last `count` tokens of every row."""
    return jax.tree.map(lambda x_rn: x_rn[:, x_rn.shape[1] - count :], tokens)


def interleave(*streams: jax.Array) -> jax.Array:
    """[x0, y0, x1, y1, ...] along axis 1 of streams of one shape [R, S, D]: [R, len * S, D]."""
    R, S, D = streams[0].shape
    return jnp.stack(streams, axis=2).reshape(R, S * len(streams), D)


def concat(values: dict[str, jax.Array], names: list[str], dtype: str) -> jax.Array:
    """The named features [R, S, E] side by side, [R, S, sum of E], in `dtype`."""
    return jnp.concatenate([values[name].astype(dtype) for name in names], axis=-1)
