"""HSTU in its ranking form: SiLU attention over one stream of events and candidates.

Source: "Actions Speak Louder than Words" (Zhai et al. 2024, arXiv 2402.17152), §3, and its
research code; merged tokens and the context prefix as in Meta's DLRM-v3.

Features -> [context | history | candidates] -> L layers -> candidate rows -> logits
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax import batch
from rankjax.batch import Features, Tokens
from rankjax.kernels import hstu_attention
from rankjax.layers import checks, initializers, norms, sequence, task_heads
from rankjax.masks import MaskRule

RULE = MaskRule(context="causal", history="causal")
INITS = ("research", *initializers.NAMES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of HSTU; the first value named is the default.

    tokens: "merged", an event is one token, content + action (DLRM-v3); "interleaved", it is two,
      [Phi_0, a_0, Phi_1, a_1, ...] (the paper). Candidates are content only, in both.
    context: "prefix", one token per user feature before the history, causal; "none", without.
    attn_norm: what the attention sum is divided by. "static_max", the number of tokens that a
      sample can have: context + events + 1; "const", `norm_constant`; "valid_len", the tokens that
      the sample has, which depends on later events and so takes no windows.
    positions: P of the table of relative positions [2P - 1]; None = the static maximum. Distances
      beyond the table share its last row.
    position_bias, time_bias: the two parts of rab. Time differences are off by themselves where
      the log's times are not exact. The query's time is a token's own; the next token's, as in the
      research code, would show an earlier candidate the time of a later event.
    position_init: "normal", N(0, 0.02); "recency", 2 exp(-events between / 3).
    proj_activation: which of u, v, q, k pass a SiLU: "uvqk" (the paper) or "u" (DLRM-v3).
    norm, norm_place, norm_affine: of the norm before a layer ("pre"; "post" puts it after the
      residual sum instead) and of that over the attention output.
    token_norm: of the tokens that enter the first layer. "layer", an affine LayerNorm (DLRM-v3's
      content and action networks end in one); "sqrt_width", times sqrt(d) (the research code);
      "none". Embeddings start small (std .05), and what enters the residual stream unscaled is
      soon drowned by the layers' output.
    output_norm: of the candidates' rows before the head, affine (DLRM-v3's "layer").
    init: of W1 and W2. "xavier" (DLRM-v3); "research", W1 ~ N(0, 0.02) and xavier W2, which at
      small widths leaves the attention output below the norm's epsilon at the start; or another
      of `initializers.NAMES`.
    implementation: of the attention; None = the best for the platform compiled for.
    """

    history: int  # S: events before the sample's first candidate
    realtime: int = 0  # most events between the first and the last candidate of a window
    layers: int = 2  # L
    width: int = 64  # d
    heads: int = 2  # h
    qk_width: int | None = None  # dqk, per head; None = width / heads
    v_width: int | None = None  # dv, per head; None = width / heads
    tokens: str = "merged"
    context: str = "prefix"
    attn_norm: str = "static_max"
    norm_constant: float = 1.0
    positions: int | None = None  # P
    position_bias: bool = True
    time_bias: bool = True
    position_init: str = "normal"
    qk_scale: float | None = None  # None = 1, as in the paper
    proj_activation: str = "uvqk"
    norm: str = "layer"
    norm_place: str = "pre"
    norm_affine: bool = False
    token_norm: str = "layer"
    output_norm: str = "layer"
    init: str = "xavier"
    dropout: float = 0.0
    prune_last: bool = True  # the last layer computes only the candidates' rows; exact
    head_hidden: int | None = None  # None = width
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32
    implementation: str | None = None

    axes: ClassVar[dict[str, str]] = {"S": "history", "L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = (
        "the L layers with their bias tables, of one sequence without context and candidates"
    )

    def __post_init__(self) -> None:
        where = "hstu.Config"
        checks.at_least(where, 1, history=self.history, layers=self.layers, width=self.width)
        checks.at_least(where, 1, heads=self.heads, tasks=self.tasks)
        checks.at_least(where, 0, realtime=self.realtime)
        for name in ("qk_width", "v_width", "positions", "head_hidden"):
            if getattr(self, name) is not None:
                checks.at_least(where, 1, **{name: getattr(self, name)})
        for name, allowed in _CHOICES.items():
            checks.one_of(where, name, getattr(self, name), allowed)
        norms.check(where, self.norm, self.norm_place)
        checks.dtype(where, self.dtype)
        if (self.qk_width is None or self.v_width is None) and self.width % self.heads:
            raise ValueError(
                f"{where}: width={self.width} is no multiple of heads={self.heads}; choose one, "
                "or give qk_width and v_width"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{where}: dropout={self.dropout}, expected 0 <= dropout < 1")
        if not self.norm_constant > 0:
            raise ValueError(f"{where}: norm_constant={self.norm_constant}, expected > 0")

    @property
    def head_widths(self) -> tuple[int, int]:
        """(dqk, dv)."""
        default = self.width // self.heads
        return self.qk_width or default, self.v_width or default

    @property
    def per_event(self) -> int:
        """Tokens that an event takes."""
        return 2 if self.tokens == "interleaved" else 1

    def static_max(self, context: int = 0) -> int:
        """Tokens that a candidate may read at most, itself included."""
        return context + self.per_event * (self.history + self.realtime) + 1

    def paper_params(self) -> int:
        """Parameters of `paper_scope`: 5 d^2 + d + 2P - 1 + 129 per layer at h dqk = h dv = d."""
        Q, V = self.head_widths
        d, h, P = self.width, self.heads, self.positions or self.static_max()
        layer = d * h * (2 * V + 2 * Q) + h * V * d + d
        layer += (2 * P - 1) * self.position_bias + hstu_attention.TIME_BUCKETS * self.time_bias
        if self.norm_affine:
            layer += norms.parameters(self.norm, d) + norms.parameters(self.norm, h * V)
        return self.layers * layer

    def paper_flops(self) -> float:
        """Forward FLOPs of `paper_scope`: L (10 n d^2 + 4 n^2 d), all rows, unskipped scores.

        n is `static_max`: the events' tokens and one candidate.
        """
        Q, V = self.head_widths
        n, d, h = self.static_max(), self.width, self.heads
        linear = 2 * n * d * h * (2 * V + 2 * Q) + 2 * n * h * V * d
        return float(self.layers * (linear + 2 * n**2 * h * (Q + V)))


_CHOICES = {
    "tokens": ("merged", "interleaved"),
    "context": ("prefix", "none"),
    "attn_norm": ("static_max", "valid_len", "const"),
    "position_init": ("normal", "recency"),
    "proj_activation": ("uvqk", "u"),
    "token_norm": (*norms.KINDS, "sqrt_width"),
    "output_norm": norms.KINDS,
    "init": INITS,
    "implementation": (None, *hstu_attention.IMPLEMENTATIONS),
}

# Sizes of the paper's public experiments; P = 211 as in the research code.
_PAPER = dict(
    tokens="merged",
    context="none",
    init="research",
    token_norm="sqrt_width",
    dropout=0.2,
    positions=211,
)
HSTU_ML1M = Config(history=200, layers=2, width=50, heads=1, **_PAPER)
HSTU_ML1M_LARGE = dataclasses.replace(HSTU_ML1M, layers=8, heads=2)
HSTU_ML20M_LARGE = dataclasses.replace(HSTU_ML1M, layers=16, width=256, heads=8)


def recency(per_event: int) -> nn.initializers.Initializer:
    """2 exp(-distance / 3) over a table of relative positions, distance in events."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        distance = jnp.abs(jnp.arange(shape[0]) - shape[0] // 2) / per_event
        return (2 * jnp.exp(-distance / 3)).astype(dtype)

    return init


class Layer(nn.Module):
    """X_out = dropout(LN(A V) * U) W2 + b2 + X; U, V, Q, K = Split(SiLU(LN(X) W1)) (eqs. 1-3).

    Called with x [R, N, D] in `dtype`, its Tokens, the normalizer (a number or [R, N]) and the
    number of rows to compute, counted from the end; returns [R, rows, D].
    Parameters, float32: w1 [D, h (2 dv + 2 dqk)], w2 kernel [h dv, D] and bias [D],
    position_bias [2P - 1], time_bias [129], and the norms' where affine.
    """

    config: Config
    positions: int  # P
    time_bias: bool

    @nn.compact
    def __call__(
        self,
        x_rnd: jax.Array,
        tokens: Tokens,
        normalizer: float | jax.Array,
        rows: int,
        *,
        train: bool,
    ) -> jax.Array:
        c = self.config
        R, N, D = x_rnd.shape
        Q, V = c.head_widths
        # Rows that nobody reads after this layer need keys and values only.
        tail = slice(N - rows, N)
        h_rnd = x_rnd
        if c.norm_place == "pre":
            h_rnd = norms.Norm(c.norm, c.norm_affine, name="input_norm")(x_rnd)
        w1_init, w2_init = self._initializers()
        sizes = [c.heads * V, c.heads * V, c.heads * Q, c.heads * Q]
        w1 = self.param("w1", w1_init, (D, sum(sizes)), jnp.float32).astype(c.dtype)
        u_rnf, v_rmf, q_rnf, k_rmf = self._project(h_rnd, w1, sizes, tail)
        heads = lambda x_rnf: x_rnf.reshape(*x_rnf.shape[:2], c.heads, -1)
        if jnp.ndim(normalizer):
            normalizer = normalizer[:, tail]
        a_rnhv = hstu_attention.hstu_attention(
            *(heads(q_rnf), heads(k_rmf), heads(v_rmf)),
            *(sequence.last(tokens, rows), tokens, RULE),
            normalizer=normalizer,
            scale=1.0 if c.qk_scale is None else c.qk_scale,
            bias=self._bias(),
            implementation=c.implementation,
        )
        a_rnf = a_rnhv.reshape(R, rows, c.heads * V)
        y_rnf = norms.Norm(c.norm, c.norm_affine, name="attention_norm")(a_rnf) * u_rnf
        y_rnf = nn.Dropout(c.dropout, deterministic=not train)(y_rnf)
        w2 = nn.Dense(D, dtype=c.dtype, kernel_init=w2_init, name="w2")
        y_rnd = w2(y_rnf.reshape(R * rows, -1)).reshape(R, rows, D) + x_rnd[:, tail]
        if c.norm_place == "post":
            y_rnd = norms.Norm(c.norm, c.norm_affine, name="output_norm")(y_rnd)
        return y_rnd

    def _initializers(self) -> tuple[Any, Any]:
        c = self.config
        if c.init == "research":
            return nn.initializers.normal(0.02), initializers.kernel("xavier")
        return initializers.kernel(c.init), initializers.kernel(c.init, residual_layers=c.layers)

    def _project(
        self, h_rnd: jax.Array, w1: jax.Array, sizes: list[int], tail: slice
    ) -> tuple[jax.Array, ...]:
        """u and q of the rows in `tail`, v and k of all."""
        # Rows as one axis: a little faster on a CPU than a product with three axes.
        project = lambda x, w: (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:2], -1)
        cuts = [sum(sizes[:i]) for i in (1, 2, 3)]
        every = self.config.proj_activation == "uvqk"
        act = nn.silu if every else lambda x: x
        if tail.start:
            w_u, w_v, w_q, w_k = jnp.split(w1, cuts, axis=-1)
            h_tail = h_rnd[:, tail]
            u, q = project(h_tail, w_u), act(project(h_tail, w_q))
            return nn.silu(u), act(project(h_rnd, w_v)), q, act(project(h_rnd, w_k))
        u, v, q, k = jnp.split(act(project(h_rnd, w1)), cuts, axis=-1)
        return (u if every else nn.silu(u)), v, q, k

    def _bias(self) -> hstu_attention.RelativeBias | None:
        c, position, time = self.config, None, None
        normal = nn.initializers.normal(0.02)
        if c.position_bias:
            init = recency(c.per_event) if c.position_init == "recency" else normal
            position = self.param("position_bias", init, (2 * self.positions - 1,), jnp.float32)
        if self.time_bias:
            time = self.param("time_bias", normal, (hstu_attention.TIME_BUCKETS,), jnp.float32)
        if position is None and time is None:
            return None
        return hstu_attention.RelativeBias(position=position, time=time)


class HSTU(nn.Module):
    """Features -> (logits float32 [R, C, K], {}). Takes windows, unless attn_norm="valid_len".

    Raises ValueError for windows with "valid_len", for a schema without item features, and for
    interleaved tokens without event features.
    """

    config: Config
    windows: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        c, schema = self.config, features.schema
        if c.attn_norm == "valid_len":
            features.require_one_time("hstu with attn_norm='valid_len'")
        C = features.candidate_sample.shape[1]
        context = len(schema.user) if c.context == "prefix" else 0
        tokens = sequence.tokens(features, context=context, per_event=c.per_event)
        x_rnd = self._embed(features, context)
        normalizer = self._normalizer(tokens, context)
        for layer in range(c.layers):
            block = Layer(
                c,
                c.positions or c.static_max(context),
                c.time_bias and schema.time_exact,
                name=f"layer_{layer}",
            )
            rows = C if c.prune_last and layer == c.layers - 1 else x_rnd.shape[1]
            x_rnd = block(x_rnd, tokens, normalizer, rows, train=train)
        x_rcd = norms.Norm(c.output_norm, name="output_norm")(x_rnd[:, x_rnd.shape[1] - C :])
        head = task_heads.MLP(c.tasks, c.head_hidden or c.width, name="head")
        return head(x_rcd), {}

    def _normalizer(self, tokens: Tokens, context: int) -> float | jax.Array:
        c = self.config
        if c.attn_norm == "static_max":
            return float(c.static_max(context))
        if c.attn_norm == "const":
            return c.norm_constant
        read = (tokens.role == batch.CONTEXT) | (tokens.role == batch.HISTORY)
        same_rnm = tokens.segment[:, :, None] == tokens.segment[:, None, :]
        return 1.0 + jnp.sum(same_rnm & read[:, None, :], axis=-1)

    def _embed(self, features: Features, context: int) -> jax.Array:
        """The stream [context | history | candidates], [R, N, D].

        A candidate has its item's content, as an event has, and its own context features, but no
        event feature: what the user does with it is the label.
        """
        c, schema = self.config, features.schema
        names = {side: [f.name for f in schema.of(side)] for side in ("item", "event", "context")}
        if not names["item"]:
            raise ValueError("hstu: the schema has no item feature, of which a token is made")
        if c.tokens == "interleaved" and not names["event"]:
            raise ValueError("hstu: tokens='interleaved' needs event features, the schema has none")

        def dense(name: str, bias: bool = True) -> nn.Dense:
            init = initializers.kernel("lecun")
            return nn.Dense(c.width, use_bias=bias, dtype=c.dtype, kernel_init=init, name=name)

        content = dense("content")
        history_rsd = content(sequence.concat(features.history, names["item"], c.dtype))
        candidate_rcd = content(sequence.concat(features.candidate, names["item"], c.dtype))
        if names["event"]:
            event = sequence.concat(features.history, names["event"], c.dtype)
            event_rsd = dense("event", bias=c.tokens == "interleaved")(event)
            if c.tokens == "interleaved":
                history_rsd = sequence.interleave(history_rsd, event_rsd)
            else:
                history_rsd += event_rsd
        if names["context"]:
            own = sequence.concat(features.candidate, names["context"], c.dtype)
            candidate_rcd += dense("candidate_context", bias=False)(own)
        parts = [history_rsd, candidate_rcd]
        if context:
            users = [
                dense(f"context_{f.name}")(features.user[f.name].astype(c.dtype))
                for f in schema.user
            ]
            parts = [sequence.interleave(*users), *parts]
        x_rnd = jnp.concatenate(parts, axis=1)
        if c.token_norm == "sqrt_width":
            return x_rnd * c.width**0.5
        return norms.Norm(c.token_norm, name="token_norm")(x_rnd)
