"""MTGR: HSTU's layers over user features, history, real-time events and candidates with crosses.

Source: "MTGR: Industrial-Scale Generative Recommendation Framework in Meituan" (arXiv 2505.18654)
and the authors' engineering article of May 2025.

Features -> [U user features | S history | R real-time events | I candidates] -> L layers ->
candidate rows -> MMoE -> logits

Tokens. U: one per user feature; S and R: an event's item and event features side by side; I: a
candidate's item and context (cross) features side by side, without what the user did. Each passes
GELU(linear), as the article draws it. S are the sample's events before its first candidate, R those
from then on: in samples whose candidates share one time R is empty.

Parameters, exact: width d, biases of the projections b = 1 or 0, groups G = 4 (1 without Group-LN);
widths of the input w_u of each user feature, w_e of an event, w_c of a candidate:
  tokens  sum over u of (w_u d + d) + (w_e d + d) + (w_c d + d)
  layers  L (5 d^2 + 5 b d + 4 G d)
  head    2 d, then X (d F + F) + K (d X + F H + 2 H + 1): X experts of width F, towers of width H
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax import batch, papers
from rankjax.batch import Features, Tokens
from rankjax.kernels import hstu_attention
from rankjax.layers import (
    activations,
    checks,
    group_norm,
    initializers,
    mmoe,
    norms,
    sequence,
    stack,
)
from rankjax.masks import MaskRule

# The dynamic mask: U and S, whose role is context, are read by everything and read nothing else; R
# reads R up to its own time; a candidate reads R strictly before its time, and itself.
RULE = MaskRule(context="full", history="time")
USER, STATIC, REALTIME, ITEM = GROUPS = range(4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of MTGR; the first value named is the default.

    attn_norm: what the attention sum is divided by. "static_max", the number of tokens that a
      candidate can read: U + S + R + 1; "const", `norm_constant`; "valid_len", the tokens that the
      sample has, as the text prints it: it counts later events and the other candidates, so it
      takes no windows and a score depends on how many candidates stand beside it.
    residual_from: what a layer's output is added to: "x", its input (the text), or "normed", its
      input after the first norm (as the article draws it).
    norm_before_gate: the second norm is taken of the attention output alone, before the gate, as in
      HSTU; False: of their product (the text).
    group_norm: one affine pair for each of U, S, R, I; False: one for all tokens (the ablation).
    projection_bias: whether Q, K, V, U and the output have biases.
    output_norm: of the candidates' rows before the head, affine.
    implementation: of the attention; None = the best for the platform compiled for.
    """

    history: int = 50  # S: events before the sample's first candidate
    realtime: int = 0  # R: most events between the first and the last candidate of a window
    layers: int = 2  # L
    width: int = 64  # d
    heads: int = 2
    attn_norm: str = "static_max"
    norm_constant: float = 1.0
    residual_from: str = "x"
    norm_before_gate: bool = False
    group_norm: bool = True
    projection_bias: bool = True
    output_norm: str = "layer"
    init: str = "lecun"
    prune_last: bool = True  # the last layer computes only the candidates' rows; exact
    experts: int = 4  # of the MMoE head
    expert_hidden: int | None = None  # None = width
    tower_hidden: int | None = None  # None = width
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32
    implementation: str | None = None

    axes: ClassVar[dict[str, str]] = {"S": "history", "L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = "the L layers, of one sequence of n tokens"

    def __post_init__(self) -> None:
        where = "mtgr.Config"
        checks.at_least(where, 1, history=self.history, layers=self.layers, width=self.width)
        checks.at_least(where, 1, heads=self.heads, experts=self.experts, tasks=self.tasks)
        checks.at_least(where, 0, realtime=self.realtime)
        for name in ("expert_hidden", "tower_hidden"):
            if getattr(self, name) is not None:
                checks.at_least(where, 1, **{name: getattr(self, name)})
        checks.flags(where, self)
        for name, allowed in _CHOICES.items():
            checks.one_of(where, name, getattr(self, name), allowed)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)
        if self.width % self.heads:
            raise ValueError(
                f"{where}: width={self.width}, expected a multiple of heads={self.heads}"
            )
        if not self.norm_constant > 0:
            raise ValueError(f"{where}: norm_constant={self.norm_constant}, expected > 0")

    @property
    def groups(self) -> int:
        return len(GROUPS) if self.group_norm else 1

    def static_max(self, context: int = 0) -> int:
        """Tokens that a candidate may read at most, itself included; `context` user features."""
        return context + self.history + self.realtime + 1

    def paper_params(self) -> int:
        """Parameters of `paper_scope`: L (5 d^2 + 5 d + 4 G d), where biases 5 d.

        G = 4 groups with two affine pairs a layer each; 1 without Group-LN.
        """
        d = self.width
        return self.layers * (5 * d * d + 5 * d * self.projection_bias + 4 * self.groups * d)

    def paper_flops(self, n: int | None = None) -> float:
        """Forward FLOPs of `paper_scope`: L (10 n d^2 + 4 n^2 d), all rows, unskipped scores.

        n: tokens of the sequence; None = `static_max` without user features.
        """
        n, d = self.static_max() if n is None else n, self.width
        return float(self.layers * (10 * n * d**2 + 4 * n**2 * d))


