"""Kernels on a mesh give what they give on one device, and exchange nothing but sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rankjax import plan, sharding
from rankjax.batch import HISTORY, Tokens
from rankjax.kernels import hstu_attention, partition, softmax_attention
from rankjax.masks import MaskRule

R, N, H, D = 4, 24, 2, 8
MESHES = {
    "rows": sharding.MeshConfig(data=4),
    "rows and heads": sharding.MeshConfig(data=2, model=2),
    "heads that cannot be split": sharding.MeshConfig(data=1, model=4),
    "slices": sharding.MeshConfig(replica=2, data=2),
}


def problem():
    rng = np.random.default_rng(0)
    arrays = tuple(jnp.asarray(rng.normal(size=(R, N, H, D)), jnp.float32) for _ in "qkv")
    place = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (R, N))
    zero = jnp.zeros_like(place)
    tokens = Tokens(
        segment=(place >= 10).astype(jnp.int32),
        role=zero + HISTORY,
        time=place,
        position=jnp.where(place >= 10, place - 10, place),
        group=zero,
        bias_time=7 * place,
    )
    tables = hstu_attention.RelativeBias(
        position=jnp.asarray(rng.normal(size=2 * N - 1), jnp.float32),
        time=jnp.asarray(rng.normal(size=129), jnp.float32),
    )
    scores = jnp.asarray(rng.normal(size=(R, 1, N, N)), jnp.float32)
    return arrays, tokens, tables, scores


def silu(implementation, arrays, tokens, tables, scores):
    return hstu_attention.hstu_attention(
        *(*arrays, tokens, tokens, MaskRule()),
        **{"normalizer": float(N), "bias": tables, "implementation": implementation},
        tile=(8, 8),
    )


def softmax(implementation, arrays, tokens, tables, scores):
    return softmax_attention.softmax_attention(
        *(*arrays, tokens, tokens, MaskRule()),
        **{"scale": D**-0.5, "scores": scores, "implementation": implementation},
    )


def learned(attention, place, *args):
    """(value, gradients of the arrays, the tables and the scores)."""

    def objective(arrays, tables, scores, tokens):
        with sharding.on(place):
            out = attention(arrays, tokens, tables, scores)
        return jnp.sum(jnp.sin(out)), out

    arrays, tokens, tables, scores = args
    if place is not None:
        rows = place.of(("batch", None, "heads", None), (R, N, H, D))
        arrays = jax.device_put(arrays, rows)
    run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))
    return run, (arrays, tables, scores, tokens)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "attention, implementation",
    [(silu, "xla"), (silu, "pallas_tpu"), (softmax, None), (softmax, "xla"), (softmax, "jax_nn")],
)
def test_values_and_gradients_are_those_of_one_device(attention, implementation, mesh):
    attention = functools.partial(attention, implementation)
    run, args = learned(attention, None, *problem())
    want = run(*args)
    config = MESHES[mesh]
    count = config.replica * config.data * config.model
    place = sharding.placement(config, jax.devices()[:count])
    run, args = learned(attention, place, *problem())
    got = run(*args)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", [silu, softmax])
def test_rows_and_heads_stay_where_they_are(attention):
    place = sharding.placement(
        sharding.MeshConfig(data=2, model=2, strategy="tensor"), jax.devices()[:4]
    )
    run, args = learned(functools.partial(attention, "xla"), place, *problem())
    found = plan.collectives(run.lower(*args).compile().as_text())
    assert set(found) == {"all-reduce"}
    tables = 4 * (2 * N - 1 + 129)
    scores = 4 * R * N * N  # shared by heads
    assert found["all-reduce"] <= 2 * tables + 2 * scores + 64  # and the loss


def test_without_a_mesh_the_function_is_called_as_it_is():
    x = np.ones((2, 3))
    assert partition.run(lambda x: x, (x,), ("r.",), "r.") is x


def test_what_is_broadcast_stays_whole():
    place = sharding.placement(sharding.MeshConfig(), jax.devices()[:2])
    seen = []

    def add(x, y):
        seen.append((x.shape, y.shape))
        return x + y

    with sharding.on(place):
        args = jax.device_put((jnp.ones((4, 3)), jnp.ones((1, 3))), place.whole)
        out = jax.jit(lambda x, y: partition.run(add, (x, y), ("r.", "r."), "r."))(*args)
    assert seen == [((2, 3), (1, 3))]
    np.testing.assert_array_equal(out, 2)
    assert out.sharding.spec == PartitionSpec("data")
