"""What a log of one's own files holds, by the words of the schema: plain loops over all rows.

`log(config, files)`: config is a schema.toml as tomllib reads it, files {name: rows}, a row
{column: value}. Times are whole numbers (time_unit s or ms). Returns {"users", "items", "events",
"impressions": {column: list}, "tables": {name: rows}, "lost": ...}; impressions of clicks
([negatives]) are left out, as they are drawn.
"""

import collections
import dataclasses
import fnmatch
import hashlib
import math
from typing import Any

TABLES = ("users", "items", "events", "impressions")
SIDES = {"users": "user", "items": "item", "events": "event", "impressions": "context"}
MASK = 2**64 - 1
EARLIEST = 631_152_000  # 1990-01-01
BEFORE_ALL = -math.inf  # the clock of a list's elements


@dataclasses.dataclass
class Row:
    table: str
    number: int  # of which [[events]] or [[impressions]]
    order: tuple[int, int]  # file, row
    cells: dict[str, Any]
    spec: dict[str, Any]
    time: int | None = None
    user: Any = None
    item: Any = None


def hash_64(x: Any) -> int:
    if x is None:
        return 0
    if isinstance(x, str):
        return int.from_bytes(hashlib.blake2b(x.encode(), digest_size=8).digest(), "little")
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def holds(condition: dict[str, Any], cells: dict[str, Any]) -> bool:
    x = cells[condition["column"]]
    if x is None:
        return False
    if "equals" in condition:
        return x == condition["equals"]
    if "one_of" in condition:
        return x in condition["one_of"]
    return x >= condition["at_least"] if "at_least" in condition else x > condition["above"]


def key(cells: dict[str, Any], columns: Any) -> Any:
    if not columns:
        return "everyone"
    if isinstance(columns, str):
        return cells[columns]
    return "\x1f".join(str(cells[c]) for c in columns)


def feature(config: dict[str, Any], name: str, x: Any) -> dict[str, Any]:
    """A feature's settings with every default."""
    x = {"column": x} if isinstance(x, str) else dict(x)
    defaults = {"column": name, "kind": "id", "table": name, "values": 8, "transform": "standard"}
    defaults |= {"ids": "vocabulary", "min_count": 1, "rows": None}
    return {**defaults, **config.get("ids", {}), **x}


def elements(x: dict[str, Any], value: Any) -> list[Any]:
    """The ids of a cell of kind "id" or "ids"."""
    if value is None:
        return []
    if x["kind"] == "id":
        return [value]
    if isinstance(value, str):
        return [word for word in value.split(x["separator"]) if word]
    return [word for word in value if word is not None]


def linear(x: dict[str, Any], value: float | None) -> float | None:
    if value is None or math.isnan(value):
        return None
    if x["transform"] == "log":
        return math.log(1 + value)
    if x["transform"] == "symlog":
        return math.copysign(math.log(1 + abs(value)), value)
    return float(value)


