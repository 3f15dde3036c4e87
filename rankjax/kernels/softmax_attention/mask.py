"""The rule as an array, for the libraries' kernels, which take a mask and no rule."""

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.masks import MaskRule


def dense(rule: MaskRule, q: Tokens, k: Tokens) -> tuple[jax.Array, jax.Array]:
    """(mask bool [R, N, M], reads bool [R, N]): who reads whom, and who reads anybody.

    A row of the mask that would be empty holds key 0: over nothing the kernels' softmax is a mean
    of all values or NaN, as it happens. `silenced` takes out what such a row has read.
    """
    allow_rnm = rule.allow(q, k)
    reads_rn = allow_rnm.any(axis=-1)
    first_m = jnp.arange(k.role.shape[1]) == 0
    return allow_rnm | (~reads_rn[..., None] & first_m), reads_rn


def silenced(out_rnhv: jax.Array, reads_rn: jax.Array) -> jax.Array:
    """0 where a row reads nothing; so are the gradients that reach its key 0."""
    return jnp.where(reads_rn[..., None, None], out_rnhv, 0)
