"""What the attention kernels share: padding to blocks, and which pairs of blocks have any work."""

import jax
import jax.numpy as jnp

from rankjax import masks
from rankjax.batch import PAD, Tokens
from rankjax.masks import MaskRule


def padded(x: jax.Array, size: int, axis: int = 1) -> jax.Array:
    """`x` with zeros behind it along `axis`, up to the next multiple of `size`.

    For Tokens too (jax.tree.map): PAD is 0, so what padding adds reads nothing and is not read.
    """
    assert PAD == 0
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, widths) if widths[axis][1] else x


def cut(x: jax.Array, size: int, axis: int = 1) -> jax.Array:
    """[..., n * size, ...] -> [..., n, size, ...]; padded first where it is no multiple."""
    x = padded(x, size, axis)
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def active(rule: MaskRule, q: Tokens, k: Tokens, q_block: int, k_block: int) -> jax.Array:
    """bool [R, n, m]: may query block n read anything of key block m?

    Fields of q [R, N] and k [R, M] in multiples of their blocks. Found from the ranges of the
    blocks' fields, so the cost and the memory are those of N M / (q_block k_block) pairs.
    """
    return rule.possible(masks.ranges(q, q_block), masks.ranges(k, k_block))


def schedule(
    active_rnm: jax.Array, first_rnm: jax.Array | bool = False
) -> tuple[jax.Array, jax.Array]:
    """(order int32 [R, n, m], count int32 [R, n]): the active m of every n first, ascending.

    Of them those of `first_rnm` come before the others. Behind the active ones the last is
    repeated, so that a pipeline that runs on fetches nothing new.
    """
    count_rn = jnp.sum(active_rnm, axis=-1, dtype=jnp.int32)
    rank_rnm = jnp.where(active_rnm, jnp.where(first_rnm, 0, 1), 2)
    order_rnm = jnp.argsort(rank_rnm, axis=-1, stable=True).astype(jnp.int32)
    last_rn1 = jnp.maximum(count_rn - 1, 0)[..., None]
    place_m = jnp.arange(active_rnm.shape[-1])
    order_rnm = jnp.take_along_axis(order_rnm, jnp.minimum(place_m, last_rn1), axis=-1)
    return order_rnm, count_rn
