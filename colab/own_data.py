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
# # Your own data, from files to a study
#
# CSV files in, a scaling study out: a starter schema, the import, a look at the log, a search for
# leaks, gradient-boosted trees as the line to beat, and a small study. Put your own files in place
# of the ones that the second cell makes. On two CPU cores plan a few minutes.

# %%
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("rankjax") is None:
    if not pathlib.Path("../rankjax").is_dir():
        raise RuntimeError("found no rankjax; run this in the folder colab/ of a clone")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "..[baseline]"], check=True)

# %%
import dataclasses
import os

import polars as pl

from rankjax import baseline
from rankjax.data import check, describe, describe_page, describe_text, event_log, importer
from rankjax.data.own import guess, schema_file
from rankjax.data.sources import synthetic
from rankjax.scaling import presets, workers

FOLDER = pathlib.Path("studies/own_data")
FILES = FOLDER / "files"
# A few users make files in which nothing can be learned but how the cells work.
FEW_USERS = int(os.environ.get("RANKJAX_NOTEBOOK_USERS", "0"))

# %% [markdown]
# ## Three files, as a team would have them
#
# Impressions with labels, what users did (here: clicks and likes), and a catalogue. They are made
# of the synthetic world; ids are text, times are dates.

# %%
world = dataclasses.replace(synthetic.WORLD_SMALL, users=FEW_USERS or 1000)
source = event_log.EventLog.open(synthetic.prepare(world, FOLDER / "world"))


def table(name, **columns):
    found = {new: pl.Series(source.column(name, old)) for new, old in columns.items()}
    return pl.DataFrame(found)


def dates(column):
    later = pl.from_epoch(pl.col(column)) + pl.duration(days=20_000)
    return later.dt.strftime("%Y-%m-%d %H:%M:%S")


def text(letter, column):
    return (pl.lit(letter) + pl.col(column).cast(pl.String)).alias(column)


FILES.mkdir(parents=True, exist_ok=True)
shown = table(
    "impressions",
    **{"request_id": "request", "user_id": "user", "timestamp": "time", "item_id": "item"},
    **{"surface": "surface", "clicked": "click", "liked": "like"},
)
acts = table("events", user_id="user", timestamp="time", item_id="item", action="action")
goods = table("items", item_id="item", category="category", creator="creator", published="birth")
ids = [text("u", "user_id"), text("i", "item_id"), dates("timestamp").alias("timestamp")]
shown.with_columns(ids).write_csv(FILES / "impressions.csv")
acts.with_columns(ids).write_csv(FILES / "events.csv")
goods.slice(1).with_columns(
    text("i", "item_id"), text("c", "category"), dates("published").alias("published")
).write_csv(FILES / "items.csv")
files = sorted(FILES.glob("*.csv"))
pl.read_csv(FILES / "impressions.csv", n_rows=5)

# %% [markdown]
# ## A starter schema
#
# Roles are guessed from names and values. Read it, and correct what it could not know: which
# columns are only known after the impression, which label matters, where the spans end. The same
# from the shell: `rankjax data schema FILES… --out schema.toml`.

# %%
starter = guess.starter(files)
print(starter)

# %% [markdown]
# ## Import
#
# `rankjax data import --schema schema.toml FILES… --out LOG`. What an import learns (which ids are
# known, means, quantiles) comes from the training span only. The schema's `[counters]` adds how
# often each item was shown and clicked strictly before each request.

# %%
(FOLDER / "schema.toml").write_text(starter)
schema = schema_file.load(FOLDER / "schema.toml")
log = event_log.EventLog.open(importer.run(schema, files, FOLDER / "log"))
{
    "rows": {file: log.rows(file) for file in event_log.FILES},
    "counters": sum(f.counter for f in log.schema.features),
}

# %% [markdown]
# ## Look, and look for leaks
#
# `rankjax data describe LOG` and `rankjax data check LOG`.

# %%
summary = describe.describe(log)
(FOLDER / "log.html").write_text(describe_page.page(summary))
print(describe_text.text(summary)[:2500])

# %%
findings = check.check(log)
print(check.text(findings))

# %% [markdown]
# ## The line to beat
#
# Gradient-boosted trees on the same features, split and metrics: `rankjax baseline LOG`.

# %%
trees = baseline.run(log, baseline.BaselineConfig(iterations=20 if FEW_USERS else 300))
{name: trees[name] for name in ("test_ne", "test_auc", "test_request_auc", "features")}

# %% [markdown]
# ## A study
#
# Two architectures at two widths; `rankjax study run LOG STUDY` trains all along every axis. The
# trees stand in the report as a row.

# %%
AXES = {"dlrm_mlp": {"width": (16, 64)}, "rankmixer": {"width": (8, 16)}}
if FEW_USERS:
    AXES = {"dlrm_mlp": {"width": (8, 16)}}
asked = presets.study_of(
    log,
    architectures=tuple(AXES),
    axes=AXES,
    history=20,
    max_candidates=16,
    learning_rates=(3e-3,),
    table_rates=(0.1,),
    embedding_stds=(0.01,),
    training=dataclasses.replace(presets.WORLD_TRAINING, task_weights=(("liked", 0.2),)),
    command="colab/own_data.ipynb",
)
path = workers.run(asked, FOLDER / "study")
results = pl.read_parquet(path.parent / "results.parquet")
columns = ["architecture", "width", "test_ne", "test_auc", "test_request_auc"]
results.filter(pl.col("stage") == "final").select(columns)

# %%
print(f"report: {path}")
