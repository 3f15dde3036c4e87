"""Packed tables hold the same rows: look-up, update, training and checkpoints, to the bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import checkpoint, embedding, lines, sharding, step
from rankjax.models import rankmixer
from tests import tiny

MODEL = rankmixer.Config(tokens=4, layers=1, width=8, expansion=2, tasks=2)
TABLES = embedding.TableConfig(width=4, init_std=0.3)


@pytest.mark.parametrize("pack", [1, 2, 8])
def test_rows_of_lines(pack):
    V, E = 32, 3
    x_ve = np.random.default_rng(0).normal(size=(V, E)).astype(np.float32)
    x_ve[5], x_ve[6], x_ve[7] = np.inf, np.nan, -0.0
    x_lw = jnp.asarray(x_ve.reshape(V // pack, pack * E))
    assert lines.rows(x_lw, pack) == V
    ids = jnp.asarray([[4, 0, 31], [7, 5, 4]])
    np.testing.assert_array_equal(lines.take(x_lw, ids, pack), x_ve[ids])
    beyond = lines.take(x_lw, jnp.asarray([31, 32, 99]), pack, mode="fill", fill_value=0)
    np.testing.assert_array_equal(beyond, [x_ve[31], np.zeros(E), np.zeros(E)])


@pytest.mark.parametrize("pack", [1, 2, 8])
def test_what_is_added_to_a_row_is_not_added_to_its_neighbours(pack):
    V, E = 32, 3
    x_ve = np.random.default_rng(0).normal(size=(V, E)).astype(np.float32)
    x_ve[6], x_ve[7] = np.inf, -0.0
    ids = np.asarray([4, 0, 5, 31, 32, 40])  # 4 and 5 are neighbours, the last two are nobody
    added = np.random.default_rng(1).normal(size=(len(ids), E)).astype(np.float32)
    found = lines.add(jnp.asarray(x_ve.reshape(V // pack, -1)), jnp.asarray(ids), added, pack)
    want = x_ve.copy()
    want[ids[:4]] += added[:4]
    assert np.asarray(found).tobytes() == want.tobytes()  # of a -0.0 too


def batch():
    return tiny.batch(samples=8, history=6, candidates=2).without_impression()


def config(pack: int) -> step.TrainConfig:
    return step.TrainConfig(tables=dataclasses.replace(TABLES, pack=pack))


@functools.cache
def trained(pack: int, devices: int) -> step.State:
    """Three steps."""
    place = None
    if devices > 1:
        mesh = sharding.MeshConfig(strategy="fsdp")
        place = sharding.placement(mesh, jax.devices()[:devices])
    b, c = batch(), config(pack)
    state = step.init(MODEL, b.schema, c, b, place)
    program = step.program(MODEL, b.schema, c, place)
    for i in range(3):
        key = jax.random.fold_in(jax.random.key(0), i)
        state = program.step(
            state, b if place is None else place.put(b), step.rates_of(c, 3)(i), key
        )[0]
    return state


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("pack", [3, 4])  # 3: lines that the tables do not fill
def test_training_is_the_same_bits(pack, devices):
    plain, packed = trained(1, devices), trained(pack, devices)
    for want, found in zip(jax.tree.leaves(plain.params), jax.tree.leaves(packed.params)):
        np.testing.assert_array_equal(found, want)
    schema = batch().schema
    for name, rows in embedding.plan(schema, TABLES).arrays:
        own = packed.tables[name]["embedding"]
        assert own.shape[1] == 4 * pack and lines.rows(own, pack) % (pack * devices) == 0
        found = np.asarray(own).reshape(-1, 4)
        want = np.asarray(plain.tables[name]["embedding"])
        np.testing.assert_array_equal(found[:rows], want[:rows])
        for of in ("tables", "table_optimizer"):
            kinds = ("bias",) if of == "tables" else ("bias", "embedding")
            for kind in kinds:
                found, want = (np.asarray(getattr(x, of)[name][kind]) for x in (packed, plain))
                np.testing.assert_array_equal(found[:rows], want[:rows])


@pytest.mark.parametrize("method", embedding.METHODS)
def test_however_the_distinct_rows_are_found(method):
    b = batch()

    def of(pack: int) -> tuple:
        c = dataclasses.replace(TABLES, pack=pack)
        tables = embedding.init(jax.random.key(3), b.schema, c)
        ids = embedding.deduplicate(embedding.plan(b.schema, c), b, method)
        rows = embedding.gather(tables, ids)
        optimizer = embedding.init_optimizer(tables, c)
        gradients = jax.tree.map(jnp.sin, rows)
        return ids, rows, embedding.update(tables, optimizer, ids, gradients, c)[0]

    (ids, gathered, updated), (_, packed_rows, packed) = of(1), of(4)
    for name, rows in embedding.plan(b.schema, TABLES).arrays:
        there = slice(rows) if method == "whole" else np.asarray(ids.unique[name]) < rows
        for kind, x in gathered[name].items():
            found = np.asarray(packed_rows[name][kind])
            np.testing.assert_array_equal(found[there], np.asarray(x)[there])
        found = np.asarray(packed[name]["embedding"]).reshape(-1, 4)
        np.testing.assert_array_equal(found[:rows], np.asarray(updated[name]["embedding"])[:rows])


def test_a_checkpoint_of_lines_fits_any_number_of_devices_but_no_other_pack(tmp_path):
    saved = trained(4, 4)
    checkpoint.save(tmp_path, 3, saved, {})
    rows = dict(embedding.plan(batch().schema, config(4).tables).arrays)
    like = trained(4, 1)
    found, _ = checkpoint.restore(tmp_path, like, rows=rows, pack=4)
    for name, table in like.tables.items():
        got, want = (np.asarray(x.tables[name]["embedding"]) for x in (found, saved))
        np.testing.assert_array_equal(got, want[: len(table["embedding"])])
    for pack in (1, 2):
        rows = dict(embedding.plan(batch().schema, config(pack).tables).arrays)
        other = step.init(MODEL, batch().schema, config(pack), batch())
        with pytest.raises(ValueError, match=r"another width, or tables\.pack\?"):
            checkpoint.restore(tmp_path, other, rows=rows, pack=pack)


def test_pack_is_at_least_1():
    with pytest.raises(ValueError, match="pack=0, expected >= 1"):
        embedding.TableConfig(pack=0)
