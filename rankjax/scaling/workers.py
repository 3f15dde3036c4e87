"""Runs a study in worker processes on this machine, shows its progress, and writes the report.

On CPUs every worker is pinned to one core, so that a trial computes the same bits whatever the
number of workers, and two small trials at once use two cores better than one trial does.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
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

    Ctrl-C saves the running trials; calling `run` again goes on. A worker that is killed costs the
    steps of its trial since the last checkpoint: the others take the trial over. workers: default
    one per CPU core that this process may use, or one where jax finds an accelerator.

    Raises:
      ValueError: the folder holds another study, or a file of the log is damaged.
      Failed: a worker failed; its traceback is part of the message. Or all of them were killed.
    """
    folder = pathlib.Path(folder)
    log = begin(asked, folder)
    codes = train(asked, folder, places(workers))
    return finish(asked, folder, log, f"workers ended with exit codes {codes}, expected 0")


def begin(asked: study.Study, folder: pathlib.Path) -> event_log.EventLog:
    """What every engine does first: the log is read once from end to end (a torn file would train
    silently), and the folder made this study's. Raises ValueError, as `run` does."""
    event_log.EventLog.open(asked.log, verify=True, shards=asked.shards or None)
    return study.open_folder(asked, folder)


def finish(
    asked: study.Study, folder: pathlib.Path, log: event_log.EventLog, ended: str
) -> pathlib.Path:
    """What every engine does last: the tables, the trees and the report, whose path it returns.

    Raises Failed where trials are missing; `ended`, how the training ended, is part of the message.
    """
    results, complete = study.write_tables(asked, folder, study.params_of(asked, log))
    if not complete:
        raise Failed(f"{folder}: the study is not complete: {ended}. Run it again to go on")
    _add_trees(log, folder)
    return write_report(folder, results)


def train(
    asked: study.Study, folder: pathlib.Path, places: Sequence[int | str | None]
) -> list[int]:
    """Worker processes, one a place, until none of them has anything left to do.

    A place is the core that its worker is pinned to, or the number of the one GPU that it sees
    (text, as in CUDA_VISIBLE_DEVICES), or None. Returns the exit codes, -9 of a worker that was
    killed: the others have gone on with its trial. Where one fails (`Failed`, with its traceback),
    or at Ctrl-C, all of them save their trials and end.
    """
    os.environ |= {k: os.environ.get(k, v) for k, v in KEEP_MEMORY.items()}  # workers inherit it
    context = multiprocessing.get_context("spawn")
    processes, news = [], []
    for place in places:
        # A pipe each: of a queue that all share, a worker killed in the middle of a message would
        # keep the lock, and the others could never end.
        reader, writer = context.Pipe(duplex=False)
        args = asked, folder, place, writer, os.getpid()
        processes.append(context.Process(target=_worker, args=args, daemon=True))
        processes[-1].start()
        writer.close()  # the worker's end alone is open now
        news.append(reader)
    try:
        _watch(processes, news)
    except BaseException:  # a terminal's Ctrl-C has reached the workers already
        for p in processes:
            if p.is_alive():
                os.kill(p.pid, signal.SIGINT)
        for p in processes:
            p.join(timeout=60)
        raise
    finally:
        for p in processes:
            p.join(timeout=5)
            p.kill()
    return [p.exitcode for p in processes]


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


def _worker(
    asked: study.Study,
    folder: pathlib.Path,
    place: int | str | None,
    news: multiprocessing.connection.Connection,
    parent: int,
) -> None:
    if isinstance(place, int):
        os.sched_setaffinity(0, {place})  # before jax starts its threads
    elif place is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place  # before jax looks for devices
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to end, it saves, too
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SLURM's to the job, whose workers we may be
    said = {"trial": ""}

    def tell(*what: Any) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more; the trial goes on
            news.send(what)

    def on_trial(done: int, known: int, name: str) -> None:
        said["trial"] = name
        tell("trial", name, done, known)

    try:
        study.work(
            asked,
            folder,
            on_trial=on_trial,
            on_step=lambda done, total: tell("step", said["trial"], done, total),
            stop=lambda: os.getppid() != parent,
        )
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        tell("failed", traceback.format_exc(), 0, 0)
        sys.exit(1)


@contextlib.contextmanager
def progress() -> Iterator[rich.progress.Progress]:
    """Bars on stderr, as stdout is the result's; lines only where it is no terminal."""
    columns = (
        rich.progress.TextColumn("{task.description:<40}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    screen = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=screen, disable=not screen.is_terminal) as bars:
        yield bars


def say(bars: rich.progress.Progress, text: str) -> None:
    """A line above the bars."""
    bars.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _watch(processes: list, news: list[multiprocessing.connection.Connection]) -> None:
    """Draws progress until every worker has ended; raises if one failed."""
    with progress() as bars:
        whole = bars.add_task("trials", total=None)
        bar: dict[int, Any] = {}
        for number, said in _heard(processes, news):
            if said is None:
                if code := processes[number].exitcode:
                    say(bars, f"worker {number} ended with exit code {code}, expected 0")
                continue
            kind, text, done, total = said
            if kind == "failed":
                raise Failed(f"a worker failed:\n{text}")
            if kind == "trial":
                bars.update(whole, completed=done, total=total)
            if number not in bar:
                bar[number] = bars.add_task(text)
            step = {"completed": done, "total": total} if kind == "step" else {"completed": 0}
            bars.update(bar[number], description=text, **step)


def _heard(
    processes: list, news: list[multiprocessing.connection.Connection]
) -> Iterator[tuple[int, tuple | None]]:
    """(number of a worker, what it said) as it comes; None once for each that has ended."""
    speaking = dict(enumerate(news))
    while speaking:
        alive = {n for n in speaking if processes[n].is_alive()}  # asked first: last words are read
        ready = multiprocessing.connection.wait(list(speaking.values()), timeout=0.5)
        for number, reader in list(speaking.items()):
            said = None
            if reader in ready:
                with contextlib.suppress(EOFError, OSError):  # its end; or killed within a message
                    said = reader.recv()
            elif number in alive:
                continue
            if said is None:
                del speaking[number]
                processes[number].join()
            yield number, said
