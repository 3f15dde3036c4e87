"""A study: ladders x architectures x budgets x seeds in one folder, resumable, shared by processes.

    study.json       what was asked, and the fingerprint of the log
    trials/<id>/     one folder a trial: trial.json, metrics.jsonl, checkpoints, result.json
    results.parquet  one row a trial and role; equal whenever the same study is run again
    timing.parquet   wall times
    baseline.json    gradient-boosted trees on the same features, where scikit-learn is there

What is still to be trained is a pure function of the study and the rows that exist (`requests`), so
a killed study goes on where it stopped, and several processes or hosts may work on one folder: a
trial is claimed by a lock on its folder that the system frees when its holder dies.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from rankjax import train
from rankjax.data import event_log, samples
from rankjax.scaling import fit, folders, ladder, sizes, trial


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What to train.

    Learning rates are swept at the smallest and the largest size of each ladder with one seed at
    the largest budget and interpolated between; at each architecture's smallest size the table
    rates x embedding scales are tried at its best rate, and the choice is kept along its ladders.
    All choices are made on the validation span; only the final trials read the test span.

    learning_rates: for all architectures, or pairs (architecture, rates); one rate = no sweep.
    organisations: pairs (architecture, organisation of samples); default "request".
    history: S of architectures whose Config has no `history` field.
    budgets: newest n valid impressions of the train span; None = all of them.
    """

    log: str
    ladders: tuple[ladder.Ladder, ...]
    budgets: tuple[int | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[Any, ...] = (1e-3, 3e-3, 9e-3)
    table_rates: tuple[float, ...] = (0.05, 0.1, 0.2)
    embedding_stds: tuple[float, ...] = (0.01, 0.05)
    organisations: tuple[tuple[str, str], ...] = ()
    history: int = 50
    max_candidates: int = 32
    max_realtime: int = 100
    window: int = 86400
    training: train.TrainConfig = train.TrainConfig()
    counters: bool = True  # False: without the log's counters (data/counters.py)
    shards: tuple[int, ...] = ()  # of a log in shards, those to use; () = all
    command: str = ""  # printed in the report

    def rates_of(self, architecture: str) -> tuple[float, ...]:
        pairs = {k: v for k, v in (x for x in self.learning_rates if isinstance(x, tuple))}
        plain = tuple(x for x in self.learning_rates if not isinstance(x, tuple))
        rates = tuple(pairs.get(architecture, plain))
        if not rates:
            raise ValueError(
                f"study: found learning rates for {sorted(pairs)}, expected some for {architecture}"
            )
        return tuple(sorted(rates))

    def samples_of(self, config: Any) -> samples.SampleConfig:
        organisation = dict(self.organisations).get(ladder.architecture_of(config), "request")
        history = dataclasses.asdict(config).get("history", self.history)
        return samples.SampleConfig(
            organisation=organisation,
            history=history,
            max_candidates=self.max_candidates,
            max_realtime=self.max_realtime,
            window=self.window,
        )

    def trial(
        self, config: Any, *,
        rate: float, table_rate: float, std: float, budget: int | None, seed: int,
    ) -> trial.Trial:  # fmt: skip
        base = self.training
        optimizer = dataclasses.replace(base.optimizer, learning_rate=rate)
        tables = dataclasses.replace(base.tables, learning_rate=table_rate, init_std=std)
        return trial.Trial(
            model=config,
            training=dataclasses.replace(base, seed=seed, optimizer=optimizer, tables=tables),
            samples=self.samples_of(config),
            budget=budget,
        )

    @property
    def largest_budget(self) -> int | None:
        return None if None in self.budgets else max(self.budgets)

    def describe(self) -> dict[str, Any]:
        """What `study.json` holds; two studies with equal descriptions are the same study."""
        described = dataclasses.asdict(self)
        for key in ("log", "command", "counters", "shards"):  # the log's fingerprint tells the rest
            del described[key]
        for key in ("checkpoint_seconds", "log_every"):
            del described["training"][key]
        del described["training"]["tables"]["pack"]
        for entry, one in zip(described["ladders"], self.ladders):
            entry["configs"] = [ladder.identity(c) for c in one.configs]
        return json.loads(json.dumps(described))


@dataclasses.dataclass(frozen=True)
class Request:
    """A row that the study wants: a trial in the role that it plays there."""

    trial: trial.Trial
    stage: str  # "sweep", "tables" or "final"
    ladder: ladder.Ladder
    size: int
    chosen: bool = False

    @property
    def test(self) -> bool:
        return self.stage == "final"


Rows = dict[str, dict[str, Any]]  # trial id -> result


def requests(study: Study, rows: Rows, params: Callable[[Any], int]) -> tuple[list[Request], bool]:
    """All rows that can be named so far, and whether that is all of them.

    Choices wait for the rows that they are made on: sweep at the smallest size, then tables there,
    then the sweeps at the ends of every ladder, then the final trials. `params(config)` orders
    sizes. Pure: the same study and rows give the same requests.
    """
    found, complete = [], True
    for name in dict.fromkeys(x.architecture for x in study.ladders):
        ladders = [x for x in study.ladders if x.architecture == name]
        more, done = _requests_of(study, ladders, rows, params)
        found += more
        complete &= done
    return found, complete


def _requests_of(
    study: Study, ladders: list[ladder.Ladder], rows: Rows, params: Callable[[Any], int]
) -> tuple[list[Request], bool]:
    found: list[Request] = []
    home = min(ladders, key=lambda x: min(map(params, x.configs)))
    small = min(home.configs, key=params)
    rates = study.rates_of(home.architecture)
    tables, stds = study.table_rates, study.embedding_stds
    middle = (tables[len(tables) // 2], stds[-1])

    def sweep(one: ladder.Ladder, config: Any, table: tuple[float, float], over, stage) -> Any:
        """Asks for the trials of one choice; returns the best of `over`, or None if rows miss."""
        if len(over) == 1:
            return over[0]
        losses = []
        for rate, table_rate, std in (
            (r, *table) if stage == "sweep" else (table[0], *r) for r in over
        ):
            same = {"budget": study.largest_budget, "seed": study.seeds[0]}
            spec = study.trial(config, rate=rate, table_rate=table_rate, std=std, **same)
            found.append(Request(spec, stage, one, one.configs.index(config)))
            row = rows.get(spec.id)
            losses.append(None if row is None else _loss(row))
        if None in losses:
            return None
        return over[losses.index(min(losses))]

    first_rate = sweep(home, small, middle, rates, "sweep")
    if first_rate is None:
        return found, False
    pairs = [(t, s) for t in tables for s in stds]
    table = sweep(home, small, (first_rate,), pairs, "tables")
    if table is None:
        return found, False
    complete = True
    for one in ladders:
        ends = []
        for config in (one.configs[0], one.configs[-1]):
            if config == small:
                ends.append(first_rate)
            else:
                ends.append(sweep(one, config, table, rates, "sweep"))
        if None in ends:
            complete = False
            continue
        for size, config in enumerate(one.configs):
            rate = fit.interpolate_rate((one.values[0], one.values[-1]), *ends, one.values[size])
            rate = float(f"{float(rate):.6g}")  # the same trial id whatever the last bits
            for budget in study.budgets:
                for seed in study.seeds:
                    chosen = {"rate": rate, "table_rate": table[0], "std": table[1]}
                    spec = study.trial(config, **chosen, budget=budget, seed=seed)
                    found.append(Request(spec, "final", one, size, chosen=True))
    return found, complete


def _loss(row: dict[str, Any]) -> float:
    """What choices minimise; a trial that diverged loses to every other."""
    return math.inf if row["validation_ne"] is None else row["validation_ne"]


def missing(request: Request, rows: Rows) -> bool:
    """A row counts as done once it has what its role asks for."""
    row = rows.get(request.trial.id)
    return row is None or (request.test and not row["test_read"])


def params_of(study: Study, log: event_log.EventLog) -> Callable[[Any], int]:
    """Config -> number of dense parameters on this log."""
    width = study.training.tables.width
    return lambda config: sizes.dense_params(config, log.schema, width)


def open_folder(study: Study, folder: pathlib.Path) -> event_log.EventLog:
    """Creates or checks the folder's study.json.

    Raises:
      ValueError: the folder holds another study, or one of another log; names what differs. Or a
        budget is larger than the train span.
    """
    log = event_log.EventLog.open(study.log, counters=study.counters, shards=study.shards or None)
    most = int(np.count_nonzero(log.column("impressions", "span") == 0))
    if too_large := [b for b in study.budgets if b is not None and not 0 < b <= most]:
        raise ValueError(
            f"study: found budgets {too_large}, expected 1 .. {most}, the impressions of the train "
            f"span of {log.folder}, or None for all of them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"study": study.describe(), "log": log.fingerprint}
    path = folder / "study.json"
    with folders.locked(folder / "study.lock"):
        if not path.exists():
            notes = {"notes": n} if (n := log.info.get("notes")) else {}
            text = json.dumps({**asked, **notes, "command": study.command}, indent=1)
            folders.write_atomically(path, text.encode())
            return log
    found = json.loads(path.read_text())
    for part, want in asked.items():
        have = found[part]
        if have != want:
            keys = sorted(k for k in {*have, *want} if have.get(k) != want.get(k))
            first = keys[0]
            raise ValueError(
                f"{path}: another {part} lies here; {', '.join(keys)} differ: found "
                f"{first}={have.get(first)}, expected {want.get(first)}. Use another folder, or "
                "the settings of this one."
            )
    return log


def load_rows(folder: pathlib.Path) -> tuple[Rows, Rows]:
    """(results, timings) by trial id: from results.parquet, and newer ones from trials/."""
    results, timings = {}, {}
    for name, into in (("results", results), ("timing", timings)):
        if (folder / f"{name}.parquet").exists():
            # Read at once: polars opens a path twice, and another worker may replace it between.
            table = pl.read_parquet((folder / f"{name}.parquet").read_bytes())
            for row in table.to_dicts():
                # Rows of choices hide the test span; the same trial's final row has it.
                if row["trial"] not in into or row.get("stage") == "final":
                    into[row["trial"]] = row
    for path in sorted((folder / "trials").glob("*/result.json")):
        done = json.loads(path.read_text())
        results[done["result"]["trial"]] = done["result"]
        timings[done["result"]["trial"]] = done["timing"]
    return results, timings


def read_request(folder: pathlib.Path) -> dict[str, Any]:
    """What study.json holds: {"study": ..., "log": fingerprint, "command": ...}, and "notes"
    where the log has sentences that every report must show."""
    return json.loads((folder / "study.json").read_text())


def timing(folder: pathlib.Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "timing.parquet")


def write_tables(
    study: Study, folder: pathlib.Path, params: Callable[[Any], int]
) -> tuple[pl.DataFrame, bool]:
    """Writes results.parquet and timing.parquet from all finished trials; (results, complete)."""
    with folders.locked(folder / "study.lock"):
        rows, timings = load_rows(folder)
        wanted, complete = requests(study, rows, params)
        table = []
        for r in wanted:
            if not missing(r, rows):
                table.append(_row(r, rows[r.trial.id]))
        results = pl.DataFrame(table, infer_schema_length=None)
        if table:
            order = ["ladder", "stage", "size", "budget", "learning_rate", "seed", "trial"]
            results = results.unique().sort(order, nulls_last=True)
        used = {r["trial"] for r in table}
        timing = pl.DataFrame([timings[t] for t in sorted(used)], infer_schema_length=None)
        for name, frame in (("results", results), ("timing", timing)):
            temporary = folder / f".{name}.{os.getpid()}"
            frame.write_parquet(temporary)
            temporary.rename(folder / f"{name}.parquet")
    return results, complete and len({r.trial.id for r in wanted} - used) == 0


def _row(request: Request, result: dict[str, Any]) -> dict[str, Any]:
    row = {
        **result,
        "stage": request.stage,
        "chosen": request.chosen,
        "ladder": request.ladder.name,
        "axis": request.ladder.axis,
        "axis_value": request.ladder.values[request.size],
        "size": request.size,
    }
    if not request.test:  # what a choice was made on must not show the test span
        row |= {k: None for k in row if k.startswith("test_") and k != "test_read"}
    return row


def work(
    study: Study,
    folder: pathlib.Path,
    *,
    on_trial: Callable[[int, int, str], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains what the folder lacks, until nothing is left that this process can do.

    Returns True when the study is complete. Trials claimed by other processes are waited for.
    """
    log = open_folder(study, folder)
    params = params_of(study, log)
    last: Any = None
    while not stop():
        rows, _ = load_rows(folder)
        todo, known, complete = left(study, rows, params)
        if not todo and complete:
            return write_tables(study, folder, params)[1]
        # What is compiled already first: seeds, rates and budgets share one program.
        for request in sorted(todo.values(), key=lambda r: (r.trial.model != last, r.test)):
            tell = on_trial and functools.partial(on_trial, len(rows), known)
            if attempt(study, folder, request, log, params, tell, on_step):
                last = request.trial.model
                break
        else:
            time.sleep(0.5)
    return False


def left(
    study: Study, rows: Rows, params: Callable[[Any], int]
) -> tuple[dict[str, Request], int, bool]:
    """({id: trial still to be trained}, those of choices first; how many trials are known so far;
    whether that is all of them)."""
    wanted, complete = requests(study, rows, params)
    todo = {r.trial.id: r for r in sorted(wanted, key=lambda r: r.test) if missing(r, rows)}
    return todo, len({r.trial.id for r in wanted}), complete


def attempt(
    study: Study,
    folder: pathlib.Path,
    request: Request,
    log: event_log.EventLog,
    params: Callable[[Any], int],
    on_trial: Callable[[str], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> bool:
    """Trains one trial; False where another process has it, or has finished it."""
    home = folder / "trials" / request.trial.id
    with folders.claimed(home) as mine:
        if not mine or not missing(request, load_rows(folder)[0]):
            return False
        if on_trial:
            on_trial(request.trial.id)
        _finish(request, log, home, on_step)
        write_tables(study, folder, params)
    return True


def _finish(
    request: Request,
    log: event_log.EventLog,
    home: pathlib.Path,
    on_step: Callable[[int, int], None] | None,
) -> None:
    result, timing = trial.run(request.trial, log, home, test=request.test, on_step=on_step)
    path = home / "result.json"
    if path.exists():  # trained for a choice before, only evaluated now
        timing = {**json.loads(path.read_text())["timing"], "seconds_eval": timing["seconds_eval"]}
    text = json.dumps({"result": result, "timing": timing}, indent=1)
    folders.write_atomically(path, text.encode())
