"""All architectures on one footing: a compound ladder each, and the axes of the nine.

    python experiments/all_architectures.py world STUDY
    python experiments/all_architectures.py ebnerd RAW STUDY
    python experiments/all_architectures.py cross STUDY       # after one of the above
    python experiments/all_architectures.py bfloat16 STUDY    # likewise
    python experiments/all_architectures.py show RESULTS
    python experiments/all_architectures.py show-cross RESULTS
    python experiments/all_architectures.py show-bfloat16 RESULTS

`world` is the synthetic world of 550,000 impressions, `ebnerd` EB-NeRD with time-safe counters (RAW
is the folder of the set). One call trains everything that STUDY lacks; stop it and run it again at
will. `cross` crosses RankMixer's and HeteroAtt's width with the tokenizer and the number of tokens,
one seed, in STUDY/cross, on the same log. `bfloat16` trains a size of every architecture once with
activations of bfloat16, in STUDY/bfloat16.

`show` prints from RESULTS, the folder of a results.parquet, the best size of every architecture and
every axis of the nine as Markdown; `show-cross` RESULTS/cross; `show-bfloat16` each trial of
RESULTS/bfloat16 beside the one of RESULTS in float32 with the same seed and rates. They stand in
docs/architectures.md. A copy of RESULTS is a STUDY that goes on from its rows.
"""

import dataclasses
import math
import pathlib
import sys
from typing import Any

import polars as pl

from rankjax import models, optim, train
from rankjax.data import counters, event_log
from rankjax.data.sources import ebnerd, synthetic
from rankjax.models import (
    autoint,
    dcnv2,
    din,
    dlrm,
    dlrm_v3,
    grab,
    hhft,
    hiformer,
    hstu,
    longer,
    mtgr,
    onetrans,
    rankmixer,
    tokenmixer_large,
    transformer,
    wukong,
)
from rankjax.scaling import ladder, presets, study, workers
from rankjax.schema import Schema

# Smallest sizes. Feature tokens are cut evenly and histories are pooled by their mean for all
# models of feature tokens, so that T is free and their ladders span FLOPs of their own.
SPLIT = {"tokenizer": "even_split", "tokens": 4, "layers": 1, "width": 16}
STREAM = {"history": 25, "layers": 1, "width": 16, "heads": 2}
NINE = {
    "heteroatt": hiformer.HeteroAttConfig(**SPLIT, heads=2, expansion=2),
    "hiformer": hiformer.HiformerConfig(
        **SPLIT, heads=2, expansion=2, rank_query=32, rank_key=32, rank_value=64
    ),
    "hhft": hhft.Config(
        tokenizer="even_split", tokens=4, hetero_layers=1, layers=1, virtual_tokens=4, width=16,
        heads=2, expansion=2, hiformer_expansion=2, tower=(32,),
    ),
    "rankmixer": rankmixer.Config(**SPLIT, expansion=2),
    "hstu": hstu.Config(**STREAM, position_init="recency"),
    "mtgr": mtgr.Config(**STREAM),
    "grab": grab.Config(**STREAM),
    "longer": longer.Config(**STREAM),
    "onetrans": onetrans.Config(**STREAM, tokens=4),
}  # fmt: skip
BASELINES = {
    "dlrm_mlp": dlrm.Config(layers=1, width=32),
    "dlrm": dlrm.DotConfig(layers=1, width=32),
    "dcnv2_din": dcnv2.Config(layers=1, width=32, rank=16, attention_hidden=(16,)),
    "din": din.Config(layers=1, width=32, attention_hidden=(16,)),
    "autoint": autoint.Config(layers=1, width=16, heads=2),
    "wukong": wukong.Config(layers=1, width=16, rank=8, hidden=32),
    "transformer": transformer.Config(**SPLIT, heads=2, expansion=2),
    # From two layers on, of which the second has an inter-residual.
    "tokenmixer_large": tokenmixer_large.Config(**{**SPLIT, "layers": 2}),
    "dlrm_v3": dlrm_v3.Config(**STREAM),
}
PLAIN = ("dlrm_mlp", "dcnv2_din", "din")


def compound(name: str, base: Any) -> ladder.Ladder:
    """x 1, x 2 and x 4 along every axis at once (plain networks: their width x 1, x 4, x 16)."""
    axes = type(base).axes
    sizes = {f: dataclasses.asdict(base)[f] for f in axes.values()}
    # A plain DNN without hidden layers is logistic regression on ids and dense features.
    steps = [{"layers": 0}] if name == "dlrm_mlp" else []
    for factor in (1, 2, 4):
        grown = {f: factor * x for f, x in sizes.items() if x is not None}
        if name in PLAIN:
            grown["width"] = factor**2 * sizes["width"]
        steps.append(grown)
    return ladder.compound(base, *steps)


