"""Which of the user's files is which table, guessed from the roles of their columns."""

import collections
import dataclasses
import glob
from collections.abc import Sequence

import polars as pl

from rankjax.data.own import glance, roles


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Files of the same columns. names: for `files`. seen: all of them as one."""

    names: tuple[str, ...]
    seen: glance.Glance
    roles: roles.Roles
    kind: roles.Kind

    @property
    def frame(self) -> pl.DataFrame:
        return self.seen.frame


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Groups by table, and those of no table.

    shown: of impressions; past: of events with times; lists: of events without; users, items: one
    group or none. key: the columns that name an item; None stands for a group's own item column.
    exact: everything has a time.
    """

    shown: list[Group]
    past: list[Group]
    lists: list[Group]
    users: list[Group]
    items: list[Group]
    unused: list[Group]
    key: tuple[str | None, ...]
    exact: bool

    @property
    def acts(self) -> list[Group]:
        return [*self.shown, *self.past]

    def item_of(self, group: Group) -> tuple[str, ...]:
        """The columns of the item in this group, in the same order in all groups."""
        own = group.roles.item
        return tuple(own[0] if c is None else c for c in self.key) if own else ()


def groups(seen: Sequence[glance.Glance]) -> list[Group]:
    """Files of equal columns together, in order of their names.

    Raises ValueError where files of one name differ in their columns: `files` could not tell them
    apart.
    """
    alike: dict[tuple, list[glance.Glance]] = collections.defaultdict(list)
    for one in sorted(seen, key=lambda s: str(s.path)):
        alike[(*one.frame.columns, one.separator, one.header)].append(one)
    found: list[Group] = []
    for same in alike.values():
        names = dict.fromkeys(glob.escape(s.path.name) for s in same)
        for other in found:
            if twice := names.keys() & set(other.names):
                raise ValueError(
                    f"{same[0].path}: found another file of the name {min(twice)!r} with other "
                    "columns, expected names that tell them apart"
                )
        whole = glance.together(same)
        of = roles.roles_of(whole)
        found.append(Group(tuple(names), whole, of, roles.kind_of(whole.frame, of)))
    return found


def layout(found: Sequence[Group]) -> Layout:
    """Which group is which table; ValueError where nobody does anything in any of them."""
    of: dict[str, list[Group]] = collections.defaultdict(list)
    for group in found:
        of[group.kind].append(group)
    shown, past = of["impressions"], [*of["events"], *of["ratings"]]
    if not shown:  # events have to say of what, where they stand for impressions
        of["events"] = [g for g in of["events"] if g.roles.item]
    if shown:  # what has other labels cannot stand beside them
        shown = [g for g in shown if set(g.roles.labels) == set(shown[0].roles.labels)]
    else:
        shown, past = of["ratings"], of["events"] or of["ratings"]
    acts = [*shown, *past]
    if not acts:
        held = {n: g.frame.columns for g in found for n in g.names}
        raise ValueError(
            f"starter: found files with columns {held}, expected one with columns of a user, an "
            "item and a label (click, is_click, label, ...), or of a user, an item and a time"
        )
    both = [c for c in acts[0].frame.columns if all(c in g.frame.columns for g in acts)]
    keys = [(g, roles.item_key(g.frame, g.roles, both)) for g in of["items"]]
    named = [(g, key) for g, key in keys if key][:1]
    key: tuple[str | None, ...] = (None,)
    for group, names in named:
        key = tuple(None if c == group.roles.item[0] else c for c in names)
    items, users = [g for g, _ in named], of["users"][:1]
    used = [id(g) for g in (*acts, *of["lists"], *users, *items)]
    return Layout(
        shown=shown,
        past=past,
        lists=of["lists"],
        users=users,
        items=items,
        unused=[g for g in found if id(g) not in used],
        key=key,
        exact=not of["lists"] and all(g.roles.time for g in acts),
    )
