"""The bill of a study: trials, FLOPs, memory and hours, by ladder and by stage."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import rich.box
import rich.markup
import rich.table

from rankjax.scaling import forecast, ladder, report, study, trial

STAGES = ("sweep", "tables", "final")
# {ladder's name: {Config: what was measured}}, of some of its sizes
Measurements = Mapping[str, Mapping[Any, forecast.Measured]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One job of the bill; seconds of one worker, nan where nothing was measured."""

    job: forecast.Job
    training_flops: float
    evaluation_flops: float
    seconds: float

    @property
    def flops(self) -> float:
        return self.training_flops + self.evaluation_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is left of a study to run. seconds: until the last of its jobs ends, on `workers`."""

    asked: study.Study
    lines: tuple[Line, ...]
    seconds: float
    workers: int
    params: Callable[[Any], int]
    measured: Measurements

    @property
    def flops(self) -> float:
        return sum(x.flops for x in self.lines)

    @property
    def hours(self) -> float:
        return self.seconds / 3600


def make(
    asked: study.Study,
    rows: study.Rows,
    params: Callable[[Any], int],
    work: Callable[[trial.Trial], forecast.Work],
    measured: Measurements,
    workers: int,
) -> Estimate:
    """The bill of what is left where `rows` are there; without times if nothing was measured.

    work: what a trial computes, as `forecast.work` says. params: of a Config.
    """
    jobs = forecast.jobs(asked, rows, params)
    works = [work(job.request.trial) for job in jobs]
    timed = [
        forecast.timed(job, one, measured.get(job.request.ladder.name, {}).values())
        for job, one in zip(jobs, works)
    ]
    wall, seconds = forecast.schedule(timed, workers)
    flops = [one.flops(job) for job, one in zip(jobs, works)]
    lines = tuple(
        Line(job=job, training_flops=f[0], evaluation_flops=f[1], seconds=s)
        for job, f, s in zip(jobs, flops, seconds)
    )
    return Estimate(
        asked=asked, lines=lines, seconds=wall, workers=workers, params=params, measured=measured
    )


def summary(bill: Estimate) -> dict[str, Any]:
    """As JSON; null where nothing was measured.

    Keys, of all, of each of "stages" and of "ladders": trials (to be trained, at most),
    trials_least, training_flops, evaluation_flops, worker_hours. A trial that ladders share counts
    in the first. Of all too: hours, workers, does_not_fit (sentences). Of a ladder: ladder, sizes,
    dense_params, and of its largest size memory_bytes, limit_bytes (of one worker), fits.
    """
    by_ladder = []
    for one in bill.asked.ladders:
        own = [x for x in bill.lines if x.job.request.ladder.name == one.name]
        by_ladder.append(
            {
                "ladder": one.name,
                "sizes": one.values,
                "dense_params": [bill.params(c) for c in one.configs],
                **_sums(own),
                **_memory(bill, one),
            }
        )
    return report.plain(
        {
            **_sums(bill.lines),
            "hours": bill.hours,
            "workers": bill.workers,
            "stages": {s: _sums(x for x in bill.lines if x.job.request.stage == s) for s in STAGES},
            "ladders": by_ladder,
            "does_not_fit": [_too_large(x) for x in by_ladder if x["fits"] is False],
        }
    )


def _sums(lines: Iterable[Line]) -> dict[str, Any]:
    lines = list(lines)
    trained = [x for x in lines if x.job.trains]
    return {
        "trials": len(trained),
        "trials_least": sum(not x.job.extra for x in trained),
        "training_flops": sum(x.training_flops for x in lines),
        "evaluation_flops": sum(x.evaluation_flops for x in lines),
        "worker_hours": sum(x.seconds for x in lines) / 3600,
    }


def _memory(bill: Estimate, one: ladder.Ladder) -> dict[str, Any]:
    found = bill.measured.get(one.name, {}).get(one.configs[-1])
    if found is None:
        return {"memory_bytes": None, "limit_bytes": None, "fits": None}
    return {
        "memory_bytes": found.memory_bytes,
        "limit_bytes": found.limit_bytes,
        "fits": found.fits,
    }


def _too_large(row: dict[str, Any]) -> str:
    size, needs = row["sizes"][-1], row["memory_bytes"]
    step = "more than there is" if needs is None else _bytes(needs)
    has = "" if row["limit_bytes"] is None else f"; a worker has {_bytes(row['limit_bytes'])}"
    return f"{row['ladder']} {size} does not fit: its training step takes {step}{has}"


def tables(found: dict[str, Any]) -> list[rich.table.Table | str]:
    """A summary for people: by ladder, by stage, and sentences."""
    ladders = _table("ladder", "sizes", "parameters", "trials", "FLOPs", "memory", "worker time")
    for row in found["ladders"]:
        ladders.add_row(
            rich.markup.escape(row["ladder"]),
            ", ".join(map(str, row["sizes"])),
            f"{max(row['dense_params']):,}",
            *(_trials(row), f"{row['training_flops'] + row['evaluation_flops']:.3g}"),
            "" if row["memory_bytes"] is None else _bytes(row["memory_bytes"]),
            _time(row["worker_hours"]),
        )
    stages = _table("stage", "trials", "training FLOPs", "evaluation FLOPs", "worker time")
    for name, row in [*found["stages"].items(), ("all", found)]:
        flops = (f"{row[x]:.3g}" for x in ("training_flops", "evaluation_flops"))
        stages.add_row(name, _trials(row), *flops, _time(row["worker_hours"]))
    return [ladders, stages, "Parameters and memory: of the largest size.", *_sentences(found)]


def _table(*columns: str) -> rich.table.Table:
    """Of which only the sizes break into lines."""
    table = rich.table.Table(box=rich.box.SIMPLE)
    for name in columns:
        table.add_column(name, no_wrap=name != "sizes", min_width=5)
    return table


def _sentences(found: dict[str, Any]) -> list[str]:
    lines = list(found["does_not_fit"])
    if found["trials_least"] < found["trials"]:
        lines.append(
            f"at least {found['trials_least']} trials, at most {found['trials']}: a size that two "
            "ladders share is one trial where both give it the same learning rate"
        )
    total = f"{found['trials']} trials, {found['training_flops']:.3g} FLOPs of training and "
    total += f"{found['evaluation_flops']:.3g} of evaluation"
    if found["hours"] is not None:
        count = found["workers"]
        total += f"; about {_time(found['hours'])} on {count} worker{'s' * (count > 1)}"
        total += ", then the trees and the report"
    return [*lines, total]


def _trials(row: dict[str, Any]) -> str:
    most, least = row["trials"], row["trials_least"]
    return str(most) if least == most else f"{least} to {most}"


def _bytes(count: float) -> str:
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1024:.3g} GiB"


def _time(hours: float | None) -> str:
    if hours is None or not math.isfinite(hours):
        return ""
    if hours < 100 / 3600:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.3g} min" if hours < 100 / 60 else f"{hours:.3g} h"
