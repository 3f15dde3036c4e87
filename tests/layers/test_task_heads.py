"""Task heads against NumPy: float32 logits for any input, tasks that share nothing but it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import task_heads
from tests import builders
from tests.references import hiformer as reference


def test_linear():
    rng = np.random.default_rng(0)
    head, x_nd = task_heads.Linear(3), rng.normal(size=(2, 5, 8)).astype("f4")
    params = builders.moved(head.init(jax.random.key(0), x_nd)["params"], rng)
    p = builders.float64(params)["logits"]
    want = x_nd.astype(float) @ p["kernel"] + p["bias"]
    np.testing.assert_allclose(head.apply({"params": params}, x_nd), want, atol=1e-5)
    assert builders.count(params) == 8 * 3 + 3


def test_mlp():
    rng = np.random.default_rng(0)
    head, x_nd = task_heads.MLP(2, hidden=6), rng.normal(size=(5, 8)).astype("f4")
    params = builders.moved(head.init(jax.random.key(0), x_nd)["params"], rng)
    p = builders.float64(params)
    got = head.apply({"params": params}, x_nd)
    for k in range(2):
        hidden, logits = p[f"hidden_{k}"], p[f"logits_{k}"]
        h_nf = np.maximum(x_nd @ hidden["kernel"] + hidden["bias"], 0)
        want = h_nf @ logits["kernel"] + logits["bias"]
        np.testing.assert_allclose(got[:, k], want[:, 0], atol=1e-5)
    assert builders.count(params) == 2 * (8 * 6 + 6 + 6 + 1)


@pytest.mark.parametrize("hidden", [(), (6, 3)])
def test_own_vector(hidden):
    """Task k reads vector k, through layers of its own."""
    rng = np.random.default_rng(0)
    head, x_knd = task_heads.OwnVector(hidden), rng.normal(size=(2, 5, 8)).astype("f4")
    params = builders.moved(head.init(jax.random.key(0), x_knd)["params"], rng)
    p = builders.float64(params)
    got = head.apply({"params": params}, x_knd)
    want = [reference.head(x_kd, p, len(hidden)) for x_kd in x_knd.astype(float).swapaxes(0, 1)]
    np.testing.assert_allclose(got, np.stack(want), rtol=0, atol=1e-5)
    sizes = (8, *hidden, 1)
    assert builders.count(params) == 2 * sum(a * b + b for a, b in itertools.pairwise(sizes))


def test_logits_are_float32():
    x_nd = jnp.ones((2, 8), jnp.bfloat16)
    for head in (task_heads.Linear(1), task_heads.MLP(1, hidden=2)):
        logits, variables = head.init_with_output(jax.random.key(0), x_nd)
        assert logits.dtype == jnp.float32 and logits.shape == (2, 1)
        assert {p.dtype for p in jax.tree.leaves(variables)} == {np.dtype("float32")}
    x_knd = jnp.ones((2, 3, 8), jnp.bfloat16)
    logits, variables = task_heads.OwnVector((4,)).init_with_output(jax.random.key(0), x_knd)
    assert logits.dtype == jnp.float32 and logits.shape == (3, 2)
    assert {p.dtype for p in jax.tree.leaves(variables)} == {np.dtype("float32")}