def ladders(schema: Schema) -> tuple[ladder.Ladder, ...]:
    """The compound ladder of every architecture, and each axis of the nine x 1, x 2, x 4.

    GRAB has a channel for each action of the log, three at most.
    """
    actions = schema.table(schema.action.table).rows - 1
    found = []
    for name, config in {**BASELINES, **NINE}.items():
        own = {"channels": min(3, actions), "action_ids": actions + 2} if name == "grab" else {}
        base = dataclasses.replace(config, tasks=len(schema.tasks), **own)
        found.append(compound(name, base))
        if name in NINE:
            for field in type(base).axes.values():
                first = dataclasses.asdict(base)[field]
                found.append(ladder.along(base, **{field: (first, 2 * first, 4 * first)}))
    return tuple(found)


SETTINGS: dict[str, dict[str, Any]] = {
    "world": {
        "table_rates": (0.1,),
        "embedding_stds": (0.05,),
        "training": presets.WORLD_TRAINING,
    },
    "ebnerd": {
        "table_rates": (0.005, 0.015),
        "embedding_stds": (0.01,),
        "training": train.TrainConfig(batch=256, optimizer=optim.OptimConfig(b2=0.99)),
    },
}


def ask(log: event_log.EventLog, which: str) -> study.Study:
    """The study of a log: request samples, one data budget, two seeds, three learning rates."""
    return study.Study(
        log=str(log.folder),
        ladders=ladders(log.schema),
        budgets=(160_000,),
        seeds=(0, 1),
        learning_rates=(1e-3, 3e-3, 9e-3),
        history=50,
        max_candidates=16,
        command=f"python experiments/all_architectures.py {which}",
        **SETTINGS[which],
    )


WIDTHS = (16, 32, 64)
SPLITS = [(kind, tokens) for kind in ("even_split", "auto_split") for tokens in (4, 8, 16)]
CROSSED = [*SPLITS, ("per_feature", None), ("group", None)]


def crossed(log: event_log.EventLog, which: str, kind: str, tokens: int | None) -> study.Study:
    """RankMixer and HeteroAtt along their width, with one tokenizer and one number of tokens.

    RankMixer's widths are the multiples of its number of tokens nearest to WIDTHS.
    """
    found = []
    for name in ("rankmixer", "heteroatt"):
        base = dataclasses.replace(
            NINE[name], tokenizer=kind, tokens=tokens, tasks=len(log.schema.tasks)
        )
        widths = WIDTHS
        if name == "rankmixer" and tokens is None:
            T = tokens_of(log, kind)
            widths = tuple(sorted({max(1, round(w / T)) * T for w in WIDTHS}))
            base = dataclasses.replace(base, width=widths[0])
        elif name == "heteroatt" and kind == "per_feature":
            base = dataclasses.replace(base, dense_tokens=1)
        found.append(ladder.along(base, width=widths))
    asked = ask(log, which)
    return dataclasses.replace(asked, ladders=tuple(found), seeds=(0,))


