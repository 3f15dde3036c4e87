"""attention_peers: a plain PyTorch version computes what we do, before it is timed."""

import numpy as np
import pytest

from rankjax.bench import attention_cases as cases
from rankjax.bench import attention_peers, kernels, rounds


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_saved_for_the_peer(bias):
    s = cases.shape("jagged", 24, 48, bias=bias, heads=2, width=4)
    forward, backward = attention_peers.items(s, cases.problem(s), compiled=False)
    assert forward["name"] == "torch/forward" and backward["part"] == "forward_backward"
    assert forward["options"] == {"n": 24} and forward["dtype"] == "float32"
    with np.load(forward["file"]) as saved:
        assert saved["a:allow"].sum() == s.pairs
        assert saved["out"].shape == saved["x:0"].shape == (2, 24, 2, 4)
        assert ("p:position" in saved.files) == ("a:bucket" in saved.files) == bias


def test_the_peer_agrees_and_is_timed():
    pytest.importorskip("torch", reason="PyTorch, the extra 'peers', is not installed")
    once = rounds.Rounds(rounds=1, repeats=2, peers=True)
    for bias in (False, True):
        s = cases.shape("jagged", 24, 48, bias=bias, heads=2, width=4)
        found = kernels.one(s, once, 1.0, compiled=False)
        entry = found["implementations"]["torch"]["forward_backward"]
        assert entry["seconds"]["n"] == 2 and entry["xla_seconds_over"] > 0
