"""SiLU attention, its mask and its bias in float64 NumPy, pair by pair as the HSTU paper prints it.

A token is a dict of integers: segment, role, time, position, group, bias_time.
"""

import math

import numpy as np

PAD, CONTEXT, HISTORY, CANDIDATE = 0, 1, 2, 3


def allow(q, k):
    """May query q read key k? Causal context prefix, causal history, isolated candidates."""
    if q["role"] == PAD or k["role"] == PAD or q["segment"] != k["segment"]:
        return False
    if k["role"] == CONTEXT:
        return q["role"] != CONTEXT or k["position"] <= q["position"]
    if k["role"] == HISTORY:
        if q["role"] == HISTORY:
            return k["position"] <= q["position"]
        return q["role"] == CANDIDATE and k["time"] < q["time"]
    return q["role"] == CANDIDATE and q["group"] == k["group"]


def bucket(seconds):
    return min(max(math.floor(math.log(max(1, abs(int(seconds)))) / 0.301), 0), 128)


def time_bucket(q, k):
    if CONTEXT in (q["role"], k["role"]):
        return 0
    return bucket(q["bias_time"] - k["bias_time"])


def position_index(q, k, rows):
    return min(max(int(k["position"]) - int(q["position"]) + rows // 2, 0), rows - 1)


def silu(x):
    return x / (1 + np.exp(-x))


def silu_slope(x):
    s = 1 / (1 + np.exp(-x))
    return s * (1 + x * (1 - s))


def attention(q_nhq, k_mhq, v_mhv, q_tokens, k_tokens, normalizer_n, scale, position, time):
    """out [N, H, V] of one row; position and time are the bias tables or None."""
    out_nhv = np.zeros((*q_nhq.shape[:2], v_mhv.shape[-1]))
    for i, j, h in _pairs(q_nhq, q_tokens, k_tokens):
        s = _score(q_nhq[i, h], k_mhq[j, h], q_tokens[i], k_tokens[j], scale, position, time)
        out_nhv[i, h] += silu(s) * v_mhv[j, h] / normalizer_n[i]
    return out_nhv


def gradients(d_nhv, q_nhq, k_mhq, v_mhv, q_tokens, k_tokens, normalizer_n, scale, position, time):
    """Gradients of sum(d * out) with respect to q, k, v, position, time (zeros where None)."""
    dq, dk, dv = np.zeros_like(q_nhq), np.zeros_like(k_mhq), np.zeros_like(v_mhv)
    dp = None if position is None else np.zeros_like(position)
    dt = None if time is None else np.zeros_like(time)
    for i, j, h in _pairs(q_nhq, q_tokens, k_tokens):
        q, k = q_tokens[i], k_tokens[j]
        s = _score(q_nhq[i, h], k_mhq[j, h], q, k, scale, position, time)
        d = d_nhv[i, h] / normalizer_n[i]
        dv[j, h] += silu(s) * d
        ds = silu_slope(s) * (d @ v_mhv[j, h])
        dq[i, h] += scale * ds * k_mhq[j, h]
        dk[j, h] += scale * ds * q_nhq[i, h]
        if dp is not None:
            dp[position_index(q, k, len(dp))] += ds
        if dt is not None:
            dt[time_bucket(q, k)] += ds
    return dq, dk, dv, dp, dt


def _pairs(q_nhq, q_tokens, k_tokens):
    for i, q in enumerate(q_tokens):
        for j, k in enumerate(k_tokens):
            if allow(q, k):
                for h in range(q_nhq.shape[1]):
                    yield i, j, h


def _score(q, k, q_token, k_token, scale, position, time):
    score = scale * (q @ k)
    if position is not None:
        score += position[position_index(q_token, k_token, len(position))]
    if time is not None:
        score += time[time_bucket(q_token, k_token)]
    return score
