"""The mesh of devices, and which array is split along which axis.

Axes of the mesh: `replica` (slices that a slower network joins), `data`, `model`. Arrays carry
logical names for their axes ("batch", "embed", "token", ...); a strategy is a table from logical
names to axes of the mesh. Parameters get their names from the table PARAMETERS, by path, so that
models say nothing of devices. The rows of embedding tables are split over all axes together.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("replica", "data", "model")
Strategy = Literal["data", "fsdp", "tensor", "fsdp_tensor"]
BATCH = ("replica", "data")
STRATEGIES: dict[str, dict[str, tuple[str, ...]]] = {
    # Everything but the batch on every device.
    "data": {"batch": BATCH},
    # Parameters and their optimizer state in parts, put together for a layer when it runs. Not over
    # `replica`: what is put together at every layer stays on a slice.
    "fsdp": {"batch": BATCH, "embed": ("data",)},
    # Tokens' own weights, heads and hidden units, each a part.
    "tensor": {"batch": BATCH, "token": ("model",), "heads": ("model",), "mlp": ("model",)},
}
STRATEGIES["fsdp_tensor"] = STRATEGIES["tensor"] | STRATEGIES["fsdp"]

# (end of a parameter's path, logical names of its axes); the first row that fits in both counts.
# "heads" and "mlp" are what tensor parallelism splits; "token" counts matrices of their own: of
# tokens, of experts, of tasks. Of two "embed" only the first that can be split is.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(query|key|value|gate)/kernel$", ("embed", "heads|embed")),
    (r"(attention_out|layer_\d+/out|mha/out/shared)/kernel$", ("heads|embed", "embed")),
    (r"ffn_in(/shared)?/kernel$", ("embed", "mlp|embed")),
    (r"ffn_out(/shared)?/kernel$", ("mlp|embed", "embed")),
    (r"(bias|scale)$", ("token", None)),
    (r"(kernel|own|gates)$", ("token", "embed", "mlp|embed")),
    (r"", (None,)),
    (r"", ("embed", "embed")),
    (r"", ("token", "embed", "embed")),
    (r"", ("token", None, "embed", "embed")),
)

# How the path of scanned layers' parameters begins (layers/stack.py): (stack, first, last, stride).
STACK = r"^([a-z]+)_stack_(\d+)_(\d+)(?:_(\d+))?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh's axes; data=-1: all devices that the others leave.

    Raises ValueError for a size below 1, and an unknown strategy.
    """

    data: int = -1
    model: int = 1
    replica: int = 1
    strategy: Strategy = "data"

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and not (name == "data" and size == -1):
                raise ValueError(f"sharding.MeshConfig: {name}={size}, expected >= 1")
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"sharding.MeshConfig: strategy={self.strategy!r}, expected one of "
                f"{tuple(STRATEGIES)}"
            )


def mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices [replica, data, model], slice by slice and host by host in their order.

    So a host's devices lie side by side along the last axes, and hold successive rows of a batch.
    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    # CPUs and GPUs have no slices; a TPU's process is of one slice.
    order = lambda d: (getattr(d, "slice_index", None) or 0, d.process_index, d.id)
    devices = sorted(devices, key=order)
    fixed = config.replica * config.model
    data = len(devices) // fixed if config.data == -1 else config.data
    if fixed * data != len(devices) or data < 1:
        raise ValueError(
            f"sharding: {len(devices)} devices, expected replica {config.replica} x data "
            f"{config.data} x model {config.model}"
        )
    sizes = (config.replica, data, config.model)
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def spec(names: Sequence[str | None], shape: Sequence[int], rules: Any, on: Mesh) -> PartitionSpec:
    """The axes of the mesh for every axis of an array with these logical names.

    An axis stays whole where it cannot be split evenly, and where an earlier one of the array has
    taken its part of the mesh already. "mlp|embed" is the first of the two that can be split.
    """
    taken: set[str] = set()
    found: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        found.append(None)
        for one in (name or "").split("|"):
            axes = tuple(a for a in rules.get(one, ()) if a not in taken and on.shape[a] > 1)
            if axes and size % math.prod(on.shape[a] for a in axes) == 0:
                taken |= set(axes)
                found[-1] = axes if len(axes) > 1 else axes[0]
                break
    return PartitionSpec(*found)


