"""DLRM: dots of all pairs of feature vectors; and DLRM-MLP, the plain baseline of every study.

Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
arXiv 1906.00091.
DLRM-MLP: Features -> inputs (user, candidate, pooled history) -> concat -> MLP -> logits
DLRM: inputs -> a vector per categorical feature, and one of all dense features by the bottom MLP
-> dots of all pairs, beside the dense vector -> top MLP -> logits

Parameters of DLRM, I_d dense inputs, kD the hidden width, B layers of the bottom MLP, V vectors
with the dense one: the tokenizer's (per_feature W D + D of an input W wide); bottom
I_d kD + kD + (B - 2) (k^2 D^2 + kD) + k D^2 + D for B > 1, I_d D + D for B = 1; top
(D + V (V - 1) / 2) kD + kD + (L - 1) (k^2 D^2 + kD); heads kD K + K; and the norms of both MLPs.
Ours: categorical vectors are projected to D, as embeddings and D have widths of their own here;
the history's pooled features are vectors like the others.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
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
    layers: int = 2  # L, hidden layers; 0: logistic regression, w.e is a weight of its id
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
        checks.at_least(where, 0, layers=self.layers)
        checks.at_least(where, 1, width=self.width, tasks=self.tasks)
        history_pooling.check(where, self.pooling, self.attention_hidden, self.attention_activation)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)

    def paper_params(self) -> int | None:
        return None

    def paper_flops(self) -> float | None:
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DotConfig:
    layers: int = 2  # L, hidden layers of the top MLP
    width: int = 16  # D, of the vectors whose dots are taken
    expansion: int = 4  # k: hidden layers of both MLPs are kD wide
    bottom_layers: int = 2  # of the bottom MLP; the last one is D wide
    tokens: int | None = None  # categorical vectors; None: as many as the tokenizer makes
    tokenizer: str = "per_feature"  # the paper's, over categorical inputs; see layers/tokenizers.py
    tokenizer_hidden: int = 0  # of "group" and "auto_split"; 0 = linear
    pooling: tuple[str, ...] = ("mean",)  # of the history: "mean", "target", or both
    attention_hidden: tuple[int, ...] = (36,)  # of target attention
    attention_activation: str = "sigmoid"  # or "dice"
    norm: str = "none"  # "layer", "rms": one in every layer of both MLPs
    norm_place: str = "post"  # "pre" relu(norm(x) W + b), "post" norm(relu(x W + b))
    init: str = "lecun"
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32

    axes: ClassVar[dict[str, str]] = {"L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = "none: the data's inputs decide the size of both MLPs"

    def __post_init__(self) -> None:
        where = "dlrm.DotConfig"
        for name in ("pooling", "attention_hidden"):  # JSON has no tuples
            object.__setattr__(self, name, checks.as_tuple(getattr(self, name)))
        sizes = ("layers", "width", "expansion", "bottom_layers", "tasks")
        checks.at_least(where, 1, **{name: getattr(self, name) for name in sizes})
        checks.at_least(where, 0, tokenizer_hidden=self.tokenizer_hidden)
        tokenizers.check(where, self.tokenizer, self.tokens)
        history_pooling.check(where, self.pooling, self.attention_hidden, self.attention_activation)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)

    def paper_params(self) -> int | None:
        return None

    def paper_flops(self) -> float | None:
        return None


PAPER = papers.Paper(
    title="Deep Learning Recommendation Model for Personalization and Recommendation Systems",
    arxiv="1906.00091",
    evidence="not read in full: interaction and MLPs follow the authors' public code",
    leaves_open=(
        (
            "how histories enter",
            "pooled per feature; each pooled categorical feature is a vector, dense ones join the "
            "bottom MLP",
        ),
    ),
    deviations=(
        (
            "categorical vectors are projected to D",
            "the paper's embeddings have the width of the bottom MLP's output; here the width of "
            "the tables and D are scaled separately",
        ),
        (
            "hidden layers of both MLPs have one width, kD",
            "the paper lets them shrink (512-256-64); one width is what an axis of scale needs",
        ),
        ("DLRM-MLP, without dots, is in the same file", "it is the plain baseline of every study"),
    ),
)


class DLRMMLP(nn.Module):
    """Concat -> MLP of `layers` ReLU layers -> linear head.

    Parameters, float32, beside target attention and norms: W D + D + (L - 1) (D^2 + D) + D K + K,
    W the width of all inputs together.
    """

    config: Config
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Features -> (logits [R, C, K], float32, {}). Raises ValueError for window samples."""
        features.require_one_time("dlrm_mlp")
        stack.refuse_scan(self.compute, "dlrm_mlp", "it has no stack of alike layers")
        c = self.config
        pooled = history_pooling.HistoryPooling(
            c.pooling, c.attention_hidden, c.attention_activation, c.init, c.dtype, name="history"
        )(features)
        x_rcw = inputs.concat(inputs.collect(features, pooled), c.dtype)
        widths = (c.width,) * c.layers
        mlp = feed_forward.MLP(widths, c.norm, c.norm_place, c.init, c.dtype, name="mlp")
        return task_heads.Linear(c.tasks, c.init, name="heads")(mlp(x_rcw)), {}


