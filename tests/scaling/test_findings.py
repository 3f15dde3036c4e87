"""What is made of a results table: which rows count, ties, sweeps, frontiers."""

import polars
import pytest

from rankjax.scaling import findings
from tests.references import study_results


@pytest.fixture(scope="module")
def found():
    table = study_results.table(architectures=("dlrm_mlp", "rankmixer", "hstu"), budgets=(250_000,))
    return findings.analyse(table, bootstrap=10)


def test_only_final_trials_are_fitted(found):
    table = study_results.table(architectures=("dlrm_mlp",), budgets=(250_000,))
    spoiled = table.with_columns(
        polars.when(polars.col("stage") == "final").then(polars.col("test_ne")).otherwise(0.1)
        .alias("test_ne")
    )  # fmt: skip
    a, b = (findings.analyse(t, bootstrap=10) for t in (table, spoiled))
    assert a.curves[0].line.b == b.curves[0].line.b
    assert a.envelope["ne"].equals(b.envelope["ne"])


def test_sizes_are_chosen_on_validation_and_reported_on_test(found):
    table = study_results.table(architectures=("dlrm_mlp",), budgets=(250_000,))
    final = (polars.col("stage") == "final") & (polars.col("width") == 32)
    lowered = polars.when(final).then(0.5).otherwise(polars.col("validation_ne"))
    (best,) = findings.analyse(table.with_columns(lowered.alias("validation_ne")), bootstrap=5).best
    assert best["width"] == 32
    assert best["test_ne"] > 0.8
    own = table.filter(final)["test_request_auc"]
    assert best["test_request_auc"] == pytest.approx(own.mean())
    assert best["test_request_auc_std"] == pytest.approx(own.std())
    assert best["test_ne_n"] == 3


def test_best_rows_carry_ties_and_the_distance_to_the_plain_dnn(found):
    assert [row["architecture"] for row in found.best] == ["hstu", "rankmixer", "dlrm_mlp"]
    assert found.best[-1]["ne_to_baseline"] == 0
    assert found.best[0]["ne_to_baseline"] < -0.02
    assert [row["tied_with_first"] for row in found.best] == [False, False, False]
    std, freedom = found.spread["ne"]
    assert std == pytest.approx(6e-4, rel=0.3)
    assert freedom == 2 * (4 + 10 + 10)  # the base is trained once for each of its three ladders
    close = dict(found.best[0], test_ne=found.best[0]["test_ne"] + std)
    assert findings.tied(close, found.best[0], "ne", found.spread["ne"])
    assert findings.tied(close, found.best[0], "ne", (float("nan"), 0)) is None


def test_the_frontier_holds_no_dominated_size(found):
    for metric, sign in (("ne", 1), ("auc", -1)):
        cells = found.envelope[metric]
        assert cells["training_flops"].is_sorted()
        assert (cells[f"validation_{metric}"] * sign).diff().drop_nulls().max() < 0


def test_the_frontier_is_chosen_on_validation():
    """A size whose test loss alone is lucky stays off the frontier."""
    rows = study_results.table(architectures=("dlrm_mlp",), seeds=(0,), noise=0.0)
    lucky = polars.col("axis_value") == 64
    rows = rows.with_columns(
        polars.when(lucky).then(0.5).otherwise(polars.col("test_ne")).alias("test_ne"),
        polars.when(lucky).then(0.99).otherwise(polars.col("validation_ne")).alias("validation_ne"),
    )
    envelope = findings.analyse(rows, bootstrap=5).envelope["ne"]
    assert len(envelope) and 64 not in envelope["width"].to_list()


def test_sweeps_say_the_best_and_the_edge(found):
    assert {row["best"] for row in found.rates} == {3e-3}
    assert {row["edge"] for row in found.rates} == {None}
    table = study_results.table(architectures=("dlrm_mlp",), budgets=(250_000,))
    tilted = table.with_columns(polars.col("validation_ne") - 10 * polars.col("learning_rate"))
    edges = findings.analyse(tilted, bootstrap=5).rates
    assert [(row["best"], row["edge"]) for row in edges] == [(9e-3, "highest")] * 2
    (tried,) = findings.analyse(table, bootstrap=5).tables
    assert (tried["best"]["table_learning_rate"], tried["edge"]) == (0.1, None)
    assert len(tried["tried"]) == 6


def test_undefined_metrics_do_not_stop_it():
    table = study_results.table(architectures=("dlrm_mlp",), budgets=(250_000,))
    ne = polars.when(polars.int_range(polars.len()) == 0).then(float("nan"))
    broken = table.with_columns(
        ne.otherwise(polars.col("test_ne")).alias("test_ne"),
        polars.lit(None, polars.Float64).alias("test_auc"),
    )
    found = findings.analyse(broken, bootstrap=5)
    assert found.dropped == 1
    assert found.final.height == 11
    assert found.envelope["auc"].is_empty()
    assert all(s.points == 0 for s in found.slopes if s.metric == "auc")


def test_a_null_budget_is_as_many_impressions_as_were_trained_on():
    table = study_results.table(architectures=("dlrm_mlp",), budgets=(250_000,))
    found = findings.analyse(
        table.with_columns(polars.lit(None, polars.Int64).alias("budget")), bootstrap=5
    )
    assert found.final["budget"].unique().to_list() == [250_000]


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match=r"columns \['seed', 'test_ne'\] are missing"):
        findings.analyse(study_results.table(seeds=(0,)).drop("seed", "test_ne"))


def test_columns_of_no_importance_may_be_missing():
    table = study_results.table(architectures=("dlrm_mlp",), budgets=(250_000,))
    few = table.select(*findings.REQUIRED, "width", "samples")
    assert len(findings.analyse(few, bootstrap=5).best) == 1
