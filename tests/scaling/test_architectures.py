"""The table of architectures: its columns, the row of the trees, and what is said beside it."""

import re

import polars
import pytest

from rankjax.scaling import architectures, report
from tests.references import study_results


@pytest.fixture(scope="module")
def table():
    return study_results.table(
        architectures=("dlrm_mlp", "rankmixer"), seeds=(0, 1), budgets=(250_000,)
    )


def trees(**changes) -> dict:
    """What baseline.json holds, as far as a report reads it."""
    return {
        "rows": 250_000, "rows_asked": 250_000, "features": 31, "iterations": 120,
        "config": {"iterations": 300, "leaves": 31}, "test_ne": 0.8351, "test_auc": 0.7654,
        "test_request_auc": 0.6123, **changes,
    }  # fmt: skip


def cells(summed) -> list[list[str]]:
    """The table's rows as text, its head first."""
    rows = re.findall(r"<tr>(.*?)</tr>", architectures.section(summed))
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def test_the_trees_stand_where_their_test_ne_puts_them(table):
    summed = report.summary(table, trees=trees(), bootstrap=5)
    head, *rows = cells(summed)
    assert [row[1] for row in rows] == ["rankmixer", architectures.TREES, "dlrm_mlp · plain DNN"]
    assert all(len(row) == len(head) for row in rows)
    found = dict(zip(head, rows[1]))
    plain = summed["architectures"][1]["test_ne"]
    assert found == {
        "rank": "–", "architecture": architectures.TREES, "dense params": "–",
        "training FLOPs": "–", "size": "120 trees of 31 leaves, 31 columns", "test NE": "0.8351",
        "NE − plain DNN": f"{0.8351 - plain:+.4f}", "NE − oracle": f"{0.8351 - 0.6723:.4f}",
        "test AUC": "0.7654", "test AUC within requests": "0.6123",
    }  # fmt: skip
    assert [row[0] for row in rows] == ["1", "–", "2"]
    assert "not run" not in architectures.section(summed)


def test_trees_without_a_test_ne_come_last(table):
    summed = report.summary(table, trees=trees(test_ne=None, test_auc=None), bootstrap=5)
    assert cells(summed)[-1][1] == architectures.TREES
    assert cells(summed)[-1][5:9] == ["–"] * 4


def test_auc_within_requests_is_shown_where_it_is_defined(table):
    summed = report.summary(table, bootstrap=5)
    row = summed["architectures"][0]
    own = table.filter(
        polars.col("architecture") == row["architecture"], polars.col("width") == row["width"],
        polars.col("layers") == row["layers"], polars.col("tokens") == row["tokens"],
        polars.col("stage") == "final",
    ).unique("seed")  # fmt: skip
    assert row["test_request_auc_n"] == 2
    means = own.group_by("seed").agg(polars.col("test_request_auc").mean())
    assert row["test_request_auc"] == pytest.approx(means["test_request_auc"].mean(), abs=1e-3)
    shown = f"{row['test_request_auc']:.4f} ± "
    assert cells(summed)[1][-1].startswith(shown)
    assert f"within requests {shown}" in architectures.lines(summed)[0]
    lost = table.with_columns(polars.lit(None, polars.Float64).alias("test_request_auc"))
    for missing in (lost, table.drop("test_request_auc")):
        summed = report.summary(missing, trees=trees(test_request_auc=None), bootstrap=5)
        assert cells(summed)[1][-1] == "undefined" and cells(summed)[2][-1] == "–"
        assert "within requests" not in "".join(architectures.lines(summed))


def test_a_terminal_gets_a_line_an_architecture_and_the_trees(table):
    lines = architectures.lines(report.summary(table, trees=trees(), bootstrap=5))
    assert len(lines) == 3
    assert len({line.index("test NE") for line in lines}) == 1
    assert lines[2].endswith("test NE 0.8351  AUC 0.7654  within requests 0.6123")
    assert "FLOPs" in lines[0] and "FLOPs" not in lines[2]


def test_trees_that_were_not_run_are_a_note_and_no_warning(table):
    summed = report.summary(table, bootstrap=5)
    assert summed["trees"] is None
    assert architectures.lines(summed)[-1] == architectures.NOT_RUN
    assert "Trees not run: " in architectures.section(summed)
    assert not [w for w in summed["warnings"] if "trees" in w]


def test_what_held_the_trees_back_is_said(table):
    held = trees(rows=100, rows_asked=250_000, iterations=300)
    summed = report.summary(table, trees=held, bootstrap=5)
    said = architectures.remarks(summed)
    assert "the newest 100 of 250,000 impressions" in said[0]
    assert "the last of 300 iterations was best" in said[1]
    assert architectures.lines(summed)[-2:] == said
    assert all(text[1:] in architectures.section(summed) for text in said)
    assert not architectures.remarks(report.summary(table, trees=trees(), bootstrap=5))


def test_a_study_without_final_trials_has_no_table(table):
    summed = report.summary(table.clear(), trees=trees(), bootstrap=5)
    assert architectures.section(summed).count("<td>") == 0
    assert "No final trial" in architectures.section(summed)
    assert len(architectures.lines(summed)) == 1
