"""LONGER: merge events, then recent tokens and globals read the history (arXiv 2505.04421).

Features -> events -> groups of K -> [merged history | user's globals | candidates]
  -> layer 1, queries [k newest | globals | candidates] -> layers 2 .. L on those rows
  -> [user's globals, candidate] -> MLP -> logits

An event is item and event features side by side and the time to the request, plus a learned
position (0 = the newest event), then an MLP to d = width / K. K events of d make one token of
w = width: their concatenation plus, with `inner`, what InnerTrans, a Transformer block over the
group's events, adds to it. Globals are projected to w: one token of the user's features, learned
CLS tokens, and one per candidate, of its item and context features.

The stream runs old -> new with globals behind it, and a token reads itself and those before it;
the paper's runs the other way, G before H and H newest first, with j >= i: the same graph. In the
paper's the user's globals read the candidate's; `global_order="paper"` gives each candidate its own
copies of them, behind its token. By default they stand before the candidates and read none, so
that the user's side is computed once per request.

Parameters, W_e (time included), W_u, W_c the widths of an event's, the user's and a candidate's
inputs, h `input_hidden`, m the user's globals, F `head_hidden`:
  layers          L (12 w^2 + 13 w)
  InnerTrans      12 d^2 + 13 d
  events          (W_e + 1) h + (h + 1) d + S W_e positions + 2 d token norm
  globals         (W_u + 1) w + cls w + (W_c + 1) w + 2 w token norm
  head            2 w output norm + tasks x (((m + 1) w + 1) F + F + 1); m + 2 with history_mean
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax import batch, papers
from rankjax.batch import Features, Tokens
from rankjax.kernels import softmax_attention
from rankjax.layers import (
    activations,
    checks,
    initializers,
    norms,
    sequence,
    stack,
    task_heads,
    token_merge,
    transformer_block,
)
from rankjax.layers.token_merge import Groups
from rankjax.masks import MaskRule

RULE = MaskRule(history="causal", candidates="causal")
YEAR = 365 * 86_400  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of LONGER; where values are listed, the first is the default.

    width: of the stack, K d; the events that are merged are width / merge wide.
    recent: how many of the newest merged tokens are queries of layer 1, and all that is left of the
      history in later layers.
    cls_tokens: learned user-side globals, beside the one made of the user's features.
    global_order: "cacheable", the user's globals read no candidate; "paper", they read the
      candidate's token and it does not read them, so that all are computed once per candidate.
    input_hidden: of the MLP that makes events d wide; None = width.
    history_mean: the head also reads the mean of the sample's history tokens after layer L.
    token_norm: of events and globals as they enter ("none": as in the paper, which names none).
      Embeddings start small, and what enters the residual stream unscaled is soon drowned.
    norm, norm_place: of a block; "pre" adds one norm before the head.
    dropout: of what a layer adds to the residual stream.
    prune_last: the last layer computes only the rows that the head reads; exact.
    implementation: of the attention; None = the best for the platform compiled for.
    """

    history: int = 50  # S
    layers: int = 2  # L
    width: int = 64  # w = K d
    heads: int = 2
    merge: int = 4  # K
    inner: bool = True
    inner_heads: int = 1
    recent: int = 100  # k; the paper's
    cls_tokens: int = 1
    global_order: str = "cacheable"
    input_hidden: int | None = None
    history_mean: bool = False
    token_norm: str = "layer"
    norm: str = "layer"
    norm_place: str = "pre"
    init: str = "lecun"
    dropout: float = 0.0
    prune_last: bool = True
    head_hidden: int | None = None  # None = width
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32
    implementation: str | None = None

    axes: ClassVar[dict[str, str]] = {"S": "history", "L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = (
        "the L layers and InnerTrans of one sequence, every merged token a query of every layer, "
        "without globals"
    )

    def __post_init__(self) -> None:
        where = "longer.Config"
        checks.at_least(where, 1, history=self.history, layers=self.layers, width=self.width)
        checks.at_least(where, 1, heads=self.heads, inner_heads=self.inner_heads)
        checks.at_least(where, 1, merge=self.merge, recent=self.recent, tasks=self.tasks)
        checks.at_least(where, 0, cls_tokens=self.cls_tokens)
        for name in ("input_hidden", "head_hidden"):
            if getattr(self, name) is not None:
                checks.at_least(where, 1, **{name: getattr(self, name)})
        checks.flags(where, self)
        checks.one_of(where, "global_order", self.global_order, ("cacheable", "paper"))
        checks.one_of(where, "token_norm", self.token_norm, norms.KINDS)
        implementations = (None, *softmax_attention.IMPLEMENTATIONS)
        checks.one_of(where, "implementation", self.implementation, implementations)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)
        for name in ("merge", "heads"):
            if self.width % getattr(self, name):
                raise ValueError(
                    f"{where}: width={self.width}, expected a multiple of "
                    f"{name}={getattr(self, name)}"
                )
        if self.event_width % self.inner_heads:
            raise ValueError(
                f"{where}: inner_heads={self.inner_heads}, expected a divisor of width / merge = "
                f"{self.event_width}"
            )
        if self.history < self.merge:
            raise ValueError(f"{where}: history={self.history}, expected at least {self.merge=}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{where}: dropout={self.dropout}, expected 0 <= dropout < 1")

    @property
    def event_width(self) -> int:
        """d: the width of an event before K of them are merged."""
        return self.width // self.merge

    def history_pieces(self) -> tuple[int, tuple[int, ...]]:
        """(K, the length where min(k, S / K) bends), for counting FLOPs: they know ceil(S / K)."""
        return self.merge, (self.merge * self.recent,)

    def paper_params(self) -> int:
        """L (12 w^2 + 13 w), and 12 d^2 + 13 d of InnerTrans: exact for the blocks."""
        inner = transformer_block.parameters(self.event_width, self.norm) if self.inner else 0
        return self.layers * transformer_block.parameters(self.width, self.norm) + inner

    def paper_flops(self, n: int | None = None) -> float:
        """Forward FLOPs of `paper_scope` for n events (None: `history`), N = ceil(n / K) tokens.

        L (24 N w^2 + 4 N^2 w), which is L (24 n K d^2 + 4 n^2 d / K) where K divides n, and
        24 n d^2 + 4 K n d of InnerTrans over the N K places of the groups.
        """
        K, N = self.merge, math.ceil((self.history if n is None else n) / self.merge)
        inner = N * transformer_block.flops(self.event_width, K, K) if self.inner else 0
        return float(self.layers * transformer_block.flops(self.width, N, N) + inner)


