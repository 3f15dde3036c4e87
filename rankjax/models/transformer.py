"""Plain Transformer over feature tokens: the same weights for every token, whatever it means.

The baseline of Hiformer (Gui et al., arXiv 2311.05884), which gives each token its own weights;
Vaswani et al., "Attention Is All You Need", arXiv 1706.03762.
Features -> inputs -> K task tokens, T tokens (one per feature) -> L blocks -> task tokens -> logits

Parameters of a block, H heads of widths q (query, key) and v (value), feed-forward kD wide:
D H (2 q + v) + H v D + 2 k D^2 + k D + D and two norms; no biases in the attention. readout "task":
K D of the task tokens, and (D + 1) K of the heads, each of which reads its own task token; "mean":
D K + K. A last norm where norm_place is "pre".
Ours: no positions are added, the tokenizer's own biases tell tokens apart; exact GELU.
"""

import dataclasses
from typing import ClassVar

import jax
from flax import linen as nn

from rankjax import papers
from rankjax.batch import Features
from rankjax.layers import (
    activations,
    checks,
    feature_attention,
    history_pooling,
    initializers,
    inputs,
    norms,
    stack,
    task_heads,
    tokenizers,
)

READOUTS = ("task", "mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    tokens: int | None = None  # T, feature tokens; None: as many as the tokenizer makes
    layers: int = 2  # L
    width: int = 64  # D
    heads: int = 4  # H
    key_width: int | None = None  # q, of a head's queries and keys; None: D / H
    value_width: int | None = None  # v, of a head's values; None: D / H
    expansion: int = 4  # k: the feed-forward is kD wide
    readout: str = "task"  # K learned task tokens, one for each head; "mean" over all tokens
    prune_last: bool = True  # the last block computes only task tokens ("mean" reads them all)
    tokenizer: str = "per_feature"  # see layers/tokenizers.py
    tokenizer_hidden: int = 0  # of "group" and "auto_split"; 0 = linear
    pooling: tuple[str, ...] = ("mean",)  # of the history: "mean", "target", or both
    attention_hidden: tuple[int, ...] = (36,)  # of target attention over the history
    attention_activation: str = "sigmoid"  # or "dice"
    norm: str = "layer"
    norm_place: str = "pre"  # and one more before the heads; "post" norm(f(x) + x)
    init: str = "lecun"
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32

    axes: ClassVar[dict[str, str]] = {"T": "tokens", "L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = (
        "the L blocks, without tokenizer, task tokens and heads; FLOPs per candidate, all rows"
    )

    def __post_init__(self) -> None:
        where = "transformer.Config"
        for name in ("pooling", "attention_hidden"):  # JSON has no tuples
            object.__setattr__(self, name, checks.as_tuple(getattr(self, name)))
        sizes = ("layers", "width", "heads", "expansion", "tasks")
        checks.at_least(where, 1, **{name: getattr(self, name) for name in sizes})
        checks.at_least(where, 0, tokenizer_hidden=self.tokenizer_hidden)
        for name in ("key_width", "value_width"):
            if getattr(self, name) is not None:
                checks.at_least(where, 1, **{name: getattr(self, name)})
            elif self.width % self.heads:
                raise ValueError(
                    f"{where}: width={self.width} is no multiple of heads={self.heads}; set {name} "
                    "for heads of another width than width / heads"
                )
        checks.one_of(where, "readout", self.readout, READOUTS)
        checks.flags(where, self)
        tokenizers.check(where, self.tokenizer, self.tokens)
        history_pooling.check(where, self.pooling, self.attention_hidden, self.attention_activation)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)

    @property
    def head_widths(self) -> tuple[int, int]:
        """(q, v)."""
        whole = self.width // self.heads
        return self.key_width or whole, self.value_width or whole

    def paper_params(self) -> int:
        """L (D H (2 q + v) + H v D + 2 k D^2 + k D + D + two norms): exact for the blocks."""
        D, F = self.width, self.expansion * self.width
        return self.layers * (self._matrices() + F + D + 2 * norms.parameters(self.norm, D))

    def paper_flops(self) -> float | None:
        """L (2 N (matrices) + 2 N^2 H (q + v)), N tokens with the task tokens; None without T."""
        if self.tokens is None:
            return None
        N = self.tokens + (self.tasks if self.readout == "task" else 0)
        q, v = self.head_widths
        return float(self.layers * (2 * N * self._matrices() + 2 * N * N * self.heads * (q + v)))

    def _matrices(self) -> int:
        q, v = self.head_widths
        D, H = self.width, self.heads
        return D * H * (2 * q + v) + H * v * D + 2 * self.expansion * D * D


# Section 5 of Hiformer: d 128, H 4, H d_k 64, H d_v 256, d_f 512; T is that of its data.
_HIFORMER = dict(width=128, heads=4, key_width=16, value_width=64, expansion=4)
TRANSFORMER_1 = Config(layers=1, **_HIFORMER)
TRANSFORMER_2 = Config(layers=2, **_HIFORMER)
TRANSFORMER_3 = Config(layers=3, **_HIFORMER)

