"""Compiles softmax attention for a TPU with none at hand: as compile_for_tpu.py v5e:2x2."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rankjax.batch import Tokens
from rankjax.kernels import softmax_attention as kernel
from rankjax.kernels.softmax_attention import by_splash
from rankjax.masks import MaskRule

# R, N, M, head width, dtype: several rows; the widest mask; few queries, narrow and in float32.
SHAPES = (
    (4, 2048, 2048, 128, jnp.bfloat16),
    (1, 2**13, by_splash.MASK // 2**13, 64, jnp.bfloat16),
    (2, 100, 1500, 16, jnp.float32),
)
FIELDS = ("segment", "role", "time", "position", "group", "bias_time")


def compiled(target, R, N, M, Q, dtype, H=4):
    topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
    mesh = Mesh(np.array(topology.devices[:1]), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = lambda s, d: jax.ShapeDtypeStruct(s, d, sharding=everywhere)
    tokens = [Tokens(**{f: shape((R, n), jnp.int32) for f in FIELDS}) for n in (N, M)]
    q, k = shape((R, N, H, Q), dtype), shape((R, M, H, Q), dtype)

    def forward(arrays, tokens):
        # No implementation is named: what is compiled for a TPU takes the TPU's.
        return kernel.softmax_attention(*arrays, *tokens, MaskRule(), scale=Q**-0.5)

    def backward(arrays, tokens, d):
        return jax.vjp(lambda a: forward(a, tokens), arrays)[1](d)

    for direction, function, more in (("forward", forward, ()), ("backward", backward, (q,))):
        program = jax.jit(function).lower((q, k, k), tokens, *more).compile()
        yield {
            **{"direction": direction, "R": R, "N": N, "M": M, "H": H, "Q": Q},
            "bytes": jnp.dtype(dtype).itemsize,
            "temporaries": program.memory_analysis().temp_size_in_bytes,
            "kernels": program.as_text().count('custom_call_target="tpu_custom_call"'),
        }


if __name__ == "__main__":
    print(json.dumps([entry for shape in SHAPES for entry in compiled(sys.argv[1], *shape)]))
