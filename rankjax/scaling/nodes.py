"""What all machines of a study must have in common, compared before they train.

They share the study's folder and its locks, read the same log, and run the same code: else a trial
would be lost, trained twice, or trained into other results, without a word.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from rankjax import versions as versions_lib
from rankjax.data import event_log
from rankjax.scaling import study

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "polars")
SEEN = 120.0  # seconds after which a file of another machine must be seen
LEADS = 300.0  # seconds without a sign after which the leader counts as killed
Params = Callable[[Any], int]  # as study.params_of gives it


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the machine that leads a study has, and every other must find."""

    machine: str
    study: study.Study
    marker: str  # a file in the study's folder, locked while the study runs,
    token: str  # and what it holds
    fingerprint: dict[str, Any]  # of the log
    versions: dict[str, str]

    def __hash__(self) -> int:  # dicts have none; no other run has this token
        return hash(self.token)


class Differs(ValueError):
    """This machine has something else than the one that leads the study; says what."""


def versions() -> dict[str, str]:
    """Of rankjax, and of what decides results beside it."""
    return versions_lib.of(*PACKAGES)


@contextlib.contextmanager
def expecting(
    asked: study.Study, folder: pathlib.Path, log: event_log.EventLog
) -> Iterator[Expected]:
    """Leaves a locked file in the study's folder for the others to find; removes it in the end."""
    token = secrets.token_hex(8)
    marker = folder / f"shared-{token}"
    try:
        with marker.open("w") as f:
            f.write(token)
            f.flush()
            fcntl.flock(f, fcntl.LOCK_EX)
            machine = os.uname().nodename
            yield Expected(machine, asked, str(marker), token, log.fingerprint, versions())
    finally:
        marker.unlink(missing_ok=True)


def check(expected: Expected) -> None:
    """Raises Differs where `complaint` has one."""
    if said := complaint(expected):
        raise Differs(said)


def complaint(expected: Expected) -> str | None:
    """What this machine has otherwise than expected, in one line; None where all is well."""
    me = os.uname().nodename
    marker = pathlib.Path(expected.marker)
    if not marker.exists() or marker.read_text() != expected.token:
        return (
            f"{me}: found no {marker}, which {expected.machine} has written; expected "
            f"{marker.parent} on a file system that all machines of the study share"
        )
    if not _locks_reach(marker):
        return (
            f"{me}: found {marker} unlocked, while {expected.machine} holds its lock; expected a "
            "file system whose locks all machines share (flock: NFS 4, Lustre with -o flock, ...)"
        )
    asked = expected.study
    try:
        log = event_log.EventLog.open(
            asked.log, counters=asked.counters, shards=asked.shards or None
        )
    except (ValueError, OSError) as error:
        return f"{me}: {error}; expected the log of {expected.machine} at the same path"
    for what, have, want in (
        ("log", log.fingerprint, expected.fingerprint),
        ("versions", versions(), expected.versions),
    ):
        differing = sorted(k for k in {*have, *want} if have.get(k) != want.get(k))
        if differing:
            found, there = ({k: x.get(k) for k in differing} for x in (have, want))
            return f"{me}: found {what} {found}, expected {there} as on {expected.machine}"
    return None


def _locks_reach(marker: pathlib.Path) -> bool:
    with marker.open("a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    # Of a leader that was killed the lock is free, and proves nothing; its jobs go on.
    return time.time() - marker.stat().st_mtime > LEADS


def lead(expected: Expected) -> None:
    """Shows the others that this machine still leads the study; at least once a minute."""
    os.utime(expected.marker)


def complete(asked: study.Study, folder: pathlib.Path, params: Params) -> bool:
    """Whether this machine sees every row of the study."""
    todo, _, known = study.left(asked, study.load_rows(folder)[0], params)
    return known and not todo


def wait_for_rows(asked: study.Study, folder: pathlib.Path, params: Params) -> None:
    """Waits until this machine sees what others have written: network file systems show a folder
    as it was up to a minute ago."""
    end = time.monotonic() + SEEN
    while not complete(asked, folder, params) and time.monotonic() < end:
        time.sleep(1.0)