_CHOSEN = "norm_place, readout; tokens: HeteroAtt's, from its printed counts"
PAPER = papers.Paper(
    title="Transformer over feature tokens, the baseline of Hiformer: Heterogeneous Feature "
    "Interactions Learning with Transformers for Recommender Systems",
    arxiv="2311.05884",
    evidence="the settings and the table of offline results, in which it is a row",
    sizes={
        "transformer_1": papers.Size(config=TRANSFORMER_1, chosen=_CHOSEN, tokens=37),
        "transformer_2": papers.Size(config=TRANSFORMER_2, chosen=_CHOSEN, tokens=37),
        "transformer_3": papers.Size(config=TRANSFORMER_3, chosen=_CHOSEN, tokens=37),
    },
    figures=(
        papers.Figure(
            what="parameters that two more layers add (3 layers less 1 layer)",
            printed=0.97e6 - 0.74e6,
            ours=lambda: TRANSFORMER_3.paper_params() - TRANSFORMER_1.paper_params(),
            where="table of offline results",
            tolerance=None,
            note="our 214,144 a layer, once per token, are HeteroAtt's printed 8.14M a layer (38 "
            "tokens); the Transformer's printed 0.115M a layer is nearest to a feed-forward as "
            "wide as the token (0.115M), not to d_f 512, which is what the paper prints.",
        ),
    ),
    leaves_open=(
        ("the norm's place in the baseline", "pre-norm; norm_place and norm are options"),
        ("whether the baseline reads a task token", "it does, as HeteroAtt and Hiformer do"),
        ("positions", "none: feature tokens have no order, and a bias each"),
    ),
)


class Block(nn.Module):
    """Pre-norm: h = x + attention(norm(x)) W_O, y = h + FFN(norm(h)); post-norm the other way.

    Called with x [T, N, D] in the config's dtype; returns the first `rows` tokens [rows, N, D],
    None = all: only their queries, feed-forward and residuals are computed.
    Parameters, float32: attention query and key [D, H q], value [D, H v], attention_out [H v, D]
    without bias, ffn_in [D, k D], ffn_out [k D, D] with biases, and two norms; all tokens share
    them.
    """

    config: Config

    @nn.compact
    def __call__(self, x_tnd: jax.Array, rows: int | None = None) -> jax.Array:
        c = self.config
        attention_norm = norms.Norm(c.norm, name="attention_norm")
        ffn_norm = norms.Norm(c.norm, name="ffn_norm")
        if c.norm_place == "post":
            h_tnd = attention_norm(self._attend(x_tnd, rows) + x_tnd[:rows])
            return ffn_norm(self._feed(h_tnd) + h_tnd)
        h_tnd = self._attend(attention_norm(x_tnd), rows) + x_tnd[:rows]
        return self._feed(ffn_norm(h_tnd)) + h_tnd

    def _attend(self, x_tnd: jax.Array, rows: int | None) -> jax.Array:
        c = self.config
        q, v = c.head_widths
        attention = feature_attention.FeatureAttention(
            *(c.heads, q, v, q**-0.5, c.init, c.dtype), name="attention"
        )
        out = self._dense("attention_out", c.width, use_bias=False, residual_layers=c.layers)
        return out(attention(x_tnd[:rows], x_tnd))

    def _feed(self, x_tnd: jax.Array) -> jax.Array:
        c = self.config
        hidden = self._dense("ffn_in", c.expansion * c.width)
        out = self._dense("ffn_out", c.width, residual_layers=c.layers)
        return out(activations.gelu(hidden(x_tnd)))

    def _dense(
        self, name: str, features: int, *, use_bias: bool = True, residual_layers: int = 0
    ) -> nn.Dense:
        c = self.config
        init = initializers.kernel(c.init, residual_layers=residual_layers)
        return nn.Dense(features, use_bias, dtype=c.dtype, kernel_init=init, name=name)


class Transformer(nn.Module):
    """Tokenizer, task tokens, L blocks, and a linear head that reads task tokens or the mean."""

    config: Config
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Features -> (logits [R, C, K], float32, {}).

        Raises ValueError for window samples, and where the schema does not fit `tokens`.
        """
        features.require_one_time("transformer")
        c = self.config
        R, C = features.candidate_sample.shape
        pooled = history_pooling.HistoryPooling(
            c.pooling, c.attention_hidden, c.attention_activation, c.init, c.dtype, name="history"
        )(features)
        x_tnd = tokenizers.Tokenizer(
            c.tokenizer, c.tokens, c.width, c.tokenizer_hidden, c.init, c.dtype, name="tokenizer"
        )(inputs.collect(features, pooled))
        by_task = c.readout == "task"
        if by_task:
            x_tnd = tokenizers.TaskTokens(c.tasks, name="task_tokens")(x_tnd)
        rows = [None] * (c.layers - 1) + [c.tasks if by_task and c.prune_last else None]
        make = lambda name, rows: Block(c, name=name)
        call = lambda block, rows, x_tnd: block(x_tnd, rows)
        x_tnd = stack.run(self.compute, "block", rows, make, call, x_tnd)
        x_tnd = x_tnd[: c.tasks] if by_task else x_tnd
        if c.norm_place == "pre":
            x_tnd = norms.Norm(c.norm, name="out_norm")(x_tnd)
        if by_task:
            logits_nk = task_heads.OwnVector(kernel_init=c.init, name="heads")(x_tnd)
            return logits_nk.reshape(R, C, c.tasks), {}
        x_rcd = x_tnd.mean(axis=0).reshape(R, C, c.width)
        return task_heads.Linear(c.tasks, c.init, name="heads")(x_rcd), {}
