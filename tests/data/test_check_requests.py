"""Rows twice, mixed spans, places that tell the click, spans and requests of one class."""

import re

import numpy as np
import pytest
from sklearn import metrics

from rankjax.data import check_requests, event_log, tally
from tests import tiny
from tests.data import worlds


def told(check, folder, found, files):
    return check(worlds.written(folder, found, files))


@pytest.mark.parametrize(("step", "severity"), [(20, "error"), (400, "warning"), (2000, None)])
def test_rows_twice_ring_by_their_share(tmp_path, step, severity):
    found, files = worlds.clean()
    n = len(files["impressions"]["item"])
    again = np.arange(0, n, step)
    files["impressions"] = worlds.rows(
        files["impressions"], np.sort(np.append(np.arange(n), again))
    )
    findings = told(check_requests.duplicated_impressions, tmp_path, found, files)
    assert [x.severity for x in findings] == ([severity] if severity else [])
    if severity:
        assert f"{len(again):,} of {n + len(again):,} impressions" in findings[0].evidence
        first, second = map(int, re.findall(r"rows (\d+) and (\d+)", findings[0].evidence)[0])
        x = files["impressions"]
        assert first != second
        assert all(x[name][first] == x[name][second] for name in ("request", "item"))


def repeated(found, files, later):
    """Every tenth impression again, in a request of its own, `later` seconds after."""
    shown = files["impressions"]
    more = worlds.rows(shown, np.arange(0, len(shown["item"]), 10))
    more["request"] = more["request"] + shown["request"].max() + 1
    more["time"] = more["time"] + later
    files["impressions"] = worlds.in_order(worlds.joined(shown, more), "time", "request")
    return found, files


def test_a_row_again_in_another_request_of_the_same_second_rings(tmp_path):
    findings = told(
        check_requests.duplicated_impressions, tmp_path, *repeated(*worlds.clean(), later=0)
    )
    assert [x.where for x in findings] == ['impressions.arrow, columns "user", "item", "time"']
    later = repeated(*worlds.clean(), later=1)
    assert told(check_requests.duplicated_impressions, tmp_path / "later", *later) == []


def test_with_order_only_the_same_bound_is_no_repetition(tmp_path):
    found, files = repeated(*worlds.clean(), later=0)
    found, shown = worlds.without_times(found, files), files["impressions"]
    check = check_requests.duplicated_impressions
    assert len(told(check, tmp_path, found, files)) == 1
    shown["order"] = np.arange(len(shown["order"]), dtype=np.int32)
    assert told(check, tmp_path / "ordered", found, files) == []


def test_a_request_in_two_spans_is_an_error(tmp_path):
    found, files = worlds.clean()
    span, request = files["impressions"]["span"], files["impressions"]["request"]
    cut = int(np.flatnonzero(span == 2)[0])
    requests = len(np.unique(request[span == 2]))
    span[cut] = 1
    (one,) = told(check_requests.split_shares_requests, tmp_path, found, files)
    assert one.severity == "error"
    assert f"1 of {requests:,} requests of test (" in one.evidence
    assert f"stand in validation too, for instance request {request[cut]}" in one.evidence


def test_spans_that_overlap_in_time_are_a_warning(tmp_path):
    found, files = worlds.clean()
    shown = files["impressions"]
    late = shown["request"] == shown["request"][-1]
    shown["span"][late] = 0
    findings = told(check_requests.split_shares_requests, tmp_path, found, files)
    assert [x.severity for x in findings] == ["warning", "warning"]
    rows = int((shown["span"] == 0).sum())
    for one, later in zip(findings, ("validation", "test")):
        assert f"{late.sum()} of {rows:,} impressions of train" in one.evidence
        assert f"the first one of {later}" in one.evidence


def test_requests_of_one_second_on_both_sides_of_a_cut_are_fine(tmp_path):
    found, files = worlds.clean()
    shown = files["impressions"]
    cut = int(np.flatnonzero(shown["span"] == 1)[0])
    last = shown["request"] == shown["request"][cut - 1]
    shown["time"][last] = shown["time"][cut]
    files["impressions"] = worlds.in_order(shown, "time", "request")
    assert told(check_requests.split_shares_requests, tmp_path, found, files) == []


def placed(found, files, strength, seed=0):
    """Rows within requests sorted by noise plus `strength` times no click."""
    shown = files["impressions"]
    noise = np.random.default_rng(seed).normal(size=len(shown["click"]))
    shown["key"] = noise - strength * shown["click"]
    files["impressions"] = worlds.in_order(shown, "time", "request", "key")
    del files["impressions"]["key"]
    return found, files


def mean_auc(shown, score):
    """Mean AUC within requests of both classes, and how many there are."""
    starts, found = np.flatnonzero(np.diff(shown["request"])) + 1, []
    for label, x in zip(np.split(shown["click"], starts), np.split(score, starts)):
        if 0 < label.sum() < len(label):
            pairs = np.subtract.outer(x[label == 1], x[label == 0])
            found.append(np.mean((pairs > 0) + (pairs == 0) / 2))
    return np.mean(found), len(found)


@pytest.mark.parametrize(("strength", "rings"), [(0.75, False), (2.5, True), (-2.5, True)])
def test_places_ring_beyond_honest_position_bias(tmp_path, strength, rings):
    found, files = placed(*worlds.clean(), strength)
    findings = told(check_requests.position_encodes_click, tmp_path, found, files)
    clicks = [x for x in findings if '"click"' in x.where]
    assert [x.severity for x in clicks] == ["warning"] * rings
    if rings:
        shown = files["impressions"]
        auc, requests = mean_auc(shown, np.arange(len(shown["click"])))
        assert f"AUC {auc:.3f} within {requests:,} requests" in clicks[0].evidence


