"""Normalisation over the last axis, of a kind and at a place that every Config names.

Kinds: "layer" LayerNorm, "rms" RMSNorm, "none" the identity. Places, for a sub-layer f:
"post" norm(f(x) + x), "pre" f(norm(x)) + x.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.layers import checks

KINDS = ("layer", "rms", "none")
PLACES = ("pre", "post")


def check(where: str, kind: str, place: str) -> None:
    """Raises ValueError unless kind and place are known; `where` names the Config."""
    checks.one_of(where, "norm", kind, KINDS)
    checks.one_of(where, "norm_place", place, PLACES)


def parameters(kind: str, width: int) -> int:
    """The number of parameters of one affine Norm over `width` channels."""
    return {"layer": 2, "rms": 1, "none": 0}[kind] * width


class Norm(nn.Module):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias ("rms": without mean and bias).

    Called with x [..., D], any float dtype; returns [..., D] of the same dtype. Mean and variance
    are taken over D in float32, the variance as the mean of squared deviations, so that a large
    common offset does no harm.
    Parameters, float32, shared over all leading axes: "layer" scale [D] and bias [D], "rms"
    scale [D], "none" (which returns x) none; no parameters where affine=False.
    Raises ValueError for an unknown kind.
    """

    kind: str = "layer"
    affine: bool = True
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x_nd: jax.Array) -> jax.Array:
        checks.one_of("norms.Norm", "kind", self.kind, KINDS)
        if self.kind == "none":
            return x_nd
        D = x_nd.shape[-1]
        y_nd = x_nd.astype(jnp.float32)
        if self.kind == "layer":
            y_nd = y_nd - y_nd.mean(axis=-1, keepdims=True)
        y_nd = y_nd * jax.lax.rsqrt(jnp.square(y_nd).mean(axis=-1, keepdims=True) + self.epsilon)
        if self.affine:
            y_nd = y_nd * self.param("scale", nn.initializers.ones, (D,), jnp.float32)
            if self.kind == "layer":
                y_nd = y_nd + self.param("bias", nn.initializers.zeros, (D,), jnp.float32)
        return y_nd.astype(x_nd.dtype)
