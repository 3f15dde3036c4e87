"""Compiles the kernels for an H200 with none at hand, and reads the machine code's needs.

    python3.12 -m venv cuda && cuda/bin/pip install -e . "jax[cuda12]"     # 5.5 GB, so not in CI
    cuda/bin/python tests/kernels/compile_for_gpu.py --widths 128 --length 4096

Prints a JSON line for every program (temporaries, kernels) and one for every kernel of it:
registers a thread, bytes spilled, products on tensor cores (wgmma, or the older mma.sync), and
the instructions of PTX in the loop over full tiles, by thread and pair of that thread.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import tempfile
from typing import Any

DUMP = pathlib.Path(tempfile.mkdtemp(prefix="rankjax-ptx-"))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMP} --xla_gpu_dump_llvmir --xla_dump_emitter_re=ptx"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from rankjax.batch import Tokens  # noqa: E402
from rankjax.kernels import hstu_attention as kernel  # noqa: E402
from rankjax.kernels.hstu_attention import tiles  # noqa: E402
from rankjax.kernels.hstu_attention.pallas_gpu_launch import fitted  # noqa: E402
from rankjax.masks import MaskRule  # noqa: E402
from rankjax.plan import targets  # noqa: E402

FIELDS = ("segment", "role", "time", "position", "group", "bias_time")


def programs(N: int, Q: int, dtype: Any, bias: bool, tile: Any, R: int = 1, H: int = 4) -> Any:
    """Yields a description of the forward and of the backward program, compiled."""
    topology = topologies.get_topology_desc(
        "h200", platform="cuda", target_config=targets.H200, topology="1x1x1"
    )
    mesh = Mesh(np.array(topology.devices), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = lambda s, d: jax.ShapeDtypeStruct(s, d, sharding=everywhere)
    tokens = Tokens(**{field: shape((R, N), jnp.int32) for field in FIELDS})
    tables = {"position": shape((2 * N - 1,), jnp.float32), "time": shape((129,), jnp.float32)}
    relative = kernel.RelativeBias(**tables) if bias else None
    x = shape((R, N, H, Q), dtype)

    def forward(arrays: Any, bias: Any, tokens: Tokens) -> jax.Array:
        options = {"normalizer": 1.0, "bias": bias, "tile": tile}
        return kernel.hstu_attention(*arrays, tokens, tokens, MaskRule(), **options)

    def backward(arrays: Any, bias: Any, tokens: Tokens, d: jax.Array) -> Any:
        return jax.vjp(lambda a, b: forward(a, b, tokens), arrays, bias)[1](d)

    own = tiles.Tiles.same(tile) if tile else tiles.best("pallas_gpu", Q, "NVIDIA H200")
    own = tiles.Tiles(
        **{name: fitted(getattr(own, name), (x, x, x), name) for name in tiles.KERNELS}
    )
    for direction, function, more in (("forward", forward, ()), ("backward", backward, (x,))):
        before = set(DUMP.glob("*.ptx"))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            program = jax.jit(function).lower((x, x, x), relative, tokens, *more).compile()
        files = sorted(set(DUMP.glob("*.ptx")) - before)
        needs = [k for path in files for k in kernels(path, own)]
        yield {
            **{"direction": direction, "N": N, "Q": Q, "dtype": jnp.dtype(dtype).name},
            **{"bias": bias, "temporaries": program.memory_analysis().temp_size_in_bytes},
            "kernels": needs,
        }


def kernels(path: pathlib.Path, own: tiles.Tiles) -> list[dict[str, Any]]:
    """What ptxas says of the HSTU kernel in a file of PTX, if it holds one."""
    text = path.read_text()
    if not (name := re.search(r"\.entry (hstu_\w+)", text)):
        return []
    target = re.search(r"\.target (\w+)", text).group(1)
    command = ["ptxas", "-v", f"-arch={target}", str(path), "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    threads = int(re.search(r"\.(?:req|max)ntid (\d+)", text).group(1))
    tile = getattr(own, name.group(1).removeprefix("hstu_"))
    return [
        {
            **{"kernel": name.group(1), "tile": tile[:2], "threads": threads},
            "instructions_a_pair": _loop(text, threads / (tile.queries * tile.keys)),
            "registers": int(re.search(r"Used (\d+) registers", said).group(1)),
            "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", said).group(1)),
            "wgmma": text.count("wgmma.mma_async"),
            "mma.sync": text.count("mma.sync"),
        }
    ]


def _loop(text: str, share: float) -> float | None:
    """Instructions from the first label that products stand behind to the jump back to it.

    Times the share of a pair; None without tensor cores.
    """
    lines = [line.strip() for line in text.splitlines()]
    products = (i for i, line in enumerate(lines) if "mma" in line and "fence" not in line)
    if (first := next(products, None)) is None:
        return None
    start = max(i for i, line in enumerate(lines[:first]) if line.startswith("$L__BB"))
    label = lines[start].rstrip(":")
    end = max(i for i, line in enumerate(lines) if "bra" in line and label in line)
    body = [line for line in lines[start:end] if line.endswith(";")]
    return round(share * sum(not line.startswith((".", "//")) for line in body), 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tile", type=int, nargs="+", help="queries keys [warps stages], for all")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--no-bias", action="store_true")
    args = parser.parse_args()
    dtype = jnp.float32 if args.float32 else jnp.bfloat16
    tile = None if args.tile is None else tuple(args.tile)
    for width in args.widths:
        for found in programs(args.length, width, dtype, not args.no_bias, tile):
            needs = found.pop("kernels")
            print(json.dumps(found), *(f"  {json.dumps(k)}" for k in needs), sep="\n", flush=True)
