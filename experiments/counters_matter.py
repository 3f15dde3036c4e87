"""What do time-safe counters add, and do deep models beat trees on the same features?

    python experiments/counters_matter.py ebnerd RAW STUDY
    python experiments/counters_matter.py globo interactions.parquet STUDY
    python experiments/counters_matter.py ids RAW STUDY      # after ebnerd, with the same STUDY

Two studies on one log, STUDY/with and STUDY/without its counters: four architectures at two widths,
two seeds, rates swept; the trees of scikit-learn as a row of both reports. EB-NeRD is read by its
own source, globo_news through schemas/globo_news.toml, of which the impressions of one user in
twenty become samples. Run it again and it goes on where it stopped. Outcome: docs/own-data.md.
"""

import dataclasses
import json
import pathlib
import sys

import numpy as np

from rankjax import optim, train
from rankjax.data import counters, event_log, importer
from rankjax.data.own import schema_file
from rankjax.data.sources import ebnerd
from rankjax.scaling import presets, study, trial, workers

SCHEMAS = pathlib.Path(__file__).parent / "schemas"
HOUR = 3600
# Both sets hold two weeks: a window as long as their past grows from the first to the last day, so
# that what models learn of it early is wrong later.
COUNTERS = counters.CounterConfig(windows=(HOUR, 6 * HOUR, 24 * HOUR))
AXES = {
    "dlrm_mlp": {"width": (32, 128)},
    "dcnv2_din": {"width": (32, 128)},
    "rankmixer": {"width": (16, 32)},
    "hstu": {"width": (16, 32)},
}


def ebnerd_log(raw: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    return counters.add(ebnerd.prepare(raw, folder / "log"), folder / "counted", COUNTERS)


def globo_log(raw: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    schema = schema_file.load(SCHEMAS / "globo_news.toml")
    schema = dataclasses.replace(schema, users_share=0.05, counters=COUNTERS)
    return importer.run(schema, [raw], folder / "counted")


LOGS = {"ebnerd": ebnerd_log, "globo": globo_log}


def ask(log: event_log.EventLog) -> study.Study:
    """The study of a log, with its counters or (EventLog.open(counters=False)) without."""
    return presets.study_of(
        log,
        architectures=tuple(AXES),
        axes=AXES,
        history=50,
        max_candidates=16,
        budgets=(240_000,),
        seeds=(0, 1),
        learning_rates=(1e-3, 3e-3, 9e-3),
        table_rates=(0.005, 0.015, 0.05),
        embedding_stds=(0.01,),
        training=train.TrainConfig(batch=256, optimizer=optim.OptimConfig(b2=0.99)),
        command="python experiments/counters_matter.py",
    )


def without_ids(log: event_log.EventLog) -> event_log.EventLog:
    """EB-NeRD's log in which no user and no item is known by its id (0: missing)."""
    columns = {file: dict(found) for file, found in log.columns.items()}
    for file, name in (("users", "user"), ("items", "item"), ("impressions", "page_item")):
        columns[file][name] = np.zeros_like(columns[file][name])
    return dataclasses.replace(log, columns=columns, fingerprint={**log.fingerprint, "ids": False})


def ids(log: event_log.EventLog, folder: pathlib.Path) -> None:
    """DCNv2 + DIN, D 128, at the rates that the study chose, with ids and without; prints."""
    asked = ask(log)
    model = next(x for x in asked.ladders if x.architecture == "dcnv2_din").configs[-1]
    for name, known in (("ids", log), ("no_ids", without_ids(log))):
        for seed in asked.seeds:
            spec = asked.trial(
                model, rate=0.003, table_rate=0.005, std=0.01, budget=asked.budgets[0], seed=seed
            )
            found, _ = trial.run(spec, known, folder / name / str(seed), test=True)
            metrics = ("validation_ne", "test_ne", "test_auc", "test_request_auc", "test_pcoc")
            print(json.dumps({"features": name, "seed": seed} | {m: found[m] for m in metrics}))


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in {*LOGS, "ids"}:
        sys.exit(__doc__)
    raw, folder = map(pathlib.Path, sys.argv[2:])
    if sys.argv[1] == "ids":
        ids(event_log.EventLog.open(ebnerd_log(raw, folder)), folder)
        sys.exit()
    log = LOGS[sys.argv[1]](raw, folder)
    for name, counted in (("with", True), ("without", False)):
        print(workers.run(ask(event_log.EventLog.open(log, counters=counted)), folder / name))
