"""Groups of K adjacent events of one sample, from the newest back (LONGER's token merge).

A sample of n events makes ceil(n / K) groups; the newest is full, the oldest may hold fewer. Rows
may be packed, and padding may stand in any slot: what a sample's groups hold does not depend on
what else lies in its row.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rankjax import batch
from rankjax.batch import Features, Tokens
from rankjax.layers import sequence
from rankjax.layers.transformer_block import Block
from rankjax.masks import MaskRule


def whole(features: Features, merge: int) -> Features:
    """The features with padding behind the history, up to a multiple of K = `merge` slots.

    So all that a model computes of them depends on S through ceil(S / K) alone.
    """
    more = -features.history_sample.shape[1] % merge

    def pad(x_rs: jax.Array, fill: int = 0) -> jax.Array:
        widths = [(0, 0), (0, more), *[(0, 0)] * (x_rs.ndim - 2)]
        return jnp.pad(x_rs, widths, constant_values=fill)

    names = ("history", "history_time", "history_order", "history_action")
    padded = jax.tree.map(pad, {name: getattr(features, name) for name in names})
    sample = pad(features.history_sample, -1)
    return dataclasses.replace(features, history_sample=sample, **padded)


def of_candidate(features: Features, x_rg: jax.Array) -> jax.Array:
    """What each candidate's sample has: [R, G, ...] -> [R, C, ...]; padding reads sample 0."""
    sample_rc = features.candidate_sample
    if x_rg.shape[1] == 1:
        return jnp.broadcast_to(x_rg, (*sample_rc.shape, *x_rg.shape[2:]))
    at = jnp.maximum(sample_rc, 0).reshape(*sample_rc.shape, *(1,) * (x_rg.ndim - 2))
    return jnp.take_along_axis(x_rg, at, axis=1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["event", "sample", "index", "count"],
    meta_fields=["recent"],
)
@dataclasses.dataclass(frozen=True)
class Groups:
    """Which events make a row's M group slots; a sample's older groups stand before its newer.

    event: int32 [R, M, K], the history slot of each place of a group, older before newer;
      -1 = none. The last place of a group that exists is never empty.
    sample: int32 [R, M], the sample that the group belongs to; -1 = no group.
    index: int32 [R, M], the group's place in its sample, 0 = the newest.
    count: int32 [R, G], groups of each sample.
    recent: how many slots at the end of the row hold the newest groups of the row's samples. Older
      groups may stand among them where a sample has too few; `index` tells.
    """

    event: jax.Array
    sample: jax.Array
    index: jax.Array
    count: jax.Array
    recent: int

    def gather(self, x_rs: jax.Array, fill: float = 0) -> jax.Array:
        """What stands at each place's event: [R, S, ...] -> [R, M, K, ...], `fill` where none."""
        R, M, K = self.event.shape
        trailing = (1,) * (x_rs.ndim - 2)
        at = jnp.maximum(self.event, 0).reshape(R, M * K, *trailing)
        found = jnp.take_along_axis(x_rs, at, axis=1).reshape(R, M, K, *x_rs.shape[2:])
        return jnp.where((self.event >= 0).reshape(R, M, K, *trailing), found, fill)

    def inner_mask(self) -> tuple[Tokens, Tokens, MaskRule]:
        """(queries, keys, rule) of the places of all groups, [R, M K]; a group is a segment."""
        R, M, K = self.event.shape
        flat = lambda x: jnp.broadcast_to(x, (R, M, K)).reshape(R, M * K)
        zero = flat(jnp.zeros((), jnp.int32))
        places = Tokens(
            segment=flat(jnp.arange(M)[:, None]),
            role=flat(jnp.where(self.event >= 0, batch.HISTORY, batch.PAD)),
            position=flat(jnp.arange(K)),
            **{name: zero for name in ("time", "group", "bias_time")},
        )
        return places, places, MaskRule(history="full")


def inner_trans(block: Block, x_rmkd: jax.Array, groups: Groups, *, train: bool) -> jax.Array:
    """A Transformer block over the events of each group; zeros where a group has none.

    x: [R, M, K, D]; returns the same. The block's own residual is that of the whole group: where
    it adds nothing, a group stays what it was.
    """
    R, M, K, D = x_rmkd.shape
    # A mask of diagonal blocks: one row per group reads the same pairs and no others.
    places, _, rule = groups.inner_mask()
    places = jax.tree.map(lambda x: x.reshape(R * M, K), places)
    y_nkd = block(x_rmkd.reshape(R * M, K, D), places, places, rule, train=train)
    return jnp.where((groups.event >= 0)[..., None], y_nkd.reshape(R, M, K, D), 0)


def newer(history_sample: jax.Array, samples: int) -> jax.Array:
    """How many valid events of its sample stand after an event, int32 [R, S]; 0 for padding."""
    member_rsg = history_sample[:, :, None] == jnp.arange(samples)
    seen_rsg = jnp.cumsum(member_rsg, axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(member_rsg, seen_rsg[:, -1:] - seen_rsg, 0), axis=2)