def names_of(path: str, ndim: int) -> tuple[str | None, ...]:
    """Logical names of a parameter's axes, by the first row of PARAMETERS that fits.

    Of scanned layers the first axis counts layers and stays whole.
    Raises KeyError for a parameter that no row names.
    """
    if re.match(STACK + "/", path):
        return (None, *names_of(re.sub(STACK, r"\1_\2", path), ndim - 1))
    for pattern, names in PARAMETERS:
        if len(names) == ndim and re.search(pattern, path):
            return names
    raise KeyError(f"sharding.PARAMETERS: no row for {path!r} with {ndim} axes")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where arrays lie: a mesh and a strategy. Hashable, for what is compiled once for it."""

    mesh: Mesh
    strategy: str = "data"

    def parameters(self, params: Any) -> Any:
        """A NamedSharding for every parameter (arrays or shapes)."""
        flat = traverse_util.flatten_dict(params, sep="/")
        return traverse_util.unflatten_dict(
            {path: self.of(names_of(path, x.ndim), x.shape) for path, x in flat.items()}, sep="/"
        )

    def beside_parameters(self, tree: Any, params: Any) -> Any:
        """Of optimizer state: what is named and shaped as a parameter lies as that one does."""
        own = {
            tuple(map(str, path)): (x.shape, self.of(names_of(_text(path), x.ndim), x.shape))
            for path, x in jax.tree_util.tree_leaves_with_path(params)
        }

        def find(path: Any, x: Any) -> NamedSharding:
            keys = tuple(map(str, path))
            for start in range(len(keys)):
                shape, found = own.get(keys[start:], (None, None))
                if shape == x.shape:
                    return found
            return self.whole

        return jax.tree_util.tree_map_with_path(find, tree)

    def of(self, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        rules = STRATEGIES[self.strategy]
        return NamedSharding(self.mesh, spec(names, shape, rules, self.mesh))

    def batched(self, tree: Any) -> Any:
        """Constrains arrays [R, ...] to be split along R, as a model wants them."""
        one = lambda x: self.of(("batch", *[None] * (x.ndim - 1)), x.shape)
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, one(x)), tree)

    def put(self, tree: Any) -> Any:
        """The global arrays of which every host holds its rows: [R / hosts, ...] -> [R, ...].

        Raises ValueError for rows that the devices cannot share.
        """
        rows = len(jax.tree.leaves(tree)[0]) * self.hosts[1]
        if rows % self.mesh.size:
            raise ValueError(
                f"sharding: a batch of {rows} rows on {self.mesh.size} devices, expected a multiple"
            )
        one = lambda x: jax.make_array_from_process_local_data(self.rows, np.asarray(x))
        return jax.tree.map(one, tree)

    @property
    def hosts(self) -> tuple[int, int]:
        """(this process's number, how many there are): which rows of a batch to `put`."""
        return jax.process_index(), jax.process_count()

    @property
    def rows(self) -> NamedSharding:
        """Of a table's rows, and of a batch's while tables are read: over all axes."""
        return NamedSharding(self.mesh, PartitionSpec(AXES))

    @property
    def whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


def placement(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Placement:
    """Of a configuration; raises as `mesh` does."""
    return Placement(mesh(config, devices), config.strategy)


def chosen(config: MeshConfig) -> Placement | None:
    """`placement` on all devices of all hosts; None for one device, which needs no mesh."""
    one = config.data * config.model * config.replica == 1
    return None if one or len(jax.devices()) == 1 else placement(config)


def on(place: Placement | None) -> contextlib.AbstractContextManager:
    """Tells what is traced inside which mesh it is for; see kernels/partition.py."""
    if place is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh)


def local(x: jax.Array | np.ndarray) -> np.ndarray:
    """This host's rows of an array that is split along its first axis only."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    parts = {s.index[0].start or 0: s.data for s in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _text(path: Any) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)
