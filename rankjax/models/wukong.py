"""Wukong: stacked factorization machines, each layer doubling the order of interactions.

Zhang et al., "Wukong: Towards a Scaling Law for Large-Scale Recommendation", arXiv 2403.02545.
Features -> inputs -> n tokens (one per feature) -> L layers -> concat -> MLP -> logits

A layer on X [n, D]: FMB = reshape(MLP(LN(flatten(X X^T Y)))) makes n_F tokens, LCB = W_L X makes
n_L, and X' = LN(concat(FMB, LCB) + X), X projected over tokens where n is not n_F + n_L.
Parameters of a layer, h the width and P the number of the MLP's hidden layers, k the rank:
  Y           n k; attentive: n k + (k D h + h) + (h n k + n k)
  FMB         (n k) h + h + (P - 1) (h^2 + h) + h n_F D + n_F D, and a norm over n k
  LCB         n n_L
  the rest    n (n_F + n_L) where n is not n_F + n_L, and a norm over D
The tokens behind the last layer, side by side, enter an MLP of M layers of width h: (n_F + n_L) D h
+ h + (M - 1) (h^2 + h), and the heads h K + K. All of them are read: no layer can be cut short.
Ours: X^T Y is taken first, so no [n, n] array exists; the MLP in FMB ends in a linear layer;
attentive Y = reshape(MLP(flatten(W_C X))), W_C X k tokens and one hidden layer of width h.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax import papers
from rankjax.batch import Features
from rankjax.layers import (
    checks,
    feed_forward,
    history_pooling,
    initializers,
    inputs,
    norms,
    stack,
    task_heads,
    tokenizers,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    tokens: int | None = None  # T, the n of the first layer; None: as many as the tokenizer makes
    layers: int = 2  # L (the paper's l)
    width: int = 32  # D (the paper's d), of a token
    fm_tokens: int | None = None  # n_F; None: half of what the layer reads, rounded up
    linear_tokens: int | None = None  # n_L; None: half of what the layer reads, rounded down
    rank: int = 8  # k, columns of Y
    attentive: bool = False  # Y is made of the tokens themselves
    hidden: int = 64  # h, of every MLP
    mlp_layers: int = 1  # P, hidden layers of the MLP in FMB
    top_layers: int = 1  # M, of the MLP before the heads
    tokenizer: str = "per_feature"  # the paper's; see layers/tokenizers.py
    tokenizer_hidden: int = 0  # of "group" and "auto_split"; 0 = linear
    pooling: tuple[str, ...] = ("mean",)  # of the history: "mean", "target", or both
    attention_hidden: tuple[int, ...] = (36,)  # of target attention over the history
    attention_activation: str = "sigmoid"  # or "dice"
    norm: str = "layer"
    norm_place: str = "post"  # the paper's; "pre": of what both blocks read, and one at the end
    init: str = "lecun"
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32

    axes: ClassVar[dict[str, str]] = {"T": "tokens", "L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = (
        "the L layers, without tokenizer, last MLP and heads; FLOPs per candidate"
    )

    def __post_init__(self) -> None:
        where = "wukong.Config"
        for name in ("pooling", "attention_hidden"):  # JSON has no tuples
            object.__setattr__(self, name, checks.as_tuple(getattr(self, name)))
        sizes = ("layers", "width", "rank", "hidden", "mlp_layers", "tasks")
        given = [n for n in ("fm_tokens", "linear_tokens") if getattr(self, n) is not None]
        checks.at_least(where, 1, **{name: getattr(self, name) for name in (*sizes, *given)})
        checks.at_least(
            where, 0, top_layers=self.top_layers, tokenizer_hidden=self.tokenizer_hidden
        )
        checks.flags(where, self)
        tokenizers.check(where, self.tokenizer, self.tokens)
        history_pooling.check(where, self.pooling, self.attention_hidden, self.attention_activation)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)

    def made_of(self, n: int) -> tuple[int, int]:
        """(n_F, n_L) of a layer that reads n tokens; each at least 1."""
        fm = n - n // 2 if self.fm_tokens is None else self.fm_tokens
        return fm, max(1, n // 2) if self.linear_tokens is None else self.linear_tokens

    def paper_params(self) -> int | None:
        """The sum over layers of the module docstring's; None where the data decide T."""
        return None if self.tokens is None else sum(map(self._layer_params, self.read(self.tokens)))

    def paper_flops(self) -> float | None:
        """The matrices of the layers; None where the data decide T."""
        return None if self.tokens is None else sum(map(self._layer_flops, self.read(self.tokens)))

    def read(self, tokens: int) -> list[int]:
        """How many tokens each layer reads, the first one `tokens`."""
        found = [tokens]
        while len(found) < self.layers:
            found.append(sum(self.made_of(found[-1])))
        return found

    def _layer_params(self, n: int) -> int:
        D, k, h, P = self.width, self.rank, self.hidden, self.mlp_layers
        fm, linear = self.made_of(n)
        y = n * k + (k * D * h + h + h * n * k + n * k if self.attentive else 0)
        mlp = n * k * h + h + (P - 1) * (h * h + h) + h * fm * D + fm * D
        residual = n * (fm + linear) if n != fm + linear else 0
        affine = norms.parameters(self.norm, n * k) + norms.parameters(self.norm, D)
        return y + mlp + n * linear + residual + affine

    def _layer_flops(self, n: int) -> float:
        """2 multiply-adds: X^T Y and X (X^T Y), the MLPs, and what mixes tokens."""
        D, k, h, P = self.width, self.rank, self.hidden, self.mlp_layers
        fm, linear = self.made_of(n)
        y = n * k * D + k * D * h + h * n * k if self.attentive else 0
        mlp = n * k * h + (P - 1) * h * h + h * fm * D
        mixed = linear + (fm + linear if n != fm + linear else 0)
        return 2.0 * (2 * n * k * D + y + mlp + n * D * mixed)


