"""HHFT: heterogeneous Transformer layers, then Hiformer layers on one pooled vector (2511.20235).

Features -> inputs -> [cls] per task + one token per block -> n1 heterogeneous layers -> pool
  -> n2 Hiformer layers -> tower of each task -> logits

A heterogeneous layer is attention and a feed-forward with matrices of every token's own. A Hiformer
layer projects the pooled vector to M virtual tokens, which attend to each other and together feed
one feed-forward. Unlike in Google's Hiformer what is projected is one vector, so parameters grow
with M and not with T^2.
Parameters, with T tokens ([cls] among them), F = k D, F2 = k2 D, q = H d_k, v = H d_v, and W the
width of the pooled vector (D, or T D with pool="concat"):
  heterogeneous layer   P D q + T D (q + v) + P v D + P (2 D F + F + D), P = T tokens computed;
                        with pool="task" and prune_last the last one computes P = K only, and has
                        the queries, output and feed-forward matrices of these alone
  its norms ("layer")   4 P D after the residuals ("post"); 2 T D + 2 P D before them ("pre")
  Hiformer layer        W M (2 q + v) + M v F2 + F2 + F2 W + W; its norm 2 W
Beside the layers: "pre" adds one norm (2 W), [cls] are K D, a tower of widths a, b is
W a + a + a b + b + b + 1 per task, and the tokenizer. What the paper leaves open: see PAPER.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax import papers
from rankjax.batch import Features
from rankjax.layers import (
    activations,
    auxiliary,
    checks,
    composite,
    hetero_attention,
    history_pooling,
    initializers,
    inputs,
    norms,
    per_token,
    stack,
    task_heads,
    tokenizers,
)

POOLS = ("task", "mean", "sum", "concat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fields with the paper's letters; it prints no sizes, so that every default is our choice.

    The axis T is M, the number of virtual tokens: HHFT's capacity lies in its Hiformer layers, and
    the tokens of its heterogeneous layers are as many as the data have blocks. The axis L is n2.
    """

    tokens: int | None = None  # beside [cls]; None: as many as the tokenizer makes of the schema
    hetero_layers: int = 2  # n1
    layers: int = 2  # n2, Hiformer layers
    virtual_tokens: int = 16  # M
    width: int = 256  # D
    heads: int = 4  # H, of both kinds of layers
    qk_width: int | None = None  # d_k; None: D / H
    v_width: int | None = None  # d_v; None: D / H
    expansion: int = 4  # F / D, of the heterogeneous layers
    hiformer_expansion: int = 4  # F2 / D
    pool: str = "task"  # the [cls] tokens; or "mean", "sum", "concat" of all tokens
    tower: tuple[int, ...] = (256, 64)  # ReLU layers before each logit
    tokenizer: str = "group"  # one token per block of features, the paper's
    tokenizer_hidden: int = 0  # of "group" and "auto_split"; 0 = linear
    pooling: tuple[str, ...] = ("mean",)  # of the history: "mean", "target", or both
    attention_hidden: tuple[int, ...] = (36,)  # of target attention
    attention_activation: str = "sigmoid"  # or "dice"
    prune_last: bool = True  # pool="task": the last heterogeneous layer computes only [cls]
    norm: str = "layer"
    norm_place: str = "pre"
    init: str = "lecun"
    tasks: int = 1  # K; each has a [cls] of its own
    dtype: str = "float32"  # of activations; parameters are always float32

    axes: ClassVar[dict[str, str]] = {"T": "virtual_tokens", "L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = (
        "the n1 + n2 layers with their norms, without tokenizer, [cls] and towers; parameters of "
        "the last heterogeneous one as built (prune_last), FLOPs per candidate of all its tokens"
    )

    def __post_init__(self) -> None:
        where = "hhft.Config"
        for name in ("tower", "pooling", "attention_hidden"):  # JSON has no tuples
            object.__setattr__(self, name, checks.as_tuple(getattr(self, name)))
        least = {
            0: ("hetero_layers", "layers", "tokenizer_hidden"),
            1: ("virtual_tokens", "width", "heads", "expansion", "hiformer_expansion", "tasks"),
        }
        for number, names in least.items():
            checks.at_least(where, number, **{name: getattr(self, name) for name in names})
        hetero_attention.check(where, self.width, self.heads, self.qk_width, self.v_width)
        checks.one_of(where, "pool", self.pool, POOLS)
        if not self.hetero_layers and self.pool == "task":
            raise ValueError(
                f"{where}: hetero_layers=0 with pool='task', expected another pool: [cls] would "
                "reach the logits without having read a feature"
            )
        if not isinstance(self.tower, tuple):
            raise ValueError(f"{where}: tower={self.tower!r}, expected a tuple of widths")
        for i, width in enumerate(self.tower):
            checks.at_least(where, 1, **{f"tower[{i}]": width})
        tokenizers.check(where, self.tokenizer, self.tokens)
        history_pooling.check(where, self.pooling, self.attention_hidden, self.attention_activation)
        checks.flags(where, self)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)

    @property
    def head_widths(self) -> tuple[int, int]:
        """(d_k, d_v)."""
        default = self.width // self.heads
        return self.qk_width or default, self.v_width or default

    def outputs(self, tokens: int, layer: int) -> int:
        """P: how many of its T tokens, [cls] first, a heterogeneous layer computes."""
        last = self.prune_last and self.pool == "task" and layer == self.hetero_layers - 1
        return self.tasks if last else tokens

    def paper_params(self) -> int | None:
        """Exact for the layers, as in the file's docstring; None where the data decide T."""
        if self.tokens is None:
            return None
        T, D, F, total = self.tokens + self.tasks, self.width, self.expansion * self.width, 0
        for P in (self.outputs(T, layer) for layer in range(self.hetero_layers)):
            total += hetero_attention.weights(T, P, D, self.heads, *self.head_widths)
            total += P * (2 * D * F + F + D)
            total += ((T if self.norm_place == "pre" else P) + P) * norms.parameters(self.norm, D)
        W = T * D if self.pool == "concat" else D
        own = self._hiformer_weights(W) + self.hiformer_expansion * D + W
        return total + self.layers * (own + norms.parameters(self.norm, W))

    def paper_flops(self) -> float | None:
        """2 multiply-adds a weight, and the scores, 2 H (d_k + d_v) for each pair; all tokens.

        pool="task" runs the Hiformer layers once per task. None where the data decide T.
        """
        if self.tokens is None:
            return None
        T, D, H = self.tokens + self.tasks, self.width, self.heads
        hetero = 2 * hetero_attention.weights(T, T, D, H, *self.head_widths)
        hetero += 2 * T * 2 * self.expansion * D * D
        hetero += hetero_attention.score_flops(T, T, H, *self.head_widths)
        M = self.virtual_tokens
        own = 2 * self._hiformer_weights(T * D if self.pool == "concat" else D)
        own += hetero_attention.score_flops(M, M, H, *self.head_widths)
        times = self.tasks if self.pool == "task" else 1
        return float(self.hetero_layers * hetero + times * self.layers * own)

    def _hiformer_weights(self, W: int) -> int:
        """Weights of a Hiformer layer without biases: W M (2 q + v) + M v F2 + F2 W."""
        (Q, V), M, H = self.head_widths, self.virtual_tokens, self.heads
        projections = composite.weights(W, M, H * (2 * Q + V), None)
        return projections + (M * H * V + W) * self.hiformer_expansion * self.width