def in_bfloat16(log: event_log.EventLog, which: str) -> study.Study:
    """A size of every architecture that `ask` sweeps, at a rate that it sweeps, in bfloat16.

    The smallest, but of the plain DNN the largest: its smallest is the logistic regression.
    """
    asked = ask(log, which)
    found = []
    for one in asked.ladders:
        if one.axis == "all":
            config = one.configs[-1 if one.architecture == "dlrm_mlp" else 0]
            config = dataclasses.replace(config, dtype="bfloat16")
            found.append(ladder.along(config, width=(config.width,)))
    middle = asked.table_rates[len(asked.table_rates) // 2]
    return dataclasses.replace(
        asked,
        ladders=tuple(found),
        **{"seeds": (0,), "learning_rates": (3e-3,), "table_rates": (middle,)},
    )


def tokens_of(log: event_log.EventLog, kind: str) -> int:
    """How many tokens the tokenizer makes of the log's features and the pooled history."""
    schema = log.schema
    pooled = len(schema.history)
    if kind == "per_feature":
        return len(schema.user) + len(schema.candidate) + pooled
    groups = {f.group for f in (*schema.user, *schema.candidate)}
    return len(groups | {"history"}) if pooled else len(groups)


def by_size(folder: pathlib.Path) -> pl.DataFrame:
    """A row for every size of every ladder: means and stds over the seeds of its final trials."""
    rows = pl.read_parquet(folder / "results.parquet").filter(pl.col("stage") == "final")
    by = ["architecture", "axis", "axis_value", "tokens", "history", "layers", "width"]
    return rows.group_by(by, maintain_order=True).agg(
        pl.col("dense_params", "training_flops", "learning_rate").first(),
        pl.col("test_ne", "test_auc").mean(),
        pl.col("test_ne", "test_auc").std().name.suffix("_std"),
        pl.col("validation_ne").mean(),
        pl.len().alias("seeds"),
    )


def spread_of(table: pl.DataFrame) -> float:
    """The standard deviation over seeds, one for all sizes of `by_size`."""
    return math.sqrt(table.select((pl.col("test_ne_std") ** 2).mean()).item())


def tie_of(spread: float, seeds: float) -> float:
    """Two means of so many seeds differ by less in 95 of 100 draws of equal ones."""
    return 1.96 * spread * math.sqrt(2 / seeds)


def markdown(rows: list[dict[str, Any]], columns: dict[str, Any]) -> str:
    """A table; columns: {title: row -> text}."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(text(row) for text in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


def show(folder: pathlib.Path) -> None:
    """The best size of every architecture, chosen on validation; then every size of the nine."""
    table = by_size(folder)
    spread = spread_of(table)
    tie = tie_of(spread, table["seeds"].median())
    linear = (pl.col("architecture") == "dlrm_mlp") & (pl.col("layers") == 0)
    logistic = table.filter(linear).row(0, named=True)
    best = (
        table.filter(~linear)
        .sort("validation_ne")
        .group_by("architecture", maintain_order=True)
        .first()
        .sort("test_ne")
        .to_dicts()
    )
    plain = next(row for row in best if row["architecture"] == "dlrm_mlp")

    def versus(row: dict[str, Any]) -> str:
        if abs(row["test_ne"] - plain["test_ne"]) < tie:
            return "tie"
        return "better" if row["test_ne"] < plain["test_ne"] else "worse"

    letters = {"T": "tokens", "S": "history", "L": "layers", "D": "width"}

    def size(row: dict[str, Any]) -> str:
        sizes = {k: row[f] for k, f in letters.items() if row[f] is not None}
        if row["history"] == row["tokens"]:  # a sequence model's tokens are its history's
            sizes.pop("T", None)
        return ", ".join(f"{k} {v}" for k, v in sizes.items())

    def number(row: dict[str, Any], key: str) -> str:
        return f"{row[key]:.4f} ± {row[key + '_std']:.4f}".replace("0.", ".")

    columns = {
        "architecture": lambda r: f"`{r['architecture']}`",
        "size": size,
        "test NE": lambda r: number(r, "test_ne"),
        "test AUC": lambda r: number(r, "test_auc"),
        "beside the plain DNN": versus,
        "dense parameters": lambda r: f"{r['dense_params']:,}",
        "training FLOPs": lambda r: f"{r['training_flops']:.1e}",
        "rate": lambda r: f"{r['learning_rate']:.3g}",
    }
    print(f"spread over seeds {spread:.4f}; a difference below {tie:.4f} is a tie\n")
    logistic = {**logistic, "architecture": "logistic regression"}
    print(markdown([*best, logistic], columns), end="\n\n")

    axes = []
    for name in NINE:
        for axis in ("S", "T", "L", "D", "all"):
            own = table.filter(pl.col("architecture") == name, pl.col("axis") == axis)
            if own.height:
                axes.append((name, axis, own.sort("axis_value")))

    def at(place: int) -> Any:
        return lambda row: number(row[2].row(place, named=True), "test_ne")

    def change(row: Any) -> str:
        gained = row[2]["test_ne"][-1] - row[2]["test_ne"][0]
        return f"{gained:+.4f}".replace("0.", ".") if abs(gained) >= tie else "tie"

    columns = {
        "architecture": lambda r: f"`{r[0]}`",
        "axis": lambda r: r[1],
        "base": at(0),
        "× 2": at(1),
        "× 4": at(2),
        "× 4 against base": change,
        "FLOPs × ": lambda r: f"{r[2]['training_flops'][-1] / r[2]['training_flops'][0]:.1f}",
    }
    print(markdown([row for row in axes if row[2].height == 3], columns))


def show_cross(folder: pathlib.Path) -> None:
    """Test NE of every width, tokenizer and number of tokens; spread and seeds as in `show`."""
    tie = tie_of(spread_of(by_size(folder)), 1)
    rows = []
    for kind, tokens in CROSSED:
        table = by_size(folder / "cross" / f"{kind}_{tokens or 'data'}").sort("width")
        for name in ("rankmixer", "heteroatt"):
            rows.append((name, kind, table.filter(pl.col("architecture") == name)))

    def at(place: int) -> Any:
        return lambda r: f"{r[2]['test_ne'][place]:.4f} ({r[2]['width'][place]})".lstrip("0")

    def middle(row: Any) -> str:
        return at(1)(row) if row[2].height == 3 else ""

    def change(row: Any) -> str:
        gained = row[2]["test_ne"][-1] - row[2]["test_ne"][0]
        return f"{gained:+.4f}".replace("0.", ".") if abs(gained) >= tie else "tie"

    columns = {
        "architecture": lambda r: f"`{r[0]}`",
        "tokenizer": lambda r: f"`{r[1]}`",
        "T": lambda r: str(r[2]["tokens"][0] or "of the data"),
        "narrow (D)": at(0),
        "middle": middle,
        "wide": at(-1),
        "wide against narrow": change,
    }
    print(f"one seed; a difference below {tie:.4f} is a tie\n")
    print(markdown(sorted(rows, key=lambda r: r[0]), columns))


def show_bfloat16(folder: pathlib.Path) -> None:
    """Validation NE of each architecture's trial in bfloat16 and of its twin in float32."""
    swept = pl.read_parquet(folder / "results.parquet").filter(stage="sweep", seed=0)
    same = ["architecture", "tokens", "history", "layers", "width", "learning_rate"]
    same += ["table_learning_rate", "embedding_std"]
    low = pl.read_parquet(folder / "bfloat16" / "results.parquet").filter(stage="final")
    swept = swept.unique(["trial"]).select(*same, float32="validation_ne")
    rows = low.join(swept, on=same, how="left", nulls_equal=True).sort("validation_ne").to_dicts()
    columns = {
        "architecture": lambda r: f"`{r['architecture']}`",
        "bfloat16": lambda r: f"{r['validation_ne']:.4f}".lstrip("0"),
        "float32": lambda r: f"{r['float32']:.4f}".lstrip("0"),
        "difference": lambda r: f"{r['validation_ne'] - r['float32']:+.4f}".replace("0.", "."),
    }
    print(markdown(rows, columns))


def opened(home: pathlib.Path) -> tuple[event_log.EventLog, str]:
    """The log that `world` or `ebnerd` made in a STUDY, and which of the two it is."""
    world = home / "world" / "log"
    which = "world" if world.exists() else "ebnerd"
    return event_log.EventLog.open(world if which == "world" else home / "counted"), which


def main(argv: list[str]) -> None:
    match argv:
        case ["world", folder]:
            log = synthetic.prepare(synthetic.WORLD_550K, pathlib.Path(folder) / "world")
            print(workers.run(ask(event_log.EventLog.open(log), "world"), pathlib.Path(folder)))
        case ["ebnerd", raw, folder]:
            plain = ebnerd.prepare(pathlib.Path(raw), pathlib.Path(folder) / "log")
            windows = counters.CounterConfig(windows=(3600, 6 * 3600, 24 * 3600))
            log = counters.add(plain, pathlib.Path(folder) / "counted", windows)
            print(workers.run(ask(event_log.EventLog.open(log), "ebnerd"), pathlib.Path(folder)))
        case ["cross", folder]:
            home = pathlib.Path(folder)
            log, which = opened(home)
            for kind, tokens in CROSSED:
                asked = crossed(log, which, kind, tokens)
                print(workers.run(asked, home / "cross" / f"{kind}_{tokens or 'data'}"))
        case ["bfloat16", folder]:
            home = pathlib.Path(folder)
            print(workers.run(in_bfloat16(*opened(home)), home / "bfloat16"))
        case ["show-cross", folder]:
            show_cross(pathlib.Path(folder))
        case ["show-bfloat16", folder]:
            show_bfloat16(pathlib.Path(folder))
        case ["show", folder]:
            show(pathlib.Path(folder))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    assert set(NINE) | set(BASELINES) <= set(models.MODELS)
    main(sys.argv[1:])
