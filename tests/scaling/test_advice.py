"""The sentence of advice: what it names, what it refuses, and the warnings beside it."""

import types

import polars
import pytest

from rankjax.scaling import advice, findings
from tests.references import study_results


def analyse(**options):
    return findings.analyse(study_results.table(**options), bootstrap=10)


def test_names_the_architecture_and_the_axis_that_were_planted():
    said = advice.advise(analyse(budgets=(250_000,)))
    assert said["supported"]
    assert (said["architecture"], said["axes"]) == ("hstu", ["S"])
    assert "Scale hstu, which is ahead of" in said["sentence"]
    assert "the history length (S) pays most" in said["sentence"]
    assert said["sentence"].count(".") - said["sentence"].count("0.") == 1  # one sentence


def test_names_the_data_where_they_pay_most_and_the_best_size_beside_them():
    said = advice.advise(analyse(architectures=("dlrm_mlp", "hstu"), seeds=(0, 1)))
    assert said["axes"] == ["data"]
    assert "among its sizes it is the history length (S)" in said["sentence"]


def test_one_architecture_still_gets_its_axis():
    said = advice.advise(analyse(architectures=("rankmixer",), budgets=(250_000,)))
    assert (said["supported"], said["axes"]) == (True, ["D"])
    assert said["sentence"].startswith("For rankmixer, the width (D) pays most")


def test_overlapping_axes_are_said_to_overlap():
    found = analyse(architectures=("hstu",), budgets=(250_000,), noise=0.004)
    said = advice.advise(found)
    assert "overlap" in said["sentence"] + "".join(said["reasons"])
    words = advice.ranking_words("hstu", "ne", found.rankings["hstu", "ne"])
    assert "overlaps" in words
    assert words.startswith("hstu, NE per doubling of training FLOPs: 1. ")


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_noise_supports_no_advice(noise):
    options = {"architectures": ("dlrm_mlp", "rankmixer"), "budgets": (250_000,), "seeds": (0,)}
    said = advice.advise(analyse(noise=noise, **options))
    assert not said["supported"]
    assert said["sentence"].startswith("The fits support no advice: ")
    assert "undecided" in said["sentence"]


def test_no_final_trial_supports_no_advice():
    table = study_results.table(architectures=("hstu",), budgets=(250_000,))
    found = findings.analyse(table.filter(polars.col("stage") != "final"), bootstrap=5)
    assert "no final trial" in advice.advise(found)["sentence"]
    assert "nothing can be fitted" in advice.warnings(found)[-1]


def test_an_alarm_voids_the_advice():
    table = study_results.table(architectures=("hstu",), budgets=(250_000,))
    found = findings.analyse(table.with_columns(polars.lit(True).alias("alarm")), bootstrap=5)
    said = advice.advise(found)
    assert not said["supported"]
    assert "leak alarm" in said["sentence"]
    assert "leak alarm rang" in advice.warnings(found)[0]


def test_warnings_of_a_small_study():
    options = {"architectures": ("rankmixer",), "seeds": (0,), "budgets": (250_000,)}
    table = study_results.table(**options)
    tilted = table.with_columns(
        polars.col("validation_ne") - polars.col("learning_rate") * 10
        - polars.col("table_learning_rate"),
        polars.lit(None, polars.Float64).alias("test_auc"),
    )  # fmt: skip
    warned = "\n".join(advice.warnings(findings.analyse(tilted, bootstrap=5)))
    assert "Test AUC is undefined in 12 of 12" in warned
    assert "One seed" in warned
    assert "One data budget" in warned
    assert "One architecture" in warned
    assert "No plain DNN (dlrm_mlp)" in warned
    assert "rankmixer, D = 128: the best learning rate, 0.009, is the highest tried" in warned
    assert "the best table learning rate, 0.2, is the highest tried" in warned


def test_a_sweep_without_any_loss_is_warned_about():
    table = study_results.table(architectures=("dlrm_mlp",), budgets=(250_000,))
    lost = (polars.col("stage") == "sweep") & (polars.col("axis_value") == 16)
    ne = polars.when(lost).then(None).otherwise(polars.col("validation_ne"))
    found = findings.analyse(table.with_columns(ne.alias("validation_ne")), bootstrap=5)
    warned = [w for w in advice.warnings(found) if "gave a validation NE" in w]
    assert len(warned) == 1 and warned[0].startswith("dlrm_mlp, D = 16: none of the rates [0.001")


def test_trees_that_no_architecture_beats_are_warned_about():
    found = analyse(architectures=("dlrm_mlp", "hstu"), budgets=(250_000,))
    best = min(row["test_ne"] for row in found.best)
    about = lambda trees: [w for w in advice.warnings(found, trees) if "trees" in w]
    (warned,) = about({"test_ne": best - 0.01})
    assert warned == (
        "No architecture beats gradient-boosted trees on the same features: test NE "
        f"{best - 0.01:.4f} (trees) against {best:.4f} (hstu, the best)."
    )
    assert about({"test_ne": best})  # a tie is no win
    for beaten in ({"test_ne": best + 0.05}, {"test_ne": None}, None):
        assert not about(beaten)


def test_a_good_study_has_none_of_them():
    assert not [w for w in advice.warnings(analyse(seeds=(0, 1))) if "One " in w or "edge" in w]


@pytest.mark.parametrize(
    ("trees", "word"),
    [(0.5, "No architecture beats"), (0.901, "by no more than seeds differ"), (0.99, None)],
)
def test_trees_are_beaten_only_beyond_the_spread_of_seeds(trees, word):
    found = types.SimpleNamespace(
        best=[{"architecture": "a", "test_ne": 0.9}, {"architecture": "b", "test_ne": 0.95}],
        spread={"ne": (0.002, 4)},
    )
    told = advice._trees_warnings(found, {"test_ne": trees})
    assert told == [] if word is None else word in told[0]
