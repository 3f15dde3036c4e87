"""DLRM-MLP: concatenate everything, then a plain deep network. The baseline of every study.

Features -> inputs (user, candidate, pooled history) -> concat -> MLP -> logits
"""

import dataclasses
from typing import ClassVar

import jax
from flax import linen as nn

from rankjax.batch import Features
from rankjax.layers import (
    checks,
    feed_forward,
    history_pooling,
    initializers,
    inputs,
    norms,
    task_heads,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    layers: int = 2  # L, hidden layers
    width: int = 64  # D, of every hidden layer
    pooling: tuple[str, ...] = ("mean",)  # of the history: "mean", "target", or both
    attention_hidden: tuple[int, ...] = (36,)  # of target attention
    attention_activation: str = "sigmoid"  # or "dice"
    norm: str = "none"  # "layer", "rms": one in every hidden layer
    norm_place: str = "post"  # "pre" relu(norm(x) W + b), "post" norm(relu(x W + b))
    init: str = "lecun"
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32

    axes: ClassVar[dict[str, str]] = {"L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = "no paper prints a closed form for this baseline"

    def __post_init__(self) -> None:
        where = "dlrm.Config"
        for name in ("pooling", "attention_hidden"):  # JSON has no tuples
            object.__setattr__(self, name, checks.as_tuple(getattr(self, name)))
        checks.at_least(where, 1, layers=self.layers, width=self.width, tasks=self.tasks)
        history_pooling.check(where, self.pooling, self.attention_hidden, self.attention_activation)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)

    def paper_params(self) -> int | None:
        return None

    def paper_flops(self) -> float | None:
        return None


class DLRMMLP(nn.Module):
    """Concat -> MLP of `layers` ReLU layers -> linear head.

    Parameters, float32, beside target attention and norms: W D + D + (L - 1) (D^2 + D) + D K + K,
    W the width of all inputs together.
    """

    config: Config
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Features -> (logits [R, C, K], float32, {}). Raises ValueError for window samples."""
        features.require_one_time("dlrm_mlp")
        c = self.config
        pooled = history_pooling.HistoryPooling(
            c.pooling, c.attention_hidden, c.attention_activation, c.init, c.dtype, name="history"
        )(features)
        x_rcw = inputs.concat(inputs.collect(features, pooled), c.dtype)
        widths = (c.width,) * c.layers
        mlp = feed_forward.MLP(widths, c.norm, c.norm_place, c.init, c.dtype, name="mlp")
        return task_heads.Linear(c.tasks, c.init, name="heads")(mlp(x_rcw)), {}
