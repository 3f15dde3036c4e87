"""`rankjax bench NAME`: measure, print, write JSON; the names stand in COMMANDS."""

import contextlib
import dataclasses
import json as json_text
import pathlib
import sys
from typing import Annotated, Any, Literal

import jax
import rich.console
import rich.table
import rich.text
import tyro

from rankjax import catalogue, models, screen
from rankjax.bench import (
    block_inputs,
    blocks,
    kernels,
    loading,
    rounds,
    steps,
    tables,
    tuning,
    weak,
)
from rankjax.bench import layers as layers_bench
from rankjax.data import event_log
from rankjax.data.sources import synthetic
from rankjax.kernels.hstu_attention import tiles
from rankjax.scaling import presets

Config = Annotated[rounds.Rounds, tyro.conf.arg(name="")]  # --rounds, not --config.rounds
Organisation = Literal["impression", "request", "window"]
BlockSize = Literal["tiny", "small", "large"]
WORLD = pathlib.Path("studies/bench/world")
STEPPED = ("dlrm_mlp", "dcnv2_din", "rankmixer", "hstu")  # whole steps, with whole peers


def measure_loader(
    log: pathlib.Path | None = None,
    history: int = 50,
    batch: int = 512,
    config: Config = rounds.Rounds(),  # noqa: B008 (frozen)
    out: pathlib.Path | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Samples and impressions per second of the loader alone.

    Args:
      log: a prepared log; by default the small synthetic world, made in studies/bench/world.
      history: S, events per sample.
      batch: valid impressions a batch.
      config: rounds, repeats, and whether PyTorch peers run beside.
      out: also write the JSON to this file.
      json: print JSON.
    """
    found = loading.run(_open(log), config, history=history, batch=batch)
    return _finish({"loader": found}, out, json)


def measure_embedding(
    rows: tuple[int, ...] = tables.ROWS,
    width: int = 16,
    config: Config = rounds.Rounds(),  # noqa: B008 (frozen)
    out: pathlib.Path | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Seconds of an embedding step (look-up, gradient, update) for tables of several sizes.

    Args:
      rows: table sizes.
      width: E.
      config: rounds, repeats, and whether PyTorch peers run beside.
      out: also write the JSON to this file.
      json: print JSON.
    """
    return _finish({"embedding": tables.run(config, rows=rows, width=width)}, out, json)


def measure_world(
    impressions: int = 2_000_000,
    config: Config = rounds.Rounds(),  # noqa: B008 (frozen)
    out: pathlib.Path | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Impressions per second of the synthetic world, written to disk, by one worker per core.

    Args:
      impressions: at least so many.
      config: how many rounds; the rest does not apply.
      out: also write the JSON to this file.
      json: print JSON.
    """
    return _finish({"world": loading.world(config, impressions)}, out, json)


def measure_step(
    log: pathlib.Path | None = None,
    architectures: tuple[str, ...] = STEPPED,
    organisations: tuple[Organisation, ...] = ("request", "impression"),
    history: int = 50,
    batch: int = 512,
    config: Config = rounds.Rounds(),  # noqa: B008 (frozen)
    out: pathlib.Path | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """The training step of small models, whole, in parts, and as the real loop runs it.

    Args:
      log: a prepared log; by default the small synthetic world, made in studies/bench/world.
      architectures: which models.
      organisations: of samples; each is measured by itself.
      history: S, events per sample.
      batch: valid impressions a step.
      config: rounds, repeats, and whether PyTorch peers run beside.
      out: also write the JSON to this file.
      json: print JSON.
    """
    opened = _open(log)
    sizes = {"history": history}
    models = {n: presets.model(n, len(opened.schema.tasks), **sizes) for n in architectures}
    found = {
        organisation: steps.run(
            opened, models, config, organisation=organisation, history=history, batch=batch
        )
        for organisation in organisations
    }
    return _finish({"step": found}, out, json)


def measure_models(
    peer: Literal["torch"] | None = None,
    names: tuple[str, ...] = (),
    sizes: tuple[BlockSize, ...] = ("small", "large"),
    compiled: bool = False,
    config: Config = rounds.Rounds(),  # noqa: B008 (frozen)
    out: pathlib.Path | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """One block of every architecture, forward and backward; what pruning saves; per-token ways.

    Args:
      peer: also time a plain PyTorch version of every block, on the same parameters and inputs,
        once its values agree; needs rankjax[peers]. The same as --peers.
      names: blocks; all by default. With names, nothing else is measured.
      sizes: of the blocks.
      compiled: the peers pass torch.compile, which needs a C++ compiler.
      config: rounds, repeats, and whether PyTorch peers run beside.
      out: also write the JSON to this file.
      json: print JSON.
    """
    if peer is not None:
        config = dataclasses.replace(config, peers=True)
    of_size = {name: block_inputs.SIZES[name] for name in sizes}
    found = blocks.run(config, blocks=names, sizes=of_size, compiled=compiled)
    if not names:
        found["pruned"] = blocks.pruned(config, of_size)
        found["per_token"] = blocks.feed_forwards(config)
    return _finish(found, out, json)


def measure_kernels(
    lengths: tuple[int, ...] = (),
    width: int = 128,
    heads: int = 4,
    tokens: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    log: pathlib.Path | None = None,
    users: int = 128,
    history: int = 1024,
    tune: bool = False,
    tiles_out: pathlib.Path = tiles.FILE,
    compiled: bool = False,
    config: Config = rounds.Rounds(),  # noqa: B008 (frozen)
    out: pathlib.Path | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """HSTU attention by every implementation, its peers, and what jagged rows save.

    Ctrl-C keeps what has been measured.

    Args:
      lengths: N; by default 256 to 4096, on an accelerator to 16384.
      width: d_qk = d_v of a head.
      heads: H.
      tokens: of a call, about; by default 4096, on an accelerator 65536.
      dtype: by default float32, on an accelerator bfloat16.
      log: a prepared log, whose users' histories are packed; by default the small synthetic world.
      users: of the log, so many samples, drawn from its training span.
      history: S, the newest events of a sample.
      tune: find the best tiles of this kind of device instead, and write them to `tiles_out`.
      tiles_out: table of tiles.
      compiled: the PyTorch peer passes torch.compile, which needs a C++ compiler.
      config: rounds, repeats, and whether a plain PyTorch version runs beside.
      out: also write the JSON to this file.
      json: print JSON.
    """
    small = kernels.platform() == "cpu"
    sizes = {"tokens": tokens or (4096 if small else 65536)}
    sizes["dtype"] = dtype or ("float32" if small else "bfloat16")
    found: dict[str, Any] = {}
    # Accelerators round float32 in products (to TF32, bfloat16) unless asked not to.
    exact = "highest" if sizes["dtype"] == "float32" else None
    try:
        with jax.default_matmul_precision(exact):
            if tune:
                chosen = lengths or ((512, 2048) if small else (1024, 4096))
                tuning.run(config, lengths=chosen, out=tiles_out, **sizes, found=found)
            else:
                chosen = lengths or tuple(2**n for n in range(8, 13 if small else 15))
                shape = {"width": width, "heads": heads, "dtype": sizes["dtype"]}
                more = {"tokens": sizes["tokens"], "compiled": compiled, "found": found}
                kernels.run(config, lengths=chosen, **shape, **more)
                histories = loading.history_lengths(_open(log), users, history)
                found["packing"] = kernels.jagged({"log": histories}, config, **shape)
    except KeyboardInterrupt:
        _finish({"kernels": found, "interrupted": True}, out, json)
        raise
    return _finish({"kernels": found}, out, json)


def measure_all(
    log: pathlib.Path | None = None,
    history: int = 50,
    batch: int = 512,
    rows: tuple[int, ...] = tables.ROWS,
    impressions: int = 2_000_000,
    config: Config = rounds.Rounds(),  # noqa: B008 (frozen)
    out: pathlib.Path | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """World, loader, embedding and step into one report; the loader ahead of the small HSTU.

    Args:
      log: a prepared log; by default the small synthetic world, made in studies/bench/world.
      history: S, events per sample.
      batch: valid impressions a step.
      rows: table sizes of the embedding step.
      impressions: of the world that is written.
      config: rounds, repeats, and whether PyTorch peers run beside.
      out: also write the JSON to this file.
      json: print JSON.
    """
    opened = _open(log)
    models = {n: presets.model(n, len(opened.schema.tasks), history=history) for n in STEPPED}
    sizes = {"history": history, "batch": batch}
    found = {
        "world": loading.world(config, impressions),
        "loader": loading.run(opened, config, **sizes),
        "embedding": tables.run(config, rows=rows),
        "step": {
            organisation: steps.run(opened, models, config, organisation=organisation, **sizes)
            for organisation in ("request", "impression")
        },
    }
    loaded = found["loader"]["rankjax"]["stream"]["impressions_per_second"]["median"]
    trained = found["step"]["request"]["models"]["hstu"]["impressions_per_second"]
    found["loader_over_hstu"] = loaded / trained
    return _finish(found, out, json)


def _open(log: pathlib.Path | None) -> event_log.EventLog:
    return event_log.EventLog.open(log or synthetic.prepare(synthetic.WORLD_SMALL, WORLD))


def measure_weak(
    names: tuple[Literal[*models.MODELS], ...] = ("rankmixer", "hstu"),
    devices: tuple[int, ...] = weak.DEVICES,
    strategies: tuple[str, ...] = ("data", "fsdp"),
    width: int = 128,
    layers: int = 2,
    shape: Annotated[weak.Shape, tyro.conf.arg(name="")] = weak.Shape(),  # noqa: B008 (frozen)
    out: pathlib.Path | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """What a device computes and exchanges as devices grow, compiled for simulated CPU devices.

    Args:
      names: architectures.
      devices: numbers of devices.
      strategies: as of `rankjax train --mesh.strategy`.
      width: D.
      layers: L.
      shape: a device's part of the batch, the same on any number of them.
      out: also write the JSON to this file.
      json: print JSON.
    """
    with contextlib.suppress(RuntimeError):  # too late where devices are in use: `run` tells
        jax.config.update("jax_num_cpu_devices", max(devices))
    schema = catalogue.world_schema()
    sizes = {"width": width, "layers": layers, "history": shape.history}
    made = {name: presets.model(name, len(schema.tasks), **sizes) for name in names}
    tell = lambda case: print(case, file=sys.stderr)
    options = {"devices": devices, "strategies": strategies, "shape": shape, "on_case": tell}
    return _finish({"weak": weak.run(made, schema, **options)}, out, json)


def measure_layers(
    names: tuple[Literal[*models.MODELS], ...] = ("rankmixer", "hstu"),
    layers: tuple[int, ...] = (2, 32),
    width: int = 32,
    shape: Annotated[weak.Shape, tyro.conf.arg(name="")] = layers_bench.SHAPE,
    out: pathlib.Path | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Size, compile time and memory of the training step, layers scanned or not, recomputed or not.

    Args:
      names: architectures.
      layers: L whose steps are compared.
      width: D.
      shape: of the batch.
      out: also write the JSON to this file.
      json: print JSON.
    """
    schema = catalogue.world_schema()

    def make(name: str, L: int) -> Any:
        tasks, sizes = len(schema.tasks), {"width": width, "history": shape.history}
        return presets.model(name, tasks, layers=L, **sizes)

    tell = lambda case: print(case, file=sys.stderr)
    found = layers_bench.run(make, names, schema, layers=layers, shape=shape, on_case=tell)
    return _finish({"layers": found}, out, json)


def _finish(found: dict[str, Any], out: pathlib.Path | None, as_json: bool) -> dict[str, Any]:
    found = {"machine": rounds.machine(), **found}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json_text.dumps(found, indent=1) + "\n")
    if as_json:
        print(json_text.dumps(found))
    else:
        show(found)
    return found


def show(found: dict[str, Any], console: rich.console.Console | None = None) -> None:
    """Prints a report as a table: a path of names and its figure a row."""
    table = rich.table.Table("what", "median", "min", "max")
    for path, value in _leaves(found):
        values = [value]
        if isinstance(value, dict):
            values = [value[key] for key in ("median", "min", "max")]
        table.add_row(*(rich.text.Text(_word(x)) for x in (" / ".join(path), *values)))
    (console or screen.wide()).print(table)


def _word(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _leaves(found: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything below, figures unopened."""
    if not isinstance(found, dict) or {"median", "min", "max"} <= set(found):
        return [(path, found)]
    return [leaf for key, value in found.items() for leaf in _leaves(value, (*path, str(key)))]


COMMANDS = {
    "loader": measure_loader,
    "embedding": measure_embedding,
    "world": measure_world,
    "step": measure_step,
    "models": measure_models,
    "kernels": measure_kernels,
    "weak": measure_weak,
    "layers": measure_layers,
    "all": measure_all,
}
