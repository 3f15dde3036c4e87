"""Every implementation of softmax attention against row-by-row float64 NumPy."""

import functools
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import masks
from rankjax.batch import CANDIDATE, CONTEXT, GLOBAL, HISTORY, PAD, Tokens
from rankjax.kernels import softmax_attention as kernel
from rankjax.kernels import tile_loop
from rankjax.kernels.softmax_attention import api, by_splash, by_tokamax, xla, xla_tiles
from rankjax.kernels.softmax_attention import mask as mask_lib
from tests.references import softmax_attention as reference

R, N, M, H, Q, V, SCALE = 2, 5, 12, 2, 3, 4, 0.6
RULE = masks.MaskRule()
NO_SCORES = {"splash", "xla in tiles"}
NO_FLOAT64 = {"splash", "tokamax", "jax_nn"}
FUNCTIONS = {
    name: functools.partial(kernel.softmax_attention, implementation=name)
    for name in kernel.IMPLEMENTATIONS
}


def in_strips(*args, scale, scores=None):
    return xla.strips(*args, scale=scale, scores_rhnm=scores, pairs=0, block=3)


def in_tiles(q, k, v, q_tokens, k_tokens, rule, *, scale, scores=None):
    if scores is not None:
        raise NotImplementedError("takes no scores; use 'xla'")
    return xla_tiles.softmax_attention((q, k, v), (q_tokens, k_tokens), rule, scale, (3, 5))


FUNCTIONS |= {"xla in strips": in_strips, "xla in tiles": in_tiles}
NO_TOKAMAX = pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None,
    reason="tokamax is missing: pip install 'rankjax[tokamax]', Python 3.12 or later",
)
EACH = pytest.mark.parametrize(
    "function", [pytest.param(f, marks=[NO_TOKAMAX] * (f == "tokamax")) for f in FUNCTIONS]
)


@functools.cache
def data(heads_of_scores=H, queries_of_scores=N):
    """float64 arrays, padded tokens [R, M], and the mask of the last N of them as queries."""
    rng = np.random.default_rng(0)
    roles = [CONTEXT] * 2 + [HISTORY] * 5 + [GLOBAL] * 2 + [CANDIDATE] * 3
    tokens = {
        "segment": np.zeros((R, M), int),
        "role": np.where(rng.random((R, M)) < 0.15, PAD, np.tile(roles, (R, 1))),
        "time": rng.integers(0, 9, (R, M)),
        "position": rng.integers(0, M, (R, M)),
        "group": np.tile(np.arange(M), (R, 1)),
        "bias_time": np.zeros((R, M), int),
    }
    tokens["role"][1, -1] = PAD
    tokens = Tokens(**{name: jnp.asarray(x, jnp.int32) for name, x in tokens.items()})
    queries = jax.tree.map(lambda x: x[:, M - N :], tokens)
    arrays = [rng.normal(size=s) for s in ((R, N, H, Q), (R, M, H, Q), (R, M, H, V))]
    scores = rng.normal(size=(R, heads_of_scores, queries_of_scores, M))
    allow = np.asarray(RULE.allow(queries, tokens))
    return arrays, scores, rng.normal(size=(R, N, H, V)), (queries, tokens), allow


@functools.cache
def compiled(function):
    def loss(arrays, scores, d, tokens):
        out = FUNCTIONS[function](*arrays, *tokens, RULE, scale=SCALE, scores=scores)
        return jnp.sum(out.astype(d.dtype) * d), out

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def of(function, scores):
    """The scores that the function is tested with."""
    return None if function in NO_SCORES else scores


@EACH
@pytest.mark.parametrize("kind", ["none", "shared", "full"])
def test_value_and_gradients(function, kind):
    arrays, scores, d, tokens, allow = data(1, 1) if kind == "shared" else data()
    to32 = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    scores = None if kind == "none" else scores
    if function in NO_SCORES and kind != "none":
        with pytest.raises(NotImplementedError, match="takes no scores; use 'xla'"):
            compiled(function)(to32(arrays), to32(scores), to32(d), tokens)
        return
    (da, ds), out = compiled(function)(to32(arrays), to32(scores), to32(d), tokens)
    full = np.broadcast_to(0.0 if scores is None else scores, (R, H, N, M))
    for r in range(R):
        row = [x[r] for x in arrays]
        want = reference.attention(*row, allow[r], SCALE, full[r])
        np.testing.assert_allclose(out[r], want, rtol=0, atol=2e-6)
        wants = reference.gradients(d[r], *row, allow[r], SCALE, full[r])
        for got, want in zip(da, wants):
            np.testing.assert_allclose(got[r], want, rtol=0, atol=5e-6)
        if kind != "none":
            shared = kind == "shared"
            want = wants[3].sum(axis=(0, 1), keepdims=True) if shared else wants[3]
            np.testing.assert_allclose(ds[r], want, rtol=0, atol=5e-6)


