"""Rows of a table side by side, several to a line.

A TPU looks rows up in lines of 128 numbers: of a narrower table it makes a wide copy first, or
reads all of it, in every step. An array [V / pack, pack E] of 128 numbers a line, in which row i
stands in line i // pack at place i % pack, it reads as it lies. The numbers are the same bits.
"""

import jax
import jax.numpy as jnp


def rows(x_lw: jax.Array, pack: int) -> int:
    """V of an array of lines."""
    return x_lw.shape[0] * pack


def take(x_lw: jax.Array, ids: jax.Array, pack: int, **options: object) -> jax.Array:
    """Rows [..., E] of ids [...]; options: of `.at[].get`, for ids of V and above."""
    if pack == 1:
        return x_lw.at[ids].get(**options)
    line = x_lw.at[ids // pack].get(**options).reshape(*ids.shape, pack, -1)
    return jnp.where(_mine(ids, pack), line, 0).sum(axis=-2)  # the others add exact zeros


def add(x_lw: jax.Array, ids_u: jax.Array, values_ue: jax.Array, pack: int) -> jax.Array:
    """Adds to rows of distinct ids; those of V and above are dropped."""
    if pack == 1:
        return x_lw.at[ids_u].add(values_ue, mode="drop", unique_indices=True)
    # Rows of one line meet in it. -0 changes no bits of the neighbours, not even those of a -0.
    line = jnp.where(_mine(ids_u, pack), values_ue[:, None], -0.0)
    return x_lw.at[ids_u // pack].add(line.reshape(len(ids_u), -1), mode="drop")


def _mine(ids: jax.Array, pack: int) -> jax.Array:
    """[..., pack, 1]: which place of its line an id has."""
    return ((ids % pack)[..., None] == jnp.arange(pack))[..., None]
