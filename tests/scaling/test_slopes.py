"""Slopes, lines and comparisons: planted ones come back inside their intervals, ties are ties."""

import numpy as np
import polars
import pytest

from rankjax.scaling import slopes
from tests.references import study_results


def finals(**options):
    rows = study_results.table(**options).filter(polars.col("stage") == "final")
    return rows.with_columns(polars.col("budget").cast(polars.Float64))


def test_log_linear_recovers_the_line_and_its_t_interval():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        x = np.geomspace(1e8, 1e11, 6)
        found = slopes.log_linear(x, 0.6 + 0.02 * np.log10(x) + 0.003 * rng.normal(size=6))
        low, high = found.intervals["b"]
        hits += low <= 0.02 <= high
    assert 0.90 <= hits / 200 <= 0.99  # a 95% interval
    assert found.ok
    assert found.freedom == 4
    below, above = found.band([1e8, 3e9, 1e11])
    assert (below < found.predict([1e8, 3e9, 1e11])).all()
    assert above[1] - below[1] < above[0] - below[0]


def test_log_linear_equals_numpy():
    x = np.array([1e8, 1e9, 1e9, 1e10, 1e11])
    y = np.array([0.7, 0.72, 0.71, 0.745, 0.75])
    found = slopes.log_linear(x, y)
    b, a = np.polyfit(np.log10(x), y, 1)
    np.testing.assert_allclose((found.a, found.b), (a, b))
    np.testing.assert_allclose(found.residuals, y - a - b * np.log10(x))


def test_a_bent_ladder_counts_sizes_not_seeds():
    x = np.repeat(np.geomspace(1e8, 1e11, 4), 5)
    noise = 1e-5 * np.random.default_rng(0).normal(size=20)
    bent = slopes.log_linear(x, (np.log10(x) - 9) ** 2 + noise)
    straight = slopes.log_linear(x, np.log10(x) + noise)
    assert "bend away" in bent.warnings[0]
    assert bent.freedom == 2
    assert not straight.warnings
    assert straight.freedom == 18


@pytest.mark.parametrize("x", [[1e9], [1e9, 1e9], [1e9, 1e10], [1e9, 2e9, 3e9]])
def test_a_line_without_support_says_so(x):
    found = slopes.log_linear(x, np.linspace(0.7, 0.8, len(x)))
    assert not found.ok
    assert "distinct sizes" in found.reasons[-1] or "factor" in found.reasons[0]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="shape"):
        slopes.log_linear([1, 2], [1])
    with pytest.raises(ValueError, match="finite"):
        slopes.log_linear([1, 2], [1, np.nan])


@pytest.mark.parametrize("axis", ["T", "L", "D"])
def test_axis_slope_recovers_the_planted_gain(axis):
    rows = finals(architectures=("rankmixer",), budgets=(250_000,))
    own = slopes.axis_rows(rows, "rankmixer", axis)
    found = slopes.axis_slope(own, "ne", axis)
    truth = -study_results.LAWS["rankmixer"][1][axis]
    assert found.low <= truth <= found.high
    assert found.high - found.low < 0.004
    assert found.better == 1
    assert slopes.axis_slope(own, "auc", axis).better == 1


def test_seeds_are_paired():
    # A level of its own for every seed, far larger than the gain, must not widen the interval.
    rows = finals(architectures=("rankmixer",), budgets=(250_000,), noise=1e-5, axes=("D",))
    shifted = rows.with_columns(polars.col("test_ne") + 0.05 * polars.col("seed"))
    one, other = (slopes.axis_slope(r, "ne", "D") for r in (rows, shifted))
    np.testing.assert_allclose(one.per_doubling, other.per_doubling, atol=1e-9)
    np.testing.assert_allclose((one.low, one.high), (other.low, other.high), atol=1e-9)


def test_the_data_axis_compares_budgets_of_one_size_only():
    rows = finals(architectures=("rankmixer",), noise=1e-4, axes=("D",))
    found = slopes.axis_slope(rows, "ne", "data")
    assert found.low <= -study_results.DATA <= found.high
    assert found.levels == 2
    assert found.per_doubling == pytest.approx(-study_results.DATA, abs=2e-4)


def test_one_seed_and_two_sizes_have_no_interval():
    rows = finals(architectures=("rankmixer",), seeds=(0,), budgets=(250_000,), axes=("D",))
    found = slopes.axis_slope(rows.head(2), "ne", "D")
    assert np.isfinite(found.per_doubling)
    assert (found.low, found.high, found.better) == (None, None, 0)
    assert "no interval" in found.method
    alone = slopes.axis_slope(rows.head(1), "ne", "D")
    assert np.isnan(alone.per_doubling)
    assert "no difference" in alone.method


def test_less_than_one_doubling_decides_nothing():
    rows = finals(noise=1e-5)
    rows = rows.filter(polars.col("architecture") == "rankmixer", polars.col("axis") == "D")
    rows = rows.filter(polars.col("budget") == 1_000_000)
    whole = slopes.axis_slope(rows)
    assert whole.better == 1 and whole.doublings == pytest.approx(3 * 1.7)
    flops = polars.col("training_flops")
    narrow = slopes.axis_slope(rows.with_columns((flops.log() * 0.15).exp()))
    assert narrow.better == 0 and narrow.high < 0  # the interval excludes 0, the span is too short
    assert "span 0.7" in narrow.warnings[-1]


