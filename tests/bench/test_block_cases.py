"""block_cases: every architecture has a block, and every case says all that its peer is told."""

import jax
import numpy as np
import pytest

from rankjax import models
from rankjax.bench import block_cases

TINY = block_cases.Size(candidates=6, tokens=4, rows=3, history=5, listed=2, width=8)


def test_every_architecture_has_a_block():
    assert {name.split(".")[0] for name in block_cases.BLOCKS} == set(models.MODELS)


@pytest.mark.parametrize("name", block_cases.BLOCKS)
def test_a_case_can_be_called(name):
    """Shapes only: nothing is compiled."""
    case = block_cases.BLOCKS[name](TINY)
    out = jax.eval_shape(case.apply, case.params, case.floats, case.given)
    assert out.dtype == np.float32
    assert all(x.dtype == np.float32 for x in (*case.floats, *jax.tree.leaves(case.params)))
    assert all(x.dtype in (np.bool_, np.int32) for x in case.arrays.values())


def test_histories_have_padding_and_masks_know_it():
    found = block_cases.features(TINY)
    lengths = np.asarray(found.history_mask).sum(axis=1)
    assert lengths.max() == TINY.history and lengths.min() < TINY.history
    allow = block_cases.BLOCKS["longer"](TINY).arrays["allow"]
    padding = np.flatnonzero(~np.asarray(found.history_mask[-1]))
    assert not allow[-1][:, padding].any() and not allow[-1][padding].any()


def test_no_random_parameter_is_0_or_1():
    case = block_cases.BLOCKS["heteroatt"](TINY)
    leaves = block_cases.flat(case.params)
    assert "ffn/ffn_in/kernel" in leaves
    assert all(np.all((x != 0) & (x != 1)) for x in leaves.values())
