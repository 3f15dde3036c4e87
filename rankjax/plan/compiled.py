"""What a training step compiles to, from shapes alone: FLOPs, memory, and what devices exchange.

Nothing is allocated: state and batch are shapes that lie where a placement puts them, and figures
come from the compiler. Collectives in a loop count as often as the compiler knows that it runs. Of
an unknown number it is once: of the exchange of table rows one round, which is what a step takes
unless ids are very uneven. FLOPs of any loop count once, as XLA counts them: of scanned layers, and
of attention in tiles.
"""

import collections
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rankjax import sharding, step
from rankjax.batch import Batch
from rankjax.layers import stack
from rankjax.schema import Feature, Schema

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s4": 1, "u4": 1, "c64": 8, "c128": 16}  # others tell by their digits


def batch(schema: Schema, rows: int, history: int, candidates: int) -> Batch:
    """A Batch of shapes: [R, 1 | S | C], one sample a row, all candidates of one time."""

    def of(features: tuple[Feature, ...], slots: int) -> dict[str, jax.ShapeDtypeStruct]:
        kinds = {"dense": jnp.float32}
        return {
            f.name: jax.ShapeDtypeStruct(
                (rows, slots, f.values) if f.kind == "ids" else (rows, slots),
                kinds.get(f.kind, jnp.int32),
            )
            for f in features
        }

    def numbers(slots: int, *more: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, slots, *more), dtype)

    K = len(schema.tasks)
    of_history = {f"history_{x}": numbers(history) for x in ("sample", "time", "order")}
    of_candidates = {f"candidate_{x}": numbers(candidates) for x in ("sample", "time", "order")}
    return Batch(
        user=of(schema.user, 1),
        history=of(schema.history, history),
        candidate=of(schema.candidate, candidates),
        **of_history,
        **of_candidates,
        labels=numbers(candidates, K, dtype=jnp.float32),
        weights=numbers(candidates, K, dtype=jnp.float32),
        impression=None,
        schema=schema,
        one_time=True,
    )


def arguments(
    model_config: Any,
    config: step.TrainConfig,
    shapes: Batch,
    place: sharding.Placement | None = None,
    compute: stack.Compute = stack.PLAIN,
) -> tuple[step.State, Batch]:
    """(state, batch) as shapes, where they lie on a mesh."""
    make = functools.partial(step.fresh, model_config, shapes.schema, config, place, compute)
    state = jax.eval_shape(make, jax.random.key(0), shapes)
    if place is None:
        return state, shapes
    state = jax.tree.map(_placed, state, step.shardings(state, place))
    return state, jax.tree.map(lambda x: _placed(x, place.rows), shapes)


def lowered(
    model_config: Any,
    config: step.TrainConfig,
    shapes: Batch,
    place: sharding.Placement | None = None,
    compute: stack.Compute = stack.PLAIN,
    device: jax.Device | None = None,
) -> jax.stages.Lowered:
    """The training step on arrays of these shapes, lowered; `.compile()` is the compiler's part.

    device: to compile for, without a mesh; None = the one here.
    """
    program = step.program(model_config, shapes.schema, config, place, compute)
    state, batch = arguments(model_config, config, shapes, place, compute)
    rates, key = step.rates_of(config, 1)(0), jax.eval_shape(jax.random.key, 0)
    whole = None if place is None else place.whole
    if device is not None:
        whole = jax.sharding.SingleDeviceSharding(device)
        state, batch = jax.tree.map(lambda x: _placed(x, whole), (state, batch))
    if whole is not None:
        rates, key = jax.tree.map(lambda x: _placed(x, whole), (rates, key))
    return program.step.lower(state, batch, rates, key)


def _placed(x: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where)


