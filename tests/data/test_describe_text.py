import copy

import pytest

from rankjax.data import describe, describe_text, event_log
from tests import tiny


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    path = tiny.log(tmp_path_factory.mktemp("text") / "tiny")
    return describe.describe(event_log.EventLog.open(path))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "-"), (0, "0"), (1234, "1,234"), (0.12345, "0.1235"), (-2.5, "-2.5")),
        *((12345.6, "12,346"), (2.5e12, "2.5e+12"), (3e-7, "3e-07")),
    ],
)
def test_numbers(value, text):
    assert describe_text.number(value) == text


def test_moments():
    assert describe_text.moment(None) == "-"
    assert describe_text.moment(1_717_156_800) == "2024-05-31 12:00:00"
    assert describe_text.moment(10**15) == f"{10**15} s"
    assert describe_text.percent(0.12345) == "12.3%" and describe_text.percent(None) == "-"


def test_every_table_is_square_and_told(summary):
    text = describe_text.text(summary)
    for title, (head, rows) in describe_text.tables(summary).items():
        assert title in text.splitlines()
        assert rows and {len(row) for row in rows} == {len(head)}, title
        for row in rows:
            assert any(all(cell in line for cell in row) for line in text.splitlines()), row


def test_figures_stand_in_the_text(summary):
    lines = describe_text.text(summary).splitlines()
    like = summary["tasks"]["like"]["test"]
    (line,) = [x for x in lines if x.split()[:2] == ["like", "click"]]
    assert line.endswith(f"{like['rate']:.4g} ({like['positives']} of {like['rows']})")
    (line,) = [x for x in lines if x.split()[:1] == ["quality"]]
    (quality,) = [f for f in summary["dense_features"] if f["name"] == "quality"]
    assert line.split()[-1] == f"{quality['max']:.4g}" and line.split()[1:3] == ["items", "30"]


def test_names_cannot_steer_the_terminal(summary):
    changed = copy.deepcopy(summary)
    changed["tables"][0]["name"] = "a\x1b[2Jb"
    changed["notes"] = ["one\ntwo"]
    text = describe_text.text(changed)
    assert "\x1b" not in text and "a\\x1b[2Jb" in text
    assert "note: one\\ntwo" in text.splitlines()
