"""blocks: peers compute what ours compute, or end the run; ratios; the ways of per-token layers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tyro

from rankjax import models
from rankjax.bench import block_cases, blocks, commands, rounds
from rankjax.scaling import presets
from tests.bench.test_block_inputs import TINY

ONCE = rounds.Rounds(rounds=1, repeats=1)
SIZES = {"tiny": TINY}


def needs_torch():
    pytest.importorskip("torch", reason="the PyTorch peers need torch: rankjax[peers]")


def saved(name: str, folder) -> tuple[block_cases.Case, list[dict]]:
    """The case, and the peer's items of what was saved of it."""
    case = block_cases.BLOCKS[name](TINY)
    file = folder / f"{name}.npz"
    blocks.save(case, blocks.functions(case)["forward_backward"], file)
    return case, blocks.peer_items(name, case, file)


@pytest.mark.slow
def test_every_peer_computes_the_same(tmp_path):
    needs_torch()
    items = [item for name in block_cases.BLOCKS for item in saved(name, tmp_path)[1]]
    found = rounds.run_peers(items, ONCE)["results"]
    assert len(found) == 2 * len(block_cases.BLOCKS)
    assert all(0 <= x["max_deviation"] < 1e-5 for x in found.values())


@pytest.mark.parametrize("leaf", ["out", "p:dense_0/bias", "norm:p:dense_1/kernel"])
def test_another_value_is_refused(leaf, tmp_path):
    needs_torch()
    _, items = saved("dlrm_mlp", tmp_path)
    with np.load(items[0]["file"]) as file:
        values = {name: file[name] for name in file.files}
    values[leaf] = values[leaf] + np.float32(0.01)
    np.savez(items[0]["file"], **values)
    with pytest.raises(RuntimeError, match=r"block dlrm_mlp/forward: differs .* not timed"):
        rounds.run_peers(items, ONCE)


def test_gradients_are_those_of_the_weighted_sum():
    case = block_cases.BLOCKS["din"](TINY)
    cotangent = blocks._cotangent(case)
    out, gradients = blocks.functions(case)["forward_backward"]()
    want = jax.grad(lambda x: (case.apply(*x, case.given) * cotangent).sum())(
        (case.params, case.floats)
    )
    np.testing.assert_allclose(out, case.apply(case.params, case.floats, case.given), atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, want)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"blocks=\['gpt'\], expected some of \['autoint', "):
        blocks.run(ONCE, blocks=("gpt", "hstu"), sizes=SIZES)


def test_ratio_is_of_rounds():
    """The second round was slow for both: it has the same ratio as the others."""
    assert blocks.ratio([2, 2, 20, 20, 4, 4], [1, 1, 10, 10, 2, 2], repeats=2) == 2
    assert blocks.ratio([1, 9, 3, 1, 1, 1], [1, 1, 1, 1, 1, 1], repeats=3) == 2


def test_run_without_peers():
    found = blocks.run(dataclasses.replace(ONCE, repeats=2), blocks=("dcnv2_din",), sizes=SIZES)
    (block,) = found["blocks"].values()
    assert set(found["blocks"]) == {"dcnv2_din/tiny"} and set(block) == {"ours"}
    assert {part: x["n"] for part, x in block["ours"].items()} == {p: 2 for p in blocks.PARTS}
    assert "skipped" in found["peers"]


def test_peer_torch_on_the_command_line(capsys):
    needs_torch()
    words = "models --peer torch --names din --sizes tiny --rounds 1 --repeats 1 --json"
    tyro.extras.subcommand_cli_from_dict(commands.COMMANDS, args=words.split())
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"machine", "blocks", "peers"} and found["peers"]["torch"]
    block = found["blocks"]["din/tiny"]
    assert set(block) == {"ours", "peer", "peer_seconds_over_ours", "max_deviation"}
    for part in blocks.PARTS:
        ours, peer = (block[x][part]["median"] for x in ("ours", "peer"))
        assert block["peer_seconds_over_ours"][part] == pytest.approx(peer / ours)
    assert block["max_deviation"] < 1e-5


def test_all_of_it_on_the_command_line(monkeypatch):
    """Without names pruning and the per-token ways are measured too."""
    asked = []
    for part in ("pruned", "feed_forwards"):
        monkeypatch.setattr(blocks, part, lambda *a, part=part: asked.append(part) or {})
    monkeypatch.setattr(blocks, "run", lambda *a, **k: {"blocks": {}})
    found = commands.measure_models(config=ONCE, json=True)
    assert asked == ["pruned", "feed_forwards"] and {"pruned", "per_token"} < set(found)


@pytest.mark.slow
def test_pruned():
    found = blocks.pruned(ONCE, SIZES)
    sequence = {n for n in models.MODELS if "S" in presets.config_type(n).axes}
    assert set(found) == {f"{name}/tiny" for name in sequence | {"hiformer"}}
    for model in found.values():
        full, short = (model[kind]["forward"]["median"] for kind in ("full", "pruned"))
        assert model["full_seconds_over_pruned"]["forward"] == pytest.approx(full / short)


def test_all_ways_compute_the_same():
    cases = blocks.ways(3, 2, 4)
    outs = {way: case.apply(case.params, case.floats, None) for way, case in cases.items()}
    outs["einsum"] = outs["einsum"].swapaxes(0, 1)
    for out in outs.values():
        np.testing.assert_allclose(out, outs["token_major"], atol=1e-5)


def test_feed_forwards_counts_flops():
    found = blocks.feed_forwards(ONCE, {"tiny": (3, 2, 4)})["tiny"]
    assert found["shape"] == [3, 2, 4]
    assert set(found) == {"shape", "einsum", "scan", "map", "token_major"}
    assert 0 < found["scan"]["forward"]["median"] < 1
