"""DCN-V2 over DIN: cross layers multiply the input into itself, beside or before a deep network.

Features -> inputs (history by DIN's target attention) -> concat x_0 -> cross layers, MLP -> logits
DCN-V2: arXiv 2008.13535; DIN: arXiv 1706.06978.

Parameters, W the width of all inputs with the pooled history, M deep layers: L cross layers, each
W^2 + W, with rank r 2 W r + W, with n experts n (2 W r + r^2) + W n + W; the deep network
W D + D + (M - 1) (D^2 + D) and its norms; heads (W + D) K + K ("parallel"), D K + K ("stacked"),
W K + K (M = 0); target attention, see layers/history_pooling.py.
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
)

STRUCTURES = ("parallel", "stacked")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    layers: int = 2  # L, cross layers
    width: int = 64  # D, of every hidden layer of the deep network
    deep_layers: int = 2
    structure: str = "parallel"  # or "stacked": the deep network reads the last cross layer
    rank: int | None = None  # r of W = U V^T; None: W is full
    experts: int = 1  # low-rank experts in a cross layer, mixed by a softmax gate; needs a rank
    pooling: tuple[str, ...] = ("target",)  # of the history: "mean", "target", or both
    attention_hidden: tuple[int, ...] = (36,)  # of target attention
    attention_activation: str = "sigmoid"  # or "dice"
    norm: str = "none"  # "layer", "rms": one in every deep layer; cross layers are as printed
    norm_place: str = "post"  # "pre" relu(norm(x) W + b), "post" norm(relu(x W + b))
    init: str = "lecun"
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32

    axes: ClassVar[dict[str, str]] = {"L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = "none: the size of a cross layer is the width of the data's inputs"

    def __post_init__(self) -> None:
        where = "dcnv2.Config"
        for name in ("pooling", "attention_hidden"):  # JSON has no tuples
            object.__setattr__(self, name, checks.as_tuple(getattr(self, name)))
        checks.at_least(where, 1, width=self.width, experts=self.experts, tasks=self.tasks)
        checks.at_least(where, 0, layers=self.layers, deep_layers=self.deep_layers)
        if self.layers + self.deep_layers == 0:
            raise ValueError(f"{where}: layers=0 and deep_layers=0, expected one of them positive")
        checks.one_of(where, "structure", self.structure, STRUCTURES)
        if self.rank is not None:
            checks.at_least(where, 1, rank=self.rank)
        elif self.experts > 1:
            raise ValueError(f"{where}: experts={self.experts} with rank=None, expected a rank")
        history_pooling.check(where, self.pooling, self.attention_hidden, self.attention_activation)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)

    def paper_params(self) -> int | None:
        return None

    def paper_flops(self) -> float | None:
        return None


PAPER = papers.Paper(
    title="DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to "
    "Rank Systems",
    arxiv="2008.13535",
    evidence="not read in full: the cross layers as the literature gives them",
    leaves_open=(
        ("the gate of the mixture of low-rank experts", "a softmax over a linear layer, no bias"),
        ("how histories enter", "DIN's target attention (arXiv 1706.06978), as in the name"),
    ),
    deviations=(
        (
            "hidden layers of the deep network have one width, D",
            "one width is what an axis of scale needs",
        ),
    ),
)


class Cross(nn.Module):
    """x_{l+1} = x_0 * (W x_l + b) + x_l, elementwise product: [R, C, W] twice -> [R, C, W].

    rank r: W = U V^T. experts n > 1: sum over i of G_i(x_l) x_0 * (U_i g(C_i g(V_i^T x_l)) + b)
    + x_l with g = tanh and G = softmax(x_l W_g).
    Parameters, float32: full W^2 + W; rank 2 W r + W; n experts n (2 W r + r^2) + W n + W.
    """

    config: Config

    @nn.compact
    def __call__(self, x0_rcw: jax.Array, x_rcw: jax.Array) -> jax.Array:
        c = self.config
        W = x0_rcw.shape[-1]
        init = initializers.kernel(c.init)
        writes = initializers.kernel(c.init, residual_layers=c.layers)
        if c.experts > 1:
            return self._mixture(x0_rcw, x_rcw)
        down_rcr = x_rcw
        if c.rank is not None:
            down = nn.Dense(c.rank, use_bias=False, dtype=c.dtype, kernel_init=init, name="v")
            down_rcr = down(x_rcw)
        up = nn.Dense(W, dtype=c.dtype, kernel_init=writes, name="w" if c.rank is None else "u")
        return x0_rcw * up(down_rcr) + x_rcw

    def _mixture(self, x0_rcw: jax.Array, x_rcw: jax.Array) -> jax.Array:
        c = self.config
        W, E, r = x0_rcw.shape[-1], c.experts, c.rank

        def kernel(name: str, fan_in: int, fan_out: int, residual_layers: int = 0) -> jax.Array:
            init = initializers.kernel(c.init, residual_layers=residual_layers, batch_axis=(0,))
            return self.param(name, init, (E, fan_in, fan_out), jnp.float32).astype(c.dtype)

        v_ewr, c_err, u_erw = kernel("v", W, r), kernel("c", r, r), kernel("u", r, W, c.layers)
        bias_w = self.param("bias", nn.initializers.zeros, (W,), jnp.float32).astype(c.dtype)
        gate = nn.Dense(E, use_bias=False, kernel_init=initializers.kernel(c.init), name="gate")
        gate_nme = nn.softmax(gate(x_rcw.astype(jnp.float32))).astype(c.dtype)
        low_nmer = jnp.tanh(jnp.einsum("nmw,ewr->nmer", x_rcw, v_ewr))
        low_nmer = jnp.tanh(jnp.einsum("nmer,erq->nmeq", low_nmer, c_err))
        # The gates sum to 1, so the mixed bias is the bias.
        mixed_nmw = jnp.einsum("nmer,erw->nmw", gate_nme[..., None] * low_nmer, u_erw)
        return x0_rcw * (mixed_nmw + bias_w) + x_rcw


class DCNv2(nn.Module):
    """Cross layers and a deep network over concatenated inputs, DIN over the history.

    "parallel": the head reads [cross output, deep output]; "stacked": the deep network reads the
    cross output, the head the deep network. With deep_layers = 0 the head reads the cross output.
    """

    config: Config
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Features -> (logits [R, C, K], float32, {}). Raises ValueError for window samples."""
        features.require_one_time("dcnv2_din")
        c = self.config
        pooled = history_pooling.HistoryPooling(
            c.pooling, c.attention_hidden, c.attention_activation, c.init, c.dtype, name="history"
        )(features)
        x0_rcw = inputs.concat(inputs.collect(features, pooled), c.dtype)
        make = lambda name, _: Cross(c, name=name)
        call = lambda cross, _, x_rcw: cross(x0_rcw, x_rcw)
        x_rcw = stack.run(self.compute, "cross", [None] * c.layers, make, call, x0_rcw)
        widths = (c.width,) * c.deep_layers
        deep = feed_forward.MLP(widths, c.norm, c.norm_place, c.init, c.dtype, name="deep")
        if c.structure == "stacked" or not c.deep_layers:
            out = deep(x_rcw)
        else:
            out = jnp.concatenate([x_rcw, deep(x0_rcw)], axis=-1)
        return task_heads.Linear(c.tasks, c.init, name="heads")(out), {}
