"""Distributions of counts and of numbers: mean, deviation, quantiles, share of zeros.

A quantile q is the smallest value that at least a share q of all does not exceed (NumPy's
"inverted_cdf"), so that it is a value that occurs.
"""

from typing import Any

import numpy as np

from rankjax.data import tally

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
NAMES = tuple(f"p{round(100 * q)}" for q in QUANTILES)


def of_counts(histogram: np.ndarray) -> dict[str, Any]:
    """histogram: int64 [m], how often 0, 1, .. occur. Nones where nothing was counted."""
    total = int(histogram.sum())
    if not total:
        return _empty()
    value = np.arange(len(histogram))
    met = np.flatnonzero(histogram)
    # of q * total, rounded against float noise: .9 of 10 is 9, not the tenth
    wanted = np.ceil(np.round(np.array(QUANTILES) * total, 6))
    at = np.searchsorted(np.cumsum(histogram), wanted)
    mean = float((value * histogram).sum() / total)
    std = float(np.sqrt(((value - mean) ** 2 * histogram).sum() / total))
    return {
        "count": total,
        "mean": mean,
        "std": std,
        "zeros": int(histogram[0]) / total,
        "min": int(met[0]),
        **dict(zip(NAMES, at.tolist())),
        "max": int(met[-1]),
    }


def of_values(values: np.ndarray) -> dict[str, Any]:
    """values: float32 [n], finite; read in chunks, and copied once for the quantiles."""
    if not len(values):
        return _empty()
    n, parts = len(values), list(tally.chunks(len(values)))
    mean = sum(float(values[p].sum(dtype=np.float64)) for p in parts) / n
    square = sum(float(((values[p].astype(np.float64) - mean) ** 2).sum()) for p in parts)
    zeros = sum(int((values[p] == 0).sum()) for p in parts)
    at = np.quantile(values, [0, *QUANTILES, 1], method="inverted_cdf").tolist()
    return {
        "count": n,
        "mean": mean,
        "std": float(np.sqrt(square / n)),
        "zeros": zeros / n,
        **dict(zip(("min", *NAMES, "max"), at)),
    }


def _empty() -> dict[str, Any]:
    names = ("mean", "std", "zeros", "min", *NAMES, "max")
    return {"count": 0, **dict.fromkeys(names)}
