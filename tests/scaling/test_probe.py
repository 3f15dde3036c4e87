"""Sizes are measured in processes that end whatever happens; what is measured is what runs."""

import dataclasses
import logging
import math
import multiprocessing
import os
import time

import jax
import pytest

from rankjax import embedding, step, train
from rankjax.data import event_log
from rankjax.models import dlrm
from rankjax.scaling import forecast, ladder, probe, study, trial, workers
from tests import tiny


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    log = tiny.log(tmp_path_factory.mktemp("log") / "log", requests=120, events=300)
    return study.Study(
        log=str(log),
        ladders=(ladder.along(dlrm.Config(layers=1, width=4, tasks=2), width=(4, 8)),),
        history=5,
        training=train.TrainConfig(batch=16, tables=embedding.TableConfig(width=4)),
    )


@pytest.fixture(scope="module")
def log(asked):
    return event_log.EventLog.open(asked.log)


def spec_of(asked, size=0) -> trial.Trial:
    config = asked.ladders[0].configs[size]
    return asked.trial(config, rate=1e-2, table_rate=0.1, std=0.1, budget=None, seed=0)


def test_memory_is_that_of_the_state_and_what_a_step_makes(asked, log):
    spec = spec_of(asked)
    found = probe.measure(spec, log)
    epoch = train.batches(log, spec.training, trial.samples_of(log, spec.samples, "train", None))
    largest = next(epoch[i] for i in range(len(epoch)) if epoch.shape(i) == epoch.shapes[-1])
    state = step.init(spec.model, log.schema, spec.training, largest)
    held = sum(x.nbytes for x in jax.tree.leaves((state, largest.without_impression())))
    assert held < found.memory_bytes < held + 50 * 2**20
    assert found.fits and found.limit_bytes is None
    for name in (*probe.TIMES, "first"):
        assert 0 < getattr(found, name) < 60
    work = forecast.work(spec, log)
    assert found.flops in {flops for _, flops in work.steps.values()}
    assert found.score_flops in {flops for _, flops in work.scoring["validation"].values()}


def test_what_does_not_fit_is_compiled_and_not_run(asked, log, monkeypatch):
    monkeypatch.setattr(step, "init", lambda *_: pytest.fail("made a state"))
    monkeypatch.setattr(train, "init", step.init)
    found = probe.measure(spec_of(asked), log, limit=1000)
    assert not found.fits and found.memory_bytes > 1000 == found.limit_bytes
    assert all(math.isnan(getattr(found, name)) for name in probe.TIMES)


def test_a_step_that_was_compiled_for_its_memory_is_not_compiled_again(asked, log, caplog):
    """Else every probe would take the largest size's compilation twice."""
    spec = spec_of(asked, size=1)
    epoch = train.batches(log, spec.training, trial.samples_of(log, spec.samples, "train", None))
    batch = epoch[0].without_impression()
    prog = train.program(spec.model, log.schema, spec.training)
    state = train.init(spec.model, log.schema, spec.training, batch)
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        _, seconds = probe._compiled(spec, prog, batch)
        assert seconds > 0 and "XLA compilation of jit(_step)" in caplog.text
        caplog.clear()
        rates, key = train.rates_of(spec.training, len(epoch))(0), jax.random.key(0)
        jax.block_until_ready(prog.step(state, batch, rates, key))
        assert "compilation" not in caplog.text


def test_only_batches_of_the_shape_are_timed(monkeypatch):
    one, other = (tiny.batch(samples=4, history=n) for n in (5, 6))
    monkeypatch.setattr(probe.loader, "stream", lambda _: enumerate([one, other] * 10))
    done = []
    monkeypatch.setattr(probe, "SECONDS", 0.0)
    seconds = probe._pace(None, one, lambda at, batch: (done.append(at), time.sleep(0.01)))
    assert done == list(range(0, 2 * (probe.WARM + probe.STEPS[0]), 2))
    assert 0.009 < seconds < 0.1
    monkeypatch.setattr(probe.loader, "stream", lambda _: enumerate([one]))
    assert probe._pace(None, one, lambda at, batch: time.sleep(0.01)) > 0.009


def _die(asked, spec, limit):
    os.kill(os.getpid(), 9)


def _pid(asked, spec, limit):
    if spec == "slow":
        time.sleep(60)
    return os.getpid(), sorted(os.sched_getaffinity(0)), os.environ["MALLOC_ARENA_MAX"]


@pytest.mark.slow
def test_processes_are_pinned_as_workers_are(asked, monkeypatch):
    monkeypatch.setattr(probe, "_measure", _pid)
    core = min(os.sched_getaffinity(0))
    found = probe.run(asked, ["a", "b"], [core])
    assert {tuple(cores) for _, cores, _ in found} == {(core,)}
    assert {arenas for *_, arenas in found} == {workers.KEEP_MEMORY["MALLOC_ARENA_MAX"]}
    assert {pid for pid, *_ in found} != {os.getpid()}
    assert probe.run(asked, [], [core]) == []


@pytest.mark.slow
def test_a_killed_process_is_told(asked, monkeypatch):
    monkeypatch.setattr(probe, "_measure", _die)
    with pytest.raises(workers.Failed, match="killed, perhaps for want of memory: fewer --workers"):
        probe.run(asked, ["a"], [None])


@pytest.mark.slow
def test_an_interrupt_ends_the_processes_at_once(asked, monkeypatch):
    monkeypatch.setattr(probe, "_measure", _pid)
    before, began = set(multiprocessing.active_children()), time.monotonic()

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe.run(asked, ["fast", "slow"], [None], on_done=interrupt)
    # The pool's own thread waits for them too, and a child that it reaps is listed a moment longer.
    while not set(multiprocessing.active_children()) <= before:
        assert time.monotonic() - began < 50
        time.sleep(0.1)


@pytest.mark.slow
def test_what_a_trial_would_raise_is_raised(asked):
    """A plain network takes no windows."""
    broken = dataclasses.replace(asked, organisations=(("dlrm_mlp", "window"),))
    with pytest.raises(ValueError, match="window"):
        probe.run(broken, [spec_of(broken)], [None])


@pytest.mark.slow
def test_a_size_is_measured_in_another_process(asked):
    (found,) = probe.run(asked, [spec_of(asked)], [min(os.sched_getaffinity(0))], limit=2**40)
    assert found.fits and found.limit_bytes == 2**40 and 0 < found.step < 10