def groups(history_sample: jax.Array, samples: int, merge: int, recent: int) -> Groups:
    """The groups of K = `merge` events, the `recent` newest of each sample at the row's end.

    history_sample: int32 [R, S], -1 = padding; events of a sample run old -> new over the slots.
    M = min((S + G (K - 1)) // K, S) slots hold whatever groups S events of G samples make; that is
    ceil(S / K) for one sample a row.
    """
    R, S = history_sample.shape
    G, K = samples, merge
    M = min((S + G * (K - 1)) // K, S)
    member_rsg = history_sample[:, :, None] == jnp.arange(G)
    count_rg = -(-jnp.sum(member_rsg, axis=1, dtype=jnp.int32) // K)
    newest_rg = jnp.minimum(count_rg, recent)
    # One past each sample's newest group, among the older ones from the left and among the newest
    # ones, which end with the row.
    old_end_rg = jnp.cumsum(count_rg - newest_rg, axis=1, dtype=jnp.int32)
    end_rg = jnp.cumsum(newest_rg, axis=1, dtype=jnp.int32)
    end_rg += M - end_rg[:, -1:]
    own = lambda x_rg: jnp.sum(jnp.where(member_rsg, x_rg[:, None], 0), axis=2)
    newer_rs = newer(history_sample, G)
    index_rs = newer_rs // K
    old_rs = own(old_end_rg) - 1 - (index_rs - recent)
    slot_rs = jnp.where(index_rs < recent, own(end_rg) - 1 - index_rs, old_rs)
    place_rs = slot_rs * K + K - 1 - newer_rs % K
    place_rs = jnp.where(member_rsg.any(axis=2), place_rs, M * K)  # padding falls off the end
    slots = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (R, S))
    event = jnp.full((R, M * K), -1, jnp.int32)
    event = event.at[jnp.arange(R)[:, None], place_rs].set(slots, mode="drop").reshape(R, M, K)
    last_rm = event[:, :, -1]
    at = lambda x_rs: jnp.take_along_axis(x_rs, jnp.maximum(last_rm, 0), axis=1)
    return Groups(
        event=event,
        sample=jnp.where(last_rm >= 0, at(history_sample), -1),
        index=jnp.where(last_rm >= 0, at(index_rs), 0),
        count=count_rg,
        recent=min(G * recent, M),
    )


def tokens(features: Features, groups: Groups, in_front: int, per_candidate: int) -> Tokens:
    """The Tokens of [groups | globals | candidates], each field int32 [R, N].

    Args:
      in_front: globals of each sample, sample by sample (G * in_front in a row).
      per_candidate: tokens of each candidate, side by side; they share its slot as their group.
    A group has the time of its newest event. Positions count the sample's groups from its oldest,
    then its globals, then a candidate's tokens.
    """
    (R, C), G = features.candidate_sample.shape, groups.count.shape[1]
    user = jnp.repeat(jnp.arange(G), in_front)
    of_candidate = lambda x_rc: jnp.repeat(x_rc, per_candidate, axis=-1)
    candidate, slot = of_candidate(features.candidate_sample), of_candidate(jnp.arange(C))
    newest = lambda x_rs: groups.gather(x_rs)[:, :, -1]

    def count(sample: jax.Array) -> jax.Array:
        at = jnp.broadcast_to(jnp.maximum(sample, 0), (R, sample.shape[-1]))
        return jnp.take_along_axis(groups.count, at, axis=1)

    def stream(of_group: jax.Array, of_user: jax.Array, of_candidate: jax.Array) -> jax.Array:
        parts = (of_group, groups.sample.shape[1]), (of_user, len(user)), (of_candidate, len(slot))
        parts = [jnp.broadcast_to(x, (R, n)) for x, n in parts]
        return jnp.concatenate(parts, axis=1).astype(jnp.int32)

    def times(of_history: jax.Array, of_candidates: jax.Array) -> jax.Array:
        return stream(newest(of_history), zero, of_candidate(of_candidates))

    zero = jnp.zeros((), jnp.int32)
    return Tokens(
        segment=stream(groups.sample, user, candidate),
        role=stream(
            jnp.where(groups.sample >= 0, batch.HISTORY, batch.PAD),
            zero + batch.GLOBAL,
            jnp.where(candidate >= 0, batch.CANDIDATE, batch.PAD),
        ),
        time=times(*sequence.rule_times(features)),
        position=stream(
            count(groups.sample) - 1 - groups.index,
            count(user) + jnp.tile(jnp.arange(in_front), G),
            count(candidate) + in_front + jnp.tile(jnp.arange(per_candidate), C),
        ),
        group=stream(zero - 1, zero - 1, slot),
        bias_time=times(features.history_time, features.candidate_time),
    )
