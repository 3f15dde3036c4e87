"""HeteroAtt and Hiformer: attention over features, each with matrices of its own (2311.05884).

Features -> inputs -> task tokens + feature tokens -> L layers -> task token k -> logit k

A layer is attention and a per-token feed-forward, each with a residual and a norm of its own per
token. HeteroAtt's projections belong to one token (`layers/hetero_attention.py`), Hiformer's are
composite: made of all tokens at once, full or low rank (`layers/composite.py`).

With prune_last the last layer computes the K task tokens only, and their queries, output and
feed-forward matrices are the only ones that it has: that is how the paper's counts come out.
Parameters of a layer that reads T = tokens + tasks and computes P tokens (P = T, or K in a pruned
one), norms "layer", with F = k D, q = H d_k, v = H d_v:
  HeteroAtt        P D q + T D (q + v) + P v D  + P (2 D F + F + D)  + norms
  Hiformer, full   T P D q + T^2 D (q + v) + P v D  + P (2 D F + F + D)  + norms
  Hiformer, rank r: each of the composite terms T D * n becomes r (T D + n), n its columns
  norms            4 P D after the residuals ("post"); 2 T D + 2 P D before them ("pre")
Beside the layers: "pre" adds one norm of the task tokens (2 K D), the task tokens K D, the heads
K (D + 1), and the tokenizer. Ours, where the paper is silent: see PAPER.
"""

import dataclasses
from typing import ClassVar

import jax
from flax import linen as nn

