"""The loop over tiles with work: every allowed pair is met once, and sums lie as arrays do."""

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
    sizes = (R, N, H, 5), (R, M, H, 5), (R, M, H, 6)
    arrays = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in sizes)
    zero = Tokens(**{f.name: jnp.zeros((R, M), jnp.int32) for f in dataclasses.fields(Tokens)})
    place = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32), (R, M))
    k = dataclasses.replace(zero, role=zero.role + HISTORY, position=place)
    q = jax.tree.map(lambda x: x[:, M - N :], k)
    return arrays, (q, k), tile_loop.Work.of(arrays, (q, k), rule or masks.MaskRule(), tile)


def test_the_loop_meets_every_allowed_pair_once(monkeypatch):
    for step in (1, 10**6):  # each row by itself, all rows together
        monkeypatch.setattr(tile_loop, "STEP", step)
        _, tokens, found = work()
        assert found.sizes[0] == (1 if step == 1 else R)

        def count(place, sums, found=found):
            allow = masks.MaskRule().allow(*found.pair(place)).astype(jnp.int32)
            reads, read = sums
            reads = found.add_queries(reads, place, allow.sum(axis=2))
            return reads, found.add_keys(read, place, allow.sum(axis=1))

        zeros = tuple(jnp.zeros(x.shape[:2], jnp.int32) for x in (found.q, found.k))
        reads_rn, read_rm = found.loop(count, zeros)
        want = masks.MaskRule().allow(*tokens)
        np.testing.assert_array_equal(reads_rn[:R, :N], want.sum(axis=2))
        np.testing.assert_array_equal(read_rm[:R, :M], want.sum(axis=1))


def test_tiles_are_parts_of_the_arrays():
    arrays, _, found = work()
    place = tile_loop.Place(row=0, query=3, key=8)
    np.testing.assert_array_equal(found.queries(found.q, place), arrays[0][:, 3:6])
    keys = found.keys(found.k, place)  # two of them are there, two are padding
    np.testing.assert_array_equal(keys[:, :2], arrays[1][:, 8:])
    np.testing.assert_array_equal(keys[:, 2:], 0)
    np.testing.assert_array_equal(found.like_q(arrays[0]), found.q)


def test_the_loop_leaves_out_tiles_without_work():
    _, _, found = work(tile=(1, 1), rule=masks.MaskRule(window=0))
    assert int(found.count) == N  # one key a query; all rows in one step
    assert len(found.order) == N * M
