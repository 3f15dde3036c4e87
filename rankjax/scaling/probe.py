"""A few real steps of a few sizes, timed as the study's own workers would run them.

Each probe runs on a worker's footing: a process of its own, pinned to one core on CPUs, with the
same settings of the allocator, and as many at once as there are workers, so that they share caches
and memory as those do. The caller's process computes nothing.
"""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rankjax import batch as batch_module
from rankjax import step, train
from rankjax.data import event_log, loader
from rankjax.layers import stack
from rankjax.scaling import forecast, study, trial, workers

STEPS = (6, 200)  # timed, at least and at most
SECONDS = 1.0  # and between these so long
WARM = 2  # steps before the first that counts
TIMES = ("step", "compile", "score", "score_compile", "begin")


def run(
    asked: study.Study,
    specs: Sequence[trial.Trial],
    places: Sequence[int | None],
    limit: int | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> list[forecast.Measured]:
    """Measures these trials' sizes, in one process a place (`workers.places`).

    limit: bytes that a process may take; None = what its device says, if it does.

    Raises:
      workers.Failed: a process was killed.
      ValueError: what a trial would raise, as for samples that a model does not take.
    """
    if not specs:
        return []
    os.environ |= {k: os.environ.get(k, v) for k, v in workers.KEEP_MEMORY.items()}
    context = multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    for place in places:
        free.put(place)
    before = set(multiprocessing.active_children())
    count = min(len(places), len(specs))
    pool = concurrent.futures.ProcessPoolExecutor(count, context, _begin, (free,))
    try:
        futures = [pool.submit(_measure, asked, spec, limit) for spec in specs]
        for future in concurrent.futures.as_completed(futures):
            future.result()
            on_done()
        return [future.result() for future in futures]
    except concurrent.futures.process.BrokenProcessPool as error:
        raise workers.Failed(
            f"one of {count} processes that measured steps was killed, perhaps for want of memory: "
            "fewer --workers, or a smaller --batch"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.kill()  # after Ctrl-C or a failure it may be in the middle of a step


def _begin(free: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends us
    place = free.get()
    if place is not None:
        os.sched_setaffinity(0, {place})  # before jax starts its threads


def _measure(asked: study.Study, spec: trial.Trial, limit: int | None) -> forecast.Measured:
    log = event_log.EventLog.open(asked.log, counters=asked.counters, shards=asked.shards or None)
    return measure(spec, log, limit)


def measure(
    spec: trial.Trial, log: event_log.EventLog, limit: int | None = None
) -> forecast.Measured:
    """Compiles a trial's training step at its largest shape, for the memory, and at its usual one,
    and there times some steps and some scorings in this process, if that fits into `limit` bytes.

    Logits are fetched after each step, where training fetches those of many at once: on an
    accelerator the seconds of small models come out too long.
    """
    train_samples = trial.samples_of(log, spec.samples, "train", spec.budget)
    epoch = train.batches(log, spec.training, train_samples)
    todo, first = _clocked(lambda: forecast.work(spec, log))
    shape = forecast.usual(todo.steps)
    scoring = todo.scoring["validation"]
    largest = max(todo.steps, key=lambda x: todo.steps[x][1])
    prog = train.program(spec.model, log.schema, spec.training)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit") if limit is None else limit
    memory, times = None, dict.fromkeys(TIMES, math.nan)
    try:
        compiled, took = _compiled(spec, prog, _first(epoch, largest))
        memory = _bytes(compiled)
        if limit is None or memory <= limit:
            batch = _first(epoch, shape)
            if shape != largest:
                took = _compiled(spec, prog, batch)[1]
            times = {"compile": took, **_timed(spec, prog, log, epoch, batch)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
    return forecast.Measured(
        flops=todo.steps[shape][1],
        score_flops=scoring[forecast.usual(scoring)][1],
        first=first,
        memory_bytes=memory,
        limit_bytes=limit,
        **times,
    )


def _clocked(work: Callable[[], Any]) -> tuple[Any, float]:
    """(what it returns, seconds that it takes)."""
    began = time.monotonic()
    return jax.block_until_ready(work()), time.monotonic() - began


def _first(batches: loader.Batches, shape: forecast.Shape) -> batch_module.Batch:
    """The first batch of this shape."""
    at = next(i for i in range(len(batches)) if batches.shape(i) == shape[1:])
    return batches[at].without_impression()


def _compiled(
    spec: trial.Trial, prog: step.Program, batch: batch_module.Batch
) -> tuple[jax.stages.Compiled, float]:
    """The training step, compiled from shapes alone, and the seconds that it took. A call of it
    with arrays of these shapes does not compile again."""
    make = functools.partial(step.fresh, spec.model, batch.schema, spec.training, None, stack.PLAIN)
    state = jax.eval_shape(make, jax.random.key(0), batch)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), batch)
    rates, key = train.rates_of(spec.training, 1)(0), jax.random.key(0)
    return _clocked(lambda: prog.step.lower(state, shapes, rates, key).compile())


def _bytes(compiled: jax.stages.Compiled) -> int:
    """That a step needs at once; what comes out of the donated state lies where it came in."""
    found = compiled.memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.argument_size_in_bytes + new + found.temp_size_in_bytes)


def _timed(
    spec: trial.Trial,
    prog: step.Program,
    log: event_log.EventLog,
    epoch: loader.Batches,
    batch: batch_module.Batch,
) -> dict[str, float]:
    """The seconds that need a state: TIMES without "compile"."""
    state, begin = _clocked(lambda: train.init(spec.model, log.schema, spec.training, batch))
    rates, key = train.rates_of(spec.training, len(epoch)), jax.random.key(spec.training.seed)

    def learn(at: int, batch: batch_module.Batch) -> None:
        nonlocal state
        state, out = prog.step(state, batch, rates(at), key)
        np.asarray(out["logits"])

    paced = _pace(epoch, batch, learn)
    in_time = dataclasses.replace(spec.training, order="time")
    held_out = trial.samples_of(log, spec.samples, "validation", None)
    batches = train.batches(log, in_time, held_out)
    batch = _first(batches, forecast.usual(forecast.shapes(batches)))
    score = functools.partial(prog.score, state.params, state.tables)
    _, compiling = _clocked(lambda: score(batch))
    scored = _pace(batches, batch, lambda _, batch: np.asarray(score(batch)))
    return {"begin": begin, "step": paced, "score_compile": compiling, "score": scored}


def _pace(
    batches: loader.Batches,
    like: batch_module.Batch,
    do: Callable[[int, batch_module.Batch], Any],
) -> float:
    """Mean seconds of a batch of this shape, its gathering included, after the first WARM."""
    spent: list[float] = []
    last = time.monotonic()
    for at, batch in loader.stream(batches):
        if _shape(batch) == _shape(like):  # another would compile
            do(at, batch.without_impression())
            spent.append(time.monotonic() - last)
        last = time.monotonic()
        count, seconds = len(spent) - WARM, sum(spent[WARM:])
        if count >= STEPS[1] or (count >= STEPS[0] and seconds >= SECONDS):
            break
    return float(np.mean(spent[min(WARM, len(spent) - 1) :]))


def _shape(batch: batch_module.Batch) -> forecast.Shape:
    return *batch.history_sample.shape, batch.candidate_sample.shape[1]
