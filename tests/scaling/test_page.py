"""The page: every section, nothing loaded from elsewhere, nothing of the data as markup."""

import pathlib
import re
import tomllib

import polars
import pytest

from rankjax.scaling import page, report
from tests.references import study_results

STUDY = {
    "study": {"seeds": [0, 1], "budgets": [250_000], "train": {"batch": 512}},
    "log": {"source": "made"},
    "command": "rankjax study quick <out>",
    "notes": ["negatives were drawn, one per <click>", "times are rounded"],
}


def html(table, folder, **more):
    path = report.write(table, STUDY, folder, bootstrap=10, **more)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    table = study_results.table(architectures=("dlrm_mlp", "rankmixer"), seeds=(0, 1))
    timing = table.select("trial").with_columns(seconds_total=polars.lit(12.5))
    return html(table, tmp_path_factory.mktemp("report"), timing=timing)


def without_plotly(text):
    scripts = sorted(re.findall(r"<script>.*?</script>", text, flags=re.DOTALL), key=len)
    assert len(scripts[-1]) > 10**6
    return text.replace(scripts[-1], ""), scripts[-1]


def test_every_section_is_there(text):
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert len(titles) == 12
    for word in ("Which axis pays", "Learning rates", "Protocol", "Beside published exponents"):
        assert word in titles
    assert "0.002718 · P^0.116" in text
    assert "arXiv 2604.00590" in text
    assert "rankjax study quick &lt;out&gt;" in text
    assert "plain DNN" in text
    assert "silent in all" in text
    assert "12.5" in text
    assert "± 0.000" in text


def test_plotly_is_there_once_and_nothing_is_loaded(text):
    rest, plotly = without_plotly(text)
    assert "plotly.js v" in plotly[:400]
    assert rest.count("plotly.js v") == 0
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", rest)
    assert "url(" not in rest
    assert "default-src 'none'" in text


def test_notes_of_the_log_stand_above_the_advice(text, tmp_path):
    rest, _ = without_plotly(text)
    shown = "<li>negatives were drawn, one per &lt;click&gt;</li><li>times are rounded</li>"
    assert f'<ul class="notes">{shown}</ul>' in rest
    assert rest.index(shown) < rest.index('<div class="advice')
    table = study_results.table(architectures=("hstu",), seeds=(0,), budgets=(250_000,))
    path = report.write(table, {"study": {}}, tmp_path, bootstrap=5)
    assert 'class="notes"' not in path.read_text(encoding="utf-8")


def test_the_switches_cover_metrics_and_footings(text):
    for label in ("NE", "AUC", "training FLOPs", "dense parameters", "training impressions"):
        assert f"<button>{label}</button>" in text


def test_text_of_the_data_is_escaped(tmp_path):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    table = study_results.table(architectures=("dlrm_mlp",), seeds=(0,), budgets=(250_000,))
    table = table.with_columns(
        polars.lit(evil).alias("architecture"), polars.lit(evil).alias("ladder"),
        (polars.lit(evil) + polars.col("trial")).alias("trial"),
    )  # fmt: skip
    shown = {"name": evil, "command": evil, "study": {"organisations": [[evil, evil]]}}
    path = report.write(table, shown, tmp_path, bootstrap=5)
    rest, _ = without_plotly(path.read_text(encoding="utf-8"))
    assert "<script>alert" not in rest
    assert "<img" not in rest
    assert "&lt;script&gt;alert(1)" in rest


@pytest.mark.parametrize("stage", ["final", "sweep"])
def test_a_study_of_one_trial_is_still_a_page(tmp_path, stage):
    table = study_results.table(architectures=("hstu",), seeds=(0,), budgets=(250_000,))
    text = html(table.filter(polars.col("stage") == stage).head(1), tmp_path)
    assert "The fits support no advice" in text
    assert len(re.findall(r"<h2>", text)) == 12


def test_the_assets_are_shipped_with_the_package():
    pyproject = pathlib.Path(__file__).parents[2] / "pyproject.toml"
    with pyproject.open("rb") as file:
        shipped = tomllib.load(file)["tool"]["setuptools"]["package-data"]
    patterns = [p for entries in shipped.values() for p in entries]
    assert any("assets" in p for p in patterns), "package-data lacks scaling/assets/*"
    assert {p.name for p in page.ASSETS.iterdir()} == {"report.html", "report.css", "report.js"}