from rankjax import papers
from rankjax.batch import Features
from rankjax.layers import (
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

_SCOPE = (
    "the L layers with their norms, without tokenizer, task tokens and heads; parameters of the "
    "last as built (prune_last: task tokens only), FLOPs per candidate of all tokens in all layers"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeteroAttConfig:
    tokens: int | None = None  # feature tokens; None: as many as the tokenizer makes of the schema
    layers: int = 2  # L
    width: int = 64  # D
    heads: int = 4  # H
    qk_width: int | None = None  # d_k; None: D / H
    v_width: int | None = None  # d_v; None: D / H
    expansion: int = 4  # k: a token's feed-forward is kD wide
    tokenizer: str = "per_feature"  # the paper's; see layers/tokenizers.py
    dense_tokens: int = 1  # n_d of "per_feature": tokens of all dense features together
    tokenizer_hidden: int = 0  # of "group" and "auto_split"; 0 = linear
    pooling: tuple[str, ...] = ("mean",)  # of the history: "mean", "target", or both
    attention_hidden: tuple[int, ...] = (36,)  # of target attention
    attention_activation: str = "sigmoid"  # or "dice"
    prune_last: bool = True  # the last layer computes the task tokens only
    norm: str = "layer"
    norm_place: str = "pre"  # "post" is what the paper draws
    init: str = "lecun"
    tasks: int = 1  # K; each has a token of its own beside `tokens`
    dtype: str = "float32"  # of activations; parameters are always float32

    axes: ClassVar[dict[str, str]] = {"T": "tokens", "L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = _SCOPE

    def __post_init__(self) -> None:
        _check("hiformer.HeteroAttConfig", self)

    def paper_params(self) -> int | None:
        """Exact for the layers, as in the file's docstring; None where the data decide T."""
        return _params(self)

    def paper_flops(self) -> float | None:
        """L (2 multiply-adds a weight, and the scores: 2 T^2 H (d_k + d_v)); None as above."""
        return _flops(self)

    def attention_weights(self, tokens: int, outputs: int) -> int:
        """Weights of the attention of a layer that reads T and computes P tokens."""
        return hetero_attention.weights(
            tokens, outputs, self.width, self.heads, *_head_widths(self)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiformerConfig:
    tokens: int | None = None  # as in HeteroAttConfig, down to dtype but for the ranks
    layers: int = 1  # the paper's: one layer
    width: int = 64
    heads: int = 4
    qk_width: int | None = None
    v_width: int | None = None
    expansion: int = 4
    rank_query: int | None = None  # r_q; None: full
    rank_key: int | None = None  # r_k
    rank_value: int | None = None  # r_v
    composite_query: bool = True  # False: a token's query is made of itself, as in HeteroAtt
    tokenizer: str = "per_feature"
    dense_tokens: int = 1
    tokenizer_hidden: int = 0
    pooling: tuple[str, ...] = ("mean",)
    attention_hidden: tuple[int, ...] = (36,)
    attention_activation: str = "sigmoid"
    prune_last: bool = True
    norm: str = "layer"
    norm_place: str = "pre"
    init: str = "lecun"
    tasks: int = 1
    dtype: str = "float32"

    axes: ClassVar[dict[str, str]] = {"T": "tokens", "L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = _SCOPE

    def __post_init__(self) -> None:
        where = "hiformer.HiformerConfig"
        _check(where, self)
        ranks = ("rank_query", "rank_key", "rank_value")
        composite.check(where, **{name: getattr(self, name) for name in ranks})
        if not self.composite_query and self.rank_query is not None:
            raise ValueError(
                f"{where}: rank_query={self.rank_query}, expected None with composite_query=False"
            )

    def paper_params(self) -> int | None:
        """Exact for the layers, as in the file's docstring; None where the data decide T."""
        return _params(self)

    def paper_flops(self) -> float | None:
        """L (2 multiply-adds a weight, and the scores: 2 T^2 H (d_k + d_v)); None as above."""
        return _flops(self)

    def attention_weights(self, tokens: int, outputs: int) -> int:
        """Weights of the attention of a layer that reads T and computes P tokens."""
        (Q, V), D, H = _head_widths(self), self.width, self.heads
        found = composite.weights(tokens * D, tokens, H * Q, self.rank_key)
        found += composite.weights(tokens * D, tokens, H * V, self.rank_value)
        if self.composite_query:
            found += composite.weights(tokens * D, outputs, H * Q, self.rank_query)
        else:
            found += outputs * D * H * Q
        return found + outputs * H * V * D


AnyConfig = HeteroAttConfig | HiformerConfig


def _check(where: str, c: AnyConfig) -> None:
    for name in ("pooling", "attention_hidden"):  # JSON has no tuples
        object.__setattr__(c, name, checks.as_tuple(getattr(c, name)))
    least_1 = ("layers", "width", "heads", "expansion", "tasks")
    checks.at_least(where, 1, **{name: getattr(c, name) for name in least_1})
    checks.at_least(where, 0, tokenizer_hidden=c.tokenizer_hidden, dense_tokens=c.dense_tokens)
    hetero_attention.check(where, c.width, c.heads, c.qk_width, c.v_width)
    tokenizers.check(where, c.tokenizer, c.tokens)
    history_pooling.check(where, c.pooling, c.attention_hidden, c.attention_activation)
    checks.flags(where, c)
    norms.check(where, c.norm, c.norm_place)
    initializers.check(where, c.init)
    checks.dtype(where, c.dtype)


def _head_widths(c: AnyConfig) -> tuple[int, int]:
    """(d_k, d_v)."""
    return c.qk_width or c.width // c.heads, c.v_width or c.width // c.heads


def _outputs(c: AnyConfig, tokens: int, layer: int) -> int:
    """P: how many of its T tokens a layer computes."""
    return c.tasks if c.prune_last and layer == c.layers - 1 else tokens


def _params(c: AnyConfig) -> int | None:
    if c.tokens is None:
        return None
    T, D, F, total = c.tokens + c.tasks, c.width, c.expansion * c.width, 0
    for P in (_outputs(c, T, layer) for layer in range(c.layers)):
        total += c.attention_weights(T, P) + P * (2 * D * F + F + D)
        total += ((T if c.norm_place == "pre" else P) + P) * norms.parameters(c.norm, D)
    return total


def _flops(c: AnyConfig) -> float | None:
    if c.tokens is None:
        return None
    T, D = c.tokens + c.tasks, c.width
    matrices = 2 * (c.attention_weights(T, T) + T * 2 * c.expansion * D * D)
    scores = hetero_attention.score_flops(T, T, c.heads, *_head_widths(c))
    return float(c.layers * (matrices + scores))


# Google Play: 31 categorical features, n_d dense tokens, one task token; sum 38 (see PAPER).
_GOOGLE_PLAY = dict(
    tokens=37,
    dense_tokens=6,
    width=128,
    heads=4,
    qk_width=16,
    v_width=64,
    expansion=4,
    norm_place="post",
)
HETEROATT_1 = HeteroAttConfig(layers=1, **_GOOGLE_PLAY)
HETEROATT_2 = HeteroAttConfig(layers=2, **_GOOGLE_PLAY)
HIFORMER_GOOGLE_PLAY = HiformerConfig(
    layers=1, rank_key=128, rank_value=1024, composite_query=False, **_GOOGLE_PLAY
)
HIFORMER_FULL = HiformerConfig(layers=1, composite_query=False, **_GOOGLE_PLAY)


def _figures() -> tuple[papers.Figure, ...]:
    """The table's dense parameters: their differences, which are of layers alone, and the totals.

    Totals are printed to 10,000, so a difference of two may be off by as much.
    """
    configs = {
        "HeteroAtt, 1 layer": (2.36e6, HETEROATT_1),
        "HeteroAtt, 2 layers": (10.50e6, HETEROATT_2),
        "Hiformer, 1 layer": (16.68e6, HIFORMER_GOOGLE_PLAY),
        "Hiformer without low rank, 1 layer": (59.95e6, HIFORMER_FULL),
    }
    pairs = {
        "a second HeteroAtt layer": ("HeteroAtt, 2 layers", "HeteroAtt, 1 layer"),
        "Hiformer beyond HeteroAtt, 1 layer": ("Hiformer, 1 layer", "HeteroAtt, 1 layer"),
        "what low rank saves": ("Hiformer without low rank, 1 layer", "Hiformer, 1 layer"),
    }
    found = []
    for what, (more, less) in pairs.items():
        printed = configs[more][0] - configs[less][0]
        ours = lambda a=configs[more][1], b=configs[less][1]: a.paper_params() - b.paper_params()
        found.append(
            papers.Figure(
                what=f"parameters of {what}",
                printed=printed,
                ours=ours,
                where="table of offline results, difference of two rows",
                tolerance=1e4 / printed,
            )
        )
    for what, (printed, config) in configs.items():
        found.append(
            papers.Figure(
                what=f"dense parameters, {what}",
                printed=printed,
                ours=config.paper_params,
                where="table of offline results",
                tolerance=None,
                note="printed with projections to tokens and heads, whose sizes are not: .63M in "
                "all four rows",
            )
        )
    return tuple(found)


_CHOSEN = "tokens, dense_tokens, norm_place, composite_query: from the printed counts and figure"
PAPER = papers.Paper(
    title="Hiformer: Heterogeneous Feature Interactions Learning with Transformers for "
    "Recommender Systems",
    arxiv="2311.05884",
    sizes={
        "heteroatt_1": papers.Size(config=HETEROATT_1, chosen=_CHOSEN),
        "heteroatt_2": papers.Size(config=HETEROATT_2, chosen=_CHOSEN),
        "hiformer_google_play": papers.Size(config=HIFORMER_GOOGLE_PLAY, chosen=_CHOSEN),
        "hiformer_full": papers.Size(config=HIFORMER_FULL, chosen=_CHOSEN),
    },
    figures=_figures(),
    leaves_open=(
        (
            "how many tokens there are",
            "38 with the task token: only so do both differences of the printed counts come out; "
            "31 are categorical features, so the dense features make 6",
        ),
        (
            "whose norms they are",
            "every token has its own two: 8.14M for a HeteroAtt layer needs 4 D per token",
        ),
        (
            "whether a pruned layer keeps the parameters of what it does not compute",
            "no: one layer of 38 tokens would be 8.14M, and one layer is printed with 2.36M",
        ),
        (
            "the query of the pruned layer, and r_q",
            "composite and of rank rank_query by default, as the equations say; in the paper's "
            "sizes made of the task token alone, since with a composite one the table's rows would "
            "differ by .3M more (full), and the printed cost of a pruned layer has no such term",
        ),
        ("biases of the projections", "none; the feed-forward has them"),
        ("how dense features become n_d tokens", "one linear layer on all of them side by side"),
        ("the start of the task tokens", "normal of scale .02"),
        ("the heads", "one linear layer per task, on its own token"),
    ),
    deviations=(
        (
            "norms stand before the sub-layers by default, and once more before the heads",
            "norm_place is one of the studied choices; the paper's sizes keep post-norm as drawn",
        ),
        (
            "the history enters pooled, as further features",
            "the paper's model has no sequence; every interaction model here compresses it so",
        ),
    ),
)


class Block(nn.Module):
    """Attention, then the per-token feed-forward; residuals and a norm of every token's own.

    Called with x [T, N, D] in the config's dtype, task tokens first; returns the first P tokens,
    [P, N, D]. Parameters, float32: as in the file's docstring.
    """

    config: AnyConfig
    outputs: int  # P

    @nn.compact
    def __call__(self, x_tnd: jax.Array) -> jax.Array:
        c, P = self.config, self.outputs
        tail = (c.dtype, c.init, c.layers)
        if isinstance(c, HiformerConfig):
            attention = composite.CompositeAttention(
                *(c.heads, *_head_widths(c), P, c.rank_query, c.rank_key, c.rank_value),
                *(c.composite_query, *tail),
                name="attention",
            )
        else:
            attention = hetero_attention.HeteroAttention(
                c.heads, *_head_widths(c), P, *tail, name="attention"
            )
        ffn = per_token.FeedForward(c.expansion, *tail, name="ffn")
        attention_norm = hetero_attention.TokenNorm(c.norm, name="attention_norm")
        ffn_norm = hetero_attention.TokenNorm(c.norm, name="ffn_norm")
        s_pnd = hetero_attention.residual(x_tnd, attention, attention_norm, c.norm_place, P)
        return hetero_attention.residual(s_pnd, ffn, ffn_norm, c.norm_place, P)


def _score(c: AnyConfig, compute: stack.Compute, features: Features) -> jax.Array:
    """Both models' way from features to logits; its modules are those of the calling module."""
    R, C = features.candidate_sample.shape
    pooled = history_pooling.HistoryPooling(
        c.pooling, c.attention_hidden, c.attention_activation, c.init, c.dtype, name="history"
    )(features)
    x_tnd = tokenizers.Tokenizer(
        *(c.tokenizer, c.tokens, c.width, c.tokenizer_hidden, c.init, c.dtype, c.dense_tokens),
        name="tokenizer",
    )(inputs.collect(features, pooled))
    x_tnd = tokenizers.TaskTokens(c.tasks, name="task")(x_tnd)
    outputs = [_outputs(c, len(x_tnd), layer) for layer in range(c.layers)]
    make = lambda name, P: Block(c, P, name=name)
    x_tnd = stack.run(compute, "block", outputs, make, lambda block, P, x_tnd: block(x_tnd), x_tnd)
    x_knd = x_tnd[: c.tasks]
    if c.norm_place == "pre":
        x_knd = hetero_attention.TokenNorm(c.norm, name="out_norm")(x_knd)
    logits_nk = task_heads.OwnVector((), c.init, name="heads")(x_knd)
    return logits_nk.reshape(R, C, c.tasks)


class HeteroAtt(nn.Module):
    """Features -> (logits [R, C, K], float32, {}).

    Raises ValueError for window samples, and where the schema does not fit the tokens.
    """

    config: HeteroAttConfig
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, auxiliary.Logits | auxiliary.Penalty]]:
        features.require_one_time("heteroatt")
        return _score(self.config, self.compute, features), {}


class Hiformer(nn.Module):
    """Features -> (logits [R, C, K], float32, {}).

    Raises ValueError for window samples, and where the schema does not fit the tokens.
    """

    config: HiformerConfig
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, auxiliary.Logits | auxiliary.Penalty]]:
        features.require_one_time("hiformer")
        return _score(self.config, self.compute, features), {}
