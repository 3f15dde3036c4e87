"""The Transformer block against float64 NumPy, its counts, and what its rows read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import flops
from rankjax.batch import HISTORY, Tokens
from rankjax.layers import sequence, transformer_block
from rankjax.masks import MaskRule
from tests import builders
from tests.references import longer as reference

R, M, D, H = 2, 5, 6, 2
RULE = MaskRule()


def tokens():
    """Two rows of history tokens; the second row has two segments."""
    zero = jnp.zeros((R, M), jnp.int32)
    fields = {"time": zero, "group": zero, "bias_time": zero, "role": zero + HISTORY}
    segment = jnp.asarray([[0] * M, [0, 0, 1, 1, 1]], jnp.int32)
    return Tokens(segment=segment, position=zero + jnp.arange(M, dtype=jnp.int32), **fields)


def initial(block, rows=M):
    x = jax.ShapeDtypeStruct((R, M, D), jnp.float32)
    init = functools.partial(block.init, rule=RULE, train=False)
    t = tokens()
    queries = sequence.last(t, rows)
    return jax.eval_shape(init, jax.random.key(0), x, queries, t)["params"]


@pytest.mark.parametrize("rows", [M, 2])
@pytest.mark.parametrize(("norm", "place"), [("layer", "pre"), ("layer", "post"), ("rms", "pre")])
def test_is_the_reference(norm, place, rows):
    rng = np.random.default_rng(0)
    block = transformer_block.Block(H, norm, place)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4") / 2, initial(block))
    x = rng.normal(size=(R, M, D)).astype("f4")
    keys = tokens()
    queries = sequence.last(keys, rows)
    allow = np.asarray(RULE.allow(queries, keys))
    run = jax.jit(lambda p, x: block.apply({"params": p}, x, queries, keys, RULE, train=False))
    got = run(params, x)
    assert got.shape == (R, rows, D)
    for r in range(R):
        given = np.arange(M)[M - rows :], allow[r], builders.float64(params), H, norm, place
        want = reference.block(x[r].astype(float), *given)
        np.testing.assert_allclose(got[r], want, rtol=0, atol=1e-5)


def test_counts():
    block = transformer_block.Block(H, implementation="reference")
    params = initial(block)
    assert builders.count(params) == transformer_block.parameters(D) == 12 * D**2 + 13 * D
    assert transformer_block.parameters(D, "none") == 12 * D**2 + 9 * D
    keys = tokens()
    for rows in (M, 2):
        run = functools.partial(block.apply, rule=RULE, train=False)
        x = jax.ShapeDtypeStruct((R, M, D), jnp.float32)
        found = flops.count(run, {"params": params}, x, sequence.last(keys, rows), keys).matmul
        assert found == R * transformer_block.flops(D, rows, M)
    assert transformer_block.flops(D, M, M) == 24 * M * D**2 + 4 * M**2 * D


def test_small_residual_divides_only_what_writes_to_the_residual():
    x, t = np.zeros((R, M, D), np.float32), tokens()

    def kernels(init):
        block = transformer_block.Block(H, kernel_init=init, residual_layers=8)
        found = jax.jit(lambda key: block.init(key, x, t, t, RULE, train=False)["params"])
        return found(jax.random.key(0))

    small, lecun = kernels("small_residual"), kernels("lecun")
    for name in ("query", "key", "value", "ffn_in", "out", "ffn_out"):
        divisor = 4 if name in ("out", "ffn_out") else 1
        np.testing.assert_allclose(
            small[name]["kernel"], lecun[name]["kernel"] / divisor, rtol=1e-6
        )


def test_dropout_acts_on_what_is_added():
    """Where all of it is dropped, the residual stream passes unchanged."""
    block = transformer_block.Block(H, dropout=1 - 1e-9)
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(R, M, D)).astype("f4"), tokens()
    params = builders.moved(jax.tree.map(lambda p: np.ones(p.shape, "f4"), initial(block)), rng)

    @functools.partial(jax.jit, static_argnames="train")
    def run(train):
        rngs = {"dropout": jax.random.key(0)}
        return block.apply({"params": params}, x, t, t, RULE, train=train, rngs=rngs)

    np.testing.assert_array_equal(run(train=True), x)
    assert np.all(run(train=False) != x)


def test_bfloat16():
    block = transformer_block.Block(H, dtype="bfloat16")
    params, t = initial(block), tokens()
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    x = jax.ShapeDtypeStruct((R, M, D), jnp.bfloat16)
    run = functools.partial(block.apply, rule=RULE, train=False)
    assert jax.eval_shape(run, {"params": params}, x, t, t).dtype == jnp.bfloat16
