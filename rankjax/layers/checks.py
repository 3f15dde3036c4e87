"""Checks that the Configs of several models share; each raises a ValueError that names the field.

`where` is the Config's name as the error shows it, for example "rankmixer.Config".
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

DTYPES = ("float32", "bfloat16")


def one_of(where: str, field: str, value: object, allowed: Iterable[object]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{where}: {field}={value!r}, expected one of {allowed}")


def at_least(where: str, least: int, **fields: int) -> None:
    """Raises ValueError unless every field is an integer >= `least`."""
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{where}: {name}={value!r}, expected an integer >= {least}")


def share(where: str, **fields: float) -> None:
    """Raises ValueError unless every field is a number above 0 and at most 1."""
    for name, value in fields.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= 1:
            raise ValueError(f"{where}: {name}={value!r}, expected 0 < share <= 1")


def flags(where: str, config: Any) -> None:
    """Raises ValueError unless every bool field of a dataclass is True or False.

    A string from a command line or a JSON file ("false") would pass for True.
    """
    for field in dataclasses.fields(config):
        if field.type is bool and not isinstance(value := getattr(config, field.name), bool):
            raise ValueError(f"{where}: {field.name}={value!r}, expected True or False")


def dtype(where: str, value: str) -> None:
    """Raises ValueError unless `value` names a dtype that activations may have.

    A string, so that a Config goes to JSON and back unchanged.
    """
    one_of(where, "dtype", value, DTYPES)


def as_tuple(value: object) -> object:
    """A list, as JSON gives one back, becomes the tuple that it was; all else stays as it is."""
    return tuple(value) if isinstance(value, list) else value
