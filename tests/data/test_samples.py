import dataclasses

import numpy as np
import pytest

from rankjax.data import event_log, samples
from tests import tiny
from tests.references import samples as reference

CONFIGS = [
    samples.SampleConfig(organisation="impression", history=6),
    samples.SampleConfig(organisation="request", history=6),
    samples.SampleConfig(organisation="request", history=0, max_candidates=2),
    samples.SampleConfig(organisation="window", history=6),
    samples.SampleConfig(organisation="window", history=3, max_candidates=3, max_realtime=100),
    samples.SampleConfig(organisation="window", history=3, max_realtime=2, window=3 * tiny.DAY),
    samples.SampleConfig(organisation="window", history=3, max_realtime=0, window=3 * tiny.DAY),
]


def opened(folder, **options):
    return event_log.EventLog.open(tiny.log(folder / "log", **options))


@pytest.mark.parametrize("time_exact", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("span", event_log.SPANS)
def test_build_is_the_plain_reference(tmp_path, config, span, time_exact):
    options = dict(users=4, events=150, requests=70, time_exact=time_exact)
    log = opened(tmp_path, **options)
    _, files = tiny.columns(**options)
    got = samples.build(log, config, span)
    key = "time" if time_exact else "order"
    want = reference.build(files, **dataclasses.asdict(config), span=span, key=key)
    assert len(got) == len(want) == got.stats["samples"]
    for n, sample in enumerate(want):
        start, end = got.candidate_offsets[n : n + 2]
        assert got.impressions[start:end].tolist() == sample["candidates"]
        assert (got.user[n], got.time[n]) == (sample["user"], sample["time"])
        rows = list(range(got.event_start[n], got.event_end[n]))
        assert rows == sample["old"] + sample["new"]
        assert got.reference[n] - got.event_start[n] == len(sample["old"])
        for order, reads in zip(got.order[start:end], sample["reads"], strict=True):
            may_read = {row for row in rows if row - got.reference[n] < order}
            assert may_read == reads & set(rows)  # and of R, nothing that it may read is missing
            assert all(row < got.event_start[n] for row in reads - may_read)
    assert got.one_time == (config.organisation != "window")


def test_past_is_strictly_before_also_in_ties(tmp_path):
    log = opened(tmp_path, users=3, events=400, requests=200)
    rows = np.arange(log.rows("impressions"))
    cut = samples.past_events(log, rows)
    user, shown = log.column("impressions", "user"), log.column("impressions", "time")
    happened = log.column("events", "time")
    ties = 0
    for row in rows:
        low, high = log.event_start[user[row]], log.event_start[user[row] + 1]
        assert (happened[low : cut[row]] < shown[row]).all()
        assert (happened[cut[row] : high] >= shown[row]).all()
        ties += (happened[low:high] == shown[row]).sum()
    assert ties > 10


def test_past_in_chunks_is_past_at_once(tmp_path, monkeypatch):
    log = opened(tmp_path)
    rows = np.arange(log.rows("impressions"))
    want = samples.past_events(log, rows)
    monkeypatch.setattr(samples, "CHUNK", 7)
    np.testing.assert_array_equal(samples.past_events(log, rows), want)


def test_users_without_events_have_empty_histories(tmp_path):
    log = opened(tmp_path)
    got = samples.build(log, CONFIGS[1], "train")
    lonely = got.user == 1  # tiny's user 1 has impressions and no events
    assert lonely.any() and (got.event_counts[lonely] == 0).all()


def test_a_log_without_events(tmp_path):
    log = opened(tmp_path, events=0)
    for config in CONFIGS:
        got = samples.build(log, config, "train")
        assert len(got) and (got.event_counts == 0).all()


def test_newest_is_a_budget_in_impressions(tmp_path):
    log = opened(tmp_path)
    train = np.flatnonzero(log.column("impressions", "span") == 0)
    for config in CONFIGS:
        got = samples.build(log, config, "train", newest=20)
        np.testing.assert_array_equal(np.sort(got.impressions), train[-20:])
    with pytest.raises(ValueError, match=rf"newest=\d+, expected 1 .. {len(train)}"):
        samples.build(log, CONFIGS[0], "train", newest=len(train) + 1)


def test_splits_are_counted(tmp_path):
    log = opened(tmp_path)
    got = samples.build(log, CONFIGS[2], "train")
    whole = samples.build(log, dataclasses.replace(CONFIGS[2], max_candidates=32), "train")
    assert whole.stats["split"] == 0 and got.candidate_counts.max() == 2
    assert got.stats["split"] == len(got) - len(whole) > 0
    assert got.stats["impressions"] == whole.stats["impressions"]


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(organisation="session"), "organisation='session', expected one of"),
        (dict(history=-1), "history=-1, expected at least 0"),
        (dict(max_candidates=0), "max_candidates=0, expected at least 1"),
        (dict(window=0), "window=0, expected at least 1"),
    ],
)
def test_refused_configs(change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(CONFIGS[0], **change)


def test_unknown_span(tmp_path):
    with pytest.raises(ValueError, match="span='holdout', expected one of"):
        samples.build(opened(tmp_path), CONFIGS[0], "holdout")


@pytest.mark.parametrize("column", ["user", "time"])
def test_a_request_has_one_user_and_time(tmp_path, column):
    schema, files = tiny.columns()
    shown = files["impressions"]
    row = int(np.argmax(np.diff(shown["request"]) == 0)) + 1
    if column == "user":
        shown["user"][row] = shown["user"][row] % 7 + 1
    else:
        shown["time"][row:] += 1
    path = event_log.write_log(tmp_path / "log", schema, **files, fingerprint={})
    with pytest.raises(ValueError, match=f'"{column}": row {row} holds .* of the same request'):
        samples.build(event_log.EventLog.open(path), CONFIGS[1], "train")


def test_a_request_at_two_times_apart(tmp_path):
    schema, files = tiny.columns()
    shown = files["impressions"]
    train = np.flatnonzero(shown["span"] == 0)
    shown["request"][train[-1]] = shown["request"][0]
    shown["time"][train[-1] :] += 1
    path = event_log.write_log(tmp_path / "log", schema, **files, fingerprint={})
    with pytest.raises(ValueError, match=f"found request {shown['request'][0]} at "):
        samples.build(event_log.EventLog.open(path), CONFIGS[1], "train")


def test_an_order_against_time_is_refused(tmp_path):
    schema, files = tiny.columns(users=3, time_exact=False)
    files["impressions"]["order"] = (
        files["impressions"]["order"].max() - files["impressions"]["order"]
    )
    path = event_log.write_log(tmp_path / "log", schema, **files, fingerprint={})
    with pytest.raises(ValueError, match=r'"order": row \d+ holds \d+, expected at least'):
        samples.build(event_log.EventLog.open(path), CONFIGS[3], "train")


def test_derived_rules():
    day = 86_400
    time = np.array([0, 5 * 3600 + 59 * 60, 4 * day, 1_700_000_000])  # 14 November 2023, 22:13 UTC
    ask = lambda name, when, reference, birth=None: samples.DERIVED[name].rule(
        np.asarray(when), np.asarray(reference), np.asarray(birth)
    )
    np.testing.assert_array_equal(ask("hour", time, time), [1, 6, 1, 23])
    np.testing.assert_array_equal(ask("weekday", time, time), [4, 4, 1, 2])
    np.testing.assert_allclose(ask("item_age", [5 * day, 0], [0, 0], [day, day]), [np.log(5), 0])
    seconds = np.array([-50, 0, 1, 2, 3, 4, 1023, 1024, 2**31 - 1, 2**31, 2**40])
    want = [*map(reference.log_age, seconds[:-1]), 32]
    np.testing.assert_array_equal(ask("log_age", 100 - seconds, 100), want)


def test_derived_features_that_cannot_be(tmp_path):
    log = opened(tmp_path)
    change = lambda name, **fields: dataclasses.replace(
        log,
        schema=dataclasses.replace(
            log.schema,
            features=tuple(
                dataclasses.replace(f, **fields) if f.name == name else f
                for f in log.schema.features
            ),
        ),
    )
    samples.check_derived(log)
    with pytest.raises(ValueError, match="feature 'hour': found derive='minute', expected one of"):
        samples.check_derived(change("hour", derive="minute"))
    with pytest.raises(ValueError, match="'hour': found 8 rows in 'category', expected 25"):
        samples.check_derived(change("hour", table="category"))
    with pytest.raises(
        ValueError, match="'item_age': found side='context', kind='dense', expected"
    ):
        samples.check_derived(change("item_age", derive="log_age"))
    inexact = dataclasses.replace(log.schema, time_exact=False)
    with pytest.raises(ValueError, match="difference of times, in a log whose times"):
        samples.check_derived(dataclasses.replace(log, schema=inexact))
    items = {name: x for name, x in log.columns["items"].items() if name != "birth"}
    with pytest.raises(ValueError, match=r"found no column 'birth' in items.arrow"):
        samples.check_derived(dataclasses.replace(log, columns={**log.columns, "items": items}))
