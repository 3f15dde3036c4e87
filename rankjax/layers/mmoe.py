"""MMoE: experts that all tasks share, and a gate and a tower of its own for each task.

Source: "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts"
(Ma et al., KDD 2018).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.layers import initializers, per_token


class MMoE(nn.Module):
    """logit_k = tower_k(sum_e softmax(G_k x)_e f_e(x)), f_e(x) = relu(x W_e + b_e).

    A tower is one ReLU layer of `tower_hidden` and a linear one. [..., D], any float dtype ->
    logits [..., K], float32.
    Parameters, float32, with X experts of width F and towers of width H: experts kernel [X, D, F]
    and bias [X, F]; gates [K, D, X], without bias; tower kernel [K, F, H] and bias [K, H];
    logits kernel [K, H, 1] and bias [K, 1]: X (D F + F) + K (D X + F H + 2 H + 1) together.
    """

    tasks: int  # K
    experts: int  # X
    expert_hidden: int  # F
    tower_hidden: int  # H
    kernel_init: str = "lecun"

    @nn.compact
    def __call__(self, x_nd: jax.Array) -> jax.Array:
        *leading, D = x_nd.shape
        x_nd = x_nd.astype(jnp.float32).reshape(-1, D)
        # batch_axis: every expert and gate is a layer of its own.
        init = initializers.kernel(self.kernel_init, batch_axis=(0,))
        X, F, K = self.experts, self.expert_hidden, self.tasks
        kernel_xdf = self.param("experts_kernel", init, (X, D, F), jnp.float32)
        bias_xf = self.param("experts_bias", nn.initializers.zeros, (X, F), jnp.float32)
        gate_kdx = self.param("gates", init, (K, D, X), jnp.float32)
        h_nxf = nn.relu(jnp.einsum("nd,xdf->nxf", x_nd, kernel_xdf) + bias_xf)
        share_knx = nn.softmax(jnp.einsum("nd,kdx->knx", x_nd, gate_kdx), axis=-1)
        h_knf = jnp.einsum("knx,nxf->knf", share_knx, h_nxf)
        tower = per_token.Dense(self.tower_hidden, kernel_init=self.kernel_init, name="tower")
        logits = per_token.Dense(1, kernel_init=self.kernel_init, name="logits")
        logits_kn = logits(nn.relu(tower(h_knf)))[..., 0]
        return logits_kn.T.reshape(*leading, K)
