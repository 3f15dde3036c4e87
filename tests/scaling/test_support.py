"""The sentences that refuse a fit, one by one, on the smallest inputs that set them off."""

import numpy as np

from rankjax.scaling import support


def test_a_narrow_range_is_named():
    assert not support.range_reasons({"x": np.array([1.0, 4.0])})
    (reason,) = support.range_reasons({"params": np.array([1.0, 3.9])})
    assert reason == "params covers a factor of 3.9 only; at least 4 is needed"


def test_a_rise_counts_against_the_seed_spread_only():
    x = np.repeat([1.0, 2.0, 4.0, 8.0], 3)
    groups = [np.arange(i, i + 3) for i in range(0, 12, 3)]
    wiggle = np.tile([-1.0, 0.0, 1.0], 4)
    means = np.repeat([1.0, 0.9, 0.93, 0.8], 3)
    quiet = support.trend_reasons(x, means + 0.001 * wiggle, groups, np.zeros(12))
    loud = support.trend_reasons(x, means + 0.05 * wiggle, groups, np.zeros(12))
    assert [r[:32] for r in quiet] == ["the loss rises from x = 2 to 4 b"]
    assert loud == ()


def test_a_loss_that_does_not_fall_is_refused():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    groups = [np.array([i]) for i in range(4)]
    reasons = support.trend_reasons(x, np.array([1.0, 0.9, 1.0, 1.0]), groups, np.full(4, 0.1))
    assert reasons[0] == "the loss at the largest x is not below the loss at the smallest"


def test_floor_and_exponents():
    loss = np.array([0.8, 0.9])
    assert support.floor_reasons(0.5, loss) == ()
    assert "floor E" in support.floor_reasons(1e-6, loss)[0]
    say = lambda value, span: " ".join(support.exponent_reasons({"alpha": value}, {"alpha": span}))
    assert say(0.3, (0.2, 0.4)) == ""
    assert "reaches 0" in say(0.3, (0.001, 0.4))
    assert "wider than" in say(0.3, (0.1, 0.9))
    assert "bound" in say(4.99, (4.0, 5.0))


class Line:
    """A stand-in for fit.py's problem: the mean of weighted points."""

    def __init__(self, y):
        self.log_loss = np.asarray(y, float)
        self.u, self.means = np.zeros((len(y), 1)), np.zeros(1)

    def residuals(self, theta):
        return theta[1] - self.log_loss

    def refit(self, best, weights):
        mean = (weights * self.log_loss).sum(1) / weights.sum(1)
        return np.stack([best[0] + 0 * mean, mean], 1)

    def unpack(self, theta):
        return theta


def test_outliers_are_named_and_their_effect_told():
    y = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01, 5.0]
    groups = [np.array([i]) for i in range(9)]
    problem = Line(y)
    best = np.array([0.0, 1.0])
    far, hangs = support.outlier_warnings(problem, best, groups, {"level": 1}, each=False), ()
    assert len(far) == 1
    assert far[0].startswith("outliers: row 8 ")
    best = np.array([0.0, np.mean(y)])
    hangs = support.outlier_warnings(problem, best, groups, {"level": 1})
    assert [w for w in hangs if "hangs on row 8 " in w and "(31%)" in w]
    assert not [w for w in hangs if "hangs on row 0 " in w]