def test_rates_by_place_are_told(tmp_path):
    found, files = placed(*worlds.clean(), 4.0)
    one, *_ = told(check_requests.position_encodes_click, tmp_path, found, files)
    shown, rows, hits = files["impressions"], np.zeros(16), np.zeros(16)
    for request in np.unique(shown["request"]):
        label = shown["click"][shown["request"] == request]
        if 0 < label.sum() < len(label):
            rows[: len(label)] += 1
            hits[: len(label)] += label
    want = ", ".join(f"{x:.3g}" for x in (hits / rows)[:5])
    assert f"rates at places 1, 2, ..: {want};" in one.evidence


def test_one_place_of_all_positives_is_an_error(tmp_path):
    """One click a request, always fourth: far from first and last, and no less telling."""
    found, files = worlds.clean()
    shown = files["impressions"]
    shown["click"][:] = 0
    starts = np.flatnonzero(np.append(True, np.diff(shown["request"]) != 0))
    shown["click"][starts + 3] = 1
    shown["like"][:] = 0
    (one,) = told(check_requests.position_encodes_click, tmp_path, found, files)
    assert one.severity == "error" and "place 4 holds" in one.evidence
    auc = float(one.evidence.split("AUC ")[1].split()[0])
    assert 1 - check_requests.PLACE_AUC < auc < check_requests.PLACE_AUC


def test_few_requests_are_not_judged(tmp_path):
    found, files = placed(*worlds.clean(), 9.0)
    shown = files["impressions"]
    shown["like"][:] = 0
    clicks = np.add.reduceat(
        shown["click"], np.flatnonzero(np.append(True, np.diff(shown["request"]) != 0))
    )
    requests = shown["request"][np.append(True, np.diff(shown["request"]) != 0)]
    some = requests[clicks > 0][: check_requests.FEWEST_REQUESTS - 1]
    files["impressions"] = worlds.rows(shown, np.flatnonzero(np.isin(shown["request"], some)))
    assert told(check_requests.position_encodes_click, tmp_path, found, files) == []


def test_a_stored_position_is_an_error(tmp_path):
    found, files = worlds.clean()
    shown, rng = files["impressions"], np.random.default_rng(0)
    noise = rng.normal(size=len(shown["click"]))
    for name, strength, rings in (("list_rank", 2.5, 1), ("fair_rank", 0.7, 0), ("other", 2.5, 0)):
        shown[name] = (noise - strength * shown["click"]).astype(np.float32)
        with_it = worlds.with_feature(found, name=name, kind="dense")
        findings = told(check_requests.position_encodes_click, tmp_path / name, with_it, files)
        where = [x.where for x in findings if x.severity == "error"]
        assert where == [f'impressions.arrow, column "{name}"'] * rings
        if rings:
            auc, requests = mean_auc(shown, shown[name])
            (one,) = findings
            assert f"AUC {auc:.3f} for 'click' within {requests:,}" in one.evidence
        del shown[name]


def test_auc_within_groups_counts_ties_half():
    rng = np.random.default_rng(0)
    group = np.sort(rng.integers(0, 40, 300))
    group = np.unique(group, return_inverse=True)[1]
    x, label, counts = rng.integers(0, 4, 300), rng.random(300) < 0.3, rng.random(300) < 0.8
    got = check_requests._grouped_auc(x, group, label & counts, ~label & counts)
    for g in range(group.max() + 1):
        own = (group == g) & counts
        if 0 < label[own].sum() < own.sum():
            assert got[g] == pytest.approx(metrics.roc_auc_score(label[own], x[own]), abs=1e-12)
        else:
            assert np.isnan(got[g])


def test_one_class_tells_span_and_counts(tmp_path):
    found, files = worlds.clean()
    shown = files["impressions"]
    shown["like"][shown["span"] == 2] = shown["click"][shown["span"] == 2]
    (one,) = told(check_requests.one_class, tmp_path, found, files)
    clicks = int(shown["click"][shown["span"] == 2].sum())
    assert one.where == 'impressions.arrow, column "like"' and one.severity == "error"
    assert f"span 'test': {clicks:,} positives among {clicks:,}" in one.evidence
    shown["span"][shown["span"] == 1] = 0
    findings = told(check_requests.one_class, tmp_path / "empty", found, files)
    assert ["span 'validation': 0 positives among 0" in x.evidence for x in findings] == [1, 1, 0]


def test_requests_with_both_are_looked_for_task_by_task(tmp_path):
    """Clicks differ within requests, likes of the clicked never do."""
    found, files = tiny.columns()
    shown = files["impressions"]
    other = np.arange(len(shown["click"])) % 2
    shown["like"] = np.where(shown["click"], shown["request"] % 2, other).astype(np.int8)
    (one,) = told(check_requests.no_request_with_both, tmp_path, found, files)
    assert one.where == 'impressions.arrow, columns "request", "like"'
    assert one.severity == "warning"


def test_whole_requests_are_read_whatever_the_chunk(tmp_path, monkeypatch):
    found, files = placed(*worlds.clean(), 2.5)
    log = worlds.written(tmp_path, found, files)
    starts, task = tally.request_starts(log), log.schema.tasks[0]
    whole = check_requests._within(log, task, starts, None)
    monkeypatch.setattr(event_log, "CHUNK", 31)
    parts = check_requests._within(log, task, starts, None)
    assert parts[0] == pytest.approx(whole[0], abs=1e-12) and parts[1] == whole[1]
    np.testing.assert_array_equal(parts[2:], whole[2:])
