"""A study whose trials can be killed in the middle, and which process trains which of them."""

import os
import pathlib
import time

from rankjax import embedding, train
from rankjax.models import dlrm
from rankjax.scaling import ladder, study

DEADLINE = 120.0  # seconds


def asked(log: pathlib.Path, widths: tuple[int, ...] = (4, 8), **options: object) -> study.Study:
    """One trial a width; every step of it is a line of metrics and a checkpoint."""
    base = {
        "ladders": (ladder.along(dlrm.Config(layers=1, width=4, tasks=2), width=widths),),
        "history": 5,
        "learning_rates": (1e-2,),
        "table_rates": (0.1,),
        "embedding_stds": (0.1,),
        "training": train.TrainConfig(
            batch=24, log_every=1, checkpoint_seconds=0.0, tables=embedding.TableConfig(width=4)
        ),
    }
    return study.Study(log=str(log), **(base | options))


def in_the_middle(folder: pathlib.Path) -> tuple[pathlib.Path, int]:
    """(folder, process) of a trial of the study that has saved a checkpoint and goes on."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        for saved in (folder / "trials").glob("*/checkpoints/*"):
            home = saved.parents[1]
            trained = not (home / "result.json").exists() and saved.name.isdigit()
            if trained and (pid := holder(home / "lock")) is not None:
                return home, pid
        time.sleep(0.02)
    raise TimeoutError(f"{folder}: no trial saved a checkpoint in {DEADLINE:.0f} s")


def holder(path: pathlib.Path) -> int | None:
    """The process, not this one, that has a file open."""
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if any(os.readlink(fd) == str(path) for fd in (entry / "fd").iterdir()):
                    return int(entry.name)
            except OSError:  # it has ended, or is another user's
                continue
    return None


def saved_lines(home: pathlib.Path) -> list[str]:
    """Lines of metrics up to the newest checkpoint. They hold wall times, so that a trial that was
    trained again from its start has others."""
    newest = max(int(p.name) for p in (home / "checkpoints").iterdir() if p.name.isdigit())
    return (home / "metrics.jsonl").read_text().splitlines()[:newest]


def begun(folder: pathlib.Path) -> pathlib.Path:
    """The folder of a trial of the study that has learned from some batches."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        for lines in (folder / "trials").glob("*/metrics.jsonl"):
            if lines.stat().st_size:
                return lines.parent
        time.sleep(0.02)
    raise TimeoutError(f"{folder}: no trial began in {DEADLINE:.0f} s")
