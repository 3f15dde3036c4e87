"""OneTrans: one causal Transformer over events and the candidate's tokens (arXiv 2510.26104).

Features -> [S tokens: events | NS tokens: T of each candidate] -> L blocks -> NS tokens -> logits

S tokens share the weights of a block, each of the T NS slots has its own. Block, with RMS norms:
  Z = MixedMHA(norm(X)) + X;   X' = MixedFFN(norm(Z)) + Z;   token i reads the tokens j <= i
so that S tokens read earlier ones, and NS token i all S tokens and its candidate's NS tokens up to
itself: their order matters. The pyramid: block n computes, as queries, only the last S tokens of
its schedule and all NS tokens; keys and values are the whole list that the block before left.

Parameters of a block at the defaults (4x GELU, W_O shared), with T NS tokens of width d:
  S weights: W_Q, W_K, W_V 3 d^2 + 3 d, W_O d^2 + d, feed-forward 8 d^2 + 5 d = 12 d^2 + 9 d
  each NS slot: 3 d^2 + 3 d and 8 d^2 + 5 d = 11 d^2 + 8 d;   two norms: 2 d
  L blocks: L (d^2 (12 + 11 T) + d (11 + 8 T)).
`prune_last` saves work and no parameter: W_Q and the feed-forward of the last block's S tokens
then reach no logit, as in the paper, whose last S rows no head reads either.

Ours, where the paper is silent: the position embedding is learned, added to the S tokens and
counted from the oldest event, so that a newer one leaves the older tokens as they were (which the
paper's cache across requests needs); NS slots have their tokenizer's biases. The type indicator
belongs to merge "time", separators to "intent". Tokens are normed once before the first block, and
NS tokens once more before the head.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from rankjax import batch, papers
from rankjax.batch import Features, Tokens
from rankjax.kernels import softmax_attention
from rankjax.layers import (
    checks,
    event_lists,
    initializers,
    inputs,
    mixed,
    norms,
    sequence,
    stack,
    task_heads,
    tokenizers,
)
from rankjax.masks import MaskRule

RULE = MaskRule(history="causal", candidates="causal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of OneTrans; the first value named is the default.

    tokens: T (the paper's L_NS), NS tokens of a candidate; None: as many as the tokenizer makes.
    tokenizer: of the NS tokens: "auto_split" or "group" (the paper's), or another of
      layers/tokenizers.py.
    tokenizer_hidden: of the MLPs that make NS tokens ("auto_split", "group") and S tokens: the
      width of a ReLU layer; 0 = linear.
    sequences: events are divided by action id into so many, clip(action - 1, 0, sequences - 1),
      each with an MLP of its own; 1 = one stream.
    merge: of several sequences: "time", interleaved as they happened, plus a type indicator;
      "intent", one after the other, 0 (to be the strongest intent) first, with learned [SEP]
      tokens between.
    pos_emb: "input", learned positions added to the S tokens; "none".
    pyramid: block n computes so many S tokens: the multiple of `pyramid_round` nearest to
      S0 + (T - S0) n / L, T in the last (see `schedule`). False: all.
    own_weights: False: NS tokens use the S tokens' weights (the paper's ablation).
    own_output: True: W_O too is an NS slot's own.
    prune_last: the last block computes the NS tokens only, all that the head reads; exact.
    """

    history: int  # S: the newest events of a sample that are read
    tokens: int | None = 8  # T
    layers: int = 2  # L
    width: int = 64  # d
    heads: int = 2  # H
    expansion: int = 4  # a feed-forward is so many times d wide
    tokenizer: str = "auto_split"
    tokenizer_hidden: int = 0
    sequences: int = 1
    merge: str = "time"
    pos_emb: str = "input"
    pyramid: bool = True
    pyramid_round: int = 32
    own_weights: bool = True
    own_output: bool = False
    ffn: str = "gelu"  # or "swiglu"
    norm: str = "rms"
    norm_place: str = "pre"
    token_norm: str = "rms"
    init: str = "lecun"
    prune_last: bool = True
    head_hidden: int | None = None  # None = width
    tasks: int = 1  # K
    dtype: str = "float32"  # of activations; parameters are always float32
    implementation: str | None = None  # of the attention; None = the best for the platform

    axes: ClassVar[dict[str, str]] = dict(T="tokens", S="history", L="layers", D="width")
    paper_scope: ClassVar[str] = (
        "the L blocks, without tokenizers and heads; FLOPs of the S tokens and one candidate"
    )

    def __post_init__(self) -> None:
        where = "onetrans.Config"
        counts = ("history", "sequences", "pyramid_round", "layers", "width", "heads", "expansion")
        checks.at_least(where, 1, tasks=self.tasks, **{k: getattr(self, k) for k in counts})
        checks.at_least(where, 0, tokenizer_hidden=self.tokenizer_hidden)
        if self.head_hidden is not None:
            checks.at_least(where, 1, head_hidden=self.head_hidden)
        tokenizers.check(where, self.tokenizer, self.tokens)
        checks.flags(where, self)
        for name, allowed in _CHOICES.items():
            checks.one_of(where, name, getattr(self, name), allowed)
        norms.check(where, self.norm, self.norm_place)
        initializers.check(where, self.init)
        checks.dtype(where, self.dtype)
        if self.width % self.heads:
            raise ValueError(f"{where}: width={self.width} is no multiple of heads={self.heads}")
        if self.own_output and not self.own_weights:
            raise ValueError(f"{where}: own_output=True, expected False with own_weights=False")

    @property
    def event_tokens(self) -> int:
        """S0: the most S tokens of a sample, separators included."""
        return event_lists.length(self.history, self.sequences, self.merge)

    @property
    def schedule(self) -> tuple[int, ...]:
        """The most S tokens that each block computes: never fewer than T, nor more than S0.

        Where the data decide T, the pyramid ends at `pyramid_round` instead.
        """
        first, L, to = self.event_tokens, self.layers, self.pyramid_round
        if not self.pyramid:
            return (first,) * L
        end = self.tokens or to
        lengths = []
        for n in range(1, L):
            numerator = first * L + (end - first) * n  # over L
            nearest = (2 * numerator + L * to) // (2 * L * to) * to
            lengths.append(min(first, max(end, nearest)))
        return (*lengths, min(first, end))

    def history_pieces(self) -> tuple[int, tuple[int, ...]]:
        """(1, the history lengths where min(S, a block's rows) bends), for counting FLOPs."""
        separators = self.event_tokens - self.history
        bends = {rows - separators for rows in self.schedule} | {self.history}
        return 1, tuple(sorted(n for n in bends if n > 0))

    def paper_params(self) -> int | None:
        """Parameters of `paper_scope`; None where the data decide T. Defaults: see above."""
        if self.tokens is None:
            return None
        d, slots = self.width, self.tokens
        of_each = 3 * (d * d + d) + mixed.parameters(self.ffn, d, self.expansion)
        layer = of_each * (1 + slots * self.own_weights) + 2 * norms.parameters(self.norm, d)
        return self.layers * (layer + (d * d + d) * (1 + slots * self.own_output))

    def paper_flops(self, n: int | None = None) -> float | None:
        """Forward FLOPs of `paper_scope` with n S tokens (None = S0); None where the data decide T.

        A block of k S tokens that computes q: 4 (k + T) d^2 + 4 (q + T) d^2 for the projections,
        4 (q + T) (k + T) d for all scores and sums, 16 (q + T) d^2 for a 4x GELU feed-forward;
        the last block's S rows included.
        """
        if self.tokens is None:
            return None
        d, keys, total = self.width, self.event_tokens if n is None else n, 0
        ffn = {"gelu": 4, "swiglu": 6}[self.ffn] * self.expansion
        for most in self.schedule:
            rows = min(most, keys)
            q, k = rows + self.tokens, keys + self.tokens
            total += 4 * (k + q) * d**2 + 4 * q * k * d + ffn * q * d**2
            keys = rows
        return float(total)


