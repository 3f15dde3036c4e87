"""The parts of GRAB's layer against float64 NumPy, channel by channel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import vector_bias
from rankjax.layers.action_channels import Read, TargetMix, Update, each
from tests import builders
from tests.references import grab as reference

A, R, N, D = 3, 2, 5, 8
TABLES = vector_bias.Tables(positions=4, actions=2, times=0)
READ = (2, 3, 4, TABLES)  # H = 2 heads of Q = 3 from r = 4


def test_mixing_is_a_gated_sum_over_all_copies_and_starts_as_none():
    rng = np.random.default_rng(0)
    x_arcd = rng.normal(size=(A, R, N, D)).astype("f4")
    out, variables = jax.jit(TargetMix().init_with_output)(jax.random.key(0), x_arcd)
    np.testing.assert_array_equal(out, x_arcd)
    params = builders.moved(variables["params"], rng)
    got = jax.jit(TargetMix().apply)({"params": params}, x_arcd)
    p = builders.float64(params)
    for r in range(R):
        for n in range(N):
            want = np.stack(reference.mix(list(np.float64(x_arcd[:, r, n])), p))
            np.testing.assert_allclose(got[:, r, n], want, rtol=0, atol=1e-5)
    assert builders.count(params) == 2 * (A * D) ** 2


@pytest.mark.parametrize("shared", [False, True])
def test_each_channel_has_weights_of_its_own_unless_shared(shared):
    rng = np.random.default_rng(1)
    x_arnd = rng.normal(size=(A, R, N, D)).astype("f4")
    module = each(Read, shared=shared)(*READ, 2, norm="layer")
    init = jax.jit(module.init_with_output)
    (q, k, v, t), variables = init(jax.random.key(0), x_arnd)
    assert q.shape == (A, R, 2, 2, 3) and k.shape == v.shape == (A, R, N, 2, 3)
    assert t.shape == (A, R, 2, 4 + 4, 2)
    params = variables["params"]
    lead = () if shared else (A,)
    assert params["down"]["kernel"].shape == (*lead, D, 4)
    assert params["relative"]["action"].shape == (*lead, 4, 3)
    one = D * 4 + 3 * 4 * 6 + 8 * 3 + 2 * D
    assert builders.count(params) == one * (1 if shared else A)
    if not shared:  # drawn apart, and on the scale of one channel's fan-in
        kernel = params["down"]["kernel"]
        assert np.any(kernel[0] != kernel[1]) and abs(np.std(kernel) * D**0.5 - 1) < 0.2
    params = builders.moved(params, rng)
    got = jax.jit(module.apply)({"params": params}, x_arnd)
    for a in range(A):
        p = reference.of_channel(builders.float64(params), a, shared)
        latent = reference.norm(np.float64(x_arnd[a]), p["norm"], "layer") @ p["down"]["kernel"]
        parts = [(latent[:, -2:], "query"), (latent, "key"), (latent, "value")]
        for y, (c_rnl, name) in zip(got, parts):
            want = (c_rnl @ p[name]["kernel"]).reshape(*c_rnl.shape[:2], 2, 3)
            np.testing.assert_allclose(y[a], want, rtol=0, atol=1e-5)
        table = np.concatenate([p["relative"]["position"], p["relative"]["action"]])
        want = np.einsum("rnhq,bq->rnbh", np.float64(got[0][a]), table)
        np.testing.assert_allclose(got[3][a], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm_place", ["post", "pre"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_update_is_add_and_norm_twice(norm, norm_place):
    rng = np.random.default_rng(2)
    x_rnd = rng.normal(size=(R, N, D)).astype("f4")
    a_rnhq = rng.normal(size=(R, N, 2, 3)).astype("f4")
    module = Update(3, 2, norm, norm_place)
    params = jax.jit(module.init)(jax.random.key(0), x_rnd, a_rnhq)["params"]
    pairs = 2 if norm_place == "post" else 1
    norms = pairs * D * (2 if norm == "layer" else 1)
    assert builders.count(params) == 6 * D + 2 * D * 24 + 24 + D + norms
    params = builders.moved(params, rng)
    got = jax.jit(module.apply)({"params": params}, x_rnd, a_rnhq)
    p, c = builders.float64(params), {"norm": norm, "norm_place": norm_place}
    for r in range(R):
        a_nf = np.float64(a_rnhq[r]).reshape(N, 6)
        want = reference.update(np.float64(x_rnd[r]), a_nf, p, c)
        np.testing.assert_allclose(got[r], want, rtol=0, atol=1e-5)


def test_small_residual_divides_only_what_writes_to_the_residual():
    x, a = np.zeros((R, N, D), "f4"), np.zeros((R, N, 2, 3), "f4")
    init = lambda name: jax.jit(Update(3, 8, kernel_init=name).init)(jax.random.key(0), x, a)
    small, lecun = (init(name)["params"] for name in ("small_residual", "lecun"))
    for name, divisor in (("out", 4), ("ffn_out", 4), ("ffn_in", 1)):
        want = lecun[name]["kernel"] / divisor
        np.testing.assert_allclose(small[name]["kernel"], want, rtol=1e-6)


def test_bfloat16_in_and_out_with_float32_parameters():
    x = jax.ShapeDtypeStruct((A, R, N, D), jnp.bfloat16)
    a = jax.ShapeDtypeStruct((A, R, N, 2, 3), jnp.bfloat16)
    for module, args in (
        (TargetMix(dtype="bfloat16"), (x,)),
        (each(Read, shared=False)(*READ, N, dtype="bfloat16"), (x,)),
        (each(Update, shared=False)(4, 2, dtype="bfloat16"), (x, a)),
    ):
        init = functools.partial(module.init_with_output, jax.random.key(0))
        out, variables = jax.eval_shape(init, *args)
        narrow = jax.tree.leaves(out)
        if len(narrow) > 1:  # the last of what Read returns are parts of scores
            assert narrow.pop().dtype == jnp.float32
        assert all(y.dtype == jnp.bfloat16 for y in narrow)
        assert all(y.dtype == jnp.float32 for y in jax.tree.leaves(variables))
