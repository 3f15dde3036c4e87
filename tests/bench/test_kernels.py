"""bench kernels: what is reported adds up, and what computes something else is not timed."""

import json

import numpy as np
import pytest
import tyro

from rankjax.bench import commands, kernels, loading, rounds
from rankjax.data import event_log
from rankjax.kernels.hstu_attention import tiles
from tests import tiny

ONCE = rounds.Rounds(rounds=1, repeats=1)


def test_a_run_reports_every_case_and_implementation():
    found = kernels.run(ONCE, lengths=(32,), width=8, heads=2, tokens=64)
    names = [f"N32/{layout}/{bias}" for layout in ("full", "jagged") for bias in ("plain", "bias")]
    assert sorted(found["cases"]) == sorted(names)
    assert found["checked"]["xla"] < 2e-5 and found["peak"]["tflops"] > 0
    full = found["cases"]["N32/full/plain"]
    assert full["pairs"] == 2 * 32 * 33 // 2 and full["rows"] == 2
    assert {"xla", "reference", "softmax/xla", "softmax/jax_nn"} == set(full["implementations"])
    assert set(found["cases"]["N32/full/bias"]["implementations"]) == {"xla", "reference"}
    for part, flops in (("forward", 4 * 8 * 2), ("forward_backward", 14 * 8 * 2)):
        entry = full["implementations"]["xla"][part]
        seconds = entry["seconds"]["median"]
        assert np.isclose(entry["tflops"], flops * full["pairs"] / seconds / 1e12)
        assert np.isclose(entry["percent_of_peak"], 100 * entry["tflops"] / found["peak"]["tflops"])
        assert entry["xla_seconds_over"] == 1 and entry["temporary_bytes"] > 0
        other = full["implementations"]["reference"][part]
        ratio = seconds / other["seconds"]["median"]
        assert np.isclose(other["xla_seconds_over"], ratio)  # above 1 the other is faster


def test_all_pairs_are_left_out_where_they_are_too_many(monkeypatch):
    monkeypatch.setattr(kernels, "NAIVE", 2 * 2 * 32 * 32 - 1)
    found = kernels.run(ONCE, lengths=(32,), width=8, heads=2, tokens=64)
    case = found["cases"]["N32/full/plain"]
    assert set(case["implementations"]) == {"xla", "softmax/xla"}
    assert case["skipped"]["reference"] == "arrays of 4096 elements, at most 4095"


def test_what_computes_something_else_is_not_timed(monkeypatch):
    real = kernels.cases.silu_attention

    def wrong(p, arrays, bias, *, implementation, tile=None):
        out = real(p, arrays, bias, implementation=implementation, tile=tile)
        return out * (1.001 if implementation == "xla" else 1)

    monkeypatch.setattr(kernels.cases, "silu_attention", wrong)
    with pytest.raises(RuntimeError, match=r"'xla' deviates from the reference by 1\.0.e-03"):
        kernels.check("float32", 8, 2)


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    real = kernels._softmax

    def wrong(p, arrays, bias, implementation):
        out = real(p, arrays, bias, implementation)
        return out * (1.001 if implementation == "jax_nn" else 1)

    monkeypatch.setattr(kernels, "_softmax", wrong)
    with pytest.raises(RuntimeError, match=r"'softmax/jax_nn' deviates .* by 1\.0.e-03"):
        kernels.check_softmax("float32", 8, 2)


def test_packing_counts_slots_and_tiles():
    lengths = np.array([300, 20, 30, 250, 40, 9])
    found = kernels.jagged({"ours": lengths}, ONCE, width=8, heads=1)["ours"]
    assert (found["users"], found["longest"], found["mean"]) == (6, 300, lengths.mean())
    padded, packed = found["padded"], found["packed"]
    assert padded["rows"] == 6 and padded["slots"] == 1800
    assert np.isclose(padded["padding_share"], 1 - 649 / 1800)
    assert packed["rows"] == 3 and packed["slots"] == 900  # 300; 250 + 40 + 9; 30 + 20
    assert np.isclose(found["slots_saved"], 0.5)
    block = tiles.best("xla", 8).forward.queries
    n = -(-lengths // block)
    assert padded["tiles"] == (n * (n + 1) // 2).sum()
    ratio = padded["seconds"]["median"] / packed["seconds"]["median"]
    assert np.isclose(found["padded_seconds_over_packed"], ratio)


def test_history_lengths_are_those_of_samples(tmp_path):
    log = event_log.EventLog.open(tiny.log(tmp_path / "log"))
    found = loading.history_lengths(log, 5, 4)
    assert found.shape == (5,) and found.min() >= 1 and found.max() <= 4
    with pytest.raises(ValueError, match="expected at least 1000000"):
        loading.history_lengths(log, 10**6, 4)


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "jagged", interrupt)
    out = tmp_path / "kernels.json"
    log = tiny.log(tmp_path / "log")
    arguments = ["kernels", "--lengths", "16", "--tokens", "16", "--width", "8", "--heads", "1"]
    arguments += ["--rounds", "1", "--repeats", "1", "--users", "3", "--log", str(log)]
    with pytest.raises(KeyboardInterrupt):
        tyro.extras.subcommand_cli_from_dict(
            commands.COMMANDS, args=[*arguments, "--json", "--out", str(out)]
        )
    found = json.loads(out.read_text())
    assert found["interrupted"] and set(found["kernels"]["cases"]) >= {"N16/full/bias"}