_CHOICES = {
    "merge": event_lists.RULES,
    "pos_emb": ("input", "none"),
    "ffn": mixed.KINDS,
    "token_norm": norms.KINDS,
    "implementation": (None, *softmax_attention.IMPLEMENTATIONS),
}

ONETRANS_S = Config(history=1190, tokens=12, layers=6, width=256, heads=4, tasks=2)
ONETRANS_L = Config(history=1500, tokens=16, layers=8, width=384, heads=6, tasks=2)

_CHOSEN = (
    "tokens is where the printed pyramid ends, which the paper says is the number of NS tokens; "
    "expansion, linear tokenizers and one stream of events are ours{}"
)
_WIDTH = 13e6 / (11 * 256)  # inputs of a linear Auto-Split, see the note


def _with_tokenizer(config: Config) -> float:
    return config.paper_params() + _WIDTH * config.tokens * config.width


def _own_weights(config: Config) -> int:
    return config.paper_params() - dataclasses.replace(config, own_weights=False).paper_params()


def _full_over_pyramid(config: Config) -> float:
    full = dataclasses.replace(config, pyramid=False)
    return full.paper_flops() / config.paper_flops()


def _figure(what: str, printed: float, ours: Callable, c: Config, note: str) -> papers.Figure:
    """Without a target: what exactly the paper counts cannot be told."""
    ours, where = functools.partial(ours, c), "tables of sizes and ablations"
    return papers.Figure(
        what=what, printed=printed, ours=ours, where=where, tolerance=None, note=note
    )


