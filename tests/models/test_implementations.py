"""Models by each implementation of their attention: a step of jagged rows is the reference's.

What a kernel computes is tested in tests/kernels; here, that models ask each for what it means.
"""

import functools

import jax
import numpy as np
import pytest

from rankjax.kernels import hstu_attention, softmax_attention
from tests.models import test_all_models as suite

SILU, SOFTMAX = hstu_attention.IMPLEMENTATIONS, softmax_attention.IMPLEMENTATIONS
# Settings that change what the attention is asked for; of one layer, that compiles fast.
VARIANTS = {
    "hstu": {"prune_last": False},
    "hstu, two tokens an event": {"tokens": "interleaved", "rab_query_time": "next"},
    "hstu, valid_len": {"attn_norm": "valid_len", "time_bias": False, "context": "none"},
    "dlrm_v3": {"prune_last": False, "context_mask": "full", "attn_window": 3},
    "mtgr": {"prune_last": False},
    "grab": {"prune_last": False, "channels": 2, "attn_window": 3, "rab_window": 2},
    "longer": {"history_mean": True},
    "onetrans": {"prune_last": False, "sequences": 3, "merge": "intent", "pyramid_round": 4},
}
CASES = [
    pytest.param(
        *(variant, implementation),
        id=f"{variant}-{implementation}",
        # Interpreted: of the kernels one variant an architecture is fast enough.
        marks=[pytest.mark.slow] * ("pallas" in str(implementation) and "," in variant),
    )
    for variant in VARIANTS
    for implementation in (None, *(SILU if variant[:4] in ("hstu", "dlrm", "mtgr") else SOFTMAX))
]


@functools.cache
def learner(variant: str, implementation: str | None):
    changes = VARIANTS[variant] | {"layers": 1, "implementation": implementation}
    return suite.learner(variant.split(",", maxsplit=1)[0], **changes)


@functools.cache
def reference(variant: str):
    """Of rows of one sample each."""
    return learner(variant, "reference")(suite.apart(suite.different_lengths()))


@pytest.mark.parametrize(("variant", "implementation"), CASES)
def test_a_step_of_jagged_rows_is_the_references(variant, implementation):
    try:
        got = learner(variant, implementation)(suite.jagged(suite.different_lengths()))
    except (ImportError, NotImplementedError) as refusal:  # not here, or not what is asked
        assert implementation in ("splash", "tokamax", "jax_nn"), refusal
        pytest.skip(str(refusal))
    suite.same_step(got, reference(variant))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
