"""Compress the history to one vector per candidate: masked mean, or DIN's target attention.

An event's vector h is the concatenation of the features of its item and of the event itself
(action, age); a candidate's vector c is the concatenation of the same item features, in the same
order. Candidates read the events of their own sample only; padding is never read.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax.batch import Features
from rankjax.layers import activations, checks, initializers
from rankjax.layers.inputs import HISTORY, Input

POOLINGS = ("mean", "target")
ACTIVATIONS = ("sigmoid", "dice")


def check(where: str, pooling: object, hidden: object, activation: str) -> None:
    """Raises ValueError for an unknown pooling, a repeated one, or a bad attention network."""
    if not isinstance(pooling, tuple) or not pooling or len(set(pooling)) < len(pooling):
        raise ValueError(
            f"{where}: pooling={pooling!r}, expected a tuple of different names of {POOLINGS}"
        )
    for name in pooling:
        checks.one_of(where, "pooling", name, POOLINGS)
    if not isinstance(hidden, tuple) or not hidden:
        raise ValueError(
            f"{where}: attention_hidden={hidden!r}, expected a tuple of one or more widths"
        )
    for i, width in enumerate(hidden):
        checks.at_least(where, 1, **{f"attention_hidden[{i}]": width})
    checks.one_of(where, "attention_activation", activation, ACTIVATIONS)


def same_sample(features: Features) -> jax.Array:
    """Boolean [R, C, S]: the event is no padding and belongs to the candidate's sample."""
    h_rs, c_rc = features.history_sample, features.candidate_sample
    return (c_rc[:, :, None] == h_rs[:, None, :]) & (h_rs >= 0)[:, None, :]


def mean(features: Features, h_rsw: jax.Array) -> jax.Array:
    """Mean over the events of each candidate's sample: [R, S, W] -> [R, C, W], 0 without events.

    Pooled once per sample, not once per candidate, where a user feature tells their number.
    """
    sample_rs, sample_rc = features.history_sample, features.candidate_sample
    G = next((x.shape[1] for x in features.user.values()), None)
    if G is None:
        reads_rgs = same_sample(features)
    else:
        reads_rgs = sample_rs[:, None, :] == jnp.arange(G)[:, None]
    # Counts and sums in float32: bfloat16 holds no 257.
    wide = jnp.promote_types(h_rsw.dtype, jnp.float32)
    count_rg1 = jnp.maximum(reads_rgs.sum(axis=-1, keepdims=True), 1).astype(wide)
    x_rgw = jnp.einsum("rgs,rsw->rgw", reads_rgs.astype(wide), h_rsw.astype(wide)) / count_rg1
    x_rgw = x_rgw.astype(h_rsw.dtype)
    if G is None:
        return x_rgw
    if G == 1:
        return jnp.broadcast_to(x_rgw, (*sample_rc.shape, x_rgw.shape[-1]))
    return jnp.take_along_axis(x_rgw, jnp.maximum(sample_rc, 0)[..., None], axis=1)


