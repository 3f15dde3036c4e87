"""A starter schema.toml for the user's files, every guess with its reason."""

import pathlib
from collections.abc import Sequence
from typing import Any

import polars as pl

from rankjax.data import columns, samples
from rankjax.data.own import glance, hints, layout, places, roles, toml_tables

HEAD = f"""\
# A starter, guessed from names, types and the first {glance.ROWS:,} rows of each file: check it.
# Remove from the features of [impressions] and [negatives] whatever is known only after the
# impression (whether it was read, for how long, what came next): a model would read the answer.
"""
UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
LIKED = 0.8  # of the highest rating


def starter(files: Sequence[pathlib.Path]) -> str:
    """The text of a schema.toml for these files; only headers and first rows are read.

    Raises ValueError: no files, a file that is unreadable, empty or of an unknown suffix, two files
    of one name that differ in their columns, no file that says who did what (or was shown what).
    """
    if not files:
        raise ValueError("starter: found no files, expected at least one")
    plan = layout.layout(layout.groups([glance.look(f) for f in places.expanded(files)]))
    taken = _Taken(plan)
    sections = [_top(plan)]
    sections += [_catalogue(plan, taken, g, "user") for g in plan.users]
    sections += [_catalogue(plan, taken, g, "item") for g in plan.items]
    sections += [_impressions(plan, taken, g) for g in plan.shown]
    sections += [_events(plan, taken, g) for g in plan.past]
    sections += [_list(plan, g) for g in plan.lists]
    if not plan.past:
        sections += [
            _clicks(plan, g) for g in plan.shown if len(g.roles.user) == 1 and g.roles.time
        ]
    if not plan.shown:
        sections.append(_negatives(plan, taken))
    if plan.exact:
        why = "counts, clicks and rates before each request, of items and of tastes"
        sections.append([f"[counters]  # {why}"])
    return HEAD + "\n".join("\n".join(lines) + "\n" for lines in sections)


