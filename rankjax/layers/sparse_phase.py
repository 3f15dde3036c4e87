"""The network by which GRAB trains its embedding tables, one impression at a time, no sequence.

Source: GRAB (arXiv 2602.01865), the recipe of Sequence-Then-Sparse training in the authors' talk:
a gate over groups of embeddings (item, user, history summary), then an MLP. It is not served.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.batch import Features
from rankjax.layers import (
    feed_forward,
    history_pooling,
    initializers,
    inputs,
    sequence,
    task_heads,
)


def earlier_mean(features: Features, dtype: str) -> jax.Array:
    """Mean of each candidate's earlier events, [R, C, W]: all history features side by side.

    Only events of the candidate's sample with a time before its own count, so that samples whose
    candidates have several times are fine; 0 where there are none.
    """
    history_time, candidate_time = sequence.rule_times(features)
    reads_rcs = history_pooling.same_sample(features)
    reads_rcs &= history_time[:, None, :] < candidate_time[:, :, None]
    h_rsw = sequence.concat(features.history, [f.name for f in features.schema.history], dtype)
    # Padding is zeroed here, not only weighted by 0: 0 * NaN is NaN.
    h_rsw = jnp.where(features.history_mask[..., None], h_rsw, 0)
    count_rc1 = jnp.maximum(reads_rcs.sum(axis=-1, keepdims=True), 1).astype(dtype)
    return jnp.einsum("rcs,rsw->rcw", reads_rcs.astype(dtype), h_rsw) / count_rc1


class SparsePhase(nn.Module):
    """Inputs x of a candidate -> one sigmoid gate per group -> gated x -> ReLU, ReLU, K logits.

    The inputs are the user's and the candidate's features and the mean of the earlier events, by
    semantic group; the gate of each group is linear in all inputs.
    Called with Features; returns logits [R, C, K], float32.
    Parameters, float32: gate [w, g] and bias, the MLP's [w, X], [X, X] and biases, logits [X, K]
    and bias: w inputs in g groups.
    """

    tasks: int  # K
    hidden: int  # X
    kernel_init: str = "lecun"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Features) -> jax.Array:
        pooled = inputs.Input("history_mean", inputs.HISTORY, earlier_mean(features, self.dtype))
        groups = inputs.groups(inputs.collect(features, [pooled])).values()
        x_nw = [inputs.concat(group, self.dtype) for group in groups]
        init = initializers.kernel(self.kernel_init)
        gate = nn.Dense(len(x_nw), dtype=self.dtype, kernel_init=init, name="gate")
        gate_ng = nn.sigmoid(gate(jnp.concatenate(x_nw, axis=-1)))
        gated_nw = [x * gate_ng[..., g : g + 1] for g, x in enumerate(x_nw)]
        h_nx = feed_forward.MLP(
            (self.hidden, self.hidden), kernel_init=self.kernel_init, dtype=self.dtype, name="mlp"
        )(jnp.concatenate(gated_nw, axis=-1))
        return task_heads.Linear(self.tasks, self.kernel_init, name="heads")(h_nx)
