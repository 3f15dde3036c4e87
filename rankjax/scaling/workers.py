"""Runs a study in worker processes on this machine, shows its progress, and writes the report.

On CPUs every worker is pinned to one core, so that a trial computes the same bits whatever the
number of workers, and two small trials at once use two cores better than one trial does.
"""

import multiprocessing
import os
import pathlib
import queue
import signal
import sys
import traceback
from typing import Any

import jax
import polars as pl
import rich.console
import rich.progress

from rankjax.data import event_log
from rankjax.scaling import report, study

# glibc gives a step's temporary buffer back to the system after every step once it exceeds 32 MB,
# or 64 MB in the arena of a thread, and the page faults of taking it anew cost as much as the step
# itself. A process must start with these to keep its memory. Huge pages save misses of address
# translation where a batch reads rows all over a large table.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "67108864",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class Failed(RuntimeError):
    """A worker ended before its work was done; the message says why."""


def run(asked: study.Study, folder: pathlib.Path, *, workers: int | None = None) -> pathlib.Path:
    """Trains what the folder lacks and returns the path of its report.html.

    Ctrl-C saves the running trials; calling `run` again goes on. workers: default one per CPU core
    that this process may use, or one where jax finds an accelerator.

    Raises:
      ValueError: the folder holds another study, or a file of the log is damaged.
      Failed: a worker failed; its traceback is part of the message.
    """
    folder = pathlib.Path(folder)
    event_log.EventLog.open(asked.log, verify=True)  # once, here: a torn file would train silently
    log = study.open_folder(asked, folder)
    cores: list[int | None] = sorted(os.sched_getaffinity(0))
    if jax.default_backend() != "cpu":
        cores = [None]
    cores = cores[:workers] if workers else cores
    os.environ |= {k: os.environ.get(k, v) for k, v in KEEP_MEMORY.items()}  # workers inherit it
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    processes = [
        context.Process(target=_worker, args=(asked, folder, core, news, os.getpid()), daemon=True)
        for core in cores
    ]
    for p in processes:
        p.start()
    try:
        _watch(processes, news)
    except (KeyboardInterrupt, Failed):
        for p in processes:  # each saves its trial; a terminal's Ctrl-C has reached it already
            if p.is_alive():
                os.kill(p.pid, signal.SIGINT)
        for p in processes:
            p.join(timeout=60)
        raise
    finally:
        for p in processes:
            p.join(timeout=5)
            p.kill()
    results, complete = study.write_tables(asked, folder, study.params_of(asked, log))
    if not complete:
        raise Failed(f"{folder}: the workers stopped before the study was complete")
    return write_report(folder, results)


def write_report(folder: pathlib.Path, results: pl.DataFrame | None = None) -> pathlib.Path:
    """Writes report.html and summary.json of a study from its tables; returns the report's path.

    Raises:
      ValueError: the folder holds no study.
    """
    folder = pathlib.Path(folder)
    for name in ("study.json", "results.parquet", "timing.parquet"):
        if not (folder / name).exists():
            raise ValueError(f"{folder}: found no {name}, expected the folder of a study")
    if results is None:
        results = pl.read_parquet(folder / "results.parquet")
    return report.write(results, study.read_request(folder), folder, timing=study.timing(folder))


def _worker(asked: study.Study, folder: pathlib.Path, core: int | None, news: Any, parent: int):
    if core is not None:
        os.sched_setaffinity(0, {core})  # before jax starts its threads
    said = {"trial": ""}

    def on_trial(done: int, known: int, name: str) -> None:
        said["trial"] = name
        news.put(("trial", core, name, done, known))

    try:
        study.work(
            asked,
            folder,
            on_trial=on_trial,
            on_step=lambda done, total: news.put(("step", core, said["trial"], done, total)),
            stop=lambda: os.getppid() != parent,
        )
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        news.put(("failed", core, traceback.format_exc(), 0, 0))
        sys.exit(1)


def _watch(processes: list, news: Any) -> None:
    """Draws progress until every worker has ended; raises if one failed."""
    columns = (
        rich.progress.TextColumn("{task.description:<40}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    screen = rich.console.Console(stderr=True)  # stdout is the result's
    with rich.progress.Progress(*columns, console=screen, disable=not screen.is_terminal) as bars:
        whole = bars.add_task("trials", total=None)
        bar: dict[Any, Any] = {}
        while True:
            alive = any(p.is_alive() for p in processes)  # asked first: last words are still read
            try:
                kind, core, text, done, total = news.get(timeout=0.5)
            except queue.Empty:
                if not alive:
                    break
                continue
            if kind == "failed":
                raise Failed(f"a worker failed:\n{text}")
            if kind == "trial":
                bars.update(whole, completed=done, total=total)
            if core not in bar:
                bar[core] = bars.add_task(text)
            step = {"completed": done, "total": total} if kind == "step" else {"completed": 0}
            bars.update(bar[core], description=text, **step)
    codes = [p.exitcode for p in processes]
    if any(codes):
        raise Failed(f"workers ended with exit codes {codes}, expected 0")
