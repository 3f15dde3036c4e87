"""Inputs that tell the label, against scikit-learn, and honest ones that do not ring."""

import dataclasses

import numpy as np
import pytest
from sklearn import metrics

from rankjax.data import check_inputs
from rankjax.schema import Schema
from tests.data import worlds


def shifted(label, auc_of, seed=0):
    """Normal scores whose mean differs by label: 1.19 gives AUC .8, 2.5 .96."""
    noise = np.random.default_rng(seed).normal(size=len(label))
    return (noise + auc_of * label).astype(np.float32)


def planted(tmp_path, make, **feature):
    """Findings of a clean world with one more context column, made from its impressions."""
    found, files = worlds.clean()
    files["impressions"]["planted"] = make(files["impressions"])
    kind = feature if feature else {"kind": "dense"}
    found = worlds.with_feature(found, name="planted", **kind)
    return check_inputs.feature_predicts_label(worlds.written(tmp_path, found, files))


def auc_told(one):
    return float(one.evidence.split("AUC ")[1].split()[0])


def test_a_strong_but_honest_feature_is_silent(tmp_path):
    assert planted(tmp_path, lambda x: shifted(x["click"], 1.19)) == []


@pytest.mark.parametrize("sign", [1, -1])
def test_a_dense_feature_rings_either_way_with_its_auc_in_train(tmp_path, sign):
    (one,) = planted(tmp_path, lambda x: shifted(x["click"], 2.6 * sign))
    _, files = worlds.clean()
    x = files["impressions"]
    score, train = shifted(x["click"], 2.6 * sign), x["span"] == 0
    want = metrics.roc_auc_score(x["click"][train], score[train])
    assert auc_told(one) == pytest.approx(want, abs=6e-5)
    assert "as it is" in one.evidence and "'click'" in one.evidence
    assert one.where == 'impressions.arrow, column "planted"' and one.severity == "error"


def test_a_leak_that_only_zeros_show_rings(tmp_path):
    """Values of both signs where clicked, none elsewhere: as a score it is nothing."""
    normal = lambda x: shifted(x["click"], 0) * x["click"]
    (one,) = planted(tmp_path, normal)
    assert "by whether it is 0" in one.evidence and auc_told(one) == 0.0


def test_a_counter_is_named_as_one(tmp_path):
    counter = {"kind": "dense", "counter": True}
    (one,) = planted(tmp_path, lambda x: shifted(x["click"], 4), **counter)
    assert "counter" in one.evidence and "strictly before" in one.advice


def test_an_id_rings_by_rates_of_its_values(tmp_path):
    """Odd values where clicked, even ones elsewhere, in no order that a score would show."""
    rng = np.random.default_rng(0)
    make = lambda x: (2 * rng.integers(1, 400, len(x["click"])) + x["click"]).astype(np.int32)
    (one,) = planted(tmp_path, make, table="planted")
    assert "label rates" in one.evidence and auc_told(one) > 0.98


def test_rates_are_judged_on_rows_that_they_were_not_learned_on(tmp_path):
    """Ids that are met once each would have AUC 1 on their own rows."""
    found, files = worlds.clean()
    n = len(files["impressions"]["click"])
    files["impressions"]["planted"] = np.arange(1, n + 1, dtype=np.int32)
    found = worlds.with_feature(found, name="planted", table="planted")
    tables = tuple(
        dataclasses.replace(t, rows=n + 1) if t.name == "planted" else t for t in found.tables
    )
    found = dataclasses.replace(found, tables=tables)
    assert check_inputs.feature_predicts_label(worlds.written(tmp_path, found, files)) == []


def test_an_id_that_is_missing_where_not_clicked_rings(tmp_path):
    make = lambda x: np.where(x["click"], 1 + np.arange(len(x["click"])) % 999, 0).astype(np.int32)
    (one,) = planted(tmp_path, make, table="planted")
    assert one.where == 'impressions.arrow, column "planted"' and auc_told(one) > 0.99


def test_missing_is_judged_on_the_whole_span():
    """Negatives only while the ids are missing, which they are in the older half only."""
    counts = np.array([[[90, 0], [0, 0]], [[0, 5], [0, 100]]])  # [half, label, id]
    ways = dict(check_inputs._id_ways(np.arange(2), counts))
    assert ways == {"by whether it is missing": pytest.approx((90 * 0 + 5 / 2) / 95)}


def test_several_ids_ring(tmp_path):
    rng = np.random.default_rng(0)

    def make(x):
        ids = rng.integers(1, 500, (len(x["click"]), 3))
        ids = np.where(x["click"][:, None], ids, ids + 499).astype(np.int32)
        ids[:, 1:] *= rng.random((len(ids), 2)) < 0.5
        return ids

    feature = {"kind": "ids", "table": "planted", "values": 3}
    (one,) = planted(tmp_path, make, **feature)
    assert "label rates" in one.evidence and auc_told(one) == 1.0
    blind = lambda x: rng.integers(0, 900, (len(x["click"]), 3)).astype(np.int32)
    assert planted(tmp_path / "blind", blind, **feature) == []


