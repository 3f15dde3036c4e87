"""A made-up results table with planted laws, as a study would write it; imports no rankjax."""

import json

import numpy as np
import polars

# architecture: {axis: gain in NE per doubling of training FLOPs}; the loss at 1e12 FLOPs.
LAWS = {
    "dlrm_mlp": (0.842, {"D": 0.0020}),
    "dcnv2_din": (0.834, {"D": 0.0024}),
    "rankmixer": (0.832, {"T": 0.0010, "L": 0.0016, "D": 0.0042}),
    "hstu": (0.818, {"S": 0.0046, "L": 0.0015, "D": 0.0024}),
}
DATA = 0.0060  # gain per doubling of the budget, every architecture
BASE = {"T": 8, "S": 32, "L": 2, "D": 32}
VALUES = {"T": (4, 8, 16, 32), "S": (16, 32, 64, 128), "L": (1, 2, 4, 8), "D": (16, 32, 64, 128)}
LOG2_FLOPS = {"T": 1.0, "S": 1.0, "L": 0.9, "D": 1.7}  # FLOPs of a doubled size, in doublings


def table(
    *, architectures=tuple(LAWS), seeds=(0, 1, 2), budgets=(250_000, 1_000_000), noise=0.0006,
    axes=None, oracle=0.6723, seed=0,
) -> polars.DataFrame:  # fmt: skip
    """Rows of results.parquet: final trials of every ladder, rate sweeps and table trials."""
    rng = np.random.default_rng(seed)
    rows = []

    def add(stage, name, axis, size, **other):
        row = trial(name, axis, size, rng=rng, noise=noise, oracle=oracle, **other)
        rows.append({"trial": f"{len(rows):04d}", "stage": stage, **row})

    for name in architectures:
        for axis in axes or LAWS[name][1]:
            for size in range(len(VALUES[axis])):
                for budget in budgets:
                    for s in seeds:
                        add("final", name, axis, size, budget=budget, run=s)
            for size in (0, len(VALUES[axis]) - 1):
                for rate in (1e-3, 3e-3, 9e-3):
                    add("sweep", name, axis, size, budget=max(budgets), run=0, rate=rate)
        for table_rate in (0.05, 0.1, 0.2):
            for std in (0.01, 0.05):
                first = next(iter(axes or LAWS[name][1]))
                more = {"table_rate": table_rate, "std": std, "budget": max(budgets), "run": 0}
                add("tables", name, first, 0, **more)
    return polars.DataFrame(rows, infer_schema_length=None)


def trial(
    name, axis, size, *, budget, run, rng, noise, oracle, rate=3e-3, table_rate=0.1, std=0.05
) -> dict:
    """One trial on its planted line; off the best rate it pays .01 a factor of three."""
    level, gains = LAWS[name]
    value = VALUES[axis][size]
    doublings = LOG2_FLOPS[axis] * np.log2(value / BASE[axis])
    sizes = {**{a: BASE[a] for a in BASE}, axis: value}
    first = "S" if name == "hstu" else "T"
    flops = 3e5 * 2**doublings * (2 if name == "hstu" else 1)
    ne = level - gains[axis] * doublings - DATA * np.log2(budget / 250_000)
    ne += 0.01 * abs(np.log(rate / 3e-3)) + 0.003 * abs(np.log2(table_rate / 0.1))
    ne += rng.normal() * noise
    auc = 0.80 - 0.6 * (ne - 0.82)
    out = {
        "chosen": rate == 3e-3, "architecture": name, "ladder": f"{name} {axis}", "axis": axis,
        "axis_value": value, "size": size, "seed": run, "budget": budget, "samples": budget,
        "steps": budget // 512, "batch": 512, "learning_rate": rate,
        "table_learning_rate": table_rate, "embedding_std": std,
        "dense_params": int(2e4 * 2**doublings), "embedding_params": 1_000_000,
        "tokens": None if name == "dlrm_mlp" else sizes[first], "layers": sizes["L"],
        "width": sizes["D"], "flops": flops * 1.2, "flops_valid": flops,
        "training_flops": flops * budget, "padding_share": 0.2, "paper_params": None,
        "paper_flops": None, "paper_scope": "blocks", "config": json.dumps(sizes),
        "oracle_ne": oracle, "alarm": None if oracle is None else False,
    }  # fmt: skip
    for span, shift in (("validation", 0.002), ("test", 0.0), ("progressive", 0.01)):
        out[f"{span}_ne"] = float(ne + shift)
        out[f"{span}_auc"] = float(auc - shift)
        out[f"{span}_request_auc"] = float(auc - shift - 0.1)
        out[f"{span}_log_loss"] = float(0.47 * (ne + shift))
    return out
