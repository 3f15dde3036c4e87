"""RankMixer: mix tokens by a transpose, then one feed-forward per token (arXiv 2507.15551).

Features -> inputs -> T tokens (even split) -> L blocks -> mean over tokens -> logits
"""

import dataclasses
from typing import ClassVar

import jax
from flax import linen as nn

from rankjax.batch import Features
from rankjax.layers import (
    checks,
    history_pooling,
    initializers,
    inputs,
    norms,
    per_token,
    task_heads,
    tokenizers,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    tokens: int | None = 8  # T; None: as many as the tokenizer makes of the schema
    layers: int = 2  # L
    width: int = 64  # D, a multiple of T
    expansion: int = 4  # k: a token's feed-forward is kD wide; the paper does not print it
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
    paper_scope: ClassVar[str] = "the L blocks, without tokenizer and heads; FLOPs per candidate"

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
            tasks=self.tasks,
        )
        checks.at_least(where, 0, tokenizer_hidden=self.tokenizer_hidden)
        tokenizers.check(where, self.tokenizer, self.tokens)
        if self.tokens is not None:
            _check_slices(self.tokens, self.width)
        history_pooling.check(where, self.pooling, self.attention_hidden, self.attention_activation)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)

    def paper_params(self) -> int | None:
        """L (T (2 k D^2 + k D + D) + 4 D): exact for the blocks; None where the data decide T."""
        if self.tokens is None:
            return None
        T, L, D, k = self.tokens, self.layers, self.width, self.expansion
        return L * (T * (2 * k * D * D + k * D + D) + 2 * norms.parameters(self.norm, D))

    def paper_flops(self) -> float | None:
        """4 k L T D^2 per candidate: the matrices of the blocks; None where the data decide T."""
        if self.tokens is None:
            return None
        return 4.0 * self.expansion * self.layers * self.tokens * self.width**2


def _check_slices(tokens: int, width: int) -> None:
    if width % tokens:
        raise ValueError(
            f"rankmixer.Config: width={width} is no multiple of tokens={tokens}; mixing cuts every "
            f"token into T slices. Nearest widths: {width - width % tokens or tokens} and "
            f"{width + -width % tokens}"
        )


# The paper prints T, D and L of these two and 107M and 1.1B parameters; k is chosen to come
# nearest: 113M and 1.21B in the blocks.
RANKMIXER_100M = Config(tokens=16, width=768, layers=2, expansion=3)  # expansion: chosen
RANKMIXER_1B = Config(tokens=32, width=1536, layers=2, expansion=4)  # expansion: chosen


def mix_tokens(x_tnd: jax.Array) -> jax.Array:
    """New token h = slice h of every old token, concatenated (H = T): [T, N, D] -> [T, N, D].

    A transpose of T x T blocks, and so its own inverse; without parameters.
    """
    T, N, D = x_tnd.shape
    return x_tnd.reshape(T, N, T, D // T).swapaxes(0, 2).reshape(T, N, D)


class Block(nn.Module):
    """Post-norm: s = norm(mix(x) + x), y = norm(PFFN(s) + s). Pre-norm: s = mix(norm(x)) + x, ...

    Called with x [T, N, D] in the config's dtype; returns the same.
    Parameters, float32: T (2 k D^2 + k D + D), and two norms whose affine pairs all tokens share.
    """

    config: Config

    @nn.compact
    def __call__(self, x_tnd: jax.Array) -> jax.Array:
        c = self.config
        mix_norm = norms.Norm(c.norm, name="mix_norm")
        ffn_norm = norms.Norm(c.norm, name="ffn_norm")
        ffn = per_token.FeedForward(c.expansion, c.dtype, c.init, c.layers, name="ffn")
        if c.norm_place == "post":
            s_tnd = mix_norm(mix_tokens(x_tnd) + x_tnd)
            return ffn_norm(ffn(s_tnd) + s_tnd)
        s_tnd = mix_tokens(mix_norm(x_tnd)) + x_tnd
        return ffn(ffn_norm(s_tnd)) + s_tnd


class RankMixer(nn.Module):
    """The dense RankMixer: tokenizer, L blocks, mean over tokens, one linear head for all tasks."""

    config: Config
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Features -> (logits [R, C, K], float32, {}).

        Raises ValueError for window samples, and where the schema does not fit tokens or width.
        """
        features.require_one_time("rankmixer")
        c = self.config
        R, C = features.candidate_sample.shape
        pooled = history_pooling.HistoryPooling(
            c.pooling, c.attention_hidden, c.attention_activation, c.init, c.dtype, name="history"
        )(features)
        x_tnd = tokenizers.Tokenizer(
            c.tokenizer, c.tokens, c.width, c.tokenizer_hidden, c.init, c.dtype, name="tokenizer"
        )(inputs.collect(features, pooled))
        _check_slices(len(x_tnd), c.width)  # T may come from the data
        for layer in range(c.layers):
            x_tnd = Block(c, name=f"block_{layer}")(x_tnd)
        if c.norm_place == "pre":
            x_tnd = norms.Norm(c.norm, name="out_norm")(x_tnd)
        x_rcd = x_tnd.mean(axis=0).reshape(R, C, c.width)
        return task_heads.Linear(c.tasks, c.init, name="heads")(x_rcd), {}
