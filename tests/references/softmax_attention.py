"""Softmax attention and its gradients in float64 NumPy, row by row; the mask is an array."""

import numpy as np


def attention(q_nhq, k_mhq, v_mhv, allow_nm, scale, scores_hnm):
    """out [N, H, V] of one row; a query that may read nothing gives zeros."""
    out_nhv = np.zeros((*q_nhq.shape[:2], v_mhv.shape[-1]))
    for n, h, weights_m in _weights(q_nhq, k_mhq, allow_nm, scale, scores_hnm):
        out_nhv[n, h] = weights_m @ v_mhv[:, h]
    return out_nhv


def gradients(d_nhv, q_nhq, k_mhq, v_mhv, allow_nm, scale, scores_hnm):
    """Gradients of sum(d * out) with respect to q, k, v and the scores."""
    dq, dk, dv, ds = map(np.zeros_like, (q_nhq, k_mhq, v_mhv, scores_hnm))
    for n, h, w_m in _weights(q_nhq, k_mhq, allow_nm, scale, scores_hnm):
        dv[:, h] += np.outer(w_m, d_nhv[n, h])
        reward_m = v_mhv[:, h] @ d_nhv[n, h]
        slope_m = scale * w_m * (reward_m - w_m @ reward_m)
        dq[n, h] += slope_m @ k_mhq[:, h]
        dk[:, h] += np.outer(slope_m, q_nhq[n, h])
        ds[h, n] += slope_m
    return dq, dk, dv, ds


def _weights(q_nhq, k_mhq, allow_nm, scale, scores_hnm):
    for n in range(q_nhq.shape[0]):
        allowed = np.flatnonzero(allow_nm[n])
        for h in range(q_nhq.shape[1]):
            weights_m = np.zeros(len(k_mhq))
            if len(allowed):
                logits = scale * (k_mhq[allowed, h] @ q_nhq[n, h] + scores_hnm[h, n, allowed])
                weights = np.exp(logits - logits.max())
                weights_m[allowed] = weights / weights.sum()
            yield n, h, weights_m
