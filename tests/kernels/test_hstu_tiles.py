"""Tiles: several a row, with samples packed, in XLA and in the kernels, interpreted.

The equations themselves are held by test_hstu_attention.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from rankjax import masks
from rankjax.batch import CANDIDATE, CONTEXT, HISTORY, PAD, Tokens
from rankjax.kernels import hstu_attention as kernel
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.kernels.hstu_attention import (
    pallas_gpu_bias,
    pallas_gpu_launch,
    pallas_gpu_time,
    pallas_tpu,
    tiles,
)
from tests.kernels import test_hstu_attention as suite

TILED = [name for name in kernel.IMPLEMENTATIONS if name != "reference"]
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
    "context fills blocks": {
        **{"N": 150, "context": 40, "tile": (16, 16)},
        "rule": masks.MaskRule(context="full", history="time"),
    },
    "more queries than keys": {"N": 150, "tile": (64, 16)},
}


def wide_inputs(N, P=300, time=True, heads=2, qk=8, v=5, seed=0, context=4, **_):
    """Two rows of two samples of unequal length: context, history, padding, candidates."""
    rng = np.random.default_rng(seed)
    R, X, C = 2, context, 20
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
@pytest.mark.parametrize("implementation", TILED)
def test_tiles_agree_with_all_pairs(implementation, name):
    case = WIDE[name]
    inputs = wide_inputs(**case)
    want = wide_run(case, inputs, "reference")
    assert_near(wide_run(case, inputs, implementation, case.get("tile", (128, 128))), want)


RULES = (
    masks.MaskRule(),
    masks.MaskRule(context="full", history="time"),
    masks.MaskRule(context="history", history="full", candidates="causal"),
    masks.MaskRule(window=7),
)


def drawn(seed):
    """A problem of any shape: widths, lengths, samples, rule, tile, dtype, queries of the end."""
    rng = np.random.default_rng(seed)
    pick = lambda *choices: choices[rng.integers(len(choices))]
    X, S, C = rng.integers(0, 9), rng.integers(1, 90), rng.integers(0, 30)
    R, M, samples = rng.integers(1, 4), X + S + C, rng.integers(1, 5)
    N = M if rng.random() < 0.6 else rng.integers(1, M + 1)
    ascending = lambda n: np.sort(rng.integers(0, samples, (R, n)), axis=1)
    role = np.tile([CONTEXT] * X + [HISTORY] * S + [CANDIDATE] * C, (R, 1))
    fields = {
        "segment": np.concatenate([ascending(n) for n in (X, S, C)], axis=1),
        "role": np.where(rng.random((R, M)) < pick(0, 0.1, 0.5), PAD, role),
        "time": rng.integers(0, 50, (R, M)),
        "position": rng.integers(0, pick(M, 300), (R, M)),
        "group": np.tile(np.arange(M) // pick(1, 3), (R, 1)),
        "bias_time": rng.integers(-(10 ** pick(2, 9)), 10**9, (R, M)),
    }
    H, Q, V, P = rng.integers(1, 4), pick(5, 16, 32), pick(7, 16, 24), pick(None, 3, 150)
    normal = lambda *shape: rng.normal(size=shape)
    arrays = normal(R, N, H, Q), normal(R, M, H, Q), normal(R, M, H, V)
    bias = kernel.RelativeBias(
        position=None if P is None else jnp.asarray(normal(2 * P - 1), jnp.float32),
        time=pick(None, jnp.asarray(normal(129), jnp.float32)),
    )
    tokens = suite.as_tokens({f: x[:, M - N :] for f, x in fields.items()}), suite.as_tokens(fields)
    static = {"rule": pick(*RULES), "dtype": pick(jnp.float32, jnp.bfloat16)}
    static |= {"tile": (pick(16, 32, 48), pick(16, 24, 64)), "scale": float(rng.uniform(0.2, 1))}
    return static, arrays, bias, tokens, jnp.asarray(rng.uniform(3, 30, (R, N)), jnp.float32)


@pytest.mark.parametrize(
    ("implementation", "seed"),
    [
        # Interpreted, a case takes seconds to compile.
        pytest.param(name, seed, marks=[pytest.mark.slow] * (seed > 1 and "pallas" in name))
        for name in TILED
        for seed in range(8)
    ],
)
def test_any_shape_agrees_with_all_pairs(implementation, seed):
    static, arrays, bias, tokens, normalizer = drawn(seed)
    arrays = tuple(jnp.asarray(x, static["dtype"]) for x in arrays)

    def run(implementation, arrays):
        def loss(arrays, bias):
            out = kernel.hstu_attention(
                *(*arrays, *tokens, static["rule"]),
                **{"normalizer": normalizer, "bias": bias, "scale": static["scale"]},
                **{"implementation": implementation},
                tile=None if implementation == "reference" else static["tile"],
            ).astype(jnp.float32)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(arrays, bias)
        return out, gradients

    # The reference is given what was rounded to bfloat16, and computes in float32.
    want = jax.jit(run, static_argnums=0)("reference", [x.astype(jnp.float32) for x in arrays])
    found = jax.jit(run, static_argnums=0)(implementation, arrays)
    assert_near(found, want, 1e-5 if static["dtype"] == jnp.float32 else 3e-2)


def test_a_long_list_of_tiles_is_halved_by_rows(monkeypatch):
    case = WIDE["several tiles, samples packed"]
    inputs = wide_inputs(**case)
    want = wide_run(case, inputs, "reference")
    monkeypatch.setattr(pallas_tpu, "SMEM_TILES", 9)  # those of one row
    assert_near(wide_run(case, inputs, "pallas_tpu", case["tile"]), want)
    monkeypatch.setattr(pallas_tpu, "SMEM_TILES", 8)
    with pytest.raises(NotImplementedError, match="the list of 3 x 3 tiles of a row exceeds"):
        wide_run(case, inputs, "pallas_tpu", case["tile"])


@pytest.mark.parametrize("name", [name for name in TILED if "pallas" in name])
def test_pallas_refuses_float64(name):
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="found float64"):
        suite.run(suite.CASES["plain"], suite.make(suite.CASES["plain"]), name, jnp.float64)


def test_few_programs_share_many_blocks(monkeypatch):
    """On a GPU a fixed number of programs sum the tables' gradients: here three, for ten blocks."""
    monkeypatch.setattr(pallas_gpu_bias, "PROGRAMS", 3)
    case = {"N": 150, "tile": (32, 32)}
    inputs = wide_inputs(**case)
    want = wide_run(case, inputs, "reference")
    assert_near(wide_run(case, inputs, "pallas_gpu", case["tile"]), want)