# Table 5, by GFLOP per example in training. The paper does not print n, so the data decide it.
def _table_5(layers: int, tokens: int, rank: int, hidden: int, attentive: bool = False) -> Config:
    return Config(
        **{"width": 160, "mlp_layers": 3, "attentive": attentive},
        **{"layers": layers, "rank": rank, "hidden": hidden},
        **{"fm_tokens": tokens, "linear_tokens": tokens},
    )


WUKONG_HALF_GFLOP = _table_5(2, 8, 24, 2048)
WUKONG_1_GFLOP = _table_5(4, 32, 24, 2048, attentive=True)
WUKONG_2_GFLOP = _table_5(8, 32, 24, 2048, attentive=True)
WUKONG_6_GFLOP = _table_5(8, 48, 48, 4096)
WUKONG_22_GFLOP = _table_5(8, 96, 96, 8192)
WUKONG_61_GFLOP = _table_5(8, 96, 96, 16384)
WUKONG_108_GFLOP = _table_5(8, 192, 192, 16384)


N = 720  # the features of the paper's internal data


def _difference(larger: Config, smaller: Config) -> int:
    """Parameters of one size more than of another; n cancels for equal rank and MLP."""
    return _at_720(larger).paper_params() - _at_720(smaller).paper_params()


def _at_720(config: Config) -> Config:
    """With as many tokens as the features of the paper's internal data."""
    return dataclasses.replace(config, tokens=N)


def _training_flops(printed: float, config: Config) -> papers.Figure:
    return papers.Figure(
        what=f"{printed / 1e9:g} GFLOP per example in training (3 x forward)",
        printed=printed,
        ours=lambda: 3 * _at_720(config).paper_flops(),
        where="table 5",
        tolerance=0.12,
        note="n = 720, the number of features; the paper does not print n.",
    )


_SIZES = {
    "wukong_half_gflop": WUKONG_HALF_GFLOP,
    "wukong_1_gflop": WUKONG_1_GFLOP,
    "wukong_2_gflop": WUKONG_2_GFLOP,
    "wukong_6_gflop": WUKONG_6_GFLOP,
    "wukong_22_gflop": WUKONG_22_GFLOP,
    "wukong_61_gflop": WUKONG_61_GFLOP,
    "wukong_108_gflop": WUKONG_108_GFLOP,
}
_CHOSEN = (
    "attentive: whichever comes nearer to the printed GFLOP at n = 720; top_layers: 1. The paper "
    "prints neither, nor n"
)

