"""RankMixer: mix tokens by a transpose, then one feed-forward per token (arXiv 2507.15551).

Features -> inputs -> T tokens (even split) -> L blocks -> mean over tokens -> logits

With X > 1 experts (sparse MoE) a token's feed-forward is sum_j G_j e_j(s) over X of the dense form,
gates G = ReLU(h(s)), and the loss gets lambda times the sum of the gates, lambda moving until the
share of gates > 0 meets `active_share`. dtsi (dense training, sparse inference): two routers, both
trained; the sum of gates is taken of h_infer's only, and only h_infer scores.

Parameters of a block, exactly: T (2 k D^2 + k D + D) and two norms; with experts
T (X (2 k D^2 + k D + D) + routers X (D + 1)) and two norms.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax import papers
from rankjax.batch import Features
from rankjax.layers import (
    auxiliary,
    checks,
    history_pooling,
    initializers,
    inputs,
    mixing,
    mixture,
    norms,
    per_token,
    stack,
    task_heads,
    tokenizers,
)

GATE_WEIGHT = 1e-3  # lambda at the start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    tokens: int | None = 8  # T; None: as many as the tokenizer makes of the schema
    layers: int = 2  # L
    width: int = 64  # D, a multiple of T
    expansion: int = 4  # k: a token's feed-forward is kD wide; the paper does not print it
    experts: int = 1  # X: feed-forwards of each token; 1 = dense, without router
    active_share: float = 0.5  # of experts > 1: which share of the gates shall be > 0
    dtsi: bool = True  # of experts > 1: a router for training beside the one that scores
    tokenizer: str = "even_split"  # the paper's; see layers/tokenizers.py
    tokenizer_hidden: int = 0  # of "group" and "auto_split"; 0 = linear
    pooling: tuple[str, ...] = ("mean",)  # of the history: "mean", "target", or both
    attention_hidden: tuple[int, ...] = (36,)  # of target attention
    attention_activation: str = "sigmoid"  # or "dice"
    norm: str = "layer"
    norm_place: str = "post"  # the paper's; "pre" adds one norm before the mean over tokens
    init: str = "lecun"
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32

    axes: ClassVar[dict[str, str]] = {"T": "tokens", "L": "layers", "D": "width"}
    newer: ClassVar[tuple[str, ...]] = ("experts", "active_share", "dtsi")  # than studies
    paper_scope: ClassVar[str] = (
        "the L blocks with all experts, without tokenizer and heads; FLOPs per candidate"
    )

    def __post_init__(self) -> None:
        where = "rankmixer.Config"
        for name in ("pooling", "attention_hidden"):  # JSON has no tuples
            object.__setattr__(self, name, checks.as_tuple(getattr(self, name)))
        checks.at_least(
            where,
            1,
            layers=self.layers,
            width=self.width,
            expansion=self.expansion,
            experts=self.experts,
            tasks=self.tasks,
        )
        checks.at_least(where, 0, tokenizer_hidden=self.tokenizer_hidden)
        checks.share(where, active_share=self.active_share)
        checks.flags(where, self)
        tokenizers.check(where, self.tokenizer, self.tokens)
        if self.tokens is not None:
            mixing.check(where, self.tokens, self.width)
        history_pooling.check(where, self.pooling, self.attention_hidden, self.attention_activation)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)

    def paper_params(self) -> int | None:
        """L (T (2 k D^2 + k D + D) + 4 D): exact for the blocks; None where the data decide T.

        With experts L (T X (2 k D^2 + k D + D + routers (D + 1)) + 4 D), both routers counted.
        """
        if self.tokens is None:
            return None
        T, L, D, k, X = self.tokens, self.layers, self.width, self.expansion, self.experts
        routers = (1 + self.dtsi) * (X > 1)
        ffn = T * X * (2 * k * D * D + k * D + D + routers * (D + 1))
        return L * (ffn + 2 * norms.parameters(self.norm, D))

    def paper_flops(self) -> float | None:
        """4 k L T D^2 per candidate: the matrices of the blocks; None where the data decide T.

        With experts 4 X L T D (k D + 1): all of them, the router that scores, and the biases
        under their gates.
        """
        if self.tokens is None:
            return None
        T, L, D, k, X = self.tokens, self.layers, self.width, self.expansion, self.experts
        return 4.0 * X * L * T * D * (k * D + (X > 1))


# The paper prints T, D and L of these two and 107M and 1.1B parameters; k is chosen to come
# nearest: 113M and 1.21B in the blocks.
RANKMIXER_100M = Config(tokens=16, width=768, layers=2, expansion=3)  # expansion: chosen
RANKMIXER_1B = Config(tokens=32, width=1536, layers=2, expansion=4)  # expansion: chosen

PAPER = papers.Paper(
    title="RankMixer: Scaling Up Ranking Models in Industrial Recommenders",
    arxiv="2507.15551",
    sizes={
        "rankmixer_100m": papers.Size(
            config=RANKMIXER_100M,
            chosen="expansion: not printed; 3, whose blocks come nearest to 107M parameters",
        ),
        "rankmixer_1b": papers.Size(
            config=RANKMIXER_1B,
            chosen="expansion: not printed; 4, whose blocks come nearest to 1.1B parameters",
        ),
    },
    figures=(
        papers.Figure(
            what="parameters of RankMixer-100M",
            printed=107e6,
            ours=lambda: RANKMIXER_100M.paper_params(),
            where="comparison of the models",
            tolerance=0.1,
        ),
        papers.Figure(
            what="parameters of RankMixer-1B",
            printed=1.1e9,
            ours=lambda: RANKMIXER_1B.paper_params(),
            where="comparison of the models",
            tolerance=0.1,
        ),
        papers.Figure(
            what="FLOPs of RankMixer-100M",
            printed=233e9,
            ours=lambda: RANKMIXER_100M.paper_flops(),
            where="comparison of the models",
            tolerance=None,
            per_batch=True,
        ),
        papers.Figure(
            what="FLOPs of RankMixer-1B",
            printed=2.1e12,
            ours=lambda: RANKMIXER_1B.paper_flops(),
            where="comparison of the models",
            tolerance=None,
            per_batch=True,
        ),
    ),
    leaves_open=(
        ("the expansion k of the feed-forward", "a field, 4 by default"),
        ("how wide an expert is", "as the dense feed-forward, kD: X experts have X times its size"),
        (
            "what a router is",
            "one linear layer with a bias for each token, [D, X], computed in float32",
        ),
        (
            "how both routers of DTSI get the gradient of the task",
            "in training the blocks run once under each router, with the same experts; the logits "
            "are h_infer's, as served, and the auxiliary term `dense_router` adds the loss of "
            "h_train's at weight 1, which also gives every expert a denser gradient",
        ),
        (
            "over what the sum of gates is taken, and how lambda moves",
            "the mean over valid candidates, tokens and layers of a token's sum, the term "
            f"`experts`; lambda starts at {GATE_WEIGHT} and a step multiplies or divides it by "
            "1.01 (loss.ADAPT), as the share of gates > 0 is above or below the budget",
        ),
        ("how the history enters", "pooled: mean, or DIN's target attention"),
    ),
    deviations=(
        (
            "all experts are computed, and gates of 0 multiply what was not chosen",
            "exact and one matrix product per token; FLOPs count all of them, so that sparsity "
            "shows in quality at equal active size, not in time",
        ),
    ),
)


class Block(nn.Module):
    """Post-norm: s = norm(mix(x) + x), y = norm(PFFN(s) + s). Pre-norm: s = mix(norm(x)) + x, ...

    Called with x [T, N, D] in the config's dtype and, where there are experts, the router to ask,
    "router" (h_infer) or "router_train"; returns (y [T, N, D], gates [T, N, X] float32, None where
    dense).
    Parameters, float32: T (2 k D^2 + k D + D), or with experts X times that and T X (D + 1) for
    each router that was ever asked; and two norms whose affine pairs all tokens share.
    """

    config: Config

    @nn.compact
    def __call__(
        self, x_tnd: jax.Array, router: str = "router"
    ) -> tuple[jax.Array, jax.Array | None]:
        c = self.config
        mix_norm = norms.Norm(c.norm, name="mix_norm")
        ffn_norm = norms.Norm(c.norm, name="ffn_norm")
        if c.norm_place == "post":
            s_tnd = mix_norm(mixing.mix(x_tnd) + x_tnd)
            y_tnd, gate_tnx = self._feed_forward(s_tnd, router)
            return ffn_norm(y_tnd + s_tnd), gate_tnx
        s_tnd = mixing.mix(mix_norm(x_tnd)) + x_tnd
        y_tnd, gate_tnx = self._feed_forward(ffn_norm(s_tnd), router)
        return y_tnd + s_tnd, gate_tnx

    def _feed_forward(self, s_tnd: jax.Array, router: str) -> tuple[jax.Array, jax.Array | None]:
        c = self.config
        options = (c.expansion, c.dtype, c.init, c.layers)
        if c.experts == 1:
            return per_token.FeedForward(*options, name="ffn")(s_tnd), None
        # float32, so that the gates' zeros, and their share, do not hang on a rounding.
        scores = per_token.Dense(c.experts, "float32", c.init, name=router)
        gate_tnx = nn.relu(scores(s_tnd))
        return mixture.FeedForwardExperts(*options, name="ffn")(s_tnd, gate_tnx), gate_tnx


class RankMixer(nn.Module):
    """Tokenizer, L blocks, mean over tokens, one linear head for all tasks."""

    config: Config
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, auxiliary.Logits | auxiliary.Penalty]]:
        """Features -> (logits [R, C, K], float32, auxiliary terms).

        Terms, only in training and only with experts: "experts", the sum of the gates, and with
        dtsi "dense_router", the logits under the router that only training asks.
        Raises ValueError for window samples, and where the schema does not fit tokens or width.
        """
        features.require_one_time("rankmixer")
        c = self.config
        pooled = history_pooling.HistoryPooling(
            c.pooling, c.attention_hidden, c.attention_activation, c.init, c.dtype, name="history"
        )(features)
        x_tnd = tokenizers.Tokenizer(
            c.tokenizer, c.tokens, c.width, c.tokenizer_hidden, c.init, c.dtype, name="tokenizer"
        )(inputs.collect(features, pooled))
        mixing.check("rankmixer", len(x_tnd), c.width)  # T may come from the data
        make = functools.cache(lambda name, _: Block(c, name=name))  # the blocks of both routers
        out_norm = norms.Norm(c.norm, name="out_norm") if c.norm_place == "pre" else lambda x: x
        heads = task_heads.Linear(c.tasks, c.init, name="heads")

        def logits(x_tnd: jax.Array, router: str) -> tuple[jax.Array, jax.Array | None]:
            call = lambda block, _, x_tnd: block(x_tnd, router)
            x_tnd, gate_ltnx = stack.collect(
                self.compute, "block", [None] * c.layers, make, call, x_tnd
            )
            x_nd = out_norm(x_tnd).mean(axis=0)
            return heads(x_nd.reshape(*features.candidate_sample.shape, c.width)), gate_ltnx

        logits_rck, gate_ltnx = logits(x_tnd, "router")
        aux = {}
        if train and c.experts > 1:
            aux["experts"] = _usage(gate_ltnx, features.candidate_mask.reshape(-1), c.active_share)
            if c.dtsi:
                aux["dense_router"] = auxiliary.Logits(logits(x_tnd, "router_train")[0])
        return logits_rck, aux


def _usage(gate_ltnx: jax.Array, valid_n: jax.Array, target: float) -> auxiliary.Penalty:
    """Mean over valid candidates, tokens and layers of sum_j G_j, and the share of G_j > 0."""
    weight_n = valid_n / jnp.maximum(valid_n.sum(), 1)
    return auxiliary.Penalty(
        value=(gate_ltnx.sum(axis=-1).mean(axis=(0, 1)) * weight_n).sum(),
        weight=GATE_WEIGHT,
        measured=((gate_ltnx > 0).mean(axis=(0, 1, 3)) * weight_n).sum(),
        target=target,
    )