def test_cells_find_the_buckets_that_a_logarithm_finds():
    """All gaps up to 36 hours, those around every rise of the bucket, and random longer ones."""
    rises = np.exp(0.301 * np.arange(1, 72))
    rng = np.random.default_rng(0)
    longer = np.exp(rng.uniform(np.log(2**17), np.log(2**31 - 200), 20_000))
    # Where rounding decides, logarithms differ too.
    decided = np.abs(longer[:, None] / rises - 1).min(axis=1) > 2e-6
    near = (np.floor(rises)[:, None] + np.arange(-2, 4)).ravel()
    near = near[(near >= 0) & (near < 2**20)]
    seconds = np.concatenate([np.arange(2**17), near, longer[decided], [2**31 - 1]]).astype(
        np.int32
    )
    tokens = lambda time: suite.as_tokens(
        dict.fromkeys(("segment", "position", "group", "time"), np.zeros((1, 1)))
        | {"role": np.full((1, 1), HISTORY), "bias_time": time}
    )
    q, k = tokens(np.zeros((1, 1))), tokens(seconds[None])
    cells = jnp.asarray(pallas_gpu_time.cells())

    def kernel_body(cells_ref, seconds_ref, out_ref):
        zero = jnp.zeros(seconds_ref.shape, jnp.int32)
        q = Tokens(**{f.name: zero for f in dataclasses.fields(Tokens)})
        k = dataclasses.replace(q, bias_time=seconds_ref[...])
        out_ref[...] = pallas_gpu_time.bucket(cells_ref, q, k, with_context=False)

    got = pl.pallas_call(
        kernel_body, out_shape=jax.ShapeDtypeStruct(seconds.shape, jnp.int32), interpret=True
    )(cells, jnp.asarray(seconds))
    np.testing.assert_array_equal(got, jax.jit(bias_lib.bucket)(q, k)[0])
    assert len(np.unique(got)) > 65


