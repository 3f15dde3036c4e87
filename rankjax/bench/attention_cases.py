"""Rows of users for `rankjax bench kernels`: tokens, arrays, and what a case costs by formula.

A row of the layout "full" is one user of N events; of "jagged", users of several lengths behind
each other. Every event reads itself and those before it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rankjax.batch import HISTORY, Tokens
from rankjax.kernels import hstu_attention
from rankjax.masks import MaskRule

Layout = Literal["full", "jagged"]
RULE = MaskRule()
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SHORTEST = 16  # of a jagged row: lengths are log-uniform from N / 16 to N


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """R rows of N tokens, H heads of d_qk = d_v = `width`; `lengths` of the users of every row."""

    lengths: tuple[tuple[int, ...], ...]
    length: int  # N
    bias: bool
    heads: int = 4
    width: int = 128
    dtype: str = "float32"

    @property
    def pairs(self) -> int:
        """How many (query, key) are allowed, in all rows: n (n + 1) / 2 for n events."""
        return sum(n * (n + 1) // 2 for n in itertools.chain(*self.lengths))

    @property
    def all_pairs(self) -> int:
        """R H N^2, the elements of the naive version's arrays."""
        return len(self.lengths) * self.heads * self.length**2

    def flops(self) -> dict[str, int]:
        """Of the allowed pairs, by the field's convention: forward two products, backward five."""
        one = 2 * self.heads * self.pairs * self.width
        return {"forward": 2 * one, "forward_backward": 7 * one}


def shape(layout: Layout, length: int, tokens: int, bias: bool, **more: Any) -> Shape:
    """As many rows as hold about `tokens` tokens, one at least."""
    rng = np.random.default_rng(length)
    rows = max(1, tokens // length)
    lengths = [_jagged(rng, length) if layout == "jagged" else (length,) for _ in range(rows)]
    return Shape(lengths=tuple(lengths), length=length, bias=bias, **more)


def _jagged(rng: np.random.Generator, length: int) -> tuple[int, ...]:
    """Lengths that fill a row; the last is what is left."""
    found: list[int] = []
    while (left := length - sum(found)) > 0:
        drawn = round(length * np.exp(rng.uniform(np.log(1 / SHORTEST), 0)))
        found.append(min(left, max(1, drawn)))
    return tuple(found)


def tokens_of(lengths: Sequence[Sequence[int]], length: int) -> Tokens:
    """[R, N]; what the users of a row leave is padding. Gaps between events: log-normal, hours."""
    rng = np.random.default_rng(0)
    fields = {
        f.name: np.zeros((len(lengths), length), np.int32) for f in dataclasses.fields(Tokens)
    }
    for r, users in enumerate(lengths):
        ends = np.cumsum(users)
        for sample, (end, n) in enumerate(zip(ends, users)):
            own = slice(end - n, end)
            fields["segment"][r, own], fields["role"][r, own] = sample, HISTORY
            fields["position"][r, own] = fields["time"][r, own] = np.arange(n)
            gaps = np.exp(rng.normal(np.log(3600), 2, n)).clip(1, 10**5)
            fields["bias_time"][r, own] = np.cumsum(gaps).astype(np.int32)
    return Tokens(**{name: jnp.asarray(x) for name, x in fields.items()})


@dataclasses.dataclass(frozen=True)
class Problem:
    """arrays: q, k, v [R, N, H, width], as is d, the gradient of the result."""

    arrays: tuple[jax.Array, ...]
    bias: hstu_attention.RelativeBias | None
    tokens: Tokens
    d: jax.Array


def problem(s: Shape) -> Problem:
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    size = (len(s.lengths), s.length, s.heads, s.width)
    arrays = tuple((draw(*size) * s.width**-0.25).astype(DTYPES[s.dtype]) for _ in range(3))
    bias = None
    if s.bias:
        bias = hstu_attention.RelativeBias(
            position=0.1 * draw(2 * s.length - 1), time=0.1 * draw(hstu_attention.TIME_BUCKETS)
        )
    d = draw(*size).astype(DTYPES[s.dtype])
    return Problem(arrays, bias, tokens_of(s.lengths, s.length), d)


def silu_attention(
    p: Problem, arrays: Any, bias: Any, *, implementation: str, tile: Any = None
) -> jax.Array:
    """What HSTU computes; divided by N."""
    return hstu_attention.hstu_attention(
        *(*arrays, p.tokens, p.tokens, RULE),
        **{"normalizer": float(p.tokens.role.shape[1]), "bias": bias},
        **{"implementation": implementation, "tile": tile},
    )


def programs(
    p: Problem, attention: Any, parts: Sequence[str] = ("forward", "forward_backward")
) -> dict[str, tuple[jax.stages.Compiled, tuple]]:
    """{part: (compiled, its arguments)}; attention(p, arrays, bias)."""

    def run(tokens: Tokens, arrays: Any, bias: Any) -> jax.Array:
        return attention(dataclasses.replace(p, tokens=tokens), arrays, bias)

    def backward(tokens: Tokens, arrays: Any, bias: Any, d: jax.Array) -> Any:
        out, pull = jax.vjp(functools.partial(run, tokens), arrays, bias)
        return out, pull(d)

    args = (p.tokens, p.arrays, p.bias)
    jobs = {"forward": (run, args), "forward_backward": (backward, (*args, p.d))}
    chosen = {part: jobs[part] for part in parts}
    return {part: (jax.jit(f).lower(*args).compile(), args) for part, (f, args) in chosen.items()}