LONGER_2000 = Config(history=2000, layers=3, width=256, heads=4, merge=8, recent=100)
LONGER_3M = dataclasses.replace(LONGER_2000, layers=4)


def _plain(n: int, merge: int, layers: int = 1, inner: bool = False) -> float:
    """Forward FLOPs of layers at d = 32 without globals and with all tokens as queries."""
    config = Config(history=n, layers=layers, width=32 * merge, merge=merge, inner=inner, heads=1)
    return config.paper_flops()


def _training(c: Config, m: int = 3) -> float:
    """3 x the forward FLOPs with k + m queries in every layer, m globals."""
    q, s, w = c.recent + m, c.history // c.merge + m, c.width
    first = 20 * q * w**2 + 4 * s * w**2 + 4 * q * s * w
    inner = c.paper_flops() - dataclasses.replace(c, inner=False).paper_flops()
    return 3 * (first + (c.layers - 1) * transformer_block.flops(w, q, q) + inner)


PAPER = papers.Paper(
    title="LONGER: Scaling Up Long Sequence Modeling in Industrial Recommenders",
    arxiv="2505.04421",
    evidence="equations from two independent notes that agree, figures read off; no official code",
    sizes={
        "longer_2000": papers.Size(
            config=LONGER_2000,
            chosen=(
                "layers (3: three times their forward pass meets the printed 1.91 GFLOPs), heads, "
                "number of globals, widths of MLPs"
            ),
        ),
        "longer_3m": papers.Size(
            config=LONGER_3M, chosen="layers (4: meets the point of 3.23M parameters); as above"
        ),
    },
    figures=(
        *(
            papers.Figure(
                what=f"forward FLOPs of a layer over 2048 events of d = 32, {merged}",
                printed=printed,
                ours=lambda merge=merge: _plain(2048, merge),
                where="token merge, complexity",
                tolerance=2e-4,
            )
            for merged, printed, merge in (("not merged", 587.2e6, 1), ("K = 4", 335.5e6, 4))
        ),
        *(
            papers.Figure(
                what=f"GFLOPs at 2000 events of d = 32, K = {merge} over those without merging",
                printed=printed / 3.73,
                ours=lambda merge=merge: _plain(2000, merge) / _plain(2000, 1),
                where="table of ablations",
                tolerance=0.015,
            )
            for merge, printed in ((4, 2.13), (8, 3.03))
        ),
        papers.Figure(
            what="training FLOPs at 2000 events of d = 32, K = 8, InnerTrans, 100 queries",
            printed=1.91e9,
            ours=lambda: _training(LONGER_2000),
            where="table of ablations",
            tolerance=0.1,
            note="3 layers and 3 globals",
        ),
        papers.Figure(
            what="parameters of a point of the scaling figure",
            printed=3.23e6,
            ours=LONGER_3M.paper_params,
            where="AUC against parameters, read off",
            tolerance=0.1,
            note="4 layers",
        ),
    ),
    leaves_open=(
        ("norms", "pre-LN, and one before the head; norm_place='post' is the other way"),
        ("scale of what enters", "a LayerNorm of events and globals; token_norm"),
        ("the input MLP", "positions are added before it; one hidden GELU layer as wide as w"),
        ("the time difference", "log(1 + seconds) / log(1 + a year); off for inexact times"),
        ("direction of positions", "from the newest event; a longer history shifts none"),
        ("feed-forward", "4 x, GELU: the printed 24 L d^2 implies the 4"),
        ("L no multiple of K", "the oldest group is filled up with zeros; empty ones are unread"),
        ("InnerTrans", "one block, full attention in the group; its residual is that on the group"),
        ("which globals, in which order", "the user's features, CLS tokens; a candidate's own"),
        ("head", "one MLP per task on the final globals side by side; history_mean adds a mean"),
    ),
    deviations=(
        (
            "the user's globals stand before the candidates and do not read them",
            "they are then computed and cached once per request; global_order='paper' is drawn",
        ),
    ),
)


