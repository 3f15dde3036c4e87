"""The synthetic world: how near do models come to the oracle with size, history and data?

    python experiments/world_gap.py STUDY
    python experiments/world_gap.py show experiments/results/world_gap

STUDY: where the world of 550,000 impressions, the trials, results.parquet, learned.parquet and
report.html go; run it again and it goes on where it stopped. `show` prints the two tables that
docs/world.md holds.
"""

import pathlib
import sys

import polars as pl

from rankjax import metrics
from rankjax.data import event_log
from rankjax.data.sources import synthetic
from rankjax.scaling import presets, study, trial, workers

AXES = {
    "dlrm_mlp": {"width": (8, 32, 128, 512)},
    "dcnv2_din": {"width": (8, 32, 128, 512)},
    "rankmixer": {"width": (8, 16, 32, 64)},
    "hstu": {"history": (10, 25, 50, 100), "width": (8, 16, 32, 64)},
}


def ask(log: event_log.EventLog) -> study.Study:
    """The study: request samples, a quarter of the data and all of it, one rate, two seeds."""
    return presets.study_of(
        log,
        architectures=tuple(AXES),
        axes=AXES,
        history=50,
        max_candidates=16,
        budgets=(110_000, 440_000),
        seeds=(0, 1),
        learning_rates=(3e-3,),
        table_rates=(0.1,),
        embedding_stds=(0.05,),
        training=presets.WORLD_TRAINING,
        command="python experiments/world_gap.py STUDY",
    )


def learned(asked: study.Study, folder: pathlib.Path) -> pl.DataFrame:
    """For both ends of every D ladder (all data, seed 0): the slope of each part of the logit."""
    log = event_log.EventLog.open(asked.log)
    truth = synthetic.load_truth(log.folder)
    rows, _ = study.load_rows(folder)
    wanted, _ = study.requests(asked, rows, study.params_of(asked, log))
    found = []
    for r in wanted:
        ends = (0, len(r.ladder.configs) - 1)
        largest = r.trial.budget == asked.largest_budget
        if r.test and largest and r.ladder.axis == "D" and r.size in ends and not _seed(r):
            state = trial.restore(r.trial, log, folder / "trials" / r.trial.id)
            scored = trial.score_span(r.trial, log, state, "test")
            task = [t.name for t in log.schema.tasks].index(log.schema.primary_task)
            parts = {k: x[scored.impression] for k, x in truth.items() if k.startswith("part_")}
            slopes = metrics.learned_parts(scored.logits[:, task], parts)
            size = r.ladder.values[r.size]
            found.append({"trial": r.trial.id, "ladder": r.ladder.name, "width": size, **slopes})
    return pl.DataFrame(found)


def show(folder: pathlib.Path) -> None:
    """Prints the gap to the oracle of every size and budget, and the parts learned."""
    rows = pl.read_parquet(folder / "results.parquet").filter(pl.col("stage") == "final")
    gap = (pl.col("test_ne") - pl.col("oracle_ne")).alias("gap")
    by = ["ladder", "axis_value", "dense_params", "budget"]
    gaps = rows.group_by(by).agg(
        gap.mean(), gap.std().alias("std"), pl.col("test_ne", "test_auc").mean(), pl.len()
    )
    learned = pl.read_parquet(folder / "learned.parquet").drop("trial")
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=160, float_precision=4):
        print(f"oracle NE {rows['oracle_ne'][0]:.4f}", gaps.sort(by), learned, sep="\n")


def _seed(request: study.Request) -> int:
    return request.trial.training.seed


if __name__ == "__main__":
    if sys.argv[1:2] == ["show"] and len(sys.argv) == 3:
        show(pathlib.Path(sys.argv[2]))
        sys.exit()
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    made = synthetic.prepare(synthetic.WORLD_550K, folder / "world")
    asked = ask(event_log.EventLog.open(made))
    print(workers.run(asked, folder))
    learned(asked, folder).write_parquet(folder / "learned.parquet")
    show(folder)
