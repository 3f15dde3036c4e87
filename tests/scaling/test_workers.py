"""Several processes do what one does; what breaks in one of them is told."""

import dataclasses
import queue

import polars as pl
import pytest

from rankjax import embedding, train
from rankjax.models import dlrm
from rankjax.scaling import ladder, study, workers
from tests import tiny


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
    assert found[1].height == 3 and found[1]["test_ne"].null_count() == 0
    assert found[2].equals(found[1])


@pytest.mark.slow
def test_a_failing_worker_is_told_with_its_traceback(asked, tmp_path):
    """A plain network takes no windows: the trial fails when its model is traced."""
    broken = dataclasses.replace(asked, organisations=(("dlrm_mlp", "window"),))
    with pytest.raises(RuntimeError, match=r"(?s)a worker failed:\nTraceback.*ValueError.*window"):
        workers.run(broken, tmp_path, workers=2)
    assert not (tmp_path / "report.html").exists()


def test_another_study_in_the_folder_starts_no_worker(asked, tmp_path):
    study.open_folder(asked, tmp_path)
    with pytest.raises(ValueError, match=r"study.json.*history"):
        workers.run(dataclasses.replace(asked, history=6), tmp_path, workers=1)


class Ended:
    """A worker that has ended."""

    def __init__(self, exitcode):
        self.exitcode = exitcode

    def is_alive(self):
        return False


def test_news_of_workers_that_have_ended_are_read():
    news = queue.Queue()
    news.put(("trial", 0, "dlrm_mlp-1", 0, 1))
    news.put(("step", 0, "dlrm_mlp-1", 5, 10))
    workers._watch([Ended(0)], news)
    assert news.empty()
    news.put(("failed", 0, "Traceback of the worker", 0, 0))
    with pytest.raises(RuntimeError, match="Traceback of the worker"):
        workers._watch([Ended(1)], news)


def test_a_worker_killed_from_outside_is_told():
    with pytest.raises(RuntimeError, match=r"exit codes \[0, -9\]"):
        workers._watch([Ended(0), Ended(-9)], queue.Queue())
