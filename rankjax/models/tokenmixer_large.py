"""TokenMixer-Large: RankMixer that mixes, and reverts what it mixed (arXiv 2602.06563).

Features -> inputs -> T - 1 group tokens and one global token -> L blocks -> global token -> logits

A block: X <- X + revert(SwiGLU(mix(norm(X)))), X <- X + SwiGLU(norm(X)), every token, mixed or not,
with a SwiGLU of its own; every s blocks the stream of s blocks before is added; heads at chosen
depths train only. The last block computes what the global token reads of it: all gates and ups of
its first half, but 1 / T of the columns of their downs and one token of its second half; exact.

Parameters of a block, exactly, with hidden width F = nD: 2 T (3 D F + 2 F + D) and two norms; with
X experts, each of F / X: 2 T (3 D F + 2 F + X D + (X - 1) (D + 1)) and two norms.
"""

import dataclasses
from typing import Any, ClassVar

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

DOWN_STD = 0.01  # at which the experts' down matrices start
AUX_WEIGHT = 0.1  # lambda of the heads between the blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of TokenMixer-Large; the paper's form is the default.

    tokens: T, the global token included; None = one more than the tokenizer makes of the schema.
    experts: X, into which every SwiGLU is cut; 1 = dense. active: how many of them a token uses,
      the shared one and the active - 1 with the largest scores; at least 3, since the softmax over
      one score is 1 whatever the router says, and would never teach it.
    routed_scale: alpha, times the routed experts' sum; None = experts / active, which is the
      paper's 2 at 1:2 and 4 at 1:4.
    inter_residual: s, the paper's 2 or 3; 0 = without.
    aux_layers: after which blocks, 1 .. layers - 1, a head reads the global token in training;
      None = wherever a residual of s blocks arrives.
    tokenizer_hidden: of the tokenizer's MLPs and the global token's; None = width, 0 = linear.
    prune_last: the last block computes only what the global token reads; exact.
    """

    tokens: int | None = None  # T
    layers: int = 2  # L
    width: int = 64  # D, a multiple of T
    expansion: int = 2  # n: a SwiGLU is nD wide
    experts: int = 1  # X
    active: int = 1
    routed_scale: float | None = None  # alpha
    inter_residual: int = 2  # s
    aux_layers: tuple[int, ...] | None = None
    tokenizer: str = "group"  # see layers/tokenizers.py
    tokenizer_hidden: int | None = None
    pooling: tuple[str, ...] = ("mean",)  # of the history: "mean", "target", or both
    attention_hidden: tuple[int, ...] = (36,)  # of target attention
    attention_activation: str = "sigmoid"  # or "dice"
    norm: str = "rms"
    norm_place: str = "pre"  # "pre" adds one norm before each head
    init: str = "lecun"
    prune_last: bool = True
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32

    axes: ClassVar[dict[str, str]] = {"T": "tokens", "L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = (
        "the L blocks, all tokens of all of them, without tokenizer and heads; FLOPs per candidate,"
        " of the active experts"
    )

    def __post_init__(self) -> None:
        where = "tokenmixer_large.Config"
        for name in ("aux_layers", "pooling", "attention_hidden"):  # JSON has no tuples
            object.__setattr__(self, name, checks.as_tuple(getattr(self, name)))
        sizes = ("layers", "width", "expansion", "experts", "active", "tasks")
        checks.at_least(where, 1, **{name: getattr(self, name) for name in sizes})
        checks.at_least(where, 0, inter_residual=self.inter_residual)
        if self.tokenizer_hidden is not None:
            checks.at_least(where, 0, tokenizer_hidden=self.tokenizer_hidden)
        if self.tokens is not None:
            checks.at_least(where, 2, tokens=self.tokens)
            mixing.check(where, self.tokens, self.width)
        tokenizers.check(where, self.tokenizer, self.tokens and self.tokens - 1)
        checks.flags(where, self)
        self._check_experts(where)
        self._check_aux_layers(where)
        history_pooling.check(where, self.pooling, self.attention_hidden, self.attention_activation)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)

    def _check_experts(self, where: str) -> None:
        least = 3 if self.experts > 1 else 1
        if not least <= self.active <= self.experts:
            raise ValueError(
                f"{where}: active={self.active}, expected {least} .. {max(self.experts, least)} "
                f"with experts={self.experts}: the shared one and at least two whose scores compete"
            )
        if self.expansion * self.width % self.experts:
            raise ValueError(
                f"{where}: experts={self.experts}, expected a divisor of expansion * width = "
                f"{self.expansion * self.width}, which is cut into them"
            )
        if self.routed_scale is not None and not self.routed_scale > 0:
            raise ValueError(f"{where}: routed_scale={self.routed_scale}, expected > 0 or None")

    def _check_aux_layers(self, where: str) -> None:
        if self.aux_layers is None:
            return
        depths = self.aux_layers
        allowed = set(range(1, self.layers))
        if not isinstance(depths, tuple) or len(set(depths) & allowed) < len(depths):
            raise ValueError(
                f"{where}: aux_layers={depths!r}, expected different depths in 1 .. "
                f"{self.layers - 1} (layers={self.layers}), or None"
            )

    @property
    def depths(self) -> tuple[int, ...]:
        """After which blocks an auxiliary head reads."""
        if self.aux_layers is not None:
            return self.aux_layers
        s = self.inter_residual
        return tuple(range(s, self.layers, s)) if s else ()

    @property
    def alpha(self) -> float:
        return self.experts / self.active if self.routed_scale is None else self.routed_scale

    def _params(self, experts: int) -> int | None:
        if self.tokens is None:
            return None
        T, L, D, X = self.tokens, self.layers, self.width, self.experts
        F = self.expansion * D // X  # of one expert
        ffn = experts * (3 * D * F + 2 * F + D) + (X - 1) * (D + 1)
        return L * (2 * T * ffn + 2 * norms.parameters(self.norm, D))

    def paper_params(self) -> int | None:
        """L (2 T (3 n D^2 + 2 n D + D) + 2 D) where dense; None where the data decide T.

        With experts L (2 T (3 n D^2 + 2 n D + X D + (X - 1) (D + 1)) + 2 D).
        """
        return self._params(self.experts)

    def active_params(self) -> int | None:
        """Those of the paper's scope that one candidate uses: `active` experts, all routers."""
        return self._params(self.active)

    def paper_flops(self) -> float | None:
        """12 n L T D^2 per candidate, all rows of all blocks; None where the data decide T.

        With experts that share of it which is active, and 4 L T D (X - 1) for the routers.
        """
        if self.tokens is None:
            return None
        T, L, D, n, X = self.tokens, self.layers, self.width, self.expansion, self.experts
        return 4.0 * L * T * D * (3 * n * D * self.active / X + X - 1)


