"""HSTU in its ranking form: SiLU attention over one stream of events and candidates.

Source: "Actions Speak Louder than Words" (Zhai et al. 2024, arXiv 2402.17152), §3, and its
research code; merged tokens and the context prefix as in Meta's DLRM-v3.

Features -> [context | history | candidates] -> L layers -> candidate rows -> logits

Parameters, with I, A, X the widths of an item's, an event's and a candidate's own features, U_f
those of the user's, P and F as in Config: content I d + d; event A d (interleaved + d);
candidate_context X d; context U_f d + d each; token_norm 2 d; the layers as in `paper_params`;
output_norm 2 d; K heads of d F + 2 F + 1.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax import papers
from rankjax.batch import Features, Tokens
from rankjax.kernels import hstu_attention
from rankjax.layers import (
    checks,
    initializers,
    linear_tokens,
    norms,
    pointwise_attention,
    relative_bias,
    sequence,
    stack,
    stochastic_length,
    task_heads,
)
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
      the log's times are not exact.
    rab_query_time: the time that rab takes of a query: "own", its own; "next", that of the token
      after it, as the research code does. In a window the next event's time would tell an earlier
      candidate of a later event, so "next" takes none.
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
    stochastic_length: in training, samples longer than history^(alpha / 2) events are learned from
      by random subsequences of that length; see layers/stochastic_length.py.
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
    rab_query_time: str = "own"
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
    stochastic_length: float | None = None  # alpha; None = off
    prune_last: bool = True  # the last layer computes only the candidates' rows; exact
    head_hidden: int | None = None  # F; None = width
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32
    implementation: str | None = None

    axes: ClassVar[dict[str, str]] = {"S": "history", "L": "layers", "D": "width"}
    newer: ClassVar[tuple[str, ...]] = ("rab_query_time", "stochastic_length")  # than studies
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
        checks.flags(where, self)
        for name, allowed in _CHOICES.items():
            checks.one_of(where, name, getattr(self, name), allowed)
        norms.check(where, self.norm, self.norm_place)
        stochastic_length.check(where, self.stochastic_length)
        checks.dtype(where, self.dtype)
        pointwise_attention.check_widths(where, self.width, self.heads, self.qk_width, self.v_width)
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

    def paper_flops(self, n: int | None = None) -> float:
        """Forward FLOPs of `paper_scope`: L (10 n d^2 + 4 n^2 d), all rows, unskipped scores.

        n tokens; None = `static_max`: the events' tokens and one candidate.
        """
        Q, V = self.head_widths
        n, d, h = self.static_max() if n is None else n, self.width, self.heads
        linear = 2 * n * d * h * (2 * V + 2 * Q) + 2 * n * h * V * d
        return float(self.layers * (linear + 2 * n**2 * h * (Q + V)))


_CHOICES = {
    "tokens": linear_tokens.LAYOUTS,
    "context": ("prefix", "none"),
    "attn_norm": pointwise_attention.NORMALIZERS,
    "rab_query_time": ("own", "next"),
    "position_init": relative_bias.POSITION_INITS,
    "proj_activation": pointwise_attention.ACTIVATIONS,
    "token_norm": (*norms.KINDS, "sqrt_width"),
    "output_norm": norms.KINDS,
    "init": INITS,
    "implementation": (None, *hstu_attention.IMPLEMENTATIONS),
}

# Sizes of the paper's public experiments, as its research code has them, with P = N + 11.
_PUBLIC = dict(context="none", init="research", token_norm="sqrt_width", dropout=0.2)
HSTU_ML1M = Config(history=200, layers=2, width=50, heads=1, positions=211, **_PUBLIC)
HSTU_ML1M_LARGE = dataclasses.replace(HSTU_ML1M, layers=8, heads=2)
HSTU_ML20M_LARGE = dataclasses.replace(HSTU_ML1M, layers=16, width=256, heads=8)
HSTU_BOOKS_LARGE = dataclasses.replace(
    HSTU_ML20M_LARGE, history=50, width=64, dropout=0.5, positions=61
)

_CODE = "research code, HSTU encoder, P = 211"
PAPER = papers.Paper(
    title="Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for "
    "Generative Recommendations",
    arxiv="2402.17152",
    evidence="a copy of the paper's text, and Meta's public code, which agrees with its layer and "
    "decides what the text leaves open; the sizes are those of its retrieval experiments",
    sizes={
        "hstu_ml1m": papers.Size(config=HSTU_ML1M),
        "hstu_ml1m_large": papers.Size(config=HSTU_ML1M_LARGE),
        "hstu_ml20m_large": papers.Size(config=HSTU_ML20M_LARGE),
        "hstu_books_large": papers.Size(config=HSTU_BOOKS_LARGE),
    },
    figures=(
        papers.Figure(
            what="encoder parameters, ML-1M",
            printed=26_200,
            ours=lambda: HSTU_ML1M.paper_params(),
            where=_CODE,
        ),
        papers.Figure(
            what="encoder parameters, ML-1M large",
            printed=104_800,
            ours=lambda: HSTU_ML1M_LARGE.paper_params(),
            where=_CODE,
        ),
        papers.Figure(
            what="events kept of 4096 by stochastic length, alpha 1.6",
            printed=776,
            ours=lambda: stochastic_length.kept(1.6, 4096),
            where="Stochastic Length",
        ),
    ),
    leaves_open=(
        ("which N divides the attention", "the static maximum; never the batch's"),
        ("candidates' own features", "a linear map of them is added to the candidate's token"),
        ("positions after stochastic length", "those of the kept subsequence"),
        ("how the user's features enter", "a causal prefix of one token each (DLRM-v3)"),
    ),
    deviations=(
        (
            "a query's time in rab is its own; the research code takes the next token's",
            "in a window that would tell an earlier candidate of a later event; "
            "rab_query_time='next' is the code's, for candidates of one time",
        ),
        (
            "the small sizes of studies start the position bias at 2 exp(-distance / 3)",
            "position_init='recency', for short training; the default of Config is N(0, .02)",
        ),
        ("an event is one token by default", "half the length, as DLRM-v3; 'interleaved' is there"),
        ("one small MLP per task for a multi-task mixture of experts", "its sizes are not printed"),
        ("ranking only", "no retrieval head, no sampled softmax, no slow features in the stream"),
        (
            "events are no targets: impressions are, as candidates behind the history",
            "a log says what was shown; the paper supervises every content position of the stream",
        ),
        (
            "of the research code: no absolute positions and no dropout at the input",
            "the relative bias says where an event stands; and a norm before the head is added",
        ),
        ("stochastic length masks", "static shapes: it regularises, but saves no compute"),
    ),
)


class Layer(nn.Module):
    """X_out = dropout(LN(A V) * U) W2 + b2 + X; U, V, Q, K = Split(SiLU(LN(X) W1)) (eqs. 1-3).

    Called with x [R, N, D] in `dtype`, a mask of `masks_of` and the normalizer (a number or
    [R, N]); returns [R, rows, D], the rows of the mask's queries, which are the last ones of x.
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
        mask: tuple[Tokens, Tokens, MaskRule],
        normalizer: float | jax.Array,
        *,
        train: bool,
    ) -> jax.Array:
        c = self.config
        R, N, D = x_rnd.shape
        rows = mask[0].segment.shape[1]
        Q, V = c.head_widths
        h_rnd = x_rnd
        if c.norm_place == "pre":
            h_rnd = norms.Norm(c.norm, c.norm_affine, name="input_norm")(x_rnd)
        w1_init, w2_init = self._initializers()
        width = sum(pointwise_attention.widths(c.heads, Q, V))
        u_rnf, a_rnf = pointwise_attention.attend(
            h_rnd,
            self.param("w1", w1_init, (D, width), jnp.float32).astype(c.dtype),
            mask,
            **{"heads": c.heads, "qk": Q, "v": V, "normalizer": normalizer},
            scale=1.0 if c.qk_scale is None else c.qk_scale,
            activation=c.proj_activation,
            relative=relative_bias.tables(
                self.param,
                positions=self.positions if c.position_bias else None,
                time=self.time_bias,
                position_init=c.position_init,
                per_event=c.per_event,
            ),
            implementation=c.implementation,
        )
        y_rnf = norms.Norm(c.norm, c.norm_affine, name="attention_norm")(a_rnf) * u_rnf
        y_rnf = nn.Dropout(c.dropout, deterministic=not train)(y_rnf)
        w2 = nn.Dense(D, dtype=c.dtype, kernel_init=w2_init, name="w2")
        y_rnd = w2(y_rnf.reshape(R * rows, -1)).reshape(R, rows, D) + x_rnd[:, N - rows :]
        if c.norm_place == "post":
            y_rnd = norms.Norm(c.norm, c.norm_affine, name="output_norm")(y_rnd)
        return y_rnd

    def _initializers(self) -> tuple[Any, Any]:
        c = self.config
        if c.init == "research":
            return nn.initializers.normal(0.02), initializers.kernel("xavier")
        return initializers.kernel(c.init), initializers.kernel(c.init, residual_layers=c.layers)


