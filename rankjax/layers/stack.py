"""A stack of layers: one by one or as a loop compiled once, what is inside saved or computed twice.

Layer i of a stack "block" is the module `block_i`. Scanned, a run of alike layers is one module:
`block_stack_2_9` are the layers 2 .. 9, their parameters side by side along a leading axis of 8. Of
a pattern of p layers that repeats, each place is such a module, named with its stride:
`block_stack_0_6_2` are the layers 0, 2, 4, 6. A layer that has no neighbour of its kind stays what
it is. How a stack is computed changes no value but the random bits of dropout, which are others in
a loop.
"""

import dataclasses
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax import sharding

# What of a layer's inside the backward pass finds saved; all else it computes a second time.
SAVED: dict[str, Callable[..., Any]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # Of linear layers that all rows share: not of attention, nor of tokens' own weights.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all_dots": jax.checkpoint_policies.dots_saveable,
}
REMAT = ("none", *SAVED)

_NAME = re.compile(sharding.STACK + "$")
Make = Callable[[str, Any], nn.Module]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a stack of layers is computed, never what.

    scan: alike layers are one loop, so that the program does not grow with their number.
    remat: "none" saves what the backward pass reads; "full" saves a layer's input and computes the
      layer again; "dots" and "all_dots" save results of matrix products too. On a CPU it
      saved memory in a loop only, so that it takes scan there.
    Raises ValueError for an unknown remat.
    """

    scan: bool = False
    remat: Literal["none", "full", "dots", "all_dots"] = "none"

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ValueError(f"stack.Compute: remat={self.remat!r}, expected one of {REMAT}")


PLAIN = Compute()


def refuse_scan(compute: Compute, where: str, found: str) -> None:
    """Raises ValueError where a scan is asked of a model that has nothing to scan."""
    if compute.scan:
        raise ValueError(f"{where}: scan=True, but {found}; expected scan=False")


def run(
    compute: Compute,
    name: str,
    kinds: Sequence[Hashable],
    make: Make,
    call: Callable[[nn.Module, Any, Any], Any],
    x: Any,
    begin: int = 0,
) -> Any:
    """x behind a stack of layers.

    Args:
      kinds: of every layer, what tells it from others; layers of equal kinds differ in nothing but
        their parameters, and keep the shape of x where they are neighbours.
      make: (name, kind) -> the layer's module, within the calling module's compact method.
      call: (module, kind, x) -> x behind that layer.
      x: an array or a pytree of arrays.
      begin: the number of the first layer, in names.
    """
    one = lambda layer, kind, x: (call(layer, kind, x), None)
    return collect(compute, name, kinds, make, one, x, begin)[0]


def collect(
    compute: Compute,
    name: str,
    kinds: Sequence[Hashable],
    make: Make,
    call: Callable[[nn.Module, Any, Any], tuple[Any, Any]],
    x: Any,
    begin: int = 0,
) -> tuple[Any, Any]:
    """As `run`, where `call` returns (x, y): (x, every layer's y side by side, [L, ...]).

    The y of all layers have one shape; None is none.
    """
    found = []
    for first, times, period in runs(kinds if compute.scan else range(len(kinds))):
        own = kinds[first : first + period]
        names = _names(name, first + begin, times, period)
        layers = [make(*pair) for pair in zip(names, own, strict=True)]
        if times == 1:
            x, y = _recomputed(compute, call, own[0], looped=False)(layers[0], x)
            found.append(jax.tree.map(lambda y: y[None], y))
            continue

        def body(several: "_Several", x: Any, _: None, own: Sequence[Hashable] = own) -> Any:
            ys = []
            for layer, kind in zip(several.layers, own, strict=True):
                x, y = _recomputed(compute, call, kind, looped=True)(layer, x)
                ys.append(y)
            return x, ys

        loop = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=times,
            check_constancy_invariants=False,  # nothing is broadcast: one trace is enough
        )
        x, ys = loop(_Several(tuple(layers)), x, None)
        in_order = lambda *y: jnp.stack(y, axis=1).reshape(-1, *y[0].shape[1:])
        found.append(jax.tree.map(in_order, *ys))
    return x, jax.tree.map(lambda *y: jnp.concatenate(y), *found) if found else None


class _Several(nn.Module):
    """The modules of one turn of a loop; they belong to the model, this one has no parameters."""

    layers: tuple[nn.Module, ...]


def runs(kinds: Sequence[Hashable]) -> list[tuple[int, int, int]]:
    """(first layer, n, p) of every run, in order: p kinds that stand there n times.

    Of all runs that begin at a layer, the one that covers most layers, then the shortest pattern;
    (first, 1, 1) for a layer that begins none.
    """
    found, first = [], 0
    while first < len(kinds):
        best = (1, 1)
        for period in range(1, (len(kinds) - first) // 2 + 1):
            pattern, times = list(kinds[first : first + period]), 1
            while list(kinds[first + times * period :][:period]) == pattern:
                times += 1
            if times > 1 and times * period > best[0] * best[1]:
                best = times, period
        found.append((first, *best))
        first += best[0] * best[1]
    return found


def stacked(tree: Any, names: Iterable[str]) -> Any:
    """Parameters of layers one by one -> those of the scanned model.

    tree: the model's parameters, or a pytree with such dicts in it, as optimizer state.
    names: the scanned model's own, of which those of runs count: its parameters, arrays or shapes.
    Raises ValueError where layers of a run are missing.
    """
    members = {name: _members(name) for name in names if _NAME.match(name)}

    def change(params: dict[str, Any]) -> dict[str, Any]:
        params = dict(params)
        for name, own in members.items():
            if missing := [layer for layer in own if layer not in params]:
                raise ValueError(f"stack.stacked: {name} needs {missing}, found {sorted(params)}")
            params[name] = jax.tree.map(lambda *x: jnp.stack(x), *map(params.pop, own))
        return params

    return _each_dict(change, tree)


def unstacked(tree: Any) -> Any:
    """Parameters of the scanned model -> those of its layers one by one; the way back."""

    def change(params: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in params.items():
            own = _members(name) if _NAME.match(name) else []
            for i, layer in enumerate(own):
                found[layer] = jax.tree.map(lambda x: x[i], value)  # noqa: B023
            if not own:
                found[name] = value
        return found

    return _each_dict(change, tree)


def _each_dict(change: Callable[[dict], dict], tree: Any) -> Any:
    is_dict = lambda x: isinstance(x, dict)
    return jax.tree.map(lambda x: change(x) if is_dict(x) else x, tree, is_leaf=is_dict)


def _recomputed(
    compute: Compute, call: Callable[..., Any], kind: Hashable, looped: bool
) -> Callable[..., Any]:
    """(module, x) -> call(module, kind, x), saving for the backward pass what `remat` says."""

    def layer(module: nn.Module, x: Any) -> Any:
        return call(module, kind, x)

    if compute.remat == "none":
        return layer
    # Within a loop nothing stands beside the second computation that it could be merged with.
    return nn.remat(layer, policy=SAVED[compute.remat], prevent_cse=not looped)


def _names(name: str, first: int, times: int, period: int) -> list[str]:
    if times == 1:
        return [f"{name}_{first}"]
    stride = "" if period == 1 else f"_{period}"
    begins = range(first, first + period)
    return [f"{name}_stack_{i}_{i + (times - 1) * period}{stride}" for i in begins]


def _members(name: str) -> list[str]:
    """ "block_stack_2_4" -> ["block_2", "block_3", "block_4"]."""
    kind, first, last, stride = _NAME.match(name).groups()
    return [f"{kind}_{i}" for i in range(int(first), int(last) + 1, int(stride or 1))]
