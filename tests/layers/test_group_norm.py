"""Group-LN against float64 NumPy: whose affine pair a token gets, and from where gradients come."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import group_norm, norms
from tests import builders
from tests.references import mtgr as reference

GROUP_RN = np.array([[0, 2, 1, 1, 3], [3, 3, 0, 2, 2]])


def made(groups=4, seed=0, **options):
    rng = np.random.default_rng(seed)
    x_rnd = rng.normal(2, 3, (2, 5, 6)).astype("f4")
    norm = group_norm.GroupNorm(groups, **options)
    params = builders.moved(norm.init(jax.random.key(0), x_rnd, GROUP_RN)["params"], rng)
    return functools.partial(norm.apply, {"params": params}), params, x_rnd


def test_each_token_has_its_groups_pair():
    norm, params, x_rnd = made()
    p = builders.float64(params)
    for got, x_nd, group_n in zip(norm(x_rnd, GROUP_RN), x_rnd, GROUP_RN):
        groups = [reference.GROUPS[g] for g in group_n]
        want = reference.group_norm(x_nd.astype(float), groups, p)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_groups_that_all_rows_share_may_be_given_once():
    norm, _, x_rnd = made()
    group_n = GROUP_RN[0]
    np.testing.assert_array_equal(norm(x_rnd, group_n), norm(x_rnd, np.stack([group_n] * 2)))


@pytest.mark.parametrize("groups", [1, 4])
def test_with_one_pair_for_all_it_is_a_layer_norm(groups):
    norm, params, x_rnd = made()
    tied = {k: np.broadcast_to(x_gd[:1], (groups, 6)) for k, x_gd in params.items()}
    plain = {k: x_gd[0] for k, x_gd in params.items()}
    norm = group_norm.GroupNorm(groups)
    got = norm.apply({"params": tied}, x_rnd, GROUP_RN)
    np.testing.assert_array_equal(got, norms.Norm().apply({"params": plain}, x_rnd))


def test_a_pair_learns_from_its_own_tokens_only():
    _, params, x_rnd = made()
    weight_rnd = np.random.default_rng(1).normal(size=x_rnd.shape)
    norm = group_norm.GroupNorm(4)
    loss = lambda p: (norm.apply({"params": p}, x_rnd, GROUP_RN) * weight_rnd).sum()
    gradient = jax.grad(loss)(params)
    plain_rnd = np.apply_along_axis(reference.layer_norm, 2, x_rnd.astype(float))
    for g in range(4):
        own = np.equal(GROUP_RN, g)
        want = (plain_rnd * weight_rnd)[own].sum(axis=0)
        np.testing.assert_allclose(gradient["scale"][g], want, rtol=0, atol=1e-5)
        np.testing.assert_allclose(gradient["bias"][g], weight_rnd[own].sum(axis=0), atol=1e-5)


def test_epsilon_parameters_and_dtype():
    norm, params, x_rnd = made(epsilon=2.0)
    p = builders.float64(params)
    x_d = x_rnd[0, 1].astype(float)
    want = (x_d - x_d.mean()) / np.sqrt(x_d.var() + 2) * p["scale"][2] + p["bias"][2]
    np.testing.assert_allclose(norm(x_rnd, GROUP_RN)[0, 1], want, rtol=0, atol=2e-6)
    assert builders.count(params) == 2 * 4 * 6
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    x_rnd = jnp.asarray(x_rnd, jnp.bfloat16)
    got = norm(x_rnd, GROUP_RN)
    assert got.dtype == jnp.bfloat16 and got.shape == x_rnd.shape
    once = norm(x_rnd.astype(jnp.float32), GROUP_RN).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, once)  # rounded at the end only


def test_no_groups_are_refused():
    with pytest.raises(ValueError, match="groups=0, expected an integer >= 1"):
        group_norm.GroupNorm(0).init(jax.random.key(0), np.ones((2, 3)), np.zeros(2, int))
