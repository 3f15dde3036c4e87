"""Runs a study in worker processes on this machine, shows its progress, and writes the report.

On CPUs every worker is pinned to one core, so that a trial computes the same bits whatever the
number of workers, and two small trials at once use two cores better than one trial does.
"""

import json
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

from rankjax import baseline
from rankjax.data import event_log
from rankjax.scaling import folders, report, study

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


def keep_memory() -> None:
    """Starts this process anew with KEEP_MEMORY, which glibc reads at the start only."""
    if sys.platform == "linux" and "RANKJAX_KEEPS_MEMORY" not in os.environ:
        wanted = {**KEEP_MEMORY, **os.environ, "RANKJAX_KEEPS_MEMORY": "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


class Failed(RuntimeError):
    """A worker ended before its work was done; the message says why."""


def run(asked: study.Study, folder: pathlib.Path, *, workers: int | None = None) -> pathlib.Path:
    """Trains what the folder lacks and returns the path of its report.html.

    Last the trees of baseline.py, on the largest budget; without scikit-learn, or where they cannot
    learn, a line says so and the report too.

    Ctrl-C saves the running trials; calling `run` again goes on. workers: default one per CPU core
    that this process may use, or one where jax finds an accelerator.

    Raises:
      ValueError: the folder holds another study, or a file of the log is damaged.
      Failed: a worker failed; its traceback is part of the message.
    """
    folder = pathlib.Path(folder)
    # Once, here: a torn file would train silently.
    event_log.EventLog.open(asked.log, verify=True, shards=asked.shards or None)
    log = study.open_folder(asked, folder)
    cores = places(workers)
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
    _add_trees(log, folder)
    return write_report(folder, results)


def places(workers: int | None) -> list[int | None]:
    """The core of each worker on this machine, or None for the one that has its accelerator."""
    cores: list[int | None] = sorted(os.sched_getaffinity(0))
    if jax.default_backend() != "cpu":
        cores = [None]
    return cores[:workers] if workers else cores


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
    path = folder / "baseline.json"
    trees = json.loads(path.read_text()) if path.exists() else None
    request, timing = study.read_request(folder), study.timing(folder)
    return report.write(results, request, folder, timing=timing, trees=trees)


def write_trees(
    log: event_log.EventLog, folder: pathlib.Path, budget: int | None = None
) -> dict[str, Any]:
    """Runs the trees on a study's log, writes baseline.json and returns what it holds.

    budget: newest impressions of the train span; default: the study's largest.

    Raises:
      ValueError: the folder holds no study, or one of another log; and as `baseline.run` does.
    """
    if not (folder / "study.json").exists():
        raise ValueError(f"{folder}: found no study.json, expected the folder of a study")
    asked = study.read_request(folder)
    have, want = asked["log"], log.fingerprint
    if differing := sorted(k for k in {*have, *want} if have.get(k) != want.get(k)):
        first = differing[0]
        raise ValueError(
            f"{folder / 'study.json'}: a study of another log than {log.folder}; "
            f"{', '.join(differing)} differ: found {first}={have.get(first)}, the log has "
            f"{want.get(first)}"
        )
    budgets = asked["study"]["budgets"]
    if budget is None and None not in budgets:
        budget = max(budgets)
    found = baseline.run(log, baseline.BaselineConfig(budget=budget))
    folders.write_atomically(folder / "baseline.json", json.dumps(found, indent=1).encode())
    return found


def _add_trees(log: event_log.EventLog, folder: pathlib.Path) -> None:
    """Writes baseline.json where there is none; what keeps the trees from it stops no study."""
    screen = rich.console.Console(stderr=True)
    columns = (rich.progress.TextColumn("{task.description}"), rich.progress.TimeElapsedColumn())
    with (
        folders.locked(folder / "baseline.lock"),  # hosts that share the folder run them once
        rich.progress.Progress(*columns, console=screen, disable=not screen.is_terminal) as bars,
    ):
        if (folder / "baseline.json").exists():
            return
        bars.add_task("trees (scikit-learn) on the same features", total=None)
        try:
            write_trees(log, folder)
        except ValueError as error:
            screen.print(f"trees not run: {error}", markup=False, soft_wrap=True)


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
