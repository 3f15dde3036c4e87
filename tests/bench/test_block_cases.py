"""block_cases: every architecture has a block, and every case says all that its peer is told."""

import jax
import numpy as np
import pytest

from rankjax import models
from rankjax.bench import block_cases
from rankjax.bench.block_inputs import features
from tests.bench.test_block_inputs import TINY


def test_the_architectures_of_the_papers_have_a_block():
    """One that is added later may go without a peer."""
    found = {name.split(".")[0] for name in block_cases.BLOCKS} - {"part"}
    assert found <= models.MODELS.keys() and len(found) >= 18


@pytest.mark.parametrize("name", block_cases.BLOCKS)
def test_a_case_can_be_called(name):
    """Shapes only: nothing is compiled."""
    case = block_cases.BLOCKS[name](TINY)
    out = jax.eval_shape(case.apply, case.params, case.floats, case.given)
    assert out.dtype == np.float32
    assert all(x.dtype == np.float32 for x in (*case.floats, *jax.tree.leaves(case.params)))
    assert all(x.dtype in (np.bool_, np.int32) for x in case.arrays.values())


def test_masks_know_the_padding():
    allow = block_cases.BLOCKS["longer"](TINY).arrays["allow"]
    padding = np.flatnonzero(~np.asarray(features(TINY).history_mask[-1]))
    assert len(padding)
    assert not allow[-1][:, padding].any() and not allow[-1][padding].any()
