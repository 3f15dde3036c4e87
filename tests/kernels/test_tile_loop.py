"""The loop over tiles with work: what is cut comes back, and every allowed pair is met once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import masks
from rankjax.batch import HISTORY, Tokens
from rankjax.kernels import tile_loop

R, N, M, H = 3, 7, 10, 2


def problem():
    rng = np.random.default_rng(0)
    sizes = (R, N, H, 5), (R, M, H, 5), (R, M, H, 6)
    arrays = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in sizes)
    zero = Tokens(**{f.name: jnp.zeros((R, M), jnp.int32) for f in dataclasses.fields(Tokens)})
    place = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32), (R, M))
    k = dataclasses.replace(zero, role=zero.role + HISTORY, position=place)
    return arrays, (jax.tree.map(lambda x: x[:, M - N :], k), k)


def test_what_is_cut_comes_back():
    arrays, tokens = problem()
    found = tile_loop.Work.of(arrays, tokens, masks.MaskRule(), (3, 4))
    for x, cut, side in zip(arrays, (found.q, found.k, found.v), "qkk"):
        np.testing.assert_array_equal(found.whole(cut, side), x)
    np.testing.assert_array_equal(found.queries(arrays[0]), found.q)


@pytest.mark.parametrize("g", [1, 2, 3])
def test_every_allowed_pair_is_met_once(g):
    """Whatever number of rows goes together; two do not divide three."""
    arrays, tokens = problem()

    def rows(total, xs):
        work = tile_loop.Work.of(*xs, masks.MaskRule(), (3, 4))

        def count(query, key, met):
            allow = masks.MaskRule().allow(*work.pair(query, key)).sum(axis=2)
            return tile_loop.put(met, query, tile_loop.at(met, query) + allow[:, None, :, None])

        rows, n, _, block, _ = work.q.shape
        met = work.loop(count, jnp.zeros((rows, n, 1, block, 1), jnp.int32))
        met_rn = work.whole(met, "q")[..., 0, 0]
        return total + met_rn.sum(), met_rn

    total, met_rn = tile_loop.over_rows(rows, jnp.int32(0), (arrays, tokens), g)
    want = masks.MaskRule().allow(*tokens).sum(axis=2)
    np.testing.assert_array_equal(met_rn, want)
    assert total == want.sum()


def test_the_loop_leaves_out_tiles_without_work():
    arrays, tokens = problem()
    found = tile_loop.Work.of(arrays, tokens, masks.MaskRule(window=0), (1, 1))
    assert int(found.count) == N and len(found.order) == N * M  # one key a query


def test_short_rows_share_a_step(monkeypatch):
    monkeypatch.setattr(tile_loop, "STEP", 4 * 2 * 16 * 8)
    of = lambda rows, queries: tile_loop.rows_of_a_step((rows, queries, 2, 5), 8, (16, 16))
    assert of(9, 16) == 4 and of(3, 16) == 3 and of(9, 100) == 4 and of(9, 4) == 9
