"""Folders that must be mounted: logs, runs and studies, which no object store can hold."""

import os
import pathlib
import re

# pathlib makes gs:/bucket of gs://bucket; a drive has one letter.
STORE = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:/")


def mounted(folder: str | os.PathLike) -> pathlib.Path:
    """The folder as a path. Raises ValueError where it names an object store."""
    if STORE.match(str(folder)):
        raise ValueError(
            f"{folder}: found a path of an object store, expected a folder of a mounted file "
            "system: logs are read by memory mapping, and what is complete is renamed"
        )
    return pathlib.Path(folder)
