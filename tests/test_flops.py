import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rankjax import flops
from rankjax.batch import Features


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_dense_layer():
    got = flops.count(lambda x, w, b: jnp.maximum(x @ w + b, 0), f32(7, 5), f32(5, 3), f32(3))
    assert got.by_primitive == {"dot_general": 2 * 7 * 5 * 3, "add": 21, "max": 21}
    assert (got.matmul, got.elementwise, got.total) == (210, 42, 252)


@pytest.mark.parametrize(
    "equation", ["btd,tdf->btf", "btd,tdf->tbf", "tdf,btd->btf"], ids=lambda e: e[:7]
)
def test_per_token_feed_forward_is_4ktd2(equation):
    B, T, D, k = 3, 4, 8, 4

    def ffn(x_btd, in_tdf, out_tfd):
        first = equation.split("->")[0].split(",")
        h = jnp.einsum(equation, *((x_btd, in_tdf) if first[0] == "btd" else (in_tdf, x_btd)))
        if equation.endswith("tbf"):
            h = h.swapaxes(0, 1)
        return jnp.einsum("btf,tfd->btd", jax.nn.relu(h), out_tfd)

    got = flops.count(ffn, f32(B, T, D), f32(T, D, k * D), f32(T, k * D, D))
    assert got.matmul == B * 4 * k * T * D**2


def transformer_layer(x_nd, p, heads):
    N, D = x_nd.shape

    def split(y):
        return y.reshape(N, heads, D // heads)

    q, k, v = (split(x_nd @ p[name]) for name in "qkv")
    a_hnm = jax.nn.softmax(jnp.einsum("nhq,mhq->hnm", q, k), axis=-1)
    x_nd = x_nd + jnp.einsum("hnm,mhv->nhv", a_hnm, v).reshape(N, D) @ p["o"]
    return x_nd + jax.nn.gelu(x_nd @ p["in"], approximate=False) @ p["out"]


def test_transformer_layer_is_24nd2_plus_4n2d():
    n, d = 6, 8
    p = {name: f32(d, d) for name in "qkvo"} | {"in": f32(d, 4 * d), "out": f32(4 * d, d)}
    for heads in (1, 2, 4):
        got = flops.count(functools.partial(transformer_layer, heads=heads), f32(n, d), p)
        assert got.matmul == 24 * n * d**2 + 4 * n**2 * d
    # softmax over [H, n, n]: max, sub, exp, sum, div, and the maximum with -inf per row.
    assert got.by_primitive["reduce_max"] == got.by_primitive["exp"] == 4 * n * n


def hstu_like(x_nd, layers):
    """U, V, Q, K projections, SiLU scores over all pairs, an output projection."""
    N = x_nd.shape[0]
    for w in layers:
        u, v, q, k = (jax.nn.silu(x_nd @ w[name]) for name in "uvqk")
        a_nm = jax.nn.silu(q @ k.T) / N
        x_nd = x_nd + (u * (a_nm @ v)) @ w["o"]
    return x_nd


@pytest.mark.parametrize(
    ("layers", "d", "published"),
    [(3, 512, 5.47), (5, 768, 18.59), (15, 768, 55.76), (22, 1024, 137.87)],
)
def test_mtgr_prints_l_10nd2_plus_4n2d(layers, d, published):
    n = 500
    w = [{name: f32(d, d) for name in "uvqko"}] * layers
    got = flops.count(hstu_like, f32(n, d), w)
    assert got.matmul == layers * (10 * n * d**2 + 4 * n**2 * d)
    assert round(got.matmul / 1e9, 2) == published  # MTGR, arXiv 2505.18654, table of model sizes


def body(x, w):
    return jnp.tanh(x @ w), x.sum()


def test_scan_and_map_equal_the_unrolled_loop():
    def unrolled(x, ws):
        for i in range(5):
            x, _ = body(x, ws[i])
        return x

    x, ws = f32(3, 4), f32(5, 4, 4)
    want = flops.count(unrolled, x, ws).by_primitive
    scanned = flops.count(lambda x, ws: jax.lax.scan(body, x, ws)[0], x, ws)
    assert scanned.by_primitive == want | {"reduce_sum": 5 * 12}  # unrolled: sums are dead code
    mapped = flops.count(lambda ws: jax.lax.map(lambda w: w @ w, ws), ws)
    assert mapped.by_primitive == {"dot_general": 5 * 2 * 4**3}


@jax.custom_vjp
def square_by_hand(x):
    return jnp.sin(x @ x)


square_by_hand.defvjp(lambda x: (square_by_hand(x), x), lambda x, g: (g @ x,))


@jax.custom_jvp
def square_with_jvp(x):
    return jnp.sin(x @ x)


square_with_jvp.defjvp(lambda x, t: (square_with_jvp(*x), t[0]))


@pytest.mark.parametrize(
    "wrap",
    [
        jax.jit,
        lambda f: jax.jit(jax.jit(f)),
        jax.checkpoint,
        jax.named_call,
        lambda f: square_by_hand,
        lambda f: square_with_jvp,
        lambda f: jax.shard_map(
            f, mesh=jax.make_mesh((1,), ("x",)), in_specs=P(), out_specs=P(), check_vma=False
        ),
    ],
    ids=["jit", "jit2", "remat", "named", "custom_vjp", "custom_jvp", "shard_map"],
)
def test_wrappers_change_nothing(wrap):
    def f(x):
        return jnp.sin(x @ x)

    assert flops.count(wrap(f), f32(4, 4)) == flops.count(f, f32(4, 4))


def test_shard_map_counts_every_device():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((4, 2), ("x", "y"), axis_types=auto)
    sharded = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P("x", None), P(None, "y")), out_specs=P("x", "y")
    )
    assert flops.count(sharded, f32(8, 3), f32(3, 6)).matmul == 2 * 8 * 3 * 6


