"""A model's gradient against central differences of its float64 reference, leaf by leaf."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def check(
    loss: Callable[[Any], float],
    at: Any,
    gradient: Any,
    rng: np.random.Generator,
    *,
    step: float = 1e-5,
    tolerance: float = 1e-5,
    zero: Callable[[str], bool] = lambda name: False,
) -> None:
    """Asserts that the slope of `loss` along a random direction of each leaf is the gradient's.

    Args:
      loss: of a pytree of float64 arrays like `at`, NumPy.
      gradient: a pytree like `at`, of float32 arrays.
      tolerance: relative to |gradient| |direction|, of the leaf.
      zero: name of a leaf -> whether its gradient has to be 0; no other's may be.
    """
    at = jax.tree.map(lambda x: np.asarray(x, np.float64), at)
    leaves, structure = jax.tree_util.tree_flatten_with_path(at)
    values = [x for _, x in leaves]
    for i, ((path, x), slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        name, slope = jax.tree_util.keystr(path), np.asarray(slope, np.float64)
        direction = rng.normal(size=x.shape)

        def along(t: float, i: int = i, x: np.ndarray = x, d: np.ndarray = direction) -> float:
            return loss(jax.tree.unflatten(structure, [*values[:i], x + t * d, *values[i + 1 :]]))

        want = (along(step) - along(-step)) / (2 * step)
        got = float((slope * direction).sum())
        scale = np.linalg.norm(slope) * np.linalg.norm(direction)
        assert (scale == 0) == zero(name), f"{name}: gradient of norm {np.linalg.norm(slope)}"
        assert abs(got - want) <= tolerance * scale + 1e-8, f"{name}: {got}, expected {want}"
