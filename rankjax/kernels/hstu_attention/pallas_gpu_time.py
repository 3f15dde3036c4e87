"""Time buckets on a GPU, without a logarithm for every pair.

A logarithm and a division cost more instructions a pair than the products of a head 128 wide. Here
the leading bits of dt as float32 (its exponent and two bits behind) number a cell; cells are
narrower than buckets, so in a cell the bucket rises once at most, at a number that is looked up.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

from rankjax.batch import CONTEXT, Tokens
from rankjax.kernels.hstu_attention import bias as bias_lib

LOW = 21  # bits of a float32 behind those that number its cell
FIRST = int(np.float32(1).view(np.int32)) >> LOW  # the cell of one second
CELLS = 128  # up to 2^31 seconds
RISE = LOW + 1  # bits of the place of the rise: 2^LOW = no rise


@functools.cache
def cells() -> np.ndarray:
    """int32 [CELLS]: (the bucket where a cell begins << RISE) + the low bits where it rises."""
    found = []
    for cell in range(FIRST, FIRST + CELLS):
        start = cell << LOW
        first, rise, end = _bucket(start), 0, 2**LOW
        while rise < end:  # bisection: the first number of the next bucket
            middle = (rise + end) // 2
            rise, end = (rise, middle) if _bucket(start + middle) > first else (middle + 1, end)
        found.append((first << RISE) + rise)
    return np.array(found, np.int32)


def bucket(cells_ref: jax.Array, q: Tokens, k: Tokens, with_context: bool) -> jax.Array:
    """`bias_lib.bucket`, inside of a kernel. with_context: may there be context tokens?"""
    dt = jnp.maximum(jnp.abs(q.bias_time - k.bias_time), 1)
    if with_context:
        dt = jnp.where((q.role == CONTEXT) | (k.role == CONTEXT), 1, dt)
    bits = jax.lax.bitcast_convert_type(dt.astype(jnp.float32), jnp.int32)
    cell = plgpu.load(cells_ref.at[(bits >> LOW) - FIRST])
    risen = (bits & (2**LOW - 1)) >= (cell & (2**RISE - 1))
    return (cell >> RISE) + risen.astype(jnp.int32)


def _bucket(bits: int) -> int:
    """As `bias_lib.bucket` of the float32 with these bits; compiled, it divides by a product."""
    seconds = np.array(bits, np.int32).view(np.float32)
    found = np.floor(np.log(seconds) * np.float32(1 / 0.301))
    return int(np.clip(found, 0, bias_lib.TIME_BUCKETS - 1))