def test_gradient_and_recomputation():
    def f(x, w):
        return jnp.sin(x @ w).sum()

    forward = flops.count(f, f32(5, 4), f32(4, 3)).matmul
    plain = flops.count(jax.grad(f, argnums=(0, 1)), f32(5, 4), f32(4, 3))
    remat = flops.count(jax.grad(jax.checkpoint(f), argnums=(0, 1)), f32(5, 4), f32(4, 3))
    assert plain.matmul == 3 * forward
    assert remat.matmul == 4 * forward
    assert remat.by_primitive["cos"] == plain.by_primitive["cos"] == 15


def test_cond_takes_the_costliest_branch_and_platforms_the_default():
    x = f32(4, 4)
    got = flops.count(lambda x: jax.lax.cond(True, lambda x: -jnp.sin(x), lambda x: x @ x, x), x)
    assert got.by_primitive == {"dot_general": 128}
    choose = functools.partial(
        jax.lax.platform_dependent, tpu=lambda x: x @ x, cuda=lambda x: x @ x @ x, default=jnp.sin
    )
    assert flops.count(choose, x).by_primitive == {"sin": 16}
    assert flops.count(jax.vmap(choose), f32(3, 4, 4)).by_primitive == {"sin": 48}
    no_default = functools.partial(jax.lax.platform_dependent, tpu=jnp.cos, cuda=jnp.sin)
    with pytest.raises(NotImplementedError, match="no default"):
        flops.count(no_default, x)


def test_while_loops_want_a_trip_count():
    def loop(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match=r"trips is not in the jaxpr.*(?s:.)*dot_general"):
        flops.count(loop, f32(4, 4))
    got = flops.count(loop, f32(4, 4), trip_counts=(3,))
    assert got.by_primitive == {"dot_general": 3 * 128}
    with pytest.raises(ValueError, match="2 trip_counts given, the function has 1 while loops"):
        flops.count(loop, f32(4, 4), trip_counts=(3, 3))
    fixed = flops.count(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x @ x, x), f32(4, 4))
    assert fixed.matmul == 3 * 128


@pytest.mark.parametrize(
    ("fn", "shapes", "want"),
    [
        (lambda x: jnp.exp(x), [(3, 5)], {"exp": 15}),
        (lambda x: x.sum(axis=1), [(3, 5)], {"reduce_sum": 15}),
        (lambda x: jnp.cumsum(x, axis=0), [(3, 5)], {"cumsum": 15}),
        (lambda x, y: jnp.concatenate([x.T, y]).reshape(-1)[::2], [(3, 5), (4, 3)], {}),
        (lambda x: jnp.broadcast_to(x[:, None], (3, 4)).astype(jnp.bfloat16), [(3,)], {}),
        (lambda x, y: jnp.tensordot(x, y, 2), [(2, 3, 5), (3, 5, 4)], {"dot_general": 240}),
        (lambda x, y: jnp.outer(x, y), [(3,), (4,)], {"mul": 12}),
        (lambda x: jnp.stack([jnp.tile(x, 2), jnp.zeros(10)]), [(5,)], {}),
        (
            lambda x, y: jnp.where(x[:, 0] > 0, y, -y),
            [(3, 2), (3,)],
            {"neg": 3},
        ),
        (lambda x: ((jnp.arange(3) * 2 < 3) & (x > 0)).sum(), [(3,)], {}),
    ],
    ids=[
        "exp",
        "sum",
        "cumsum",
        "moves",
        "broadcast",
        "tensordot",
        "outer",
        "stack",
        "where",
        "masks",
    ],
)
def test_what_a_primitive_counts(fn, shapes, want):
    assert flops.count(fn, *(f32(*s) for s in shapes)).by_primitive == want


