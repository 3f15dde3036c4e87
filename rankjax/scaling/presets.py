"""Ready-made models, ladders and studies: what the command line and the examples start from."""

import dataclasses
import pathlib
from typing import Any

from rankjax import models, optim, train
from rankjax.data import event_log
from rankjax.data.sources import synthetic
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
from rankjax.scaling import ladder, study

# Sizes that train in seconds to minutes on CPU cores; sizes of the papers are constants of the
# models' own files. An architecture without an entry has the sizes of its `Config()`.
SPLIT = {"tokens": 8, "tokenizer": "even_split", "layers": 2, "width": 16}
STREAM = {"history": 50, "layers": 2, "width": 16, "heads": 2}
SMALL = {
    "dlrm_mlp": dlrm.Config(layers=2, width=32, pooling=("mean",)),
    "dcnv2_din": dcnv2.Config(
        layers=2, width=32, rank=16, pooling=("target",), attention_hidden=(16,)
    ),
    "rankmixer": rankmixer.Config(
        tokens=8,
        layers=2,
        width=16,
        expansion=2,
        pooling=("mean", "target"),
        attention_hidden=(16,),
    ),
    "hstu": hstu.Config(history=50, layers=2, width=16, heads=2, position_init="recency"),
    "dlrm": dlrm.DotConfig(layers=2, width=16, expansion=2),
    "din": din.Config(layers=2, width=32, attention_hidden=(16,)),
    "autoint": autoint.Config(layers=2, width=16, heads=2),
    "wukong": wukong.Config(layers=2, width=16, rank=8, hidden=32),
    "transformer": transformer.Config(**SPLIT, heads=2, expansion=2),
    "heteroatt": hiformer.HeteroAttConfig(**SPLIT, heads=2, expansion=2),
    "hiformer": hiformer.HiformerConfig(
        **SPLIT, heads=2, expansion=2, rank_query=32, rank_key=32, rank_value=64
    ),
    "hhft": hhft.Config(
        **SPLIT, heads=2, hetero_layers=1, virtual_tokens=8, expansion=2, hiformer_expansion=2,
        tower=(32,),
    ),
    "tokenmixer_large": tokenmixer_large.Config(**SPLIT),
    "dlrm_v3": dlrm_v3.Config(**STREAM),
    "mtgr": mtgr.Config(**STREAM),
    "grab": grab.Config(**STREAM),
    "longer": longer.Config(**STREAM),
    "onetrans": onetrans.Config(**STREAM, tokens=8),
}  # fmt: skip
# Without an entry: the small size's own value of every axis that has one, and its doublings.
LADDERS: dict[str, dict[str, tuple[int, ...]]] = {
    "dlrm_mlp": {"width": (8, 32, 128, 512)},
    "dcnv2_din": {"width": (8, 32, 128, 512)},
    "rankmixer": {
        "tokens": (2, 4, 8, 16),
        "layers": (1, 2, 4, 8),
        "width": (8, 16, 32, 64),
    },
    "hstu": {"history": (10, 25, 50, 100), "layers": (1, 2, 4, 8), "width": (8, 16, 32, 64)},
    "tokenmixer_large": {"tokens": (4, 8, 16), "layers": (2, 4, 8), "width": (16, 32, 64)},
}


# `like` counts clicks only, so its mean loss weighs an example 1 / click rate times as much as that
# of `click`, and at equal weights it takes the shared parameters over.
WORLD_TRAINING = train.TrainConfig(
    batch=256,
    optimizer=optim.OptimConfig(learning_rate=3e-3, b2=0.99),
    task_weights=(("like", 0.2),),
)


def model(architecture: str, tasks: int, **sizes: Any) -> Any:
    """The small Config of an architecture, with the fields given (None or no such field: kept).

    Raises:
      ValueError: unknown architecture, or a size that it refuses.
    """
    if architecture not in models.MODELS:
        raise ValueError(f"model: found {architecture!r}, expected one of {sorted(models.MODELS)}")
    base = SMALL.get(architecture) or config_type(architecture)()
    fields = dataclasses.asdict(base)
    given = {k: v for k, v in sizes.items() if v is not None and k in fields}
    return dataclasses.replace(base, tasks=tasks, **given)


