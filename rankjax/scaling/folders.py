"""Files that several processes share: atomic writes, and locks that the system frees on death."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    with path.open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claimed(home: pathlib.Path) -> Iterator[bool]:
    """True if this process alone now holds the trial's folder; the system frees it on death."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        # A network file system shows a folder as it was up to a minute ago, until it is written to.
        with contextlib.suppress(OSError):
            home.chmod(home.stat().st_mode)
        yield True