@EACH
def test_float64_agrees_to_1e9(function):
    arrays, scores, d, tokens, allow = data()
    scores = of(function, scores)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (arrays, scores, d))
        if function in NO_FLOAT64:
            with pytest.raises(NotImplementedError, match="found float64; use 'xla'"):
                compiled(function)(*wide, tokens)
            return
        (da, ds), out = compiled(function)(*wide, tokens)
    assert out.dtype == np.float64
    got_all = da if scores is None else (*da, ds)
    for r in range(R):
        full = np.zeros((H, N, M)) if scores is None else scores[r]
        row = [*(x[r] for x in arrays), allow[r], SCALE, full]
        np.testing.assert_allclose(out[r], reference.attention(*row), rtol=1e-9, atol=1e-12)
        for got, want in zip(got_all, reference.gradients(d[r], *row)):
            np.testing.assert_allclose(got[r], want, rtol=1e-9, atol=1e-11)


@EACH
def test_rows_that_may_read_nothing_are_zero_and_move_nothing(function):
    arrays, scores, d, (queries, keys), allow = data()
    assert not allow[1, -1].any() and allow[0].any()
    for dtype in (jnp.float32, jnp.bfloat16):
        x = [jnp.asarray(a, dtype) for a in arrays]
        scores_ = jax.tree.map(jnp.asarray, of(function, scores))
        (da, ds), out = compiled(function)(x, scores_, jnp.asarray(d), (queries, keys))
        assert out.dtype == dtype
        np.testing.assert_array_equal(out[1, -1].astype(np.float32), 0)
        np.testing.assert_array_equal(np.asarray(da[0][1, -1], np.float32), 0)
        grads = jax.tree.leaves((da, ds))
        assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads)


@EACH
def test_bfloat16_is_near(function):
    arrays, scores, _, tokens, allow = data()
    scores = of(function, scores)
    run = jax.jit(lambda *a: FUNCTIONS[function](*a, *tokens, RULE, scale=SCALE, scores=scores))
    got = run(*[jnp.asarray(x, jnp.bfloat16) for x in arrays])
    full = np.broadcast_to(0.0 if scores is None else scores, (R, H, N, M))
    for r in range(R):
        want = reference.attention(*[x[r] for x in arrays], allow[r], SCALE, full[r])
        np.testing.assert_allclose(got[r].astype(np.float32), want, rtol=0, atol=5e-2)


@pytest.mark.parametrize("scored", [False, True])
def test_xla_holds_strips_or_tiles_only(scored, monkeypatch):
    """Forward and backward at N = M = 1024: no whole [N, M] array of our own; the scores, where
    given, are the caller's. Of tiles, a CPU's, less than the strips of 64 queries."""
    n = 1024
    shape = lambda s, d=jnp.int32: jax.ShapeDtypeStruct(s, d)
    tokens = Tokens(**{name: shape((1, n)) for name in vars(data()[3][0])})

    def temporaries(function):
        def loss(q, k, v, tokens):
            return jnp.sum(function(q, k, v, tokens, tokens, RULE, scale=1.0))

        x = shape((1, n, 1, 8), jnp.float32)
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, tokens)
        return step.compile().memory_analysis().temp_size_in_bytes

    scores = jnp.zeros((1, 1, 1, n)) if scored else None
    found = temporaries(functools.partial(xla.strips, pairs=0, block=64, scores_rhnm=scores))
    assert found < 4 * n * n  # a float32 [N, M] alone
    if not scored:
        monkeypatch.setattr(xla, "FEW", n * n - 1)
        assert temporaries(functools.partial(xla.softmax_attention, scores_rhnm=None)) < found


