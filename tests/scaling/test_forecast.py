"""What a study will train is what it trains; seconds follow from what was measured."""

import functools
import hashlib
import math

import numpy as np
import polars as pl
import pytest

from rankjax import embedding, train
from rankjax.data import event_log
from rankjax.models import dlrm
from rankjax.scaling import forecast, ladder, sizes, study, trial
from tests import tiny

BASE = dlrm.Config(layers=2, width=8, tasks=2)
WIDTHS, LAYERS = ladder.along(BASE, width=(4, 8, 16)), ladder.along(BASE, layers=(1, 2, 3))
ONE = {"learning_rates": (1e-2,), "table_rates": (0.1,), "embedding_stds": (0.1,)}


def ask(log="log", **options) -> study.Study:
    base = {
        "log": str(log),
        "ladders": (WIDTHS, LAYERS),
        "history": 5,
        "learning_rates": (1e-3, 3e-3, 1e-2),
        "table_rates": (0.05, 0.1),
        "embedding_stds": (0.01, 0.1),
        "training": train.TrainConfig(batch=16, tables=embedding.TableConfig(width=4)),
    }
    return study.Study(**(base | options))


def params(config) -> int:
    return config.width * config.layers


def answered(asked: study.Study, loss, rows=None) -> set[str]:
    """The ids of all trials of a study whose validation losses are `loss(trial)`."""
    rows, done = {} if rows is None else rows, False
    while not done:
        wanted, done = study.requests(asked, rows, params)
        for r in wanted:
            rows[r.trial.id] = {"validation_ne": loss(r.trial), "test_read": True}
    return {r.trial.id for r in wanted}


def by_chance(salt: int, spec: trial.Trial) -> str:
    return hashlib.sha256(f"{salt} {spec.id}".encode()).hexdigest()


def rate(spec: trial.Trial) -> float:
    return spec.training.optimizer.learning_rate


def bounds(jobs: list[forecast.Job]) -> tuple[int, int]:
    """(least, most) trials."""
    trained = [j for j in jobs if j.trains]
    return sum(not j.extra for j in trained), len(trained)


def test_with_one_rate_the_trials_are_exactly_those_of_the_study():
    asked = ask(**ONE, seeds=(0, 1), budgets=(100, 200))
    jobs = forecast.jobs(asked, {}, params)
    ids = [j.request.trial.id for j in jobs]
    assert len(ids) == len(set(ids)) == (3 + 2) * 2 * 2 and not any(j.extra for j in jobs)
    assert set(ids) == answered(asked, lambda spec: 1.0)


def test_where_the_middle_wins_everywhere_they_are_those_of_the_study():
    asked = ask(seeds=(0, 1), budgets=(100, 200))
    jobs = forecast.jobs(asked, {}, params)
    loss = lambda t: (
        abs(math.log(rate(t) / 3e-3))
        + abs(t.training.tables.learning_rate - 0.1)
        + abs(t.training.tables.init_std - 0.1)
    )
    least = {j.request.trial.id for j in jobs if j.trains and not j.extra}
    assert least == answered(asked, loss)


def test_whatever_wins_there_are_no_more_trials_and_no_fewer():
    """The base, in both ladders, is one trial a seed and budget, or two."""
    asked = ask(seeds=(0, 1), budgets=(100, 200))
    least, most = bounds(forecast.jobs(asked, {}, params))
    assert most == least + 4
    found = set()
    for salt in range(60):
        found.add(len(answered(asked, functools.partial(by_chance, salt))))
    assert min(found) >= least and max(found) == most
    equal = answered(asked, lambda t: -rate(t))  # the same rate at all ends
    assert len(equal) == least


def test_what_real_choices_decide_is_no_longer_open():
    asked, rows = ask(), {}
    ids = answered(asked, lambda t: rate(t) * (1 if t.model.width == 16 else -1), rows)
    assert forecast.jobs(asked, rows, params) == []
    finals = {r.trial.id for r in study.requests(asked, rows, params)[0] if r.stage == "final"}
    chosen_only = {k: {**v, "test_read": False} for k, v in rows.items() if k not in finals}
    chosen_only |= {k: {**rows[k], "test_read": False} for k in finals if k in swept(asked, rows)}
    jobs = forecast.jobs(asked, chosen_only, params)
    assert not any(j.extra for j in jobs)
    assert {j.request.trial.id for j in jobs} == finals
    trained = {j.request.trial.id for j in jobs if j.trains}
    assert trained == ids - chosen_only.keys()
    again = [j for j in jobs if not j.trains]  # trained when swept, evaluated on test now
    assert again and all(j.spans == ("validation", "test") for j in again)


def swept(asked, rows) -> set[str]:
    return {r.trial.id for r in study.requests(asked, rows, params)[0] if r.stage != "final"}


def test_waves_follow_the_choices():
    jobs = forecast.jobs(ask(), {}, params)
    stages = [{j.request.stage for j in jobs if j.wave == w} for w in range(4)]
    assert stages == [{"sweep"}, {"tables"}, {"sweep"}, {"final"}]
    assert {j.spans for j in jobs if j.request.stage != "final"} == {("validation",)}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tiny.log(tmp_path_factory.mktemp("log") / "log", requests=120, events=300)


