"""The kernels as the platforms compile them: for a TPU by its own compiler, for a GPU to Triton."""

import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from rankjax.batch import Tokens
from rankjax.kernels import hstu_attention as kernel
from rankjax.kernels.hstu_attention import tiles
from rankjax.masks import MaskRule
from tests.kernels import lower_for_gpu

R, N, H, Q = 2, 1024, 4, 128
FIELDS = ("segment", "role", "time", "position", "group", "bias_time")


def forward(arrays, bias, tokens):
    # No implementation is named: the platform that is compiled for decides.
    options = {"normalizer": 1.0, "bias": bias}
    return kernel.hstu_attention(*arrays, tokens, tokens, MaskRule(), **options)


def backward(arrays, bias, tokens, d):
    return jax.vjp(lambda a, b: forward(a, b, tokens), arrays, bias)[1](d)


def shapes(dtype, tables, width=Q, v_width=None):
    shape = jax.ShapeDtypeStruct
    x, v = shape((R, N, H, width), dtype), shape((R, N, H, v_width or width), dtype)
    ids = Tokens(**{field: shape((R, N), jnp.int32) for field in FIELDS})
    of = {"position": shape((2 * N - 1,), jnp.float32), "time": shape((129,), jnp.float32)}
    bias = kernel.RelativeBias(**{name: x if name in tables else None for name, x in of.items()})
    return (x, x, v), bias if tables else None, ids


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("tables", [(), ("time",), ("position",), ("position", "time")])
def test_a_gpu_gets_its_own_kernels(dtype, tables):
    args = shapes(dtype, tables)
    found = lower_for_gpu.launches(lower_for_gpu.lowered(forward, *args))
    assert set(found) == {"hstu_forward"}
    found = lower_for_gpu.launches(lower_for_gpu.lowered(backward, *args, args[0][2]))
    wanted = {"hstu_d_queries", "hstu_d_keys"} | ({"hstu_d_tables"} if tables else set())
    assert set(found) == wanted and all(len(calls) == 1 for calls in found.values())


@pytest.mark.parametrize(("width", "v_width"), [(16, 32), (128, 128), (256, 64)])
def test_a_gpu_is_told_the_tiles_of_the_table(width, v_width):
    args = shapes(jnp.bfloat16, ("position", "time"), width, v_width)
    best = tiles.best("pallas_gpu", max(width, v_width), "NVIDIA H200")
    found = lower_for_gpu.launches(lower_for_gpu.lowered(forward, *args))
    found |= lower_for_gpu.launches(lower_for_gpu.lowered(backward, *args, args[0][2]))
    for name in tiles.KERNELS:
        tile = getattr(best, name)
        ((grid, warps, stages),) = found[f"hstu_{name}"]
        assert warps == tile.warps and stages <= tile.stages
        if name == "d_tables":
            assert stages == 1 and grid == R * N // tile.queries  # fewer than PROGRAMS
        else:
            assert grid == R * H * N // (tile.keys if name == "d_keys" else tile.queries)


def test_what_the_interpreter_does_not_see():
    """Threads wait where they read what others wrote; bfloat16 goes by the card's tanh."""
    code = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        args = shapes(dtype, ("position", "time"))
        text = lower_for_gpu.lowered(backward, *args, args[0][2])
        for line in text.splitlines():
            if lower_for_gpu.TRITON in line:
                name = re.search(r'name = "(\w+)"', line).group(1)
                code[name, jnp.dtype(dtype).name] = re.search(r'ir = "([^"]*)"', line).group(1)
    assert len(code) == 6
    for (name, dtype), text in code.items():
        assert ("barrier" in text) == (name == "hstu_d_tables")
        assert ("tanh.approx" in text) == (dtype == "bfloat16")


def test_no_pass_on_a_gpu_holds_a_square_array():
    args = shapes(jnp.bfloat16, ("position", "time"))
    for function, more in ((forward, ()), (backward, (args[0][2],))):
        text = lower_for_gpu.lowered(function, *args, *more)
        sizes = re.findall(r"tensor<([0-9x]+)x[a-z]", text)
        assert max(math.prod(map(int, s.split("x"))) for s in sizes) == R * N * H * Q


def test_a_gpu_adds_nothing_to_memory_that_others_write():
    """No atomics: sums have one order, and the same input gives the same bits."""
    args = shapes(jnp.bfloat16, ("position", "time"))
    text = lower_for_gpu.lowered(backward, *args, args[0][2])
    code = re.findall(r'ir = "([^"]*)"', text)
    assert len(code) == 3 and all("dot" in c for c in code)  # names of operations can be read
    assert not any("atomic" in c for c in code)
    assert "stablehlo.scatter" not in text


def test_other_platforms_take_xla():
    args = shapes(jnp.bfloat16, ("position", "time"))
    text = jax.jit(forward).lower(*args).as_text()
    assert "custom_call" not in text.replace("@Sharding", "")


TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
NO_LIBTPU = "libtpu is missing: pip install 'jax[tpu]' (Linux, x86-64); it compiles without a TPU"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=NO_LIBTPU)
@pytest.mark.parametrize("target", TARGETS)
def test_the_tpu_kernels_compile_for_real_and_hold_no_square_array(target):
    """By the TPU's own compiler; temporaries grow with N, not with its square."""
    script = pathlib.Path(__file__).with_name("compile_for_tpu.py")
    env = os.environ | {
        **{"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_ID": "0"},
        **{"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"},
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may hold its lock
    }
    done = subprocess.run(
        [sys.executable, str(script), target], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for found in json.loads(done.stdout.splitlines()[-1]):
        lanes = found["R"] * found["H"] * max(found["Q"], 128)  # narrow heads are padded
        assert found["kernels"] == {"forward": 1, "backward": 2}[found["direction"]]
        # Bounded by q, k, v, d, the gradients and their copies with heads first.
        assert found["temporaries"] <= 8 * found["N"] * lanes * found["bytes"]