class _Taken:
    """The names and tables that features have, so that no other feature gets them."""

    def __init__(self, plan: layout.Layout):
        self.tasks = _labels(plan.shown[0]) if plan.shown else {"click": ""}
        self.given: dict[tuple[str, str], dict[str, Any]] = {}
        self.tables = {"user", "item", *samples.DERIVED}

    def feature(self, side: str, column: str, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The name and the entry of a column's feature, the same in all files of its side."""
        (file,) = (f for f, s in columns.SIDE.items() if s == side)
        taken = {*columns.BASE[file], *self.tasks, *samples.DERIVED, "user", "item"}
        taken |= {"birth", "order"}
        if side in ("event", "context"):  # they meet the item's features in a batch
            taken |= {name for s, name in self.given if s == "item"}
        name = column
        while name in taken:
            name = f"{side}_{name}"
        if (side, name) not in self.given:
            table = name
            while given.get("kind") != "dense" and table in self.tables:
                table = f"{side}_{table}"
            self.tables.add(table)
            self.given[side, name] = given if table == name else {**given, "table": table}
        return name, {"column": column, **self.given[side, name]}


def _line(key: str, value: Any, why: str = "") -> str:
    return f"{toml_tables.key(key)} = {toml_tables.inline(value)}" + (f"  # {why}" if why else "")


def _one(names: Sequence[str]) -> str | list[str]:
    return names[0] if len(names) == 1 else list(names)


def _top(plan: layout.Layout) -> list[str]:
    first = plan.acts[0]
    found = [_line("name", first.seen.path.resolve().parent.name)]
    if plan.shown and len(first.roles.labels) > 1:
        found.append(_line("task", first.roles.labels[0], "the label that models are compared by"))
    if not plan.exact:
        why = "lists of the past have no times" if plan.lists else "no column of times was found"
        found.append(_line("time_exact", False, f"{why}: only the order is known"))
    if any(g.roles.clock and g.roles.clock.relative for g in plan.acts):
        found.append(_line("earliest", 0, "times are no dates: they may lie before 1990"))
    for group in plan.unused:
        held = ", ".join(map(toml_tables.inline, group.frame.columns))
        names = ", ".join(map(toml_tables.inline, group.names))
        found += [
            f"# not used (leave out of the import): {names}",
            f"# with columns {held}: no table fits, or another file is that table",
        ]
    if values := _split(plan):
        found += ["", f"[split]  # what stands in {toml_tables.inline(first.roles.split)}"]
        return found + [_line(name, x) for name, x in values.items()]
    found += ["", "[split]  # shares of the impressions, by time; the rest is test"]
    return [*found, _line("train", 0.8), _line("validation", 0.1)]


def _split(plan: layout.Layout) -> dict[str, list[str]]:
    """The values of the split columns, where all impressions have one and they are alike."""
    found = [roles.spans(g.seen, g.roles.split) if g.roles.split else {} for g in plan.shown]
    return found[0] if found and all(x == found[0] for x in found) else {}


def _files(table: str, group: layout.Group) -> list[str]:
    found = [table, _line("files", list(group.names))]
    if group.seen.separator != ",":
        found.append(_line("separator", group.seen.separator))
    if group.seen.header is not None:
        why = "the file has no line of names: made up, user, item and time from the values"
        found.append(_line("header", list(group.seen.header), why))
    return found


def _when(group: layout.Group, key: str, column: str, clock: glance.Clock | None) -> list[str]:
    """The lines of a column of times."""
    if clock is None:
        return [_line(key, "@row", "no column of times was found: the order of the rows")]
    if clock.relative:
        low, high = (int(t.timestamp()) for t in (clock.first, clock.last))
        return [_line(key, column, f"{low} to {high}, taken for seconds since an unknown start")]
    told = f"{UNITS[clock.unit]} since 1970, " if clock.unit in UNITS else ""
    told += f"{clock.first:%Y-%m-%d} to {clock.last:%Y-%m-%d} in the rows looked at"
    if clock.whole_days and key == "time":
        told += "; whole days: what happened on the same day does not count as past"
    if key == "time" and column in group.seen.gaps:
        told += "; some rows hold none, and an import refuses them"
    found = [_line(key, column, told)]
    return found + [_line("time_unit", clock.unit)] * (clock.unit not in ("", "s"))


def _who(plan: layout.Layout, group: layout.Group) -> list[str]:
    """The lines of user and item."""
    lines, user, item = [], group.roles.user, plan.item_of(group)
    if user:
        alike = "no user id: whoever is alike in these is one user"
        lines.append(_line("user", _one(user), "its name" if len(user) == 1 else alike))
    if item:
        named = "its name" if len(item) == 1 else "together they name one row of [items]"
        lines.append(_line("item", _one(item), named))
    return lines


def _used(group: layout.Group, *more: str) -> set[str]:
    """The columns of user, item and time, and more that are no features besides; parts of a user
    are."""
    r = group.roles
    return {*(r.user if len(r.user) == 1 else ()), *r.item, r.time, *more}


def _features(
    plan: layout.Layout, taken: _Taken, group: layout.Group, side: str, table: str, used: set[str]
) -> list[str]:
    """The table of features of the columns that play no role, and what is left out of it."""
    lines, left = _derived(plan, group, side), []
    by_user, by_item = set(), set()
    told = hints.telling(group.frame, group.roles.labels) if table == "impressions" else {}
    if side == "context":
        by_user = hints.determined(group.frame, group.roles.user)
        by_item = hints.determined(group.frame, group.roles.item) - by_user
    for column in [c for c in group.frame.columns if c not in used]:
        found = hints.hint(group.frame[column], happened=side == "event")
        if roles.fits(column, roles.REQUEST):
            found = hints.Hint(None, "names a request or visit, new each time")
        elif column == group.roles.split:
            found = hints.Hint(None, "a split of the rows")
        elif column in told:
            found = hints.Hint(None, f"tells {toml_tables.inline(told[column])} in every row")
        elif side == "context" and column not in by_user | by_item and _is_flag(group, column):
            found = hints.Hint(None, "0 and 1 of neither the user nor the item alone: an outcome?")
        elif table == "negatives" and column in by_item:
            found = hints.Hint(None, "tells which item was clicked; make it a file of items")
        elif table == "negatives" and any(column not in g.frame.columns for g in plan.past):
            found = hints.Hint(None, "not in all files of [[events]]")
        if found.given is None:
            left.append(f"# not used: {toml_tables.inline(column)} ({found.why})")
            continue
        group_of = "user" if column in by_user else "item" if column in by_item else ""
        given = {**found.given, **({"group": group_of} if group_of else {})}
        name, entry = taken.feature(side, column, given)
        lines.append(_line(name, column if len(entry) == 1 else entry, found.why))
    return ["", f"[{table}.features]", *lines, *left] if lines else left


def _is_flag(group: layout.Group, column: str) -> bool:
    x = group.frame[column]
    return roles.fits(column, (r"(is|has|did)_.*",)) and roles.is_binary(x) and x.n_unique() > 1


def _derived(plan: layout.Layout, group: layout.Group, side: str) -> list[str]:
    lines, clock = [], group.roles.clock
    if side == "context" and clock and not clock.whole_days and not clock.relative:
        lines += [_line(n, {"derive": n}, "of `time`, UTC") for n in ("hour", "weekday")]
    if side == "context" and plan.exact and any(g.roles.birth for g in plan.items):
        lines.append(_line("item_age", {"derive": "item_age"}, "time since `birth`"))
    if side == "event" and plan.exact:
        lines.append(_line("log_age", {"derive": "log_age"}, "how long ago it happened"))
    return lines


def _catalogue(plan: layout.Layout, taken: _Taken, group: layout.Group, side: str) -> list[str]:
    """[users] or [items]."""
    table = f"{side}s"
    key = plan.item_of(group) if side == "item" else group.roles.user
    lines = _files(f"[{table}]", group)
    lines.append(_line("id", _one(key), "no two of the rows looked at are the same"))
    used = set(key)
    if side == "item" and (birth := group.roles.birth):
        lines += _when(group, "birth", birth, glance.clock(group.frame[birth]))
        used.add(birth)
    return lines + _features(plan, taken, group, side, table, used)


def _impressions(plan: layout.Layout, taken: _Taken, group: layout.Group) -> list[str]:
    r, table = group.roles, "impressions"
    lines = _files("[[impressions]]" if len(plan.shown) > 1 else "[impressions]", group)
    lines += _who(plan, group) + _when(group, "time", r.time, r.clock)
    used = _used(group, r.request, *(r.labels or (r.rating,)))
    if r.request:
        lines.append(_line("request", r.request, "its rows share user and time"))
    elif r.rating or len(r.user) != 1 or not r.time:
        lines.append(_line("request", "@row", "nothing says which rows were shown together"))
    else:
        lines.append(_line("request_gap", 0, "rows of one user and time are one request"))
    if r.position and r.request:
        lines.append(_line("position", r.position, "the order within a request"))
        used.add(r.position)
    if _split(plan):
        lines.append(_line("split", r.split, "its values"))
        used.add(r.split)
    lines += ["", "[impressions.labels]"]
    lines += [_line(name, value, why) for name, (value, why) in _labels(group).items()]
    return lines + _features(plan, taken, group, "context", table, used)


def _labels(group: layout.Group) -> dict[str, tuple[Any, str]]:
    """{task: (column or condition, the reason)}."""
    if group.kind != "ratings":
        return {name: (name, "0 and 1, and its name") for name in group.roles.labels}
    low, high = (group.frame[group.roles.rating].min(), group.frame[group.roles.rating].max())
    least = round(LIKED * high, 2)
    least = {"column": group.roles.rating, "at_least": int(least) if least % 1 == 0 else least}
    return {"positive": (least, f"ratings run from {low} to {high}; there is no other label")}


def _events(plan: layout.Layout, taken: _Taken, group: layout.Group) -> list[str]:
    lines = _files("[[events]]" if len(plan.past + plan.lists) > 1 else "[events]", group)
    lines += _who(plan, group) + _when(group, "time", group.roles.time, group.roles.clock)
    used = _used(group)
    if not plan.shown:  # whatever else describes the click is of the request
        used |= {c for c in group.frame.columns if not hints.acted(c)}
    return lines + _features(plan, taken, group, "event", "events", used)


def _list(plan: layout.Layout, group: layout.Group) -> list[str]:
    (user,), history = group.roles.user, group.roles.history
    others = [c for c in group.frame.columns if c not in (user, history)]
    left = ", ".join(map(toml_tables.inline, others))
    return [
        *_files("[[events]]", group),
        _line("user", user, "its name"),
        _line("item", history, "lists, taken to run from old to new"),
        _line("list", True, "all of it before the user's first impression"),
        *([f"# not used: {left}"] if others else []),
    ]


def _clicks(plan: layout.Layout, group: layout.Group) -> list[str]:
    """The first label's impressions as events, where no file holds any."""
    label = group.roles.labels[0]
    test = {"column": label, "equals": True if group.frame[label].dtype == pl.Boolean else 1}
    lines = _files("[[events]]" if len(plan.shown + plan.lists) > 1 else "[events]", group)
    lines.append(_line("where", test, "what was clicked is the past of what comes later"))
    lines += _who(plan, group) + _when(group, "time", group.roles.time, group.roles.clock)
    derived = _derived(plan, group, "event")
    return lines + (["", "[events.features]", *derived] if derived else [])


def _negatives(plan: layout.Layout, taken: _Taken) -> list[str]:
    """[negatives], where there are clicks only."""
    first = plan.past[0]
    lines = [
        "[negatives]  # no label: every event becomes a request of it and sampled other items",
        _line("per_click", 4),
        _line("within", "hour", "drawn from what was clicked in the same hour"),
        _line("exclude", "user", "never an item that the user clicks anywhere in the log"),
    ]
    for column in [c for c in first.frame.columns if roles.fits(c, roles.ACTION)]:
        test = {"column": column, "equals": first.frame[column].mode().sort()[0]}
        lines.append(f"# {_line('of', test)}  # only these become requests")
    used = _used(first, *(c for c in first.frame.columns if hints.acted(c)))
    return lines + _features(plan, taken, first, "context", "negatives", used)
