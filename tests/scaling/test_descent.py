"""Batched BFGS: the minima of known functions, each from its own start."""

import numpy as np
from scipy import optimize

from rankjax.scaling import descent


def rosenbrock(theta, which):
    return (
        np.array([optimize.rosen(t) for t in theta]),
        np.array([optimize.rosen_der(t) for t in theta]),
    )


def test_finds_the_minimum_of_rosenbrock_from_every_start():
    start = np.random.default_rng(0).normal(size=(7, 3)) * 2
    theta, value = descent.minimise(rosenbrock, start)
    other = np.array([-0.99, 1.0, 1.0])  # rosenbrock's second, local minimum is near here
    near = np.abs(theta - 1).max(1) < 1e-5
    assert near.sum() >= 5
    assert (near | (np.abs(theta - other).max(1) < 0.1)).all()
    np.testing.assert_allclose(value, [optimize.rosen(t) for t in theta])


def test_every_problem_keeps_its_own_function():
    centre = np.array([[1.0, 2.0], [-3.0, 4.0], [0.0, 0.0]])

    def bowl(theta, which):
        off = theta - centre[which]
        return (off**2).sum(1) * (which + 1), 2 * off * (which + 1)[:, None]

    theta, value = descent.minimise(bowl, np.full((3, 2), 5.0))
    np.testing.assert_allclose(theta, centre, atol=1e-6)
    np.testing.assert_allclose(value, 0, atol=1e-10)


def test_a_kink_stops_it_only_at_the_minimum():
    def absolute(theta, which):
        return np.abs(theta - 0.3).sum(1), np.sign(theta - 0.3)

    theta, _ = descent.minimise(absolute, np.array([[5.0, -2.0], [0.2, 9.0]]))
    np.testing.assert_allclose(theta, 0.3, atol=1e-4)


def test_never_ends_above_its_start():
    start = np.array([[1.0, 1.0], [3.0, -3.0]])
    theta, value = descent.minimise(rosenbrock, start, steps=1)
    assert (value <= rosenbrock(start, None)[0]).all()
    np.testing.assert_array_equal(theta[0], start[0])  # already at the minimum
