"""rankjax data | models | train | study | baseline | report | bench | plan | doctor.

Every command takes --json to print one JSON object for machines instead of text for people.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import rich
import rich.console
import rich.progress
import rich.table
import tyro

from rankjax import baseline, bench, catalogue, doctor, hosts, models, screen, sharding, train
from rankjax.data import commands, event_log, samples, stores
from rankjax.data.sources import ebnerd, movielens, synthetic
from rankjax.layers import stack
from rankjax.plan.commands import plan
from rankjax.scaling import commands as study_commands
from rankjax.scaling import presets, trial, workers

Folder = Annotated[pathlib.Path, tyro.conf.Positional]
Worlds = Literal["small", "550k", "world"]
Architectures = Literal[*models.MODELS]


def data_world(
    out: Folder,
    size: Worlds = "small",
    impressions: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Generate the synthetic world, whose true click probability is known.

    Args:
      out: folder for the log and, beside it, the truth.
      size: a named size.
      impressions: instead of a named size, about this many (10^4 to 10^9).
      seed: of the world; compare models within one seed only.
      workers: processes; the bytes do not depend on it.
      json: print JSON.
    """
    config = presets.world(size, impressions, seed)
    path = synthetic.prepare(config, out, **({} if workers is None else {"workers": workers}))
    commands.show({**commands.summary(path), "floors": synthetic.floors(path)}, json)


def data_movielens(
    raw: Folder, out: Folder, download: str | None = None, json: bool = False
) -> None:
    """Prepare a log from MovieLens (100K, latest-small, 1M or 20M).

    Args:
      raw: the unpacked data set; with --download, the folder to put it.
      out: folder for the log.
      download: fetch this set from GroupLens first: ml-100k, ml-latest-small, ml-1m or ml-20m.
      json: print JSON.
    """
    if download:
        raw = movielens.download(download, raw)
    commands.show(commands.summary(movielens.prepare(raw, out)), json)


def data_ebnerd(raw: Folder, out: Folder, json: bool = False) -> None:
    """Prepare a log from EB-NeRD (the publisher's files, or impressions/requests/history.parquet).

    Args:
      raw: folder of the data set.
      out: folder for the log.
      json: print JSON.
    """
    commands.show(commands.summary(ebnerd.prepare(raw, out)), json)


def train_one(
    log: Folder,
    architecture: Architectures = "rankmixer",
    out: pathlib.Path = pathlib.Path("runs/one"),
    organisation: Literal["impression", "request", "window"] = "request",
    history: int = 50,
    tokens: int | None = None,
    layers: int | None = None,
    width: int | None = None,
    budget: int | None = None,
    counters: bool = True,
    shards: tuple[int, ...] = (),
    config: Annotated[train.TrainConfig, tyro.conf.arg(name="")] = train.TrainConfig(),  # noqa: B008
    mesh: sharding.MeshConfig = sharding.MeshConfig(),  # noqa: B008
    join: hosts.HostConfig = hosts.HostConfig(),  # noqa: B008
    compute: stack.Compute = stack.PLAIN,
    test: bool = False,
    json: bool = False,
) -> None:
    """Train one model once over a log, resumably, and evaluate it.

    On several hosts, run the same command on each, with `out` on a file system that they share.

    Args:
      log: a prepared log.
      architecture: which model.
      out: folder for checkpoints, metrics.jsonl and TensorBoard files.
      organisation: how impressions are grouped into samples.
      history: S, newest events of the history that the model sees.
      tokens: T, where the architecture has it.
      layers: L.
      width: D.
      budget: train on the newest n valid impressions of the train span.
      counters: the log's counters are among the features.
      shards: of a log in shards, the numbers of those to train and evaluate on; by default all.
      config: optimizer, tables, batch, seed.
      mesh: devices and strategy; all devices, a part of the batch on each, where not said.
      join: how this process finds those of the other hosts.
      compute: layers scanned (compiles once for all), recomputed in the backward pass.
      test: read the test span too.
      json: print JSON.
    """
    stores.mounted(out)
    hosts.join(join)
    opened = event_log.EventLog.open(log, verify=True, counters=counters, shards=shards or None)
    sizes = {"tokens": tokens, "layers": layers, "width": width, "history": history}
    chosen = samples.SampleConfig(organisation=organisation, history=history)
    if organisation == "window":
        sizes["realtime"] = chosen.max_realtime
    model = presets.model(architecture, len(opened.schema.tasks), **sizes)
    spec = trial.Trial(
        model=model,
        training=config,
        samples=chosen,
        budget=budget,
    )
    bars_on = rich.console.Console(stderr=True)  # stdout is the result's
    with rich.progress.Progress(console=bars_on, disable=not bars_on.is_terminal) as bars:
        bar = bars.add_task("steps", total=None)
        result, timing = trial.run(
            spec, opened, out, test=test, place=sharding.chosen(mesh), compute=compute,
            on_step=lambda done, total: bars.update(bar, completed=done, total=total),
        )  # fmt: skip
    if jax.process_index() == 0:
        commands.show({**result, **timing}, json)


def baseline_of(
    log: Folder,
    study: pathlib.Path | None = None,
    budget: int | None = None,
    counters: bool = True,
    json: bool = False,
) -> None:
    """Gradient-boosted trees on the features of a log: what one would use instead of a deep model.

    Args:
      log: a prepared log.
      study: folder of a study on this log; its report will show the trees.
      budget: learn from the newest n impressions of the train span (none = all, or the study's
        largest budget).
      counters: the log's counters are among the features.
      json: print JSON.
    """
    opened = event_log.EventLog.open(log, verify=True, counters=counters)
    if study is None:
        found = baseline.run(opened, baseline.BaselineConfig(budget=budget))
    else:
        found = workers.write_trees(opened, study, budget)
    commands.show(found, json)


