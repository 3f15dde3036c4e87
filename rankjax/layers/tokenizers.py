"""From a candidate's inputs to T tokens of width D, token-major: list of Input -> [T, R * C, D].

"per_feature": one linear layer per input, T = the number of inputs; with `dense_tokens` =
  n_d > 0 the dense inputs have n_d tokens together, behind the others, and none of their own
  (HeteroAtt, arXiv 2311.05884).
"group": the inputs of a semantic group side by side, one layer per group, T = the number of groups.
"even_split": all inputs side by side in group order, cut into T slices of equal width, one linear
  layer per slice (RankMixer, arXiv 2507.15551).
"auto_split": all inputs side by side, one layer to T * D, cut into T (OneTrans, arXiv 2510.26104).

The first two refuse a T that is not the number of inputs or groups. The last two may make more
tokens than there are inputs: they cut or project the inputs' joined width, so that a token holds a
part of an input, and T is the axis that a ladder scales on one data set. "even_split" refuses a T
above that width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.layers import checks, initializers, per_token
from rankjax.layers import inputs as candidate_inputs
from rankjax.layers.inputs import Input

KINDS = ("per_feature", "group", "even_split", "auto_split")
FROM_DATA = ("per_feature", "group")  # kinds whose T the schema decides


def check(where: str, kind: str, tokens: int | None) -> None:
    """Raises ValueError for an unknown kind, or a T that is missing or not positive."""
    checks.one_of(where, "tokenizer", kind, KINDS)
    if tokens is None and kind not in FROM_DATA:
        raise ValueError(f"{where}: tokens=None, expected a number with tokenizer={kind!r}")
    if tokens is not None:
        checks.at_least(where, 1, tokens=tokens)


def split_dense(inputs: list[Input]) -> tuple[list[Input], list[Input]]:
    """(embeddings, dense inputs), each in the order of the list."""
    return [x for x in inputs if not x.dense], [x for x in inputs if x.dense]


def count(kind: str, inputs: list[Input], tokens: int | None, dense_tokens: int = 0) -> int:
    """T: `tokens`, or what the inputs give where the kind takes T from the data.

    Raises ValueError where the inputs give another T than `tokens`, or are too narrow to be cut
    into T slices.
    """
    if kind in FROM_DATA:
        found = len(inputs) if kind == "per_feature" else len(candidate_inputs.groups(inputs))
        if kind == "per_feature" and dense_tokens and (together := len(split_dense(inputs)[1])):
            found += dense_tokens - together
        if tokens not in (None, found):
            raise ValueError(
                f"tokenizers: tokens={tokens}, but tokenizer={kind!r} makes {found} tokens of this "
                f"schema and pooling; set tokens={found} or tokens=None"
            )
        return found
    if kind == "even_split":
        W = sum(x.value.shape[-1] for x in inputs)
        if tokens > W:
            raise ValueError(
                f"tokenizers: tokens={tokens}, but the inputs are {W} wide together; "
                "tokenizer='even_split' needs at least one entry per token"
            )
    return tokens


class Tokenizer(nn.Module):
    """Inputs, each [R, C, W], any float dtype -> tokens [T, R * C, D] in `dtype`.

    tokens: T, or None where the kind takes it from the data (see `count`, which raises
    ValueError where they disagree).
    hidden: width of a ReLU layer before the projections of "group" (one for each group) and
    "auto_split"; 0 = linear.
    dense_tokens: how many tokens n_d "per_feature" makes of all dense inputs side by side; 0 = one
    of each. None are made where no input is dense.
    "even_split" appends zeros until the width is a multiple of T, so the last tokens may read
    fewer inputs than the others, or none.
    Parameters, float32, every layer with a bias: per_feature W D + D per input (n_d (W D + D)
    for W dense ones together); group the same per group (W of the group); even_split T (d D + D),
    d = ceil(W / T); auto_split W T D + T D.
    """

    kind: str
    tokens: int | None
    width: int
    hidden: int = 0
    kernel_init: str = "lecun"
    dtype: str = "float32"
    dense_tokens: int = 0

    @nn.compact
    def __call__(self, inputs: list[Input]) -> jax.Array:
        T, D = count(self.kind, inputs, self.tokens, self.dense_tokens), self.width
        if self.kind == "per_feature":
            wide, together = split_dense(inputs) if self.dense_tokens else (inputs, [])
            found = [self._dense(x.name, D)(self._concat([x])) for x in wide]
            if together:
                y_nd = self._dense("dense", self.dense_tokens * D)(self._concat(together))
                found += jnp.split(y_nd, self.dense_tokens, axis=-1)
            return jnp.stack(found)
        if self.kind == "group":
            groups = candidate_inputs.groups(inputs).items()
            return jnp.stack([self._layers(name, D)(self._concat(group)) for name, group in groups])
        x_nw = self._concat(inputs)
        if self.kind == "auto_split":
            return self._layers("all", T * D)(x_nw).reshape(-1, T, D).swapaxes(0, 1)
        x_nw = jnp.pad(x_nw, ((0, 0), (0, -x_nw.shape[-1] % T)))
        x_tnw = x_nw.reshape(len(x_nw), T, -1).swapaxes(0, 1)
        return per_token.Dense(D, self.dtype, self.kernel_init, name="slices")(x_tnw)

    def _concat(self, inputs: list[Input]) -> jax.Array:
        x_rcw = candidate_inputs.concat(inputs, self.dtype)
        return x_rcw.reshape(-1, x_rcw.shape[-1])

    def _dense(self, name: str, features: int) -> nn.Dense:
        init = initializers.kernel(self.kernel_init)
        return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)

    def _layers(self, name: str, features: int) -> Callable[[jax.Array], jax.Array]:
        out = self._dense(name, features)
        if not self.hidden:
            return out
        hidden = self._dense(f"{name}.hidden", self.hidden)
        return lambda x_nw: out(nn.relu(hidden(x_nw)))


class TaskTokens(nn.Module):
    """K learned tokens before a candidate's own: [T, N, D], any dtype -> [K + T, N, D] of it.

    They are the same for every candidate. Parameter, float32: tokens [K, D].
    Source: the task tokens of HeteroAtt (arXiv 2311.05884), [cls] of HHFT (arXiv 2511.20235).
    """

    tasks: int  # K

    @nn.compact
    def __call__(self, x_tnd: jax.Array) -> jax.Array:
        _, N, D = x_tnd.shape
        init = nn.initializers.normal(initializers.SIGMA)
        tokens_kd = self.param("tokens", init, (self.tasks, D), jnp.float32).astype(x_tnd.dtype)
        tokens_knd = jnp.broadcast_to(tokens_kd[:, None], (self.tasks, N, D))
        return jnp.concatenate([tokens_knd, x_tnd])