# The paper prints parameters and FLOPs of these, and not how T, D, L and n make them up.
TOKENMIXER_LARGE_500M = Config(tokens=16, width=768, layers=3, expansion=3, inter_residual=3)
TOKENMIXER_LARGE_4B = Config(tokens=16, width=1536, layers=6, expansion=3, inter_residual=3)
TOKENMIXER_LARGE_7B = Config(tokens=16, width=1536, layers=8, expansion=4)
TOKENMIXER_LARGE_4B_SPARSE = dataclasses.replace(TOKENMIXER_LARGE_4B, experts=8, active=4)

_CHOSEN = (
    "all: chosen so that the blocks come near the printed parameters; D, L and n grow together"
)


def _figures(size: str, config: Config, params: float, flops: float) -> tuple[papers.Figure, ...]:
    where = "offline comparison of the models"
    return (
        papers.Figure(
            what=f"parameters of TokenMixer-Large {size}",
            printed=params,
            ours=config.paper_params,
            where=where,
            tolerance=0.1,
        ),
        papers.Figure(
            what=f"FLOPs of TokenMixer-Large {size}",
            printed=flops,
            ours=config.paper_flops,
            where=where,
            tolerance=None,
            per_batch=True,
        ),
    )


PAPER = papers.Paper(
    title="TokenMixer-Large: Scaling Up Large Ranking Models in Industrial Recommenders",
    arxiv="2602.06563",
    evidence="read in extracts: equations, ablation and main table, not the sizes behind them",
    sizes={
        "tokenmixer_large_500m": papers.Size(config=TOKENMIXER_LARGE_500M, chosen=_CHOSEN),
        "tokenmixer_large_4b": papers.Size(config=TOKENMIXER_LARGE_4B, chosen=_CHOSEN),
        "tokenmixer_large_7b": papers.Size(config=TOKENMIXER_LARGE_7B, chosen=_CHOSEN),
        "tokenmixer_large_4b_sparse": papers.Size(
            config=TOKENMIXER_LARGE_4B_SPARSE,
            chosen=_CHOSEN + "; 8 experts, of which 4, the shared one included, make its 1:2",
        ),
    },
    figures=(
        *_figures("500M", TOKENMIXER_LARGE_500M, 501e6, 4.2e12),
        *_figures("4B", TOKENMIXER_LARGE_4B, 4e9, 29.8e12),
        *_figures("7B", TOKENMIXER_LARGE_7B, 7e9, 49.0e12),
        papers.Figure(
            what="active parameters of the 4B 1:2 MoE",
            printed=2.3e9,
            ours=TOKENMIXER_LARGE_4B_SPARSE.active_params,
            where="offline comparison of the models",
            tolerance=None,
            note="half of our 4B; the paper's 2.3B also holds what is no expert, which ours leaves "
            "out",
        ),
        papers.Figure(
            what="FLOPs of the 4B 1:2 MoE as a share of the dense 4B's",
            printed=15.1 / 29.8,
            ours=lambda: (
                TOKENMIXER_LARGE_4B_SPARSE.paper_flops() / TOKENMIXER_LARGE_4B.paper_flops()
            ),
            where="offline comparison of the models",
            tolerance=0.02,
        ),
    ),
    leaves_open=(
        ("where the global token stands", "it is token 0"),
        ("the width of the MLPs that make the tokens", "one ReLU layer of width D"),
        ("whether a norm stands before the head", "one, as pre-norm blocks leave the stream plain"),
        ("at which depths auxiliary heads read", "where the residuals of s blocks arrive"),
        (
            "what an auxiliary head reads",
            "the global token, through a norm and a linear layer of its own, both only in training",
        ),
        ("lambda of the auxiliary heads", f"{AUX_WEIGHT}, TrainConfig.aux_weights changes it"),
        (
            "whether the shared expert is one of those that the SwiGLU is cut into",
            "it is, so that 1:2 halves the experts' FLOPs (printed: 15.1T of 29.8T)",
        ),
        (
            "what a router is",
            "one linear layer with a bias for each token, computed in float32; no term balances "
            "the experts",
        ),
        (
            "whether the small start of the down matrices is for dense blocks too",
            f"normals of {DOWN_STD} for experts only; dense ones start as `init` says",
        ),
    ),
    deviations=(
        (
            "all experts are computed, and gates of 0 multiply what was not chosen",
            "exact and one matrix product per token; it saves no FLOPs in training or serving, "
            "paper_flops counts the active ones as the paper does",
        ),
        (
            "at least two routed experts are active",
            "the softmax over the single largest score is 1, and no gradient reaches its router",
        ),
    ),
)


