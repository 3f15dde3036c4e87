"""report.html and summary.json: written whole, in JSON types, whatever a study lacks."""

import json

import numpy as np
import polars
import pytest

from rankjax.scaling import report
from tests.references import study_results


@pytest.fixture(scope="module")
def table():
    return study_results.table(architectures=("dlrm_mlp", "rankmixer"), seeds=(0, 1))


@pytest.fixture(scope="module")
def summary(table):
    return report.summary(table, bootstrap=10)


def test_write_returns_the_report_and_leaves_nothing_else(table, summary, tmp_path):
    path = report.write(table, {}, tmp_path / "new", bootstrap=10)
    assert path == tmp_path / "new" / "report.html"
    assert {p.name for p in path.parent.iterdir()} == {"report.html", "summary.json"}
    assert json.loads((path.parent / "summary.json").read_text()) == summary
    again = report.write(table, {}, tmp_path / "new", bootstrap=10)
    assert again.read_bytes() == path.read_bytes()


def test_the_summary_is_json_and_says_what_was_planted(summary):
    json.dumps(summary, allow_nan=False)
    assert summary["advice"]["architecture"] == "rankmixer"
    assert summary["counts"]["seeds"] == 2
    assert summary["alarm"] == {"checked": 4 * (4 * 2 * 2 + 2 * 3) + 2 * 6, "rang": []}
    slopes = {(s["architecture"], s["axis"], s["metric"]): s for s in summary["slopes"]}
    found = slopes["rankmixer", "D", "ne"]
    assert found["low"] <= -0.0042 <= found["high"]
    order = [
        r for r in summary["ranking"] if (r["architecture"], r["metric"]) == ("rankmixer", "ne")
    ]
    assert [o["axis"] for o in order[0]["order"]][:2] == ["data", "D"]
    ahead = {(c["metric"], c["ahead"]) for c in summary["comparisons"]}
    assert ahead == {("ne", "rankmixer"), ("auc", "rankmixer")}
    assert summary["joint"]["rankmixer"]["reasons"]
    assert summary["learning_rates"][0]["best"] == 3e-3


def test_text_tells_a_terminal_the_same(summary):
    text = report.text(summary)
    assert text.startswith(summary["advice"]["sentence"])
    assert "± 0.000" in text
    assert "(2 seeds)" in text
    assert "leak alarm silent" in text
    assert "rankmixer, NE per doubling of training FLOPs: 1. data" in text


def test_trees_and_notes_are_told_to_machines_and_terminals(table, tmp_path):
    trees = {
        "rows": 5, "rows_asked": 5, "features": 3, "iterations": 2, "test_ne": 0.1,
        "config": {"iterations": 9, "leaves": 4}, "test_auc": 0.9, "test_request_auc": None,
    }  # fmt: skip
    path = report.write(table, {"notes": ["drawn"]}, tmp_path, trees=trees, bootstrap=5)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["trees"], summary["notes"]) == (trees, ["drawn"])
    assert summary == report.summary(table, trees=trees, notes=["drawn"], bootstrap=5)
    text = report.text(summary)
    assert text.startswith(f"note: drawn\n{summary['advice']['sentence']}")
    assert "trees (scikit-learn)  test NE 0.1000" in text
    assert "warning: No architecture beats gradient-boosted trees" in text
    page = path.read_text(encoding="utf-8")
    assert "<td>trees (scikit-learn)</td>" in page and "<li>drawn</li>" in page
    assert "No architecture beats gradient-boosted trees" in page
    none = report.summary(table, bootstrap=5)
    assert none["trees"] is None and none["notes"] == []


def test_one_seed_one_size_one_architecture(tmp_path):
    table = study_results.table(
        architectures=("hstu",), seeds=(0,), budgets=(250_000,), oracle=None, axes=("D",)
    )
    small = table.filter(polars.col("stage") == "final").head(1)
    small = small.with_columns(polars.lit(None, polars.Float64).alias("test_auc"))
    summary = report.summary(small, bootstrap=5)
    json.dumps(summary, allow_nan=False)
    assert not summary["advice"]["supported"]
    text = report.text(summary)
    assert "undefined" in text
    assert "warning: One seed a size" in text
    assert "oracle" not in text
    assert report.write(small, {}, tmp_path, bootstrap=5).is_file()


def test_no_rows_at_all(table, tmp_path):
    path = report.write(table.clear(), {}, tmp_path, bootstrap=5)
    assert "nothing can be fitted" in path.read_text(encoding="utf-8")


def test_nothing_is_written_when_the_results_cannot_be_read(table, tmp_path):
    with pytest.raises(ValueError, match="test_ne"):
        report.write(table.drop("test_ne"), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plain_turns_numpy_into_json():
    value = {"a": np.float64(1.5), "b": (np.nan, np.int32(3)), "c": np.array([True]), 1: None}
    assert report.plain(value) == {"a": 1.5, "b": [None, 3], "c": [True], "1": None}