def test_tiles_that_nobody_reads_are_skipped(monkeypatch):
    """NaN there would spoil any sum it came near to."""
    (q, k, v), queries, keys = large(dtype=jnp.float32)
    monkeypatch.setattr(tile_loop, "STEP", 1)  # each row by itself
    # Of row 1, of padding, and of row 0 before the queries' windows, nothing is read.
    rule = masks.MaskRule(window=300)
    read = rule.possible(masks.ranges(queries, 50), masks.ranges(keys, 50)).any(axis=1)
    unread = jnp.repeat(~read, 50, axis=1)[..., None, None]
    assert unread[0].any() and unread[1].all()
    run = lambda x: xla_tiles.softmax_attention(
        (q, k, jnp.where(unread, x, v)), (queries, keys), rule, 0.3, (50, 50)
    )
    got, want = run(jnp.nan), run(0.0)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, want)


def large(n=200, m=700, dtype=jnp.float32):
    """Arrays and tokens of several blocks: a row of two packed samples, and one of padding only."""
    rng = np.random.default_rng(1)
    role = np.where(np.arange(m) < 20, CONTEXT, np.where(np.arange(m) < m - 50, HISTORY, CANDIDATE))
    role = np.where(rng.random((R, m)) < 0.05, PAD, role)
    role[0, -1], role[1] = PAD, PAD
    fields = {
        **{"segment": np.tile(np.arange(m) % 2, (R, 1)), "role": role},
        **{"time": rng.integers(0, 9, (R, m)), "position": np.tile(np.arange(m), (R, 1))},
        **{"group": np.tile(np.arange(m), (R, 1)), "bias_time": np.zeros((R, m))},
    }
    keys = Tokens(**{name: jnp.asarray(x, jnp.int32) for name, x in fields.items()})
    queries = jax.tree.map(lambda x: x[:, m - n :], keys)
    shapes = (R, n, H, 24), (R, m, H, 24), (R, m, H, 16)
    arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]
    return arrays, queries, keys


def large_step(implementation, arrays, *tokens, **options):
    """Value and gradients of sum(sin(out))."""

    def loss(arrays):
        out = kernel.softmax_attention(
            *(*arrays, *tokens, RULE), scale=0.3, implementation=implementation, **options
        )
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return out, *gradients


def assert_near_the_reference(implementation, *size, **options):
    inputs = large(*size)
    got = jax.jit(functools.partial(large_step, implementation, **options))(*inputs)
    want = jax.jit(functools.partial(large_step, "reference", **options))(*inputs)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", [None, "xla", "jax_nn", "splash"])
def test_several_blocks_of_packed_samples(implementation, monkeypatch):
    monkeypatch.setattr(by_splash, "BLOCK", 128)
    assert_near_the_reference(implementation)


def test_a_row_of_the_mask_that_would_be_empty_holds_key_0():
    """No library promises what its softmax over nothing is."""
    _, _, _, (queries, keys), allow = data()
    mask, reads = map(np.asarray, mask_lib.dense(RULE, queries, keys))
    np.testing.assert_array_equal(reads, allow.any(axis=2))
    assert not reads.all()
    np.testing.assert_array_equal(mask[reads], allow[reads])
    assert (mask[~reads].sum(axis=1) == 1).all() and mask[~reads][:, 0].all()


@NO_TOKAMAX
@pytest.mark.parametrize("scored", [False, True])
def test_tokamaxs_triton_kernels_interpreted(scored, monkeypatch):
    from jax.experimental import pallas

    interpreted = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(pallas, "pallas_call", interpreted)
    # The interpreter knows no program_id under a condition; for these sizes all of them hold.
    monkeypatch.setattr(pallas, "when", lambda _: lambda body: body())
    triton = functools.partial(by_tokamax.softmax_attention, kernel="triton")
    monkeypatch.setattr(api, "_forced", lambda _: {"default": triton})
    scores = jnp.sin(jnp.arange(256.0)).reshape(1, 1, 1, 256) if scored else None
    with jax.default_matmul_precision("highest"):
        assert_near_the_reference("tokamax", 256, 256, scores=scores)


