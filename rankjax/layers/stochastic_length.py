"""Stochastic length: long histories are learned from by random subsequences.

Source: "Actions Speak Louder than Words" (arXiv 2402.17152), its Stochastic Length; the weights
are those of the variant that it found best.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from rankjax.batch import Features
from rankjax.layers import sequence


def check(where: str, alpha: float | None) -> None:
    """Raises ValueError unless alpha is None (off) or 1 < alpha <= 2."""
    if alpha is not None and not 1 < alpha <= 2:
        raise ValueError(f"{where}: stochastic_length={alpha}, expected None or 1 < alpha <= 2")


def kept(alpha: float, longest: int) -> int:
    """floor(N_c^(alpha / 2)): how many of a long history's events a subsequence has."""
    return math.floor(longest ** (alpha / 2) + 1e-9)  # 100^(2 / 2) is 100, whatever the rounding


def subsample(features: Features, key: jax.Array, *, alpha: float, longest: int) -> Features:
    """The features with, in each sample on its own, a random part of its past events.

    A sample of n events before its first candidate keeps all of them with probability
    min(1, N_c^alpha / n^2), so always where n <= N_c^(alpha / 2); else it keeps `kept` of them,
    drawn without replacement with weights 1 - f_i / sum_j f_j, where f_i is the time from event i
    to the newest of them (in events where times are not exact). Their order stays. Events at or
    after the first candidate all stay, and what is kept does not depend on them, so that windows
    stay legal.

    Dropped events become padding: positions, counts and normalisers are those of the kept ones.
    Shapes are static, so masking alone saves no compute: the subsequence is as long as the history
    in memory and in FLOPs. What remains of the paper's device is the regularisation.

    Args:
      key: a random key, of a training step.
      alpha: 1 < alpha <= 2; attention would cost O(N_c^alpha d).
      longest: N_c, the longest history, in events.
    """
    sample_rs, key_length, key_choice = features.history_sample, *jax.random.split(key)
    early_rs = (sample_rs >= 0) & (features.history_order < 0)
    mates_rss = (sample_rs[:, :, None] == sample_rs[:, None, :]) & early_rs[:, None, :]

    count_rs = jnp.maximum(jnp.sum(mates_rss, axis=-1), 1).astype(jnp.float32)
    coin_rs = jax.random.uniform(key_length, sample_rs.shape)
    # A sample's coin lies in the slot of its own number, whichever slots its events lie in.
    coin_rs = jnp.take_along_axis(coin_rs, jnp.maximum(sample_rs, 0), axis=1, mode="clip")
    whole_rs = coin_rs < float(longest) ** alpha / count_rs**2

    score_rs = _log_weights(features, early_rs, mates_rss)
    score_rs += jax.random.gumbel(key_choice, sample_rs.shape)  # top-k of it = without replacement
    better_rss = score_rs[:, None, :] > score_rs[:, :, None]
    slot_s = jnp.arange(sample_rs.shape[1])
    # A weight may be 0; of equal scores the newer event goes first.
    better_rss |= (score_rs[:, None, :] == score_rs[:, :, None]) & (slot_s > slot_s[:, None])
    chosen_rs = jnp.sum(mates_rss & better_rss, axis=-1) < kept(alpha, longest)
    dropped_rs = early_rs & ~(whole_rs | chosen_rs)
    return dataclasses.replace(features, history_sample=jnp.where(dropped_rs, -1, sample_rs))


def _log_weights(features: Features, early_rs: jax.Array, mates_rss: jax.Array) -> jax.Array:
    """log(1 - f_i / sum_j f_j), float32 [R, S]; 0 where all events have one time."""
    time_rs, _ = sequence.rule_times(features)
    least = jnp.iinfo(jnp.int32).min
    newest_rs = jnp.max(jnp.where(mates_rss, time_rs[:, None, :], least), axis=-1)
    age_rs = jnp.where(early_rs, newest_rs - time_rs, 0).astype(jnp.float32)
    total_rs = jnp.sum(jnp.where(mates_rss, age_rs[:, None, :], 0), axis=-1)
    share_rs = age_rs / jnp.where(total_rs > 0, total_rs, 1)
    return jnp.log(jnp.maximum(1 - share_rs, 0))
