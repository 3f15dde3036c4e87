"""Stacks of toy layers against a loop by hand; tests/models/test_compute.py has the models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rankjax import sharding
from rankjax.layers import stack

ALL = [stack.Compute(scan=scan, remat=remat) for scan in (False, True) for remat in stack.REMAT]


class Layer(nn.Module):
    """tanh(x W + b), times 2 where `twice`."""

    twice: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_nd):
        y_nd = nn.tanh(nn.Dense(x_nd.shape[-1], name="dense")(x_nd)) * (1 + self.twice)
        return nn.Dropout(self.dropout, deterministic=not self.dropout)(y_nd)


class Model(nn.Module):
    """The layers of `twice`; returns (output, sum over features behind every layer [L, N])."""

    twice: tuple[bool, ...]
    compute: stack.Compute = stack.PLAIN
    dropout: float = 0.0
    begin: int = 0

    @nn.compact
    def __call__(self, x_nd):
        make = lambda name, twice: Layer(twice, self.dropout, name=name)

        def call(layer, twice, x_nd):
            x_nd = layer(x_nd)
            return x_nd, x_nd.sum(axis=-1)

        return stack.collect(self.compute, "layer", self.twice, make, call, x_nd, self.begin)


def parameters(layers, begin=0, width=3):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    layer = lambda: {"dense": {"kernel": draw(width, width), "bias": draw(width)}}
    return {f"layer_{i + begin}": layer() for i in range(layers)}


def by_hand(params, twice, x_nd):
    sums = []
    for layer, factor in zip(params.values(), twice, strict=True):
        dense = {k: v.astype(np.float64) for k, v in layer["dense"].items()}
        x_nd = np.tanh(x_nd @ dense["kernel"] + dense["bias"]) * (1 + factor)
        sums.append(x_nd.sum(axis=-1))
    return x_nd, np.stack(sums)


def names_of(model, x):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), x))["params"].keys()


A, B = False, True


@pytest.mark.parametrize("compute", ALL, ids=str)
@pytest.mark.parametrize(
    ("twice", "names"),
    [
        ((A, A, A, B), {"layer_stack_5_7", "layer_8"}),
        ((A, B, A, B, A), {"layer_stack_5_7_2", "layer_stack_6_8_2", "layer_9"}),
        ((A,), {"layer_5"}),
    ],
    ids=["one run", "a pattern", "one layer"],
)
def test_a_stack_is_its_layers_one_after_another(compute, twice, names):
    x_nd = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    model, params = Model(twice, compute, begin=5), parameters(len(twice), begin=5)
    found = names_of(model, x_nd)
    assert found == (names if compute.scan else params.keys())
    got = jax.jit(model.apply)({"params": stack.stacked(params, found)}, x_nd)
    for g, w in zip(got, by_hand(params, twice, x_nd), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5)


def test_no_layers_are_the_identity():
    x = np.ones((2, 3), np.float32)
    y, sums = Model((), stack.Compute(scan=True)).apply({"params": {}}, x)
    assert y is x and sums is None


@pytest.mark.parametrize(
    ("kinds", "want"),
    [
        ("", []),
        ("a", [(0, 1, 1)]),
        ("aaaa", [(0, 4, 1)]),
        ("aaab", [(0, 3, 1), (3, 1, 1)]),
        ("abbbc", [(0, 1, 1), (1, 3, 1), (4, 1, 1)]),
        ("abcd", [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1)]),
        ("aabaabaac", [(0, 2, 3), (6, 2, 1), (8, 1, 1)]),
        ("abababx", [(0, 3, 2), (6, 1, 1)]),
    ],
)
def test_runs_by_hand(kinds, want):
    assert stack.runs(kinds) == want


def test_stacked_and_unstacked_are_inverse():
    names = ["layer_stack_0_4_2", "layer_stack_1_3_2", "block_stack_1_2", "head"]
    params = parameters(5) | {"block_1": {"w": jnp.ones(2)}, "block_2": {"w": jnp.zeros(2)}}
    params["head"] = {"bias": jnp.ones(4)}
    found = stack.stacked(params, names)
    assert found.keys() == set(names)
    assert found["layer_stack_0_4_2"]["dense"]["kernel"].shape == (3, 3, 3)
    np.testing.assert_array_equal(found["block_stack_1_2"]["w"], [[1, 1], [0, 0]])
    second = found["layer_stack_1_3_2"]["dense"]["bias"][1]
    np.testing.assert_array_equal(second, params["layer_3"]["dense"]["bias"])
    jax.tree.map(np.testing.assert_array_equal, stack.unstacked(found), params)
    again = stack.stacked(stack.unstacked(found), found)
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_optimizer_state_is_stacked_as_its_parameters_are():
    params = parameters(3)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    scanned = stack.stacked(params, ["layer_stack_0_2"])
    one_by_one = jax.tree.map(lambda x: x + 1, chain.init(params))
    want = jax.tree.map(lambda x: x + 1, chain.init(scanned))
    got = stack.stacked(one_by_one, scanned)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    jax.tree.map(np.testing.assert_array_equal, stack.unstacked(got), one_by_one)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"remat='some', expected one of \('none', 'full', 'dots'"):
        stack.Compute(remat="some")
    with pytest.raises(ValueError, match=r"layer_stack_0_3 needs \['layer_3'\], found \['layer_0'"):
        stack.stacked(parameters(3), ["layer_stack_0_3"])
    stack.refuse_scan(stack.PLAIN, "dlrm", "it has no stack")
    with pytest.raises(ValueError, match="dlrm: scan=True, but it has no stack; expected scan=Fa"):
        stack.refuse_scan(stack.Compute(scan=True), "dlrm", "it has no stack")


def test_every_layer_draws_its_own_dropout():
    """Also where layers are computed again: the second time drops what the first did."""
    x = np.ones((1, 400), np.float32)
    params = {
        f"layer_{i}": {"dense": {"kernel": np.zeros((400, 400)), "bias": np.ones(400)}}
        for i in range(3)
    }
    rngs = {"dropout": jax.random.key(0)}
    for remat in stack.REMAT:
        model = Model((A,) * 3, stack.Compute(scan=True, remat=remat), dropout=0.5)
        scanned = stack.stacked(params, ["layer_stack_0_2"])
        _, sums = model.apply({"params": scanned}, x, rngs=rngs)
        kept = np.asarray(sums)[:, 0] / (2 * np.tanh(1))
        np.testing.assert_allclose(kept, 200, atol=50)
        assert len(set(kept.round(3))) == 3
        loss = lambda p, model=model: model.apply({"params": p}, x, rngs=rngs)[0].sum()
        value, grads = jax.value_and_grad(loss)(scanned)
        got = grads["layer_stack_0_2"]["dense"]["bias"][2].sum()
        # d tanh / db = 1 - tanh^2, of what is kept, which dropout multiplies by 2.
        np.testing.assert_allclose(got, value / np.tanh(1) * (1 - np.tanh(1) ** 2), rtol=1e-4)


def test_axes_of_scanned_parameters_are_named_as_the_layers_own():
    for name in ("layer_stack_0_30", "block_stack_1_7_3"):
        for path, ndim in (("ffn/ffn_in/kernel", 3), ("out/kernel", 2), ("norm/scale", 1)):
            one = f"{name.split('_')[0]}_0/{path}"
            want = (None, *sharding.names_of(one, ndim))
            assert sharding.names_of(f"{name}/{path}", ndim + 1) == want
    assert sharding.names_of("layer_stack_0_3/out/kernel", 3)[1] == "heads|embed"


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_recomputed_grows_as_less_is_saved(scan):
    x = np.ones((2, 3), np.float32)
    params = parameters(4)

    def products(remat):
        model = Model((A,) * 4, stack.Compute(scan=scan, remat=remat))
        own = stack.stacked(params, names_of(model, x))
        loss = lambda p: model.apply({"params": p}, x)[0].sum()
        text = str(jax.make_jaxpr(jax.grad(loss))(own))
        assert ("remat" in text or "checkpoint" in text) == (remat != "none")
        return text.count("dot_general") * (4 if scan else 1)

    # Forward, and twice in the backward pass; the first layer's input has no gradient in a loop
    # by hand, but a loop that is compiled once computes it too.
    none, full, dots, all_dots = map(products, stack.REMAT)
    assert none == dots == all_dots and full == none + 4