PAPER = papers.Paper(
    title="Wukong: Towards a Scaling Law for Large-Scale Recommendation",
    arxiv="2403.02545",
    sizes={
        name: papers.Size(config=config, chosen=_CHOSEN, tokens=N)
        for name, config in _SIZES.items()
    },
    figures=(
        papers.Figure(
            what="parameters of layers 5 to 8 (n_F = n_L = 32, k = 24, MLP 3 x 2048)",
            printed=627.95e9 - 627.82e9,
            ours=lambda: _difference(WUKONG_2_GFLOP, WUKONG_1_GFLOP),
            where="table 5",
            tolerance=0.08,  # the difference of two numbers printed to 0.01e9
            note="without an attentive Y 0.088e9.",
        ),
        papers.Figure(
            what="parameters from MLP 3 x 8192 to 3 x 16384 (l = 8, n_F = n_L = k = 96)",
            printed=636.99e9 - 630.96e9,
            ours=lambda: _difference(WUKONG_61_GFLOP, WUKONG_22_GFLOP),
            where="table 5",
            tolerance=0.05,
            note="n = 720, the number of features; the paper does not print n.",
        ),
        papers.Figure(
            what="parameters from n_F = n_L = k = 96 to 192 (l = 8, MLP 3 x 16384)",
            printed=644e9 - 636.99e9,
            ours=lambda: _difference(WUKONG_108_GFLOP, WUKONG_61_GFLOP),
            where="table 5",
            tolerance=None,
            note="layers 2 to 8 alone add 8.1e9, whatever n is; the printed GFLOP fit ours better.",
        ),
        dataclasses.replace(
            _training_flops(0.53e9, WUKONG_HALF_GFLOP),
            tolerance=None,
            note="so small a stack that what stands around it counts: with an attentive Y 0.73e9.",
        ),
        _training_flops(1.25e9, WUKONG_1_GFLOP),
        _training_flops(2.12e9, WUKONG_2_GFLOP),
        _training_flops(5.6e9, WUKONG_6_GFLOP),
        _training_flops(22.23e9, WUKONG_22_GFLOP),
        _training_flops(61e9, WUKONG_61_GFLOP),
        _training_flops(108e9, WUKONG_108_GFLOP),
    ),
    leaves_open=(
        (
            "the attentive Y's network",
            "k tokens W_C X, flattened, one hidden ReLU layer of width h",
        ),
        ("what ends the MLP in FMB", "a linear layer to n_F D, behind P hidden ReLU layers"),
        ("the last MLP", "M layers of width h over all tokens side by side"),
        ("biases of W_L and of the residual's projection", "none"),
    ),
    deviations=(
        (
            "every input is one token of width D",
            "the paper gives important features several embeddings and groups small ones",
        ),
        ("dense features are one linear layer each", "the tokenizers are shared by all models"),
    ),
)


class Compress(nn.Module):
    """y_m = sum over tokens t of W_tm x_t: [T, N, D] in the config's dtype -> [tokens, N, D].

    Parameters, float32: kernel [T, tokens], no bias.
    residual_layers: L where the output is added to a residual stream of L layers.
    """

    config: Config
    tokens: int
    residual_layers: int = 0

    @nn.compact
    def __call__(self, x_tnd: jax.Array) -> jax.Array:
        c = self.config
        T, N, D = x_tnd.shape
        init = initializers.kernel(c.init, residual_layers=self.residual_layers)
        kernel_tm = self.param("kernel", init, (T, self.tokens), jnp.float32)
        return (kernel_tm.astype(c.dtype).T @ x_tnd.reshape(T, N * D)).reshape(-1, N, D)