class Block(nn.Module):
    """x' = x + revert(SwiGLU(mix(norm(x)))), y = x' + SwiGLU(norm(x')); "post" norms the sums.

    Called with x [T, N, D] in the config's dtype; returns the same, or with global_only its first
    row [1, N, D], computed from the columns that revert into token 0.
    Parameters, float32: two SwiGLUs for each token, of nD or of X experts of nD / X with a router,
    and two norms whose scales all tokens share.
    """

    config: Config

    @nn.compact
    def __call__(self, x_tnd: jax.Array, global_only: bool = False) -> jax.Array:
        c = self.config
        T, _, D = x_tnd.shape
        mix_norm, token_norm = norms.Norm(c.norm, name="mix_norm"), norms.Norm(c.norm, name="norm")
        mixed, own = self._ffn("mixed", T, D), self._ffn("own", T, D)
        first = D // T if global_only else D
        kept_tnd = x_tnd[:1] if global_only else x_tnd
        if c.norm_place == "pre":
            m_tnw = mixed(mixing.mix(mix_norm(x_tnd)), first)
            x_tnd = mixing.revert(m_tnw, D) + kept_tnd
            return own(token_norm(x_tnd)) + x_tnd
        x_tnd = mix_norm(mixing.revert(mixed(mixing.mix(x_tnd), first), D) + kept_tnd)
        return token_norm(own(x_tnd) + x_tnd)

    def _ffn(self, name: str, T: int, D: int) -> nn.Module:
        c = self.config
        F = c.expansion * D // c.experts
        if c.experts == 1:
            return per_token.SwiGLU(F, c.dtype, c.init, c.layers, T, name=name)
        sizes = (c.experts, c.active, F, c.alpha)
        options = (c.dtype, c.init, c.layers, DOWN_STD, T)
        return mixture.SwiGLUExperts(*sizes, *options, name=name)


