"""The functions of `embedding` on a mesh give what they give on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import embedding, sharded_embedding, sharding
from tests import tiny

CONFIG = embedding.TableConfig(width=4, init_std=0.3)


def batch():
    return tiny.batch(samples=8, history=6, candidates=2).without_impression()


@functools.cache
def one_device():
    """(tables, features, biases, gradients of rows -> new tables and accumulators)."""
    b = batch()
    layout = embedding.plan(b.schema, CONFIG)
    tables = jax.jit(lambda key: embedding.init(key, b.schema, CONFIG))(jax.random.key(3))
    return run(embedding, layout, tables, b)


def loss(features, bias):
    """Any function of all features whose gradient differs from row to row."""
    total = jnp.sum(jnp.sin(bias + 1))
    for side in (features.user, features.history, features.candidate):
        for name, x in side.items():
            total += jnp.sum(jnp.sin(x * (1 + len(name))))
    return total


def run(lib, layout, tables, b):
    @jax.jit
    def step(tables, b):
        ids = lib.deduplicate(layout, b)
        rows = lib.gather(tables, ids)

        def objective(rows):
            features, bias = lib.features(layout, rows, ids, b)
            return loss(features, bias), (features, bias)

        gradients, found = jax.grad(objective, has_aux=True)(rows)
        optimizer = embedding.init_optimizer(tables, CONFIG)
        rates = {"embedding": 0.1, "bias": 0.2}
        return found, lib.update(tables, optimizer, ids, gradients, CONFIG, rates)

    return tables, *step(tables, b)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_look_up_and_update_are_those_of_one_device(count):
    place = sharding.placement(sharding.MeshConfig(), jax.devices()[:count])
    lib, b = sharded_embedding.Sharded(place), batch()
    layout = lib.plan(b.schema, CONFIG)
    assert all(rows % count == 0 for _, rows in layout.arrays)
    make = lambda key: lib.init(key, b.schema, CONFIG, layout)
    tables = jax.jit(make)(jax.random.key(3))
    put = functools.partial(jax.device_put, device=place.rows)
    found = run(lib, layout, tables, put(b))
    want_tables, want_features, want_updated = one_device()
    for got, want in ((found[0], want_tables), *zip(found[2], want_updated, strict=True)):
        for name, table in want.items():
            for kind, x in table.items():
                g = np.asarray(got[name][kind])
                np.testing.assert_allclose(g[: len(x)], x, rtol=1e-5, atol=1e-6)
    for g, w in zip(jax.tree.leaves(found[1]), jax.tree.leaves(want_features), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-7)
