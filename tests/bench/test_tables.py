"""tables: every table size gets the same work, and the step updates the table."""

import numpy as np
import pytest

from rankjax.bench import rounds, tables

ONCE = rounds.Rounds(rounds=1, repeats=1)


@pytest.mark.parametrize("distribution", tables.DISTRIBUTIONS)
def test_ids_ask_for_the_same_work_at_every_size(distribution):
    small, large = (tables.table_ids(n, distribution, 999) for n in (1000, 100_000))
    assert small.shape == large.shape == tables.IDS and small.dtype == np.int32
    assert small.min() >= 1 and small.max() < 1000 and large.max() < 100_000
    assert large.max() > 90_000, "spread over the whole table"
    same = np.unique(small, return_inverse=True)[1], np.unique(large, return_inverse=True)[1]
    np.testing.assert_array_equal(*same)


def test_zipf_repeats_more_than_uniform():
    distinct = [len(np.unique(tables.table_ids(10**5, d, 10**5 - 1))) for d in ("zipf", "uniform")]
    assert distinct[0] < 0.7 * distinct[1]


def test_run(monkeypatch):
    monkeypatch.setattr(tables, "IDS", (64, 5))
    found = tables.run(ONCE, rows=(1000, 5000), width=4)
    for distribution in tables.DISTRIBUTIONS:
        assert set(found[distribution]["seconds"]) == {"1000", "5000"}
        assert found[distribution]["flatness"] >= 1
        assert 0 < found[distribution]["distinct_ids"] <= 320
    assert "skipped" in found["peers"]


@pytest.mark.slow
def test_peers(monkeypatch):
    pytest.importorskip("torch", reason="the PyTorch peers need torch: rankjax[peers]")
    monkeypatch.setattr(tables, "IDS", (64, 5))
    config = rounds.Rounds(rounds=2, repeats=1, peers=True)
    found = tables.run(config, rows=(1000, 5000), width=4)
    assert len(found["peer_seconds_over_ours"]) == 2 * 2 * 2
    assert found["peers"]["results"]["zipf/5000/adam"]["n"] == 2
