"""What a row means: features, vocabularies (tables), semantic groups, actions, tasks.

A `Schema` is written into every log (`log.json`), travels as a static field of every `Batch`, and
is all that a model knows of the data set.
"""

import dataclasses
from typing import Any, Literal

Side = Literal["user", "item", "event", "context"]
Kind = Literal["id", "ids", "dense"]
SIDES = ("user", "item", "event", "context")
KINDS = ("id", "ids", "dense")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """An embedding table. Row 0 means missing: it embeds to zeros and never learns."""

    name: str
    rows: int  # row 0 included; ids are 0 .. rows - 1
    hashed: bool = False  # ids were hashed into 1 .. rows - 1, so that distinct values may collide

    def __post_init__(self) -> None:
        if not 1 < self.rows <= 2**31 - 1:
            raise ValueError(
                f"schema.Table {self.name!r}: rows={self.rows}, expected 2 .. 2**31 - 1 (int32 ids)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """One column, on one side.

    side: where its values lie and where a batch carries them.
      "user":    users file  -> Batch.user
      "item":    items file  -> Batch.history (of each event's item) and Batch.candidate
      "event":   events file -> Batch.history only (action, read time)
      "context": impressions file -> Batch.candidate only (surface, device, position)
    kind: "id" one int32 id, "ids" `values` int32 ids (0 = unused; mean-pooled), "dense" a float32.
    shift, scale: models read a dense feature as (x - shift) / scale; the log holds x.
    derive: "" = stored in the log; else the name of a rule of `rankjax.data.samples.DERIVED`,
      computed from times when a batch is gathered.
    """

    name: str
    side: Side
    group: str  # semantic group, what group and even-split tokenizers keep together
    kind: Kind = "id"
    table: str = ""  # embedding table; features may share one
    values: int = 1
    derive: str = ""
    action: bool = False  # what the user did (an event's outcome); never known of a candidate
    counter: bool = False  # counted over the log before the request (data/counters.py)
    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        where = f"schema.Feature {self.name!r}"
        if self.side not in SIDES:
            raise ValueError(f"{where}: side={self.side!r}, expected one of {SIDES}")
        if self.kind not in KINDS:
            raise ValueError(f"{where}: kind={self.kind!r}, expected one of {KINDS}")
        if (self.kind == "dense") == bool(self.table):
            raise ValueError(f"{where}: kind={self.kind!r} with table={self.table!r}")
        if (self.kind != "ids") and self.values != 1:
            raise ValueError(f"{where}: values={self.values} needs kind='ids'")
        if self.action and self.side != "event":
            raise ValueError(f"{where}: an action belongs to side='event', found {self.side!r}")
        if not self.scale > 0 or (self.kind != "dense" and (self.shift, self.scale) != (0, 1)):
            raise ValueError(
                f"{where}: shift={self.shift}, scale={self.scale} of kind={self.kind!r}, expected "
                "scale > 0, and 0 and 1 but for dense features"
            )
        if self.counter and (self.side, self.kind) != ("context", "dense"):
            raise ValueError(
                f"{where}: a counter is a dense context feature, found side={self.side!r}, "
                f"kind={self.kind!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A binary label of the impressions file. `weight`: the column (another label) that weights it.

    Example: like given click is Task(name="like", weight="click"): it counts where click = 1.
    """

    name: str
    weight: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """Everything static about a log. Hashable, so that it may be a static field of a pytree."""

    tables: tuple[Table, ...]
    features: tuple[Feature, ...]
    tasks: tuple[Task, ...]
    primary_task: str
    # False: only the order within a user is known; the past is cut by (user, order), and features
    # and biases made of time differences are off.
    time_exact: bool = True

    def __post_init__(self) -> None:
        for what, items in (("table", self.tables), ("task", self.tasks)):
            names = [x.name for x in items]
            if len(set(names)) < len(names):
                raise ValueError(f"Schema: a {what} name occurs twice: {names}")
        seen = [(f.side, f.name) for f in self.features]
        if len(set(seen)) < len(seen):
            raise ValueError(f"Schema: a feature occurs twice: {seen}")
        # Item and context features meet in Batch.candidate, item and event features in history.
        both = {f.name for f in self.features if f.side == "item"}
        clash = sorted(both & {f.name for f in self.features if f.side in ("event", "context")})
        if clash:
            raise ValueError(f"Schema: {clash} are item features and event or context features too")
        tables = {t.name for t in self.tables}
        for f in self.features:
            if f.table and f.table not in tables:
                raise ValueError(f"Schema: feature {f.name!r} reads unknown table {f.table!r}")
        names = [t.name for t in self.tasks]
        if self.primary_task not in names:
            raise ValueError(f"Schema: primary_task={self.primary_task!r}, expected one of {names}")
        for t in self.tasks:
            if t.weight and t.weight not in names:
                raise ValueError(f"Schema: task {t.name!r} has unknown weight {t.weight!r}")

    def table(self, name: str) -> Table:
        return next(t for t in self.tables if t.name == name)

    def of(self, *sides: Side) -> tuple[Feature, ...]:
        """The features of these sides, in schema order."""
        return tuple(f for f in self.features if f.side in sides)

    @property
    def user(self) -> tuple[Feature, ...]:
        """What Batch.user carries."""
        return self.of("user")

    @property
    def history(self) -> tuple[Feature, ...]:
        """What Batch.history carries: features of the event's item, and of the event."""
        return self.of("item", "event")

    @property
    def candidate(self) -> tuple[Feature, ...]:
        """What Batch.candidate carries: features of the item, and context."""
        return self.of("item", "context")

    @property
    def action(self) -> Feature | None:
        """The feature that says what the user did: the first `action` one that is a single id."""
        found = (f for f in self.of("event") if f.action and f.kind == "id")
        return next(found, None)

    @property
    def groups(self) -> tuple[str, ...]:
        """Semantic groups in order of first appearance."""
        return tuple(dict.fromkeys(f.group for f in self.features))

    @property
    def primary(self) -> int:
        """Index k of the primary task."""
        return [t.name for t in self.tasks].index(self.primary_task)

    def without_counters(self) -> "Schema":
        """The same log without the features that counters added."""
        kept = tuple(f for f in self.features if not f.counter)
        return dataclasses.replace(self, features=kept)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> "Schema":
        return cls(
            tables=tuple(Table(**t) for t in d["tables"]),
            features=tuple(Feature(**f) for f in d["features"]),
            tasks=tuple(Task(**t) for t in d["tasks"]),
            primary_task=d["primary_task"],
            time_exact=d["time_exact"],
        )
