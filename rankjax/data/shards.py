"""A log in shards: ranges of users, each with events and impressions of its own, read as one log.

Users are in ranges, so that the events of the shards, one behind the other, are sorted by user as
those of one file are. Impressions are merged by time and request when a log is opened.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from rankjax.data import joined


def name(number: int) -> str:
    """The folder of a shard, in the log's."""
    return f"{number:05d}"


def check(shards: int | None) -> None:
    """Raises ValueError for fewer than one; for before the users are counted."""
    if shards is not None and shards < 1:
        raise ValueError(f"shards: found {shards}, expected 1 or more, at most the users")


def starts(users: int, shards: int | None) -> tuple[int, ...] | None:
    """The first user of each shard: ranges of about as many users (`users`: rows of the file).

    None is a log that is not in shards. Raises ValueError for fewer than one, or more than users.
    """
    if shards is None:
        return None
    if not 0 < shards < max(users, 2):
        raise ValueError(f"shards: found {shards}, expected 1 .. {max(users - 1, 1)}, the users")
    return (0, *(1 + k * (users - 1) // shards for k in range(1, shards)))


@dataclasses.dataclass(frozen=True)
class Part:
    """A shard, or the whole of a log without: its folder, the first of its users and the one after
    the last, and what log.json says of its files."""

    folder: pathlib.Path
    users: tuple[int, int]
    files: dict[str, dict[str, int]]


def parts(folder: pathlib.Path, record: dict[str, Any], shards: Sequence[int] | None) -> list[Part]:
    """What is read, in order of users; ValueError for shards that the log does not have."""
    if "shards" not in record:
        if shards is not None:
            raise ValueError(
                f"{folder / 'log.json'}: found a log that is not in shards, expected {shards}"
            )
        return [Part(folder, (0, record["files"]["users"]["rows"]), record["files"])]
    all_ = record["shards"]
    chosen = range(len(all_)) if shards is None else sorted(set(shards))
    if not chosen or not 0 <= min(chosen) <= max(chosen) < len(all_):
        raise ValueError(
            f"{folder / 'log.json'}: found {len(all_)} shards, 0 .. {len(all_) - 1}, expected "
            f"{list(shards or ())}"
        )
    return [Part(folder / name(k), all_[k]["users"], all_[k]["files"]) for k in chosen]


def event_start(
    parts: Sequence[Part], offsets: Sequence[dict[str, np.ndarray]], users: int
) -> np.ndarray:
    """Where each user's events start among those of all parts, int64 [users + 1]."""
    found = []
    for part, columns_ in zip(parts, offsets):
        start = columns_.get("event_start", np.empty(0, np.int64))
        wanted, events = part.users[1] - part.users[0] + 1, part.files["events"]["rows"]
        if len(start) != wanted or start[-1] != events:
            raise ValueError(
                f"{part.folder / 'offsets.arrow'}: found {len(start)} offsets, expected {wanted}, "
                f"the last one {events}"
            )
        found.append(start)
    if tuple(parts[0].users) == (0, users):
        return found[0]
    whole, before = np.zeros(users + 1, np.int64), 0
    for part, start in zip(parts, found):
        whole[part.users[0] : part.users[1]] = before + start[:-1]
        before += int(start[-1])
        whole[part.users[1] :] = before
    return whole


def together(
    acts: dict[str, list[dict[str, np.ndarray]]],
) -> dict[str, dict[str, np.ndarray | joined.Joined]]:
    """Each file's columns of all parts as one: events by user, impressions by time and request."""
    if len(acts["events"]) == 1:
        return {file: found[0] for file, found in acts.items()}
    time, request = (
        np.concatenate([x[name] for x in acts["impressions"]]) for name in ("time", "request")
    )
    order = {"events": None, "impressions": np.lexsort((request, time))}
    return {
        file: {name: joined.Joined([x[name] for x in found], order[file]) for name in found[0]}
        for file, found in acts.items()
    }
