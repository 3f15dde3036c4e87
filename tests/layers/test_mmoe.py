"""MMoE against float64 NumPy, and what its tasks share."""

import jax
import jax.numpy as jnp
import numpy as np

from rankjax.layers import mmoe
from tests import builders
from tests.references import mtgr as reference

HEAD = mmoe.MMoE(tasks=3, experts=2, expert_hidden=5, tower_hidden=4)


def made():
    rng = np.random.default_rng(0)
    x_rcd = rng.normal(size=(2, 3, 6)).astype("f4")
    params = jax.jit(HEAD.init)(jax.random.key(0), x_rcd)["params"]
    return builders.moved(params, rng), x_rcd


def test_is_the_equation():
    params, x_rcd = made()
    p = builders.float64(params)
    got = HEAD.apply({"params": params}, x_rcd)
    want = [[reference.mmoe(x_d, p) for x_d in x_cd.astype(float)] for x_cd in x_rcd]
    np.testing.assert_allclose(got, np.array(want), rtol=0, atol=2e-6)


def test_parameter_count_and_dtype():
    params, x_rcd = made()
    K, X, D, F, H = 3, 2, 6, 5, 4
    assert builders.count(params) == X * (D * F + F) + K * (D * X + F * H + 2 * H + 1)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    logits = HEAD.apply({"params": params}, jnp.asarray(x_rcd, jnp.bfloat16))
    assert logits.dtype == jnp.float32 and logits.shape == (2, 3, K)


def test_a_task_owns_its_gate_and_tower_and_shares_the_experts():
    params, x_rcd = made()
    loss = lambda p: HEAD.apply({"params": p}, x_rcd)[..., 1].sum()
    gradient = jax.grad(loss)(params)
    for name in ("gates", "tower", "logits"):
        for x_k in jax.tree.leaves(gradient[name]):
            assert np.any(x_k[1] != 0) and np.all(np.asarray(x_k)[[0, 2]] == 0)
    assert all(np.any(x_x != 0) for x_x in gradient["experts_kernel"])


def test_initial_scale_does_not_depend_on_how_many_experts_there_are():
    x_nd = np.ones((1, 64), "f4")
    few, many = (
        mmoe.MMoE(tasks=2, experts=n, expert_hidden=64, tower_hidden=8).init(
            jax.random.key(0), x_nd
        )["params"]
        for n in (2, 16)
    )
    for name in ("experts_kernel", "gates"):
        np.testing.assert_allclose(few[name].std(), 1 / 8, rtol=0.1)
        np.testing.assert_allclose(many[name].std(), 1 / 8, rtol=0.1)