_CHOICES = {
    "attn_norm": ("static_max", "valid_len", "const"),
    "residual_from": ("x", "normed"),
    "output_norm": norms.KINDS,
    "implementation": (None, *hstu_attention.IMPLEMENTATIONS),
}

# The paper prints L, d and heads, and that S has at most 1000 and R at most 100 events.
MTGR_SMALL = Config(history=1000, realtime=100, layers=3, width=512, heads=2)
MTGR_MEDIUM = dataclasses.replace(MTGR_SMALL, layers=5, width=768, heads=3)
MTGR_LARGE = dataclasses.replace(MTGR_MEDIUM, layers=15)
MTGR_22_LAYERS = dataclasses.replace(MTGR_SMALL, layers=22, width=1024, heads=4)

_HEAD = "experts and widths of the MMoE head"
PAPER = papers.Paper(
    title="MTGR: Industrial-Scale Generative Recommendation Framework in Meituan",
    arxiv="2505.18654",
    evidence=(
        "the paper's text in a copy; the MMoE head and the drawing of a layer from the authors' "
        "engineering article; there is no official code"
    ),
    sizes={
        "mtgr_small": papers.Size(config=MTGR_SMALL, chosen=_HEAD, n=500),
        "mtgr_medium": papers.Size(config=MTGR_MEDIUM, chosen=_HEAD, n=500),
        "mtgr_large": papers.Size(config=MTGR_LARGE, chosen=_HEAD, n=500),
        "mtgr_22_layers": papers.Size(
            config=MTGR_22_LAYERS, chosen=f"{_HEAD}; heads, 256 wide as in the other sizes", n=500
        ),
    },
    figures=(
        *(
            papers.Figure(
                what=f"forward FLOPs of a sample, {name}",
                printed=printed,
                ours=lambda config=config: config.paper_flops(500),
                where=where,
                tolerance=0.001,
                note="n = 500 tokens, derived: it gives all printed sizes at once",
            )
            for name, config, printed, where in (
                ("small", MTGR_SMALL, 5.47e9, "table of model sizes"),
                ("medium", MTGR_MEDIUM, 18.59e9, "table of model sizes"),
                ("large", MTGR_LARGE, 55.76e9, "table of model sizes"),
                ("22 layers, d = 1024", MTGR_22_LAYERS, 137.87e9, "22-layer model"),
            )
        ),
        papers.Figure(
            what="forward FLOPs of a sample, small, in the engineering article",
            printed=9.11e9,
            ours=lambda: MTGR_SMALL.paper_flops(500),
            where="article, table of model sizes",
            tolerance=None,
            note="the article prints 9.11 where the paper prints 5.47; the other sizes are equal",
        ),
    ),
    leaves_open=(
        ("n of the printed FLOPs", "500: reproduces every printed size"),
        ("the MLPs of Q, K, V, U and the output", "one linear layer each: the FLOPs fit no more"),
        ("biases of those", "yes; projection_bias=False leaves them out"),
        ("the MLPs of tokens", "one linear layer and GELU, shared by S and R, another for I"),
        ("N_U", "one token per user feature of the schema"),
        ("experts of the MMoE head", "4 of one ReLU layer, towers of one, as wide as the model"),
        ("a norm before the head", "an affine LayerNorm; output_norm='none' leaves it out"),
        ("ties of a real-time event and a candidate", "not read: only strictly earlier events"),
        ("position and time of events", "no bias; what the schema's event features say of it"),
        (
            "where a layer's skip line leaves: the text and the article's drawing differ",
            "its input, as in the text; residual_from='normed' is the drawing",
        ),
        ("initialisation", "truncated normal of variance 1 / fan-in"),
    ),
    deviations=(
        (
            "attention is divided by a constant, the most tokens that a candidate can read",
            "the number of tokens in the sample depends on later events and on other candidates; "
            "attn_norm='valid_len' is the text's",
        ),
        (
            "R of a sample is what happened from its first candidate on",
            "the window of training is a setting of the samples (organisation 'window')",
        ),
    ),
)