class TargetAttention(nn.Module):
    """DIN: sum over events of a(h, c) h, with a an MLP on [h, c, h - c, h * c], not normalised.

    The first layer is computed without forming its input for every (event, candidate) pair:
      W_h h + W_c c + W_d (h - c) + W_p (h * c)
        = (W_h + W_d + diag(c) W_p) h + (W_c - W_d) c,
    one matrix per candidate times h. Features of the event alone (action, age) have no
    counterpart in c and enter as further entries of h. Hidden layers then an output of width 1.
    activation "sigmoid", or "dice" with alpha, center and scale learned per channel, see
    layers/activations.py.

    Called with h [R, S, W + A], c [R, C, W] and reads, boolean [R, C, S]; any float dtype.
    Returns the unnormalised weights a [R, C, S] in `dtype`, 0 where not read. A packed row costs
    all its candidates times all its events.
    Parameters, float32, F = hidden[0]: kernel [A + 4 W, F], its rows the event's own features,
    then h, c, h - c, h * c of the item features; bias [F]; the further layers'; dice 3 F per
    hidden layer.
    Source: DIN (arXiv 1706.06978), activation unit and Dice.
    """

    hidden: tuple[int, ...]
    activation: str = "sigmoid"
    kernel_init: str = "lecun"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, h_rsw: jax.Array, c_rcw: jax.Array, reads_rcs: jax.Array) -> jax.Array:
        init = initializers.kernel(self.kernel_init)
        h_rsw, c_rcw = h_rsw.astype(self.dtype), c_rcw.astype(self.dtype)
        W, A, F = c_rcw.shape[-1], h_rsw.shape[-1] - c_rcw.shape[-1], self.hidden[0]
        # One kernel for the whole input, so that its fan-in is the input's width.
        kernel = self.param("kernel", init, (4 * W + A, F), jnp.float32).astype(self.dtype)
        bias_f = self.param("bias", nn.initializers.zeros, (F,), jnp.float32).astype(self.dtype)
        event_af, event_wf, candidate_wf, difference_wf, product_wf = jnp.split(
            kernel, [A, A + W, A + 2 * W, A + 3 * W]
        )
        own_rwcf = (event_wf + difference_wf)[:, None] + (
            c_rcw.swapaxes(1, 2)[..., None] * product_wf[:, None]
        )
        # One matmul over (candidate, hidden): XLA:CPU's einsum needs twice the time backward.
        x_rsn = h_rsw[..., :W] @ own_rwcf.reshape(*own_rwcf.shape[:2], -1)
        x_rscf = x_rsn.reshape(*x_rsn.shape[:2], -1, F)
        x_rscf = x_rscf + (h_rsw[..., W:] @ event_af)[:, :, None]
        x_rscf = x_rscf + (c_rcw @ (candidate_wf - difference_wf) + bias_f)[:, None]
        x_rscf = self._activate(x_rscf, 0)
        for layer, width in enumerate(self.hidden[1:], start=1):
            dense = nn.Dense(width, dtype=self.dtype, kernel_init=init, name=f"dense_{layer}")
            x_rscf = self._activate(dense(x_rscf), layer)
        out = nn.Dense(1, dtype=self.dtype, kernel_init=init, name="weight")
        a_rcs = out(x_rscf)[..., 0].swapaxes(1, 2)
        return jnp.where(reads_rcs, a_rcs, 0)

    def _activate(self, x_nf: jax.Array, layer: int) -> jax.Array:
        if self.activation == "sigmoid":
            return nn.sigmoid(x_nf)
        shape = (x_nf.shape[-1],)

        def channel(name: str, init: nn.initializers.Initializer) -> jax.Array:
            return self.param(f"dice_{name}_{layer}", init, shape, jnp.float32).astype(x_nf.dtype)

        alpha_f = channel("alpha", nn.initializers.zeros)
        center_f = channel("center", nn.initializers.zeros)
        scale_f = channel("scale", nn.initializers.ones)
        return activations.dice(x_nf, alpha_f, center_f, scale_f)


class HistoryPooling(nn.Module):
    """The history as inputs of the candidates: one input per history feature and pooling.

    Returns a list of Input of group "history", named "history_<pooling>.<feature>", each
    [R, C, W] with the feature's own width; finite (zeros) for an empty history; [] for a schema
    without history features.
    Raises ValueError for target attention where the schema has no item feature.
    """

    poolings: tuple[str, ...]
    attention_hidden: tuple[int, ...] = (36,)
    attention_activation: str = "sigmoid"
    kernel_init: str = "lecun"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Features) -> list[Input]:
        schema = features.schema
        items, own = schema.of("item"), schema.of("event")
        if not items + own:
            return []
        mask_rs1 = features.history_mask[..., None]
        values = {f.name: features.history[f.name].astype(self.dtype) for f in items + own}
        # Padding is zeroed here, not only weighted by 0 later: 0 * NaN is NaN.
        h_rsw = jnp.concatenate([jnp.where(mask_rs1, x, 0) for x in values.values()], axis=-1)
        found = []
        for pooling in self.poolings:
            if pooling == "mean":
                pooled_rcw = mean(features, h_rsw)
            else:
                pooled_rcw = self._attend(features, h_rsw, [f.name for f in items])
            ends = itertools.accumulate(x.shape[-1] for x in values.values())
            parts = dict(zip(values, jnp.split(pooled_rcw, list(ends)[:-1], axis=-1), strict=True))
            for f in schema.history:
                name, dense = f"history_{pooling}.{f.name}", f.kind == "dense"
                found.append(Input(name, HISTORY, parts[f.name], dense))
        return found

    def _attend(self, features: Features, h_rsw: jax.Array, items: list[str]) -> jax.Array:
        """Target attention over h [R, S, W + A], the item features first -> [R, C, W + A]."""
        if not items:
            raise ValueError(
                "history_pooling: pooling 'target' compares events with the candidate, but the "
                "schema has no feature of side 'item'; use pooling ('mean',)"
            )
        c_rcw = jnp.concatenate([features.candidate[x].astype(self.dtype) for x in items], axis=-1)
        attention = TargetAttention(
            self.attention_hidden,
            self.attention_activation,
            self.kernel_init,
            self.dtype,
            name="attention",
        )
        return jnp.einsum("rcs,rsw->rcw", attention(h_rsw, c_rcw, same_sample(features)), h_rsw)
