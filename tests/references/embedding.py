"""Tables of [rows, E] with dense gradients, in float64; imports neither rankjax nor jax."""

import numpy as np


def embed(table_ve, ids):
    """ids of any shape -> rows; id 0 -> zeros."""
    return np.where(ids[..., None] > 0, table_ve[ids], 0.0)


def mean_pool(table_ve, ids_m):
    """One multi-valued cell: the mean of the rows of the non-zero ids, zeros when there is none."""
    used = [i for i in ids_m if i]
    if not used:
        return np.zeros(table_ve.shape[1])
    return sum(table_ve[i] for i in used) / len(used)


def dense_gradient(table_ve, ids, g):
    """The gradient [rows, E] of sum(g * lookup) for one feature, cell by cell.

    ids [cells] with g [cells, E]; or ids [cells, M], mean-pooled. Id 0 gets none.
    """
    total = np.zeros_like(table_ve)
    for cell, g_e in zip(ids, g):
        used = [i for i in np.atleast_1d(cell) if i]
        for i in used:
            total[i] += g_e / len(used)
    return total


def rowwise_adagrad(table_ve, acc_v, g_ve, rate, eps):
    """Row by row: acc += mean(g^2); row -= rate g / (sqrt(acc) + eps)."""
    table_ve, acc_v = table_ve.copy(), acc_v.copy()
    for v in range(1, len(table_ve)):
        if g_ve[v].any():
            acc_v[v] += np.mean(g_ve[v] ** 2)
            table_ve[v] -= rate * g_ve[v] / (np.sqrt(acc_v[v]) + eps)
    return table_ve, acc_v
