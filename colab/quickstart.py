# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # rankjax, cell by cell
#
# A scaling study on a synthetic world: make the data, look at it, train one model, then train
# ladders of three architectures and read the report. `rankjax study quick` does the same in one
# command. On two CPU cores plan a few minutes.

# %%
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("rankjax") is None:
    if not pathlib.Path("../rankjax").is_dir():
        raise RuntimeError("found no rankjax; run this in the folder colab/ of a clone")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", ".."], check=True)

# %%
import dataclasses
import os

import polars as pl

from rankjax.data import event_log, samples
from rankjax.data.sources import synthetic
from rankjax.scaling import figures, findings, presets, study, trial, workers

FOLDER = pathlib.Path("studies/quickstart")
# A few users make a world in which nothing can be learned but how the cells work.
FEW_USERS = int(os.environ.get("RANKJAX_NOTEBOOK_USERS", "0"))

# %% [markdown]
# ## A world whose true click probabilities are known
#
# Users, items, requests and clicks are drawn from a process that keeps the click probability of
# every impression. `synthetic.WORLD_SMALL` has about 211,000 impressions. Preparing it twice does
# nothing the second time.

# %%
world = synthetic.WORLD_SMALL
if FEW_USERS:
    world = dataclasses.replace(world, users=FEW_USERS)
log = event_log.EventLog.open(synthetic.prepare(world, FOLDER / "world"))
{file: log.rows(file) for file in event_log.FILES}

# %% [markdown]
# A log is a folder of Arrow files. Impressions are sorted by time; `span` says train (0),
# validation (1) or test (2). Ids start at 1; 0 is missing.

# %%
pl.read_ipc(log.folder / "impressions.arrow").head(8)

# %% [markdown]
# ## Two floors
#
# NE (normalized entropy) is the log loss divided by the entropy of the base rate: 1 is a constant,
# lower is better. `oracle_ne` is the NE of the true probabilities, which no honest model beats.
# `prior_mean_ne` is the NE without what only the user knows (own taste and bias at their mean).

# %%
pl.DataFrame([synthetic.floors(log.folder)["click"]])

# %% [markdown]
# ## One model, one pass over the data
#
# A trial is a model of one size, trained once in time order. The log is grouped by request: one
# sample holds the user's newest events and all candidates of the request.

# %%
TRAINING = presets.WORLD_TRAINING  # batch, optimizer and its rate, weights of the tasks
one = trial.Trial(
    model=presets.model("dlrm_mlp", tasks=len(log.schema.tasks), width=8),
    training=TRAINING,
    samples=samples.SampleConfig(organisation="request", history=20, max_candidates=16),
    budget=None,
)
result, timing = trial.run(one, log, FOLDER / "one", test=True)
names = ("validation_ne", "test_ne", "oracle_ne", "alarm", "dense_params", "flops_valid")
{name: result[name] for name in names}

# %% [markdown]
# `alarm` is true if the model did better than the true probabilities allow, which only a leak can
# do.
#
# ## Ladders
#
# A ladder is one architecture at several sizes that differ along one axis: width (D), layers (L),
# tokens (T) or history (S).

# %%
AXES = {
    "dlrm_mlp": {"width": (8, 32, 128, 512)},
    "rankmixer": {"width": (8, 16, 32, 64), "layers": (1, 2, 4, 8)},
    "hstu": {"width": (8, 16, 32, 64)},
}
if FEW_USERS:
    AXES = {name: {"width": (8, 16)} for name in ("dlrm_mlp", "hstu")}
asked = presets.study_of(
    log,
    architectures=tuple(AXES),
    axes=AXES,
    history=20,
    max_candidates=16,
    learning_rates=(3e-3,),
    table_rates=(0.1,),
    embedding_stds=(0.05,),
    training=TRAINING,
    command="colab/quickstart.ipynb",
)
params = study.params_of(asked, log)
pl.DataFrame(
    [
        {"ladder": x.name, "sizes": list(x.values), "dense_params": [params(c) for c in x.configs]}
        for x in asked.ladders
    ]
)

# %% [markdown]
# ## The study
#
# One process per core trains what the folder lacks. Interrupt the cell and run it again: it goes
# on where it stopped. With one rate in each tuple above nothing is swept; give several, and they
# are tried at both ends of every ladder and chosen on validation.

# %%
path = workers.run(asked, FOLDER / "study")

# %%
results = pl.read_parquet(path.parent / "results.parquet")
columns = ["ladder", "axis_value", "dense_params", "training_flops", "test_ne", "test_auc"]
results.filter(pl.col("stage") == "final").select(*columns, "oracle_ne", "alarm")

# %% [markdown]
# ## The report
#
# The report is one HTML file that works offline. Here is one of its figures; the dashed line is the
# oracle. One seed and one rate a family, as here, are too little to call a winner.

# %%
figures.quality(findings.analyse(results), "ne", "training_flops")

# %%
print(f"report: {path}")
