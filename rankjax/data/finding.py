"""Finding: one thing in a log that ruins a study, or may; and the words that tell counts."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check of `rankjax.data.check` found.

    where: the file and the column. evidence: the numbers that it rests on. advice: what to do.
    """

    kind: str
    severity: Literal["error", "warning"]
    where: str
    evidence: str
    advice: str


def place(file: str, *columns: str) -> str:
    """Where something was found: `items.arrow, column "birth"`."""
    names = ", ".join(f'"{name}"' for name in columns)
    return f"{file}.arrow, column{'s' if len(columns) > 1 else ''} {names}"


def of(count: int, total: int, noun: str) -> str:
    """ "12 of 3,400 events (0.353%)"."""
    return f"{count:,} of {total:,} {noun} ({100 * count / total if total else 0:.3g}%)"
