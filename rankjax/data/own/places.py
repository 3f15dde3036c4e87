"""Where the user's files lie: on this machine, or in an object store that fsspec reads.

A path of this machine is a `pathlib.Path`. What has a protocol, as gs://bucket/day.parquet, is a
`upath.UPath`, which has the same methods; only Parquet is read from there.
"""

import glob
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

LOCAL = ("file", "local")
GLOB = re.compile(r"[*?\[]")


def is_remote(path: Any) -> bool:
    """Whether a path, or its text, names a file of an object store."""
    return "://" in str(path)


def place(text: str | os.PathLike) -> Any:
    """The path that a text names, a pathlib.Path or a UPath.

    Raises ValueError: the protocol is unknown, or the package that reads it is not installed.
    """
    if not is_remote(text):
        return pathlib.Path(text)
    protocol, _, rest = str(text).partition("://")
    if protocol in LOCAL:
        return pathlib.Path(rest)
    try:
        from upath import UPath
    except ImportError as error:
        raise ValueError(
            f"{text}: found a path of an object store, expected the packages that read it: pip "
            "install 'rankjax[remote]'"
        ) from error
    try:
        path = UPath(str(text))
        _ = path.fs  # made at the first use: a driver that is missing is told here
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{text}: {error} (gs:// needs the package gcsfs, s3:// s3fs, abfs:// adlfs)"
        ) from error
    return path


def expanded(files: Sequence[str | os.PathLike]) -> list[Any]:
    """The paths of files, with globs that the shell left as they are (** is any depth).

    Raises ValueError: one fits nothing, or the store that it names refuses to say.
    """
    found = []
    for text in map(str, files):
        path = place(text)
        if is_remote(path):
            fits = _in_store(text, path)
        elif path.exists():
            fits = [path]
        else:
            fits = [pathlib.Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        if not fits:
            what = "file or bucket" if is_remote(path) else "file"
            raise ValueError(f"{text}: found no such {what}, expected one")
        found += fits
    return found


def _in_store(text: str, path: Any) -> list[Any]:
    """Asks the store in ways that raise: fsspec's isfile and glob take a store without credentials
    for one without files."""
    try:
        magic = GLOB.search(path.path)
        if magic is None:
            return [path] if path.fs.info(path.path)["type"] == "file" else []
        path.fs.ls(path.path[: magic.start()].rpartition("/")[0])
        names = sorted(path.fs.glob(path.path))
        return [type(path)(f"{path.protocol}://{name.lstrip('/')}") for name in names]
    except FileNotFoundError:
        return []
    except Exception as error:  # each store has errors of its own
        raise ValueError(
            f"{text}: found {type(error).__name__}: {error}, expected a store that can be read "
            "from here (does the bucket exist, are there credentials?)"
        ) from error


def sort_key(path: Any) -> tuple[bool, Any]:
    """Those of this machine first, in pathlib's order."""
    return (True, str(path)) if is_remote(path) else (False, path)


def same(path: Any) -> Any:
    """What two spellings of a file share."""
    return str(path) if is_remote(path) else path.resolve()


def hive(path: Any) -> dict[str, str | None]:
    """Columns that folders name, as .../date=2024-05-31/hour=07/part-0.parquet; values are text."""
    found: dict[str, str | None] = {}
    for folder in path.parent.parts:
        name, is_column, value = folder.strip("/").partition("=")
        if is_column and name:
            found[name] = None if value == "__HIVE_DEFAULT_PARTITION__" else value
    return found
