"""Every architecture with its layers scanned and computed again: the values stay what they are."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rankjax import embedding, evaluate, flops, loss, models, optim, sharding, step
from rankjax.layers import stack
from tests.models import test_all_models as suite

SCAN = stack.Compute(scan=True)
# {name: (what differs from the suite's Config, the names of its runs)}.
SCANNED = {
    "autoint": (dict(layers=4, head_width=5), {"layer_stack_1_3"}),  # the first reads other widths
    "dcnv2_din": (dict(layers=3), {"cross_stack_0_2"}),
    "din": (dict(layers=4), {"layer_stack_1_3"}),
    "wukong": (dict(layers=4, fm_tokens=2, linear_tokens=3), {"layer_stack_1_3"}),
    "transformer": (dict(layers=4), {"block_stack_0_2"}),  # the last reads fewer rows, as below
    "heteroatt": (dict(layers=4), {"block_stack_0_2"}),
    "hiformer": (dict(layers=4), {"block_stack_0_2"}),
    "hhft": (dict(layers=2, hetero_layers=3), {"hetero_stack_0_1", "hiformer_stack_0_1"}),
    "rankmixer": (dict(layers=3), {"block_stack_0_2"}),
    "tokenmixer_large": (
        dict(layers=7, inter_residual=3),
        {"block_stack_0_3_3", "block_stack_1_4_3", "block_stack_2_5_3"},
    ),
    "hstu": (dict(layers=4), {"layer_stack_0_2"}),
    "dlrm_v3": (dict(layers=4), {"layer_stack_0_2"}),
    "mtgr": (dict(layers=4), {"layer_stack_0_2"}),
    "grab": (dict(layers=4), {"layer_stack_0_2"}),
    "longer": (dict(layers=4), {"layer_stack_2_3"}),  # the first reads the whole history
    "onetrans": (dict(layers=4, pyramid=False), {"block_stack_1_2"}),
}
# Other ways through the same models, of which the runs differ, or what goes round in the loop.
VARIANTS = {
    "rankmixer, experts": ("rankmixer", dict(layers=3, experts=3), {"block_stack_0_2"}),
    "tokenmixer_large, whole": (
        "tokenmixer_large",
        dict(layers=4, inter_residual=2, prune_last=False),
        {"block_stack_0_2_2", "block_stack_1_3_2"},
    ),
    "tokenmixer_large, plain": (
        "tokenmixer_large",
        dict(layers=4, inter_residual=0, aux_layers=(2, 1)),
        {"block_stack_0_2"},
    ),
    "hstu, whole": ("hstu", dict(layers=3, prune_last=False), {"layer_stack_0_2"}),
    "grab, one mix": ("grab", dict(layers=4, mix="last"), {"layer_stack_0_2"}),
    "longer, whole": (
        "longer",
        dict(layers=3, prune_last=False, global_order="paper"),
        {"layer_stack_2_3"},
    ),
    "onetrans, rounded": ("onetrans", dict(layers=6, pyramid_round=16), {"block_stack_1_3"}),
}
CASES = {name: (name, *case) for name, case in SCANNED.items()} | VARIANTS
RNGS = {"dropout": jax.random.key(0)}


def config_of(case):
    name, changes, _ = CASES[case]
    config = dataclasses.replace(suite.config_of(name), **changes)
    # What a kernel hides no jaxpr shows.
    hides = hasattr(config, "implementation")
    return dataclasses.replace(config, implementation="reference") if hides else config


@functools.cache
def inputs(case):
    """(parameters one by one, rows, ids, layout, batch), all parameters drawn."""
    name, changes, _ = CASES[case]
    _, layout, params, tables = suite.made(name, **changes)
    batch = suite.random_batch().without_impression()
    ids = embedding.deduplicate(layout, batch)
    return params, embedding.gather(tables, ids), ids, layout, batch


def objective(case, compute):
    """(parameters, rows) -> (loss with all its terms, logits in training)."""
    _, _, ids, layout, batch = inputs(case)
    model = step.build_model(config_of(case), compute)

    def value(params, rows):
        logits_rck, aux = evaluate.apply(
            model, layout, params, rows, ids, batch, train=True, rngs=RNGS
        )
        weights = dict(task_weights={}, aux_weights=loss.first_weights(aux, {}))
        total, _ = loss.multi_task(
            logits_rck, batch.labels, batch.weights, aux, batch.schema, **weights
        )
        return total, logits_rck

    return value


def parameters(case, compute):
    params = inputs(case)[0]
    return stack.stacked(params, CASES[case][2]) if compute.scan else params


@functools.cache
def computed(case, compute):
    """((loss, logits), (gradients of the parameters one by one, of the rows))."""
    run = jax.jit(jax.value_and_grad(objective(case, compute), argnums=(0, 1), has_aux=True))
    found, (grads, of_rows) = run(parameters(case, compute), inputs(case)[1])
    return jax.tree.map(np.asarray, (found, (stack.unstacked(grads), of_rows)))


def check(case, compute):
    got, want = computed(case, compute), computed(case, stack.PLAIN)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5 * max(1, np.abs(w).max()))


def counted(case, compute, gradient=False):
    value = objective(case, compute)
    if gradient:
        value = jax.grad(value, argnums=(0, 1), has_aux=True)
    return flops.count(value, parameters(case, compute), inputs(case)[1])


def test_every_architecture_is_here():
    refused = {"dlrm", "dlrm_mlp"}
    assert SCANNED.keys() | refused == models.MODELS.keys()


@pytest.mark.parametrize("case", CASES)
def test_alike_layers_are_one_module(case):
    """And parameters, where they start and the forward FLOPs stay those of layers one by one."""
    runs = CASES[case][2]
    batch, config = inputs(case)[4], config_of(case)
    train = step.TrainConfig(tables=suite.TABLES)
    init = functools.partial(step.init, config, batch.schema, train, batch)
    params = jax.eval_shape(lambda: init(compute=SCAN)).params
    assert {key for key in params if "_stack_" in key} == runs
    plain = jax.eval_shape(init).params
    assert jax.eval_shape(stack.unstacked, params) == plain
    one, scanned = counted(case, stack.PLAIN), counted(case, SCAN)
    assert scanned == one
    assert counted(case, stack.Compute(scan=True, remat="full")) == one


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_scanned_layers_compute_what_layers_one_by_one_do(case):
    check(case, SCAN)


@pytest.mark.slow
@pytest.mark.parametrize("remat", list(stack.SAVED))
@pytest.mark.parametrize("case", SCANNED)
def test_what_is_computed_again_is_the_same(case, remat):
    check(case, stack.Compute(scan=True, remat=remat))


@pytest.mark.slow
@pytest.mark.parametrize("case", SCANNED)
def test_layers_one_by_one_are_computed_again_too(case):
    check(case, stack.Compute(remat="full"))


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", SCANNED)
def test_the_less_is_saved_the_more_is_computed(case, scan):
    """Matrix products of the gradient; at most those of one more forward pass."""
    found = [
        counted(case, stack.Compute(scan=scan, remat=remat), gradient=True).matmul
        for remat in ("none", "all_dots", "dots", "full")
    ]
    assert found == sorted(found) and found[0] < found[-1]
    assert found[-1] <= found[0] + counted(case, stack.PLAIN).matmul


def test_scanned_layers_start_as_layers_one_by_one():
    config, batch = config_of("rankmixer"), inputs("rankmixer")[4]
    init = functools.partial(
        step.init, config, batch.schema, step.TrainConfig(tables=suite.TABLES), batch
    )
    got, want = init(compute=SCAN), init()
    state = stack.unstacked((got.params, got.optimizer))
    jax.tree.map(np.testing.assert_array_equal, state, (want.params, want.optimizer))
    jax.tree.map(np.testing.assert_array_equal, got.tables, want.tables)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("dlrm", "it has no stack of alike layers"),
        ("dlrm_mlp", "it has no stack of alike layers"),
        ("onetrans", "its pyramid makes every block differ"),
    ],
)
def test_what_cannot_be_scanned_is_refused(name, found):
    config, batch = suite.config_of(name), suite.random_batch().without_impression()
    if name == "onetrans":
        config = dataclasses.replace(config, pyramid_round=1, layers=3)
    init = functools.partial(
        step.init, config, batch.schema, step.TrainConfig(tables=suite.TABLES), batch
    )
    with pytest.raises(ValueError, match=f"{name}: scan=True, but {found}; expected scan=False"):
        jax.eval_shape(lambda: init(compute=SCAN))
    jax.eval_shape(lambda: init(compute=stack.Compute(remat="full")))


def instructions(name, compute, **changes):
    """Of the whole training step, as StableHLO."""
    config = dataclasses.replace(suite.config_of(name), **changes)
    batch, train = suite.random_batch().without_impression(), step.TrainConfig(tables=suite.TABLES)
    state = jax.eval_shape(lambda: step.init(config, batch.schema, train, batch, compute=compute))
    run = step.program(config, batch.schema, train, compute=compute).step
    args = state, batch, step.rates_of(train, 1)(0), jax.random.key(0)
    return run.lower(*args).as_text().count(" = ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "few", "changes"),
    [
        ("hstu", 2, {}),
        ("rankmixer", 2, {}),
        ("mtgr", 2, {}),
        # Between a first and a last layer of their own kinds, a loop takes two more.
        ("longer", 4, {}),
        ("onetrans", 4, dict(pyramid=False)),
        ("tokenmixer_large", 6, dict(inter_residual=2, aux_layers=())),  # two turns of two blocks
    ],
)
def test_the_program_does_not_grow_with_the_layers(name, few, changes):
    """Measured, in instructions, at 2 -> 32 layers: HSTU 5779 -> 6130, one by one 31,189."""
    count = functools.partial(instructions, name, **changes)
    assert count(SCAN, layers=32) <= 1.2 * count(SCAN, layers=few)
    assert count(stack.PLAIN, layers=32) > 3.5 * count(stack.PLAIN, layers=few)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rankmixer", "hstu", "tokenmixer_large"])
def test_scanned_layers_train_on_eight_devices_as_one_by_one_on_one(case):
    config, batch = config_of(case), suite.random_batch(samples=8).without_impression()
    train = step.TrainConfig(
        tables=suite.TABLES, optimizer=optim.OptimConfig(learning_rate=0.01, eps=1e-3)
    )
    mesh = sharding.MeshConfig(data=4, model=2, strategy="fsdp_tensor")

    def trained(place, compute):
        how = dict(place=place, compute=compute)
        run = step.program(config, batch.schema, train, **how).step
        state, outs = step.init(config, batch.schema, train, batch, **how), []
        own = batch if place is None else jax.device_put(batch, place.rows)
        for i in range(2):
            state, out = run(state, own, step.rates_of(train, 2)(i), jax.random.key(0))
            outs.append((out["loss"], out["logits"], out["grad_norm"]["dense"]))
        return state, outs

    state, outs = trained(sharding.placement(mesh), stack.Compute(scan=True, remat="dots"))
    want, wanted = trained(None, stack.PLAIN)
    split = [x for key in CASES[case][2] for x in jax.tree.leaves(state.params[key])]
    assert any(not x.sharding.is_fully_replicated for x in split)
    for g, w in zip(jax.tree.leaves(outs), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5)
    params = stack.unstacked(jax.tree.map(np.asarray, state.params))
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=2e-4),
        params,
        jax.tree.map(np.asarray, want.params),
    )