class Import:
    def __init__(self, config: dict[str, Any], files: dict[str, list[dict[str, Any]]]):
        self.config = config
        self.specs = {t: config.get(t, []) for t in TABLES}
        self.specs = {t: x if isinstance(x, list) else [x] for t, x in self.specs.items()}
        self.exact = config.get("time_exact", True)
        self.rows = [row for table in TABLES for row in self._rows(table, files)]
        self.own = {s: feature(config, s, config.get(s, {})) for s in ("user", "item")}
        self.lost: dict[str, dict[str, int]] = {}
        self._who_and_what()
        self._cut()
        self._learn()

    def _rows(self, table, files):
        part = TABLES.index(table) * 1000
        for number, spec in enumerate(self.specs[table]):
            patterns = [spec["files"]] if isinstance(spec["files"], str) else spec["files"]
            names = []
            for pattern in patterns:
                fits = sorted(n for n in files if fnmatch.fnmatch(n, pattern))
                names += [n for n in fits if n not in names]
            for name in names:
                for i, cells in enumerate(files[name]):
                    if "where" in spec and not holds(spec["where"], cells):
                        continue
                    yield self._row(Row(table, number, (part, i), cells, spec))
                part += 1

    def _row(self, row):
        spec, unit = row.spec, {"s": 1, "ms": 1000}[row.spec.get("time_unit", "s")]
        if row.table in ("users", "items"):
            setattr(row, SIDES[row.table], key(row.cells, spec["id"]))
            return row
        row.user = key(row.cells, spec.get("user"))
        row.item = key(row.cells, spec["item"]) if spec.get("item") else None
        if spec.get("time") == "@row":
            row.time = self.config.get("earliest", EARLIEST) + row.order[1]
        elif "time" in spec:
            row.time = row.cells[spec["time"]] // unit
        return row

    def of(self, *tables: str) -> list[Row]:
        return [row for row in self.rows if row.table in tables]

    def _who_and_what(self):
        found = {"user": set(), "item": set()}
        for row in self.rows:
            for side in found:
                x = getattr(row, side)
                found[side] |= set(x) if isinstance(x, list) else {x} - {None}
        self.known = {side: sorted(x) for side, x in found.items()}

    def row_of(self, side: str, x: Any) -> int:
        """Row of the users or the items file."""
        if x is None:
            return 0
        return x if self.own[side]["ids"] == "given" else self.known[side].index(x) + 1

    def _cut(self):
        split = self.config.get("split", {})
        as_list = lambda x: x if isinstance(x, list) else [x]
        self.values = {}
        for span, name in enumerate(("train", "validation", "test")):
            for value in as_list(split.get(f"{name}_values", [])):
                self.values[str(value)] = span
        shown = self.of("impressions") or [r for r in self.of("events") if self.is_click(r)]
        share, second = split.get("train", 0.8), split.get("validation", 0.1)
        if self.values:
            train = [r.time for r in shown if self.values[str(r.cells[r.spec["split"]])] == 0]
            last = max(train)
            if 1 not in self.values.values():
                last = self._at(train, 1 - second)
            self.cuts = last, last
        elif "train_until" in split:
            self.cuts = split["train_until"], split["validation_until"]
        else:
            times = [r.time for r in shown]
            self.cuts = self._at(times, share), self._at(times, share + second)

    def is_click(self, row: Row) -> bool:
        of = self.config["negatives"].get("of")
        return of is None or holds(of, row.cells)

    def _at(self, times: list[int], share: float) -> int:
        """The first time by which that share of the rows has come."""
        return min(t for t in times if sum(x <= t for x in times) >= share * len(times))

    def span(self, row: Row) -> int:
        train, validation = self.cuts
        if self.values:
            named = self.values[str(row.cells[row.spec["split"]])]
            return 1 if named == 0 and row.time > train else named
        return 0 if row.time <= train else 1 if row.time <= validation else 2

    def features(self, row: Row, side: str) -> dict[str, dict[str, Any]]:
        """Stored features that a row of this table holds for a side."""
        found = row.spec.get("features", {})
        if side == "context" and row.table == "events":
            found = self.config["negatives"].get("features", {})
        found = {name: feature(self.config, name, x) for name, x in found.items()}
        return {name: x for name, x in found.items() if not x.get("derive")}

    def sides(self, row: Row) -> list[str]:
        """The sides that a row's features are of."""
        clicks = row.table == "events" and "negatives" in self.config
        return [SIDES[row.table]] + ["context"] * clicks

    def every(self) -> list[dict[str, Any]]:
        return [x for row in self.rows for side in self.sides(row)
                for x in self.features(row, side).values()]  # fmt: skip

    def learns(self, row: Row) -> bool:
        if self.config.get("ids", {}).get("learn") == "all":
            return True
        if row.table in ("users", "items"):
            side = SIDES[row.table]
            return not self.acting[side] or getattr(row, side) in self.acting[side]
        if row.time is None:  # a list
            return row.user in self.acting["user"]
        return self.span(row) == 0 if row.table == "impressions" else row.time <= self.cuts[0]

    def _learn(self):
        self.acting = {"user": set(), "item": set()}
        timed = [r for r in self.of("events", "impressions") if r.time is not None]
        lists = [r for r in self.of("events") if r.time is None]
        for row in [r for rows in (timed, lists) for r in rows]:
            if self.learns(row):
                self.acting["user"].add(row.user)
                items = row.item if isinstance(row.item, list) else [row.item]
                self.acting["item"] |= set(items) - {None}
        counted = collections.defaultdict(collections.Counter)
        least = {}
        numbers = collections.defaultdict(list)
        for row in filter(self.learns, self.rows):
            if row.table in ("events", "impressions"):
                for side, x in self.own.items():
                    value = getattr(row, side)
                    counted[x["table"]].update(value if isinstance(value, list) else [value])
            for side in self.sides(row):
                for name, x in self.features(row, side).items():
                    value = row.cells[x["column"]]
                    if x["kind"] == "dense":
                        numbers[side, name].append(linear(x, value))
                    else:
                        counted[x["table"]].update(elements(x, value))
        for x in [*self.own.values(), *(x for x in self.every() if x["kind"] != "dense")]:
            if x["ids"] == "vocabulary":
                least.setdefault(x["table"], x["min_count"])
        self.words = {
            table: sorted(w for w, n in counted[table].items() if w is not None and n >= count)
            for table, count in least.items()
        }
        self.numbers = {k: [x for x in xs if x is not None] for k, xs in numbers.items()}

    def id_of(self, x: dict[str, Any], value: Any) -> int:
        if value is None:
            return 0
        if x["ids"] == "given":
            return value
        if x["ids"] == "hash":
            return 1 + hash_64(value) % (x["rows"] - 1)
        words = self.words[x["table"]]
        return 2 + words.index(value) if value in words else 1

    def number_of(self, side: str, name: str, x: dict[str, Any], value: float | None) -> float:
        value, known = linear(x, value), self.numbers[side, name]
        if value is None:
            return 0.0
        if x["transform"] == "none" or not known:
            return value
        if x["transform"] == "quantile":
            less, equal = sum(k < value for k in known), sum(k == value for k in known)
            return ((less + equal / 2) / len(known) - 0.5) * math.sqrt(12)
        mean = sum(known) / len(known)
        deviation = math.sqrt(sum((k - mean) ** 2 for k in known) / len(known))
        return (value - mean) / (deviation or 1)

    def encoded(self, row: Row, side: str) -> dict[str, Any]:
        """The log's features of a row; what is missing or does not fit is counted."""
        found = {}
        for name, x in self.features(row, side).items():
            value = row.cells[x["column"]]
            lost = self.lost.setdefault(f"{side}.{name}", {"missing": 0, "cut": 0})
            lost["missing"] += value is None
            if x["kind"] == "dense":
                found[name] = self.number_of(side, name, x, value)
            elif x["kind"] == "id":
                found[name] = self.id_of(x, value)
            else:
                words = elements(x, value)
                ids = [self.id_of(x, w) for w in words[: x["values"]]]
                found[name] = ids + [0] * (x["values"] - len(ids))
                lost["cut"] += max(0, len(words) - x["values"])
        return found

    def zeros(self, side: str) -> dict[str, Any]:
        """Every stored feature of a side, missing."""
        every = [x for row in self.rows if side in self.sides(row)
                 for x in self.features(row, side).items()]  # fmt: skip
        return {name: [0] * x["values"] if x["kind"] == "ids" else 0 for name, x in every}

    def catalogue(self, side: str) -> list[dict[str, Any]]:
        own, known = self.own[side], self.known[side]
        n = own["rows"] if own["ids"] == "given" else len(known) + 1
        found = [{side: 0, **self.zeros(side)} for _ in range(n)]
        for x in known:
            found[self.row_of(side, x)][side] = self.id_of(own, x)
        births = {}
        for row in self.of(f"{side}s"):
            at = self.row_of(side, getattr(row, side))
            found[at] |= self.encoded(row, side)
            if "birth" in row.spec and row.cells[row.spec["birth"]] is not None:
                births[at] = row.cells[row.spec["birth"]]
        if any("birth" in row.spec for row in self.of(f"{side}s")):
            for at, one in enumerate(found):
                one["birth"] = births.get(at, min(births.values())) if at else 0
        return found

    def requests(self) -> list[list[Row]]:
        """The rows of each request, oldest first."""
        named, others = collections.defaultdict(list), []
        share = int(self.config.get("users_share", 1) * 2**64)
        shown = [row for row in self.of("impressions") if hash_64(row.user) < share]
        for row in sorted(shown, key=lambda r: (r.number, r.user, r.time, r.order)):
            columns = row.spec.get("request")
            last = others[-1][-1] if others else None
            if columns and columns != "@row":
                named[row.cells[columns]].append(row)
            elif (
                columns != "@row"
                and last is not None
                and last.spec.get("request") is None
                and (last.number, last.user) == (row.number, row.user)
                and row.time - last.time <= row.spec.get("request_gap", 0)
            ):
                others[-1].append(row)
            else:
                others.append([row])
        named = [sorted(x, key=lambda r: (r.time, r.order)) for x in named.values()]
        return named + others

    def clock(self, row: Row) -> float:
        return row.cells[row.spec["order"]] if row.spec.get("order") else row.time

    def impressions(self) -> list[dict[str, Any]]:
        asked = self.requests()
        columns = [r[0].spec.get("request") for r in asked]
        own = all(c and c != "@row" and isinstance(r[0].cells[c], int)
                  for c, r in zip(columns, asked))  # fmt: skip
        number = lambda r: r[0].cells[r[0].spec["request"]] if own else r[0].order
        found, zeros = [], self.zeros("context")
        asked.sort(key=lambda r: (r[0].time, number(r)))
        for i, request in enumerate(asked):
            first = request[0]
            place = lambda row: row.cells[row.spec["position"]] if row.spec.get("position") else 0
            for row in sorted(request, key=lambda row: (place(row), row.order)):
                found.append(
                    {
                        "request": number(request) if own else i + 1,
                        "user": self.row_of("user", row.user),
                        "time": first.time,
                        "item": self.row_of("item", row.item),
                        "span": self.span(first),
                        "clock": self.clock(first),
                        **{k: self.label(x, row) for k, x in row.spec["labels"].items()},
                        **zeros,
                        **self.encoded(row, "context"),
                    }
                )
        return found

    def label(self, x: Any, row: Row) -> int:
        x = {"column": x} if isinstance(x, str) else x
        tests = {"equals", "one_of", "at_least", "above"} & set(x)
        return int(holds(x, row.cells) if tests else row.cells[x["column"]])

    def events(self) -> list[dict[str, Any]]:
        found, zeros, listed = [], self.zeros("event"), set()
        size = lambda row: len(row.item) if row.spec.get("list") else 0
        for row in sorted(self.of("events"), key=lambda row: (size(row), row.order)):
            user, lists = self.row_of("user", row.user), row.spec.get("list")
            if lists and user in listed:
                continue
            listed |= {user} if lists else set()
            features = zeros | self.encoded(row, "event")
            for item in row.item if lists else [row.item]:
                clock = BEFORE_ALL if lists else self.clock(row)
                one = {"user": user, "time": row.time, "item": self.row_of("item", item)}
                found.append({**one, "clock": clock, **features})
        return sorted(found, key=lambda e: (e["user"], e["clock"]))

    def whole(self) -> dict[str, Any]:
        shown = self.impressions() if self.of("impressions") else []
        happened = self.events()
        if not self.exact:
            per_user = collections.defaultdict(list)
            first = {}
            for row in shown:
                first[row["user"]] = min(row["time"], first.get(row["user"], row["time"]))
            for event in happened:
                event["order"] = len(per_user[event["user"]])
                per_user[event["user"]].append(event["clock"])
                if event["time"] is None:
                    event["time"] = first.get(event["user"], min(first.values()))
            for row in shown:
                row["order"] = sum(c < row["clock"] for c in per_user[row["user"]])
        files = {
            "users": self.catalogue("user"),
            "items": self.catalogue("item"),
            "events": happened,
            "impressions": shown,
        }
        found: dict[str, Any] = {
            file: {name: [row[name] for row in rows] for name in rows[0] if name != "clock"}
            for file, rows in files.items()
            if rows
        }
        found["tables"] = {table: len(words) + 2 for table, words in self.words.items()}
        found["lost"] = {name: x for name, x in self.lost.items() if any(x.values())}
        return found


def log(config: dict[str, Any], files: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The whole log; see the module."""
    return Import(config, files).whole()
