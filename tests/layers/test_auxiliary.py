"""Auxiliary terms are pytrees whose weights, targets and flags are static."""

import jax
import jax.numpy as jnp

from rankjax.layers import auxiliary


def test_terms_go_through_jit_with_static_settings():
    terms = {
        "head": auxiliary.Logits(jnp.ones((2, 3, 1)), 0.5, owns_tables=True),
        "experts": auxiliary.Penalty(jnp.float32(2), 0.1, jnp.float32(0.3), 0.25),
    }
    assert len(jax.tree.leaves(terms)) == 3
    got = jax.jit(lambda x: jax.tree.map(lambda a: 2 * a, x))(terms)
    assert (got["head"].weight, got["head"].owns_tables) == (0.5, True)
    assert (got["experts"].weight, got["experts"].target) == (0.1, 0.25)
    assert got["experts"].value == 4 and got["head"].logits.shape == (2, 3, 1)


def test_a_penalty_without_a_target_measures_nothing():
    term = auxiliary.Penalty(jnp.float32(2))
    assert term.measured is None and term.target is None and term.weight == 1.0
    assert len(jax.tree.leaves(term)) == 1
