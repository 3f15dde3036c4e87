"""The one public function of this folder."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rankjax.batch import Tokens
from rankjax.kernels import partition
from rankjax.kernels.softmax_attention import by_jax_nn, by_splash, by_tokamax, reference, xla
from rankjax.masks import MaskRule

_LIBRARIES = {"splash": by_splash, "tokamax": by_tokamax, "jax_nn": by_jax_nn}
IMPLEMENTATIONS = ("reference", "xla", *_LIBRARIES)
# Queries x keys of a row. Below, a library's kernel is mostly padding and overhead.
FEW = 2**16
_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float64)


def softmax_attention(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    rule: MaskRule,
    *,
    scale: float,
    scores: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """out = softmax over the allowed keys of scale * (Q K^T + scores), times V.

    Args:
      q_rnhq: queries [R, N, H, Q], float32 or bfloat16 (float64 where JAX has it enabled).
      k_rmhq, v_rmhv: keys [R, M, H, Q] and values [R, M, H, V], dtype of the queries.
      q_tokens, k_tokens: what the rule knows of the tokens, int32 [R, N] and [R, M].
      rule: who may read whom.
      scale: 1 / sqrt(Q) in the papers.
      scores: what is added to q.k, any float dtype, differentiable; [R, H, N, M] or broadcastable
        to it.
      implementation: one of IMPLEMENTATIONS; None = the best for the platform compiled for:
        "splash" on a TPU, "tokamax" on CUDA where it is installed, each where it takes the call,
        "xla" otherwise. "reference" and "jax_nn" hold [R, H, N, M] arrays (the latter not in
        cuDNN's kernels), "xla" does so only where they are small. "splash" compiled for another
        platform is interpreted: right, and slow.

    Returns: [R, N, H, V], dtype of v, summed in float32. A row that may read nothing is 0.
    Raises:
      ValueError: shapes or dtypes do not fit together, or the implementation is unknown.
      NotImplementedError: a forced implementation does not take the call; says why.
      ImportError: "tokamax" is forced and missing; names the extra.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"softmax_attention: implementation={implementation!r}, expected None or one of "
            f"{IMPLEMENTATIONS}"
        )
    _check(q_rnhq, k_rmhq, v_rmhv, q_tokens, k_tokens, scores)
    args = (q_rnhq, k_rmhq, v_rmhv, q_tokens, k_tokens, scores)
    static = {"rule": rule, "scale": float(scale)}
    if implementation == "reference":
        return _bound(reference.softmax_attention, **static)(*args)
    if implementation is None:
        branches = _best(*args[:3], scores)
    elif implementation == "xla":
        branches = {"default": xla.softmax_attention}
    else:
        library = _LIBRARIES[implementation]
        if why := library.unsuited(*args[:3], scores):
            raise NotImplementedError(
                f"softmax_attention: implementation={implementation!r} {why}; use 'xla'"
            )
        branches = _forced(implementation)
    branches = {platform: _bound(f, **static) for platform, f in branches.items()}
    # The platform compiled for, not the one we run on: a plan for a pod is made on a CPU.
    function = functools.partial(jax.lax.platform_dependent, **branches)
    axes = "r.h.", "r.h.", "r.h.", "r.", "r.", "rh.."
    return partition.run(function, args, axes, "r.h.")


def _bound(function: Callable[..., jax.Array], **static) -> Callable[..., jax.Array]:
    """`function` of the arrays alone, in an order in which each may be an operand."""

    def of_arrays(*args) -> jax.Array:
        *arrays_and_tokens, scores_rhnm = args
        return function(*arrays_and_tokens, scores_rhnm=scores_rhnm, **static)

    return of_arrays


def _best(
    q_rnhq: jax.Array, k_rmhq: jax.Array, v_rmhv: jax.Array, scores: jax.Array | None
) -> dict[str, Callable[..., jax.Array]]:
    """What to run on each platform, with "default" for the others."""
    found = {"default": xla.softmax_attention}
    if q_rnhq.shape[1] * k_rmhq.shape[1] < FEW:
        return found
    if by_splash.unsuited(q_rnhq, k_rmhq, v_rmhv, scores) is None:
        found["tpu"] = by_splash.softmax_attention
    if by_tokamax.unsuited(q_rnhq, k_rmhq, v_rmhv, scores) is None:
        try:
            by_tokamax.library()
        except ImportError:  # optional
            return found
        found["cuda"] = functools.partial(by_tokamax.softmax_attention, kernel="triton")
    return found


def _forced(implementation: str) -> dict[str, Callable[..., jax.Array]]:
    """The same of one library, whatever the platform."""
    function = _LIBRARIES[implementation].softmax_attention
    if implementation == "splash":
        return {"tpu": function, "default": functools.partial(function, interpret=True)}
    if implementation == "tokamax":
        by_tokamax.library()
        kernels = {"cuda": "triton", "default": "xla"}
        return {p: functools.partial(function, kernel=name) for p, name in kernels.items()}
    return {"default": function}


def _check(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    scores: jax.Array | None,
) -> None:
    """Raises ValueError where shapes or dtypes do not fit together."""
    for name, x in (("q", q_rnhq), ("k", k_rmhq), ("v", v_rmhv)):
        if x.ndim != 4:
            raise ValueError(f"softmax_attention: {name} has shape {x.shape}, expected four axes")
    R, N, H, Q = q_rnhq.shape
    M = k_rmhq.shape[1]
    expected = [("k", k_rmhq.shape, (R, M, H, Q)), ("v", v_rmhv.shape[:3], (R, M, H))]
    for name, tokens, shape in (("q_tokens", q_tokens, (R, N)), ("k_tokens", k_tokens, (R, M))):
        expected += [(f"{name}.{field}", x.shape, shape) for field, x in vars(tokens).items()]
    for name, found, want in expected:
        if tuple(found) != want:
            raise ValueError(
                f"softmax_attention: {name} has shape {tuple(found)}, expected {want} beside q of "
                f"shape {q_rnhq.shape}"
            )
    if scores is not None:
        full = (R, H, N, M)
        fits = scores.ndim == 4 and all(s in (1, f) for s, f in zip(scores.shape, full))
        if not fits:
            raise ValueError(
                f"softmax_attention: scores have shape {scores.shape}, expected {full} or 1 in "
                "place of any of them"
            )
    dtypes = [str(x.dtype) for x in (q_rnhq, k_rmhq, v_rmhv)]
    if len(set(dtypes)) > 1 or q_rnhq.dtype not in _FLOATS:
        raise ValueError(
            f"softmax_attention: q, k, v are {dtypes}, expected one of float32, bfloat16, float64"
        )
