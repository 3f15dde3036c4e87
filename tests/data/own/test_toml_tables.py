"""TOML tables as dataclasses and back, on dataclasses of the test's own."""

import dataclasses
import datetime
import tomllib
from typing import Any, Literal

import pytest

from rankjax.data.own import toml_tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    column: str
    rows: int | None = None
    size: float = 1.5
    mode: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size: found {self.size}, expected >= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    wide: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root:
    name: str
    files: tuple[str, ...] = ()
    id: str | tuple[str, ...] = ""
    at: int | str | datetime.datetime | datetime.date | None = None
    value: Any = None
    values: tuple[Any, ...] = ()
    on: bool = True
    one: Leaf | None = None
    many: tuple[Plain, ...] = ()
    named: dict[str, Leaf] = dataclasses.field(default_factory=dict)
    tables: dict[str, Plain] = dataclasses.field(default_factory=dict)
    free: dict[str, Any] = dataclasses.field(default_factory=dict)


def build(text):
    return toml_tables.build(Root, tomllib.loads(text), "f.toml")


def test_every_kind_of_field_is_read():
    found = build(
        """
        name = "x"
        files = "one name stands for a list of one"
        id = ["a", "b"]
        at = 2020-01-02
        value = [1, "two"]
        values = [true, 2.5]
        on = false
        one = {column = "c", size = 2, mode = "b", rows = 3}
        many = [{wide = true}, {}]
        free = {list = [1, 2], text = "t", inner = {a = 1}}
        [named]
        short = "other"
        itself = {rows = 4}
        [tables]
        t = {wide = true}
        """
    )
    assert found == Root(
        name="x",
        files=("one name stands for a list of one",),
        id=("a", "b"),
        at=datetime.date(2020, 1, 2),
        value=(1, "two"),
        values=(True, 2.5),
        on=False,
        one=Leaf(column="c", size=2.0, mode="b", rows=3),
        many=(Plain(wide=True), Plain()),
        named={"short": Leaf(column="other"), "itself": Leaf(column="itself", rows=4)},
        tables={"t": Plain(wide=True)},
        free={"list": [1, 2], "text": "t", "inner": {"a": 1}},
    )
    assert isinstance(found.one.size, float)
    assert build('name = "x"\nat = 2020-01-02T03:04:05').at == datetime.datetime(
        2020, 1, 2, 3, 4, 5
    )
    assert build('name = "x"\nat = 7').at == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam = 'x'", "f.toml: found unknown key 'nam', .*; did you mean 'name'?"),
        ("name = 'x'\nzzz = 1", r"f.toml: found unknown key 'zzz', expected \['name'.*\]$"),
        ("on = true", r"f.toml: found \['on'\], expected \['name'\] too"),
        ("name = 3", "f.toml, name: found 3, expected str"),
        ("name = ['a', 'b']", r"f.toml, name: found \['a', 'b'\], expected str"),
        ("name = 'x'\non = 1", "f.toml, on: found 1, expected bool"),
        ("name = 'x'\nid = 1", r"f.toml, id: found 1, expected one of \['str', 'tuple'\]"),
        ("name = 'x'\nid = ['a', 1]", r"f.toml, id\[1\]: found 1, expected str"),
        ("name = 'x'\nfiles = [1]", r"f.toml, files\[0\]: found 1, expected str"),
        ("name = 'x'\nat = true", "f.toml, at: found True, expected one of"),
        ("name = 'x'\nat = 1.5", "f.toml, at: found 1.5, expected one of"),
        ("name = 'x'\none = 'c'", "f.toml, one: found 'c', expected a table"),
        (
            "name = 'x'\n[one]\nrows = 1",
            r"f.toml, one: found \['rows'\], expected \['column'\] too",
        ),
        ("name = 'x'\n[one]\ncolumn='c'\nrows = true", "one, rows: found True, expected int"),
        ("name = 'x'\n[one]\ncolumn='c'\nrows = 1.0", "one, rows: found 1.0, expected int"),
        ("name = 'x'\n[one]\ncolumn='c'\nsize = true", "one, size: found True, expected float"),
        (
            "name = 'x'\n[one]\ncolumn='c'\nmode = 'c'",
            r"mode: found 'c', expected one of \['a', 'b'",
        ),
        ("name = 'x'\n[one]\ncolumn='c'\nmode = ['a']", r"mode: found \['a'\], expected one of"),
        (
            "name = 'x'\n[one]\ncolumn='c'\nsize = -1",
            "f.toml, one: size: found -1.0, expected >= 0",
        ),
        ("name = 'x'\n[[many]]\n[[many]]\nwid = 1", r"f.toml, many\[1\]: found unknown key 'wid'"),
        ("name = 'x'\nnamed = 3", "f.toml, named: found 3, expected a table"),
        ("name = 'x'\n[named]\nq = 3", "f.toml, named.q: found 3, expected the name of a column"),
        ("name = 'x'\n[named]\nq = {row = 3}", "f.toml, named.q: found unknown key 'row'"),
        ("name = 'x'\n[tables]\nt = 'text'", "f.toml, tables.t: found 'text', expected a table"),
    ],
)
def test_what_does_not_fit_names_the_key(text, message):
    with pytest.raises(ValueError, match=message):
        build(text)


ODD = ('a"b', "c d", "e.f", "ü→😀", "tab\tline\n\\", "\x01\x7f", "", "1", "plain-key_2", "[x]", "#")


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_valid_toml(name):
    read = tomllib.loads(f"{toml_tables.key(name)} = {toml_tables.inline(name)}")
    assert read == {name: name}


def test_values_are_read_back():
    values = [True, 7, -1.5, 1e300, 0.1, float("inf"), "x", datetime.date(2020, 1, 2), [1, [2]], {}]
    values += [datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.UTC), {"a b": {"c": 1}}]
    for value in values:
        assert tomllib.loads(f"x = {toml_tables.inline(value)}")["x"] == value


def test_what_text_writes_is_read_back():
    x = Root(
        name=ODD[0],
        files=ODD,
        id=("a", "b"),
        at=datetime.date(2020, 1, 2),
        value=(1, "two"),
        on=False,
        one=Leaf(column="c", size=2.0),
        many=(Plain(wide=True), Plain()),
        named={name: Leaf(column=name + "!", rows=4) for name in ODD},
        tables={"t": Plain(wide=True), "default": Plain()},
        free={"list": [1, 2], "inner": {"a": 1.5}},
    )
    text = toml_tables.text(x)
    assert build(text) == x
    assert "size = 1.5" not in text and "size = 2.0" in text  # defaults are left out
    assert toml_tables.text(Root(name="x")) == 'name = "x"\n'
    assert build(toml_tables.text(Root(name="x", one=Leaf(column="")))).one == Leaf(column="")
