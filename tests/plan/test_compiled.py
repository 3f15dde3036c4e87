"""A step from shapes alone is the step of arrays, and collectives are counted in bytes."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rankjax import embedding, plan, sharding, step
from rankjax.layers import stack
from rankjax.models import rankmixer
from tests import tiny

MODEL = rankmixer.Config(tokens=4, layers=2, width=8, expansion=2, tasks=2)
CONFIG = step.TrainConfig(tables=embedding.TableConfig(width=4))


def arrays():
    return tiny.batch(samples=8, history=6, candidates=2).without_impression()


def test_a_batch_of_shapes_is_shaped_as_a_batch():
    want = arrays()
    found = plan.batch(want.schema, 8, 6, 2)
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for got, x in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert (got.shape, got.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("mesh", [None, sharding.MeshConfig(data=2, model=2, strategy="tensor")])
@pytest.mark.parametrize("compute", [stack.PLAIN, stack.Compute(scan=True)])
def test_the_step_of_shapes_is_the_step_of_arrays(mesh, compute):
    place = None if mesh is None else sharding.placement(mesh, jax.devices()[:4])
    batch = arrays()
    args = MODEL, batch.schema, CONFIG
    state = step.init(*args, batch, place, compute)
    if place is not None:
        batch = place.put(batch)
    run = step.program(*args, place, compute).step
    want = run.lower(state, batch, step.rates_of(CONFIG, 1)(0), jax.random.key(0)).as_text()
    shapes = plan.batch(batch.schema, 8, 6, 2)
    found = plan.lowered(MODEL, CONFIG, shapes, place, compute).as_text()
    heads = [text.split("func.func public @main")[1].count("tensor<") for text in (found, want)]
    assert heads[0] == heads[1]
    of = lambda text: collections.Counter(re.findall(r"stablehlo\.(?!mesh)\w+", text))
    operations = of(found), of(want)
    assert operations[0] == operations[1]


def on_mesh(function, x, out=None):
    """Optimised HLO of `function` on each of four devices' [8, 4] float32."""
    place = sharding.placement(sharding.MeshConfig(data=2, model=2), jax.devices()[:4])
    spec = PartitionSpec(sharding.AXES)
    mapped = jax.shard_map(
        function, mesh=place.mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    return jax.jit(mapped).lower(x).compile().as_text()


ALL = sharding.AXES
ROWS = 8 * 4 * 4  # bytes of what a device has


@pytest.mark.parametrize(
    "function, want",
    [
        (lambda x: x + jax.lax.psum(x, ALL), {"all-reduce": ROWS}),
        (lambda x: x + jax.lax.psum(x, "model"), {"all-reduce": ROWS}),
        (lambda x: jax.lax.all_gather(x, ALL), {"all-gather": 4 * ROWS}),
        (lambda x: jax.lax.all_gather(x, "data"), {"all-gather": 2 * ROWS}),
        (lambda x: jax.lax.psum_scatter(x, ALL), {"reduce-scatter": ROWS}),
        (
            lambda x: jax.lax.all_to_all(x, ALL, split_axis=0, concat_axis=0, tiled=True),
            {"all-to-all": ROWS},
        ),
        (
            lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
            {"collective-permute": ROWS},
        ),
        (lambda x: x * 2, {}),
    ],
)
def test_collectives_are_counted_in_bytes(function, want):
    x = jnp.ones((4 * 8, 4))
    if "reduce-scatter" in want:
        function = functools.partial(lambda f, x: f(x[:4]), function)
        want = {"reduce-scatter": ROWS // 2}
    assert plan.collectives(on_mesh(function, x)) == want


def test_collectives_of_other_kinds_of_lines():
    text = """
  %a = (f32[2,8]{1,0}, bf16[4]{0}) all-reduce(%x, %y), replica_groups={{0,1}}, to_apply=%add
  %b = bf16[2,8]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %c = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %d = f32[8]{0} all-gather-done(%c)
  %e = pred[3]{0} fusion(%all-reduce.1)
  %f = f32[3]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
  %g = f32[4]{0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=3] {'a','b'}, dimensions={0}
  %h = f32[5]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
"""
    assert plan.collectives(text) == {
        "all-reduce": 64 + 8,
        "reduce-scatter": 4 * 32 + 6 * 16,
        "all-gather": 32,
        "collective-permute": 20,
    }


def test_collectives_that_are_started_and_awaited():
    """As compilers for GPUs print them: ((what goes in), what comes out)."""
    text = """
  %a = ((f32[2,8]{1,0}), f32[2,8]{1,0}) all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%add
  %b = ((f32[8]{0:T(8,128)}, s32[16]{0}), (f32[2]{0}, s32[4]{0})) reduce-scatter-start(%x, %y), \
replica_groups=[2,4]<=[8], dimensions={0}
  %c = ((f32[2]{0}, f32[3]{0}), (f32[8]{0}, f32[12]{0})) all-gather-start(%x, %y), \
replica_groups={{0,1,2,3}}, dimensions={0}
  %d = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,0}}
  %e = f32[2,8]{1,0} all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%add
  %f = ((f32[8,2]{1,0}), f32[8,2]{1,0}) all-to-all-start(%x), replica_groups=mesh['a'=8] {'a'}
"""
    assert plan.collectives(text) == {
        "all-reduce": 64 + 64,
        "reduce-scatter": 4 * (8 + 16),
        "all-gather": 32 + 48,
        "collective-permute": 20,
        "all-to-all": 64,
    }


def test_a_loop_counts_as_often_as_it_runs():
    def looped(x):
        return jax.lax.scan(lambda x, _: (jax.lax.psum(x, ALL), None), x, None, length=5)[0]

    text = on_mesh(looped, jnp.ones((4 * 8, 4)))
    assert plan.collectives(text) == {"all-reduce": 5 * ROWS}

    def twice(x):
        return jax.lax.scan(lambda x, _: (looped(x), None), x, None, length=3)[0]

    text = on_mesh(twice, jnp.ones((4 * 8, 4)))
    assert plan.collectives(text) == {"all-reduce": 15 * ROWS}


def test_a_loop_whose_limit_stands_in_its_condition():
    """As a TPU's compiler prints loops."""
    text = """
%cond.1 (p: (s32[], f32[8])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(3)
  ROOT %lt.2 = pred[]{:T(512)} compare(%get-tuple-element.3, %constant.7), direction=LT
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8] all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond.1, body=%body.1
}
"""
    assert plan.collectives(text) == {"all-reduce": 3 * 32}
    assert plan.collectives(text.replace("LT", "NE")) == {"all-reduce": 32}


def test_pieces_of_one_collective_count_once():
    line = '  %{} = f32[8]{{0}} all-gather(%x), replica_groups={{{{0,1}}}}, chain_id="{}"'
    text = "\n".join(line.format(name, chain) for name, chain in (("a", 1), ("b", 1), ("c", 2)))
    assert plan.collectives(text) == {"all-gather": 64}


def test_figures_of_a_product():
    x = jnp.ones((16, 32))
    found = plan.figures(jax.jit(lambda x: x @ x.T).lower(x).compile())
    assert found["flops"] == 2 * 16 * 16 * 32
    assert found["argument_bytes"] == x.nbytes and found["collectives"] == {}
    assert np.isfinite(found["temporary_bytes"]) and found["seconds"] == 0  # a CPU says nothing