HHFT_BASE = Config()

PAPER = papers.Paper(
    title="HHFT: Hierarchical Heterogeneous Feature Transformer for Recommendation Systems",
    arxiv="2511.20235",
    evidence="abstract, figures 1 (architecture) and 2 (scaling) and table 2 (ablation), the last "
    "three read as images; equations, sizes, data and training were not readable, so that the "
    "formulas are ours, made from the drawing",
    sizes={
        "hhft_base": papers.Size(
            config=HHFT_BASE, chosen="all: the paper prints no size that was read", tokens=15
        )
    },
    leaves_open=(
        ("widths, heads, n1, n2, M", "D 256, H 4, d_k = d_v = 64, F = F2 = 4 D, n1 = n2 = 2, M 16"),
        (
            "where norms stand (none is drawn)",
            "before the projections of both kinds of layers and once before the tower; a norm of "
            'every token\'s own in the heterogeneous layers; norm_place="post" or norm="none" '
            "change it",
        ),
        ("which of the three poolings drawn is meant", "the [cls] token; mean and sum are options"),
        (
            "how virtual tokens become one vector again",
            "concatenated into the feed-forward, no W_O",
        ),
        ("residuals of a Hiformer layer", "one, around attention and feed-forward, as drawn"),
        ("activation of a block's single-layer MLP", "none; tokenizer_hidden adds a ReLU layer"),
        (
            "the initialisation that its ablation praises",
            "init: lecun, per token slice, and others",
        ),
        ("several tasks", "one [cls] and one tower each; the Hiformer layers are shared"),
        ("how the history is compressed", "history_pooling: a mean, or DIN's target attention"),
    ),
    deviations=(
        (
            "the last heterogeneous layer computes only [cls] where that alone is pooled",
            "exact: nothing else of it is read",
        ),
        (
            'pool="concat" is added',
            "with M = T its attention is that of Google's Hiformer, which makes the two comparable",
        ),
    ),
)


