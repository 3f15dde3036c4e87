"""Every implementation of softmax attention against row-by-row float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import masks
from rankjax.batch import CANDIDATE, CONTEXT, GLOBAL, HISTORY, PAD, Tokens
from rankjax.kernels import softmax_attention as kernel
from rankjax.kernels.softmax_attention import xla
from tests.references import softmax_attention as reference

R, N, M, H, Q, V, SCALE = 2, 5, 12, 2, 3, 4, 0.6
RULE = masks.MaskRule()
FUNCTIONS = {
    name: functools.partial(kernel.softmax_attention, implementation=name)
    for name in kernel.IMPLEMENTATIONS
}


def in_blocks(*args, scale, scores=None):
    return xla.softmax_attention(*args, scale=scale, scores_rhnm=scores, pairs=0, block=3)


FUNCTIONS["xla in blocks"] = in_blocks
EACH = pytest.mark.parametrize("function", FUNCTIONS)


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


@EACH
@pytest.mark.parametrize("broadcast", [False, True])
def test_value_and_gradients(function, broadcast):
    arrays, scores, d, tokens, allow = data(1, 1) if broadcast else data()
    to32 = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    (da, ds), out = compiled(function)(to32(arrays), to32(scores), to32(d), tokens)
    full = np.broadcast_to(scores, (R, H, N, M))
    for r in range(R):
        row = [x[r] for x in arrays]
        want = reference.attention(*row, allow[r], SCALE, full[r])
        np.testing.assert_allclose(out[r], want, rtol=0, atol=2e-6)
        wants = reference.gradients(d[r], *row, allow[r], SCALE, full[r])
        for got, want in zip(da, wants):
            np.testing.assert_allclose(got[r], want, rtol=0, atol=5e-6)
        want = wants[3].sum(axis=(0, 1), keepdims=True) if broadcast else wants[3]
        np.testing.assert_allclose(ds[r], want, rtol=0, atol=5e-6)


@EACH
def test_float64_agrees_to_1e9(function):
    arrays, scores, d, tokens, allow = data()
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (arrays, scores, d))
        (da, ds), out = compiled(function)(*wide, tokens)
    assert out.dtype == ds.dtype == np.float64
    for r in range(R):
        row = [*(x[r] for x in arrays), allow[r], SCALE, scores[r]]
        np.testing.assert_allclose(out[r], reference.attention(*row), rtol=1e-9, atol=1e-12)
        for got, want in zip((*da, ds), reference.gradients(d[r], *row)):
            np.testing.assert_allclose(got[r], want, rtol=1e-9, atol=1e-11)


@EACH
def test_rows_that_may_read_nothing_are_zero_and_move_nothing(function):
    arrays, scores, d, (queries, keys), allow = data()
    assert not allow[1, -1].any() and allow[0].any()
    for dtype in (jnp.float32, jnp.bfloat16):
        x = [jnp.asarray(a, dtype) for a in arrays]
        (da, ds), out = compiled(function)(x, jnp.asarray(scores), jnp.asarray(d), (queries, keys))
        assert out.dtype == dtype
        np.testing.assert_array_equal(out[1, -1].astype(np.float32), 0)
        np.testing.assert_array_equal(np.asarray(da[0][1, -1], np.float32), 0)
        assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in (*da, ds))


@EACH
def test_bfloat16_is_near(function):
    arrays, scores, _, tokens, allow = data()
    run = jax.jit(lambda *a: FUNCTIONS[function](*a, *tokens, RULE, scale=SCALE, scores=scores))
    got = run(*[jnp.asarray(x, jnp.bfloat16) for x in arrays])
    for r in range(R):
        want = reference.attention(*[x[r] for x in arrays], allow[r], SCALE, scores[r])
        np.testing.assert_allclose(got[r].astype(np.float32), want, rtol=0, atol=5e-2)


@EACH
def test_no_scores(function):
    arrays, _, _, tokens, _ = data()
    x = [jnp.asarray(a, jnp.float32) for a in arrays]
    run = lambda s: FUNCTIONS[function](*x, *tokens, RULE, scale=SCALE, scores=s)
    np.testing.assert_allclose(run(None), run(jnp.zeros((1, 1, 1, M))), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scored", [False, True])
def test_blocks_hold_strips_only(scored):
    """Forward and backward at N = M = 1024 in blocks of 64 queries: no whole [N, M] array of our
    own; the scores, where given, are the caller's."""
    n = 1024
    tokens = Tokens(
        **{
            name: jnp.full((1, n), HISTORY if name == "role" else 0)
            for name in ("segment", "role", "time", "position", "group", "bias_time")
        }
    )

    def loss(q, k, v):
        scores = jnp.zeros((1, 1, 1, n)) if scored else None
        function = functools.partial(xla.softmax_attention, pairs=0, block=64, scores_rhnm=scores)
        return jnp.sum(function(q, k, v, tokens, tokens, RULE, scale=1.0))

    x = jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32)
    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().memory_analysis()
    assert found.temp_size_in_bytes < 4 * n * n  # a float32 [N, M] alone


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
