"""The loader alone, and the synthetic world: samples and impressions per second."""

import pathlib
import tempfile
import time
from typing import Any

import numpy as np

from rankjax import schema
from rankjax.bench import rounds
from rankjax.data import event_log, loader, samples
from rankjax.data.sources import synthetic


def run(
    log: event_log.EventLog,
    config: rounds.Rounds,
    *,
    history: int = 50,
    batch: int = 512,
    steps: int = 80,
) -> dict[str, Any]:
    """Samples and valid impressions per second of the loader alone, in the small HSTU's shape.

    "gather" fills batches in the caller's thread, "stream" through Grain's. The clock starts when
    the first batch is there. Peers: a DataLoader over the same samples, "example" with a
    __getitem__ per sample and the default collate, "batch" with a vectorised gather per batch,
    each in the caller's process (0) and with 2 workers; they skip derived features.
    """
    shape = samples.SampleConfig(organisation="request", history=history)
    chosen = samples.build(log, shape, "train", _newest(log, steps * batch))
    size = loader.batch_samples_for(chosen, batch)
    batches = loader.Batches(log, chosen, batch_samples=size)
    counts = np.diff(chosen.candidate_offsets)[size:]
    if not len(counts):
        raise ValueError(
            f"bench loader: found {len(chosen)} samples in {log.folder}, expected more than one "
            f"batch of {size}"
        )

    def one_pass(threads: int) -> float:
        stream = loader.stream(batches, threads=threads)
        next(stream)
        began = time.perf_counter()
        for _ in stream:
            pass
        return time.perf_counter() - began

    jobs = {"gather": lambda: one_pass(0), "stream": lambda: one_pass(2)}
    with tempfile.TemporaryDirectory() as folder:
        pointers = pathlib.Path(folder) / "samples.npz"
        fields = ("user", "event_start", "event_end", "candidate_offsets", "impressions")
        np.savez(pointers, **{name: getattr(chosen, name) for name in fields})
        items = _loader_peers(log, chosen, pointers, batches)
        seconds, peers = rounds.measure(jobs, items, config)
    total = {"samples": len(counts), "impressions": int(counts.sum())}
    out = {
        **total,
        "batch_samples": size,
        "history": history,
        "rankjax": {name: _rates(total, s) for name, s in seconds.items()},
    }
    if "results" not in peers:
        return {**out, "peers": peers}
    rates = {n: _rates(r, r["seconds"]) for n, r in peers["results"].items()}
    median = lambda r: r["impressions_per_second"]["median"]
    ours = max(map(median, out["rankjax"].values()))
    ratios = {name: ours / median(r) for name, r in rates.items()}
    return {**out, "peers": {**peers, "results": rates}, "ours_over_peer": ratios}


def _rates(counts: dict[str, int], seconds: list[float]) -> dict[str, dict[str, float]]:
    return {
        f"{name}_per_second": rounds.figure([counts[name] / s for s in seconds])
        for name in ("samples", "impressions")
    }


def _newest(log: event_log.EventLog, impressions: int) -> int:
    """A budget of that many impressions, or of all in the train span."""
    return min(impressions, int(np.count_nonzero(log.column("impressions", "span") == 0)))


def _loader_peers(
    log: event_log.EventLog,
    chosen: samples.Samples,
    pointers: pathlib.Path,
    batches: loader.Batches,
) -> list[dict[str, Any]]:
    stored = lambda side: [f.name for f in log.schema.of(side) if not f.derive]
    work = {
        "kind": "loader",
        "log": str(log.folder.resolve()),
        "samples": str(pointers),
        "columns": {
            **{side: stored(side) for side in schema.SIDES},
            "label": [task.name for task in log.schema.tasks],
        },
        "history": int(chosen.event_counts.max(initial=1)),
        "candidates": int(chosen.candidate_counts.max(initial=1)),
        "batch": batches.batch_samples,
        "limit": len(chosen),
    }
    variants = [(variant, workers) for variant in ("example", "batch") for workers in (0, 2)]
    return [
        {**work, "name": f"{variant}_{workers}_workers", "variant": variant, "workers": workers}
        for variant, workers in variants
    ]


def history_lengths(log: event_log.EventLog, users: int, history: int) -> np.ndarray:
    """int64 [users]: events of so many samples, drawn from the training span; none is empty.

    Raises ValueError for a log with fewer samples that have a history.
    """
    shape = samples.SampleConfig(organisation="request", history=history)
    chosen = samples.build(log, shape, "train")
    lengths = np.minimum(chosen.reference - chosen.event_start, history)
    lengths = lengths[lengths > 0]
    if len(lengths) < users:
        raise ValueError(
            f"bench kernels: found {len(lengths)} samples with a history in {log.folder}, expected "
            f"at least {users}"
        )
    return np.random.default_rng(0).choice(lengths, users, replace=False).astype(np.int64)


def world(config: rounds.Rounds, impressions: int) -> dict[str, Any]:
    """Impressions per second of `synthetic.prepare`, written to disk, a worker a core."""
    made, speeds = synthetic.at_least(impressions), []
    for _ in range(config.rounds):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            log = synthetic.prepare(made, pathlib.Path(folder) / "world")
            seconds = time.perf_counter() - began
            found = event_log.EventLog.open(log).rows("impressions")
        speeds.append(found / seconds)
    return {"impressions": found, "impressions_per_second": rounds.figure(speeds)}
