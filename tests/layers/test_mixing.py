"""Mixing as a transpose of blocks, its way back for a part of the columns, and refused widths."""

import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import mixing
from tests.references import rankmixer as reference

T, N, D = 4, 3, 12


def random():
    return np.random.default_rng(0).normal(size=(T, N, D)).astype("f4")


def test_mixing_is_a_transpose_of_blocks_and_its_own_inverse():
    x_tnd = random()
    mixed_tnd = np.asarray(mixing.mix(jnp.asarray(x_tnd)))
    np.testing.assert_array_equal(mixing.mix(mixed_tnd), x_tnd)
    for t in range(T):
        for h in range(T):
            np.testing.assert_array_equal(
                mixed_tnd[h, :, 3 * t : 3 * t + 3], x_tnd[t, :, 3 * h : 3 * h + 3]
            )


def test_mixing_is_the_references():
    x_tnd = random()
    for n in range(N):
        np.testing.assert_array_equal(mixing.mix(x_tnd)[:, n], reference.mix(x_tnd[:, n]))


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_the_first_columns_revert_into_the_first_tokens(kept):
    x_tnd = random()
    columns_tnw = mixing.mix(x_tnd)[..., : kept * D // T]
    np.testing.assert_array_equal(mixing.revert(columns_tnw, D), x_tnd[:kept])


def test_widths_that_cannot_be_cut_are_refused():
    mixing.check("a.Config", 4, 12)
    match = r"a.Config: width=10 is no multiple of tokens=4; .* Nearest widths: 8 and 12"
    with pytest.raises(ValueError, match=match):
        mixing.check("a.Config", 4, 10)
    with pytest.raises(ValueError, match="Nearest widths: 4 and 4"):
        mixing.check("a.Config", 4, 3)
