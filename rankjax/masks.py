"""Who may read whom: data-free rules over (segment, role, time, position, group).

A rule is evaluated on whatever queries and keys it is given, a whole sequence or one block of it,
so the reference, the XLA path and every kernel share one definition.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from rankjax import batch
from rankjax.batch import Tokens

ROLES = 4  # CONTEXT, HISTORY, CANDIDATE, GLOBAL: 1 to 4
_CHOICES = (
    ("context", ("causal", "full", "history")),
    ("history", ("causal", "time", "full")),
    ("candidates", ("group", "causal")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRule:
    """Which token reads which. The defaults are HSTU's rule with a causal context prefix.

    For every rule: only tokens of one segment read each other; padding neither reads nor is read;
    history, globals and candidates read all of the context; a candidate reads the history with a
    time strictly before its own, all globals, and the candidate tokens of its own group, no
    others; a global reads all of the history and the globals up to its own position; nothing but
    a candidate reads a candidate, and nothing but globals and candidates reads a global.

    context: how context tokens read each other, by position ("causal": itself and those before)
      or "full". They read no history: with several candidate times in a sample they would carry
      later events to an early candidate. "history" is "full" and reads all of the history too.
    history: which history a history token reads: "causal" up to its own position, "time" up to its
      own time (events of one time read each other), "full" all of it.
    candidates: which tokens of its own group a candidate token reads: all ("group") or those up to
      its own position ("causal").
    window: the largest distance (query position - key position) at which history is read; None =
      any. Context and the candidate's own group are read at any distance.
    context="history", history="full" and globals are only for samples whose candidates share one
    time: through such tokens an early candidate would read later events.

    Raises ValueError for an unknown value or a negative window.
    Sources: HSTU (arXiv 2402.17152, M-FALCON's mask) by default; its code with contextual tokens
    is context="history"; MTGR's dynamic mask (arXiv 2505.18654) is context="full",
    history="time", with U and S tokens as context; GRAB (arXiv 2602.01865) has no context, partial
    tokens as history and full tokens as candidates; LONGER (arXiv 2505.04421) has globals;
    OneTrans (arXiv 2510.26104) is candidates="causal", its non-sequential tokens as a group.
    """

    context: Literal["causal", "full", "history"] = "causal"
    history: Literal["causal", "time", "full"] = "causal"
    candidates: Literal["group", "causal"] = "group"
    window: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES:
            if getattr(self, name) not in allowed:
                found = getattr(self, name)
                raise ValueError(f"MaskRule: {name}={found!r}, expected one of {allowed}")
        if self.window is not None and self.window < 0:
            raise ValueError(f"MaskRule: window={self.window}, expected >= 0 or None")

    def allow(self, q: Tokens, k: Tokens) -> jax.Array:
        """bool [R, N, M]: may query token n read key token m? q is [R, N], k is [R, M]."""
        q = jax.tree.map(lambda x_rn: x_rn[:, :, None], q)
        k = jax.tree.map(lambda x_rm: x_rm[:, None, :], k)
        return self.between(q, k)

    def between(self, q: Tokens, k: Tokens) -> jax.Array:
        """The same of queries and keys whose fields broadcast against each other, pair by pair."""
        q_context, q_history = q.role == batch.CONTEXT, q.role == batch.HISTORY
        q_global, q_candidate = q.role == batch.GLOBAL, q.role == batch.CANDIDATE
        before = k.position <= q.position
        reads_history = q_global | (q_candidate & (k.time < q.time))
        if self.history == "causal":
            reads_history |= q_history & before
        elif self.history == "time":
            reads_history |= q_history & (k.time <= q.time)
        else:
            reads_history |= q_history
        reads_context = q_history | q_global | q_candidate
        reads_context |= (q_context & before) if self.context == "causal" else q_context
        if self.context == "history":
            reads_history |= q_context
        if self.window is not None:
            reads_history &= q.position - k.position <= self.window
        reads_global = q_candidate | (q_global & before)
        reads_candidate = q_candidate & (k.group == q.group)
        if self.candidates == "causal":
            reads_candidate &= before
        return (q.segment == k.segment) & (
            ((k.role == batch.CONTEXT) & reads_context)
            | ((k.role == batch.HISTORY) & reads_history)
            | ((k.role == batch.GLOBAL) & reads_global)
            | ((k.role == batch.CANDIDATE) & reads_candidate)
        )

    def possible(self, q: "Ranges", k: "Ranges") -> jax.Array:
        """bool [R, n, m]: may any token of query block n read any of key block m?

        False only where no pair is allowed; True says no more than that the ranges leave room. q
        is of n blocks and k of m. Attention skips the blocks where it is False.
        """
        return self._blocks(q, k, every=False)

    def certain(self, q: "Ranges", k: "Ranges") -> jax.Array:
        """bool [R, n, m]: may every token of query block n read every one of key block m?

        True only where all pairs are allowed; False where one is not, where a block is of several
        roles or segments, or where it holds padding. Attention need not mask where it is True.
        """
        return self._blocks(q, k, every=True)

    def _blocks(self, q: "Ranges", k: "Ranges", every: bool) -> jax.Array:
        """`between`, for any pair of two blocks or for every one of them."""
        q = jax.tree.map(lambda x_rn: x_rn[:, :, None], q)
        k = jax.tree.map(lambda x_rm: x_rm[:, None, :], k)

        def same(a: Ranges, b: Ranges, field: str) -> jax.Array:
            """Do the ranges of the field meet, or are they one and the same value?"""
            least, most = ([getattr(x, field) for x in (y.least, y.most)] for y in (a, b))
            first, last = (least[0], most[0]), (least[1], most[1])
            if every:
                return (first[0] == last[1]) & (first[1] == last[0])
            return (first[0] <= last[1]) & (first[1] <= last[0])

        def pair(reader: int, read: int) -> jax.Array:
            """Is there a token of either role (are all of them), and may they be of one sample?"""
            a, b = q.of(reader), k.of(read)
            return same(a, b, "segment") & (a.alone & b.alone if every else True)

        def before(reader: int, read: int, field: str, strict: bool = False) -> jax.Array:
            a, b = q.of(reader), k.of(read)
            first = getattr(b.most if every else b.least, field)
            last = getattr(a.least if every else a.most, field)
            return (first < last) if strict else (first <= last)

        def near(reader: int) -> jax.Array | bool:
            if self.window is None:
                return True
            a, b = q.of(reader), k.of(batch.HISTORY)
            # Where a role is missing this overflows, and `pair` is False.
            newest, oldest = (a.most, b.least) if every else (a.least, b.most)
            return newest.position - oldest.position <= self.window

        H, C, G, X = batch.HISTORY, batch.CANDIDATE, batch.GLOBAL, batch.CONTEXT
        found = pair(C, X) | pair(H, X) | pair(G, X) | pair(C, G)
        found |= pair(X, X) & (before(X, X, "position") if self.context == "causal" else True)
        found |= pair(G, G) & before(G, G, "position")
        events = {C: before(C, H, "time", strict=True), G: True, H: True}
        if self.history != "full":
            events[H] = before(H, H, "position" if self.history == "causal" else "time")
        if self.context == "history":
            events[X] = True
        for reader, there in events.items():
            found |= pair(reader, H) & there & near(reader)
        own = pair(C, C) & same(q.of(C), k.of(C), "group")
        if self.candidates == "causal":
            own &= before(C, C, "position")
        return found | own


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["least", "most", "alone"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranges:
    """The least and the most that every field has among the tokens of one role in one block.

    Each field [R, blocks, ROLES], of the roles from 1 on; where a block has no token of a role,
    the least is the largest int32 and the most the smallest. alone: bool, are all tokens of the
    block of this role?
    """

    least: Tokens
    most: Tokens
    alone: jax.Array

    def of(self, role: int) -> "Ranges":
        """The ranges of one role, without the axis of roles."""
        return jax.tree.map(lambda x: x[..., role - 1], self)


def ranges(tokens: Tokens, block: int) -> Ranges:
    """The ranges of blocks of `block` tokens; their number [R, N] must be a multiple of it."""
    R, N = tokens.segment.shape
    blocks = jax.tree.map(lambda x_rn: x_rn.reshape(R, N // block, block, 1), tokens)
    of_role = blocks.role == jnp.arange(1, ROLES + 1)
    info = jnp.iinfo(jnp.int32)
    least = jax.tree.map(lambda x: jnp.where(of_role, x, info.max).min(axis=2), blocks)
    most = jax.tree.map(lambda x: jnp.where(of_role, x, info.min).max(axis=2), blocks)
    return Ranges(least=least, most=most, alone=of_role.all(axis=2))
