"""State and step on a mesh: where arrays lie, and what is refused. test_train.py runs the step."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from rankjax import embedding, sharding, step
from rankjax.layers import stack
from rankjax.models import rankmixer
from tests import tiny

MODEL = rankmixer.Config(tokens=4, layers=1, width=8, expansion=2, tasks=2)
CONFIG = step.TrainConfig(tables=embedding.TableConfig(width=4, init_std=0.3))
MESH = sharding.MeshConfig(data=4, model=2, strategy="fsdp_tensor")


def batch(samples=8):
    return tiny.batch(samples=samples, history=6, candidates=2).without_impression()


def test_every_array_of_a_fresh_state_lies_where_it_should():
    place = sharding.placement(MESH)
    schema = batch().schema
    state = step.init(MODEL, schema, CONFIG, batch(), place)
    for x, own in zip(jax.tree.leaves(state), jax.tree.leaves(step.shardings(state, place))):
        assert x.sharding.is_equivalent_to(own, x.ndim)
    table = state.tables["user"]["embedding"]
    assert {len(part.data) for part in table.addressable_shards} == {len(table) // 8}
    kernel = state.params["block_0"]["ffn"]["ffn_in"]["kernel"]
    parts = {part.data.shape for part in kernel.addressable_shards}
    assert parts == {(kernel.shape[0] // 2, kernel.shape[1] // 4, kernel.shape[2])}


def test_a_fresh_state_is_the_same_on_any_number_of_devices():
    schema = batch().schema
    one = step.init(MODEL, schema, CONFIG, batch())
    for count in (2, 8):
        place = sharding.placement(sharding.MeshConfig(), jax.devices()[:count])
        got = step.init(MODEL, schema, CONFIG, batch(), place)
        for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(got.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        for name, table in one.tables.items():
            for kind, x in table.items():
                np.testing.assert_allclose(got.tables[name][kind][: len(x)], x, rtol=0, atol=1e-6)


def test_rows_that_devices_cannot_share_are_refused():
    place = sharding.placement(MESH)
    with pytest.raises(ValueError, match="a batch of 6 rows on 8 devices, expected a multiple"):
        step.init(MODEL, batch().schema, CONFIG, batch(6), place)


def test_clipped_tables_are_refused_on_a_mesh():
    place = sharding.placement(MESH)
    config = dataclasses.replace(CONFIG, tables=dataclasses.replace(CONFIG.tables, clip=1.0))
    with pytest.raises(ValueError, match=r"clip=1\.0 on a mesh, expected None"):
        step.program(MODEL, batch().schema, config, place)


def test_no_device_ever_holds_a_whole_table():
    """The compiled step, of tables far larger than all else: nothing is as long as they are."""
    schema = batch().schema
    rows = 100_003
    tables = tuple(dataclasses.replace(t, rows=rows) for t in schema.tables if t.name == "item")
    others = tuple(t for t in schema.tables if t.name != "item")
    schema = dataclasses.replace(schema, tables=(*others, *tables))
    place = sharding.placement(MESH)
    wide = dataclasses.replace(batch(), schema=schema)
    state = jax.eval_shape(lambda: step.init(MODEL, schema, CONFIG, wide, place))
    own = step.shardings(state, place)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, own
    )
    put = lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=place.rows)
    run = step.program(MODEL, schema, CONFIG, place).step
    args = state, jax.tree.map(put, wide), step.rates_of(CONFIG, 1)(0), jax.random.key(0)
    text = run.lower(*args).compile().as_text()
    longest = max(int(n) for n in re.findall(r"[fs]32\[(\d+)", text))
    assert rows // 8 <= longest < rows // 4
    assert "all-to-all" in text


def test_no_device_ever_makes_a_whole_table():
    """The compiled initialisation: each makes its own rows."""
    schema, rows = batch().schema, 100_003
    tables = tuple(
        dataclasses.replace(t, rows=rows) if t.name == "item" else t for t in schema.tables
    )
    wide = dataclasses.replace(batch(), schema=dataclasses.replace(schema, tables=tables))
    place = sharding.placement(MESH)
    make = functools.partial(step.fresh, MODEL, wide.schema, CONFIG, place, stack.PLAIN)
    own = step.shardings(jax.eval_shape(make, jax.random.key(0), wide), place)
    text = jax.jit(make, out_shardings=own).lower(jax.random.key(0), wide).compile().as_text()
    longest = max(int(n) for n in re.findall(r"[fsu]32\[(\d+)", text))
    assert rows // 8 <= longest < rows // 4
