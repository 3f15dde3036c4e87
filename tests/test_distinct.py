import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import distinct


@pytest.mark.parametrize("method", ["hash", "sort"])
@pytest.mark.parametrize(
    "case", ["random", "one id", "all zero", "all distinct", "largest id", "single", "contiguous"]
)
def test_distinct_ids(method, case):
    """Exact on everything, ids that collide in the hash table among them."""
    rng = np.random.default_rng(0)
    rows, ids = {
        "random": (1000, rng.integers(0, 1000, 3000)),
        "one id": (1000, np.full(500, 17)),
        "all zero": (1000, np.zeros(500, int)),
        "all distinct": (2**31 - 1, rng.choice(2**22, 5000, replace=False) * 500 + 1),
        "largest id": (2**31 - 1, np.array([2**31 - 2, 0, 1, 2**31 - 2])),
        "single": (2, np.array([1])),
        "contiguous": (10**6, np.arange(4000) + 77),
    }[case]
    run = jax.jit(functools.partial(distinct.find, rows=rows, method=method))
    unique, position = map(np.asarray, run(jnp.asarray(ids, jnp.int32)))
    assert unique.shape == (min(rows - 1, len(ids)) + 1,)
    assert unique[0] == 0
    assert (position[ids == 0] == 0).all() and (position[ids > 0] > 0).all()
    np.testing.assert_array_equal(unique[position], ids)
    named = unique[unique < rows]
    assert len(np.unique(named)) == len(named)
    assert set(named) == {0, *ids.tolist()}
