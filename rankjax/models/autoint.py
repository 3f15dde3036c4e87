"""AutoInt: multi-head self-attention over feature tokens, residual projection and ReLU.

Song et al., "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks",
arXiv 1810.11921.
Features -> inputs -> T tokens (one per feature) -> L interacting layers -> concat -> linear

Parameters: the first layer reads width D, the others F = H d' (H heads of width d'), each with
four matrices without bias (query, key, value, residual): 4 D F + 4 (L - 1) F^2, and the norms. The
heads read all tokens side by side: T F K + K. Every token is read, so no layer can be cut short.
Ours: tokens come from any tokenizer, and have biases; norms are an option (the paper has none).
"""

import dataclasses
from typing import ClassVar

import jax
from flax import linen as nn

from rankjax import papers
from rankjax.batch import Features
from rankjax.layers import (
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    tokens: int | None = None  # T (the paper's M); None: as many as the tokenizer makes
    layers: int = 3  # L, interacting layers
    width: int = 16  # D (the paper's d), of a token before the first layer
    heads: int = 2  # H
    head_width: int | None = None  # d'; None: D / H, so that all layers are D wide
    tokenizer: str = "per_feature"  # the paper's; see layers/tokenizers.py
    tokenizer_hidden: int = 0  # of "group" and "auto_split"; 0 = linear
    pooling: tuple[str, ...] = ("mean",)  # of the history: "mean", "target", or both
    attention_hidden: tuple[int, ...] = (36,)  # of target attention over the history
    attention_activation: str = "sigmoid"  # or "dice"
    norm: str = "none"  # "layer", "rms"
    norm_place: str = "post"  # of a layer's output; "pre": of what attention reads, and one more
    # before the heads
    init: str = "lecun"
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32

    axes: ClassVar[dict[str, str]] = {"T": "tokens", "L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = (
        "the L interacting layers, without tokenizer and output layer; FLOPs per candidate"
    )

    def __post_init__(self) -> None:
        where = "autoint.Config"
        for name in ("pooling", "attention_hidden"):  # JSON has no tuples
            object.__setattr__(self, name, checks.as_tuple(getattr(self, name)))
        sizes = {name: getattr(self, name) for name in ("layers", "width", "heads", "tasks")}
        checks.at_least(where, 1, **sizes)
        checks.at_least(where, 0, tokenizer_hidden=self.tokenizer_hidden)
        if self.head_width is not None:
            checks.at_least(where, 1, head_width=self.head_width)
        elif self.width % self.heads:
            raise ValueError(
                f"{where}: width={self.width} is no multiple of heads={self.heads}; set head_width "
                "for heads of another width than width / heads"
            )
        tokenizers.check(where, self.tokenizer, self.tokens)
        history_pooling.check(where, self.pooling, self.attention_hidden, self.attention_activation)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)

    @property
    def width_of_head(self) -> int:
        """d'."""
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def width_out(self) -> int:
        """F = H d', the width of a token behind a layer."""
        return self.heads * self.width_of_head

    @property
    def _widths_in(self) -> list[int]:
        return [self.width] + [self.width_out] * (self.layers - 1)

    def paper_params(self) -> int:
        """4 D F + 4 (L - 1) F^2, F = H d', and a norm's in every layer."""
        F = self.width_out
        pre = self.norm_place == "pre"
        return sum(
            4 * W * F + norms.parameters(self.norm, W if pre else F) for W in self._widths_in
        )

    def paper_flops(self) -> float | None:
        """Sum over layers of 8 T W F + 4 T^2 F, W the layer's input width; None without T."""
        if self.tokens is None:
            return None
        T, F = self.tokens, self.width_out
        return float(sum(8 * T * W * F + 4 * T * T * F for W in self._widths_in))


AUTOINT_CRITEO = Config(layers=3, width=16, heads=2, head_width=32)  # section 5.1.4


def _with_output_layer(config: Config, fields: int) -> int:
    """Parameters as the paper's table 3 counts them: all but the embeddings, of M fields."""
    return config.paper_params() + config.width_out * fields + 1


PAPER = papers.Paper(
    title="AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks",
    arxiv="1810.11921",
    sizes={"autoint_criteo": papers.Size(config=AUTOINT_CRITEO, tokens=39)},
    figures=(
        papers.Figure(
            what="parameters without embeddings on Criteo (39 fields)",
            printed=3.9e4,
            ours=lambda: _with_output_layer(AUTOINT_CRITEO, fields=39),
            where="table 3",
            tolerance=0.013,  # printed with two digits
            note="39,361 with d' = 32 in each of the two heads and a residual projection in every "
            "layer; the closed form of section 4.7 counts query, key and value of one head only.",
        ),
    ),
    leaves_open=(
        ("whether d' is the width of a head or of all heads", "of a head, as table 3 comes out"),
        (
            "whether the residual is projected where the widths agree",
            "always, as table 3 comes out",
        ),
        ("how histories enter", "pooled per feature (mean), each pooled feature one more token"),
    ),
    deviations=(
        (
            "a token is its embedding times a matrix, with a bias",
            "embedding width and D are free of each other here, and tokenizers are shared",
        ),
        (
            "AutoInt+, with a deep network beside it, is not built",
            "the other models are not either",
        ),
        ("no dropout", "the paper finds it unnecessary on its three large data sets"),
    ),
)


class Layer(nn.Module):
    """Interacting layer: relu(attention(x) + x W_Res), eq. 5-8; scores are not scaled.

    Called with x [T, N, W] in the config's dtype; returns [T, N, H d'].
    Parameters, float32: attention (query, key, value) and residual, kernels [W, H d'] each, and
    the norm's.
    """

    config: Config

    @nn.compact
    def __call__(self, x_tnw: jax.Array) -> jax.Array:
        c = self.config
        norm = norms.Norm(c.norm, name="norm")
        z_tnw = norm(x_tnw) if c.norm_place == "pre" else x_tnw
        read_tnf = feature_attention.FeatureAttention(
            *(c.heads, c.width_of_head, c.width_of_head, 1.0, c.init, c.dtype, c.layers),
            name="attention",
        )(z_tnw, z_tnw)
        residual = nn.Dense(
            c.width_out,
            use_bias=False,
            dtype=c.dtype,
            kernel_init=initializers.kernel(c.init),
            name="residual",
        )
        y_tnf = nn.relu(read_tnf + residual(x_tnw))
        return norm(y_tnf) if c.norm_place == "post" else y_tnf


class AutoInt(nn.Module):
    """Tokenizer, L interacting layers, all tokens side by side, one linear head for all tasks."""

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
        features.require_one_time("autoint")
        c = self.config
        R, C = features.candidate_sample.shape
        pooled = history_pooling.HistoryPooling(
            c.pooling, c.attention_hidden, c.attention_activation, c.init, c.dtype, name="history"
        )(features)
        x_tnd = tokenizers.Tokenizer(
            c.tokenizer, c.tokens, c.width, c.tokenizer_hidden, c.init, c.dtype, name="tokenizer"
        )(inputs.collect(features, pooled))
        make = lambda name, width: Layer(c, name=name)
        call = lambda layer, width, x_tnd: layer(x_tnd)
        x_tnd = stack.run(self.compute, "layer", c._widths_in, make, call, x_tnd)
        if c.norm_place == "pre":
            x_tnd = norms.Norm(c.norm, name="out_norm")(x_tnd)
        x_rcf = x_tnd.swapaxes(0, 1).reshape(R, C, -1)  # eq. 9
        return task_heads.Linear(c.tasks, c.init, name="heads")(x_rcf), {}
