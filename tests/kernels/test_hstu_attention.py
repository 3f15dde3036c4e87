"""Every implementation of SiLU attention against pair-by-pair float64 NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import masks
from rankjax.batch import CANDIDATE, CONTEXT, HISTORY, PAD, Tokens
from rankjax.kernels import hstu_attention as kernel
from rankjax.kernels.hstu_attention import bias as bias_lib
from tests.references import hstu_attention as reference

RULE = masks.MaskRule()


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of one comparison. `segments` samples share each row."""

    rows: int = 2
    context: int = 2
    history: int = 7
    candidates: int = 3
    segments: int = 1
    heads: int = 2
    qk: int = 3
    v: int = 4
    scale: float = 1.0
    position: int | None = 11  # P; smaller than the sequence, so that clipping is seen
    time: bool = True
    per_row: bool = False  # normalizer [R, N] instead of a number
    last_only: bool = False  # only the candidates are queries


CASES = {
    "plain": Case(),
    "no bias": Case(position=None, time=False, scale=0.5),
    "position only": Case(time=False, context=0),
    "time only": Case(position=None, heads=1, candidates=1),
    "packed, normalizer per row": Case(segments=2, history=8, candidates=4, per_row=True),
    "candidates as queries": Case(last_only=True, position=40),
}


def make(case, seed=0):
    """float64 NumPy arrays and tokens {field: [R, N]} of a case; every row is padded otherwise."""
    rng = np.random.default_rng(seed)
    R, n = case.rows, case.context * case.segments + case.history + case.candidates
    role = [CONTEXT] * (case.context * case.segments)
    role += [HISTORY] * case.history + [CANDIDATE] * case.candidates
    role = np.tile(role, (R, 1))
    tokens = {
        # Ascending within every role.
        "segment": np.concatenate(
            [
                np.sort(rng.integers(0, case.segments, (R, size)), axis=1)
                for size in (case.context * case.segments, case.history, case.candidates)
            ],
            axis=1,
        ),
        "role": np.where((rng.random((R, n)) < 0.2) & (role != CONTEXT), PAD, role),
        "time": rng.integers(0, 9, (R, n)),
        "position": rng.integers(0, n, (R, n)),
        "group": np.tile(np.arange(n), (R, 1)),
        "bias_time": rng.choice([0, 1, 2, 50, 3600, 86_400, 9_000_000], (R, n)),
    }
    queries = slice(n - case.candidates, n) if case.last_only else slice(0, n)
    q_tokens = {name: x[:, queries] for name, x in tokens.items()}
    N, H = q_tokens["role"].shape[1], case.heads
    return {
        "q": rng.normal(size=(R, N, H, case.qk)),
        "k": rng.normal(size=(R, n, H, case.qk)),
        "v": rng.normal(size=(R, n, H, case.v)),
        "d": rng.normal(size=(R, N, H, case.v)),
        "position": rng.normal(size=2 * case.position - 1) if case.position else None,
        "time": rng.normal(size=129) if case.time else None,
        "normalizer": rng.uniform(5, 9, (R, N)) if case.per_row else 13.0,
        "q_tokens": q_tokens,
        "k_tokens": tokens,
    }


def as_tokens(fields):
    return Tokens(**{name: jnp.asarray(x, jnp.int32) for name, x in fields.items()})


@functools.cache
def compiled(case, function):
    """Value and gradients of sum(d * out), jitted once for all tests of a case and dtype."""

    def loss(arrays, d, normalizer, q_tokens, k_tokens):
        q, k, v, position, time = arrays
        no_bias = position is None and time is None
        out = FUNCTIONS[function](
            *(q, k, v, q_tokens, k_tokens, RULE),
            normalizer=normalizer if case.per_row else 13.0,
            scale=case.scale,
            bias=None if no_bias else kernel.RelativeBias(position=position, time=time),
        )
        wide = jnp.promote_types(out.dtype, jnp.float32)
        return jnp.sum(out.astype(wide) * d.astype(wide)), out

    return jax.jit(jax.grad(loss, has_aux=True))


def run(case, data, function, dtype=jnp.float32):
    """(out, gradients of q, k, v, position, time) of an implementation."""
    arrays = [jnp.asarray(data[x], dtype) for x in "qkv"]
    wide = jnp.promote_types(dtype, jnp.float32)
    arrays += [None if data[x] is None else data[x].astype(wide) for x in ("position", "time")]
    d, tokens = (
        jnp.asarray(data["d"], dtype),
        [as_tokens(data[x]) for x in ("q_tokens", "k_tokens")],
    )
    normalizer = np.float32(data["normalizer"])
    gradients, out = compiled(case, function)(arrays, d, normalizer, *tokens)
    return out, gradients


