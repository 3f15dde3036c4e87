"""Several processes do what one does; what breaks in one of them is told."""

import dataclasses
import json
import multiprocessing
import os
import signal
import sys

import polars as pl
import pytest

from rankjax import baseline, embedding, train
from rankjax.data import event_log
from rankjax.models import dlrm
from rankjax.scaling import ladder, study, workers
from tests import tiny, trials
from tests.references import study_results


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Three trials of a plain network."""
    log = tiny.log(tmp_path_factory.mktemp("log") / "log", requests=120, events=300)
    small = dlrm.Config(layers=1, width=4, tasks=2)
    return study.Study(
        log=str(log),
        ladders=(ladder.along(small, width=(4, 8, 16)),),
        history=5,
        learning_rates=(1e-2,),
        table_rates=(0.1,),
        embedding_stds=(0.1,),
        training=train.TrainConfig(batch=64, tables=embedding.TableConfig(width=4)),
    )


@pytest.mark.slow
def test_two_workers_give_the_rows_of_one(asked, tmp_path):
    found = {}
    for count in (1, 2):
        path = workers.run(asked, tmp_path / str(count), workers=count)
        assert path == tmp_path / str(count) / "report.html" and path.exists()
        found[count] = pl.read_parquet(path.parent / "results.parquet")
        trees = json.loads((path.parent / "baseline.json").read_text())
        assert (
            trees["test_ne"]
            == json.loads((path.parent / "summary.json").read_text())["trees"]["test_ne"]
        )
    assert found[1].height == 3 and found[1]["test_ne"].null_count() == 0
    assert found[2].equals(found[1])


@pytest.mark.slow
def test_a_failing_worker_is_told_with_its_traceback(asked, tmp_path):
    """A plain network takes no windows: the trial fails when its model is traced."""
    broken = dataclasses.replace(asked, organisations=(("dlrm_mlp", "window"),))
    with pytest.raises(RuntimeError, match=r"(?s)a worker failed:\nTraceback.*ValueError.*window"):
        workers.run(broken, tmp_path, workers=2)
    assert not (tmp_path / "report.html").exists()


def _run(study_of, folder):
    workers.run(study_of, folder, workers=2)


@pytest.mark.slow
def test_a_killed_worker_costs_its_last_steps_only(asked, tmp_path):
    """One of two is killed in the middle of a trial: the other takes the trial over."""
    study_of = trials.asked(asked.log)
    whole = workers.run(study_of, tmp_path / "whole", workers=2).parent
    process = multiprocessing.get_context("spawn").Process(
        target=_run, args=(study_of, tmp_path / "killed")
    )
    process.start()
    home, pid = trials.in_the_middle(tmp_path / "killed")
    os.kill(pid, signal.SIGKILL)
    kept = trials.saved_lines(home)
    process.join(timeout=trials.DEADLINE)
    assert process.exitcode == 0 and (tmp_path / "killed" / "report.html").exists()
    lines = (home / "metrics.jsonl").read_text().splitlines()
    assert len(lines) > len(kept) > 0 and lines[: len(kept)] == kept
    results = [(x / "results.parquet").read_bytes() for x in (whole, tmp_path / "killed")]
    assert results[0] == results[1]


def test_another_study_in_the_folder_starts_no_worker(asked, tmp_path):
    study.open_folder(asked, tmp_path)
    with pytest.raises(ValueError, match=r"study.json.*history"):
        workers.run(dataclasses.replace(asked, history=6), tmp_path, workers=1)


def test_trees_take_the_largest_budget_of_the_study(asked, tmp_path):
    study_of = dataclasses.replace(asked, budgets=(60, 120))
    log = study.open_folder(study_of, tmp_path)
    found = workers.write_trees(log, tmp_path)
    assert found["rows"] == 120 == found["config"]["budget"]
    assert json.loads((tmp_path / "baseline.json").read_text()) == found
    assert workers.write_trees(log, tmp_path, 60)["rows"] == 60
    study.open_folder(dataclasses.replace(asked, budgets=(60, None)), tmp_path / "all")
    train_rows = int((log.column("impressions", "span") == 0).sum())
    assert workers.write_trees(log, tmp_path / "all")["rows"] == train_rows


def test_trees_of_another_log_are_refused(asked, tmp_path):
    study.open_folder(asked, tmp_path)
    other = event_log.EventLog.open(tiny.log(tmp_path / "log", requests=121, events=300))
    with pytest.raises(ValueError, match=r"study of another log.*requests differ: found requests="):
        workers.write_trees(other, tmp_path)
    with pytest.raises(ValueError, match=r"found no study.json"):
        workers.write_trees(other, tmp_path / "nothing")
    assert not (tmp_path / "baseline.json").exists()


def test_trees_are_run_once(asked, tmp_path, monkeypatch, capsys):
    log = study.open_folder(asked, tmp_path)
    (tmp_path / "baseline.json").write_text("{}")
    monkeypatch.setattr(baseline, "run", lambda *_: pytest.fail("run again"))
    workers._add_trees(log, tmp_path)
    assert (tmp_path / "baseline.json").read_text() == "{}" and capsys.readouterr().err == ""


def test_without_scikit_learn_a_study_goes_on(asked, tmp_path, monkeypatch, capsys):
    log = study.open_folder(asked, tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    workers._add_trees(log, tmp_path)
    assert not (tmp_path / "baseline.json").exists()
    said = capsys.readouterr().err
    assert said.startswith("trees not run: ") and "pip install 'rankjax[baseline]'" in said
    assert said.count("\n") == 1


def test_the_report_of_a_folder_shows_its_trees(tmp_path):
    table = study_results.table(architectures=("hstu",), seeds=(0,), budgets=(250_000,))
    table = table.filter(pl.col("stage") == "final").head(2)
    table.write_parquet(tmp_path / "results.parquet")
    table.select("trial").write_parquet(tmp_path / "timing.parquet")
    (tmp_path / "study.json").write_text(json.dumps({"study": {}, "notes": ["drawn"]}))
    told = lambda: json.loads((workers.write_report(tmp_path).parent / "summary.json").read_text())
    assert (told()["trees"], told()["notes"]) == (None, ["drawn"])
    trees = {
        "rows": 5, "rows_asked": 5, "features": 3, "iterations": 2, "test_ne": 0.1,
        "config": {"iterations": 9, "leaves": 4}, "test_auc": 0.9, "test_request_auc": None,
    }  # fmt: skip
    (tmp_path / "baseline.json").write_text(json.dumps(trees))
    assert told()["trees"] == trees


class Ended:
    """A worker that has ended after it said something."""

    def __init__(self, exitcode, *said):
        self.exitcode = exitcode
        self.reader, writer = multiprocessing.Pipe(duplex=False)
        for what in said:
            writer.send(what)
        writer.close()

    def is_alive(self):
        return False

    def join(self):
        pass


def watch(*ended):
    workers._watch(list(ended), [x.reader for x in ended])


def test_news_of_workers_that_have_ended_are_read():
    watch(Ended(0, ("trial", "dlrm_mlp-1", 0, 1), ("step", "dlrm_mlp-1", 5, 10)))
    with pytest.raises(RuntimeError, match="Traceback of the worker"):
        watch(Ended(0), Ended(1, ("failed", "Traceback of the worker", 0, 0)))


def test_a_worker_killed_from_outside_is_told(capsys):
    watch(Ended(0), Ended(-9))
    assert capsys.readouterr().err == "worker 1 ended with exit code -9, expected 0\n"
