"""The exchange of rows on 1 to 8 devices, against plain NumPy and against one sum over all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from rankjax import exchange

ROWS, E = 64, 3
DEVICES = pytest.mark.parametrize("n", [1, 2, 4, 8])


def asked(n, kind, size=12, seed=0):
    """[n, size] ascending distinct rows of each device, ROWS behind them."""
    rng = np.random.default_rng(seed)
    out = np.full((n, size), ROWS, np.int32)
    for s in range(n):
        count = rng.integers(1, size + 1)
        pool = {
            "uniform": np.arange(ROWS),
            "one owner": np.arange(ROWS // 8, ROWS // 8 + size),  # all of one shard, in eight
            "one row": np.array([17]),
            "none": np.array([], int),
        }[kind]
        chosen = np.sort(rng.permutation(pool)[:count])
        out[s, : len(chosen)] = chosen
    return out


def on(n, function, *args):
    """function of every device's part of the leading axes, on n devices in two axes."""
    shape = (n // 2, 2) if n > 1 else (1, 1)
    mesh = Mesh(np.array(jax.devices()[:n]).reshape(shape), ("data", "model"))
    spec = PartitionSpec(("data", "model"))
    split = exchange.Split(axes=("data", "model"), shards=n)
    run = jax.shard_map(
        functools.partial(function, split),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    return jax.jit(run)(*args)


def table():
    rng = np.random.default_rng(1)
    return {
        "x": rng.normal(size=(ROWS, E)).astype(np.float32),
        "acc": rng.random(ROWS).astype(np.float32),
    }


KINDS = pytest.mark.parametrize("kind", ["uniform", "one owner", "one row", "none"])


@DEVICES
@KINDS
@pytest.mark.parametrize("factor", [0.1, 2.0])
def test_fetched_rows_are_the_tables(n, kind, factor):
    t, unique = table(), asked(n, kind)

    def run(split, t, unique):
        found, rounds = exchange.fetch(t, unique[0], split, factor)
        return found, exchange.fetch_simply(t, unique[0], split), rounds[None]

    found, simply, rounds = on(n, run, t, unique)
    flat = unique.reshape(-1)
    for name, x in t.items():
        want = np.where(
            (flat < ROWS).reshape(-1, *[1] * (x.ndim - 1)), x[np.minimum(flat, ROWS - 1)], 0
        )
        np.testing.assert_array_equal(found[name], want)
        np.testing.assert_array_equal(simply[name], want)
    capacity = exchange.Split(axes=(), shards=n).capacity(unique.shape[1], factor)
    owners = unique // (ROWS // n)
    most = max(np.count_nonzero(row == s) for row in owners for s in range(n))
    np.testing.assert_array_equal(rounds, -(-most // capacity))


@DEVICES
@KINDS
@pytest.mark.parametrize("factor", [0.1, 2.0])
def test_every_row_is_updated_once_with_all_of_its_gradient(n, kind, factor):
    t, unique = table(), asked(n, kind, seed=n)
    g = np.random.default_rng(2).normal(size=(*unique.shape, E)).astype(np.float32)

    def update(t, rows, g):
        """Counts the updates of a row, beside adding its gradient."""
        x = t["x"].at[rows].add(g, mode="drop")
        return {"x": x, "acc": t["acc"].at[rows].add(1, mode="drop")}

    def run(split, t, unique, g):
        found, rounds = exchange.send(t, unique[0], g[0], update, split, factor)
        return found, exchange.send_simply(t, unique[0], g[0], update, split), rounds[None]

    found, simply, rounds = on(n, run, t, unique, g)
    want = {name: x.copy() for name, x in t.items()}
    there = unique < ROWS
    np.add.at(want["x"], unique[there], g[there])
    want["acc"][np.unique(unique[there])] += 1
    for got in (found, simply):
        np.testing.assert_allclose(got["x"], want["x"], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(got["acc"], want["acc"])
    assert len(set(np.asarray(rounds).tolist())) == 1
    if factor == 2.0 and kind == "uniform":
        assert rounds[0] <= 3
    if factor == 0.1 and kind == "one owner" and n == 8:
        assert rounds[0] > 1


def test_the_same_input_gives_the_same_bits():
    unique = asked(8, "uniform")
    g = np.random.default_rng(3).normal(size=(*unique.shape, E)).astype(np.float32)
    update = lambda t, rows, g: {"x": t["x"].at[rows].add(g, mode="drop"), "acc": t["acc"]}

    def run(split, t, unique, g):
        return exchange.send(t, unique[0], g[0], update, split)[0]

    once, twice = (on(8, run, table(), unique, g) for _ in range(2))
    np.testing.assert_array_equal(once["x"], twice["x"])


def test_what_a_round_sends_grows_with_the_ids_of_a_device_alone():
    of = lambda n, ids: exchange.bytes_of_round(exchange.Split(axes=(), shards=n), ids, 256)
    few, many = of(8, 4096), of(512, 4096)
    assert all(abs(many[kind] / few[kind] - 1) < 0.15 for kind in few)  # 511 / 512 over 7 / 8
    assert of(8, 8192)["rows"] == 2 * few["rows"]
    assert few["ids"] == 4 * 7 * 1024 and few["rows"] == 256 * 7 * 1024


def test_rows_that_cannot_be_split_are_refused():
    split = exchange.Split(axes=("data",), shards=8)
    assert split.share(64) == 8
    with pytest.raises(ValueError, match="a table of 65 rows on 8 devices, expected a multiple"):
        split.share(65)


def test_devices_of_the_tests():
    assert jax.device_count() == 8 and jnp.zeros(1).sharding.num_devices == 1