def test_scatter_add_counts_its_updates():
    def f(x, i, g):
        return x.at[i].add(g, mode="promise_in_bounds")

    got = flops.count(f, f32(9, 2), jax.ShapeDtypeStruct((5,), jnp.int32), f32(5, 2))
    assert got.by_primitive["scatter-add"] == 10


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups):
    def f(x, w):
        return jax.lax.conv_general_dilated(x, w, (1,), "VALID", feature_group_count=groups)

    # [N, C, W] * [O, C / groups, 3] -> [N, O, W - 2]
    got = flops.count(f, f32(2, 4, 10), f32(6, 4 // groups, 3))
    assert got.by_primitive == {"conv_general_dilated": 2 * 2 * 6 * 8 * 3 * 4 // groups}


def test_unknown_primitives_are_refused():
    with pytest.raises(NotImplementedError, match="'cholesky'"):
        flops.count(jax.lax.linalg.cholesky, f32(3, 3))


def test_polynomial_recovers_traced_counts_at_other_lengths():
    d, w = 8, [{name: f32(8, 8) for name in "uvqko"}]

    def model(history_sd, candidate_cd):
        x = hstu_like(jnp.concatenate([history_sd, candidate_cd]), [])
        return hstu_like(x, [{name: jnp.ones(v.shape) for name, v in w[0].items()}])

    def total(s, c):
        return flops.count(model, f32(s, d), f32(c, d)).total

    small = [(1, 1), (2, 1), (3, 2), (1, 3), (2, 2), (4, 1), (3, 3)]
    poly = flops.Polynomial.fit([(lengths, total(*lengths)) for lengths in small])
    S, C = np.array([17, 1, 40]), np.array([3, 9, 1])
    want = [total(int(s), int(c)) for s, c in zip(S, C)]
    np.testing.assert_array_equal(poly((S, C)), want)
    assert poly((17, 3)) == want[0]
    # Empty histories: outside of the fitted lengths, and still right.
    assert poly((0, 3)) == total(0, 3)


def test_polynomial_is_exact_far_from_its_points():
    def value(n):
        return 10**9 + 7 * n + 123_456_789 * n**2

    poly = flops.Polynomial.fit([((n,), value(n)) for n in (1, 2, 3, 4)])
    assert poly((10**4,)) == value(10**4)


def test_polynomial_refuses():
    with pytest.raises(ValueError, match="no polynomial of degree <= 2"):
        flops.Polynomial.fit([((n,), float(n**3)) for n in range(5)])
    with pytest.raises(ValueError, match="no polynomial of degree <= 2"):
        flops.Polynomial.fit([((n,), min(n, 3)) for n in range(6)])
    with pytest.raises(ValueError, match="do not determine"):
        flops.Polynomial.fit([((n, n), n) for n in range(9)])
    with pytest.raises(ValueError, match="equal dimension"):
        flops.Polynomial.fit([((1,), 1), ((1, 2), 1)])
    with pytest.raises(ValueError, match="2 lengths, expected 1"):
        flops.Polynomial.fit([((n,), n) for n in range(3)])((1, 2))


def rounded_and_cut(s, c):
    """Groups of 4, of which the newest 5 are queries, after a layer over all events."""
    groups = -(-s // 4)
    return 7 + 3 * groups * c + 2 * groups**2 + 5 * min(groups, 5) * groups + c * min(groups, 5)


def test_piecewise_is_exact_where_lengths_are_rounded_and_cut():
    found = flops.Piecewise.fit(rounded_and_cut, unit=4, breaks=(20,))
    s, c = np.meshgrid(np.arange(1, 60), np.arange(1, 9))
    want = np.vectorize(rounded_and_cut)(s, c)
    np.testing.assert_array_equal(found((s, c)), want)
    assert len(found.pieces) == 2


@pytest.mark.parametrize("breaks", [(1,), (2,), (2, 3), (1, 5, 6, 30), (), (4, 4)])
def test_piecewise_with_breaks_close_together(breaks):
    def count(s, c):
        return s * c + sum(min(s, b) * (s + c) for b in breaks) + 2

    found = flops.Piecewise.fit(count, breaks=breaks)
    s, c = np.meshgrid(np.arange(1, 40), np.arange(1, 5))
    np.testing.assert_allclose(found((s, c)), np.vectorize(count)(s, c), rtol=1e-12)


def test_without_events_a_short_first_piece_counts_one():
    found = flops.Piecewise.fit(lambda s, c: 5 * min(s, 2) ** 2 + s * c, breaks=(2,))
    assert found((0, 3)) == found((1, 3)) == 5 + 3
    plain = flops.Piecewise.fit(lambda s, c: 5 * s**2 + s * c + 2 * c)
    assert plain((0, 3)) == 6


def test_a_break_that_is_not_told_is_found():
    with pytest.raises(ValueError, match="no polynomial of degree <= 2"):
        flops.Piecewise.fit(rounded_and_cut, unit=4)
    with pytest.raises(ValueError, match="no polynomial of degree <= 2"):
        flops.Piecewise.fit(rounded_and_cut, breaks=(20,))


def test_features_are_accepted():
    """A pytree with static fields goes through as shapes only."""
    from tests import tiny

    b = tiny.batch()
    shapes = {name: f32(*x.shape[:2], 4) for name, x in b.candidate.items()}
    times = {
        name: jax.ShapeDtypeStruct(getattr(b, name).shape, jnp.int32)
        for side in ("history", "candidate")
        for name in (f"{side}_sample", f"{side}_time", f"{side}_order")
    }
    times["history_action"] = times["history_sample"]
    features = Features(
        user={}, history={}, candidate=shapes, schema=b.schema, one_time=True, **times
    )
    got = flops.count(lambda f: f.candidate["item"] * 2, features)
    assert got.by_primitive == {"mul": b.candidate["item"].size * 4}
