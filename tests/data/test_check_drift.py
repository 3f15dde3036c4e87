"""Label rates over time: what is drift, and what is chance, one user, or the week."""

import numpy as np
import pytest

from rankjax.data import check_drift
from rankjax.schema import Feature, Schema, Table, Task
from tests.data import worlds

DAYS, USERS = 40, 60


def columns(rate, *, users=USERS, seed=0, per_day=5):
    """A log of one label: each user has `per_day` impressions a day; rate: [DAYS, users]."""
    day = np.repeat(np.arange(DAYS), users * per_day)
    user = np.tile(np.repeat(np.arange(1, users + 1), per_day), DAYS).astype(np.int32)
    n = len(day)
    label = (
        np.random.default_rng(seed).random(n) < np.broadcast_to(rate, (DAYS, users))[day, user - 1]
    )
    found = Schema(
        tables=(Table(name="user", rows=users + 1), Table(name="item", rows=3)),
        features=(
            Feature(name="user", side="user", group="u", table="user"),
            Feature(name="item", side="item", group="i", table="item"),
        ),
        tasks=(Task(name="click"),),
        primary_task="click",
    )
    files = {
        "users": {"user": np.arange(users + 1, dtype=np.int32)},
        "items": {"item": np.arange(3, dtype=np.int32)},
        "events": {"user": np.ones(0, np.int32), "time": np.ones(0, np.int64)},
        "impressions": {
            "request": np.arange(n),
            "user": user,
            "time": day * 86_400,
            "item": np.ones(n, np.int32),
            "span": np.clip((day - DAYS + 6) // 2, 0, 2).astype(np.int8),
            "click": label.astype(np.int8),
        },
    }
    files["events"]["item"] = np.ones(0, np.int32)
    return found, files


def found(tmp_path, *args, **options):
    log = worlds.written(tmp_path, *columns(*args, **options))
    return check_drift.label_changes_over_time(log)


def test_a_constant_rate_is_silent(tmp_path):
    assert found(tmp_path, 0.2) == []


@pytest.mark.parametrize(("factor", "rings"), [(1.4, False), (2.3, True), (0.3, True)])
def test_a_run_of_days_rings_beyond_the_factor(tmp_path, factor, rings):
    rate = np.full((DAYS, 1), 0.2)
    rate[20:24] *= factor
    told = found(tmp_path, rate, per_day=24)
    assert bool(told) == rings
    if rings:
        (one,) = told
        assert one.where == 'impressions.arrow, column "click"' and one.severity == "warning"
        assert "1970-01-21 to 1970-01-24" in one.evidence and "5,760 rows" in one.evidence


def test_a_span_rings(tmp_path):
    rate = np.full((DAYS, 1), 0.2)
    rate[-2:] = 0.5
    (one,) = found(tmp_path, rate)
    assert "test 0." in one.evidence and "validation" not in one.evidence


def test_where_negatives_were_sampled_the_advice_is_about_the_sampling(tmp_path):
    rate = np.full((DAYS, 1), 0.2)
    rate[20:24] *= 2.3
    plain, drawn = columns(rate, per_day=24), columns(rate, per_day=24)
    (told,) = check_drift.label_changes_over_time(worlds.written(tmp_path / "a", *plain))
    log = worlds.written(tmp_path / "b", *drawn, negatives={"per_click": 4})
    (sampled,) = check_drift.label_changes_over_time(log)
    assert "logging" in told.advice and "sampled" in sampled.advice
    assert told.evidence == sampled.evidence


def test_users_who_differ_are_no_drift(tmp_path):
    """Half of the users click on most, half on little; on one day only the keen ones come."""
    own = np.where(np.arange(40) < 20, 0.02, 0.6)
    found_, files = columns(own[None], users=40, per_day=50)
    shown = files["impressions"]
    odd = shown["time"] == 30 * 86_400
    keep = ~odd | (own[shown["user"] - 1] > 0.5)
    files["impressions"] = worlds.rows(shown, np.flatnonzero(keep))
    clicks, rate = shown["click"][odd & keep], shown["click"].mean()
    naive = (clicks.mean() - rate) / np.sqrt(rate * (1 - rate) / len(clicks))
    assert naive > 2 * check_drift.Z and clicks.mean() > check_drift.FACTOR * rate
    assert check_drift.label_changes_over_time(worlds.written(tmp_path, found_, files)) == []


def test_a_span_of_weekend_days_is_compared_with_weekends(tmp_path):
    rate = np.full((DAYS, 1), 0.2)
    rate[3::7] = rate[4::7] = 0.5  # the weekdays of the test span
    log = worlds.written(tmp_path, *columns(rate))
    click, span = log.column("impressions", "click"), log.column("impressions", "span")
    assert click[span == 2].mean() > check_drift.FACTOR * click[span == 0].mean()
    assert check_drift.label_changes_over_time(log) == []


def test_the_week_is_no_drift_and_one_odd_day_of_it_is(tmp_path):
    rate = np.full((DAYS, 1), 0.2)
    rate[2::7] = 0.45  # Saturdays
    assert found(tmp_path, rate) == []
    rate[23] = 0.45  # a Saturday's rate on a Saturday; day 24 is a Sunday
    assert found(tmp_path / "same", rate) == []
    rate[24] = 0.45
    (one,) = found(tmp_path / "odd", rate)
    assert "1970-01-2" in one.evidence


def test_a_span_of_one_class_is_left_to_its_own_kind(tmp_path):
    rate = np.full((DAYS, 1), 0.2)
    rate[-2:] = 0.0
    log = worlds.written(tmp_path, *columns(rate))
    assert log.column("impressions", "click")[log.column("impressions", "span") == 2].sum() == 0
    assert check_drift.label_changes_over_time(log) == []


def test_only_rows_that_count_are_read(tmp_path):
    """Likes among clicks are steady while clicks, and so likes, fall; other likes are noise."""
    found_, files = worlds.clean()
    shown = files["impressions"]
    drop = (shown["time"] > 105 * 86_400) & (
        np.random.default_rng(0).random(len(shown["time"])) < 0.6
    )
    shown["click"][drop] = 0
    shown["like"][drop] = np.arange(drop.sum()) % 15 == 0
    told = check_drift.label_changes_over_time(worlds.written(tmp_path, found_, files))
    assert [x.where for x in told] == ['impressions.arrow, column "click"']


def test_the_correlation_is_that_of_labels_of_a_cell(tmp_path):
    """Cells drawn from a Beta(a, b): labels of a cell correlate by 1 / (a + b + 1)."""
    rng = np.random.default_rng(0)
    log = worlds.written(tmp_path, *columns(rng.beta(1, 3, (DAYS, USERS)), per_day=8))
    cells = check_drift._cells(log, log.schema.tasks[0])
    label = log.column("impressions", "click").reshape(DAYS * USERS, 8).astype(float)
    rate = label.mean()
    x = label - rate
    pairs = [(x[:, a] * x[:, b]).mean() for a in range(8) for b in range(a)]
    got = check_drift._correlation(cells, rate)
    assert got == pytest.approx(np.mean(pairs) / (rate * (1 - rate)), rel=1e-9)
    assert got == pytest.approx(1 / 5, abs=0.02)
