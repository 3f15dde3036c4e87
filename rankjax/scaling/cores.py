"""Cores of this machine: each process takes one that no other process has.

Workers that one program starts are told their cores. Those that a cluster starts do not know of
each other: each locks a small file a core in the machine's temporary folder, and the system frees
the lock when its holder ends.
"""

import fcntl
import functools
import os
import pathlib
import tempfile
from typing import Any

_held: list[Any] = []  # open files: a lock lasts as long as its file is open


@functools.cache
def take(count: int) -> tuple[int, ...]:
    """Cores that this process may use, and no other process has; kept until this process ends.

    Asked again for as many, the same ones. Where too few are free, others' cores too: then two
    processes take turns on one, which changes the time and not the result.

    Raises:
      ValueError: this process may use fewer than `count` cores.
    """
    usable = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(usable):
        raise ValueError(
            f"{os.uname().nodename}: found {len(usable)} cores that this process may use, expected "
            f"at least {count}"
        )
    folder = pathlib.Path(tempfile.gettempdir()) / f"rankjax-cores-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    free: list[int] = []
    for core in usable:
        if len(free) == count:
            break
        f = (folder / f"{core}.lock").open("a")
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.close()
            continue
        _held.append(f)
        free.append(core)
    taken = [core for core in usable if core not in free]
    return tuple(free + taken[: count - len(free)])


def pin(count: int) -> None:
    """Keeps this process on `count` cores of its own; before jax starts its threads."""
    os.sched_setaffinity(0, set(take(count)))
