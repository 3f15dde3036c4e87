"""EB-NeRD: do tokens, history, layers or width pay, and what does more data add?

    python experiments/ebnerd_axes.py RAW STUDY

RAW: the folder of the set, as published or with its lists exploded (docs/data.md). STUDY: where the
log, the trials, results.parquet and report.html go; run it again and it goes on where it stopped.
Run on the demo bundle: 196 trials, 34 minutes on two CPU cores. A doubling of the data lowers NE by
.008 to .016, no model axis decidedly does as much, the architectures tie (docs/studies.md).
"""

import pathlib
import sys

from rankjax import optim, train
from rankjax.data import event_log
from rankjax.data.sources import ebnerd
from rankjax.scaling import presets, study, workers

AXES = {
    "dlrm_mlp": {"width": (8, 32, 128, 512)},
    "dcnv2_din": {"width": (8, 32, 128, 512)},
    "rankmixer": {"tokens": (2, 4, 8, 16), "layers": (1, 2, 4, 8), "width": (8, 16, 32, 64)},
    "hstu": {"history": (10, 25, 50, 100), "layers": (1, 2, 4, 8), "width": (8, 16, 32, 64)},
}
# Without target attention, whose cost no axis moves, the blocks are most of a RankMixer's FLOPs.
FIELDS = {"rankmixer": {"pooling": ("mean",)}}


def ask(log: event_log.EventLog) -> study.Study:
    """The study: request samples, every axis, two data budgets, two seeds."""
    return presets.study_of(
        log,
        architectures=tuple(AXES),
        axes=AXES,
        fields=FIELDS,
        history=50,
        max_candidates=16,
        budgets=(60_000, 240_000),
        seeds=(0, 1),
        learning_rates=(3e-4, 1e-3, 3e-3, 9e-3),
        table_rates=(0.005, 0.015, 0.05),
        embedding_stds=(0.01, 0.05),
        training=train.TrainConfig(batch=256, optimizer=optim.OptimConfig(b2=0.99)),
        command="python experiments/ebnerd_axes.py RAW STUDY",
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    raw, folder = map(pathlib.Path, sys.argv[1:])
    log = event_log.EventLog.open(ebnerd.prepare(raw, folder / "log"))
    print(workers.run(ask(log), folder))