def config_type(architecture: str) -> type:
    """The Config class of a key of MODELS."""
    return models.MODELS[architecture].__dataclass_fields__["config"].type


def axes_of(architecture: str) -> dict[str, tuple[int, ...]]:
    """{field: its sizes} of every axis: LADDERS, or x 1, 2 and 4 of the small size."""
    if architecture in LADDERS:
        return LADDERS[architecture]
    base = model(architecture, tasks=1)
    found = {f: dataclasses.asdict(base)[f] for f in type(base).axes.values()}
    return {f: (x, 2 * x, 4 * x) for f, x in found.items() if x is not None}


def ladders(
    architecture: str,
    tasks: int,
    axes: dict[str, tuple[int, ...]] | None = None,
    **sizes: Any,
) -> tuple[ladder.Ladder, ...]:
    """One ladder for each field of `axes` (default: `axes_of`) around `model(...)`."""
    base = model(architecture, tasks, **sizes)
    wanted = axes_of(architecture) if axes is None else axes
    return tuple(ladder.along(base, **{field: values}) for field, values in wanted.items())


def takes_windows(architecture: str) -> bool:
    return models.MODELS[architecture].windows


def world(size: str = "small", impressions: int | None = None, seed: int = 0) -> synthetic.World:
    """A named world ("small", "550k", "world"), or one of about `impressions` impressions."""
    named = {
        "small": synthetic.WORLD_SMALL,
        "550k": synthetic.WORLD_550K,
        "world": synthetic.WORLD,
    }
    if size not in named:
        raise ValueError(f"world: found size {size!r}, expected one of {sorted(named)}")
    config = named[size] if impressions is None else synthetic.at_least(impressions)
    return dataclasses.replace(config, seed=seed)


def study_of(
    log: event_log.EventLog,
    *,
    architectures: tuple[str, ...] = tuple(LADDERS),
    history: int = 50,
    windows: bool = False,
    axes: dict[str, dict[str, tuple[int, ...]]] | None = None,
    fields: dict[str, dict[str, Any]] | None = None,
    **settings: Any,
) -> study.Study:
    """A study of these architectures on a log, along every axis (or along those of `axes`).

    fields: {architecture: fields of its Config} in place of those of SMALL.
    windows: sequence models take windows and the others single impressions (logs without
    requests); else all take requests. `settings` are fields of study.Study.
    """
    if unknown := sorted(set(architectures) - set(models.MODELS)):
        known = list(models.MODELS)
        raise ValueError(f"study: found architectures {unknown}, expected some of {known}")
    sizes = {"history": history}
    if windows:  # a window's own events stand behind the history
        sizes["realtime"] = settings.get("max_realtime", study.Study.max_realtime)
    found: tuple[ladder.Ladder, ...] = ()
    for name in architectures:
        own = {**sizes, **(fields or {}).get(name, {})}
        found += ladders(name, len(log.schema.tasks), (axes or {}).get(name), **own)
    organisations = tuple(
        (name, ("window" if takes_windows(name) else "impression") if windows else "request")
        for name in architectures
    )
    return study.Study(
        log=str(log.folder),
        counters=log.fingerprint.get("counters", True),
        ladders=found,
        organisations=organisations,
        history=history,
        **settings,
    )


def quick(folder: pathlib.Path) -> study.Study:
    """The quick study: the synthetic world of 211,000 impressions, made in `folder`/world.

    Plain DNN, RankMixer (width and layers) and HSTU at four sizes each, one learning rate per
    family (from earlier sweeps on this world), history 20.
    """
    log = event_log.EventLog.open(synthetic.prepare(synthetic.WORLD_SMALL, folder / "world"))
    return study_of(
        log,
        architectures=("dlrm_mlp", "rankmixer", "hstu"),
        history=20,
        axes={
            "dlrm_mlp": {"width": (8, 32, 128, 512)},
            "rankmixer": {"width": (8, 16, 32, 64), "layers": (1, 2, 4, 8)},
            "hstu": {"width": (8, 16, 32, 64)},
        },
        learning_rates=(3e-3,),
        table_rates=(0.1,),
        embedding_stds=(0.05,),
        max_candidates=16,
        training=WORLD_TRAINING,
        command="rankjax study quick",
    )