def test_unused_places_of_several_ids_do_not_count():
    rates = np.array([0.5, 0.1, 0.3])
    got = check_inputs._scores(np.array([[1, 0], [0, 2], [2, 1], [0, 0]]), rates)
    assert got == pytest.approx([0.1, 0.3, 0.2, 0.5])
    assert check_inputs._scores(np.array([2, 0]), rates) == pytest.approx([0.3, 0.5])


def test_only_rows_that_count_for_a_task_are_read(tmp_path):
    """A score of likes, told among clicks only: elsewhere it is as high for no like."""
    make = lambda x: shifted(x["like"] | (1 - x["click"]), 4)
    told = planted(tmp_path, make)
    assert ["'like'" in x.evidence for x in told] == [True]


def test_few_labels_are_not_judged(tmp_path):
    found, files = worlds.clean()
    shown = files["impressions"]
    clicked = np.flatnonzero(shown["click"] & (shown["span"] == 0))
    shown["click"][clicked[check_inputs.FEWEST - 1 :]] = 0
    shown["like"][:] = 0
    shown["planted"] = shown["click"].astype(np.float32)
    found = worlds.with_feature(found, name="planted", kind="dense")
    log = worlds.written(tmp_path, found, files)
    assert check_inputs.feature_predicts_label(log) == []
    shown["click"][clicked[check_inputs.FEWEST - 1]] = 1
    log = worlds.written(tmp_path / "one_more", found, files)
    assert len(check_inputs.feature_predicts_label(log)) == 1


def test_features_of_items_and_users_ring_in_their_files(tmp_path):
    """Labels that follow from the item: its dense feature, its own id and nothing else ring."""
    found, files = worlds.clean()
    items, shown = files["items"], files["impressions"]
    quality = np.random.default_rng(0).normal(size=len(items["item"])).astype(np.float32)
    quality[0] = 0
    items["quality"] = quality
    shown["click"] = (quality[shown["item"]] > 0.5).astype(np.int8)
    shown["like"] *= shown["click"]
    quality_of = dataclasses.replace(
        found.features[0], name="quality", side="item", kind="dense", table=""
    )
    found = dataclasses.replace(found, features=(*found.features, quality_of))
    told = check_inputs.feature_predicts_label(worlds.written(tmp_path, found, files))
    assert {x.where for x in told} == {f'items.arrow, column "{k}"' for k in ("item", "quality")}
    train = shown["span"] == 0
    want = metrics.roc_auc_score(shown["click"][train], quality[shown["item"][train]])
    (one,) = [x for x in told if '"quality"' in x.where]
    assert auc_told(one) == pytest.approx(want, abs=6e-5)


def test_derived_features_are_read_as_batches_hold_them(tmp_path):
    """Labels that follow from the age of the item."""
    found, files = worlds.clean()
    shown = files["impressions"]
    age = shown["time"] - files["items"]["birth"][shown["item"]]
    shown["click"] = (age < np.quantile(age, 0.2)).astype(np.int8)
    shown["like"][:] = 0
    told = check_inputs.feature_predicts_label(worlds.written(tmp_path, found, files))
    assert 'log.json, derived feature "item_age"' in {x.where for x in told}


def unseen(folder, found: Schema, files):
    told = check_inputs.unseen_in_evaluation(worlds.written(folder, found, files))
    return {x.where: x.evidence for x in told}


def test_the_share_of_new_ids_is_told_above_one_half(tmp_path):
    found, files = worlds.clean()
    shown, n = files["impressions"], len(files["users"]["user"])
    new = worlds.rows(files["users"], np.arange(1, n))
    new["user"] = new["user"] + np.int32(n - 1)
    files["users"] = worlds.joined(files["users"], new)
    tables = tuple(
        dataclasses.replace(t, rows=2 * n) if t.name == "user" else t for t in found.tables
    )
    found = dataclasses.replace(found, tables=tables)
    files["events"] = {k: x[:0] for k, x in files["events"].items()}
    validation = np.flatnonzero(shown["span"] == 1)
    for share, rings in ((0.4, False), (0.6, True)):
        some = validation[: int(share * len(validation))]
        changed = dict(shown, user=shown["user"].copy())
        changed["user"][some] += n - 1
        told = unseen(tmp_path / str(share), found, dict(files, impressions=changed))
        assert list(told) == (['impressions.arrow, column "user"'] if rings else [])
    trained = set(changed["user"][shown["span"] == 0])
    want = np.mean([u not in trained for u in changed["user"][validation]])
    assert f"{100 * want:.1f}% in validation" in told['impressions.arrow, column "user"']


def test_a_feature_of_its_own_is_told_and_one_of_few_values_is_not(tmp_path):
    found, files = worlds.clean()
    later = files["impressions"]["span"] > 0
    rng = np.random.default_rng(0)
    for values, rings in ((5, False), (50, True)):
        ids = rng.integers(1, values, len(later)) + values * later
        files["impressions"]["planted"] = ids.astype(np.int32)
        with_planted = worlds.with_feature(found, name="planted", table="planted")
        told = unseen(tmp_path / str(values), with_planted, files)
        assert list(told) == (['impressions.arrow, column "planted"'] if rings else [])
    assert "100.0% in validation and 100.0% in test" in told['impressions.arrow, column "planted"']
