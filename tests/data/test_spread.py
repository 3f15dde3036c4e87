import numpy as np
import pytest

from rankjax.data import event_log, spread


def test_counts_against_the_values_themselves():
    rng = np.random.default_rng(0)
    for n in (1, 7, 10, 1000):
        x = rng.geometric(0.1, n) - 1
        got = spread.of_counts(np.bincount(x))
        want = np.quantile(x, spread.QUANTILES, method="inverted_cdf")
        assert [got[name] for name in spread.NAMES] == want.tolist()
        assert got["mean"] == pytest.approx(x.mean()) and got["std"] == pytest.approx(x.std())
        assert (got["count"], got["min"], got["max"]) == (n, x.min(), x.max())
        assert got["zeros"] == np.mean(x == 0)


def test_values_against_numpy_whatever_the_chunk(monkeypatch):
    monkeypatch.setattr(event_log, "CHUNK", 13)
    x = np.random.default_rng(0).normal(1e4, 1, 1000).astype(np.float32)
    x[::4] = 0
    got = spread.of_values(x)
    assert got["mean"] == pytest.approx(x.astype(np.float64).mean(), rel=1e-12)
    assert got["std"] == pytest.approx(x.astype(np.float64).std(), rel=1e-12)
    assert got["zeros"] == 0.25 and got["min"] == 0 and got["max"] == float(x.max())
    ordered = np.sort(x)
    assert got["p25"] == 0 and got["p50"] == float(ordered[499]) and got["p1"] == 0
    assert got["p99"] == float(ordered[989])


def test_one_value_and_none():
    assert spread.of_values(np.float32([2.5]))["p1"] == 2.5
    assert spread.of_values(np.float32([2.5]))["std"] == 0
    for empty in (spread.of_values(np.float32([])), spread.of_counts(np.zeros(3, np.int64))):
        assert empty["count"] == 0
        assert {v for k, v in empty.items() if k != "count"} == {None}
    assert list(spread.of_counts(np.array([1]))) == list(spread.of_values(np.float32([1])))
    assert list(spread.of_counts(np.array([1]))) == list(empty)
