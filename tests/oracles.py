"""Drawn parameters, and gradients against central differences of a float64 reference."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from rankjax.layers import initializers

STEP = 1e-5

# For programs that run once or twice on a few numbers: compiled in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def drawn(init: Callable[..., Any], *args: Any, seed: int = 0) -> dict:
    """Parameters of init(key, *args), float32: normal of scale .3, scales of norms around 1.

    Nothing is compiled, and no parameter is at its initial 0 or 1.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0), *args).get("params", {})

    def draw(path: tuple, x: jax.ShapeDtypeStruct) -> np.ndarray:
        around = 1 if path[-1].key == "scale" else 0
        return (around + 0.3 * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def asked(monkeypatch: Any, init: Callable[..., Any], *args: Any) -> dict:
    """What each kernel asked `initializers.kernel` for: {path: (residual_layers, batch_axis)}."""

    def asking(_: str, *, residual_layers: int = 0, batch_axis: tuple[int, ...] = ()) -> Any:
        return nn.initializers.constant(2 * residual_layers + len(batch_axis))

    monkeypatch.setattr(initializers, "kernel", asking)
    params = jit(init)(jax.random.key(0, impl="rbg"), *args)["params"]
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    numbers = {"/".join(key.key for key in path): int(np.ravel(x)[0]) for path, x in flat}
    names = ("kernel", "left", "right")
    return {k: (n // 2, (0,) * (n % 2)) for k, n in numbers.items() if k.endswith(names)}


def gradients(
    loss: Callable[[Any], jax.Array],
    reference: Callable[[Any], float],
    at: Any,
    rng: np.random.Generator,
    *,
    tolerance: float = 1e-5,
    silent: tuple[str, ...] = (),
) -> None:
    """For every leaf of the pytree `at`: the derivative along a random direction of length 1.

    loss: at (float32) -> scalar, jittable. reference: at (float64 NumPy) -> the same number.
    tolerance: of the difference, relative where the derivative is larger than 1. silent: parts of
    the paths of leaves whose derivative must be 0; all others must not be.
    """
    got = jit(jax.grad(loss))(at)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), at)
    flat, structure = jax.tree_util.tree_flatten_with_path(wide)
    leaves = [x for _, x in flat]
    for i, ((path, x), g) in enumerate(zip(flat, jax.tree.leaves(got), strict=True)):
        name = jax.tree_util.keystr(path)
        direction = rng.normal(size=x.shape)
        direction /= np.linalg.norm(direction)

        def shifted(by: float, i: int = i, direction: np.ndarray = direction) -> float:
            moved = [*leaves[:i], leaves[i] + by * direction, *leaves[i + 1 :]]
            return reference(jax.tree.unflatten(structure, moved))

        want = (shifted(STEP) - shifted(-STEP)) / (2 * STEP)
        found = float(np.vdot(np.asarray(g, np.float64), direction))
        assert abs(found - want) <= tolerance * max(1, abs(want)), f"{name}: {found}, want {want}"
        if any(part in name for part in silent):
            assert abs(want) < 1e-9, f"{name} matters: {want}"
        else:
            assert abs(want) > 1e-7, f"{name} does not matter"
