"""Power laws: planted ones come back, the published golden case too, the rest is refused."""

import os
import pathlib

import numpy as np
import pytest

from rankjax.scaling import fit

DATA = pathlib.Path(
    os.environ.get("RANKJAX_DATA", pathlib.Path(__file__).parents[3] / "shared/data")
)
POINTS = DATA / "chinchilla" / "points.csv"


def planted(sizes=8, seeds=3, noise=0.0005, *, E=0.7, A=40.0, alpha=0.3, low=1e8, high=1e11, rng=0):
    """Points of E + A x^-alpha with noise on the log."""
    x = np.repeat(np.geomspace(low, high, sizes), seeds)
    loss = E + A * x**-alpha
    return x, loss * np.exp(np.random.default_rng(rng).normal(size=len(x)) * noise)


def test_recovers_a_planted_law_exactly_without_noise():
    x, loss = planted(noise=0)
    found = fit.power_law(x, loss, bootstrap=20)
    np.testing.assert_allclose((found.E, found.A, found.alpha), (0.7, 40, 0.3), rtol=1e-4)
    assert found.ok, found.reasons
    assert not found.warnings
    np.testing.assert_allclose(found.residuals, 0, atol=1e-6)
    np.testing.assert_allclose(found.predict([1e9]), 0.7 + 40 * 1e9**-0.3, rtol=1e-6)


def test_intervals_and_bands_cover_the_truth_under_noise():
    hits, inside = 0, 0
    for rng in range(5):
        x, loss = planted(noise=0.001, rng=rng)
        found = fit.power_law(x, loss, bootstrap=100, seed=rng)
        assert found.ok, found.reasons
        low, high = found.intervals["alpha"]
        hits += low <= 0.3 <= high
        below, above = found.band(np.array([3e8, 3e9, 3e10]))
        truth = 0.7 + 40 * np.array([3e8, 3e9, 3e10]) ** -0.3
        inside += (below <= truth).all() and (truth <= above).all()
        assert high - low < 0.2
    assert hits >= 4
    assert inside >= 3


def test_outliers_are_named_and_do_not_spoil_the_law():
    x, loss = planted()
    loss[[4, 17]] *= (1.3, 0.9)
    found = fit.power_law(x, loss, bootstrap=50)
    assert found.alpha == pytest.approx(0.3, abs=0.03)
    warned = " ".join(found.warnings)
    assert "outliers" in warned
    assert "row 4 " in warned
    assert "row 17 " in warned
    assert "row 5 " not in warned.split("outliers")[1].split("without")[0]


def test_a_point_that_carries_the_exponent_is_named():
    x, loss = planted(sizes=6, seeds=1, noise=0.0002)
    found = fit.power_law(x, loss, bootstrap=100)
    assert found.ok, found.reasons
    assert not found.warnings
    loss[0] *= 1.03
    moved = fit.power_law(x, loss, bootstrap=100)
    assert moved.ok, moved.reasons
    assert any("hangs on row 0" in w and "without it alpha goes" in w for w in moved.warnings)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (planted(sizes=3), "only 3 distinct sizes"),
        (planted(low=1e9, high=3e9, noise=0), "factor of 3"),
        ((np.geomspace(1e8, 1e11, 6), np.linspace(0.8, 0.9, 6)), "not below"),
        (planted(E=1e-9, alpha=0.1, noise=0), "floor E"),
        (planted(sizes=4, seeds=1, noise=0.01, A=4.0), "alpha"),
    ],
)
def test_refuses_what_the_data_cannot_support(points, reason):
    found = fit.power_law(*points, bootstrap=60)
    assert not found.ok
    assert any(reason in r for r in found.reasons), found.reasons


def test_refuses_a_rise_beyond_the_spread_over_seeds():
    x, loss = planted(noise=0.0003)
    loss[9:12] *= 1.05  # all seeds of one size
    found = fit.power_law(x, loss, bootstrap=20)
    assert any("rises from x = " in r and "spread over seeds" in r for r in found.reasons)
    noisy_x, noisy = planted(noise=0.02)
    assert not any("rises" in r for r in fit.power_law(noisy_x, noisy, bootstrap=0).reasons)


def test_refuses_a_straight_line_in_log_x():
    x = np.repeat(np.geomspace(1e9, 1e12, 5), 3)
    loss = 0.9 - 0.01 * np.log2(x / 1e9)
    loss = loss * (1 + 1e-3 * np.random.default_rng(0).normal(size=15))
    found = fit.power_law(x, loss, bootstrap=60)
    assert not found.ok
    assert any("alpha" in r or "floor" in r for r in found.reasons)


@pytest.mark.parametrize(
    ("x", "loss", "match"),
    [
        ([1, 2, 3], [1, 2], r"x has shape \(3,\), expected \[n\] = \(2,\)"),
        ([1, 2, -3], [1, 1, 1], "x: row 2 holds -3.0"),
        ([1, 2, 3], [1, np.nan, 1], "loss: row 1 holds nan"),
    ],
)
def test_refuses_bad_input(x, loss, match):
    with pytest.raises(ValueError, match=match):
        fit.power_law(x, loss)


