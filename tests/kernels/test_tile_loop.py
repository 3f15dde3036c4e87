"""The loop over tiles with work: what is cut comes back, and every pair is met once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rankjax import masks
from rankjax.batch import HISTORY, Tokens
from rankjax.kernels import tile_loop

R, N, M, H = 3, 7, 10, 2


def work(tile=(3, 4), rule=None):
    rng = np.random.default_rng(0)
    arrays = tuple(
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((R, N, H, 5), (R, M, H, 5), (R, M, H, 6))
    )
    zero = Tokens(**{f.name: jnp.zeros((R, M), jnp.int32) for f in dataclasses.fields(Tokens)})
    place = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32), (R, M))
    k = dataclasses.replace(zero, role=zero.role + HISTORY, position=place)
    q = jax.tree.map(lambda x: x[:, M - N :], k)
    return arrays, (q, k), tile_loop.Work.of(arrays, (q, k), rule or masks.MaskRule(), tile)


def test_what_is_cut_comes_back():
    arrays, _, found = work()
    for x, cut, side in zip(arrays, (found.q, found.k, found.v), "qkk"):
        np.testing.assert_array_equal(found.whole(cut, side), x)
    np.testing.assert_array_equal(found.queries(arrays[0]), found.q)


def test_the_loop_meets_every_allowed_pair_once(monkeypatch):
    for step in (1, 10**6):  # each row by itself, all rows together
        monkeypatch.setattr(tile_loop, "STEP", step)
        _, tokens, found = work()
        assert found.sizes[0] == (1 if step == 1 else R)

        def count(query, key, total, found=found):
            met = masks.MaskRule().allow(*found.pair(query, key)).sum(axis=2)[:, None, :, None]
            return tile_loop.put(total, query, tile_loop.at(total, query) + met)

        zeros = jnp.zeros((found.q.shape[0], found.sizes[0], 1, found.sizes[1], 1), jnp.int32)
        met_rn = found.whole(found.loop(count, zeros), "q")[..., 0, 0]
        want = masks.MaskRule().allow(*tokens).sum(axis=2)
        np.testing.assert_array_equal(met_rn, want)


def test_the_loop_leaves_out_tiles_without_work():
    _, _, found = work(tile=(1, 1), rule=masks.MaskRule(window=0))
    assert int(found.count) == N  # one key a query; all rows in one step
    assert len(found.order) == N * M