def test_flops_are_those_of_the_rows_of_a_study(log, tmp_path):
    asked = ask(log, **ONE, budgets=(60, None), ladders=(ladder.along(BASE, width=(4,)),))
    assert study.work(asked, tmp_path)
    rows = {r["trial"]: r for r in pl.read_parquet(tmp_path / "results.parquet").to_dicts()}
    opened = event_log.EventLog.open(log)
    jobs = forecast.jobs(asked, {}, study.params_of(asked, opened))
    assert len(rows) == 2 and {j.request.trial.id for j in jobs} == rows.keys()
    for job in jobs:
        row, spec = rows[job.request.trial.id], job.request.trial
        work = forecast.work(spec, opened)
        assert work.training_flops == row["training_flops"] > 0
        assert work.dense_params == row["dense_params"]
        chosen = trial.samples_of(opened, spec.samples, "train", spec.budget)
        steps = len(train.batches(opened, spec.training, chosen))
        assert sum(n for n, _ in work.steps.values()) == steps > 1
        padded = sum(n * flops for n, flops in work.steps.values())
        assert padded >= row["flops"] * row["samples"] * (1 - 1e-9)
        for span in ("validation", "test"):  # a third of what training on the span would take
            held_out = trial.samples_of(opened, spec.samples, span, None)
            epoch = train.batches(opened, spec.training, held_out)
            columns = sizes.columns(spec.model, spec.training, opened.schema, epoch)
            assert work.evaluation_flops[span] == pytest.approx(columns["training_flops"] / 3)
        assert work.flops(job) == (row["training_flops"], sum(work.evaluation_flops.values()))


def test_a_curve_is_straight_in_the_logarithms_and_never_falls():
    curve = forecast.curve([(100.0, 4.0), (1.0, 1.0), (1e4, 3.0)], grows=True)
    assert curve(1.0) == pytest.approx(1) and curve(10.0) == pytest.approx(2)
    assert curve(0.01) == pytest.approx(1)
    assert curve(1e3) == pytest.approx(4) == pytest.approx(curve(1e4))
    assert curve(1e5) == pytest.approx(40)
    assert forecast.curve([(1.0, 1.0), (100.0, 4.0)])(1e6) == pytest.approx(4)
    assert math.isnan(forecast.curve([])(1.0))


def measured(**options) -> forecast.Measured:
    found = dict(flops=10.0, step=2.0, compile=7.0, score_flops=4.0, score=0.5, score_compile=3.0)
    found |= dict(first=1.0, begin=0.25, memory_bytes=1) | options
    return forecast.Measured(**found)


def job(config=BASE, *, stage="final", seed=0, wave=0, trains=True, of=WIDTHS) -> forecast.Job:
    how = dict(rate=1e-2, table_rate=0.1, std=0.1, budget=None)
    spec = ask().trial(config, **how, seed=seed)
    request = study.Request(spec, stage, of, of.configs.index(config))
    return forecast.Job(request=request, wave=wave, trains=trains)


SHAPE, SMALLER = (8, 5, 4), (8, 3, 4)
WORK = forecast.Work(
    model=BASE,
    dense_params=1,
    training_flops=50.0,
    evaluation_flops={"validation": 8.0, "test": 8.0},
    steps={SHAPE: (5, 10.0), SMALLER: (2, 5.0)},
    scoring={"validation": {SHAPE: (3, 4.0)}, "test": {SHAPE: (1, 8.0)}},
)


def test_seconds_of_a_job_by_hand():
    found = forecast.timed(job(), WORK, [measured()])
    # Steps of fewer FLOPs than were measured take as long; the test's batches twice as long.
    assert found.run == pytest.approx(0.25 + 7 * 2 + 3 * 0.5 + 1 * 1.0)
    assert sorted(found.once.values()) == pytest.approx([1, 3, 7, 7])
    swept_only = forecast.timed(job(stage="sweep"), WORK, [measured()])
    assert swept_only.run == pytest.approx(0.25 + 7 * 2 + 3 * 0.5)
    evaluated = forecast.timed(job(trains=False), WORK, [measured()])
    assert evaluated.run == pytest.approx(0.25 + 3 * 0.5 + 1.0)
    assert sorted(evaluated.once.values()) == pytest.approx([1, 3])
    unknown = forecast.timed(job(), WORK, [measured(step=math.nan)])
    assert math.isnan(unknown.run)


def timed(one: forecast.Job, seconds: float, **once) -> forecast.Timed:
    return forecast.Timed(job=one, run=seconds, once=once)


def test_a_schedule_by_hand():
    four = [timed(job(seed=s), t) for s, t in enumerate((5.0, 4.0, 3.0, 2.0))]
    assert forecast.schedule(four, 1) == (14.0, [5, 4, 3, 2])
    assert forecast.schedule(four, 2)[0] == 7.0  # 5 + 2 beside 4 + 3
    assert forecast.schedule(four, 9)[0] == 5.0
    assert forecast.schedule([], 2) == (0.0, [])
    wall, spent = forecast.schedule([*four, timed(job(seed=9), math.nan)], 2)
    assert math.isnan(wall) and np.isnan(spent).all()


def test_a_process_compiles_a_model_once_and_stays_with_it():
    small, large = WIDTHS.configs[0], WIDTHS.configs[2]
    jobs = [timed(job(c, seed=s), 1.0, **{str(c.width): 10.0})
            for s in (0, 1) for c in (small, large)]  # fmt: skip
    assert forecast.schedule(jobs, 2) == (12.0, [11, 11, 1, 1])
    assert forecast.schedule(jobs, 1)[0] == 24.0
    assert forecast.schedule(jobs, 4)[0] == 11.0


def test_choices_are_waited_for_by_their_own_architecture_only():
    other = ladder.Ladder(architecture="other", axis="D", field="width", configs=WIDTHS.configs)
    jobs = [
        timed(job(stage="sweep"), 3.0),
        timed(job(stage="sweep", seed=1), 1.0),
        timed(job(wave=1), 2.0),
        timed(job(seed=2, of=other), 4.0),
    ]
    # The second worker takes the other architecture at 1, the first the final trial at 3.
    assert forecast.schedule(jobs, 2)[0] == 5.0
    assert forecast.schedule(jobs[:3], 9)[0] == 5.0
