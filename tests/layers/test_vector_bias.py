"""Three look-ups against vectors beside the keys, pair by pair, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import batch
from rankjax.batch import Tokens
from rankjax.layers import vector_bias
from rankjax.layers.vector_bias import Sight, Tables, VectorBias
from rankjax.masks import MaskRule
from tests import builders
from tests.references import grab as reference

R, N, H, Q = 2, 5, 2, 3
TABLES = Tables(positions=4, actions=3, times=64)
RULE = MaskRule()


def tokens(rng):
    """Events of one sample a row, oldest first."""
    position = np.tile(np.arange(N), (R, 1))
    seconds = np.cumsum(rng.choice([0, 1, 2, 50, 4_000, 10**6], (R, N)), axis=1)
    fields = {"segment": 0 * position, "role": 0 * position + batch.HISTORY, "time": seconds}
    fields |= {"position": position, "group": 0 * position - 1, "bias_time": seconds}
    return Tokens(**{k: jnp.asarray(x, jnp.int32) for k, x in fields.items()})


@pytest.mark.parametrize("window", [None, 0, 2])
@pytest.mark.parametrize("times", [64, 0])
def test_attention_is_that_with_vectors_beside_the_keys(times, window):
    rng = np.random.default_rng(0)
    tables = Tables(positions=4, actions=3, times=times, window=window)
    own, action = tokens(rng), rng.integers(0, 3, (R, N))
    q, k, v = rng.normal(size=(3, R, N, H, Q)).astype("f4")
    params = VectorBias(tables).init(jax.random.key(0), q)["params"]
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype("f4"), params)
    sight = Sight.of((own, own, RULE), tables, jnp.asarray(action), jnp.asarray(action))

    @jax.jit
    def run(params, q):
        t = VectorBias(tables).apply({"params": params}, q)
        return vector_bias.attention(q, k, v, t, sight)

    got = run(params, q)
    c = {"positions": 4, "actions": 3, "times": times, "rab_window": window}
    p = builders.float64(params)
    seconds = np.asarray(own.bias_time)
    for r in range(R):
        facts = list(zip(range(N), action[r], seconds[r]))
        for i in range(N):
            vectors = np.stack([reference.vector(facts[i], facts[j], p, c) for j in range(i + 1)])
            for h in range(H):
                score = (np.float64(k[r, : i + 1, h]) + vectors) @ q[r, i, h] / np.sqrt(Q)
                weight = np.exp(score)
                want = weight / weight.sum() @ v[r, : i + 1, h]
                np.testing.assert_allclose(got[r, i, h], want, rtol=0, atol=1e-5)


def test_time_buckets():
    """Two to the octave, the same in NumPy's exact comparison; whole powers of two start one."""
    found = vector_bias.time_bucket(
        jnp.array([-5, 0, 1, 2, 3, 4, 5, 6, 7, 8, 2**20, 2**31 - 9]), 64
    )
    np.testing.assert_array_equal(found[:-1], [0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 40])
    assert found[-1] in (61, 62)  # beyond float32's whole numbers
    seconds = np.unique(np.geomspace(1, 10**6, 400).astype(int))
    want = [reference.bucket(s, 64) for s in seconds]
    np.testing.assert_array_equal(vector_bias.time_bucket(jnp.asarray(seconds), 64), want)
    np.testing.assert_array_equal(vector_bias.time_bucket(jnp.array([100, 10**6]), 8), [7, 7])


def test_rows_of_pairs():
    own = tokens(np.random.default_rng(1))
    action = jnp.asarray([[0, 1, 2, 7, -1]] * R)
    position, pair, time = vector_bias.indices(TABLES, own, own, action, action)
    assert position.shape == pair.shape == time.shape == (R, N, N)
    np.testing.assert_array_equal(position[0, 4], [3, 3, 2, 1, 0])  # 4 shares the last row
    ids = np.array([0, 1, 2, 2, 0])
    np.testing.assert_array_equal(pair[0], 4 + 3 * ids[:, None] + ids)
    assert np.asarray(time).min() == 4 + 9 and np.asarray(time).max() < sum(TABLES.rows)
    no_time = Tables(positions=4, actions=3, times=0, window=2)
    position, pair = vector_bias.indices(no_time, own, own, action, action)
    np.testing.assert_array_equal(position[0, 4], [13, 13, 13, 1, 0])
    np.testing.assert_array_equal(np.asarray(pair[0]) == 13, np.tri(N, k=-2, dtype=bool))


def test_parameters_and_dtype():
    q = jax.ShapeDtypeStruct((R, N, H, Q), jnp.bfloat16)
    out, variables = jax.eval_shape(
        functools.partial(VectorBias(TABLES).init_with_output, jax.random.key(0)), q
    )
    assert out.shape == (R, N, 4 + 9 + 64, H) and out.dtype == jnp.float32  # scores are
    shapes = {k: x.shape for k, x in variables["params"].items()}
    assert shapes == {"position": (4, Q), "action": (9, Q), "time": (64, Q)}
    assert all(x.dtype == jnp.float32 for x in variables["params"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": 0}, "positions=0, expected an integer >= 1"),
        ({"actions": 1}, "actions=1, expected an integer >= 2"),
        ({"times": -1}, "times=-1, expected an integer >= 0"),
        ({"window": -1}, "window=-1, expected an integer >= 0"),
    ],
)
def test_refused_tables(change, message):
    with pytest.raises(ValueError, match=f"vector_bias.Tables: {message}"):
        Tables(**{"positions": 4, "actions": 3, "times": 64} | change)
