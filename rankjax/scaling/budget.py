"""What a study may cost: the sizes that a budget leaves, before anything is trained."""

import dataclasses
import math
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import rich
import rich.console
import rich.progress

from rankjax import memory
from rankjax.data import event_log
from rankjax.scaling import estimate, forecast, ladder, probe, study, support, trial, workers

NOTHING: study.Rows = {}
LEAST = support.MIN_SIZES - 1  # sizes of a ladder: a straight line needs them to show its error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spending:
    """What is asked on the command line. Raises ValueError for a budget that is not above 0."""

    # Print what the study takes, and train nothing.
    dry_run: bool = False
    # Leave out the largest sizes until all trials take at most so many FLOPs, evaluation included.
    max_flops: float | None = None
    # The same until they take at most so many hours, of this machine with these workers.
    max_hours: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_flops", "max_hours"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"study: found {flag} {value:g}, expected a number above 0")

    @property
    def limited(self) -> bool:
        return self.max_flops is not None or self.max_hours is not None

    def check(self, engine: str) -> None:
        """Raises ValueError where hours are to be told of an engine that trains elsewhere."""
        flag = "--dry-run" if self.dry_run else "--max-hours"
        if engine != "local" and (self.dry_run or self.max_hours is not None):
            raise ValueError(
                f"study: found {flag} with --engine {engine}, expected --engine local: hours are "
                "measured on this machine"
            )

    def shares(self, bill: estimate.Estimate) -> dict[str, float]:
        """{"flops", "hours": of each budget, how much of it the bill takes}, 1 = all."""
        found = {"flops": (bill.flops, self.max_flops), "hours": (bill.hours, self.max_hours)}
        return {name: value / most for name, (value, most) in found.items() if most is not None}


def choose(
    asked: study.Study, spending: Spending, price: Callable[[study.Study], estimate.Estimate]
) -> tuple[study.Study, list[str]]:
    """The study with as many sizes as the budget pays, and the names of those left out.

    While the bill is too high, the costliest of the ladders' largest sizes goes: in FLOPs or in
    seconds, whichever budget is exceeded by more. First of ladders that keep the sizes a power law
    with a floor needs (support.MIN_SIZES), then of those that keep LEAST, enough for a line.

    Raises:
      ValueError: with LEAST sizes in every ladder it is still too high; names the least bill. Or
        hours are to be kept and no time is known.
    """
    dropped: list[str] = []
    while True:
        bill = price(asked)
        shares = spending.shares(bill)
        if not all(math.isfinite(x) for x in shares.values()):
            raise ValueError(
                "study: no time is known, as the sizes of a ladder do not fit into memory; expected"
                " none with --max-hours"
            )
        tight = max(shares, key=shares.get)
        if shares[tight] <= 1:
            return asked, dropped
        left = [x for x in asked.ladders if len(x.configs) > LEAST]
        if not left:
            raise ValueError(_too_little(spending, bill))
        left = [x for x in left if len(x.configs) > support.MIN_SIZES] or left
        one = max(left, key=lambda x: _cost(bill, x, tight))
        dropped.append(f"{one.name} {one.values[-1]}")
        shorter = dataclasses.replace(one, configs=one.configs[:-1])
        ladders = tuple(shorter if x is one else x for x in asked.ladders)
        asked = dataclasses.replace(asked, ladders=ladders)


def _cost(bill: estimate.Estimate, one: ladder.Ladder, what: str) -> float:
    """What the trials of a ladder's largest size cost."""
    top = len(one.configs) - 1
    mine = [
        x for x in bill.lines
        if x.job.request.ladder.name == one.name and x.job.request.size == top
    ]  # fmt: skip
    return sum(x.flops if what == "flops" else x.seconds for x in mine)


def _too_little(spending: Spending, bill: estimate.Estimate) -> str:
    wanted = {"--max-flops": spending.max_flops, "--max-hours": spending.max_hours}
    wanted = " ".join(f"{flag} {x:g}" for flag, x in wanted.items() if x is not None)
    least = f"{_rounded_up(bill.flops)} FLOPs"
    if spending.max_hours is not None:
        least += f", about {_rounded_up(bill.hours)} hours on {bill.workers} worker(s)"
    return (
        f"study: found {wanted}, but with {LEAST} sizes in every ladder, the fewest that can be "
        f"fitted, it takes {least}; expected at least that, or fewer architectures, ladders, data "
        "budgets, seeds or rates"
    )