def masks_of(config: Config, features: Features) -> dict[str, tuple[Tokens, Tokens, MaskRule]]:
    """{"layer 1" .. "layer L": (queries, keys, rule)}; InnerTrans' is `Groups.inner_mask`.

    Over [groups | user's globals, sample by sample | candidates], each candidate followed by its
    own copies of the user's globals where global_order="paper".
    """
    return _masks(config, *_grouped(config, features))


def _grouped(c: Config, features: Features) -> tuple[Features, Groups]:
    features, G = token_merge.whole(features, c.merge), sequence.samples(features)
    return features, token_merge.groups(features.history_sample, G, c.merge, c.recent)


def _masks(
    c: Config, features: Features, groups: Groups
) -> dict[str, tuple[Tokens, Tokens, MaskRule]]:
    found = {}
    in_front, per_candidate = _globals(c, features)
    keys = token_merge.tokens(features, groups, in_front, per_candidate)
    tail = keys.role.shape[1] - groups.sample.shape[1]
    # Where a sample has few groups, older ones of another stand among the newest of the row.
    old_rn = jnp.pad(groups.index >= c.recent, ((0, 0), (0, tail)))
    kept = dataclasses.replace(keys, role=jnp.where(old_rn, batch.PAD, keys.role))
    for layer in range(1, c.layers + 1):
        pruned = c.prune_last and not c.history_mean and layer == c.layers
        queries = sequence.last(kept, tail if pruned else groups.recent + tail)
        found[f"layer {layer}"] = (queries, keys, RULE)
        keys = queries
    return found


def _globals(c: Config, features: Features) -> tuple[int, int]:
    """Globals of a sample, in front of the candidates, and tokens of a candidate."""
    user = c.cls_tokens + bool(features.schema.user)
    return (0, 1 + user) if c.global_order == "paper" else (user, 1)