def test_undefined_metrics_are_left_out():
    rows = finals(architectures=("rankmixer",), budgets=(250_000,), axes=("D",))
    broken = rows.with_columns(
        polars.when(polars.col("seed") == 1).then(float("nan")).otherwise(polars.col("test_ne"))
        .alias("test_ne")
    )  # fmt: skip
    assert slopes.axis_slope(broken, "ne", "D").points == 8


def test_axis_slope_refuses_two_architectures():
    with pytest.raises(ValueError, match="expected one architecture"):
        slopes.axis_slope(finals(seeds=(0,)), "ne", "D")


def test_the_base_of_another_ladder_belongs_to_the_axis():
    rows = finals(architectures=("rankmixer",), seeds=(0,), budgets=(250_000,))
    at_base = (polars.col("axis") == "L") & (polars.col("axis_value") == study_results.BASE["L"])
    own = slopes.axis_rows(rows.filter(~at_base), "rankmixer", "L")
    assert sorted(own["layers"].to_list()) == [1, 2, 4, 8]
    assert own["tokens"].unique().to_list() == [study_results.BASE["T"]]
    assert slopes.axis_rows(rows, "rankmixer", "L").height == 4  # and never twice


def slope(axis, value, low, high, metric="ne"):
    return slopes.Slope(
        architecture="a", axis=axis, metric=metric, per_doubling=value, low=low, high=high,
        levels=4, seeds=3, points=12, method="", better=0,
    )  # fmt: skip


def test_rank_axes_orders_and_states_overlap():
    ranked = slopes.rank_axes(
        [slope("L", -1, -1.5, -0.5), slope("D", -4, -4.5, -3.5), slope("T", -1.2, -2, -0.4)]
    )
    assert [r["slope"].axis for r in ranked] == ["D", "T", "L"]
    assert [r["rank"] for r in ranked] == [1, 2, 2]
    assert [r["overlap"] for r in ranked] == [[], ["L"], ["T"]]
    up = slopes.rank_axes([slope("L", 1, 0.9, 1.1, "auc"), slope("D", 4, 3, 5, "auc")])
    assert [r["slope"].axis for r in up] == ["D", "L"]
    unknown = slopes.rank_axes([slope("L", -1, None, None), slope("D", -4, -4.5, -3.5)])
    assert [r["rank"] for r in unknown] == [1, 1]
    assert slopes.rank_axes([]) == []


def cells(flops, validation, test, seeds=2):
    return polars.DataFrame(
        {"training_flops": flops, "validation_ne": validation, "test_ne": test}
    ).with_columns(polars.lit(seeds).alias("test_ne_n"))


def test_compare_best_takes_the_best_of_validation_in_the_shared_range():
    a = cells([1e9, 2e9, 9e9], [0.82, 0.80, 0.70], [0.81, 0.803, 0.70])  # 9e9 lies outside
    b = cells([1e9, 3e9], [0.83, 0.84], [0.825, 0.79])  # 0.79 is luck: worse on validation
    half = 0.002 * np.sqrt(1 / 2 + 1 / 2) * 2.2281  # t of 10 degrees of freedom
    found = slopes.compare_best(a, b, (0.002, 10))
    assert found.winner == "a" and found.at.tolist() == [3e9]
    np.testing.assert_allclose(found.difference, [0.803 - 0.825])
    np.testing.assert_allclose(found.high - found.difference, [half], rtol=1e-4)
    assert slopes.compare_best(b, a, (0.002, 10)).winner == "b"
    noisy = slopes.compare_best(a, b, (0.02, 10))
    assert noisy.winner is None and noisy.low < 0 < noisy.high


def test_compare_best_without_seeds_or_a_shared_range_decides_nothing():
    a, b = cells([1e9, 2e9], [0.8, 0.8], [0.8, 0.8]), cells([5e9], [0.7], [0.7])
    assert "covered by both" in slopes.compare_best(a, b, (0.002, 10)).reason
    assert "one seed" in slopes.compare_best(a, a, (float("nan"), 0)).reason


def line(level, b, x, noise, rng):
    y = level + b * np.log10(x) + noise * np.random.default_rng(rng).normal(size=len(x))
    return slopes.log_linear(x, y)


def test_compare_decides_only_inside_the_shared_range():
    a = line(1.0, -0.02, np.geomspace(1e8, 1e10, 6), 1e-4, 0)
    b = line(1.01, -0.02, np.geomspace(1e9, 1e12, 6), 1e-4, 1)
    found = slopes.compare(a, b)
    np.testing.assert_allclose((found.at[0], found.at[-1]), (1e9, 1e10))
    assert found.winner == "a"
    assert ((found.low <= found.difference) & (found.difference <= found.high)).all()
    assert slopes.compare(b, a).winner == "b"
    assert slopes.compare(a, b, metric="auc").winner == "b"
    tie = slopes.compare(a, line(1.0, -0.02, np.geomspace(1e8, 1e10, 6), 1e-4, 2))
    assert tie.winner is None
    assert "includes 0" in tie.reason
    apart = slopes.compare(a, line(1.0, -0.02, np.geomspace(1e11, 1e12, 6), 1e-4, 2))
    assert apart.winner is None
    assert "no range" in apart.reason
    cut = slopes.compare(a, b, (2e9, 1e15))
    np.testing.assert_allclose((cut.at[0], cut.at[-1]), (2e9, 1e10))