def truth(case, data):
    def row(function, *first, r):
        tokens = [
            [{f: x[r, i] for f, x in data[s].items()} for i in range(data[s]["role"].shape[1])]
            for s in ("q_tokens", "k_tokens")
        ]
        arrays = [data[x][r] for x in "qkv"]
        normalizer = data["normalizer"][r] if case.per_row else [13.0] * len(tokens[0])
        tables = data["position"], data["time"]
        return function(*first, *arrays, *tokens, normalizer, case.scale, *tables)

    rows = range(case.rows)
    out = np.stack([row(reference.attention, r=r) for r in rows])
    each = [row(reference.gradients, data["d"][r], r=r) for r in rows]
    gradients = [np.stack(x) for x in list(zip(*each))[:3]]
    gradients += [None if x[0] is None else sum(x) for x in list(zip(*each))[3:]]
    return out, gradients


@functools.cache
def solved(name):
    data = make(CASES[name])
    return data, truth(CASES[name], data)


FUNCTIONS = {
    name: functools.partial(kernel.hstu_attention, implementation=name)
    for name in kernel.IMPLEMENTATIONS
}
FUNCTIONS["xla in tiles"] = functools.partial(
    kernel.hstu_attention, implementation="xla", tile=(5, 4)
)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_value_and_gradients(function, name):
    data, (want, want_gradients) = solved(name)
    got, gradients = run(CASES[name], data, function)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    for g, w in zip(gradients, want_gradients):
        if w is None:
            assert g is None
        else:
            np.testing.assert_allclose(g, w, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if "pallas" not in name])
def test_float64_agrees_to_1e9(function):
    data, (want, want_gradients) = solved("plain")
    with jax.enable_x64(True):
        got, gradients = run(CASES["plain"], data, function, jnp.float64)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    for g, w in zip(gradients, want_gradients):
        assert g.dtype == np.float64
        np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bfloat16(function):
    data, (want, want_gradients) = solved("plain")
    got, gradients = run(CASES["plain"], data, function, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=2e-2, atol=2e-2)
    assert gradients[3].dtype == jnp.float32
    for g, w in zip(gradients, want_gradients):
        scale = np.abs(w).max()
        np.testing.assert_allclose(g.astype(np.float32), w, rtol=0, atol=3e-2 * scale)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_that_may_read_nothing_are_zero(function, dtype):
    case = CASES["plain"]
    data = make(case)
    for tokens in (data["q_tokens"], data["k_tokens"]):
        tokens["role"] = np.where(np.arange(case.rows)[:, None] == 0, PAD, tokens["role"])
    out, gradients = run(case, data, function, dtype)
    np.testing.assert_array_equal(out[0].astype(np.float32), 0)
    assert np.any(np.asarray(out[1], np.float32) != 0)
    assert all(np.all(np.isfinite(np.asarray(g, np.float32))) for g in gradients)
    for g in gradients[:3]:
        np.testing.assert_array_equal(g[0].astype(np.float32), 0)


def test_doubling_the_keys_doubles_the_result():
    case = Case(candidates=0, context=0)
    data = make(case)
    data["k_tokens"]["position"][:] = 0
    data["q_tokens"]["position"] = data["q_tokens"]["position"] * 0 + 1
    once, _ = run(case, data, "xla")
    twice_data = data | {x: np.concatenate([data[x], data[x]], axis=1) for x in "kv"}
    doubled = {f: np.concatenate([x, x], axis=1) for f, x in data["k_tokens"].items()}
    twice, _ = run(case, twice_data | {"k_tokens": doubled}, "xla")
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5, atol=1e-6)


def test_position_bias_is_toeplitz_and_reads_the_printed_index():
    n = 6
    fields = dict.fromkeys(("segment", "time", "group", "bias_time"), np.zeros((1, n)))
    tokens = as_tokens(fields | {"role": np.full((1, n), HISTORY), "position": [np.arange(n)]})
    table = jnp.arange(2.0 * n - 1)
    bias_nm = np.asarray(kernel.RelativeBias(position=table, time=None)(tokens, tokens))[0]
    np.testing.assert_array_equal(bias_nm, [[(n - 1) + j - i for j in range(n)] for i in range(n)])