class FactorizationMachine(nn.Module):
    """FMB: [T, N, D] in the config's dtype -> [tokens, N, D], reshape(MLP(LN(flatten(X X^T Y)))).

    Parameters, float32: projection, Y [T, k] (attentive: compress, attention, projection, see
    `_projection`), norm over T k, mlp of P layers of width h, out [h, tokens * D] with a bias.
    """

    config: Config
    tokens: int

    @nn.compact
    def __call__(self, x_tnd: jax.Array) -> jax.Array:
        c = self.config
        T, N, D = x_tnd.shape
        if c.attentive:
            z_nkd = jnp.einsum("tnd,ntk->nkd", x_tnd, self._projection(x_tnd))
        else:
            init = initializers.kernel(c.init)
            y_tk = self.param("projection", init, (T, c.rank), jnp.float32).astype(c.dtype)
            z_nkd = jnp.einsum("tnd,tk->nkd", x_tnd, y_tk)
        x_nw = jnp.einsum("tnd,nkd->ntk", x_tnd, z_nkd).reshape(N, T * c.rank)
        x_nw = norms.Norm(c.norm, name="norm")(x_nw)
        widths = (c.hidden,) * c.mlp_layers
        h_nf = feed_forward.MLP(widths, kernel_init=c.init, dtype=c.dtype, name="mlp")(x_nw)
        init = initializers.kernel(c.init, residual_layers=c.layers)
        out = nn.Dense(self.tokens * D, dtype=c.dtype, kernel_init=init, name="out")
        return out(h_nf).reshape(N, self.tokens, D).swapaxes(0, 1)

    def _projection(self, x_tnd: jax.Array) -> jax.Array:
        """Attentive Y [N, T, k]: k tokens W_C X side by side, a ReLU layer of width h, linear."""
        c = self.config
        T, N, _ = x_tnd.shape
        x_knd = Compress(c, c.rank, name="compress")(x_tnd)
        x_nw = x_knd.swapaxes(0, 1).reshape(N, -1)
        attention = feed_forward.MLP(
            (c.hidden,), kernel_init=c.init, dtype=c.dtype, name="attention"
        )
        init = initializers.kernel(c.init)
        out = nn.Dense(T * c.rank, dtype=c.dtype, kernel_init=init, name="projection")
        return out(attention(x_nw)).reshape(N, T, c.rank)


class Layer(nn.Module):
    """X' = norm(concat(FMB(X), LCB(X)) + X); pre-norm: X' = concat(FMB, LCB)(norm(X)) + X.

    Called with x [T, N, D] in the config's dtype; returns [n_F + n_L, N, D].
    Parameters: fm, linear (kernel [T, n_L]), residual (kernel [T, n_F + n_L]) where T differs from
    n_F + n_L, and a norm over D that all tokens share.
    """

    config: Config

    @nn.compact
    def __call__(self, x_tnd: jax.Array) -> jax.Array:
        c = self.config
        fm, linear = c.made_of(len(x_tnd))
        norm = norms.Norm(c.norm, name="norm")
        z_tnd = norm(x_tnd) if c.norm_place == "pre" else x_tnd
        made_mnd = jnp.concatenate(
            [
                FactorizationMachine(c, fm, name="fm")(z_tnd),
                Compress(c, linear, c.layers, name="linear")(z_tnd),
            ]
        )
        if len(x_tnd) != fm + linear:
            x_tnd = Compress(c, fm + linear, name="residual")(x_tnd)
        y_mnd = made_mnd + x_tnd
        return norm(y_mnd) if c.norm_place == "post" else y_mnd


class Wukong(nn.Module):
    """Tokenizer, L layers, all tokens side by side, an MLP, one linear head for all tasks."""

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
        features.require_one_time("wukong")
        c = self.config
        R, C = features.candidate_sample.shape
        pooled = history_pooling.HistoryPooling(
            c.pooling, c.attention_hidden, c.attention_activation, c.init, c.dtype, name="history"
        )(features)
        x_tnd = tokenizers.Tokenizer(
            c.tokenizer, c.tokens, c.width, c.tokenizer_hidden, c.init, c.dtype, name="tokenizer"
        )(inputs.collect(features, pooled))
        make = lambda name, tokens: Layer(c, name=name)
        call = lambda layer, tokens, x_tnd: layer(x_tnd)
        x_tnd = stack.run(self.compute, "layer", c.read(len(x_tnd)), make, call, x_tnd)
        if c.norm_place == "pre":
            x_tnd = norms.Norm(c.norm, name="out_norm")(x_tnd)
        x_rcw = x_tnd.swapaxes(0, 1).reshape(R, C, -1)
        top = (c.hidden,) * c.top_layers
        x_rcw = feed_forward.MLP(top, kernel_init=c.init, dtype=c.dtype, name="top")(x_rcw)
        return task_heads.Linear(c.tasks, c.init, name="heads")(x_rcw), {}