def kernels(platform, n=512, **change):
    """The custom calls of a step lowered for a platform, {name: number}."""
    shape = lambda s, d=jnp.int32: jax.ShapeDtypeStruct(s, d)
    tokens = Tokens(**{f: shape((1, n)) for f in vars(data()[3][0])})
    x = [shape((1, n, H, 64), change.pop("dtype", jnp.bfloat16))] * 3
    step = functools.partial(large_step, change.pop("implementation", None), **change)
    # Triton's kernels are lowered for a kind of GPU, and here is none to ask.
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", platform="gpu", num_cores=None)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(step).trace(x, tokens, tokens)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    return {name: text.count(f"@{name}(") for name in re.findall(r"custom_call @([\w$.]+)\(", text)}


def test_the_platform_compiled_for_takes_its_kernel():
    assert kernels("cpu") == {}
    assert set(kernels("tpu")) == {"tpu_custom_call"}
    assert kernels("tpu", implementation="xla") == {}


def test_what_splash_attention_does_not_take_goes_to_xla(monkeypatch):
    assert kernels("tpu", scores=jnp.zeros((1, 1, 1, 512))) == {}
    assert kernels("tpu", n=128) == {}  # of few pairs
    monkeypatch.setattr(by_splash, "MASK", 512 * 512 - 1)
    assert kernels("tpu") == {}
    with pytest.raises(NotImplementedError, match="splash' holds a mask of N x M pairs"):
        kernels("tpu", implementation="splash")


@NO_TOKAMAX
def test_on_cuda_tokamax_is_taken_and_what_it_does_not_take_goes_to_xla(monkeypatch):
    triton = "__gpu$xla.gpu.triton"
    assert kernels("cuda") == {triton: 2}
    assert kernels("cuda", scores=jnp.zeros((1, 1, 1, 512)), dtype=jnp.float32) == {triton: 2}
    assert kernels("cpu", implementation="tokamax") == {}
    monkeypatch.setattr(by_tokamax, "SCORES", 1)
    assert kernels("cuda", scores=jnp.zeros((1, 1, 1, 512))) == {}
    for name, value, match in (("MASK", 1, "holds a mask"), ("HEAD", 64, "takes heads of up to")):
        with monkeypatch.context() as patch:
            patch.setattr(by_tokamax, name, value)
            assert kernels("cuda") == {}
            with pytest.raises(NotImplementedError, match=f"tokamax' {match}"):
                kernels("cuda", implementation="tokamax")


@pytest.mark.parametrize("old", [False, True])
def test_without_tokamax(old, monkeypatch):
    """Nor with one too old: CUDA takes XLA, and who asks for tokamax is told what to install."""
    if old:
        package = types.SimpleNamespace(config=types.SimpleNamespace(), __file__="tokamax.py")
        package.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
        monkeypatch.setitem(sys.modules, "tokamax", package)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels("cuda") == {}
    assert set(kernels("tpu")) == {"tpu_custom_call"}
    with pytest.raises(ImportError, match=r"pip install 'rankjax\[tokamax\]'"):
        kernels("cuda", implementation="tokamax")


NO_LIBTPU = "libtpu is missing: pip install 'jax[tpu]' (Linux, x86-64); it compiles without a TPU"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=NO_LIBTPU)
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_splash_attention_compiles_for_real(target):
    """By the TPU's own compiler: forward, and forward, dq and dkv; no scores in memory."""
    script = pathlib.Path(__file__).with_name("compile_softmax_for_tpu.py")
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
        assert found["kernels"] == {"forward": 1, "backward": 3}[found["direction"]]
        # The mask of one row, which a TPU holds widened, and some copies of the arrays.
        lanes = found["R"] * found["H"] * max(found["Q"], 128)
        copies = 8 * (found["N"] + found["M"]) * lanes * found["bytes"]
        assert found["temporaries"] <= 14 * found["N"] * found["M"] + copies


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"implementation": "cuda"}, "implementation='cuda', expected None or one of"),
        ({"q": (R, N, H)}, "q has shape .* expected four axes"),
        ({"k": (R, M, H, Q + 1)}, "k has shape"),
        ({"v": (R, M + 1, H, V)}, "v has shape"),
        ({"scores": (R, H, N, M + 1)}, "scores have shape"),
        ({"scores": (R, N, M)}, "scores have shape"),
        ({"dtype": jnp.float16}, "expected one of float32"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    _, _, _, tokens, _ = data()
    shapes = {"q": (R, N, H, Q), "k": (R, M, H, Q), "v": (R, M, H, V), "scores": (R, H, N, M)}
    shapes |= {k: v for k, v in change.items() if k in shapes}
    dtype = change.get("dtype", jnp.float32)
    q, k, v, scores = (jnp.zeros(s, dtype) for s in shapes.values())
    with pytest.raises(ValueError, match=f"softmax_attention: .*{match}"):
        kernel.softmax_attention(
            *(q, k, v, *tokens, RULE),
            scale=1.0,
            scores=scores,
            implementation=change.get("implementation"),
        )
