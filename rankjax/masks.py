"""Who may read whom: data-free rules over (segment, role, time, position, group).

A rule is evaluated on whatever queries and keys it is given, a whole sequence or one block of it,
so the reference, the XLA path and every kernel share one definition.
"""

import dataclasses
from typing import Literal

import jax

from rankjax import batch
from rankjax.batch import Tokens

_CHOICES = (("context", ("causal", "full")), ("history", ("causal", "time", "full")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRule:
    """Which token reads which. The defaults are HSTU's rule with a causal context prefix.

    For every rule: only tokens of one segment read each other; padding neither reads nor is read;
    history and candidates read all of the context; a candidate reads the history with a time
    strictly before its own, and the candidates of its own group (itself), no others; nothing but
    a candidate reads a candidate.

    context: how context tokens read each other, by position ("causal": itself and those before)
      or "full". They read no history: with several candidate times in a sample they would carry
      later events to an early candidate.
    history: which history a history token reads: "causal" up to its own position, "time" up to its
      own time (events of one time read each other), "full" all of it; "full" is only for samples
      whose candidates share one time, for the same reason.

    Raises ValueError for an unknown value.
    Source: HSTU (arXiv 2402.17152, M-FALCON's mask) by default; MTGR's dynamic mask
    (arXiv 2505.18654) is context="full", history="time", with U and S tokens as context.
    """

    context: Literal["causal", "full"] = "causal"
    history: Literal["causal", "time", "full"] = "causal"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES:
            if getattr(self, name) not in allowed:
                found = getattr(self, name)
                raise ValueError(f"MaskRule: {name}={found!r}, expected one of {allowed}")

    def allow(self, q: Tokens, k: Tokens) -> jax.Array:
        """bool [R, N, M]: may query token n read key token m? q is [R, N], k is [R, M]."""
        q = jax.tree.map(lambda x_rn: x_rn[:, :, None], q)
        k = jax.tree.map(lambda x_rm: x_rm[:, None, :], k)
        q_context, q_history = q.role == batch.CONTEXT, q.role == batch.HISTORY
        q_candidate = q.role == batch.CANDIDATE
        reads_history = q_candidate & (k.time < q.time)
        if self.history == "causal":
            reads_history |= q_history & (k.position <= q.position)
        elif self.history == "time":
            reads_history |= q_history & (k.time <= q.time)
        else:
            reads_history |= q_history
        reads_context = q_history | q_candidate
        if self.context == "causal":
            reads_context |= q_context & (k.position <= q.position)
        else:
            reads_context |= q_context
        reads_candidate = q_candidate & (k.group == q.group)
        return (q.segment == k.segment) & (
            ((k.role == batch.CONTEXT) & reads_context)
            | ((k.role == batch.HISTORY) & reads_history)
            | ((k.role == batch.CANDIDATE) & reads_candidate)
        )
