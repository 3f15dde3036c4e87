"""What the tests of feature-interaction models share: parameters, scores, gradients."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from rankjax.batch import Batch, Features
from tests import builders

STEP = 1e-5  # of central differences
Reference = Callable[[dict, dict], np.ndarray]  # (sample, float64 parameters) -> logits [K]


@functools.cache
def shapes(model: nn.Module) -> dict:
    """The parameters as shapes; nothing is compiled."""
    features = builders.features(builders.batch(np.random.default_rng(0)))
    init = functools.partial(model.init, train=True)
    return jax.eval_shape(init, jax.random.key(0), features)["params"]


def drawn(module: nn.Module, rng: np.random.Generator, *args: jax.Array) -> dict:
    """Random parameters, none at its initial 0 or 1; matrices by their fan-in.

    Of a model, or of a layer called with `args`.
    """

    def draw(path: tuple, x: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.normal(size=x.shape)
        if path[-1].key == "scale":
            values = 1 + 0.2 * values
        elif x.ndim > 1:
            values = values / np.sqrt(x.shape[-2])
        else:
            values = 0.3 * values
        return values.astype(np.float32)

    if args:
        made = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    else:
        made = shapes(module)
    return jax.tree_util.tree_map_with_path(draw, made)


def initial(module: nn.Module, *args: jax.Array) -> dict:
    """A layer's parameters as it initialises them."""
    return jax.jit(module.init)(jax.random.key(0), *args)["params"]


@functools.cache
def scorer(model: nn.Module) -> Callable[[dict, Features], jax.Array]:
    return jax.jit(lambda p, features: model.apply({"params": p}, features, train=False)[0])


def score(model: nn.Module, params: dict, features: Features) -> np.ndarray:
    return np.asarray(scorer(model)(params, features))


def assert_is(
    reference: Reference, model: nn.Module, params: dict, batch: Batch, atol: float = 1e-5
) -> None:
    """Every valid candidate's logits are those of the reference."""
    got, wide = score(model, params, builders.features(batch)), builders.float64(params)
    for row, candidate in np.argwhere(batch.candidate_mask):
        want = reference(builders.one(batch, row, candidate), wide)
        np.testing.assert_allclose(got[row, candidate], want, rtol=1e-5, atol=atol)


def check_gradients(reference: Reference, model: nn.Module, rng: np.random.Generator) -> None:
    """The gradient against central differences of the reference.

    Along one random direction of length 1 for every parameter and every input array, padding
    included, which must not matter; every array itself must.
    """
    params = drawn(model, rng)
    batch = builders.batch(rng, lengths=(3, 0), candidates=(2, 1), S=4, C=2)
    features = builders.features(batch)
    weights = rng.normal(size=(*batch.candidate_mask.shape, model.config.tasks)).astype("f4")
    weights *= batch.candidate_mask[..., None]
    sides = {side: getattr(batch, side) for side in ("user", "history", "candidate")}

    def loss(at: Any) -> jax.Array:
        own = dataclasses.replace(features, **at["inputs"])
        return (weights * model.apply({"params": at["params"]}, own, train=True)[0]).sum()

    def wide(at: Any) -> float:
        own, total = dataclasses.replace(batch, **at["inputs"]), 0.0
        for row, candidate in np.argwhere(batch.candidate_mask):
            logits = reference(builders.one(own, row, candidate), at["params"])
            total += float(weights[row, candidate].astype(np.float64) @ logits)
        return total

    at = {"params": params, "inputs": sides}
    got = jax.tree.leaves(jax.jit(jax.grad(loss))(at))
    flat, structure = jax.tree_util.tree_flatten_with_path(builders.float64(at))
    for i, (path, x) in enumerate(flat):
        direction = rng.normal(size=x.shape)
        direction /= np.linalg.norm(direction)
        ends = []
        for step in (STEP, -STEP):
            moved = [y for _, y in flat]
            moved[i] = x + step * direction
            ends.append(wide(jax.tree.unflatten(structure, moved)))
        want = (ends[0] - ends[1]) / (2 * STEP)
        found = float(np.vdot(np.asarray(got[i], np.float64), direction))
        name = jax.tree_util.keystr(path)
        assert abs(want) > 1e-7, f"{name} does not matter"
        assert abs(found - want) <= 1e-5 * max(1, abs(want)), f"{name}: {found}, want {want}"


def close(a: np.ndarray, b: np.ndarray, mask: np.ndarray, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(a[mask], b[mask], rtol=1e-5, atol=atol)


def bfloat16_is_near(model: nn.Module, params: dict, features: Features) -> None:
    """Of the same parameters; logits stay float32."""
    config = dataclasses.replace(model.config, dtype="bfloat16")
    want, got = score(model, params, features), score(type(model)(config), params, features)
    assert got.dtype == np.float32 and np.isfinite(got).all()
    assert 0 < np.abs(got - want).max() < 0.05 * max(1, np.abs(want).max())
