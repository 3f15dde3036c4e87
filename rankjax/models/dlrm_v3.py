"""DLRM-v3: the form of HSTU that Meta made public and MLPerf measures.

Source: Meta's code (generative-recommenders, DlrmHSTU) of "Actions Speak Louder than Words"
(arXiv 2402.17152); there is no paper of this form.

Features -> [context | history | candidates] + positions + times -> L STU layers -> candidate rows
-> post-processor -> times the item's embedding -> logits

Parameters, with I, A, X the widths of an item's, an event's and a candidate's own features, U_f
those of the user's, n(W, F) = F (W + d + 3) + 3 d a network of `swish_norm`, F, M, P, B as in
Config: content n(I, F); action n(A, F) + A; candidate_context n(X, F); context U_f d + d each;
positions P d; times (B + 1) d; L layers as in `paper_params`; post-processor 2 d ("time" also
(d + E_t) d + d, E_t the width of hour and weekday); item n(I, M); head M d + 3 M + M K + K.
What the schema lacks, or the Config switches off, has none.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax import papers
from rankjax.batch import Features, Tokens
from rankjax.kernels import hstu_attention
from rankjax.layers import (
    checks,
    initializers,
    norms,
    pointwise_attention,
    sequence,
    stack,
    stochastic_length,
    swish_norm,
    timed_positions,
)
from rankjax.masks import MaskRule

CLOCK = ("hour", "weekday")  # the derived features that say when a candidate was shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of DLRM-v3; the first value named is the default.

    context: "prefix", one token per user feature before the history; "none", without.
    context_mask: "causal", context tokens read those before them (DLRM-v3); "full", each other and
      all of the history, as the public attention can.
    context_min_history: user features count only in samples of so many events; MLPerf has 20.
    attn_window: how many tokens back history is read; None = all of it.
    attn_norm: what the attention sum is divided by: "static_max", the number of tokens that a
      sample can have, context + history + 1; "const", `norm_constant`; "valid_len", the tokens
      that the sample has.
    group_norm: the norm of the attention output takes each head on its own.
    positions: P, rows of the table of positions, which count backwards from the newest event;
      None = one for each that a sample can have. Older events share the last.
    time_buckets: B; a token's bucket is sqrt(minutes before the request), at most B, which context
      has. Off by itself where the log's times are not exact, and with time_embedding=False.
    postprocessor: of the candidates' rows: "layer", LayerNorm; "time", LayerNorm of a linear map
      of the row beside the schema's hour and weekday of the request; "l2", unit length.
    content_hidden: F of the networks that make tokens; None = width / 2, as MLPerf's 256 of 512.
    head_hidden: M of the item network and of the head; None = width, as MLPerf's 512 of 512.
    action_std: of the initial target action.
    input_dropout, dropout: of the tokens that enter the first layer, and of every layer's output
      before its last product.
    stochastic_length: alpha; see layers/stochastic_length.py; None = off.
    implementation: of the attention; None = the best for the platform compiled for.
    """

    history: int  # S
    layers: int = 2  # L
    width: int = 64  # d
    heads: int = 2  # h
    qk_width: int | None = None  # dqk, per head; None = width / heads
    v_width: int | None = None  # dv, per head; None = width / heads
    context: str = "prefix"
    context_mask: str = "causal"
    context_min_history: int = 0
    attn_window: int | None = None
    attn_norm: str = "static_max"
    norm_constant: float = 1.0
    qk_scale: float | None = None  # None = 1 / sqrt(dqk)
    group_norm: bool = False
    positions: int | None = None  # P
    time_embedding: bool = True
    time_buckets: int = 2048  # B
    postprocessor: str = "layer"
    content_hidden: int | None = None  # F
    head_hidden: int | None = None  # M
    action_std: float = 0.1
    init: str = "xavier"
    input_dropout: float = 0.0
    dropout: float = 0.0
    stochastic_length: float | None = None
    prune_last: bool = True  # the last layer computes only the candidates' rows; exact
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32
    implementation: str | None = None

    axes: ClassVar[dict[str, str]] = {"S": "history", "L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = "the L layers, of one sequence without context and candidates"

    def __post_init__(self) -> None:
        where = "dlrm_v3.Config"
        checks.at_least(where, 1, history=self.history, layers=self.layers, width=self.width)
        checks.at_least(where, 1, heads=self.heads, tasks=self.tasks)
        checks.at_least(where, 1, time_buckets=self.time_buckets)
        checks.at_least(where, 0, context_min_history=self.context_min_history)
        for name in ("qk_width", "v_width", "positions", "content_hidden", "head_hidden"):
            if getattr(self, name) is not None:
                checks.at_least(where, 1, **{name: getattr(self, name)})
        if self.attn_window is not None:
            checks.at_least(where, 0, attn_window=self.attn_window)
        checks.flags(where, self)
        for name, allowed in _CHOICES.items():
            checks.one_of(where, name, getattr(self, name), allowed)
        checks.dtype(where, self.dtype)
        stochastic_length.check(where, self.stochastic_length)
        pointwise_attention.check_widths(where, self.width, self.heads, self.qk_width, self.v_width)
        for name in ("dropout", "input_dropout"):
            if not 0 <= getattr(self, name) < 1:
                found = getattr(self, name)
                raise ValueError(f"{where}: {name}={found}, expected 0 <= {name} < 1")
        for name in ("norm_constant", "action_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{where}: {name}={getattr(self, name)}, expected > 0")

    @property
    def head_widths(self) -> tuple[int, int]:
        """(dqk, dv)."""
        default = self.width // self.heads
        return self.qk_width or default, self.v_width or default

    def static_max(self, context: int = 0) -> int:
        """Tokens that a candidate may read at most, itself included."""
        return context + self.history + 1

    def paper_params(self) -> int:
        """L (d h (2 dv + 2 dqk) + h (2 dv + 2 dqk) + 2 d + 3 h dv d + 2 h dv); group_norm: 2 h."""
        (Q, V), d, h = self.head_widths, self.width, self.heads
        uvqk = h * (2 * V + 2 * Q)
        scales = 2 * h if self.group_norm else 2 * h * V
        return self.layers * (d * uvqk + uvqk + 2 * d + 3 * h * V * d + scales)

    def paper_flops(self, n: int | None = None) -> float:
        """Forward FLOPs of `paper_scope`: L (14 n d^2 + 4 n^2 d) at h dqk = h dv = d, all rows.

        n tokens, scores unskipped; None = `static_max`: the events and one candidate.
        """
        (Q, V), d, h = self.head_widths, self.width, self.heads
        n = self.static_max() if n is None else n
        linear = 2 * n * d * h * (2 * V + 2 * Q) + 2 * n * 3 * h * V * d
        return float(self.layers * (linear + 2 * n**2 * h * (Q + V)))


_CHOICES = {
    "context": ("prefix", "none"),
    "context_mask": ("causal", "full"),
    "attn_norm": pointwise_attention.NORMALIZERS,
    "postprocessor": ("layer", "time", "l2"),
    "init": initializers.NAMES,
    "implementation": (None, *hstu_attention.IMPLEMENTATIONS),
}

# MLPerf's. Its 16384 are a sample's tokens, of which context and candidates take a few.
DLRM_V3_MLPERF = Config(
    **dict(history=16_384, layers=5, width=512, heads=4, qk_width=128, v_width=128),
    **dict(content_hidden=256, head_hidden=512, positions=8192, time_buckets=2048),
    **dict(attn_norm="const", norm_constant=16_384.0, context_min_history=20),
    **dict(postprocessor="time", input_dropout=0.2, dropout=0.1),
)

_SHAPES = "shapes of the public code's STULayer; printed nowhere"
PAPER = papers.Paper(
    title="DLRM-v3 (MLPerf), the public form of Actions Speak Louder than Words",
    arxiv="2402.17152",
    evidence="no paper: Meta's public code, read",
    sizes={
        "dlrm_v3_mlperf": papers.Size(
            config=DLRM_V3_MLPERF,
            chosen="history: all of the 16384 tokens, of which it is not said how many are context "
            "and candidates",
        )
    },
    figures=(
        papers.Figure(
            what="parameters of a layer",
            printed=1_839_104,
            ours=lambda: dataclasses.replace(DLRM_V3_MLPERF, layers=1).paper_params(),
            where=_SHAPES,
        ),
        papers.Figure(
            what="parameters of five layers",
            printed=9_195_520,
            ours=lambda: DLRM_V3_MLPERF.paper_params(),
            where=_SHAPES,
        ),
    ),
    leaves_open=(
        ("what of the log is a token's feature", "item: content; event: action; user: context"),
        (
            "features of a candidate's own",
            "a network of them is added to its token, as the code adds its additional embeddings; "
            "the item network reads the item's only",
        ),
        ("hidden widths beside d = 512", "F = d / 2 and M = d, which are MLPerf's at 512"),
    ),
    deviations=(
        (
            "actions are the schema's event features",
            "the code explodes a bitmask, which is preparation of its data; our log has ids",
        ),
        (
            "hour and weekday as the schema's embeddings",
            "a batch holds no absolute times, of which the code takes sine and cosine; without "
            "such features 'time' is a linear map and LN",
        ),
        (
            "context_min_history counts events",
            "the code counts candidates too, so that one candidate's score would depend on how "
            "many others there are",
        ),
        ("attn_window spares the context", "the code's window cuts it off from late tokens"),
        ("merged tokens only", "HSTU has the interleaved ones"),
        ("one xavier initialisation", "the code draws some kernels normal, some uniform"),
        ("the loss's factor 0.2", "belongs to the trainer's task weights"),
    ),
)


class STULayer(nn.Module):
    """X + dropout([U, A V, U * LN(A V)]) W_o; U, V, Q, K = Split(LN(X) W + b), U through a SiLU.

    Called with x [R, N, D] in `dtype`, a mask of `masks_of` and the normalizer (a number or
    [R, N]); returns [R, rows, D], the rows of the mask's queries, which are the last ones of x.
    Parameters, float32: input_norm (2 D), uvqk_kernel [D, h (2 dv + 2 dqk)] and uvqk_bias,
    attention_norm (2 h dv; group_norm: scale and bias [h]), output/kernel [3 h dv, D].
    """

    config: Config

    @nn.compact
    def __call__(
        self,
        x_rnd: jax.Array,
        mask: tuple[Tokens, Tokens, MaskRule],
        normalizer: float | jax.Array,
        *,
        train: bool,
    ) -> jax.Array:
        c = self.config
        (Q, V), D = c.head_widths, x_rnd.shape[-1]
        width = sum(pointwise_attention.widths(c.heads, Q, V))
        init = initializers.kernel(c.init)
        u_rnf, a_rnf = pointwise_attention.attend(
            norms.Norm("layer", name="input_norm")(x_rnd),
            self.param("uvqk_kernel", init, (D, width), jnp.float32).astype(c.dtype),
            mask,
            **{"heads": c.heads, "qk": Q, "v": V, "normalizer": normalizer},
            scale=Q**-0.5 if c.qk_scale is None else c.qk_scale,
            activation="u",
            bias_f=self.param("uvqk_bias", nn.initializers.zeros, (width,)).astype(c.dtype),
            implementation=c.implementation,
        )
        y_rnf = jnp.concatenate([u_rnf, a_rnf, u_rnf * self._norm(a_rnf)], axis=-1)
        y_rnf = nn.Dropout(c.dropout, deterministic=not train)(y_rnf)
        out_init = initializers.kernel(c.init, residual_layers=c.layers)
        out = nn.Dense(D, use_bias=False, dtype=c.dtype, kernel_init=out_init, name="output")
        return x_rnd[:, x_rnd.shape[1] - y_rnf.shape[1] :] + out(y_rnf)

    def _norm(self, a_rnf: jax.Array) -> jax.Array:
        h = self.config.heads
        if not self.config.group_norm:
            return norms.Norm("layer", name="attention_norm")(a_rnf)
        a_rnhv = norms.Norm("layer", affine=False)(a_rnf.reshape(*a_rnf.shape[:2], h, -1))
        scale_h = self.param("attention_scale", nn.initializers.ones, (h,), jnp.float32)
        bias_h = self.param("attention_bias", nn.initializers.zeros, (h,), jnp.float32)
        y_rnhv = a_rnhv.astype(jnp.float32) * scale_h[:, None] + bias_h[:, None]
        return y_rnhv.reshape(a_rnf.shape).astype(a_rnf.dtype)


def masks_of(config: Config, features: Features) -> dict[str, tuple[Tokens, Tokens, MaskRule]]:
    """{title: (queries, keys, rule)}: which token reads which, in the order of the layers."""
    c, context = config, "causal" if config.context_mask == "causal" else "history"
    rule = MaskRule(context=context, history="causal", window=c.attn_window)
    tokens = sequence.tokens(features, context=sequence.context_tokens(features, c.context))
    rows = features.candidate_sample.shape[1] if c.prune_last else tokens.segment.shape[1]
    return sequence.layer_masks(tokens, tokens, rule, layers=c.layers, rows=rows)


class DLRMv3(nn.Module):
    """Features -> (logits float32 [R, C, K], {}). Takes no windows: positions count from the end.

    Raises ValueError for window samples and for a schema without item features.
    """

    config: Config
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        features.require_one_time("dlrm_v3", "its positions count from the newest event")
        c, C, schema = self.config, features.candidate_sample.shape[1], features.schema
        if train and c.stochastic_length is not None:
            features = stochastic_length.subsample(
                features, self.make_rng("dropout"), alpha=c.stochastic_length, longest=c.history
            )
        context = sequence.context_tokens(features, c.context)
        masks = list(masks_of(c, features).values())
        places = timed_positions.TimedPositions(
            c.positions or c.static_max(context),
            c.time_buckets if c.time_embedding and schema.time_exact else None,
            **{"width": c.width, "dtype": c.dtype, "name": "places"},
        )
        x_rnd = self._embed(features) * c.width**0.5 + places(masks[-1][1], context)
        x_rnd = nn.Dropout(c.input_dropout, deterministic=not train)(x_rnd)
        normalizer = pointwise_attention.normalizer(
            c.attn_norm, masks[-1][1], static_max=c.static_max(context), constant=c.norm_constant
        )
        make = lambda name, _: STULayer(c, name=name)
        call = lambda layer, i, x_rnd: layer(x_rnd, masks[i], normalizer, train=train)
        of_layers = sequence.mask_of_layers(masks, c.layers)
        x_rnd = stack.run(self.compute, "layer", of_layers, make, call, x_rnd)
        x_rcd = self._postprocess(x_rnd[:, x_rnd.shape[1] - C :], features)
        return self._head(x_rcd, features), {}

    def _network(self, name: str, hidden: int) -> swish_norm.SwishNetwork:
        c = self.config
        return swish_norm.SwishNetwork(hidden, c.width, c.init, c.dtype, name=name)

    def _embed(self, features: Features) -> jax.Array:
        """The stream [context | history | candidates], [R, N, D], without places.

        A candidate's action is a learned vector, the same for all: what the user does is the label.
        """
        c, schema = self.config, features.schema
        names = {side: [f.name for f in schema.of(side)] for side in ("item", "event", "context")}
        if not names["item"]:
            raise ValueError("dlrm_v3: the schema has no item feature, of which a token is made")
        side_by_side = lambda values, side: sequence.concat(values, names[side], c.dtype)
        hidden = c.content_hidden or max(c.width // 2, 1)
        content = self._network("content", hidden)
        history_rsd = content(side_by_side(features.history, "item"))
        candidate_rcd = content(side_by_side(features.candidate, "item"))
        if names["event"]:
            event = side_by_side(features.history, "event")
            action = self._network("action", hidden)
            init = nn.initializers.normal(c.action_std)
            target = self.param("target_action", init, event.shape[-1:], jnp.float32)
            history_rsd += action(event)
            candidate_rcd += action(target.astype(c.dtype))
        if names["context"]:
            own = side_by_side(features.candidate, "context")
            candidate_rcd += self._network("candidate_context", hidden)(own)
        parts = [history_rsd, candidate_rcd]
        if sequence.context_tokens(features, c.context):
            parts = [self._context(features), *parts]
        return jnp.concatenate(parts, axis=1)

    def _context(self, features: Features) -> jax.Array:
        """One token per user feature, sample-major, [R, G U, D]."""
        c, init = self.config, initializers.kernel(self.config.init)
        G = next(iter(features.user.values())).shape[1]
        of_sample_rgs = features.history_sample[:, None, :] == jnp.arange(G)[:, None]
        enough_rg1 = jnp.sum(of_sample_rgs, axis=-1, keepdims=True) >= c.context_min_history
        users = []
        for feature in features.schema.user:
            value_rge = jnp.where(enough_rg1, features.user[feature.name], 0).astype(c.dtype)
            name = f"context_{feature.name}"
            users.append(nn.Dense(c.width, dtype=c.dtype, kernel_init=init, name=name)(value_rge))
        return sequence.interleave(*users)

    def _postprocess(self, x_rcd: jax.Array, features: Features) -> jax.Array:
        """The candidates' encodings, [R, C, D] in float32."""
        c, x_rcd = self.config, x_rcd.astype(jnp.float32)
        if c.postprocessor == "l2":
            # Of the square, so that a row of zeros has a gradient.
            square = jnp.sum(jnp.square(x_rcd), axis=-1, keepdims=True)
            return x_rcd * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
        if c.postprocessor == "time":
            clock = [f.name for f in features.schema.of("context") if f.derive in CLOCK]
            parts = [x_rcd, *(features.candidate[name] for name in clock)]
            init = initializers.kernel(c.init)
            mix = nn.Dense(c.width, kernel_init=init, name="clock")
            x_rcd = mix(jnp.concatenate(parts, axis=-1).astype(jnp.float32))
        return norms.Norm("layer", epsilon=1e-5, name="output_norm")(x_rcd)

    def _head(self, x_rcd: jax.Array, features: Features) -> jax.Array:
        """MLP(encoding * item embedding), one for all tasks; float32 [R, C, K]."""
        c, init = self.config, initializers.kernel(self.config.init)
        hidden = c.head_hidden or c.width
        names = [f.name for f in features.schema.of("item")]
        item = self._network("item", hidden)(sequence.concat(features.candidate, names, c.dtype))
        h_rcm = nn.Dense(hidden, kernel_init=init, name="head_in")(x_rcd * item)
        h_rcm = swish_norm.SwishLayerNorm(name="head_swish")(h_rcm)
        return nn.Dense(c.tasks, kernel_init=init, name="head_out")(h_rcm)
