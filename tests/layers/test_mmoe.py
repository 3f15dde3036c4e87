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
    shapes = jax.eval_shape(HEAD.init, jax.random.key(0), x_rcd)["params"]
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), shapes), x_rcd


def test_is_the_equation():
    params, x_rcd = made()
    p = builders.float64(params)
    got = jax.jit(HEAD.apply)({"params": params}, x_rcd)
    want = [[reference.mmoe(x_d, p) for x_d in x_cd.astype(float)] for x_cd in x_rcd]
    np.testing.assert_allclose(got, np.array(want), rtol=1e-5, atol=1e-5)


def test_parameter_count_and_dtype():
    params, x_rcd = made()
    K, X, D, F, H = 3, 2, 6, 5, 4
    assert builders.count(params) == X * (D * F + F) + K * (D * X + F * H + 2 * H + 1)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    x_rcd = jax.ShapeDtypeStruct(x_rcd.shape, jnp.bfloat16)
    logits = jax.eval_shape(HEAD.apply, {"params": params}, x_rcd)
    assert logits.dtype == jnp.float32 and logits.shape == (2, 3, K)


def test_a_task_owns_its_gate_and_tower_and_shares_the_experts():
    params, x_rcd = made()
    loss = lambda p: HEAD.apply({"params": p}, x_rcd)[..., 1].sum()
    gradient = jax.jit(jax.grad(loss))(params)
    for name in ("gates", "tower", "logits"):
        for x_k in jax.tree.leaves(gradient[name]):
            assert np.any(x_k[1] != 0) and np.all(np.asarray(x_k)[[0, 2]] == 0)
    assert all(np.any(x_x != 0) for x_x in gradient["experts_kernel"])


def test_the_number_of_experts_and_tasks_is_no_part_of_the_fan_in():
    head = mmoe.MMoE(tasks=2, experts=16, expert_hidden=64, tower_hidden=8)
    params = jax.jit(head.init)(jax.random.key(0), np.ones((1, 64), "f4"))["params"]
    for name in ("experts_kernel", "gates"):
        np.testing.assert_allclose(params[name].std(), 1 / 8, rtol=0.1)
