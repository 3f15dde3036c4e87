"""A study in jobs has the rows of a local one; jobs are killed, queued again, and cancelled.

submitit's stand-in for a cluster runs jobs as processes of this machine, by the same code; what
SLURM itself would be asked is read from the file that `sbatch` gets.
"""

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import threading
import time

import pytest

from rankjax import checkpoint
from rankjax.scaling import nodes, slurm_engine, study, workers
from tests import tiny, trials

# Not importorskip: submitit would set up this process's logging.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="submitit is not installed"
)
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tiny.log(tmp_path_factory.mktemp("log") / "log", requests=120, events=300)


@pytest.fixture(scope="module")
def local(log, tmp_path_factory):
    """results.parquet of a local run."""
    path = workers.run(trials.asked(log), tmp_path_factory.mktemp("local") / "study", workers=2)
    return (path.parent / "results.parquet").read_bytes()


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Jobs find this rankjax, and are looked at often."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(slurm_engine, "POLL", 0.2)


def parent(pid: int) -> int:
    return int(re.search(r"PPid:\t(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1])


def run_while(doing, asked, folder, **slurm):
    """Runs the study in jobs while another thread is `doing` something to them."""
    thread = threading.Thread(target=doing)
    thread.start()
    path = slurm_engine.run(asked, folder, slurm_engine.Slurm(**slurm), cluster="local")
    thread.join()
    return path


@pytest.mark.slow
def test_with_a_job_killed_the_results_are_those_of_a_local_run(log, local, tmp_path, capsys):
    """Of two jobs one is killed, its worker too: the other one takes the trial over."""
    folder, seen = tmp_path / "study", {}

    def kill():
        home, pid = trials.in_the_middle(folder)
        for one in (parent(pid), pid):
            os.kill(one, signal.SIGKILL)
        seen["home"], seen["kept"] = home, trials.saved_lines(home)

    path = run_while(kill, trials.asked(log), folder, jobs=2)
    assert path == folder / "report.html" and (folder / "baseline.json").exists()
    assert (folder / "results.parquet").read_bytes() == local
    lines = (seen["home"] / "metrics.jsonl").read_text().splitlines()
    kept = seen["kept"]
    assert len(lines) > len(kept) > 0 and lines[: len(kept)] == kept
    assert re.search(r"job \d+ ended in state ", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("signals", [("SIGUSR2",), ("SIGTERM", "SIGUSR2")], ids="-".join)
def test_a_job_that_is_told_to_end_is_queued_again_and_goes_on(tmp_path, signals):
    """At a time limit, or preempted. No checkpoint is due: it goes on from the signal's."""
    asked = trials.asked(tiny.log(tmp_path / "log", requests=500, events=300), widths=(4,))
    rarely = dataclasses.replace(asked.training, checkpoint_seconds=1e9, batch=1)
    asked = dataclasses.replace(asked, training=rarely)
    folder, seen = tmp_path / "study", {}

    def end():
        home = trials.begun(folder)
        job = parent(trials.holder(home / "lock"))
        for which in signals:
            os.kill(job, getattr(signal, which))
            deadline = time.monotonic() + trials.DEADLINE
            while checkpoint.latest(home / "checkpoints") is None and time.monotonic() < deadline:
                time.sleep(0.01)
        seen["home"], seen["kept"] = home, trials.saved_lines(home)

    run_while(end, asked, folder)
    assert "Requeued job" in "".join(p.read_text() for p in folder.glob("slurm/*/*_log.*"))
    lines = (seen["home"] / "metrics.jsonl").read_text().splitlines()
    kept = seen["kept"]
    assert len(lines) > len(kept) > 0 and lines[: len(kept)] == kept


@pytest.mark.slow
def test_a_failing_trial_ends_the_study_with_its_traceback(log, tmp_path):
    broken = trials.asked(log, widths=(4,), organisations=(("dlrm_mlp", "window"),))
    with pytest.raises(workers.Failed, match=r"(?s)job \d+: .*Traceback.*ValueError.*window"):
        slurm_engine.run(broken, tmp_path, cluster="local")
    assert not (tmp_path / "report.html").exists()


def _run(asked, folder):
    slurm_engine.POLL = 0.2
    with contextlib.suppress(KeyboardInterrupt):
        slurm_engine.run(asked, folder, cluster="local")
        os._exit(7)  # it was not interrupted
    os._exit(130)


@pytest.mark.slow
def test_ctrl_c_cancels_the_jobs(log, tmp_path):
    folder = tmp_path / "study"
    process = multiprocessing.get_context("spawn").Process(
        target=_run, args=(trials.asked(log), folder)
    )
    process.start()
    home, pid = trials.in_the_middle(folder)
    job = parent(pid)
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=trials.DEADLINE)
    assert process.exitcode == 130 and not list(folder.glob("shared-*"))
    deadline = time.monotonic() + trials.DEADLINE
    while any(pathlib.Path(f"/proc/{x}").exists() for x in (pid, job)):
        assert time.monotonic() < deadline, "the job goes on"
        time.sleep(0.05)
    assert checkpoint.latest(home / "checkpoints") and not (folder / "report.html").exists()


def test_a_job_that_does_not_see_the_folder_says_so(log, tmp_path):
    asked = trials.asked(log)
    opened = study.open_folder(asked, tmp_path)
    with nodes.expecting(asked, tmp_path, opened) as expected:
        away = dataclasses.replace(expected, marker="/nowhere/shared")
        before = signal.getsignal(signal.SIGTERM), os.environ.get("JAX_PLATFORMS")
        kind, said = slurm_engine.Job()(away, tmp_path, slurm_engine.Slurm())
        signal.signal(signal.SIGTERM, before[0])
        os.environ["JAX_PLATFORMS"] = before[1] or ""
    assert kind == "failed" and f"{os.uname().nodename}: found no /nowhere/shared" in said
    assert not (tmp_path / "trials").exists()


def test_sbatch_gets_what_was_asked(log, tmp_path, monkeypatch):
    """Stand-ins for SLURM's programs: sbatch keeps the file that it is given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "srun"):
        (programs / name).write_text(
            f'#!/bin/sh\ncp "$1" {tmp_path}/asked.sh\necho "Submitted batch job 77"\n'
        )
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    slurm = slurm_engine.Slurm(
        jobs=3, cpus=4, gpus=2, minutes=90, memory=24, partition="long", account="us",
        options={"qos": "high"}, setup=("module load cuda",),
    )  # fmt: skip
    asked = trials.asked(log)
    opened = study.open_folder(asked, tmp_path / "study")
    with nodes.expecting(asked, tmp_path / "study", opened) as expected:
        submitit = slurm_engine.check()
        jobs = slurm_engine._submit(submitit, slurm, "slurm", expected, tmp_path / "study")
    assert [job.job_id for job in jobs] == ["77_0", "77_1", "77_2"]
    text = (tmp_path / "asked.sh").read_text()
    for line in (
        "array=0-2%3", "cpus-per-task=4", "gpus-per-node=2", "time=90", "mem=24GB",
        "partition=long", "account=us", "qos=high", "requeue", "signal=USR2@90",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text, line
    assert "module load cuda" in text and "--cpus-per-task=4" in text.split("srun ")[1]
    what = jobs[0].submission()
    assert what.args == (expected, tmp_path / "study", slurm)
    assert what._timeout_countdown == slurm_engine.REQUEUES
    again = what._checkpoint_function()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.args == what.args


def test_a_job_has_a_worker_a_core_or_a_gpu(monkeypatch):
    monkeypatch.setattr(slurm_engine.cores, "take", lambda count: tuple(range(4, 4 + count)))
    assert slurm_engine._places(slurm_engine.Slurm(cpus=2)) == [4, 5]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert slurm_engine._places(slurm_engine.Slurm(cpus=8, gpus=2)) == ["3", "5"]
    with pytest.raises(ValueError, match=r"found GPUs \['3', '5'\], expected 4"):
        slurm_engine._places(slurm_engine.Slurm(gpus=4))


def test_without_slurm_it_is_told_before_any_work(log, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="found no sbatch, srun on PATH"):
        slurm_engine.run(trials.asked(log), tmp_path / "study")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install 'rankjax\[slurm\]'"):
        slurm_engine.run(trials.asked(log), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("wrong", [{"jobs": 0}, {"cpus": 0}, {"gpus": -1}, {"minutes": 2}])
def test_jobs_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="expected jobs and cpus of 1 or more"):
        slurm_engine.Slurm(**wrong)