def dots(x_vnd: jax.Array) -> jax.Array:
    """<x_i, x_j> of all pairs i < j, row by row: [V, N, D] -> [N, V (V - 1) / 2]."""
    first, second = np.triu_indices(len(x_vnd), k=1)
    return jnp.einsum("vnd,wnd->nvw", x_vnd, x_vnd)[:, first, second]


class DLRMDot(nn.Module):
    """Bottom MLP over dense inputs, dots of all pairs of vectors, top MLP, one linear head.

    Parameters: see the file's first lines. Without dense features there is no bottom MLP and no
    dense vector, and the top MLP reads the dots alone.
    """

    config: DotConfig
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Features -> (logits [R, C, K], float32, {}).

        Raises ValueError for window samples, where the schema does not fit `tokens`, and where it
        gives fewer than two vectors.
        """
        features.require_one_time("dlrm")
        stack.refuse_scan(self.compute, "dlrm", "it has no stack of alike layers")
        c = self.config
        R, C = features.candidate_sample.shape
        pooled = history_pooling.HistoryPooling(
            c.pooling, c.attention_hidden, c.attention_activation, c.init, c.dtype, name="history"
        )(features)
        categorical, dense = tokenizers.split_dense(inputs.collect(features, pooled))
        if not categorical:
            raise ValueError("dlrm: the schema has no categorical feature; use dlrm_mlp")
        x_vnd = tokenizers.Tokenizer(
            c.tokenizer, c.tokens, c.width, c.tokenizer_hidden, c.init, c.dtype, name="tokenizer"
        )(categorical)
        beside = []
        if dense:
            widths = (c.expansion * c.width,) * (c.bottom_layers - 1) + (c.width,)
            x_nd = self._mlp("bottom", widths)(inputs.concat(dense, c.dtype)).reshape(R * C, -1)
            x_vnd, beside = jnp.concatenate([x_nd[None], x_vnd]), [x_nd]
        if len(x_vnd) < 2:
            raise ValueError(
                "dlrm: one vector, expected at least two to take dots of; see dlrm_mlp"
            )
        x_nw = jnp.concatenate([*beside, dots(x_vnd)], axis=-1)
        top = self._mlp("top", (c.expansion * c.width,) * c.layers)
        x_rcf = top(x_nw.reshape(R, C, -1))
        return task_heads.Linear(c.tasks, c.init, name="heads")(x_rcf), {}

    def _mlp(self, name: str, widths: tuple[int, ...]) -> feed_forward.MLP:
        c = self.config
        return feed_forward.MLP(widths, c.norm, c.norm_place, c.init, c.dtype, name=name)