class LONGER(nn.Module):
    """Features -> (logits float32 [R, C, K], {}).

    Raises ValueError for window samples, and for a schema without item features.
    """

    config: Config
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        features.require_one_time("longer", "its tokens read the whole history")
        if not features.schema.of("item"):
            raise ValueError("longer: the schema has no item feature, of which a token is made")
        c = self.config
        features, groups = _grouped(c, features)
        masks = list(_masks(c, features, groups).values())
        history_rmd = self._history(features, groups, train)
        x_rnd = jnp.concatenate([history_rmd, *self._global_tokens(features)], axis=1)
        last = c.layers - 1 if c.prune_last and not c.history_mean else 1
        of_layers = [0, *[1] * (c.layers - 2), last][: c.layers]  # which mask
        make = lambda name, _: self._block(c.heads, c.layers, name)
        call = lambda block, i, x_rnd: block(x_rnd, *masks[i], train=train)
        x_rnd = stack.run(self.compute, "layer", of_layers, make, call, x_rnd, begin=1)
        if c.norm_place == "pre":
            x_rnd = norms.Norm(c.norm, name="output_norm")(x_rnd)
        head = task_heads.MLP(c.tasks, c.head_hidden or c.width, c.init, name="head")
        return head(self._read(features, x_rnd, masks[-1][0])), {}

    def _block(self, heads: int, layers: int, name: str) -> transformer_block.Block:
        c = self.config
        options = (c.norm, c.norm_place, c.init, layers, c.dropout, c.dtype, c.implementation)
        return transformer_block.Block(heads, *options, name=name)

    def _dense(self, width: int, name: str) -> nn.Dense:
        init = initializers.kernel(self.config.init)
        return nn.Dense(width, dtype=self.config.dtype, kernel_init=init, name=name)

    def _normal(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        return self.param(name, nn.initializers.normal(0.02), shape, jnp.float32)

    def _history(self, features: Features, groups: Groups, train: bool) -> jax.Array:
        """Merged tokens [R, M, w]; places without an event are zeros."""
        c, schema = self.config, features.schema
        names = [f.name for f in (*schema.of("item"), *schema.of("event"))]
        x_rse = sequence.concat(features.history, names, c.dtype)
        if schema.time_exact:
            # Times are relative to the sample's first candidate, that is to the request.
            ago_rs1 = jnp.maximum(-features.history_time.astype(jnp.float32), 0)[..., None]
            ago_rs1 = jnp.log1p(ago_rs1) / math.log1p(YEAR)
            x_rse = jnp.concatenate([x_rse, ago_rs1.astype(c.dtype)], axis=-1)
        table_pe = self._normal("positions", (c.history, x_rse.shape[-1]))
        newer_rs = token_merge.newer(features.history_sample, groups.count.shape[1])
        x_rse += table_pe[jnp.minimum(newer_rs, c.history - 1)].astype(c.dtype)
        h_rsh = self._dense(c.input_hidden or c.width, "event_in")(x_rse)
        x_rsd = self._dense(c.event_width, "event_out")(activations.gelu(h_rsh))
        x_rmkd = groups.gather(norms.Norm(c.token_norm, name="event_norm")(x_rsd))
        if c.inner:
            block = self._block(c.inner_heads, 1, "inner_trans")
            x_rmkd = token_merge.inner_trans(block, x_rmkd, groups, train=train)
        return x_rmkd.reshape(*x_rmkd.shape[:2], c.width)

    def _global_tokens(self, features: Features) -> list[jax.Array]:
        """What follows the history in the stream: [R, G m, w] and [R, C P, w]."""
        c, schema = self.config, features.schema
        R, G = len(features.candidate_sample), sequence.samples(features)
        norm = norms.Norm(c.token_norm, name="global_norm")
        names = [f.name for f in (*schema.of("item"), *schema.of("context"))]
        own_rcw = self._dense(c.width, "candidate")(
            sequence.concat(features.candidate, names, c.dtype)
        )
        user = []
        if schema.user:
            x_rge = sequence.concat(features.user, [f.name for f in schema.user], c.dtype)
            user.append(self._dense(c.width, "user")(x_rge)[:, :, None])
        if c.cls_tokens:
            cls_nw = self._normal("cls", (c.cls_tokens, c.width)).astype(c.dtype)
            user.append(jnp.broadcast_to(cls_nw, (R, G, *cls_nw.shape)))
        if not user:
            return [norm(own_rcw)]
        user_rgmw = jnp.concatenate(user, axis=2)
        if c.global_order == "paper":
            parts = [own_rcw[:, :, None], token_merge.of_candidate(features, user_rgmw)]
            return [norm(jnp.concatenate(parts, axis=2).reshape(R, -1, c.width))]
        return [norm(user_rgmw.reshape(R, -1, c.width)), norm(own_rcw)]

    def _read(self, features: Features, x_rnw: jax.Array, tokens: Tokens) -> jax.Array:
        """The head's input [R, C, (m + 1) w], (m + 2) w with the mean of the history."""
        c, (R, C) = self.config, features.candidate_sample.shape
        G = sequence.samples(features)
        in_front, per_candidate = _globals(c, features)
        history = x_rnw.shape[1] - G * in_front - C * per_candidate
        history_rnw, user_rnw, own_rnw = jnp.split(x_rnw, [history, history + G * in_front], axis=1)
        read = [own_rnw.reshape(R, C, -1)]
        if in_front:
            read.append(token_merge.of_candidate(features, user_rnw.reshape(R, G, -1)))
        if c.history_mean:
            role, segment = tokens.role[:, :history], tokens.segment[:, :history]
            there_rgn = (segment[:, None] == jnp.arange(G)[:, None]) & (role != batch.PAD)[:, None]
            count_rg1 = jnp.maximum(there_rgn.sum(axis=2, keepdims=True), 1).astype(c.dtype)
            total_rgw = jnp.einsum("rgn,rnw->rgw", there_rgn.astype(c.dtype), history_rnw)
            read.append(token_merge.of_candidate(features, total_rgw / count_rg1))
        return jnp.concatenate(read, axis=-1)
