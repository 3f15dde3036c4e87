"""GRAB: a causal transformer over a user's events, divided by action into channels.

Source: "GRAB: An LLM-Inspired Sequence-First Click-Through Rate Prediction Modeling Paradigm"
(Baidu, arXiv 2602.01865) and the authors' talk of September 2025. A figure-faithful reconstruction:
what could not be read stands in PAPER.evidence, what we chose in PAPER.leaves_open.

Features -> partial tokens (events, with what the user did) and full tokens (candidates, without)
-> L x [mix a candidate's copies over the channels, attention in each channel, feed-forward]
-> a candidate's copies side by side -> logits

Sequence-then-sparse training (`sts="two_phase"`). The talk trains in two phases on the same batch:
first the sequence network with the tables held fixed, then the tables through a network of their
own, the sparse phase, which reads one impression at a time and is not served. Here both losses are
one step: the sequence network reads the looked-up rows behind a stop_gradient, the sparse phase
reads them as they are. The two have no dense parameter in common, and what phase 1 updates phase 2
does not read, so both gradients are those of the phases one after the other; the optimizers act on
each parameter alone, so the updates are too. Only a clip by the global norm of the dense gradient
knows of both networks. ("joint" is ordinary training, without the sparse phase.)

Parameters, exact. Width D, H heads of dh, rank r, F = k D, A channels (W = 1 where they share
their weights, else A), tables of B = P + n^2 + 64 rows, u, e, c the widths of the inputs of a
user, an event and a candidate (its item and context), g the groups of the sparse phase's inputs, of
width w = u + e + c, X its hidden width, h that of the head, K tasks:
  tokens  for each of the inputs e and u + c of width x: 2 (x D + D) + D^2 + D; and 2 D
  layers  L (W [D r + 3 r H dh + H dh D + 2 D F + F + D + 4 D + B dh] + 2 A^2 D^2)
  head    K (A D h + 2 h + 1); 2 D before it with norm_place="pre"
  sparse  w g + g + w X + X + X^2 + X + X K + K, in training with "two_phase" only
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax import batch, papers
from rankjax.batch import Features, Tokens
from rankjax.kernels.softmax_attention import IMPLEMENTATIONS
from rankjax.layers import (
    action_channels,
    auxiliary,
    checks,
    initializers,
    mlp_gate,
    norms,
    sequence,
    sparse_phase,
    stack,
    task_heads,
    vector_bias,
)
from rankjax.layers.vector_bias import Sight
from rankjax.masks import MaskRule

TIME_BUCKETS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of GRAB, a figure-faithful reconstruction; the first value is the default.

    channels: an event belongs to one, by its action; a candidate has a copy in each.
    channel_starts: the first action id of channels 1, 2, ..; None = 2, 3, .., so that channel a
      holds action a + 1, the first those without an action too, the last all further ones.
    share_channels: the channels share the weights of a layer; as drawn they do not.
    positions: P of the table of relative positions; None = the longest distance, and 0.
    action_ids: n; events have min(action, n - 2), candidates n - 1, each pair a row of its own.
    attn_window: events are read at distances below it (reading A of the figure's dashed box);
      rab_window: the relative vectors stand at distances below it (reading B). None = everywhere.
    mix: in which layers a candidate's copies are mixed: "every_layer" or "last".
    readout: what the head reads of the copies: "concat", side by side, or their "mean".
    sts: "two_phase" or "joint", see the module's docstring.
    token_norm: of the tokens that enter the first layer, affine; embeddings start small (std .05),
      and what enters a residual stream unscaled is soon drowned by the layers' output.
    norm_place: "post", Add & Norm as drawn, or "pre", which adds a norm before the head.
    implementation: of the attention; None = the best for the platform compiled for.
    """

    history: int  # S: events before the sample's first candidate
    realtime: int = 0  # most events between the first and the last candidate of a window
    layers: int = 2  # L
    width: int = 64  # D
    heads: int = 2  # H
    head_width: int | None = None  # dh; None = width / heads
    latent: int | None = None  # r: queries, keys and values come of r numbers; None = width / 4
    expansion: int = 4  # k: the feed-forward is kD wide
    channels: int = 3  # A
    channel_starts: tuple[int, ...] | None = None
    share_channels: bool = False
    positions: int | None = None  # P
    action_ids: int = 4  # n
    attn_window: int | None = None
    rab_window: int | None = None
    mix: str = "every_layer"
    readout: str = "concat"
    sts: str = "two_phase"
    sparse_hidden: int | None = None  # of the sparse phase; None = width
    token_norm: str = "layer"
    norm: str = "layer"
    norm_place: str = "post"
    init: str = "lecun"
    prune_last: bool = True  # the last layer computes only the candidates' rows; exact
    head_hidden: int | None = None  # None = width
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32
    implementation: str | None = None

    axes: ClassVar[dict[str, str]] = {"S": "history", "L": "layers", "D": "width"}
    paper_scope: ClassVar[str] = (
        "the L layers with tables and gates, of a user's n events evenly divided among the "
        "channels, each a partial and a full token"
    )

    def __post_init__(self) -> None:
        where = "grab.Config"
        object.__setattr__(self, "channel_starts", checks.as_tuple(self.channel_starts))
        names = ("history", "layers", "width", "heads", "expansion", "channels", "tasks")
        checks.at_least(where, 1, **{name: getattr(self, name) for name in names})
        checks.at_least(where, 0, realtime=self.realtime)
        checks.at_least(where, 2, action_ids=self.action_ids)
        for name in ("head_width", "latent", "positions", "attn_window", *_HIDDEN):
            if getattr(self, name) is not None:
                checks.at_least(where, 1, **{name: getattr(self, name)})
        if self.rab_window is not None:
            checks.at_least(where, 0, rab_window=self.rab_window)
        checks.flags(where, self)
        for name, allowed in _CHOICES.items():
            checks.one_of(where, name, getattr(self, name), allowed)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"{where}: width={self.width}, expected a multiple of heads={self.heads}, or a "
                "head_width"
            )
        starts = self.starts
        if len(starts) != self.channels - 1 or list(starts) != sorted(set(starts)):
            raise ValueError(
                f"{where}: channel_starts={starts}, expected {self.channels - 1} increasing action "
                f"ids for channels={self.channels}"
            )

    @property
    def starts(self) -> tuple[int, ...]:
        """First action id of each channel but the first."""
        default = tuple(range(2, self.channels + 1))
        return default if self.channel_starts is None else self.channel_starts

    @property
    def widths(self) -> tuple[int, int]:
        """(dh, r)."""
        latent = max(1, self.width // 4) if self.latent is None else self.latent
        return self.head_width or self.width // self.heads, latent

    def tables(self, time_exact: bool = True) -> vector_bias.Tables:
        return vector_bias.Tables(
            positions=self.positions or self.history + self.realtime + 1,
            actions=self.action_ids,
            times=TIME_BUCKETS if time_exact else 0,
            window=self.rab_window,
        )

    def paper_params(self) -> int:
        """Parameters of `paper_scope`: the line "layers" of the module's docstring."""
        dh, r = self.widths
        D, F, inner = self.width, self.expansion * self.width, self.heads * dh
        channel = D * r + 3 * r * inner + inner * D + 2 * D * F + F + D
        channel += 2 * norms.parameters(self.norm, D) + sum(self.tables().rows) * dh
        sets = 1 if self.share_channels else self.channels
        gates = self.layers if self.mix == "every_layer" else 1
        return self.layers * sets * channel + gates * 2 * (self.channels * D) ** 2

    def paper_flops(self, n: int | None = None) -> float:
        """Forward FLOPs of `paper_scope` at n events (None = `history`), unskipped scores.

        There are n (1 + A) tokens: a partial one in one channel, a full one in every channel. A
        token costs 2 (D r + 3 r H dh + H dh D + 2 D F) and 2 H dh B for the vectors, a full one's
        gates 4 A^2 D^2 together, and a pair of the (1 + A)^2 n^2 / A in the channels 4 H dh.
        """
        n, A, D = self.history if n is None else n, self.channels, self.width
        dh, r = self.widths
        inner = self.heads * dh
        token = 2 * (D * r + 3 * r * inner + inner * D + 2 * D * self.expansion * D)
        token += 2 * inner * sum(self.tables().rows)
        layer = token * n * (1 + A) + 4 * inner * n**2 * (1 + A) ** 2 / A
        gates = self.layers if self.mix == "every_layer" else 1
        return float(self.layers * layer + gates * 4 * (A * D) ** 2 * n)


_HIDDEN = ("sparse_hidden", "head_hidden")
_CHOICES = {
    "mix": ("every_layer", "last"),
    "readout": ("concat", "mean"),
    "sts": ("two_phase", "joint"),
    "token_norm": norms.KINDS,
    "implementation": (None, *IMPLEMENTATIONS),
}

# The paper prints no size; this one is ours.
GRAB_CHOSEN = Config(history=511, layers=4, width=256, heads=4)

PAPER = papers.Paper(
    title=("GRAB: An LLM-Inspired Sequence-First Click-Through Rate Prediction Modeling Paradigm"),
    arxiv="2602.01865",
    evidence=(
        "figure-faithful reconstruction: the abstract, part of the introduction, the four figures "
        "and the authors' talk; not read: width, depth, heads, rank, window, number and definition "
        "of channels, the gate's formula, tables of data sets and ablations, optimizer and rates"
    ),
    sizes={"grab_chosen": papers.Size(config=GRAB_CHOSEN, chosen="all: none is printed")},
    leaves_open=(
        ("channels", "3, by the id of the event's action; settings channels, channel_starts"),
        ("MLP & Gate of the tokens", "(GELU(x W1 + b1) W2 + b2) * sigmoid(x Wg + bg), then a norm"),
        ("the gate of the mix", "sigmoid(cat Wg) * (cat Wv) on all copies, Wv = 0 at the start"),
        ("layers that mix", "every one, as drawn; mix='last' is the other reading"),
        ("the dashed box of the bias figure", "no window; attn_window and rab_window are readings"),
        ("buckets of time", "64, two to the octave of seconds; off where times are not exact"),
        ("buckets of a pair of actions", "a row for each pair of n ids, one for full tokens"),
        ("biases of Q, K, V and the output", "none; the feed-forward has them"),
        ("the tables of relative vectors", "one set per layer and channel, shared by the heads"),
        ("the head", "the copies side by side, one ReLU layer for each task"),
        ("the network of the sparse phase", "a sigmoid gate per group of inputs, three layers"),
        ("weights of the two losses", "1 each: they train different parameters"),
    ),
    deviations=(
        (
            "only candidates are full tokens; the paper makes two tokens of every event",
            "full tokens are what is scored and trained on: here the impressions; events are what "
            "a user did",
        ),
        (
            "a full token reads the events of an earlier time, not of an earlier index",
            "impressions of one request share a time; by index one would read the others' labels",
        ),
        (
            "the two phases of a batch are one step of two losses",
            "their gradients and updates are the same (module docstring), but for a global clip",
        ),
        (
            "events pass the linear layers of every channel, of which one is used",
            "static shapes; FLOPs count what runs, A (S + C) tokens for the paper's S + A C",
        ),
    ),
)


def channel_of(config: Config, features: Features) -> jax.Array:
    """The channel of each event, int32 [R, S]."""
    later = [features.history_action >= start for start in config.starts]
    return sum((x.astype(jnp.int32) for x in later), jnp.zeros_like(features.history_action))


def masks_of(config: Config, features: Features) -> dict[str, tuple[Tokens, Tokens, MaskRule]]:
    """{title: (query tokens, key tokens, rule)}: partial tokens, and the full ones by channel.

    A partial token reads partial tokens of its own channel, a full one those too and itself; no
    partial token reads a full one, so that they need no place among the first one's keys.
    """
    S, C = features.history_sample.shape[1], features.candidate_sample.shape[1]
    tokens, channel_rs = sequence.tokens(features, context=0), channel_of(config, features)
    # Positions count all events: a channel only takes keys away.
    rule = MaskRule(window=None if config.attn_window is None else config.attn_window - 1)
    partial = jax.tree.map(lambda x_rn: x_rn[:, :S], tokens)
    segment = partial.segment * config.channels + channel_rs
    partial = dataclasses.replace(partial, segment=segment)
    found = {"partial tokens": (partial, partial, rule)}
    for a in range(config.channels):
        role = jnp.where(channel_rs == a, tokens.role[:, :S], batch.PAD)
        keys = dataclasses.replace(tokens, role=jnp.concatenate([role, tokens.role[:, S:]], axis=1))
        found[f"full tokens, channel {a}"] = (sequence.last(tokens, C), keys, rule)
    return found


def sights(config: Config, features: Features) -> tuple[Sight, Sight]:
    """What the partial and what the full tokens see, from `masks_of`.

    Keys of the full tokens have a leading axis A: the channels differ in who is padding.
    """
    partial, *full = masks_of(config, features).values()
    tables = config.tables(features.schema.time_exact)
    done_rs = jnp.clip(features.history_action, 0, config.action_ids - 2)
    unknown_rc = jnp.full_like(features.candidate_sample, config.action_ids - 1)
    action_rn = jnp.concatenate([done_rs, unknown_rc], axis=1)
    by_channel = jax.tree.map(lambda *x_rn: jnp.stack(x_rn), *(k for _, k, _ in full))
    of_full = Sight.of(full[0], tables, unknown_rc, action_rn)
    return Sight.of(partial, tables, done_rs, done_rs), dataclasses.replace(of_full, k=by_channel)


class Layer(nn.Module):
    """Mix the copies, attention within each channel, Add & Norm, feed-forward, Add & Norm.

    Called with the streams x [A, R, S + C, D] in `dtype` (all events, of which only the channel's
    own are read, and its copies of the candidates), the channel of each event [R, S] and `sights`;
    returns the same or, where `last`, the candidates' rows alone, [A, R, C, D].
    Parameters, float32: mix, where the layer mixes; read and update, each with a leading axis A
    unless the channels share them (see layers/action_channels.py).
    """

    config: Config
    mixes: bool
    time_exact: bool

    @nn.compact
    def __call__(
        self, x_arnd: jax.Array, channel_rs: jax.Array, seen: tuple[Sight, Sight], *, last: bool
    ) -> jax.Array:
        c = self.config
        A, _, N, _ = x_arnd.shape
        S = channel_rs.shape[1]
        if self.mixes:
            mix = action_channels.TargetMix(c.init, c.dtype, name="mix")
            x_arnd = jnp.concatenate([x_arnd[:, :, :S], mix(x_arnd[:, :, S:])], axis=2)
        C = N - S
        read = action_channels.each(action_channels.Read, shared=c.share_channels)(
            *(c.heads, *c.widths, c.tables(self.time_exact), C if last else N),
            *(c.norm if c.norm_place == "pre" else "none", c.init, c.dtype),
            name="read",
        )
        q, k, v, t = read(x_arnd)
        attend = functools.partial(vector_bias.attention, implementation=c.implementation)
        by_channel = jax.vmap(lambda *x: attend(*x[:4], dataclasses.replace(seen[1], k=x[4])))
        a_arnhq = by_channel(q[:, :, -C:], k, v, t[:, :, -C:], seen[1].k)
        if not last:
            # An event is in one channel: its own copy of queries, keys and values is picked.
            at = channel_rs[None, :, :, None, None]
            own = lambda y: jnp.take_along_axis(y[:, :, :S], at, axis=0)[0]
            own_rshq = attend(*map(own, (q, k, v, t)), seen[0])
            own_arshq = jnp.broadcast_to(own_rshq, (A, *own_rshq.shape))
            a_arnhq = jnp.concatenate([own_arshq, a_arnhq], axis=2)
        update = action_channels.each(action_channels.Update, shared=c.share_channels)(
            c.expansion, c.layers, c.norm, c.norm_place, c.init, c.dtype, name="update"
        )
        return update(x_arnd[:, :, S:] if last else x_arnd, a_arnhq)


class GRAB(nn.Module):
    """Features -> (logits float32 [R, C, K], aux). Takes windows.

    aux is {} but in training with sts="two_phase": then "sparse_phase" are the logits of the
    network that alone trains the tables.
    Raises ValueError for a schema without item features, or, with several channels, an action.
    """

    config: Config
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, features: Features, *, train: bool
    ) -> tuple[jax.Array, dict[str, auxiliary.Logits]]:
        c, aux = self.config, {}
        if train and c.sts == "two_phase":
            hidden = c.sparse_hidden or c.width
            network = sparse_phase.SparsePhase(c.tasks, hidden, c.init, c.dtype, name="sparse")
            aux["sparse_phase"] = auxiliary.Logits(network(features), owns_tables=True)
            fixed = {x: getattr(features, x) for x in ("user", "history", "candidate")}
            features = dataclasses.replace(features, **jax.lax.stop_gradient(fixed))
        C = features.candidate_sample.shape[1]
        x_rnd = norms.Norm(c.token_norm, name="token_norm")(self._embed(features))
        x_arnd = jnp.broadcast_to(x_rnd, (c.channels, *x_rnd.shape))
        channel_rs, seen = channel_of(c, features), sights(c, features)
        exact, every = features.schema.time_exact, c.mix == "every_layer"
        kinds = [(every, False)] * (c.layers - 1) + [(True, c.prune_last)]  # (mixes, last)
        make = lambda name, kind: Layer(c, kind[0], exact, name=name)
        call = lambda layer, kind, x_arnd: layer(x_arnd, channel_rs, seen, last=kind[1])
        x_arnd = stack.run(self.compute, "layer", kinds, make, call, x_arnd)
        x_arcd = x_arnd[:, :, x_arnd.shape[2] - C :]
        if c.norm_place == "pre":
            x_arcd = norms.Norm(c.norm, name="output_norm")(x_arcd)
        x_rcd = jnp.moveaxis(x_arcd, 0, 2)
        x_rcd = x_rcd.mean(axis=2) if c.readout == "mean" else x_rcd.reshape(*x_rcd.shape[:2], -1)
        head = task_heads.MLP(c.tasks, c.head_hidden or c.width, c.init, name="head")
        return head(x_rcd), aux

    def _embed(self, features: Features) -> jax.Array:
        """The stream [partial tokens of the events | full tokens of the candidates], [R, N, D].

        A partial token has its item and what the user did; a full one has its item, its context and
        the user, but no event feature: what the user does with it is the label.
        """
        c, schema = self.config, features.schema
        names = {side: [f.name for f in schema.of(side)] for side in ("item", "event", "context")}
        if not names["item"]:
            raise ValueError("grab: the schema has no item feature, of which a token is made")
        if c.channels > 1 and schema.action is None:
            raise ValueError(
                f"grab: channels={c.channels}, expected 1: the schema has no action that is one id"
            )
        event_rsw = sequence.concat(features.history, names["item"] + names["event"], c.dtype)
        own_rcw = sequence.concat(features.candidate, names["item"] + names["context"], c.dtype)
        users = [features.user_of_candidate(f.name).astype(c.dtype) for f in schema.user]
        full_rcw = jnp.concatenate([*users, own_rcw], axis=-1)
        token = functools.partial(mlp_gate.MLPGate, c.width, c.init, c.dtype)
        parts = [token(name="partial")(event_rsw), token(name="full")(full_rcw)]
        return jnp.concatenate(parts, axis=1)