def groups(features: Features) -> jax.Array:
    """USER, STATIC, REALTIME or ITEM of every token, int32 [R, N].

    An event at or after its sample's first candidate (order >= 0) is REALTIME.
    """
    R, C = features.candidate_sample.shape
    users = sum(features.user[f.name].shape[1] for f in features.schema.user)
    of_history = jnp.where(features.history_order >= 0, REALTIME, STATIC)
    parts = [jnp.full((R, users), USER), of_history, jnp.full((R, C), ITEM)]
    return jnp.concatenate(parts, axis=1)


def masks_of(config: Config, features: Features) -> dict[str, tuple[Tokens, Tokens, MaskRule]]:
    """{title: (queries, keys, rule)}: which token reads which, in the order of the layers."""
    tokens = sequence.tokens(features, context=len(features.schema.user))
    static = (groups(features) == STATIC) & (tokens.role == batch.HISTORY)
    role = jnp.where(static, batch.CONTEXT, tokens.role)
    tokens = dataclasses.replace(tokens, role=role)
    N, C = tokens.segment.shape[1], features.candidate_sample.shape[1]
    rows = C if config.prune_last else N
    return sequence.layer_masks(tokens, tokens, RULE, layers=config.layers, rows=rows)


class Layer(nn.Module):
    """X_out = Linear(GroupLN(V' * U)) + X, V' = SiLU(Q K^T) / n masked, times V; X' = GroupLN(X).

    Q, K, V, U are linear in X'. Called with x [R, N, D] in `dtype`, the group of each token
    [R, N], a mask of `masks_of` and the normalizer (a number or [R, N]); returns [R, rows, D], the
    rows of the mask's queries, which are the last ones of x.
    Parameters, float32: query, key, value, gate, out: kernel [D, D] and bias [D]; input_norm and
    attention_norm: scale and bias [G, D].
    """

    config: Config

    @nn.compact
    def __call__(
        self,
        x_rnd: jax.Array,
        group_rn: jax.Array,
        mask: tuple[Tokens, Tokens, MaskRule],
        normalizer: float | jax.Array,
    ) -> jax.Array:
        c = self.config
        R, N, D = x_rnd.shape
        q_tokens, k_tokens, rule = mask
        rows = q_tokens.segment.shape[1]
        # Rows that nobody reads after this layer need keys and values only.
        tail = slice(N - rows, N)
        h_rnd = group_norm.GroupNorm(c.groups, name="input_norm")(x_rnd, group_rn)
        h_tail = h_rnd[:, tail]
        heads = lambda x_rnd: x_rnd.reshape(*x_rnd.shape[:2], c.heads, D // c.heads)
        if jnp.ndim(normalizer):
            normalizer = normalizer[:, tail]
        a_rnhv = hstu_attention.hstu_attention(
            heads(self._linear("query", h_tail)),
            heads(self._linear("key", h_rnd)),
            heads(self._linear("value", h_rnd)),
            *(q_tokens, k_tokens, rule),
            normalizer=normalizer,
            implementation=c.implementation,
        )
        a_rnd, u_rnd = a_rnhv.reshape(R, rows, D), self._linear("gate", h_tail)
        norm = group_norm.GroupNorm(c.groups, name="attention_norm")
        if c.norm_before_gate:
            y_rnd = norm(a_rnd, group_rn[:, tail]) * u_rnd
        else:
            y_rnd = norm(a_rnd * u_rnd, group_rn[:, tail])
        skip_rnd = h_tail if c.residual_from == "normed" else x_rnd[:, tail]
        return self._linear("out", y_rnd, residual_layers=c.layers) + skip_rnd

    def _linear(self, name: str, x_rnd: jax.Array, residual_layers: int = 0) -> jax.Array:
        c = self.config
        init = initializers.kernel(c.init, residual_layers=residual_layers)
        layer = nn.Dense(
            c.width, use_bias=c.projection_bias, dtype=c.dtype, kernel_init=init, name=name
        )
        # Rows as one axis: a little faster on a CPU than a product with three axes.
        return layer(x_rnd.reshape(-1, x_rnd.shape[-1])).reshape(*x_rnd.shape[:2], c.width)


class MTGR(nn.Module):
    """Features -> (logits float32 [R, C, K], {}). Takes windows, unless attn_norm="valid_len".

    Raises ValueError for windows with "valid_len", and for a schema without item features.
    """

    config: Config
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        c, context = self.config, len(features.schema.user)
        if c.attn_norm == "valid_len":
            features.require_one_time("mtgr with attn_norm='valid_len'", "it counts later events")
        C = features.candidate_sample.shape[1]
        group_rn = groups(features)
        masks = list(masks_of(c, features).values())
        normalizer = self._normalizer(masks[-1][1], context)
        x_rnd = self._embed(features)
        make = lambda name, _: Layer(c, name=name)
        call = lambda layer, i, x_rnd: layer(x_rnd, group_rn, masks[i], normalizer)
        of_layers = sequence.mask_of_layers(masks, c.layers)
        x_rnd = stack.run(self.compute, "layer", of_layers, make, call, x_rnd)
        x_rcd = norms.Norm(c.output_norm, name="output_norm")(x_rnd[:, x_rnd.shape[1] - C :])
        widths = (c.expert_hidden or c.width, c.tower_hidden or c.width)
        return mmoe.MMoE(c.tasks, c.experts, *widths, c.init, name="head")(x_rcd), {}

    def _normalizer(self, tokens: Tokens, context: int) -> float | jax.Array:
        c = self.config
        if c.attn_norm == "static_max":
            return float(c.static_max(context))
        if c.attn_norm == "const":
            return c.norm_constant
        # Padding belongs to no sample (segment -1), and so counts for none.
        same_rnm = tokens.segment[:, :, None] == tokens.segment[:, None, :]
        return jnp.sum(same_rnm, axis=-1).astype(jnp.float32)

    def _embed(self, features: Features) -> jax.Array:
        """The stream [U | S and R | I], [R, N, D]."""
        c, schema = self.config, features.schema
        names = {side: [f.name for f in schema.of(side)] for side in ("item", "event", "context")}
        if not names["item"]:
            raise ValueError("mtgr: the schema has no item feature, of which a token is made")

        def token(name: str, x_rsw: jax.Array) -> jax.Array:
            init = initializers.kernel(c.init)
            layer = nn.Dense(c.width, dtype=c.dtype, kernel_init=init, name=name)
            return activations.gelu(layer(x_rsw))

        event_rsw = sequence.concat(features.history, names["item"] + names["event"], c.dtype)
        own_rcw = sequence.concat(features.candidate, names["item"] + names["context"], c.dtype)
        parts = [token("event", event_rsw), token("candidate", own_rcw)]
        if schema.user:
            users = [token(f"user_{f.name}", features.user[f.name]) for f in schema.user]
            parts = [sequence.interleave(*users), *parts]
        return jnp.concatenate(parts, axis=1)