_OWN = "W_O shared and 4x here; neither is printed, nor how wide the tokenizers' inputs are"
_DERIVED = (
    "4616 inputs, which is what the ablation leaves: Auto-Split costs 91M - 78M more than "
    "group-wise, (T - 1) d per input if both are linear"
)
PAPER = papers.Paper(
    title="OneTrans: Unified Feature Interaction and Sequence Modeling with One Transformer in "
    "Industrial Recommender",
    arxiv="2510.26104",
    evidence="the whole text of v3; captions and values of figures as read off",
    sizes={
        "onetrans_s": papers.Size(config=ONETRANS_S, chosen=_CHOSEN.format("")),
        "onetrans_l": papers.Size(
            config=ONETRANS_L, chosen=_CHOSEN.format("; heads 64 wide, as in the small size")
        ),
    },
    figures=(
        _figure("S: parameters, blocks", 91e6, Config.paper_params, ONETRANS_S, _OWN),
        _figure("S: parameters, with tokenizer", 91e6, _with_tokenizer, ONETRANS_S, _DERIVED),
        _figure("L: parameters, blocks", 330e6, Config.paper_params, ONETRANS_L, _OWN),
        _figure("L: parameters, with tokenizer", 330e6, _with_tokenizer, ONETRANS_L, _DERIVED),
        _figure("S: weights that NS tokens own (91M - 24M)", 67e6, _own_weights, ONETRANS_S, _OWN),
        _figure(
            *("S: training FLOPs of 2048 samples", 2.64e12),
            *(lambda config: 3 * 2048 * config.paper_flops(), ONETRANS_S),
            "every sample's own S tokens here; in the paper a request's candidates must share them",
        ),
        _figure(
            *("S: FLOPs without the pyramid over with it", 8.08 / 2.64),
            *(_full_over_pyramid, ONETRANS_S),
            "the convention is not printed; a first block that keeps all S tokens gives 2.03",
        ),
    ),
    leaves_open=(
        ("how many NS tokens", "as many as the pyramid ends with, 12 and 16"),
        ("whether W_O is a token's own", "shared; `own_output`"),
        ("ratio and activation of the feed-forward", "4x, exact GELU; `ffn='swiglu'`"),
        ("form of the position embedding", "learned, on S tokens, from the oldest; `pos_emb`"),
        ("what the pyramid's schedule counts", "the last S tokens; NS tokens are kept beside them"),
        ("layout of the heads", "NS tokens side by side, one hidden ReLU layer per task"),
        ("depth of the tokenizers' MLPs", "linear; `tokenizer_hidden` adds a ReLU layer"),
        ("sizes of several sequences", "one stream; `sequences` divides events by action id"),
        ("alpha = 0.99999 of the dense RMSProp", "its decay: optimizer='rmsprop', b2=0.99999"),
    ),
    deviations=(
        (
            "events of one time keep the log's order, not one by sequence",
            "a log has one stream of events, and its order is the closest to what happened",
        ),
        (
            "tokens are normed before the first block, NS tokens before the head",
            "embeddings start small beside what a block adds; NE on the synthetic world (100,000 "
            "impressions, history 20) was lower in all of three seeds, by .0007; `token_norm`",
        ),
        (
            "no sequence is pre-aggregated into NS tokens",
            "our logs have no sequence that depends on the candidate",
        ),
        (
            "the sparse optimizer is plain row-wise Adagrad",
            "the printed betas (0.1, 1.0) are of a variant that is not described",
        ),
    ),
)


def masks_of(config: Config, features: Features) -> dict[str, tuple[Tokens, Tokens, MaskRule]]:
    """{"layer 1": (query tokens, key tokens, rule), ...}: S tokens, then each candidate's T."""
    T = tokenizers.count(config.tokenizer, inputs.collect(features, []), config.tokens)
    return _masks(config, features, _lists(config, features), T)


def _kinds(c: Config) -> list[tuple[int | None, int]]:
    """The most S tokens of a sample that each block finds (None: the whole list) and computes."""
    most = [*c.schedule[:-1], 0 if c.prune_last else c.schedule[-1]]
    return list(zip([None, *most[:-1]], most, strict=True))


def _lists(c: Config, features: Features) -> event_lists.Lists:
    return event_lists.merge(features, history=c.history, sequences=c.sequences, by=c.merge)


def _masks(
    config: Config, features: Features, lists: event_lists.Lists, T: int
) -> dict[str, tuple[Tokens, Tokens, MaskRule]]:
    candidates = _candidate_tokens(features, T, config.event_tokens)
    join = lambda s: jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), s, candidates)
    samples, keys, masks = sequence.samples(features), lists.tokens, {}
    for layer, (_, most) in enumerate(_kinds(config), start=1):
        queries = event_lists.last(lists, most, samples)
        masks[f"layer {layer}"] = (join(queries), join(keys), RULE)
        keys = queries
    return masks