def masks_of(config: Config, features: Features) -> dict[str, tuple[Tokens, Tokens, MaskRule]]:
    """{title: (queries, keys, rule)}: which token reads which, in the order of the layers."""
    tokens = sequence.tokens(
        features,
        context=sequence.context_tokens(features, config.context),
        per_event=config.per_event,
    )
    queries = sequence.next_times(tokens) if config.rab_query_time == "next" else tokens
    N, C = tokens.segment.shape[1], features.candidate_sample.shape[1]
    rows = C if config.prune_last else N
    return sequence.layer_masks(queries, tokens, RULE, layers=config.layers, rows=rows)


class HSTU(nn.Module):
    """Features -> (logits float32 [R, C, K], {}). Takes windows, with the two exceptions below.

    Raises ValueError for windows with attn_norm="valid_len" or rab_query_time="next", for a schema
    without item features, and for interleaved tokens without event features.
    """

    config: Config
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        c = self.config
        for field, value in (("attn_norm", "valid_len"), ("rab_query_time", "next")):
            if getattr(c, field) == value:
                features.require_one_time(f"hstu with {field}={value!r}", "it knows later events")
        if train and c.stochastic_length is not None:
            features = stochastic_length.subsample(
                features, self.make_rng("dropout"), alpha=c.stochastic_length, longest=c.history
            )
        C = features.candidate_sample.shape[1]
        context = sequence.context_tokens(features, c.context)
        masks = list(masks_of(c, features).values())
        x_rnd = self._embed(features)
        normalizer = pointwise_attention.normalizer(
            c.attn_norm, masks[-1][1], static_max=c.static_max(context), constant=c.norm_constant
        )
        P, timed = c.positions or c.static_max(context), c.time_bias and features.schema.time_exact
        make = lambda name, _: Layer(c, P, timed, name=name)
        call = lambda layer, i, x_rnd: layer(x_rnd, masks[i], normalizer, train=train)
        of_layers = sequence.mask_of_layers(masks, c.layers)
        x_rnd = stack.run(self.compute, "layer", of_layers, make, call, x_rnd)
        x_rcd = norms.Norm(c.output_norm, name="output_norm")(x_rnd[:, x_rnd.shape[1] - C :])
        head = task_heads.MLP(c.tasks, c.head_hidden or c.width, name="head")
        return head(x_rcd), {}

    def _embed(self, features: Features) -> jax.Array:
        """The stream [context | history | candidates], [R, N, D]."""
        c = self.config
        x_rnd = linear_tokens.embed(
            features,
            **{"where": "hstu", "width": c.width, "dtype": c.dtype},
            layout=c.tokens,
            context=c.context == "prefix",
        )
        if c.token_norm == "sqrt_width":
            return x_rnd * c.width**0.5
        return norms.Norm(c.token_norm, name="token_norm")(x_rnd)
