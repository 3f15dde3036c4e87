"""Many small minimisations at once: BFGS with a weak Wolfe line search, vectorised over problems.

A fit wants hundreds of descents (starts, resamples, left-out points) in three to five parameters.
One by one through scipy's L-BFGS-B they spend their time in Python and in LAPACK calls on tiny
matrices, for which OpenBLAS wakes its threads (measured: 2 s alone, 15 to 60 s on a busy machine).
With so few parameters L-BFGS that remembers as many steps is BFGS, so the inverse Hessian is kept
whole. The bisecting line search is the one of Lewis and Overton (2013, "Nonsmooth optimization via
quasi-Newton methods", algorithm 2.6), which also copes with the near-kinks of a small Huber delta.
"""

from collections.abc import Callable

import numpy as np

ARMIJO, WOLFE = 1e-4, 0.9
TRIALS = 40  # of one line search
PATIENCE = 3  # steps without gain in a row end a descent

Objective = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def minimise(
    function: Objective, start, *, steps: int = 500, gain: float = 1e-12
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises m functions of p parameters, each from its own start.

    Args:
      function: (theta [k, p], which [k] int) -> (values [k], gradients [k, p]) of the functions
        named by `which`, entries of range(m).
      start: [m, p], float64.
      steps: the most BFGS steps of one descent.
      gain: relative decrease below which a step counts as none; three such in a row end a descent.
    Returns: (theta [m, p], values [m]), the best point seen of each; never above the start's value.
    """
    theta = np.array(start, np.float64)
    count, p = theta.shape
    value, gradient = function(theta, np.arange(count))
    inverse = np.repeat(np.eye(p)[None], count, axis=0)
    fresh = np.ones(count, bool)  # the inverse Hessian is still the unit matrix
    idle = np.zeros(count, int)
    active = np.arange(count)
    for _ in range(steps):
        if not len(active):
            break
        direction = -np.einsum("kij,kj->ki", inverse[active], gradient[active])
        slope = (direction * gradient[active]).sum(1)
        lost = ~(slope < 0)  # no descent direction (or nan): start again from the gradient
        inverse[active[lost]], fresh[active[lost]] = np.eye(p), True
        direction[lost] = -gradient[active[lost]]
        slope = (direction * gradient[active]).sum(1)
        norm = np.sqrt((direction**2).sum(1))
        first = np.where(fresh[active], 0.1 / np.maximum(norm, 1e-300), 1.0)
        here = (theta[active], value[active], gradient[active])
        length, new_value, new_gradient = _line_search(
            function, active, here, direction, slope, first
        )
        step = length[:, None] * direction
        change = new_gradient - gradient[active]
        _update(inverse, fresh, active, step, change)
        gained = value[active] - new_value
        small = gained <= gain * np.abs(value[active])
        # A failed search from a stale Hessian deserves one more from the gradient.
        stuck = length == 0
        inverse[active[stuck]], fresh[active[stuck]] = np.eye(p), True
        idle[active] = np.where(small, idle[active] + 1, 0)
        theta[active] += step
        value[active], gradient[active] = new_value, new_gradient
        active = active[(idle[active] < PATIENCE) & (norm > 0)]
    return theta, value


def _line_search(function, which, here, direction, slope, length):
    """Weak Wolfe by doubling and bisection; length 0 where even tiny steps do not descend.

    here: (theta, values, gradients) at length 0. Returns (lengths, values, gradients).
    """
    theta, value, gradient = here
    low, high = np.zeros(len(which)), np.full(len(which), np.inf)
    best = (np.zeros(len(which)), value.copy(), gradient.copy())
    open_ = np.arange(len(which))
    for _ in range(TRIALS):
        t = length[open_]
        new_value, new_gradient = function(
            theta[open_] + t[:, None] * direction[open_], which[open_]
        )
        armijo = new_value <= value[open_] + ARMIJO * t * slope[open_]
        wolfe = (new_gradient * direction[open_]).sum(1) >= WOLFE * slope[open_]
        kept = open_[armijo]  # the longest step so far that descends enough
        best[0][kept], best[1][kept] = t[armijo], new_value[armijo]
        best[2][kept] = new_gradient[armijo]
        high[open_[~armijo]] = t[~armijo]
        low[kept] = t[armijo]
        open_ = open_[~(armijo & wolfe)]
        if not len(open_):
            break
        bounded = np.isfinite(high[open_])
        middle = (low[open_] + np.where(bounded, high[open_], 0)) / 2
        length[open_] = np.where(bounded, middle, 2 * low[open_])
    return best


def _update(inverse, fresh, active, step, change) -> None:
    """The BFGS update of the inverse Hessians, in place, where the curvature is positive."""
    curvature = (step * change).sum(1)
    good = curvature > 1e-14 * np.sqrt((step**2).sum(1) * (change**2).sum(1))
    rows, step, change, curvature = active[good], step[good], change[good], curvature[good]
    scale = curvature / np.maximum((change**2).sum(1), 1e-300)
    new = fresh[rows]
    inverse[rows[new]] *= scale[new, None, None]
    fresh[rows] = False
    old = inverse[rows]
    pushed = np.einsum("kij,kj->ki", old, change)
    weight = 1 / curvature + (change * pushed).sum(1) / curvature**2
    cross = step[:, :, None] * pushed[:, None, :] / curvature[:, None, None]
    outer = step[:, :, None] * step[:, None, :]
    inverse[rows] = old + weight[:, None, None] * outer - cross - cross.swapaxes(1, 2)
