"""What a training step costs on a target: memory, time and money, and what to do if it is too much.

Memory is what the compiler reserves. Time is the longest of what arithmetic, memory and network
take at their published peaks; a real step takes longer, unless the compiler counts bytes that are
not read. Beside it stands what the compiler itself expects, where it says so.
"""

import dataclasses
import math
import re
from typing import Any

import jax

from rankjax import sharding, step
from rankjax.layers import stack
from rankjax.plan import compiled, targets
from rankjax.scaling import sizes
from rankjax.schema import Schema

LANES = 128  # of a TPU's tile: a narrower row is filled up where rows are looked up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """One step to plan.

    rows: requests of the whole batch, one a row; history S; candidates C.
    price: of a device for an hour, in any currency; None = no cost.
    Raises ValueError for rows, history or candidates below 1, and a negative price.
    """

    model: Any
    schema: Schema
    rows: int
    history: int
    candidates: int
    mesh: sharding.MeshConfig = sharding.MeshConfig()
    compute: stack.Compute = stack.PLAIN
    training: step.TrainConfig = step.TrainConfig()
    price: float | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "history", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: found {name} {getattr(self, name)}, expected >= 1")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ValueError(f"plan: found price {self.price}, expected >= 0")


def make(ask: Ask, target: targets.Target) -> dict[str, Any]:
    """The bill of a step on a target; all figures of one device, unless they say otherwise.

    Raises ValueError for a mesh that the devices do not make, rows that they cannot share, and a
    step that the target's compiler refuses for another reason than its memory.
    """
    count = len(target.devices)
    place = sharding.placement(ask.mesh, target.devices)
    check_rows(ask.rows, target)
    if count == 1:
        place = None
    lowered, held = _lowered(ask, target, place)
    found = _compiled(lowered)
    memory = _memory(found, held)
    fits = "refused" not in found
    if target.chip is not None:
        fits = fits and memory["memory_bytes"] <= target.chip.memory
    bill = {
        "target": target.name,
        "devices": count,
        "strategy": ask.mesh.strategy if place else None,
        "mesh": dict(place.mesh.shape) if place else None,
        "rows": ask.rows,
        "held_bytes": held,
        **memory,
        "fits": fits,
        **_work(found, ask, count),
    }
    times = _time(bill, found.get("seconds", 0.0), ask, target)
    return bill | times | {"advice": advice(bill, ask, target)}


def check_rows(rows: int, target: targets.Target) -> None:
    """Raises ValueError for rows that the devices cannot share."""
    count = len(target.devices)
    if rows % count:
        raise ValueError(
            f"plan: {rows} rows on the {count} devices of {target.name}, expected a multiple, as "
            f"{math.ceil(rows / count) * count}"
        )


def _lowered(
    ask: Ask, target: targets.Target, place: sharding.Placement | None
) -> tuple[jax.stages.Lowered, dict[str, int]]:
    """The step, and the bytes of what a device holds between steps."""
    shapes = compiled.batch(ask.schema, ask.rows, ask.history, ask.candidates)
    asked = ask.model, ask.training, shapes, place, ask.compute
    state, batch = compiled.arguments(*asked)
    held = {
        "parameters": state.params,
        "optimizer": state.optimizer,
        "tables": state.tables,
        "table_optimizer": state.table_optimizer,
        "batch": batch,
    }
    lowered = compiled.lowered(*asked, device=None if place else target.devices[0])
    return lowered, {name: _bytes(tree) for name, tree in held.items()}


def _memory(found: dict[str, Any], held: dict[str, int]) -> dict[str, int]:
    """Of a step that was refused the compiler says the sum, else the parts.

    The state is donated: what comes out lies where it came in. The compiler's arguments are more
    than the state's numbers where it fills rows up to its tiles.
    """
    if "refused" in found:
        total = found["needed_bytes"]
        return {"temporary_bytes": max(0, total - sum(held.values())), "memory_bytes": total}
    arguments = max(found["argument_bytes"], sum(held.values()))
    temporary = found["temporary_bytes"]
    return {"temporary_bytes": temporary, "memory_bytes": arguments + temporary}


def _work(found: dict[str, Any], ask: Ask, devices: int) -> dict[str, Any]:
    """What the compiler counts of the step, or why it refuses it; and rankjax's count of FLOPs.

    "flops_counted": three forward passes, look-up and optimizer left out. Loops and kernels count
    in full, which compilers leave out; attention counts all pairs, the masked ones too. Where no
    compiler counts, there are no "flops" and "bytes".
    """
    width = ask.training.tables.width
    args = ask.model, ask.schema, width, True, ask.history, ask.candidates
    counted = {"flops_counted": 3.0 * sizes.forward_count(*args).total * ask.rows / devices}
    if "refused" in found:
        return {**counted, "compiler": found["refused"]}
    of_compiler = {k: found[k] for k in ("flops", "bytes") if found["flops"]}
    return {**of_compiler, **counted, "collectives": found["collectives"]}


def _compiled(lowered: jax.stages.Lowered) -> dict[str, Any]:
    """`compiled.figures`; of a step that a compiler refuses for its memory "refused" (what it says)
    and "needed_bytes" (what a device would have to have)."""
    try:
        return compiled.figures(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        asked = re.search(r"(?:required[^(]*\(|Used )([\d.]+)([KMGT])", text)
        if "RESOURCE_EXHAUSTED" not in text or asked is None:
            raise ValueError(
                f"plan: the target's compiler refuses the step: {text.splitlines()[0]}"
            ) from error
        size = float(asked.group(1)) * 1024 ** (1 + "KMGT".index(asked.group(2)))
        return {"refused": text.splitlines()[0], "needed_bytes": int(size)}


def _bytes(tree: Any) -> int:
    """Of one device: arrays by the part that their sharding gives it."""

    def one(x: Any) -> int:
        own = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        return math.prod(own) * x.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def _time(
    bill: dict[str, Any], by_compiler: float, ask: Ask, target: targets.Target
) -> dict[str, Any]:
    """Seconds at the published peaks, and what follows; nothing for CPUs.

    Arithmetic is the larger of the two counts, as either leaves something out. by_compiler: the
    seconds that the compiler expects. They stand there only where they are no less than what
    arithmetic and memory take; else it did not know the time of something.
    """
    chip = target.chip
    if chip is None or "compiler" in bill:
        return {} if chip is None else {"memory_share": bill["memory_bytes"] / chip.memory}
    parts = {"arithmetic": max(bill["flops_counted"], bill.get("flops", 0.0)) / chip.peak}
    if "bytes" in bill:
        parts["memory"] = bill["bytes"] / chip.bandwidth
    known = by_compiler > 0 and by_compiler >= max(parts.values())
    parts["network"] = sum(bill["collectives"].values()) / chip.network
    limit = max(parts, key=parts.__getitem__)
    seconds = parts[limit]
    found = {
        "memory_share": bill["memory_bytes"] / chip.memory,
        "seconds_at_peaks": parts,
        **({"seconds_by_compiler": by_compiler} if known else {}),
        "limit": limit,
        "requests_per_second_at_peaks": ask.rows / seconds,
        "mfu_at_peaks": parts["arithmetic"] / seconds,
    }
    if ask.price is not None:
        hours = 1e9 * seconds / ask.rows / 3600
        found["cost_of_a_billion_requests_at_peaks"] = hours * bill["devices"] * ask.price
    return found


def advice(bill: dict[str, Any], ask: Ask, target: targets.Target) -> list[str]:
    """What to change where the step does not fit into a device's memory, or copies tables."""
    chip, held, found = target.chip, bill["held_bytes"], []
    width, pack = ask.training.tables.width, ask.training.tables.pack
    tpu = target.name.split(":")[0] in targets.TPUS
    copied = tpu and bill["temporary_bytes"] > held["tables"] > chip.memory / 100
    if copied and width * pack % LANES:
        better = (
            f"--table-pack {LANES // width}" if LANES % width == 0 else "a width that divides it"
        )
        found.append(
            f"tables {width} wide are copied in every step, as a TPU looks up rows of {LANES}: "
            f"{better}"
        )
    if bill["fits"]:
        return found
    large = chip.memory / 4
    tables = held["tables"] + held["table_optimizer"]
    if tables > chip.memory / 2:
        more = math.ceil(bill["devices"] * tables / (chip.memory / 2))
        found.append(
            f"tables alone take {_gib(tables)}: more devices (about {more}), or fewer rows"
        )
    dense = held["parameters"] + held["optimizer"]
    if dense > large and "fsdp" not in ask.mesh.strategy:
        found.append(f"parameters and optimizer take {_gib(dense)}: --mesh.strategy fsdp")
    if bill["temporary_bytes"] > large:
        taken = _gib(bill["temporary_bytes"])
        if ask.compute.remat == "none" and _scans(ask):
            found.append(f"temporaries take {taken}: --compute.scan --compute.remat full")
        if ask.rows > bill["devices"]:
            found.append(f"temporaries take {taken}: fewer --rows (at least {bill['devices']})")
        elif "tensor" not in ask.mesh.strategy:
            found.append(f"temporaries take {taken}: --mesh.strategy fsdp_tensor --mesh.model 2")
    return found or ["more devices: everything that can be split is"]


def _scans(ask: Ask) -> bool:
    """Whether the model has alike layers to scan: others refuse."""
    shapes = compiled.batch(ask.schema, 1, ask.history, ask.candidates)
    scanned = dataclasses.replace(ask.compute, scan=True)
    try:
        compiled.arguments(ask.model, ask.training, shapes, None, scanned)
    except ValueError:
        return False
    return True


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
