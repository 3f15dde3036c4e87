"""Interleaved rounds of timed calls, with PyTorch peers beside them.

One round runs every call a few times in turn; then, with `peers`, experiments/peers/torch_peers.py
does the same work in PyTorch in a process of its own; then comes the next round. A slow minute of
the machine so hits all alike.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import rankjax

PEERS = pathlib.Path(rankjax.__file__).parents[1] / "experiments" / "peers" / "torch_peers.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds:
    """How often everything is measured: `rounds` times `repeats`, each round warmed up."""

    rounds: int = 3
    repeats: int = 5
    warmup: int = 1
    peers: bool = False
    threads: int = 2  # of PyTorch

    def __post_init__(self) -> None:
        for name, low in (("rounds", 1), ("repeats", 1), ("warmup", 1), ("threads", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"bench.Rounds: {name}={getattr(self, name)}, expected >= {low}")


def figure(values: Sequence[float]) -> dict[str, float]:
    """{"min", "median", "max", "n"}; raises ValueError without values."""
    if not len(values):
        raise ValueError("bench.figure: found no values, expected at least one")
    found = np.asarray(values, np.float64)
    low, middle, high = (float(f(found)) for f in (np.min, np.median, np.max))
    return {"min": low, "median": middle, "max": high, "n": len(found)}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    affinity = getattr(os, "sched_getaffinity", None)
    names = ("jax", "jaxlib", "flax", "numpy", "grain", "torch")
    found = {name: importlib.util.find_spec(name) is not None for name in names}
    return {
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "devices": [str(d.device_kind) for d in jax.devices()],
        "versions": {name: importlib.metadata.version(name) for name in names if found[name]},
    }


def measure(
    jobs: dict[str, Callable[[], float]],
    peer_items: list[dict[str, Any]],
    config: Rounds,
    *,
    in_turn: bool = True,
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Runs jobs and peers in rounds.

    Args:
      jobs: {name: call}; a call does the work once and returns its seconds.
      peer_items: entries of torch_peers.py's WORK.json, without warmup and repeats.
      in_turn: the calls of a round take turns; False: each runs its repeats in a row, as the peers
        do, and finds its arrays in the caches, as theirs do.
    Returns: {name: seconds}, and the peers: {"skipped": reason} or {"torch", "threads", "results":
      {name: {"seconds": [...], ...}}}.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    peers: dict[str, Any] = {"skipped": "not asked for (peers=False)"}
    reason = peers_missing()
    if config.peers:
        peers = {"skipped": reason} if reason else {"results": {}}
    for _ in range(config.rounds):
        for group in [jobs] if in_turn else [{name: call} for name, call in jobs.items()]:
            for call in group.values():
                for _ in range(config.warmup):
                    call()
            for _ in range(config.repeats):
                for name, call in group.items():
                    seconds[name].append(call())
        if "results" in peers:
            _add_peers(peers, run_peers(peer_items, config))
    return seconds, peers


def peers_missing() -> str | None:
    """Why the PyTorch peers cannot run here; None where they can."""
    if not PEERS.exists():
        return f"{PEERS} is missing; peers run from a checkout of the repository"
    if importlib.util.find_spec("torch") is None:
        return "torch is missing; pip install 'rankjax[peers]'"
    return None


def run_peers(items: list[dict[str, Any]], config: Rounds) -> dict[str, Any]:
    """One round of torch_peers.py. Raises RuntimeError with its last words where it fails."""
    counts = {"warmup": config.warmup, "repeats": config.repeats}
    work = {"threads": config.threads, "items": [{**item, **counts} for item in items]}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = (pathlib.Path(folder) / name for name in ("work.json", "out.json"))
        asked.write_text(json.dumps(work))
        command = [sys.executable, str(PEERS), str(asked), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{PEERS}: exit status {done.returncode}: {done.stderr[-1000:]}")
        return json.loads(answer.read_text())


def _add_peers(total: dict[str, Any], found: dict[str, Any]) -> None:
    total |= {"torch": found["torch"], "threads": found["threads"]}
    for name, result in found["results"].items():
        if name in total["results"]:
            total["results"][name]["seconds"] += result["seconds"]
        else:
            total["results"][name] = result


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    """The call with a clock around it, until its arrays are there."""

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - began

    return run
