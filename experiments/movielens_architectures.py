"""MovieLens-1M: which architecture gains from width, windows for the sequence model?

    python experiments/movielens_architectures.py RAW STUDY

RAW: the folder of the unpacked set (docs/data.md). STUDY: where the log, the trials,
results.parquet and report.html go; run it again and it goes on where it stopped.
Run on MovieLens-1M: 76 trials, 14 minutes on two CPU cores. HSTU leads by .012 NE; width
hardly matters (docs/studies.md).
"""

import pathlib
import sys

from rankjax import optim, train
from rankjax.data import event_log
from rankjax.data.sources import movielens
from rankjax.scaling import presets, study, workers

AXES = {
    "dlrm_mlp": {"width": (8, 32, 128, 512)},
    "dcnv2_din": {"width": (8, 32, 128, 512)},
    "rankmixer": {"width": (8, 16, 32, 64)},
    "hstu": {"width": (8, 16, 32, 64)},
}


def ask(log: event_log.EventLog) -> study.Study:
    """The study: windows of a day for HSTU, single impressions for the others, one budget."""
    return presets.study_of(
        log,
        architectures=tuple(AXES),
        axes=AXES,
        windows=True,
        history=50,
        max_candidates=32,
        max_realtime=64,
        budgets=(200_000,),
        seeds=(0, 1),
        learning_rates=(3e-4, 1e-3, 3e-3, 9e-3),
        table_rates=(0.005, 0.015, 0.05),
        embedding_stds=(0.01, 0.05),
        training=train.TrainConfig(batch=256, optimizer=optim.OptimConfig(b2=0.99)),
        command="python experiments/movielens_architectures.py RAW STUDY",
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    raw, folder = map(pathlib.Path, sys.argv[1:])
    log = event_log.EventLog.open(movielens.prepare(raw, folder / "log"))
    print(workers.run(ask(log), folder))
