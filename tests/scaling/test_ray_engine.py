"""A study on a Ray cluster has the rows of a local one, whatever dies on the way."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import types

import pytest

from rankjax import checkpoint
from rankjax.scaling import nodes, ray_engine, workers
from tests import ray_clusters, tiny, trials


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tiny.log(tmp_path_factory.mktemp("log") / "log", requests=120, events=300)


@pytest.fixture(scope="module")
def cluster():
    with ray_clusters.started() as address:
        yield address


@pytest.mark.slow
def test_with_a_worker_killed_the_results_are_those_of_a_local_run(log, cluster, tmp_path, capsys):
    """Two workers; one is killed in the middle of a trial, which then goes on, not anew."""
    asked = trials.asked(log)
    local = workers.run(asked, tmp_path / "local", workers=2).parent
    seen = {}

    def kill():
        home, pid = trials.in_the_middle(tmp_path / "ray")
        os.kill(pid, signal.SIGKILL)
        seen["home"], seen["kept"] = home, trials.saved_lines(home)

    killer = threading.Thread(target=kill)
    killer.start()
    path = ray_engine.run(asked, tmp_path / "ray", address=cluster)
    killer.join()
    assert path == tmp_path / "ray" / "report.html" and path.exists()
    results = [(x / "results.parquet").read_bytes() for x in (local, path.parent)]
    assert results[0] == results[1] and (path.parent / "baseline.json").exists()
    home, kept = seen["home"], seen["kept"]
    lines = (home / "metrics.jsonl").read_text().splitlines()
    assert len(lines) > len(kept) > 0 and lines[: len(kept)] == kept
    said = capsys.readouterr()
    assert f"trial {home.name}: its worker died, it goes on from step " in said.err
    assert said.out == ""  # which is the result's
    assert not list(path.parent.glob("shared-*"))


@pytest.mark.slow
def test_a_failing_trial_ends_the_study_with_its_traceback(log, cluster, tmp_path):
    """A plain network takes no windows: the trial fails when its model is traced."""
    broken = trials.asked(log, widths=(4,), organisations=(("dlrm_mlp", "window"),))
    with pytest.raises(workers.Failed, match=r"(?s)dlrm_mlp-.* failed on .*ValueError.*window"):
        ray_engine.run(broken, tmp_path, address=cluster)
    assert not (tmp_path / "report.html").exists()


def _run(asked, folder, address):
    with contextlib.suppress(KeyboardInterrupt):
        ray_engine.run(asked, folder, address=address)
        os._exit(7)  # it was not interrupted
    os._exit(130)


@pytest.mark.slow
def test_ctrl_c_saves_the_running_trials(cluster, tmp_path):
    """No checkpoint is due before the end of a trial: the one there is the interruption's."""
    long = tiny.log(tmp_path / "log", requests=5000, events=300)
    asked = trials.asked(long, widths=(4,))
    rarely = dataclasses.replace(asked.training, checkpoint_seconds=1e9, batch=1)
    asked = dataclasses.replace(asked, training=rarely)
    folder = tmp_path / "study"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run, args=(asked, folder, cluster))
    process.start()
    home = trials.begun(folder)
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=trials.DEADLINE)
    assert process.exitcode == 130 and not (home / "result.json").exists()
    steps = len((home / "metrics.jsonl").read_text().splitlines())
    assert checkpoint.latest(home / "checkpoints") == steps > 0


@pytest.mark.slow
def test_a_node_that_does_not_see_the_folder_is_named_before_any_work(
    log, cluster, tmp_path, monkeypatch
):
    real = nodes.expecting

    @contextlib.contextmanager
    def elsewhere(*args):
        with real(*args) as expected:
            yield dataclasses.replace(expected, marker=str(tmp_path / "elsewhere" / "shared"))

    monkeypatch.setattr(nodes, "expecting", elsewhere)
    with pytest.raises(ValueError, match=rf"{os.uname().nodename}: found no .*elsewhere/shared"):
        ray_engine.run(trials.asked(log), tmp_path / "study", address=cluster)
    assert not (tmp_path / "study" / "trials").exists()


@pytest.mark.slow
def test_resources_that_no_node_has_are_refused(log, cluster, tmp_path):
    much = ray_engine.Resources(cpus=64)
    with pytest.raises(ValueError, match=r"'CPU': 2.0.*expected one with \{'CPU': 64\}"):
        ray_engine.run(trials.asked(log), tmp_path / "study", much, address=cluster)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere"])
def test_a_cluster_that_is_not_there_is_told_before_any_work(log, tmp_path, address):
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=rf"found .*{address}.*expected"):
        ray_engine.run(trials.asked(log), tmp_path / "study", address=address)
    assert not (tmp_path / "study").exists()


def test_without_ray_it_says_what_to_install(log, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'rankjax\[ray\]'"):
        ray_engine.run(trials.asked(log), tmp_path / "study")


@pytest.mark.parametrize(
    "wrong",
    [{"cpus": 0}, {"gpus": 2}, {"gpus": 1, "tpus": 1}, {"custom": {"GPU": 1}}],
)
def test_resources_that_no_trial_takes_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        ray_engine.Resources(**wrong)


def test_a_task_gets_its_accelerator_or_stays_on_cpus():
    slice_of = ray_engine.Resources(custom={"TPU-v5litepod-8-head": 1})
    assert slice_of.needed() == {"CPU": 1, "TPU-v5litepod-8-head": 1}
    platforms = lambda x: ray_engine._environment(x)["JAX_PLATFORMS"]
    assert platforms(slice_of) == "tpu,cpu" == platforms(ray_engine.Resources(tpus=4))
    assert platforms(ray_engine.Resources(custom={"fast_disk": 1})) == "cpu"
    half = ray_engine._environment(ray_engine.Resources(gpus=0.5))
    assert half["JAX_PLATFORMS"] == "cuda,cpu"
    assert half["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.450"
    assert ray_engine._environment(ray_engine.Resources()).keys() >= workers.KEEP_MEMORY.keys()


def test_a_trial_whose_workers_die_without_getting_on_is_given_up(tmp_path, monkeypatch):
    newest = iter([None, 3, 5, 5, 5, 5])
    monkeypatch.setattr(checkpoint, "latest", lambda folder: next(newest))
    state = types.SimpleNamespace(folder=tmp_path, deaths={})
    told = [ray_engine._Trials._died(state, "t", OSError("killed")) for _ in range(5)]
    assert "goes on from its start" in told[0] and "goes on from step 5 (killed)" in told[4]
    with pytest.raises(workers.Failed, match="died 4 times at step 5"):
        ray_engine._Trials._died(state, "t", OSError("killed"))