def figures(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Of one device, by the compiler.

    "flops" and "bytes" (read and written): by XLA's own count, which leaves out what it does not
    know (sorts, kernels written by hand); 0 where a compiler does not count. "seconds": what it
    expects, less 1 for everything whose time it does not know; 0 where it says nothing.
    "argument_bytes", "temporary_bytes"; "collectives": {kind: bytes}.
    """
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {
        "flops": float(costs.get("flops", 0)),
        "bytes": float(costs.get("bytes accessed", 0)),
        "seconds": float(costs.get("optimal_seconds", 0)),
        "argument_bytes": int(memory.argument_size_in_bytes),
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "collectives": collectives(compiled.as_text()),
    }


def collectives(text: str) -> dict[str, int]:
    """Bytes that a device puts in or gets out of collectives, by kind, from optimised HLO.

    Of each the larger side: what an all-gather yields, what a reduce-scatter takes, both of the
    others. An all-reduce of n bytes moves up to 2 n over the wires of a ring, the others up to n.
    """
    found: collections.Counter[str] = collections.Counter()
    times = _times(text)
    kinds = "|".join(KINDS)
    line = re.compile(rf"= (\(.*?\)|\S+) ({kinds})(-start)?\((.*)")
    chains: set[str] = set()
    for name, body in _computations(text):
        for shape, kind, start, rest in line.findall(body):
            # A TPU prints a collective once for every piece that it fuses with something else.
            chain = re.search(r'"?chain_id"?[=:]"?(\d+)', rest)
            if chain and chain.group(1) in chains:
                continue
            chains |= {chain.group(1)} if chain else set()
            # (what goes in, what comes out, ...); only of an all-reduce some compilers say no more
            # than what comes out.
            if start and shape.startswith("((" if kind == "all-reduce" else "("):
                shape = _parts(shape)[1]
            sizes = [_bytes(*x) for x in re.findall(r"(\w+)\[([\d,]*)\]", shape)]
            together = _group(rest)
            if together > 1:
                scattered = together if kind == "reduce-scatter" else 1
                found[kind] += times.get(name, 1) * scattered * sum(sizes)
    return dict(found)


def _computations(text: str) -> list[tuple[str, str]]:
    """(name, lines) of every computation of an HLO module."""
    heads = list(re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", text, flags=re.MULTILINE))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return (
        [("", text)]
        if not heads
        else [(head.group(1), text[head.start() : end]) for head, end in zip(heads, ends)]
    )


def _times(text: str) -> dict[str, int]:
    """How often bodies of loops run, where the compiler knows; of a loop in a loop, all in all."""
    bodies = dict(_computations(text))
    own, inside = {}, {}
    for name, body in bodies.items():
        for line in body.splitlines():
            if " while(" not in line:
                continue
            loop, condition = (
                re.search(rf"{part}=%?([\w.\-]+)", line).group(1) for part in ("body", "condition")
            )
            known = re.search(r"known_trip_count[^\d]*(\d+)", line)
            own[loop] = int(known.group(1)) if known else _limit(bodies.get(condition, ""))
            inside[loop] = name

    def of(loop: str) -> int:
        return own[loop] * (of(inside[loop]) if inside[loop] in own else 1)

    return {loop: of(loop) for loop in own}


def _limit(condition: str) -> int:
    """n of a loop that runs while a counter from 0 is below the constant n; else 1."""
    below = re.search(r"ROOT .* compare\([^,]+, %?([\w.\-]+)\), direction=LT", condition)
    if below is None:
        return 1
    constant = re.search(rf"%?{re.escape(below.group(1))} = \S+ constant\((\d+)\)", condition)
    return int(constant.group(1)) if constant else 1


def _parts(shape: str) -> list[str]:
    """The shapes in a tuple's: "(f32[2], (s32[], pred[3]))" -> ["f32[2]", "(s32[], pred[3])"]."""
    found, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found]


def _bytes(dtype: str, dims: str) -> int:
    size = BYTES.get(dtype) or int(re.search(r"\d+", dtype).group()) // 8
    return size * math.prod(int(d) for d in dims.split(",") if d)


def _group(text: str) -> int:
    """How many devices exchange with each other; two where the line does not say groups.

    {{0,1},{2,3}}, [2,2]<=[4], or mesh['a'=2,'b'=2] {'b'}.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(listed.group(1).split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(counted.group(1))
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    return 2
