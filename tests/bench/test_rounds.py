"""rounds: everything is interleaved, failures of peers are told, clocks wait for the arrays."""

import json

import jax.numpy as jnp
import pytest

from rankjax.bench import rounds


def test_figure():
    assert rounds.figure([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0, "n": 3}
    with pytest.raises(ValueError, match="found no values"):
        rounds.figure([])


def test_refused_counts():
    with pytest.raises(ValueError, match=r"repeats=0, expected >= 1"):
        rounds.Rounds(repeats=0)


def test_calls_are_interleaved_and_warmed_up(monkeypatch):
    said = []
    monkeypatch.setattr(rounds, "peers_missing", lambda: None)

    def run_peers(items, config):
        said.append("peers")
        results = {i["name"]: {"seconds": [2.0] * config.repeats} for i in items}
        return {"torch": "1", "threads": 2, "results": results}

    monkeypatch.setattr(rounds, "run_peers", run_peers)

    def job(name):
        return lambda: said.append(name) or float(len(said))

    config = rounds.Rounds(rounds=2, repeats=2, warmup=1, peers=True)
    seconds, peers = rounds.measure({"a": job("a"), "b": job("b")}, [{"name": "c"}], config)
    assert said == ["a", "b", "a", "b", "a", "b", "peers"] * 2
    assert seconds == {"a": [3.0, 5.0, 10.0, 12.0], "b": [4.0, 6.0, 11.0, 13.0]}
    assert peers == {"torch": "1", "threads": 2, "results": {"c": {"seconds": [2.0] * 4}}}


def test_in_a_row():
    said = []
    jobs = {name: lambda name=name: said.append(name) or 1.0 for name in "ab"}
    rounds.measure(jobs, [], rounds.Rounds(rounds=2, repeats=2, warmup=1), in_turn=False)
    assert said == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3


def test_peers_that_cannot_run_are_skipped_with_a_reason(monkeypatch, tmp_path):
    one = rounds.Rounds(rounds=1, repeats=1, peers=True)
    monkeypatch.setattr(rounds, "PEERS", tmp_path / "gone.py")
    _, peers = rounds.measure({"a": lambda: 1.0}, [], one)
    assert "gone.py is missing" in peers["skipped"]
    _, peers = rounds.measure({"a": lambda: 1.0}, [], rounds.Rounds(rounds=1, repeats=1))
    assert "not asked for" in peers["skipped"]


def test_missing_torch_says_what_to_install(monkeypatch):
    monkeypatch.setattr(rounds.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'rankjax[peers]'" in rounds.peers_missing()


def test_a_failing_peer_says_why(monkeypatch, tmp_path):
    script = tmp_path / "peers.py"
    script.write_text("raise SystemExit('no such thing')")
    monkeypatch.setattr(rounds, "PEERS", script)
    with pytest.raises(RuntimeError, match="exit status 1: no such thing"):
        rounds.run_peers([], rounds.Rounds())


def test_timed_and_machine():
    assert 0 < rounds.timed(lambda: jnp.ones(10) + 1)() < 60
    facts = json.loads(json.dumps(rounds.machine()))
    assert facts["cores"] >= 1 and {"jax", "jaxlib"} <= set(facts["versions"])