def test_time_buckets():
    seconds = np.array([0, 1, 2, 3, 59, 3600, 86_400, 10**7, 2**31 - 1])
    fields = dict.fromkeys(("segment", "time", "group", "position"), np.zeros((1, len(seconds))))
    k = as_tokens(fields | {"role": np.full((1, len(seconds)), HISTORY), "bias_time": [seconds]})
    q = Tokens(**{name: x[:, :1] for name, x in vars(k).items()})
    got = np.asarray(bias_lib.time_bucket(q, k))[0, 0]
    np.testing.assert_array_equal(got, [reference.bucket(x) for x in seconds])
    assert got[0] == got[1] == 0 and got[2] == 2 and kernel.TIME_BUCKETS == 129
    np.testing.assert_array_equal(bias_lib.time_bucket(k, q)[0, :, 0], got)
    context = Tokens(**(vars(q) | {"role": jnp.full((1, 1), CONTEXT)}))
    np.testing.assert_array_equal(bias_lib.time_bucket(context, k), 0)


def test_blocks_keep_no_square_array():
    """Forward and backward of the block path hold no array of N x M elements."""
    n, block = 96, 16
    x = jax.ShapeDtypeStruct((1, n, 1, 4), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, n), jnp.int32)
    tokens = Tokens(**{f.name: ids for f in dataclasses.fields(Tokens)})
    bias = kernel.RelativeBias(
        position=jax.ShapeDtypeStruct((2 * n - 1,), jnp.float32),
        time=jax.ShapeDtypeStruct((129,), jnp.float32),
    )

    def loss(q, k, v, bias, tokens):
        out = kernel.hstu_attention(
            *(q, k, v, tokens, tokens, RULE),
            **{"normalizer": 1.0, "bias": bias, "implementation": "xla", "tile": (block, block)},
        )
        return jnp.sum(out**2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, x, x, bias, tokens)
    assert largest(jaxpr.jaxpr) < n * n


def largest(jaxpr):
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "size")]
    inner = [largest(j) for j in inner_jaxprs(jaxpr)]
    return max(sizes + inner, default=0)


