"""Ladders: the sizes of one architecture along one axis of scale."""

import dataclasses
from typing import Any

from rankjax import models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
    """Sizes of one architecture, smallest first, that differ in one field only.

    axis: "T" feature tokens, "S" history length, "L" layers or "D" width.
    field: the Config field that is varied.
    """

    architecture: str
    axis: str
    field: str
    configs: tuple[Any, ...]

    @property
    def name(self) -> str:
        return f"{self.architecture} {self.axis}"

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(dataclasses.asdict(c)[self.field] for c in self.configs)


def architecture_of(config: Any) -> str:
    """The key of MODELS whose module takes this Config."""
    for name, cls in models.MODELS.items():
        if type(config) is cls.__dataclass_fields__["config"].type:
            return name
    raise ValueError(
        f"found a {type(config).__name__}, expected a Config of {sorted(models.MODELS)}"
    )


def along(base: Any, **values: tuple[int, ...]) -> Ladder:
    """The ladder that varies one field of `base`: along(config, width=(16, 32, 64)).

    Raises:
      ValueError: not exactly one field, a field that is no axis of this architecture, values that
        do not increase, or a size that the architecture refuses.
    """
    name = architecture_of(base)
    axes = type(base).axes
    if len(values) != 1 or (field := next(iter(values))) not in axes.values():
        raise ValueError(
            f"ladder of {name}: found fields {sorted(values)}, expected one of "
            f"{sorted(axes.values())}"
        )
    sizes = tuple(values[field])
    if not sizes or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"ladder of {name}: {field}={sizes}, expected increasing values")
    axis = next(a for a, f in axes.items() if f == field)
    configs = tuple(dataclasses.replace(base, **{field: v}) for v in sizes)
    return Ladder(architecture=name, axis=axis, field=field, configs=configs)