def _rounded_up(value: float) -> str:
    """Four digits, of a budget that is enough."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3) if value else 1.0
    return f"{math.ceil(value / unit) * unit:.4g}"


def kept(asked: study.Study, folder: pathlib.Path) -> tuple[study.Study, bool]:
    """(the study with the sizes of the one in the folder, whether one is there).

    So that the same command goes on with the same study, although it measures other seconds. A
    study there whose ladders are no beginnings of these leaves `asked` as it is, to be refused.
    """
    if not (folder / "study.json").exists():
        return asked, False
    there = study.read_request(folder)["study"]["ladders"]
    if len(there) != len(asked.ladders):
        return asked, True
    ladders = tuple(
        dataclasses.replace(one, configs=one.configs[: len(entry["configs"])])
        for one, entry in zip(asked.ladders, there)
    )
    shorter = dataclasses.replace(asked, ladders=ladders)
    return (shorter if shorter.describe()["ladders"] == there else asked), True


def opened(asked: study.Study, folder: pathlib.Path) -> event_log.EventLog:
    """As `study.open_folder`, and raises as it does, but leaves the folder as it is."""
    with tempfile.TemporaryDirectory() as copy:
        if (folder / "study.json").exists():
            shutil.copy(folder / "study.json", copy)
        try:
            return study.open_folder(asked, pathlib.Path(copy))
        except ValueError as error:
            raise ValueError(str(error).replace(copy, str(folder))) from error


def prepare(
    asked: study.Study,
    folder: pathlib.Path,
    spending: Spending,
    *,
    count: int | None = None,
) -> tuple[study.Study, dict[str, Any]]:
    """(the study within its budget, the bill of what the folder lacks).

    Writes nothing. FLOPs are counted here; for a dry run or hours, the smallest and the largest
    size of each ladder are measured, in processes like the `count` workers. In a folder that holds
    a study the sizes are those chosen there. The bill: `estimate.summary`, and "dropped", the sizes
    left out now.

    Raises:
      ValueError: as `choose` and `study.open_folder`; or the folder's study is above --max-flops.
      workers.Failed: a process that measured was killed.
    """
    folder = pathlib.Path(folder)
    asked, resumed = kept(asked, folder) if spending.limited else (asked, False)
    log = opened(asked, folder)
    params, work = study.params_of(asked, log), _remembered(log)
    places, rows = workers.places(count), study.load_rows(folder)[0]
    measured: dict[str, dict[Any, forecast.Measured]] = {}

    def price(one: study.Study, rows: study.Rows = NOTHING) -> estimate.Estimate:
        return estimate.make(one, rows, params, work, measured, len(places))

    dropped: list[str] = []
    if spending.max_flops is not None:
        if resumed:
            _check_flops(folder, price(asked).flops, spending.max_flops)
        else:
            asked, dropped = choose(asked, dataclasses.replace(spending, max_hours=None), price)
    hours = spending.max_hours is not None and not resumed
    while spending.dry_run or hours:
        left = {x.job.request.ladder.name for x in price(asked, rows).lines}
        _measure_ends(asked, left, places, measured)
        shorter, more = choose(asked, spending, price) if hours else (asked, [])
        dropped += more
        if shorter == asked:
            break
        asked = shorter
    if resumed:
        only = "" if spending.max_hours is None else "; --max-hours chooses those of a new study"
        _say(f"{folder}: goes on with the sizes that its study.json holds{only}")
    if dropped:
        _say(f"left out for the budget: {', '.join(dropped)}")
    return asked, {**estimate.summary(price(asked, rows)), "dropped": dropped}


def _check_flops(folder: pathlib.Path, found: float, most: float) -> None:
    if found > most:
        raise ValueError(
            f"{folder}: found a study of {found:.3g} FLOPs, expected at most --max-flops {most:g}; "
            "a smaller one needs another folder"
        )


def _remembered(log: event_log.EventLog) -> Callable[[trial.Trial], forecast.Work]:
    """`forecast.work`, counted once for all rates and seeds."""
    found: dict[Any, forecast.Work] = {}

    def work(spec: trial.Trial) -> forecast.Work:
        key = spec.model, spec.samples, spec.budget
        if key not in found:
            found[key] = forecast.work(spec, log)
        return found[key]

    return work


def _measure_ends(
    asked: study.Study,
    names: set[str],
    places: list[int | None],
    measured: dict[str, dict[Any, forecast.Measured]],
) -> None:
    """Measures the smallest and the largest size of these ladders, where that is not done yet."""
    ladders = [x for x in asked.ladders if x.name in names]
    ends = dict.fromkeys(c for x in ladders for c in (x.configs[0], x.configs[-1]))
    ends = [c for c in ends if all(c not in m for m in measured.values())]
    rate = lambda c: asked.rates_of(ladder.architecture_of(c))
    specs = [
        asked.trial(
            config,
            rate=rate(config)[len(rate(config)) // 2],
            table_rate=asked.table_rates[0],
            std=asked.embedding_stds[0],
            budget=asked.largest_budget,
            seed=asked.seeds[0],
        )
        for config in ends
    ]
    available = memory.of_machine()[1]
    limit = None if available is None or places == [None] else available // len(places)
    if not specs:
        return
    screen = rich.console.Console(stderr=True)
    _say(f"measuring {len(specs)} sizes, {len(places)} at a time")
    with rich.progress.Progress(console=screen, disable=not screen.is_terminal) as bars:
        bar = bars.add_task("sizes measured", total=len(specs))
        found = probe.run(asked, specs, places, limit, lambda: bars.advance(bar))
    for config, one in zip(ends, found):
        for of in asked.ladders:
            if config in of.configs:
                measured.setdefault(of.name, {})[config] = one


def _say(text: str) -> None:
    print(f"study: {text}", file=sys.stderr)
