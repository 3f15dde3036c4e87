"""Tiles: several a row, with samples packed, on a CPU and in the TPU kernels.

The equations themselves are held by test_hstu_attention.py.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import masks
from rankjax.batch import CANDIDATE, CONTEXT, HISTORY, PAD
from rankjax.kernels import hstu_attention as kernel
from rankjax.kernels.hstu_attention import pallas_tpu
from tests.kernels import test_hstu_attention as suite

# Interpreted: as large as tiles of 128 make interesting, as small as the interpreter allows.
WIDE = {
    "several tiles, samples packed": {"N": 300, "tile": (128, 128)},
    "positions beyond the table": {"N": 160, "P": 21},
    "other rule, one head, unequal widths": {
        **{"N": 200, "rule": masks.MaskRule(context="full", history="time"), "heads": 1},
        **{"qk": 128, "v": 64, "tile": (256, 128)},
    },
    "no bias": {"N": 140, "P": None, "time": False},
    "position only, window": {"N": 200, "time": False, "rule": masks.MaskRule(window=20)},
}


def wide_inputs(N, P=300, time=True, heads=2, qk=8, v=5, seed=0, **_):
    """Two rows of two samples of unequal length: context, history, padding, candidates."""
    rng = np.random.default_rng(seed)
    R, X, C = 2, 4, 20
    role = np.full((R, N), HISTORY)
    role[:, :X], role[:, -C:] = CONTEXT, CANDIDATE
    role[0, N // 2 : N // 2 + 9] = PAD
    segment = np.zeros((R, N), int)
    segment[1, X // 2 : X] = segment[1, N // 3 : N - C] = segment[1, -C // 2 :] = 1
    position = np.zeros((R, N), int)
    for r in range(R):
        for s in (0, 1):
            for kind, start in ((CONTEXT, 0), (HISTORY, X)):
                own = (segment[r] == s) & (role[r] == kind)
                position[r, own] = start + np.arange(own.sum())
            events = ((segment[r] == s) & (role[r] == HISTORY)).sum()
            position[r, (segment[r] == s) & (role[r] == CANDIDATE)] = X + events
    times = np.sort(rng.integers(0, 10**6, (R, N)), axis=1)
    times[:, -C:] = rng.integers(9 * 10**5, 11 * 10**5, (R, C))
    fields = {"segment": segment, "role": role, "time": times, "position": position}
    tokens = suite.as_tokens(fields | {"group": np.tile(np.arange(N), (R, 1)), "bias_time": times})
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    arrays = draw(R, N, heads, qk), draw(R, N, heads, qk), draw(R, N, heads, v)
    bias = kernel.RelativeBias(
        position=None if P is None else draw(2 * P - 1), time=draw(129) if time else None
    )
    bias = None if P is None and not time else bias
    return arrays, bias, tokens, jnp.asarray(rng.uniform(50, 90, (R, N)), jnp.float32)


def wide_run(case, inputs, implementation, tile=None):
    """Value and gradients of sum(sin(out))."""

    def loss(arrays, bias, tokens, normalizer):
        out = kernel.hstu_attention(
            *(*arrays, tokens, tokens, case.get("rule", masks.MaskRule())),
            **{"normalizer": normalizer, "bias": bias, "scale": 0.4, "tile": tile},
            implementation=implementation,
        )
        return jnp.sum(jnp.sin(out)), out

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), gradients = grad(*inputs)
    return out, gradients


def assert_near(got, want, tolerance=1e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * max(1, np.abs(w).max()))


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_tiles_agree_with_all_pairs(implementation, name):
    case = WIDE[name]
    inputs = wide_inputs(**case)
    want = wide_run(case, inputs, "reference")
    assert_near(wide_run(case, inputs, implementation, case.get("tile", (128, 128))), want)


def test_a_long_list_of_tiles_is_halved_by_rows(monkeypatch):
    case = WIDE["several tiles, samples packed"]
    inputs = wide_inputs(**case)
    want = wide_run(case, inputs, "reference")
    monkeypatch.setattr(pallas_tpu, "SMEM_TILES", 9)  # those of one row
    assert_near(wide_run(case, inputs, "pallas_tpu", case["tile"]), want)
    monkeypatch.setattr(pallas_tpu, "SMEM_TILES", 8)
    with pytest.raises(NotImplementedError, match="the list of 3 x 3 tiles of a row exceeds"):
        wide_run(case, inputs, "pallas_tpu", case["tile"])


def test_pallas_refuses_float64():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="found float64"):
        suite.run(suite.CASES["plain"], suite.make(suite.CASES["plain"]), "pallas_tpu", jnp.float64)


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
        # q, k, v, d, the gradients and their copies with heads first.
        assert found["temporaries"] <= 8 * found["N"] * lanes * found["bytes"]