def test_nothing_is_rounded_off_before_the_tables_sums():
    """A product of float32 with a one-hot matrix, in parts of 8 bits: exact to the last of 24."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(32, 64)) * np.exp(rng.normal(size=(32, 64)))).astype(np.float32)
    one_hot = np.eye(64, dtype=np.float32)[rng.permutation(64)]
    got = jax.jit(pallas_gpu_bias._exact)(x, jnp.asarray(one_hot, jnp.bfloat16))
    np.testing.assert_array_equal(got, x @ one_hot)


def test_positions_shifted_to_their_places():
    """Each segment by one number: the largest (place - position) of its history."""
    fields = {
        "segment": [[0, 0, 0, 1, 1, 7, 0, 1]],
        "role": [[HISTORY] * 5 + [CONTEXT] + [CANDIDATE] * 2],
        "position": [[0, 1, 1, 0, 1, 4, 2, 2]],
    }
    none = dict.fromkeys(("time", "group", "bias_time"), np.zeros((1, 8)))
    t = suite.as_tokens(fields | none)
    q, k = bias_lib.dense_positions((jax.tree.map(lambda x: x[:, 5:], t), t))
    # Segment 0 by 1 (its third event), 1 by 3, 7 has no history.
    np.testing.assert_array_equal(k.position, [[1, 2, 2, 3, 4, 4, 3, 5]])
    np.testing.assert_array_equal(q.position, [[4, 3, 5]])


def test_tiles_fit_the_shared_memory_of_every_card():
    for width in (16, 64, 128, 256):
        for dtype in (jnp.bfloat16, jnp.float32):
            x = jax.ShapeDtypeStruct((1, 5000, 2, width), dtype)
            best = tiles.best("pallas_gpu", width)
            for name in tiles.KERNELS:
                tile = pallas_gpu_launch.fitted(getattr(best, name), (x, x, x), name)
                stay, passing = tile[1::-1] if name == "d_keys" else tile[:2]
                stay *= 1 if name == "forward" else 2
                row = width * jnp.dtype(dtype).itemsize
                assert row * (stay + 2 * tile.stages * passing) <= 96 * 2**10
                assert min(tile[:2]) >= 16
                if dtype == jnp.bfloat16 and width <= 128:
                    assert tile == getattr(best, name)


def test_every_kernel_has_its_own_tile():
    case = {"N": 150}
    inputs = wide_inputs(**case)
    want = wide_run(case, inputs, "reference")
    sizes = (64, 16), (32, 64), (16, 32), (64, 64)
    own = {name: tiles.Tile(*size) for name, size in zip(tiles.KERNELS, sizes, strict=True)}
    for implementation in ("xla", "pallas_gpu"):
        found = wide_run(case, inputs, implementation, tiles.Tiles(**own))
        assert_near(found, want)


def test_the_table_of_tiles():
    """Every implementation has a row for devices that nobody measured; a row fits its kernels."""
    assert set(tiles.table()) == set(TILED)
    for name, kinds in tiles.table().items():
        assert "default" in kinds
        for kind, rows in kinds.items():
            for width in rows:
                found = tiles.best(name, int(width), kind)
                for kernel_name in tiles.KERNELS:
                    tile = getattr(found, kernel_name)
                    step = {"pallas_tpu": 128, "pallas_gpu": 16}.get(name, 1)
                    assert tile.queries % step == tile.keys % step == 0
                    if name == "pallas_gpu":
                        assert all(n & (n - 1) == 0 for n in tile[:3])


def test_rows_of_the_table_serve_heads_up_to_their_width(monkeypatch):
    row = lambda n: {name: [n, n] for name in tiles.KERNELS}
    kinds = {"default": {"64": row(1), "128": row(2)}, "NVIDIA H200": {"256": row(3)}}
    monkeypatch.setattr(tiles, "table", lambda: {"xla": kinds})
    found = lambda width, kind: tiles.best("xla", width, kind).forward.queries
    assert [found(width, "unknown") for width in (16, 64, 65, 128, 256)] == [1, 1, 2, 2, 2]
    assert found(16, "NVIDIA H200") == 3
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    assert found(16, None) == 1  # this machine's
    with jax.sharding.use_abstract_mesh(mesh):
        assert found(16, None) == 3  # what is compiled for
