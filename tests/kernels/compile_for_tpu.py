"""Compiles the kernels for a TPU with none at hand: python compile_for_tpu.py v5e:2x2.

Prints a JSON list, one entry a program. Needs libtpu, and the environment that the test sets.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rankjax.batch import Tokens
from rankjax.kernels import hstu_attention as kernel
from rankjax.kernels.hstu_attention import pallas_tpu_grid
from rankjax.masks import MaskRule

# N, head width, dtype: long; short of a tile, narrow and in float32; wide.
SHAPES = ((4096, 128, jnp.bfloat16), (1500, 16, jnp.float32), (1024, 256, jnp.bfloat16))


def compiled(target, N, Q, dtype, R=1, H=4):
    topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
    mesh = Mesh(np.array(topology.devices[:1]), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = lambda s, d: jax.ShapeDtypeStruct(s, d, sharding=everywhere)
    tokens = Tokens(**{field: shape((R, N), jnp.int32) for field in pallas_tpu_grid.FIELDS})
    bias = kernel.RelativeBias(
        position=shape((2 * N - 1,), jnp.float32), time=shape((129,), jnp.float32)
    )
    x = shape((R, N, H, Q), dtype)

    def forward(arrays, bias, tokens):
        # No implementation is named: what is compiled for a TPU takes the TPU's.
        return kernel.hstu_attention(
            *(*arrays, tokens, tokens, MaskRule()), **{"normalizer": 1.0, "bias": bias}
        )

    def backward(arrays, bias, tokens, d):
        return jax.vjp(lambda a, b: forward(a, b, tokens), arrays, bias)[1](d)

    for direction, function, more in (("forward", forward, ()), ("backward", backward, (x,))):
        program = jax.jit(function).lower((x, x, x), bias, tokens, *more).compile()
        yield {
            **{"direction": direction, "N": N, "R": R, "H": H, "Q": Q},
            "bytes": jnp.dtype(dtype).itemsize,
            "temporaries": program.memory_analysis().temp_size_in_bytes,
            "kernels": program.as_text().count('custom_call_target="tpu_custom_call"'),
        }


if __name__ == "__main__":
    found = [entry for shape in SHAPES for entry in compiled(sys.argv[1], *shape)]
    print(json.dumps(found))
