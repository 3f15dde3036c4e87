"""Figures: what they draw is what was found, and no text of the data reaches plotly raw."""

import numpy as np
import polars
import pytest

from rankjax.scaling import figures, findings
from tests.references import study_results


@pytest.fixture(scope="module")
def found():
    table = study_results.table(architectures=("dlrm_mlp", "rankmixer"))
    return findings.analyse(table, bootstrap=10)


def points(figure):
    return [t for t in figure.data if t.mode and "markers" in t.mode]


@pytest.mark.parametrize("x", ["training_flops", "dense_params", "samples"])
@pytest.mark.parametrize("metric", ["ne", "auc"])
def test_quality_draws_every_cell_with_its_spread(found, metric, x):
    figure = figures.quality(found, metric, x)
    assert sum(len(t.x) for t in points(figure)) == found.cells.height
    assert all(max(t.error_y.array) > 0 for t in points(figure))
    assert figure.layout.xaxis.type == "log"
    drawn = sorted(v for t in points(figure) for v in t.y)
    np.testing.assert_allclose(drawn, sorted(found.cells[f"test_{metric}"].to_list()))


def test_the_oracle_is_a_line_or_words(found):
    (far,) = (a.text for a in figures.quality(found, "ne", "samples").layout.annotations)
    assert far.startswith("oracle NE 0.6723, 0.1")
    near = study_results.table(architectures=("dlrm_mlp",), oracle=0.81)
    figure = figures.quality(findings.analyse(near, bootstrap=5), "ne", "training_flops")
    assert figure.layout.shapes[0].y0 == pytest.approx(0.81)
    assert not figures.quality(found, "auc", "samples").layout.annotations


def test_a_ladder_shows_every_seed_its_law_and_band(found):
    figure = figures.ladder(found, "rankmixer", "D", "ne")
    assert sum(len(t.x) for t in points(figure)) == 4 * 3 * 2  # sizes, seeds, budgets
    bands = [t for t in figure.data if t.fill == "toself"]
    assert len(bands) == 2
    laws = [t for t in figure.data if t.mode == "lines" and t.fill is None]
    assert len(laws) == 2
    half = len(bands[0].y) // 2
    assert (np.array(bands[0].y[:half]) >= np.array(laws[0].y)).all()
    data = figures.ladder(found, "rankmixer", "data", "ne")
    assert all(len(set(t.x)) == 2 for t in points(data))


def test_axes_show_gains_to_the_right_with_their_intervals(found):
    figure = figures.axes(found, "ne")
    shown = {label: x for t in figure.data for label, x in zip(t.y, t.x)}
    assert shown["rankmixer · D"] == pytest.approx(0.0042, abs=5e-4)
    assert all(r > 0 for t in figure.data for r in t.error_x.array)
    assert figures.axes(found, "auc").data[0].x[0] > 0


def test_the_frontier_names_its_sizes(found):
    figure = figures.frontier(found, "ne")
    named = sum(len(t.x) for t in points(figure) if t.name in ("dlrm_mlp", "rankmixer"))
    assert named == found.envelope["ne"].height


def test_rates_and_tables_mark_what_was_chosen(found):
    figure = figures.rates(found, "rankmixer")
    stars = [t for t in figure.data if t.marker.symbol == "star"]
    assert [t.x for t in stars] == [(3e-3,)] * 6
    assert len(figures.tables(found, "rankmixer").data) == 2


def test_text_of_the_data_is_escaped():
    evil = '<img src=x onerror="alert(1)">'
    table = study_results.table(architectures=("dlrm_mlp",))
    table = table.with_columns(polars.lit(evil).alias("architecture"))
    found = findings.analyse(table, bootstrap=5)
    drawn = [
        figures.quality(found, "ne", "training_flops"), figures.frontier(found, "ne"),
        figures.ladder(found, evil, "D", "ne"), figures.axes(found, "ne"),
        figures.rates(found, evil), figures.tables(found, evil),
    ]  # fmt: skip
    for figure in drawn:
        assert "<img" not in str(figure.to_plotly_json())
    assert "&lt;img" in str(drawn[0].to_plotly_json())


def test_colors_do_not_run_out():
    names = [f"model {i}" for i in range(11)]
    table = study_results.table(architectures=("dlrm_mlp",), seeds=(0,), budgets=(250_000,))
    many = polars.concat([table.with_columns(polars.lit(n).alias("architecture")) for n in names])
    assert set(figures.colors(findings.analyse(many, bootstrap=5))) == set(names)
