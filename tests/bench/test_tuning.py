"""tuning: candidates, the choice, and the file that it leaves."""

import dataclasses
import functools
import json

import jax
import pytest

from rankjax.bench import rounds, tuning
from rankjax.kernels.hstu_attention import tiles
from rankjax.kernels.hstu_attention.tiles import Tile, Tiles


def test_the_committed_table_is_laid_out_as_written():
    assert tuning.dumps(tiles.table()) == tiles.FILE.read_text()


def test_candidates_fit_their_device():
    for implementation, kernels in tuning.KERNELS.items():
        for kernel in kernels:
            found = tuning.candidates(implementation, kernel)
            assert len(set(found)) == len(found) > 5
            assert all(max(t[:2]) <= 4 * min(t[:2]) for t in found)
    tables = tuning.candidates("pallas_gpu", "d_tables")
    assert {t.stages for t in tables} == {1} and {t.warps for t in tables} == {4, 8}


def test_the_fastest_wins_if_by_more_than_noise(monkeypatch, tmp_path):
    """Seconds are made up: those of 32 x 64 are best for the forward pass, and nothing for dq."""
    seconds = {Tile(32, 64): 0.5, Tile(64, 64): 0.97}
    monkeypatch.setitem(tuning.SIDES, "xla", (32, 64))
    monkeypatch.setattr(tuning.kernels, "check", lambda *args: {})

    def measure(jobs, items, config):
        by_kernel = seconds if "forward" in asked else {Tile(64, 64): 0.97}
        return {tile: [by_kernel.get(tile, 1.0)] for tile in jobs}, {}

    asked = []
    real = tuning._kernel

    def kernel(implementation, name, *rest):
        asked[:] = [name]
        return real(implementation, name, *rest)

    monkeypatch.setattr(tuning, "_kernel", kernel)
    monkeypatch.setattr(tuning.rounds, "measure", measure)
    out = tmp_path / "tiles.json"
    found = tuning.run(
        rounds.Rounds(), lengths=(64,), widths=(8, 16), tokens=64, out=out, dtype="float32"
    )
    report = found["tuned"]["xla"]["8"]
    assert report["forward"]["after"][:2] == [32, 64]
    assert next(iter(report["forward"]["seconds_over"])) == "[32, 64, 4, 2]"
    assert report["d_queries"]["after"] == report["d_queries"]["before"]
    table = json.loads(out.read_text())
    kind = jax.devices()[0].device_kind
    default = table["xla"]["default"]
    assert list(table["xla"][kind]) == ["8", "16", *default]
    assert all(table["xla"][kind][width] == row for width, row in default.items())
    assert table["xla"][kind]["8"]["forward"] == [32, 64]
    assert table["pallas_gpu"] == tiles.table()["pallas_gpu"]  # other rows stay


def test_a_winner_must_win_again(monkeypatch):
    monkeypatch.setitem(tuning.SIDES, "xla", (32,))
    parts = []
    real = tuning.cases.programs
    spied = lambda p, attention, chosen: parts.append(chosen) or real(p, attention, chosen)
    monkeypatch.setattr(tuning.cases, "programs", spied)
    shapes = [tuning.cases.shape("full", 48, 48, True, width=8, heads=1)]
    best = Tiles.same((64, 64))
    for second, after in ((0.5, [32, 32]), (0.99, [64, 64])):
        seconds = iter((0.5, second))

        def measure(jobs, items, config, seconds=seconds):
            fast = next(seconds)
            return {t: [fast if t[:2] == (32, 32) else 1.0] for t in jobs}, {}

        monkeypatch.setattr(tuning.rounds, "measure", measure)
        for kernel in ("forward", "d_queries") if second == 0.99 else ("d_queries",):
            seconds = iter((0.5, second))
            monkeypatch.setattr(
                tuning.rounds, "measure", functools.partial(measure, seconds=seconds)
            )
            found = tuning._kernel("xla", kernel, best, shapes, rounds.Rounds(rounds=1))
            assert found["after"][:2] == after
            part = "forward" if kernel == "forward" else "forward_backward"
            assert parts and set(parts) == {(part,)}
            parts.clear()


def test_a_tile_that_does_not_run_is_skipped(monkeypatch):
    monkeypatch.setitem(tuning.SIDES, "xla", (16, 32))
    real = tuning.cases.silu_attention

    def attention(p, arrays, bias, *, implementation, tile):
        if tile.forward[:2] == (16, 32):
            raise NotImplementedError("no room")
        return real(p, arrays, bias, implementation=implementation, tile=tile)

    monkeypatch.setattr(tuning.cases, "silu_attention", attention)
    best = Tiles.same((32, 32))
    shapes = [tuning.cases.shape("full", 48, 48, True, width=8, heads=1)]
    found = tuning._kernel("xla", "forward", best, shapes, rounds.Rounds(rounds=1, repeats=1))
    assert found["skipped"] == {"[16, 32, 4, 2]": "no room"}
    assert "[32, 16, 4, 2]" in found["seconds_over"]
    monkeypatch.setattr(tuning.cases, "silu_attention", attention)
    best = dataclasses.replace(best, forward=Tile(16, 32))
    with pytest.raises(NotImplementedError, match="no room"):  # what is in use must run
        tuning._kernel("xla", "forward", best, shapes, rounds.Rounds(rounds=1, repeats=1))
