"""How one column becomes a feature or a label: the entries of `features` and `labels`."""

import dataclasses
from typing import Any, Literal

from rankjax.data import samples

TESTS = ("equals", "one_of", "at_least", "above", "below")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """A test of one column: one of equals, one_of, at_least, above, below; or a range, which is
    at_least or above together with below."""

    column: str
    equals: Any = None
    one_of: tuple[Any, ...] | None = None
    at_least: float | None = None
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        values = [self.equals is not None, self.one_of is not None]
        lows = [self.at_least is not None, self.above is not None]
        high = self.below is not None
        if (sum(values), sum(lows), high) not in (
            (1, 0, False),
            (0, 1, False),
            (0, 0, True),
            (0, 1, True),
        ):
            raise ValueError(
                "expected exactly one of equals, one_of, at_least, above, below, or a range: "
                "at_least or above with below"
            )
        if isinstance(self.equals, tuple | dict):
            raise ValueError(f"equals: found {self.equals!r}, expected one value (or one_of)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """A task: a column of 0 and 1 (or true and false), or a condition on a column.

    weight: another label; this one counts where that one is 1 (like given click).
    """

    column: str
    equals: Any = None
    one_of: tuple[Any, ...] | None = None
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    weight: str = ""

    @property
    def condition(self) -> Condition | None:
        """None: the column itself is the label."""
        test = {k: getattr(self, k) for k in TESTS}
        if all(v is None for v in test.values()):
            return None
        return Condition(column=self.column, **test)

    def __post_init__(self) -> None:
        _ = self.condition  # at most one of the tests


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """A feature: a column, how its values become ids or a number, and where it belongs.

    kind: "id" one value, "ids" several (a list, or text parted by `separator`), "dense" a number.
    ids: "vocabulary" (0 missing, 1 unknown, 2 .. the values seen at least `min_count` times in
      training), "hash" (into 1 .. rows - 1), "given" (whole numbers 0 .. rows - 1 as they are).
    table: features with one table share ids and embeddings; default the feature's own name.
    transform of dense: "log" log(1 + x) and refuses x < 0, "symlog" sign(x) log(1 + |x|), both then
      "standard"; "standard" subtracts the mean and divides by the deviation, "quantile" maps to the
      uniform distribution of variance 1; both learned on the training span; "none".
    at: of a list column, the element at this other column's value (counted from 0).
    derive: computed when a batch is made (samples.DERIVED) instead of read from a column.
    """

    column: str = ""
    kind: Literal["id", "ids", "dense"] = "id"
    group: str = ""
    table: str = ""
    ids: Literal["", "vocabulary", "hash", "given"] = ""
    min_count: int | None = None
    rows: int | None = None
    values: int = 8
    separator: str = ""
    transform: Literal["none", "log", "symlog", "standard", "quantile"] = "standard"
    at: str = ""
    action: bool = False
    derive: str = ""

    def __post_init__(self) -> None:
        if self.derive and self.derive not in samples.DERIVED:
            raise ValueError(f"derive: found {self.derive!r}, expected {list(samples.DERIVED)}")
        if self.derive and self.column:
            raise ValueError(f"found both derive={self.derive!r} and column={self.column!r}")
        sized = self.ids in ("hash", "given")
        if self.ids and sized != (self.rows is not None):
            raise ValueError(
                f"found ids={self.ids!r} with rows={self.rows}, expected `rows` (ids are 0 .. "
                "rows - 1) with 'hash' and 'given' only"
            )
        if self.rows is not None and not 1 < self.rows < 2**31:
            raise ValueError(f"rows: found {self.rows}, expected 2 .. 2**31 - 1 (int32 ids)")
        if self.min_count is not None and self.min_count < 1:
            raise ValueError(f"min_count: found {self.min_count}, expected >= 1")
        if self.values < 1:
            raise ValueError(f"values: found {self.values}, expected >= 1")
        for name, given, kind in (
            ("at", self.at, "dense"),
            ("transform", self.transform != "standard", "dense"),
            ("separator", self.separator, "ids"),
        ):
            if given and self.kind != kind:
                raise ValueError(f"{name} needs kind={kind!r}, found {self.kind!r}")


def check_side(features: dict[str, Input], side: str) -> None:
    """Raises ValueError for an action or a derived feature that cannot stand on this side."""
    for name, x in features.items():
        if x.action and side != "event":
            raise ValueError(f"features.{name}: found an action, expected it in [events] only")
        sides = samples.DERIVED[x.derive].sides if x.derive else (side,)
        if side not in sides:
            raise ValueError(
                f"features.{name}: found derive={x.derive!r}, expected it on sides {sides} only"
            )
