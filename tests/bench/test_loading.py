"""loading: the counts are the log's, and the peer gathers the same impressions."""

import pytest

from rankjax.bench import loading, rounds
from rankjax.data import event_log
from tests import tiny

ONCE = rounds.Rounds(rounds=1, repeats=2)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return event_log.EventLog.open(tiny.log(tmp_path_factory.mktemp("log") / "log"))


def test_everything_after_the_first_batch_is_counted(log):
    found = loading.run(log, ONCE, history=10, batch=12)
    train = log.column("impressions", "span") == 0
    requests = len(set(log.column("impressions", "request")[train].tolist()))
    assert found["samples"] == requests - found["batch_samples"]
    assert 0 < found["impressions"] < train.sum()
    for rates in found["rankjax"].values():
        assert rates["samples_per_second"]["n"] == 2
        assert rates["impressions_per_second"]["min"] > 0
    assert "skipped" in found["peers"]


def test_one_batch_is_refused(log):
    with pytest.raises(ValueError, match="expected more than one batch of"):
        loading.run(log, ONCE, batch=10**6)


@pytest.mark.slow
def test_peers_gather_the_same_impressions(log):
    pytest.importorskip("torch", reason="the PyTorch peers need torch: rankjax[peers]")
    found = loading.run(log, rounds.Rounds(rounds=1, repeats=1, peers=True), history=10, batch=12)
    names = {f"{v}_{w}_workers" for v in ("example", "batch") for w in (0, 2)}
    assert set(found["peers"]["results"]) == set(found["ours_over_peer"]) == names
    for result in found["peers"]["results"].values():
        ratio = result["impressions_per_second"]["median"] / result["samples_per_second"]["median"]
        assert ratio == pytest.approx(found["impressions"] / found["samples"])


def test_the_world_is_written_and_counted():
    found = loading.world(rounds.Rounds(rounds=2), 10_000)
    assert found["impressions"] >= 10_000
    assert found["impressions_per_second"]["n"] == 2
    assert found["impressions_per_second"]["min"] > 0
