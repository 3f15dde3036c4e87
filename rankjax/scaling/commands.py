"""`rankjax study`: what is asked on the command line, run, and shown."""

import dataclasses
import json as json_text
import pathlib
import sys
from typing import Annotated, Any, Literal

import rich
import tyro

from rankjax import models, screen, train
from rankjax.data import event_log, stores
from rankjax.scaling import budget, engines, estimate, presets, report, study

Folder = Annotated[pathlib.Path, tyro.conf.Positional]
Where = Annotated[engines.Engine, tyro.conf.arg(name="")]
Architectures = Literal[*models.MODELS]
Spending = Annotated[budget.Spending, tyro.conf.arg(name="")]


def study_quick(
    folder: Folder = pathlib.Path("studies/quick"),
    workers: int | None = None,
    where: Where = engines.Engine(),  # noqa: B008
    spending: Spending = budget.Spending(),  # noqa: B008
    json: bool = False,
) -> None:
    """The quick study: three architectures and four ladders on world-small, in minutes.

    Args:
      folder: where the world, the trials and the report go.
      workers: processes, by default one per core; of Ray, trials at a time.
      where: the engine that trains them.
      spending: what it may take.
      json: print JSON.
    """
    _check(folder, where, spending, workers)  # before the world is made
    asked = presets.quick(folder)
    if spending.limited:
        asked = dataclasses.replace(asked, command=_command())
    _run(asked, folder, workers, where, spending, json)


def study_run(
    log: Folder,
    folder: Folder,
    architectures: tuple[Architectures, ...] = ("dlrm_mlp", "dcnv2_din", "rankmixer", "hstu"),
    budgets: tuple[int, ...] = (),
    seeds: tuple[int, ...] = (0,),
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3),
    table_rates: tuple[float, ...] = (0.05, 0.1, 0.2),
    embedding_stds: tuple[float, ...] = (0.01, 0.05),
    history: int = 50,
    batch: int = 512,
    counters: bool = True,
    shards: tuple[int, ...] = (),
    sequence_windows: bool = False,
    workers: int | None = None,
    where: Where = engines.Engine(),  # noqa: B008
    spending: Spending = budget.Spending(),  # noqa: B008
    json: bool = False,
) -> None:
    """A scaling study on a prepared log: ladders along every axis, swept rates, fits, a report.

    Args:
      log: a prepared log (rankjax data ...).
      folder: of the study; run it again and only what is missing is trained.
      architectures: which to compare.
      budgets: data budgets, the newest n valid impressions of the train span (none = all).
      seeds: of the final trials.
      learning_rates: swept at both ends of each ladder.
      table_rates: tried at each architecture's smallest size, with
      embedding_stds: the scales of the embeddings' initialisation.
      history: S of the models that have no S axis.
      batch: valid impressions a step.
      counters: the log's counters are among the features.
      shards: of a log in shards, the numbers of those to use; by default all.
      sequence_windows: window samples for sequence models, impressions for the others (for logs
        without requests); default: request samples for all.
      workers: processes, by default one per core; of Ray, trials at a time.
      where: the engine that trains them.
      spending: what it may take.
      json: print JSON.
    """
    _check(folder, where, spending, workers)
    opened = event_log.EventLog.open(log, counters=counters, shards=shards or None)
    asked = presets.study_of(
        opened,
        architectures=architectures,
        history=history,
        shards=shards,
        windows=sequence_windows,
        budgets=budgets or (None,),
        seeds=seeds,
        learning_rates=learning_rates,
        table_rates=table_rates,
        embedding_stds=embedding_stds,
        training=train.TrainConfig(batch=batch),
        command=_command(),
    )
    _run(asked, folder, workers, where, spending, json)


def _check(
    folder: pathlib.Path, where: engines.Engine, spending: budget.Spending, count: int | None
) -> None:
    """Raises ValueError, before any work, for what does not go together or is not there."""
    stores.mounted(folder)
    spending.check(where.engine)
    engines.check(where, count)


def _command() -> str:
    return " ".join(["rankjax", *sys.argv[1:]])


def _run(
    asked: study.Study,
    folder: pathlib.Path,
    count: int | None,
    where: engines.Engine,
    spending: budget.Spending,
    as_json: bool,
) -> None:
    if spending.dry_run or spending.limited:
        asked, bill = budget.prepare(asked, folder, spending, count=count)
        if spending.dry_run:
            show_bill(bill, as_json)
            return
        for line in bill["does_not_fit"]:
            print(f"study: {line}", file=sys.stderr)
    path = engines.run(asked, folder, where, count)
    show(path, as_json)


def show_bill(bill: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json_text.dumps(bill))
        return
    console = screen.wide()
    for part in estimate.tables(bill):
        console.print(part)


def show(path: pathlib.Path, as_json: bool) -> None:
    summary = json_text.loads((path.parent / "summary.json").read_text())
    if as_json:
        print(json_text.dumps({"report": str(path), **summary}))
    else:
        rich.print(rich.markup.escape(report.text(summary)))
        print(f"report: {path}")
