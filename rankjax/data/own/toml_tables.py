"""TOML tables as frozen dataclasses, and back: `build` reads one, `text` writes one.

A key is a field, an array a tuple, a table a dataclass, or a dict from names that are free. What
does not fit its field's type is a ValueError that names the key.
"""

import dataclasses
import datetime
import difflib
import json
import re
import types
import typing
from typing import Any, Literal


def build(kind: type, value: Any, where: str) -> Any:
    """A dataclass of this type from a TOML table; `where` names the table in errors."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found {value!r}, expected a table")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where}: found unknown key {key!r}, expected {list(fields)}{hint}")
    built = {key: _value(hints[key], x, f"{where}, {key}") for key, x in value.items()}
    required = [name for name, f in fields.items() if _default(f) is dataclasses.MISSING]
    if missing := [name for name in required if name not in built]:
        raise ValueError(f"{where}: found {list(value)}, expected {missing} too")
    try:
        return kind(**built)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def _value(hint: Any, x: Any, where: str) -> Any:
    """The TOML value `x` as the type `hint`; ValueError where it is none."""
    if isinstance(hint, types.UnionType):
        if x is None and types.NoneType in typing.get_args(hint):
            return None  # TOML has no word for it: a caller has put it there
        options = [h for h in typing.get_args(hint) if h is not types.NoneType]
        return _one_of(options, x, where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return tuple(x) if isinstance(x, list) else x
    if origin is Literal:
        if x not in inner:
            raise ValueError(f"{where}: found {x!r}, expected one of {list(inner)}")
        return x
    if origin is tuple:
        rows = x if isinstance(x, list) else [x]  # one name stands for a list of one
        return tuple(_value(inner[0], y, f"{where}[{i}]") for i, y in enumerate(rows))
    if origin is dict:
        if not isinstance(x, dict):
            raise ValueError(f"{where}: found {x!r}, expected a table")
        return {key: _named(inner[1], key, y, f"{where}.{key}") for key, y in x.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, x, where)
    if hint is float and isinstance(x, int) and not isinstance(x, bool):
        return float(x)
    if not isinstance(x, hint) or (isinstance(x, bool) and hint is not bool):
        raise ValueError(f"{where}: found {x!r}, expected {hint.__name__}")
    return x


def _one_of(options: list[Any], x: Any, where: str) -> Any:
    if len(options) == 1:
        return _value(options[0], x, where)
    for option in options:
        plain = typing.get_origin(option) or option
        fits = isinstance(x, list) if plain is tuple else isinstance(x, plain)
        if fits and not (isinstance(x, bool) and plain is int):
            return _value(option, x, where)
    names = [getattr(o, "__name__", str(o)) for o in options]
    raise ValueError(f"{where}: found {x!r}, expected one of {names}")


def _named(kind: Any, name: str, x: Any, where: str) -> Any:
    """An entry of a dict. Where it has a column: `name = "column"` is short for a table with that
    column, and an entry that names none reads the column of its own name."""
    if kind is Any:
        return x
    names = {f.name for f in dataclasses.fields(kind)}
    if "column" in names:
        if isinstance(x, str):
            x = {"column": x}
        if not isinstance(x, dict):
            raise ValueError(f"{where}: found {x!r}, expected the name of a column or a table")
        if not x.keys() & {"column", "derive"}:
            x = {"column": name, **x}
    return build(kind, x, where)


def key(name: str) -> str:
    """A key as TOML writes it: bare where it may be, else quoted."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else inline(name)


def inline(x: Any) -> str:
    """A value on one line: text, a number, a truth value, an instant, a list, a dict."""
    if isinstance(x, str):  # a JSON string but for DEL, which TOML wants escaped
        return json.dumps(x, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(x, bool):
        return "true" if x else "false"
    if isinstance(x, int | float):
        return repr(x)
    if isinstance(x, datetime.date):  # a datetime too
        return x.isoformat()
    if isinstance(x, tuple | list):
        return f"[{', '.join(map(inline, x))}]"
    if dataclasses.is_dataclass(x):
        x = _given(x)
    return f"{{{', '.join(f'{key(k)} = {inline(v)}' for k, v in x.items())}}}"


def _given(x: Any) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    found = {f.name: (getattr(x, f.name), _default(f)) for f in dataclasses.fields(x)}
    return {name: value for name, (value, default) in found.items() if value != default}


def text(x: Any, path: tuple[str, ...] = ()) -> str:
    """A dataclass as a TOML document, without the fields at their defaults.

    `build` of what is read from it equals `x`. Inner dataclasses become tables, but those of a dict
    lines of one table.
    """
    plain, tables = [], []
    for name, value in _given(x).items():
        inner = (*path, name)
        head = ".".join(map(key, inner))
        rows = value if isinstance(value, tuple) else ()
        if dataclasses.is_dataclass(value):
            tables.append(f"[{head}]\n{text(value, inner)}")
        elif rows and all(map(dataclasses.is_dataclass, rows)):
            tables += [f"[[{head}]]\n{text(row, inner)}" for row in rows]
        elif isinstance(value, dict):
            lines = "".join(f"{key(k)} = {inline(v)}\n" for k, v in value.items())
            tables.append(f"[{head}]\n{lines}")
        else:
            plain.append(f"{key(name)} = {inline(value)}\n")
    return "\n".join(["".join(plain)] * bool(plain) + tables)
