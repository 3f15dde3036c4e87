"""One fault a test, planted into a clean world: exactly its kind rings, and names its column."""

import dataclasses
import json

import numpy as np
import pytest

from rankjax.data import check, counters, event_log
from rankjax.data.sources import synthetic
from tests import tiny
from tests.data import worlds


def label_copied(found, files):
    rng, shown = np.random.default_rng(0), files["impressions"]
    flips = rng.random(len(shown["click"])) < 0.01
    shown["score"] = (shown["click"] ^ flips).astype(np.float32)
    return worlds.with_feature(found, name="score", kind="dense")


def click_before_its_impression(found, files):
    shown = files["impressions"]
    clicked = worlds.rows(shown, np.flatnonzero(shown["click"]))
    early = {name: clicked[name] for name in ("user", "item")}
    early |= {"time": clicked["time"] - 1, "action": np.ones_like(clicked["item"])}
    # the first request of the world may stand at its item's birth
    files["events"] = worlds.in_order(worlds.joined(files["events"], early), "user", "time")
    return found


def births_too_late(found, files):
    files["items"]["birth"][5::10] += 60 * 86_400
    return found


def items_renumbered(found, files):
    items, shown = files["items"], files["impressions"]
    n = len(items["item"]) - 1
    new = worlds.rows(items, np.arange(1, n + 1))
    new["item"] = new["item"] + np.int32(n)
    files["items"] = worlds.joined(items, new)
    shown["item"] += np.int32(n) * (shown["span"] == 2)
    tables = tuple(
        dataclasses.replace(t, rows=2 * n + 1) if t.name == "item" else t for t in found.tables
    )
    return dataclasses.replace(found, tables=tables)


def rows_twice(found, files):
    shown = files["impressions"]
    twice = np.sort(np.append(np.arange(len(shown["time"])), np.arange(0, 40_000, 40)))
    files["impressions"] = worlds.rows(shown, twice)
    return found


def last_days_inverted(found, files):
    shown = files["impressions"]
    shown["click"] ^= (shown["time"] >= 116 * 86_400).astype(np.int8)
    return found


def request_in_two_spans(found, files):
    span = files["impressions"]["span"]
    span[np.flatnonzero(span == 1)[0] - 1] = 1
    return found


def clicked_first(found, files):
    shown = files["impressions"]
    shown["other"] = 1 - shown["click"]
    files["impressions"] = worlds.in_order(shown, "time", "request", "other")
    del files["impressions"]["other"]
    return found


def no_click_in_validation(found, files):
    shown = files["impressions"]
    for name in ("click", "like"):
        shown[name][shown["span"] == 1] = 0
    return found


def one_row_a_request(found, files):
    shown = files["impressions"]
    _, first = np.unique(shown["request"], return_index=True)
    files["impressions"] = worlds.rows(shown, np.sort(first))
    return found


PLANTS = [
    (label_copied, "feature_predicts_label", "error", '"score"'),
    (click_before_its_impression, "event_from_the_future", "error", 'events.arrow, column "time"'),
    (births_too_late, "seen_before_birth", "error", 'items.arrow, column "birth"'),
    (items_renumbered, "unseen_in_evaluation", "warning", 'impressions.arrow, column "item"'),
    (rows_twice, "duplicated_impressions", "error", '"request", "item"'),
    (last_days_inverted, "label_changes_over_time", "warning", '"click"'),
    (request_in_two_spans, "split_shares_requests", "error", '"request", "span"'),
    (clicked_first, "position_encodes_click", "warning", "rows of a request"),
    (no_click_in_validation, "one_class", "error", '"click"'),
    (one_row_a_request, "no_request_with_both", "warning", '"request", "click"'),
]


def test_every_kind_has_its_plant():
    assert {kind for _, kind, _, _ in PLANTS} == set(check.KINDS)


@pytest.mark.parametrize(("plant", "kind", "severity", "where"), PLANTS)
def test_a_planted_fault_is_found_alone(tmp_path, plant, kind, severity, where):
    found, files = worlds.clean()
    findings = worlds.findings(tmp_path, plant(found, files), files)
    assert worlds.kinds(findings) == {kind}, check.text(findings)
    assert findings[0].severity == severity
    assert where in findings[0].where
    assert any(c.isdigit() for c in findings[0].evidence) and findings[0].advice


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_clean_world_gives_no_finding(tmp_path, seed):
    folder = synthetic.prepare(synthetic.World(users=150, seed=seed), tmp_path, workers=1)
    assert check.check(event_log.EventLog.open(folder)) == []


def test_counters_of_a_clean_world_give_no_finding(tmp_path):
    found, files = worlds.clean()
    worlds.written(tmp_path, found, files)
    log = event_log.EventLog.open(counters.add(tmp_path / "log", tmp_path / "counted"))
    assert any(f.counter for f in log.schema.features)
    assert check.check(log) == []


def test_a_clean_world_of_order_only_gives_no_finding(tmp_path):
    found, files = worlds.clean()
    assert worlds.findings(tmp_path, worlds.without_times(found, files), files) == []


def test_chunks_change_nothing(tmp_path, monkeypatch):
    found, files = worlds.clean()
    for plant in (rows_twice, clicked_first, births_too_late, last_days_inverted, label_copied):
        found = plant(found, files)
    found = items_renumbered(found, files)
    log = worlds.written(tmp_path, found, files)
    whole = check.check(log)
    assert len(worlds.kinds(whole)) == 6
    monkeypatch.setattr(event_log, "CHUNK", 9973)
    assert check.check(log) == whole


def test_errors_come_first_and_kinds_in_their_order(tmp_path):
    found, files = worlds.clean()
    clicked_first(found, files)
    no_click_in_validation(found, files)
    findings = worlds.findings(tmp_path, items_renumbered(found, files), files)
    told = [(x.severity, x.kind) for x in findings]
    order = [("error", "one_class"), ("warning", "unseen_in_evaluation")]
    assert list(dict.fromkeys(told)) == [*order, ("warning", "position_encodes_click")]


def test_the_log_of_no_rows_is_told(tmp_path):
    found, files = tiny.columns()
    for file in ("events", "impressions"):
        files[file] = {name: x[:0] for name, x in files[file].items()}
    findings = worlds.findings(tmp_path, found, files)
    assert worlds.kinds(findings) == {"one_class", "no_request_with_both"}
    assert "0 positives among 0 impressions" in findings[0].evidence


def test_a_derived_feature_that_cannot_be_made_is_refused(tmp_path):
    found, files = tiny.columns()
    del files["items"]["birth"]
    log = worlds.written(tmp_path, found, files)
    with pytest.raises(ValueError, match=r"item_age.*birth"):
        check.check(log)


def test_text_tells_all_and_json_holds_it():
    one = check.Finding("one_class", "error", "impressions.arrow", "0 of 7", "cut elsewhere")
    two = dataclasses.replace(one, kind="duplicated_impressions", severity="warning")
    text = check.text([one, two])
    assert text.startswith("1 error(s), 1 warning(s)\n")
    for word in dataclasses.astuple(one) + dataclasses.astuple(two):
        assert word in text
    assert json.loads(json.dumps(dataclasses.asdict(one)))["evidence"] == "0 of 7"
    assert check.text([]).startswith("nothing found") and "one_class" in check.text([])
