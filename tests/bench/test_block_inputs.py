"""block_inputs: parameters none of which is neutral, and requests of several lengths."""

import jax
import numpy as np

from rankjax.bench import block_inputs

TINY = block_inputs.SIZES["tiny"]


def test_histories_have_padding():
    found = block_inputs.features(TINY)
    lengths = np.asarray(found.history_mask).sum(axis=1)
    assert lengths.max() == TINY.history and TINY.history // 2 <= lengths.min() < TINY.history
    times = np.asarray(found.history_time)[np.asarray(found.history_mask)]
    assert times.max() < 0, "every event is before the request"


def test_no_random_parameter_is_0_or_1():
    shapes = {"norm": {"scale": (8,), "bias": (8,)}, "kernel": (400, 100)}
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x, np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    leaves = block_inputs.flat(block_inputs.random_params(shapes, np.random.default_rng(0)))
    assert set(leaves) == {"norm/scale", "norm/bias", "kernel"}
    assert all(np.all((x != 0) & (x != 1)) for x in leaves.values())
    assert abs(leaves["norm/scale"].mean() - 1) < 0.2
    np.testing.assert_allclose(leaves["kernel"].std(), 1 / 20, rtol=0.02)


def test_normal_is_the_same_again():
    np.testing.assert_array_equal(block_inputs.normal(2, 3), block_inputs.normal(2, 3))
