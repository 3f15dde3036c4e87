"""Tables keep their lines in files and pipes, and a terminal's width in a terminal."""

import pytest
import rich.table

from rankjax import screen


def lines(capsys) -> list[str]:
    table = rich.table.Table("name", "value", show_edge=False)
    table.add_row("n" * 60, "v" * 60)
    screen.wide().print(table)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_pipe_gets_whole_lines(term, capsys, monkeypatch):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "40")
    (row,) = [line for line in lines(capsys) if "v" * 60 in line]
    assert "n" * 60 in row


def test_a_terminal_keeps_its_width(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")  # taken for a terminal
    assert len(lines(capsys)[1]) == 40  # the rule below the head
