"""The plan of a study is a pure function of its rows; its folder survives what kills a run."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time

import polars as pl
import pytest

from rankjax import embedding, train
from rankjax.data import event_log
from rankjax.models import dlrm, rankmixer
from rankjax.scaling import ladder, study
from tests import tiny

SMALL = dlrm.Config(layers=1, width=4, tasks=2)


def ask(log="log", **options) -> study.Study:
    base = {
        "log": str(log),
        "ladders": (ladder.along(SMALL, width=(4, 8, 16)), ladder.along(SMALL, layers=(1, 2))),
        "history": 5,
        "learning_rates": (1e-3, 1e-2),
        "table_rates": (0.05, 0.1),
        "embedding_stds": (0.01, 0.1),
        "training": train.TrainConfig(batch=64, tables=embedding.TableConfig(width=4)),
    }
    return study.Study(**(base | options))


def params(config) -> int:
    return config.width * config.layers


def complete(asked: study.Study, loss) -> list[study.Request]:
    """Answers every request with `loss(trial)` until nothing is missing."""
    rows, done = {}, False
    for _ in range(10):
        wanted, done = study.requests(asked, rows, params)
        for r in wanted:
            rows[r.trial.id] = {"validation_ne": loss(r.trial), "test_read": True}
    assert done
    return wanted


def test_choices_are_made_on_validation_and_interpolated():
    """The best rate is 1e-3 at width 4 and 1e-2 at width 16; tables 0.1, 0.01 win."""

    def loss(t):
        best_rate = 1e-2 if t.model.width == 16 else 1e-3
        wrong = t.training.optimizer.learning_rate != best_rate
        return wrong + (t.training.tables.learning_rate != 0.1) / 4 + t.training.tables.init_std

    wanted = complete(ask(seeds=(0, 1), budgets=(100, 200)), loss)
    final = [r for r in wanted if r.stage == "final"]
    assert len(final) == (3 + 2) * 2 * 2
    assert {
        (r.trial.training.tables.learning_rate, r.trial.training.tables.init_std) for r in final
    } == {(0.1, 0.01)}
    rates = {
        r.trial.model.width: r.trial.training.optimizer.learning_rate
        for r in final
        if r.ladder.axis == "D"
    }
    assert rates[4] == 1e-3 and rates[16] == 1e-2
    assert rates[8] == pytest.approx(10**-2.5)
    assert all(r.trial.budget == 200 for r in wanted if r.stage != "final")
    assert all(r.test == (r.stage == "final") for r in wanted)


def test_a_diverged_rate_is_never_chosen():
    def loss(t):
        return None if t.training.optimizer.learning_rate == 1e-2 else 1.0

    final = [r for r in complete(ask(), loss) if r.stage == "final"]
    assert {r.trial.training.optimizer.learning_rate for r in final} == {1e-3}


def test_one_rate_needs_no_sweep():
    wanted, done = study.requests(
        ask(learning_rates=(1e-3,), table_rates=(0.1,), embedding_stds=(0.05,)), {}, params
    )
    assert done and {r.stage for r in wanted} == {"final"}


def test_rates_of_one_architecture():
    asked = ask(learning_rates=(1e-3, ("rankmixer", (3e-3, 1e-4))))
    assert asked.rates_of("dlrm_mlp") == (1e-3,)
    assert asked.rates_of("rankmixer") == (1e-4, 3e-3)
    with pytest.raises(ValueError, match="expected some for dlrm_mlp"):
        ask(learning_rates=(("rankmixer", (3e-3,)),)).rates_of("dlrm_mlp")


def test_trial_ids_name_what_decides_the_outcome():
    trial = lambda **o: ask().trial(
        SMALL, **({"rate": 1e-3, "table_rate": 0.1, "std": 0.1, "budget": 9, "seed": 0} | o)
    )
    ids = {trial(**o).id for o in ({}, {"rate": 2e-3}, {"seed": 1}, {"budget": 8}, {"std": 0.2})}
    assert len(ids) == 5
    quiet = dataclasses.replace(
        trial(), training=dataclasses.replace(trial().training, log_every=7)
    )
    assert quiet.id == trial().id


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tiny.log(tmp_path_factory.mktemp("log") / "log", requests=120, events=300)


ONE = {"learning_rates": (1e-2,), "table_rates": (0.1,), "embedding_stds": (0.1,)}


def test_another_study_in_the_folder_is_refused(log, tmp_path):
    study.open_folder(ask(log), tmp_path)
    study.open_folder(ask(log), tmp_path)
    with pytest.raises(ValueError, match=r"study.json.*history.*found history=5, expected 6"):
        study.open_folder(ask(log, history=6), tmp_path)


def test_notes_of_the_log_are_kept_and_not_compared(log, tmp_path):
    study.open_folder(ask(log), tmp_path / "plain")
    assert "notes" not in study.read_request(tmp_path / "plain")
    made, files = tiny.columns(requests=120, events=300)
    noted = event_log.write_log(
        tmp_path / "log", made, **files, fingerprint={"noted": 1}, notes=["drawn", "rounded"]
    )
    study.open_folder(ask(noted), tmp_path / "noted")
    path = tmp_path / "noted" / "study.json"
    assert study.read_request(tmp_path / "noted")["notes"] == ["drawn", "rounded"]
    old = {k: v for k, v in json.loads(path.read_text()).items() if k != "notes"}
    path.write_text(json.dumps(old))
    study.open_folder(ask(noted), tmp_path / "noted")
    assert json.loads(path.read_text()) == old


def test_another_log_is_refused(log, tmp_path):
    study.open_folder(ask(log), tmp_path / "study")
    other = tiny.log(tmp_path / "log", requests=121, events=300)
    with pytest.raises(ValueError, match="another log lies here; requests differ"):
        study.open_folder(ask(other), tmp_path / "study")


def test_a_budget_beyond_the_train_span_is_refused_before_anything_is_trained(log, tmp_path):
    asked = dataclasses.replace(ask(log), budgets=(10, 10**6))
    with pytest.raises(ValueError, match=r"budgets \[1000000\], expected 1 \.\. \d+, the impress"):
        study.open_folder(asked, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_committed_rows_count_as_done(log, tmp_path):
    """A study goes on from study.json and the tables alone, and wants the same rows."""
    asked = ask(log, **ONE, ladders=(ladder.along(SMALL, width=(4, 8)),))
    assert study.work(asked, tmp_path / "first")
    whole = pl.read_parquet(tmp_path / "first" / "results.parquet")
    assert whole.height == 2 and whole["test_ne"].null_count() == 0
    for name in ("study.json", "results.parquet", "timing.parquet"):
        (tmp_path / "second").mkdir(exist_ok=True)
        (tmp_path / "second" / name).write_bytes((tmp_path / "first" / name).read_bytes())
    assert study.work(asked, tmp_path / "second")
    assert not list((tmp_path / "second" / "trials").glob("*"))
    assert pl.read_parquet(tmp_path / "second" / "results.parquet").equals(whole)


def test_trials_read_the_test_span_only_when_final(log, tmp_path):
    asked = ask(
        log,
        ladders=(ladder.along(SMALL, width=(4,)),),
        learning_rates=(1e-3, 1e-2),
        table_rates=(0.1,),
        embedding_stds=(0.1,),
    )
    assert study.work(asked, tmp_path)
    rows = pl.read_parquet(tmp_path / "results.parquet")
    assert rows.filter(pl.col("stage") == "final")["test_ne"].null_count() == 0
    assert rows.filter(pl.col("stage") == "sweep")["test_ne"].null_count() == 2
    assert rows["validation_ne"].null_count() == 0


def test_a_diverged_trial_is_a_row(log, tmp_path):
    asked = ask(
        log,
        ladders=(ladder.along(SMALL, width=(4,)),),
        **(ONE | {"learning_rates": (1e38,)}),
    )
    assert study.work(asked, tmp_path)
    row = pl.read_parquet(tmp_path / "results.parquet").to_dicts()[0]
    assert "expected finite numbers" in row["failed"] and row["test_ne"] is None


def _work(asked, folder):
    study.work(asked, folder)


@pytest.mark.slow
def test_killed_in_mid_trial_it_ends_with_the_same_results(log, tmp_path):
    asked = ask(
        log,
        **ONE,
        ladders=(
            ladder.along(SMALL, width=(4, 8)),
            ladder.along(rankmixer.Config(tokens=2, layers=1, width=4, tasks=2), width=(4,)),
        ),
        training=train.TrainConfig(
            batch=8, log_every=1, checkpoint_seconds=0.0, tables=embedding.TableConfig(width=4)
        ),
    )
    assert study.work(asked, tmp_path / "whole")
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_work, args=(asked, tmp_path / "killed"))
    process.start()
    deadline = time.monotonic() + 120
    checkpoints = lambda: list((tmp_path / "killed" / "trials").glob("*/checkpoints/*"))
    while not checkpoints() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert checkpoints() and not (tmp_path / "killed" / "results.parquet").exists()
    assert study.work(asked, tmp_path / "killed")
    whole, killed = (pl.read_parquet(tmp_path / k / "results.parquet") for k in ("whole", "killed"))
    assert killed.equals(whole) and whole.height == 3
    lines = [
        [json.loads(x)["step"] for x in path.open()]
        for path in (tmp_path / "killed" / "trials").glob("*/metrics.jsonl")
    ]
    assert all(x == sorted(set(x)) for x in lines)
    assert event_log.EventLog.open(log)