@pytest.mark.parametrize("delta", [1e-2, 1e-3, 1e-6])
def test_a_tiny_delta_ends_at_the_same_law(delta):
    # A mean of Huber terms is about delta * |r|: an absolute stopping rule ends at the start.
    x, loss = planted(noise=1e-5)
    found = fit.power_law(x, loss, delta=delta, bootstrap=0)
    assert found.alpha == pytest.approx(0.3, rel=0.01)


def test_the_objective_is_a_sum_over_points():
    x, loss = planted(sizes=5, seeds=1)
    once = fit._Problem.of([x], loss, 1e-3)
    thrice = fit._Problem.of([np.tile(x, 3)], np.tile(loss, 3), 1e-3)
    theta = np.array([[np.log(0.6), np.log(0.1), -2.0]])
    value, gradient = once.objective(theta)
    np.testing.assert_allclose(thrice.objective(theta)[0], 3 * value)
    r = once.residuals(theta[0]) / 1e-3
    want = np.where(np.abs(r) <= 1, r**2 / 2, np.abs(r) - 0.5).sum()
    np.testing.assert_allclose(value, want)
    for i in range(3):
        step = 1e-6 * np.eye(3)[i]
        slope = (once.objective(theta + step)[0] - once.objective(theta - step)[0]) / 2e-6
        np.testing.assert_allclose(gradient[0, i], slope[0], rtol=1e-5)


def test_seeds_of_one_size_are_resampled_together():
    x, loss = planted(sizes=6, seeds=4, noise=0.003)
    jittered = x * np.random.default_rng(0).uniform(0.99, 1.01, len(x))
    sizes = np.repeat(np.arange(6), 4)
    grouped = fit.power_law(jittered, loss, seed_groups=sizes, bootstrap=100)
    single = fit.power_law(jittered, loss, bootstrap=100)
    width = lambda f: f.draws[:, 0].std()
    assert width(grouped) != width(single)
    again = fit.power_law(jittered, loss, seed_groups=sizes, bootstrap=100)
    np.testing.assert_array_equal(grouped.draws, again.draws)  # the same seed, the same draws


def test_joint_recovers_a_planted_law():
    params, samples = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e7, 5), [1e6, 8e6, 6e7]))
    loss = 0.6 + 8 * params**-0.4 + 30 * samples**-0.35
    found = fit.joint(params, samples, loss, bootstrap=20)
    got = (found.E, found.A, found.alpha, found.B, found.beta)
    np.testing.assert_allclose(got, (0.6, 8, 0.4, 30, 0.35), rtol=0.02)
    assert found.ok, found.reasons
    np.testing.assert_allclose(found.predict(params, samples), loss, rtol=1e-4)


def test_joint_refuses_two_budgets():
    params, samples = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e7, 5), [1e6, 8e6]))
    found = fit.joint(params, samples, 0.6 + params**-0.4 + samples**-0.3)
    assert not found.ok
    assert "only 2 distinct values of samples" in found.reasons[0]


@pytest.mark.skipif(not POINTS.is_file(), reason=f"{POINTS} is absent; set RANKJAX_DATA")
@pytest.mark.parametrize(("dropped", "beta"), [(5, 0.3667), (0, 0.453)])
def test_the_published_points_give_the_published_law(dropped, beta):
    table = np.genfromtxt(POINTS, delimiter=",", names=True)
    table = table[np.argsort(table["loss"])][: len(table) - dropped]
    samples = table["training_flops"] / (6 * table["params"])
    found = fit.joint(table["params"], samples, table["loss"], bootstrap=0)
    assert found.beta == pytest.approx(beta, abs=8e-4)
    if dropped:
        got = (found.E, found.A, found.B, found.alpha)
        assert got == (
            pytest.approx(1.8172, abs=2e-4),
            pytest.approx(480, abs=3),
            pytest.approx(2115, abs=35),
            pytest.approx(0.3475, abs=5e-4),
        )
        assert "beta goes from 0.367 to 0.36 (2%)" in found.warnings[0]
    else:
        (outliers,) = (w for w in found.warnings if w.startswith("outliers"))
        for row in (244, 243, 242, 241):  # sorted by loss: the highest
            assert f"row {row} " in outliers
        assert "beta goes from 0.453 to 0.37" in outliers


def test_frontier_is_the_lower_left_envelope():
    flops = [1, 2, 2, 4, 8, 8]
    np.testing.assert_array_equal(fit.frontier(flops, [9, 8, 7, 7.5, 6, 6.5]), [0, 2, 4])
    auc = [0.5, 0.6, 0.55, 0.58, 0.7, 0.6]
    np.testing.assert_array_equal(fit.frontier(flops, auc, lower_is_better=False), [0, 1, 4])


def test_interpolated_rates_lie_on_a_line_in_log_log():
    rates = fit.interpolate_rate((10, 1000), 1e-2, 1e-4, [10, 100, 1000, 1, 1e6])
    np.testing.assert_allclose(rates, [1e-2, 1e-3, 1e-4, 1e-2, 1e-4])
    assert fit.interpolate_rate((5, 5), 1e-2, 1e-4, 5) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="above 0"):
        fit.interpolate_rate((0, 10), 1e-2, 1e-3, 5)
