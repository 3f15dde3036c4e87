"""Ladders: the sizes of one architecture along one axis of scale, or along several at once."""

import dataclasses
import itertools
from typing import Any

from rankjax import models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
    """Sizes of one architecture, smallest first, that differ in one field only, or compound.

    axis: "T" feature tokens, "S" history length, "L" layers, "D" width; "all": compound.
    field: the Config field that is varied; "" where several are.
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
        """The varied field's; a compound ladder's are 1, 2, 3, ..."""
        if not self.field:
            return tuple(range(1, len(self.configs) + 1))
        return tuple(dataclasses.asdict(c)[self.field] for c in self.configs)


def architecture_of(config: Any) -> str:
    """The key of MODELS whose module takes this Config."""
    for name, cls in models.MODELS.items():
        if type(config) is cls.__dataclass_fields__["config"].type:
            return name
    raise ValueError(
        f"found a {type(config).__name__}, expected a Config of {sorted(models.MODELS)}"
    )


def identity(config: Any) -> dict[str, Any]:
    """The Config's fields, without those that are newer than published studies and at their
    defaults, so that a trial keeps its id. A Config names them: `newer: ClassVar[tuple[str, ...]]`.
    """
    fields = dataclasses.asdict(config)
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    newer = getattr(type(config), "newer", ())
    return {k: v for k, v in fields.items() if k not in newer or v != defaults[k]}


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


def compound(base: Any, *steps: dict[str, int]) -> Ladder:
    """Sizes that grow along several axes at once, each a set of fields that replace `base`'s.

    compound(config, {}, {"layers": 3, "width": 32}, {"layers": 4, "width": 64}).
    Raises:
      ValueError: fewer than two sizes, a field that is no axis of this architecture, a field that
        shrinks from one size to the next, two equal sizes, or a size that the architecture refuses.
    """
    name, fields = architecture_of(base), sorted(type(base).axes.values())
    if unknown := sorted({f for step in steps for f in step} - set(fields)):
        raise ValueError(f"ladder of {name}: found fields {unknown}, expected some of {fields}")
    configs = tuple(dataclasses.replace(base, **step) for step in steps)
    if len(configs) < 2:
        raise ValueError(f"ladder of {name}: found {len(configs)} sizes, expected two or more")
    sizes = [{f: dataclasses.asdict(c)[f] for f in fields} for c in configs]
    for small, large in itertools.pairwise(sizes):
        shrinks = [f for f in fields if (large[f] or 0) < (small[f] or 0)]
        if shrinks or small == large:
            raise ValueError(f"ladder of {name}: {large} after {small}, expected a larger size")
    return Ladder(architecture=name, axis="all", field="", configs=configs)