def inner_jaxprs(jaxpr):
    params = [
        x for e in jaxpr.eqns for x in jax.tree.leaves(list(e.params.values()), is_leaf=callable)
    ]
    return [getattr(x, "jaxpr", x) for x in params if hasattr(getattr(x, "jaxpr", x), "eqns")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cuda"}, "implementation='cuda', expected None or one of"),
        ({"normalizer": 0}, "normalizer=0, expected a number > 0"),
        ({"normalizer": jnp.ones((3, 3))}, r"normalizer has shape \(3, 3\), expected \(2, 12\)"),
        ({"k": jnp.ones((2, 12, 2, 9))}, r"k has shape \(2, 12, 2, 9\), expected \(2, 12, 2, 3\)"),
        ({"v": jnp.ones((2, 12, 2, 4), jnp.bfloat16)}, "expected one of float32, bfloat16"),
        ({"q": jnp.ones((2, 12))}, "expected four axes"),
        ({"position": jnp.ones(20)}, "an odd number"),
        ({"time": jnp.ones(129, jnp.bfloat16)}, r"bias.time is bfloat16, expected float32"),
        ({"position": jnp.ones(21, jnp.int32)}, r"bias.position is int32, expected float32"),
        ({"time": jnp.ones(64)}, r"bias.time has shape \(64,\), expected \(129,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    data = make(CASES["plain"])
    args = {x: jnp.asarray(data[x], jnp.float32) for x in ("q", "k", "v", "position", "time")}
    args |= {"normalizer": 13.0, "implementation": None} | change
    tokens = as_tokens(data["q_tokens"]), as_tokens(data["k_tokens"])
    bias = kernel.RelativeBias(position=args.pop("position"), time=args.pop("time"))
    with pytest.raises(ValueError, match=message):
        kernel.hstu_attention(
            args["q"],
            args["k"],
            args["v"],
            *tokens,
            RULE,
            bias=bias,
            normalizer=args["normalizer"],
            implementation=args["implementation"],
        )


def test_descending_segments_are_refused_where_they_can_be_seen():
    data = make(CASES["packed, normalizer per row"])
    first, *_, last = range(4, 8)
    data["k_tokens"]["role"][1, first : last + 1] = HISTORY
    data["k_tokens"]["segment"][1, first : last + 1] = 0, 1, 0, 1
    data["k_tokens"]["segment"][1, last + 1 :] = 1
    tokens = as_tokens(data["q_tokens"]), as_tokens(data["k_tokens"])
    arrays = [jnp.asarray(data[x], jnp.float32) for x in "qkv"]
    call = functools.partial(kernel.hstu_attention, normalizer=1.0)
    with pytest.raises(ValueError, match=r"q_tokens.segment of row 1 is 0 at token 6, behind a"):
        call(*arrays, *tokens, RULE)
    jax.jit(call, static_argnums=5)(*arrays, *tokens, RULE)  # tracers cannot be looked into


def test_tokens_that_are_no_integers_are_refused():
    data = make(CASES["plain"])
    k_tokens = as_tokens(data["k_tokens"])
    k_tokens = dataclasses.replace(k_tokens, time=k_tokens.time.astype(jnp.float32))
    arrays = [jnp.asarray(data[x], jnp.float32) for x in "qkv"]
    with pytest.raises(ValueError, match=r"k_tokens.time is float32, expected integers"):
        kernel.hstu_attention(*arrays, as_tokens(data["q_tokens"]), k_tokens, RULE, normalizer=1.0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_normalizer_is_a_constant(function):
    data = make(CASES["plain"])
    arrays = [jnp.asarray(data[x], jnp.float32) for x in "qkv"]
    tokens = as_tokens(data["q_tokens"]), as_tokens(data["k_tokens"])
    total = lambda n: jnp.sum(FUNCTIONS[function](*arrays, *tokens, RULE, normalizer=n))
    assert jax.jit(jax.grad(total))(jnp.float32(13.0)) == 0


def test_segments_of_context_may_start_over_once():
    data = make(CASES["packed, normalizer per row"])
    arrays = [jnp.asarray(data[x], jnp.float32) for x in "qkv"]
    call = functools.partial(kernel.hstu_attention, normalizer=1.0)
    data["k_tokens"]["role"][:, :4] = CONTEXT
    for segments, refused in (([0, 1, 0, 1], False), ([1, 0, 1, 0], True)):
        data["k_tokens"]["segment"][:, :4] = segments
        tokens = as_tokens(data["q_tokens"]), as_tokens(data["k_tokens"])
        if refused:
            with pytest.raises(ValueError, match="segment of row 0 is 0 at token 3, behind a"):
                call(*arrays, *tokens, RULE)
        else:
            call(*arrays, *tokens, RULE)


def test_tiles_without_work_are_not_computed():
    """NaN keys that no query of their tile may read reach neither the result nor a gradient."""
    n, tile = 12, 4
    fields = dict.fromkeys(("segment", "time", "group", "bias_time"), np.zeros((1, n)))
    tokens = as_tokens(fields | {"role": np.full((1, n), HISTORY), "position": [np.arange(n)]})
    x = np.random.default_rng(0).normal(size=(1, n, 1, 4)).astype(np.float32)
    poisoned = x.copy()
    poisoned[:, 8:] = np.nan

    def loss(k, v):
        out = kernel.hstu_attention(
            *(x, k, v, tokens, tokens, RULE),
            **{"normalizer": 1.0, "implementation": "xla", "tile": (tile, tile)},
        )
        return jnp.sum(out[:, :8] ** 2), out

    out, want = (loss(k, k)[1][:, :8] for k in (poisoned, x))
    np.testing.assert_array_equal(out, want)
    assert np.isfinite(out).all()


def test_the_same_input_gives_the_same_bits():
    data = make(CASES["plain"])
    once, twice = (run(CASES["plain"], data, "xla in tiles") for _ in range(2))
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice)):
        np.testing.assert_array_equal(a, b)


def test_memory_of_8192_tokens_is_a_twentieth_of_all_pairs():
    """Forward and backward, compiled: H 4, d 128, with both bias tables."""
    n = 8192
    x = jax.ShapeDtypeStruct((1, n, 4, 128), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, n), jnp.int32)
    tokens = Tokens(**{f.name: ids for f in dataclasses.fields(Tokens)})
    bias = kernel.RelativeBias(
        position=jax.ShapeDtypeStruct((2 * n - 1,), jnp.float32),
        time=jax.ShapeDtypeStruct((129,), jnp.float32),
    )

    def temporaries(implementation):
        def loss(q, k, v, bias, tokens):
            out = kernel.hstu_attention(
                *(q, k, v, tokens, tokens, RULE),
                **{"normalizer": 1.0, "bias": bias, "implementation": implementation},
            )
            return jnp.sum(out**2)

        grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        return grad.lower(x, x, x, bias, tokens).compile().memory_analysis().temp_size_in_bytes

    assert 20 * temporaries("xla") <= temporaries("reference")


@pytest.mark.parametrize("tile", [(0, 4), (4,), (2.5, 4)])
def test_a_tile_of_no_tokens_is_refused(tile):
    data = make(CASES["plain"])
    tokens = as_tokens(data["q_tokens"]), as_tokens(data["k_tokens"])
    arrays = [jnp.asarray(data[x], jnp.float32) for x in "qkv"]
    with pytest.raises(ValueError, match=r"expected \(queries, keys\) or .* all >= 1"):
        kernel.hstu_attention(*arrays, *tokens, RULE, normalizer=1.0, tile=tile)
