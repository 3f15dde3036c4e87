"""What GRAB's layer does within a channel of events, and the one place where channels meet.

A channel holds the events of one kind of action and a copy of every candidate. `Read` and `Update`
are the two halves of a transformer layer of one channel, with the attention between them;
`each(Read, ..)` makes one for A channels at once, called with a leading axis A.

Source: GRAB (arXiv 2602.01865), the architecture figure.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.layers import activations, initializers, norms, vector_bias


def each(module: type[nn.Module], *, shared: bool) -> Any:
    """`module` over a leading axis A of its arguments, and of its parameters unless `shared`."""
    axis = None if shared else 0
    return nn.vmap(
        module, variable_axes={"params": axis}, split_rngs={"params": not shared}, in_axes=0
    )


class TargetMix(nn.Module):
    """h~ = h + sigmoid(cat Wg) * (cat Wv), cat the A copies of a candidate side by side.

    Called with the copies [A, R, C, D], any float dtype; returns the same in `dtype`. Wv starts at
    0, so that nothing is mixed at first.
    Parameters, float32: gate and value, kernel [A D, A D]; columns a D .. are for copy a.
    """

    kernel_init: str = "lecun"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_arcd: jax.Array) -> jax.Array:
        A, R, C, D = x_arcd.shape
        cat_nf = jnp.moveaxis(x_arcd, 0, 2).reshape(R * C, A * D)
        linear = functools.partial(nn.Dense, A * D, use_bias=False, dtype=self.dtype)
        gate = linear(kernel_init=initializers.kernel(self.kernel_init), name="gate")
        value = linear(kernel_init=nn.initializers.zeros, name="value")
        mixed_nf = nn.sigmoid(gate(cat_nf)) * value(cat_nf)
        return x_arcd.astype(self.dtype) + jnp.moveaxis(mixed_nf.reshape(R, C, A, D), 2, 0)


class Read(nn.Module):
    """What the attention is made of: latent c = x Wd; q, k, v = c Wq, c Wk, c Wv; q times tables.

    Called with x [R, N, D], any float dtype; the last `rows` tokens ask. Returns, in `dtype`,
    q [R, rows, H, Q], k and v [R, N, H, Q], and the VectorBias of q, [R, rows, B, H]. The norm is
    of x, before all else.
    Parameters, float32: down [D, r], query, key and value [r, H Q], without biases; relative (see
    VectorBias) and norm.
    """

    heads: int
    head_width: int  # Q
    latent: int  # r
    tables: vector_bias.Tables
    rows: int
    norm: str = "none"
    kernel_init: str = "lecun"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_rnd: jax.Array) -> tuple[jax.Array, ...]:
        R, N, _ = x_rnd.shape
        # Rows as one axis: XLA:CPU is faster at products of two axes.
        x_nd = norms.Norm(self.norm, name="norm")(x_rnd).reshape(R * N, -1)
        c_rnl = self._linear("down", self.latent)(x_nd).reshape(R, N, -1)

        def heads(name: str, c_rnl: jax.Array) -> jax.Array:
            R, N, _ = c_rnl.shape
            y_nf = self._linear(name, self.heads * self.head_width)(c_rnl.reshape(R * N, -1))
            return y_nf.reshape(R, N, self.heads, self.head_width)

        q_rnhq = heads("query", c_rnl[:, N - self.rows :])
        k_rmhq, v_rmhq = heads("key", c_rnl), heads("value", c_rnl)
        relative = vector_bias.VectorBias(self.tables, name="relative")
        return q_rnhq, k_rmhq, v_rmhq, relative(q_rnhq)

    def _linear(self, name: str, features: int) -> nn.Dense:
        init = initializers.kernel(self.kernel_init)
        return nn.Dense(features, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)


class Update(nn.Module):
    """Add & Norm around attention and feed-forward: s = norm(x + a Wo), y = norm(s + FFN(s)).

    "pre": s = x + a Wo, y = s + FFN(norm(s)); the attention's norm is then Read's. FFN(s) =
    GELU(s W1 + b1) W2 + b2 with the exact (erf) GELU, k D wide.
    Called with x [R, N, D] and a [R, N, H, Q], any float dtype; returns y [R, N, D] in `dtype`.
    Parameters, float32: out [H Q, D] without bias; ffn_in [D, k D], ffn_out [k D, D], with biases;
    attention_norm ("post" only), ffn_norm.
    """

    expansion: int  # k
    residual_layers: int  # L
    norm: str = "layer"
    norm_place: str = "post"
    kernel_init: str = "lecun"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_rnd: jax.Array, a_rnhq: jax.Array) -> jax.Array:
        R, N, D = x_rnd.shape
        x_nd, a_nf = x_rnd.reshape(R * N, D), a_rnhq.reshape(R * N, -1)
        ffn_norm = norms.Norm(self.norm, name="ffn_norm")
        s_nd = x_nd + self._linear("out", D, self.residual_layers, bias=False)(a_nf)
        if self.norm_place == "post":
            s_nd = norms.Norm(self.norm, name="attention_norm")(s_nd)
            y_nd = ffn_norm(s_nd + self._feed_forward(s_nd))
        else:
            y_nd = s_nd + self._feed_forward(ffn_norm(s_nd))
        return y_nd.reshape(R, N, D)

    def _feed_forward(self, s_nd: jax.Array) -> jax.Array:
        D = s_nd.shape[-1]
        h_nf = activations.gelu(self._linear("ffn_in", self.expansion * D)(s_nd))
        return self._linear("ffn_out", D, self.residual_layers)(h_nf)

    def _linear(
        self, name: str, features: int, residual_layers: int = 0, bias: bool = True
    ) -> nn.Dense:
        init = initializers.kernel(self.kernel_init, residual_layers=residual_layers)
        return nn.Dense(features, use_bias=bias, dtype=self.dtype, kernel_init=init, name=name)