def write_report(folder: Folder, json: bool = False) -> None:
    """Write report.html and summary.json of a study again from its results.parquet.

    Args:
      folder: of the study.
      json: print JSON.
    """
    study_commands.show(workers.write_report(folder), json)


def look(json: bool = False) -> None:
    """What this machine has, what is missing, and what to install.

    Args:
      json: print JSON.
    """
    found = doctor.run()
    if json:
        commands.show(found, True)
    else:
        doctor.show(found)
    sys.exit(0 if found["ok"] else 1)


def list_models(
    name: Annotated[str | None, tyro.conf.Positional] = None,
    picture: pathlib.Path | None = None,
    fidelity: pathlib.Path | None = None,
    json: bool = False,
) -> None:
    """The sizes that papers name: parameters and FLOPs; of one, every parameter and its mask.

    Args:
      name: of one size, or of an architecture (its default Config).
      picture: write the attention mask of a small sample as HTML here (default: NAME_mask.html).
      fidelity: write docs/fidelity.md here: what the papers print, ours, and what they leave open.
      json: print JSON.
    """
    if fidelity is not None:
        fidelity.write_text(catalogue.fidelity(), encoding="utf-8")
        print(f"fidelity: {fidelity}")
    elif name is None:
        _show_sizes(catalogue.rows(), json)
    else:
        _show_size(name, picture, json)


def _show_sizes(rows: list[dict], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"on": catalogue.ON, "sizes": rows}))
        return
    short = ("name", "architecture", "paper_params", "paper_flops", "n", "dense_params", "flops")
    table = rich.table.Table(*short, "chosen")
    for row in rows:
        numbers = [row[x] if isinstance(row[x], str) else _count(row[x]) for x in short]
        table.add_row(*numbers, "yes" if row["chosen"] else "")
    screen.wide().print(table)
    print(f"paper_params, paper_flops: each paper's own scope (--json says which). {catalogue.ON}.")


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value < 1e7 else f"{value:.4g}"


def _show_size(name: str, picture: pathlib.Path | None, as_json: bool) -> None:
    config, architecture = catalogue.find(name)
    leaves = catalogue.tree(config)
    path = None
    if catalogue.has_mask(architecture):
        path = picture or pathlib.Path(f"{name}_mask.html")
        path.write_text(catalogue.picture(name, config, architecture), encoding="utf-8")
    elif picture is not None:
        raise ValueError(f"models: {architecture} has no masked attention to draw")
    if as_json:
        found = {"name": name, "architecture": architecture, "on": catalogue.ON}
        found |= {"config": dataclasses.asdict(config), "mask": path and str(path)}
        found["note"] = catalogue.fitting(config)[1]
        print(json.dumps(found | {"params": {k: list(shape) for k, shape in leaves}}))
        return
    rich.print(catalogue.as_tree(name, leaves))
    if note := catalogue.fitting(config)[1]:
        print(note)
    print(f"mask of a small sample: {path}" if path else "no masked attention")


COMMANDS: dict[str, Callable | dict[str, Callable]] = {
    "data": {
        "schema": commands.data_schema,
        "import": commands.data_import,
        "describe": commands.data_describe,
        "check": commands.data_check,
        "counters": commands.data_counters,
        "split": commands.data_split,
        "export": commands.data_export,
        "world": data_world,
        "movielens": data_movielens,
        "ebnerd": data_ebnerd,
    },
    "models": list_models,
    "train": train_one,
    "study": {"quick": study_commands.study_quick, "run": study_commands.study_run},
    "baseline": baseline_of,
    "report": write_report,
    "bench": bench.COMMANDS,
    "plan": plan,
    "doctor": look,
}


def main(argv: list[str] | None = None) -> None:
    """Runs one command. Mistakes of the caller, and what the machine refuses (a full disk, no
    network), end with one line on stderr and exit status 2."""
    if argv is None:
        argv = sys.argv[1:]
        if argv[:1] in (["train"], ["bench"]):  # a study gives its workers the same
            workers.keep_memory()
    if argv[:1] in ([], ["--help"], ["-h"]):
        print(_usage())
        sys.exit(0)
    if argv[0] not in COMMANDS:
        print(f"{_usage()}\n\nrankjax: found command {argv[0]!r}", file=sys.stderr)
        sys.exit(2)
    command, rest = COMMANDS[argv[0]], argv[1:]
    prog = f"rankjax {argv[0]}"
    with hosts.ending_at_once():
        _run(command, prog, rest)


def _run(command: Callable | dict[str, Callable], prog: str, args: list[str]) -> None:
    try:
        if callable(command):
            tyro.cli(command, prog=prog, args=args)
        else:
            tyro.extras.subcommand_cli_from_dict(command, prog=prog, args=args)
    except (ValueError, OSError, workers.Failed, hosts.HostError) as error:
        print(f"rankjax: {hosts.me()}{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("rankjax: stopped; what was running is saved, run it again to go on", file=sys.stderr)
        sys.exit(130)


def _usage() -> str:
    lines = [f"{__doc__}", "usage: rankjax COMMAND [--help]", ""]
    for name, command in COMMANDS.items():
        for sub, function in {"": command}.items() if callable(command) else command.items():
            first = (function.__doc__ or "").strip().splitlines()[0]
            lines.append(f"  {name + ' ' + sub:<18} {first}")
    return "\n".join(lines)