class TokenMixerLarge(nn.Module):
    """Group tokens and a global one, L blocks, one linear head on the global token."""

    config: Config
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, auxiliary.Logits]]:
        """Features -> (logits [R, C, K], float32, {"layer_<l>": auxiliary logits} in training).

        Raises ValueError for window samples, and where the schema does not fit tokens or width.
        """
        features.require_one_time("tokenmixer_large")
        c = self.config
        x_tnd = self._tokens(features)

        def head(x_nd: jax.Array, norm: str, name: str) -> jax.Array:
            if c.norm_place == "pre":
                x_nd = norms.Norm(c.norm, name=norm)(x_nd)
            x_rcd = x_nd.reshape(*features.candidate_sample.shape, c.width)
            return task_heads.Linear(c.tasks, c.init, name=name)(x_rcd)

        def call(block: Block, kind: tuple[bool, bool], carry: tuple[jax.Array, jax.Array]) -> Any:
            (pruned, arrives), (x_tnd, earlier_tnd) = kind, carry
            x_tnd = block(x_tnd, pruned)
            if arrives:
                x_tnd = x_tnd + earlier_tnd[: len(x_tnd)]
                earlier_tnd = x_tnd
            return (x_tnd, earlier_tnd), x_tnd[0] if train and c.depths else None

        L, s = c.layers, c.inter_residual
        kinds = [(c.prune_last and n == L, bool(s) and n % s == 0) for n in range(1, L + 1)]
        make = lambda name, _: Block(c, name=name)
        # Beside X^l goes X^(l - s), which arrives every s blocks.
        (x_tnd, _), global_lnd = stack.collect(
            self.compute, "block", kinds, make, call, (x_tnd, x_tnd)
        )
        aux = {}
        for layer in c.depths if train else ():
            logits_rck = head(global_lnd[layer - 1], f"aux_norm_{layer}", f"aux_heads_{layer}")
            aux[f"layer_{layer}"] = auxiliary.Logits(logits_rck, weight=AUX_WEIGHT)
        return head(x_tnd[0], "out_norm", "heads"), aux

    def _tokens(self, features: Features) -> jax.Array:
        """[T, N, D], the global token first: an MLP on all inputs side by side."""
        c = self.config
        hidden = c.width if c.tokenizer_hidden is None else c.tokenizer_hidden
        pooled = history_pooling.HistoryPooling(
            c.pooling, c.attention_hidden, c.attention_activation, c.init, c.dtype, name="history"
        )(features)
        found = inputs.collect(features, pooled)

        def tokens(kind: str, count: int | None, name: str) -> jax.Array:
            options = (c.width, hidden, c.init, c.dtype)
            return tokenizers.Tokenizer(kind, count, *options, name=name)(found)

        if c.tokenizer in tokenizers.FROM_DATA:
            T = tokenizers.count(c.tokenizer, found, None) + 1
            if c.tokens not in (None, T):
                raise ValueError(
                    f"tokenmixer_large: tokens={c.tokens}, but tokenizer={c.tokenizer!r} makes "
                    f"{T - 1} tokens of this schema and pooling, and the global token is one more; "
                    f"set tokens={T} or tokens=None"
                )
        else:
            T = c.tokens
        mixing.check("tokenmixer_large", T, c.width)  # T may come from the data
        own_tnd = tokens(c.tokenizer, T - 1, "tokenizer")
        return jnp.concatenate([tokens("auto_split", 1, "global"), own_tnd])
