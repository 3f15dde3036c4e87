"""Pieces of HTML: escaped, readable, sortable."""

import json

import plotly.graph_objects as go
import pytest

from rankjax.scaling import markup


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (float("nan"), "–"), (4500, "4,500"), (2.4e12, "2.4e12"), (3e-3, "0.003")],
)
def test_short(value, shown):
    assert markup.short(value) == shown


def test_short_of_a_small_rate():
    assert markup.short(1e-5) == "1e-5"
    assert markup.number(0.81234567) == "0.8123"


def test_spread_names_the_seeds():
    row = {"test_ne": 0.8, "test_ne_std": 0.001, "test_ne_n": 3}
    assert markup.spread(row, "test_ne") == "0.8000 ± 0.0010 (3 seeds)"
    row |= {"test_ne_std": None, "test_ne_n": 1}
    assert markup.spread(row, "test_ne") == "0.8000 (1 seed)"
    assert markup.spread({**row, "test_ne": None}, "test_ne") == "undefined"


def test_tables_cards_notes_and_switches_escape():
    evil = "<script>alert('1')</script>"
    shown = [
        markup.table([evil], [[evil, (evil, evil)]], sortable=True), markup.card(evil, ""),
        markup.note(evil), markup.switch({evil: ""}, evil),
    ]  # fmt: skip
    for piece in shown:
        assert "<script>" not in piece
        assert "&lt;script&gt;" in piece
    assert "'1'" not in shown[0]


def test_cells_sort_by_number():
    assert markup.cell(2.4e12) == ("2.4e12", "2400000000000.0")
    assert markup.cell(0.8123456, "test_ne") == ("0.8123", "0.8123456")
    assert markup.cell(None) == "–"
    assert markup.cell(True) == "True"
    assert markup.cell("x") == "x"


def test_a_figure_cannot_end_its_script_element():
    evil = "</script><script>alert(1)</script>"
    piece = markup.plot(go.Figure(go.Scatter(x=[1], y=[2], name=evil)))
    assert piece.count("</script>") == 1
    spec = piece.split('json">')[1].split("</script>")[0]
    assert json.loads(spec)["data"][0]["name"] == evil
