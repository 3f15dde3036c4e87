"""How the tables of a relative bias begin."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from rankjax.layers import relative_bias


class Layer(nn.Module):
    options: dict

    @nn.compact
    def __call__(self):
        return relative_bias.tables(self.param, **self.options)


def test_recency():
    table = relative_bias.recency(per_event=2)(None, (9,))
    np.testing.assert_allclose(table[4 - np.arange(5)], 2 * np.exp(-np.arange(5) / 6), rtol=1e-6)
    np.testing.assert_allclose(table[4 + np.arange(5)], table[4 - np.arange(5)])


@pytest.mark.parametrize("position_init", relative_bias.POSITION_INITS)
def test_tables(position_init):
    layer = Layer({"positions": 500, "time": True, "position_init": position_init})
    bias, params = layer.init_with_output(jax.random.key(0))
    tables = params["params"]
    assert tables["position_bias"].shape == (999,) and tables["time_bias"].shape == (129,)
    assert bias.position is tables["position_bias"] and bias.time is tables["time_bias"]
    np.testing.assert_allclose(np.std(tables["time_bias"]), 0.02, rtol=0.2)
    if position_init == "normal":
        np.testing.assert_allclose(np.std(tables["position_bias"]), 0.02, rtol=0.1)
    else:
        assert tables["position_bias"][499] == 2


@pytest.mark.parametrize(("positions", "time"), [(None, False), (None, True), (3, False)])
def test_parts_that_are_off(positions, time):
    bias, params = Layer({"positions": positions, "time": time}).init_with_output(jax.random.key(0))
    if bias is None:
        assert (positions, time) == (None, False) and not params
        return
    assert (bias.position is None) == (positions is None) and (bias.time is None) != time