def _candidate_tokens(features: Features, T: int, first: int) -> Tokens:
    """The NS tokens [R, C * T], candidate after candidate, in positions `first`, first + 1, ..."""
    R, C = features.candidate_sample.shape
    each = lambda x_rc: jnp.repeat(x_rc.astype(jnp.int32), T, axis=1)
    slot_n = jnp.tile(jnp.arange(T), C)
    return Tokens(
        segment=each(features.candidate_sample),
        role=each(jnp.where(features.candidate_mask, batch.CANDIDATE, batch.PAD)),
        time=each(sequence.rule_times(features)[1]),
        position=each(jnp.full((R, C), first)) + slot_n,
        group=each(jnp.broadcast_to(jnp.arange(C), (R, C))),
        bias_time=each(features.candidate_time),
    )


class Block(nn.Module):
    """One block: (S tokens [R, N, D], NS tokens [T, R * C, D]) in `dtype` -> the same of `rows` S.

    Called with the tokens of its queries [R, rows + C * T] and keys [R, N + C * T]; the queries' S
    tokens are the last of the keys'. Post-norm: Z = norm(MHA(X) + X), X' = norm(FFN(Z) + Z).
    Parameters: `mixed.Attention`, `mixed.FeedForward` and two norms that all tokens share.
    """

    config: Config

    @nn.compact
    def __call__(self, x: mixed.Stream, q_tokens: Tokens, k_tokens: Tokens) -> mixed.Stream:
        c = self.config
        how = dict(own=c.own_weights, dtype=c.dtype, kernel_init=c.init, residual_layers=c.layers)
        attention = mixed.Attention(
            c.heads, own_output=c.own_output, implementation=c.implementation, **how, name="mha"
        )
        ffn = mixed.FeedForward(c.expansion, c.ffn, **how, name="ffn")
        norm = {name: norms.Norm(c.norm, name=name) for name in ("mha_norm", "ffn_norm")}
        normed = lambda x, name: tuple(map(norm[name], x))
        add = lambda x, y: tuple(map(jnp.add, x, y))
        dropped = k_tokens.role.shape[1] - q_tokens.role.shape[1]
        kept = (x[0][:, dropped:], x[1])
        if c.norm_place == "pre":
            z = add(attention(*normed(x, "mha_norm"), q_tokens, k_tokens, RULE), kept)
            return add(ffn(*normed(z, "ffn_norm")), z)
        z = normed(add(attention(*x, q_tokens, k_tokens, RULE), kept), "mha_norm")
        return normed(add(ffn(*z), z), "ffn_norm")


class OneTrans(nn.Module):
    """Features -> (logits float32 [R, C, K], {}).

    Raises ValueError for windows, for a schema without features of an event, for several sequences
    without an action to divide events by, and where the schema does not fit `tokens`.
    """

    config: Config
    compute: stack.Compute = stack.Compute()
    windows: ClassVar[bool] = False

    @nn.compact
    def __call__(self, features: Features, *, train: bool) -> tuple[jax.Array, dict[str, Any]]:
        features.require_one_time("onetrans", "its pyramid keeps the newest events")
        c = self.config
        R, C = features.candidate_sample.shape
        ns_tmd = tokenizers.Tokenizer(
            c.tokenizer, c.tokens, c.width, c.tokenizer_hidden, c.init, c.dtype, name="tokenizer"
        )(inputs.collect(features, []))
        lists = _lists(c, features)
        token_norm = norms.Norm(c.token_norm, name="token_norm")
        events = event_lists.Embed(
            *(c.width, c.tokenizer_hidden, c.sequences, c.merge),
            positions=c.event_tokens if c.pos_emb == "input" else 0,
            kernel_init=c.init,
            dtype=c.dtype,
            name="events",
        )
        x = (token_norm(events(features, lists)), token_norm(ns_tmd))
        kinds = _kinds(c)
        if c.pyramid and len(set(kinds)) == c.layers:
            stack.refuse_scan(self.compute, "onetrans", "its pyramid makes every block differ")
        mask = dict(zip(kinds, _masks(c, features, lists, len(ns_tmd)).values(), strict=True))
        make = lambda name, _: Block(c, name=name)
        call = lambda block, kind, x: block(x, *mask[kind][:2])
        _, ns_tmd = stack.run(self.compute, "block", kinds, make, call, x)
        if c.norm_place == "pre":
            ns_tmd = norms.Norm(c.norm, name="out_norm")(ns_tmd)
        x_rcd = ns_tmd.swapaxes(0, 1).reshape(R, C, -1)
        return task_heads.MLP(c.tasks, c.head_hidden or c.width, c.init, name="head")(x_rcd), {}