class HeteroLayer(nn.Module):
    """Attention, then the per-token feed-forward; residuals and a norm of every token's own.

    Called with x [T, N, D] in the config's dtype, [cls] first; returns the first P tokens,
    [P, N, D]. Parameters, float32: as in the file's docstring.
    """

    config: Config
    outputs: int  # P

    @nn.compact
    def __call__(self, x_tnd: jax.Array) -> jax.Array:
        c, P = self.config, self.outputs
        tail = (c.dtype, c.init, c.hetero_layers + c.layers)
        attention = hetero_attention.HeteroAttention(
            c.heads, *c.head_widths, P, *tail, name="attention"
        )
        ffn = per_token.FeedForward(c.expansion, *tail, name="ffn")
        attention_norm = hetero_attention.TokenNorm(c.norm, name="attention_norm")
        ffn_norm = hetero_attention.TokenNorm(c.norm, name="ffn_norm")
        s_pnd = hetero_attention.residual(x_tnd, attention, attention_norm, c.norm_place, P)
        return hetero_attention.residual(s_pnd, ffn, ffn_norm, c.norm_place, P)


class HiformerLayer(nn.Module):
    """t + FFN(concat of the heads of M virtual tokens of t); norm(t) first, or of the sum.

    Called with t [N, W] in the config's dtype; returns the same.
    Parameters, float32: query and key [W, M H d_k], value [W, M H d_v], columns token after token
    and head after head; ffn_in [M H d_v, F2] and ffn_out [F2, W] with biases; the norm's.
    """

    config: Config

    @nn.compact
    def __call__(self, t_nw: jax.Array) -> jax.Array:
        c = self.config
        (N, W), (Q, V), M = t_nw.shape, c.head_widths, c.virtual_tokens
        norm = norms.Norm(c.norm, name="norm")
        z_nw = norm(t_nw) if c.norm_place == "pre" else t_nw

        def virtual(name: str, head_width: int) -> jax.Array:
            features = c.heads * head_width
            return composite.Projection(M, features, None, c.dtype, c.init, name=name)(z_nw)

        a_mnf = hetero_attention.attend(
            virtual("query", Q), virtual("key", Q), virtual("value", V), c.heads
        )
        init = initializers.kernel(c.init)
        writes = initializers.kernel(c.init, residual_layers=c.hetero_layers + c.layers)
        hidden = nn.Dense(
            c.hiformer_expansion * c.width, dtype=c.dtype, kernel_init=init, name="ffn_in"
        )
        out = nn.Dense(W, dtype=c.dtype, kernel_init=writes, name="ffn_out")
        h_nf = activations.gelu(hidden(a_mnf.swapaxes(0, 1).reshape(N, -1)))
        y_nw = t_nw + out(h_nf)
        return norm(y_nw) if c.norm_place == "post" else y_nw


def pool(x_tnd: jax.Array, kind: str, tasks: int) -> jax.Array:
    """Tokens [T, N, D] -> [K, N, D] ("task": the [cls] tokens), else [1, N, W], of all tokens."""
    if kind == "task":
        return x_tnd[:tasks]
    if kind == "concat":
        T, N, D = x_tnd.shape
        return x_tnd.swapaxes(0, 1).reshape(1, N, T * D)
    return (x_tnd.mean if kind == "mean" else x_tnd.sum)(axis=0, keepdims=True)


class HHFT(nn.Module):
    """Features -> (logits [R, C, K], float32, {}).

    Raises ValueError for window samples, and where the schema does not fit the tokens.
    """

    config: Config
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, auxiliary.Logits | auxiliary.Penalty]]:
        features.require_one_time("hhft")
        c = self.config
        R, C = features.candidate_sample.shape
        pooled = history_pooling.HistoryPooling(
            c.pooling, c.attention_hidden, c.attention_activation, c.init, c.dtype, name="history"
        )(features)
        x_tnd = tokenizers.Tokenizer(
            c.tokenizer, c.tokens, c.width, c.tokenizer_hidden, c.init, c.dtype, name="tokenizer"
        )(inputs.collect(features, pooled))
        x_tnd = tokenizers.TaskTokens(c.tasks, name="cls")(x_tnd)
        outputs = [c.outputs(len(x_tnd), layer) for layer in range(c.hetero_layers)]
        make = lambda name, P: HeteroLayer(c, P, name=name)
        call = lambda layer, _, x: layer(x)
        x_tnd = stack.run(self.compute, "hetero", outputs, make, call, x_tnd)
        t_vnw = pool(x_tnd, c.pool, c.tasks)
        V, N, W = t_vnw.shape
        t_nw = t_vnw.reshape(V * N, W)
        make = lambda name, _: HiformerLayer(c, name=name)
        t_nw = stack.run(self.compute, "hiformer", [None] * c.layers, make, call, t_nw)
        if c.norm_place == "pre":
            t_nw = norms.Norm(c.norm, name="out_norm")(t_nw)
        t_knw = jnp.broadcast_to(t_nw.reshape(V, N, W), (c.tasks, N, W))
        logits_nk = task_heads.OwnVector(c.tower, c.init, name="tower")(t_knw)
        return logits_nk.reshape(R, C, c.tasks), {}
