"""Padding, cutting, and the list of blocks with work."""

import jax.numpy as jnp
import numpy as np

from rankjax.kernels import blocks


def test_cut_pads_to_a_multiple():
    x = jnp.arange(2 * 5 * 3).reshape(2, 5, 3)
    got = blocks.cut(x, 4)
    assert got.shape == (2, 2, 4, 3)
    np.testing.assert_array_equal(got.reshape(2, 8, 3)[:, :5], x)
    np.testing.assert_array_equal(got.reshape(2, 8, 3)[:, 5:], 0)
    assert blocks.padded(x, 5) is x


def test_schedule_lists_the_active_blocks_and_repeats_the_last():
    active = np.array([[[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]], bool)
    order, count = blocks.schedule(jnp.asarray(active))
    np.testing.assert_array_equal(count, [[2, 0, 4]])
    np.testing.assert_array_equal(order[0, 0], [1, 3, 3, 3])
    np.testing.assert_array_equal(order[0, 2], [0, 1, 2, 3])


def test_schedule_puts_the_first_ones_first():
    active = np.array([[[1, 1, 0, 1, 1], [0, 1, 1, 0, 0]]], bool)
    first = np.array([[[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]], bool)
    order, count = blocks.schedule(jnp.asarray(active), jnp.asarray(first))
    np.testing.assert_array_equal(count, [[4, 2]])
    np.testing.assert_array_equal(order[0], [[3, 4, 0, 1, 1], [1, 2, 2, 2, 2]])
