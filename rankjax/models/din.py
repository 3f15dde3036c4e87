"""DIN: the history weighed by its likeness to the candidate, then a deep network over everything.

Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", arXiv 1706.06978.
Features -> inputs, the history by target attention (an MLP on [h, c, h - c, h * c], its weights
not normalised) -> concat -> MLP -> logits

Parameters, I the width of all inputs with the pooled history, L layers of width D: I D + D
+ (L - 1) (D^2 + D) + D K + K, in every layer 3 D of Dice (prelu D, relu none) and its norm's, and
those of target attention: (4 W + A) F + F, the further hidden layers', F' + 1 and 3 F of Dice in
each (W the width of an item, A of what an event alone has, F the first and F' the last hidden
width).
Ours: Dice takes its center and scale from learned vectors, not from the mini-batch, see
layers/history_pooling.py; the hidden layers have one width.
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
    checks,
    history_pooling,
    initializers,
    inputs,
    norms,
    stack,
    task_heads,
)

ACTIVATIONS = ("dice", "prelu", "relu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    layers: int = 2  # L, hidden layers
    width: int = 64  # D, of every hidden layer
    activation: str = "dice"  # the paper's; "prelu" its base model's, or "relu"
    pooling: tuple[str, ...] = ("target",)  # of the history; "mean" may stand beside it
    attention_hidden: tuple[int, ...] = (36,)  # of target attention
    attention_activation: str = "dice"  # the paper's; or "sigmoid"
    norm: str = "none"  # "layer", "rms": one in every hidden layer
    norm_place: str = "post"  # "pre" f(norm(x) W + b), "post" norm(f(x W + b))
    init: str = "lecun"
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32

    axes: ClassVar[dict[str, str]] = {"L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = "none: the data's inputs decide the size of the first layer"

    def __post_init__(self) -> None:
        where = "din.Config"
        for name in ("pooling", "attention_hidden"):  # JSON has no tuples
            object.__setattr__(self, name, checks.as_tuple(getattr(self, name)))
        checks.at_least(where, 1, layers=self.layers, width=self.width, tasks=self.tasks)
        checks.one_of(where, "activation", self.activation, ACTIVATIONS)
        history_pooling.check(where, self.pooling, self.attention_hidden, self.attention_activation)
        if "target" not in self.pooling:
            raise ValueError(
                f"{where}: pooling={self.pooling!r}, expected 'target' among them, which is what "
                "DIN is; dlrm_mlp pools by a mean alone"
            )
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)

    def paper_params(self) -> int | None:
        return None

    def paper_flops(self) -> float | None:
        return None


PAPER = papers.Paper(
    title="Deep Interest Network for Click-Through Rate Prediction",
    arxiv="1706.06978",
    evidence="not read in full: the architecture as the literature and the authors' code give it",
    leaves_open=(
        (
            "what the activation unit reads beside h and c",
            "their difference and product (the paper's figure draws an outer product, its code "
            "takes these two)",
        ),
        ("the width of the activation unit", "36, as the paper's figure draws it"),
    ),
    deviations=(
        (
            "Dice has a learned center and scale",
            "mini-batch statistics would make a logit depend on the rest of the batch",
        ),
        (
            "hidden layers of one width, D",
            "the paper has 200 and 80; one width is what an axis of scale needs",
        ),
        (
            "no mini-batch aware regularisation",
            "regularisation belongs to the optimizer, the same for all models",
        ),
    ),
)


class Layer(nn.Module):
    """f(x W + b) with f Dice, PReLU or ReLU, and a norm: [..., W] -> [..., D], config's dtype.

    PReLU: max(z, 0) + alpha min(z, 0). alpha starts at 0 in Dice and 0.25 in PReLU.
    Parameters, float32: dense [W, D] and bias; alpha [D] ("dice", "prelu"), center and scale [D]
    ("dice"); the norm's.
    """

    config: Config

    @nn.compact
    def __call__(self, x_nw: jax.Array) -> jax.Array:
        c = self.config
        norm = norms.Norm(c.norm, name="norm")
        init = initializers.kernel(c.init)
        dense = nn.Dense(c.width, dtype=c.dtype, kernel_init=init, name="dense")
        if c.norm_place == "pre":
            return self._activate(dense(norm(x_nw)))
        return norm(self._activate(dense(x_nw)))

    def _activate(self, z_nd: jax.Array) -> jax.Array:
        c = self.config

        def channel(name: str, start: float) -> jax.Array:
            init = nn.initializers.constant(start)
            return self.param(name, init, (c.width,), jnp.float32).astype(z_nd.dtype)

        if c.activation == "relu":
            return nn.relu(z_nd)
        if c.activation == "prelu":
            return jnp.maximum(z_nd, 0) + channel("alpha", 0.25) * jnp.minimum(z_nd, 0)
        return activations.dice(
            z_nd, channel("alpha", 0), channel("center", 0), channel("scale", 1)
        )


class DIN(nn.Module):
    """Target attention over the history, all inputs side by side, L layers, one linear head."""

    config: Config
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Features -> (logits [R, C, K], float32, {}).

        Raises ValueError for window samples, and for a schema without item features.
        """
        features.require_one_time("din")
        c = self.config
        pooled = history_pooling.HistoryPooling(
            c.pooling, c.attention_hidden, c.attention_activation, c.init, c.dtype, name="history"
        )(features)
        x_rcw = inputs.concat(inputs.collect(features, pooled), c.dtype)
        widths_in = [x_rcw.shape[-1]] + [c.width] * (c.layers - 1)
        make = lambda name, width: Layer(c, name=name)
        call = lambda layer, width, x_rcw: layer(x_rcw)
        x_rcw = stack.run(self.compute, "layer", widths_in, make, call, x_rcw)
        return task_heads.Linear(c.tasks, c.init, name="heads")(x_rcw), {}
