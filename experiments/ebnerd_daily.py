"""EB-NeRD: what does training on every day add to the held-out figures of `ebnerd_axes`?

    python experiments/ebnerd_daily.py STUDY

STUDY: the folder in which experiments/ebnerd_axes.py has run, with its trials. For each
architecture the size of the best validation NE (largest budget) goes on from its checkpoint over
the validation span and the test span in time order, each batch predicted, then learned from, at a
tenth of its dense learning rate. Writes daily.parquet: the test metrics held out and progressive.
The outcome is in docs/studies.md.
"""

import dataclasses
import json
import pathlib
import sys

import polars as pl
from ebnerd_axes import ask

from rankjax import evaluate, train
from rankjax.data import event_log, samples
from rankjax.scaling import study, trial

METRICS = ("ne", "auc", "request_auc", "request_mrr", "request_ndcg10", "pcoc")


def daily(spec: trial.Trial, log: event_log.EventLog, home: pathlib.Path) -> dict[str, float]:
    """The test span's metrics, each batch predicted before it was learned from."""
    optimizer = dataclasses.replace(
        spec.training.optimizer,
        learning_rate=spec.training.optimizer.learning_rate / 10,
        schedule="constant",
        warmup=0.0,
    )
    training = dataclasses.replace(spec.training, optimizer=optimizer)
    state = trial.restore(spec, log, home)
    for span in ("validation", "test"):
        later = samples.build(log, spec.samples, span)
        done = train.run(log, spec.model, training, later, start_from=state)
        state = done.state
    return evaluate.summarize(log, done.progressive)[log.schema.primary_task]


def compare(asked: study.Study, folder: pathlib.Path) -> pl.DataFrame:
    """One row an architecture and seed: its best size, held out and progressive."""
    log = event_log.EventLog.open(asked.log)
    rows, _ = study.load_rows(folder)
    wanted, _ = study.requests(asked, rows, study.params_of(asked, log))
    finals = [r.trial for r in wanted if r.test and r.trial.budget == asked.largest_budget]
    found = []
    for name in dict.fromkeys(t.architecture for t in finals):
        own = [t for t in finals if t.architecture == name]
        best = min(own, key=lambda t: rows[t.id]["validation_ne"]).model
        for spec in {t.id: t for t in own if t.model == best}.values():
            row = daily(spec, log, folder / "trials" / spec.id)
            held_out = {f"held_out_{m}": rows[spec.id][f"test_{m}"] for m in METRICS}
            sizes = {"trial": spec.id, "architecture": name, "seed": spec.training.seed}
            sizes["config"] = json.dumps(dataclasses.asdict(best), sort_keys=True)
            found.append(sizes | held_out | {f"daily_{m}": row[m] for m in METRICS})
            print(found[-1])
    return pl.DataFrame(found)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    asked = ask(event_log.EventLog.open(folder / "log"))
    compare(asked, folder).write_parquet(folder / "daily.parquet")
