import numpy as np
import pytest

from rankjax.data import counting, event_log
from tests import tiny


def sources(rng, n, *, labels=1):
    return counting.Sources(
        time=np.sort(rng.integers(0, 40, n)),
        user=rng.integers(1, 5, n, dtype=np.int32),
        item=rng.integers(0, 6, n, dtype=np.int32),
        labels=tuple(rng.integers(0, 2, n, dtype=np.int8) for _ in range(labels)),
    )


def pair(user, item):
    """Keys as far apart as keys may be, so that they fill 62 bits; item 0 has none."""
    return np.where(item > 0, user.astype(np.int64) * 2**59 + item, 0)


def answers(key, counted, user, item, bounds):
    """{row: {name: (rows, clicks)}}, from what `before` yields."""
    found = {}
    for rows, before in counting.before(key, counted, user, item, bounds):
        for at, row in enumerate(rows.tolist()):
            assert row not in found
            found[row] = {n: (int(b.rows[at]), int(b.clicks[at])) for n, b in before.items()}
    return found


@pytest.mark.parametrize("labels", [0, 1, 2])
@pytest.mark.parametrize(("partition", "chunk"), [(10**6, 10**6), (9, 5), (1, 1)])
def test_before_counts_the_rows_above_the_bound(monkeypatch, labels, partition, chunk):
    monkeypatch.setattr(counting, "PARTITION", partition)
    monkeypatch.setattr(event_log, "CHUNK", chunk)
    rng = np.random.default_rng(labels)
    n, N = 60, 25
    counted = sources(rng, n, labels=labels)
    user, item = rng.integers(1, 7, N, dtype=np.int32), rng.integers(0, 7, N, dtype=np.int32)
    bounds = {7: rng.integers(0, n + 1, N), 0: np.full(N, n)}
    found = answers(pair, counted, user, item, bounds)
    for row in range(N):
        same = [
            at
            for at in range(n)
            if item[row] and (counted.user[at], counted.item[at]) == (user[row], item[row])
        ]
        assert (row in found) == bool(same)
        for name, above in bounds.items() if same else ():
            rows = [at for at in same if at < above[row]]
            clicks = [at for at in rows if all(label[at] for label in counted.labels)]
            assert found[row][name] == (len(rows), len(clicks))
    assert found and any(x[7] != x[0] for x in found.values())


def test_partitions_split_the_keys_of_pairs_evenly(monkeypatch):
    monkeypatch.setattr(counting, "PARTITION", 500)
    rng = np.random.default_rng(0)
    user = rng.integers(1, 1000, 4000, dtype=np.int32)
    item = np.full(4000, 3, np.int32)  # user * 8 + 3: all alike modulo 8
    key = lambda user, item: user.astype(np.int64) * 8 + item
    sizes = [len(counting._part(key, user, item, part, 8)[2]) for part in range(8)]
    assert sum(sizes) == 4000 and max(sizes) < 1000


def test_bound_is_the_first_row_not_before(tmp_path, monkeypatch):
    monkeypatch.setattr(event_log, "CHUNK", 2)
    times = np.array([3, 5, 5, 9])
    found = counting.bound(times, np.array([3, 5, 6, 9, 100]), 0, tmp_path / "a")
    assert found.tolist() == [0, 1, 3, 3, 4]
    found = counting.bound(times, np.array([3, 5, 6, 9, 100]), 2, tmp_path / "b")
    assert found.tolist() == [0, 0, 1, 3, 4]


def test_clicks_above(tmp_path, monkeypatch):
    monkeypatch.setattr(event_log, "CHUNK", 2)
    rows = np.arange(5)
    click, like = (np.array(x, np.int8) for x in ([1, 0, 1, 1, 1], [1, 1, 1, 0, 1]))
    for labels, want in (
        ((click,), [0, 1, 1, 2, 3, 4]),
        ((like, click), [0, 1, 1, 2, 2, 3]),
        ((), [0, 1, 2, 3, 4, 5]),
    ):
        counted = counting.Sources(time=rows, user=rows, item=rows, labels=labels)
        path = tmp_path / str(len(labels))
        assert counting.clicks_above(counted, path).tolist() == want


def test_a_mapped_column_is_zeros_on_disk(tmp_path):
    x = counting.mapped(tmp_path / "x", 3, np.float32)
    assert x.tolist() == [0, 0, 0] and x.dtype == np.float32
    x[1] = 2
    x.flush()
    assert np.fromfile(tmp_path / "x", np.float32).tolist() == [0, 2, 0]
    assert len(counting.mapped(tmp_path / "none", 0, np.int64)) == 0


def opened(folder, change=lambda files: None):
    found, files = tiny.columns()
    change(files)
    folder = event_log.write_log(folder / "log", found, **files, fingerprint={})
    return event_log.EventLog.open(folder), files


def test_events_in_order_of_time(tmp_path, monkeypatch):
    monkeypatch.setattr(event_log, "CHUNK", 7)
    log, files = opened(tmp_path)
    found = counting.in_order_of_time(log, tmp_path)
    events = files["events"]
    order = sorted(range(len(events["time"])), key=lambda row: events["time"][row])
    for name in ("time", "user", "item"):
        assert getattr(found, name).tolist() == [events[name][row] for row in order]
    assert found.clicks(slice(2, 5)).tolist() == [True] * 3


@pytest.mark.parametrize("seen_in", [None, ("events",), ("events", "impressions")])
def test_item_ages(tmp_path, monkeypatch, seen_in):
    monkeypatch.setattr(event_log, "CHUNK", 7)

    def change(files):
        files["impressions"]["item"][::5] = 0
        files["events"]["item"][::3] = 0
        if seen_in:
            del files["items"]["birth"]
        else:
            files["items"]["birth"][1:] += 3 * tiny.DAY  # so that many come after their impressions

    log, files = opened(tmp_path, change)
    got = np.concatenate(list(counting.item_ages(log, seen_in or ())))
    shown = files["impressions"]
    ages = []
    for item, time in zip(shown["item"], shown["time"], strict=True):
        past = [
            t
            for file in seen_in or ()
            for i, t in zip(files[file]["item"], files[file]["time"], strict=True)
            if i == item and t < time
        ]
        if not seen_in:
            past = [t for t in [files["items"]["birth"][item]] if t <= time]
        ages.append(np.log10(1 + (time - min(past)) / 3600) if past and item else 0.0)
    np.testing.assert_allclose(got, ages, rtol=1e-12)
    assert 0 < np.count_nonzero(got) < np.count_nonzero(shown["item"])


def test_user_pasts(tmp_path, monkeypatch):
    monkeypatch.setattr(event_log, "CHUNK", 7)
    log, files = opened(tmp_path)
    events, idle = (np.concatenate(x) for x in zip(*counting.user_pasts(log), strict=True))
    shown, happened = files["impressions"], files["events"]
    for row, (user, time) in enumerate(zip(shown["user"], shown["time"], strict=True)):
        past = happened["time"][(happened["user"] == user) & (happened["time"] < time)]
        assert events[row] == len(past)
        hours = (time - past.max()) / 3600 if len(past) else 0
        assert idle[row] == pytest.approx(np.log10(1 + hours), rel=1e-12)
    assert 0 < np.count_nonzero(events) < len(events)
