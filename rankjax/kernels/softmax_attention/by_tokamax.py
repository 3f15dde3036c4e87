"""Softmax attention by tokamax (optional): its Triton kernels on CUDA, its XLA form elsewhere.

The kernels take the mask as an array that the heads share, and skip no block of it.
"""

import functools
import importlib.util
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.extend import backend

from rankjax.batch import Tokens
from rankjax.kernels.softmax_attention import mask as mask_lib
from rankjax.masks import MaskRule

MASK = 2**30  # pairs of the batch, a byte each: 1 GiB, little beside the memory of such a GPU
SCORES = 2**24  # gradients of scores written out per head where the scores are shared: 64 MiB
# Bytes of the wider head, its width a power of two: the kernels' blocks are whole heads, and these
# fit the shared memory of every GPU from Ampere on (compiled for an L4, which has the least).
HEAD = 256


def library() -> ModuleType:
    """The package. Raises ImportError, which names the extra, where it is missing or too old."""
    wanted = "pip install 'rankjax[tokamax]' (Python 3.12 or later)"
    if importlib.util.find_spec("tokamax") is None:
        raise ImportError(f"softmax_attention: implementation='tokamax' needs tokamax: {wanted}")
    import tokamax

    if not hasattr(tokamax.config, "cross_compile"):
        raise ImportError(
            f"softmax_attention: tokamax at {tokamax.__file__} has no config.cross_compile, "
            f"expected tokamax >= 0.0.17: {wanted}"
        )
    return tokamax


def unsuited(
    q_rnhq: jax.Array, k_rmhq: jax.Array, v_rmhv: jax.Array, scores_rhnm: jax.Array | None
) -> str | None:
    """Why tokamax does not take these; None where it does. Does not ask whether it is there."""
    if q_rnhq.dtype == jnp.float64:
        return "takes float32 and bfloat16, found float64"
    (R, N, H, Q), M, V = q_rnhq.shape, k_rmhq.shape[1], v_rmhv.shape[-1]
    if R * N * M > MASK:
        return f"holds a mask of R x N x M bytes, at most {MASK}; found {R} x {N} x {M}"
    if (1 << (max(Q, V) - 1).bit_length()) * q_rnhq.dtype.itemsize > HEAD:
        return f"takes heads of up to {HEAD} bytes, found {max(Q, V)} of {q_rnhq.dtype}"
    pairs = R * H * N * M
    if scores_rhnm is not None and scores_rhnm.size < pairs > SCORES:
        return (
            f"writes the gradient of shared scores for every head, at most {SCORES}; found {R} x "
            f"{H} x {N} x {M} of shape {scores_rhnm.shape}"
        )
    device = backend.get_default_device()
    if device.platform == "gpu" and float(getattr(device, "compute_capability", 8)) < 8:
        return f"needs compute capability 8.0, found {device.compute_capability}"
    return None


@functools.partial(jax.jit, static_argnames=("rule", "scale", "kernel"))
def softmax_attention(
    q_rnhq: jax.Array,
    k_rmhq: jax.Array,
    v_rmhv: jax.Array,
    q_tokens: Tokens,
    k_tokens: Tokens,
    rule: MaskRule,
    scale: float,
    scores_rhnm: jax.Array | None,
    kernel: str,
) -> jax.Array:
    """As `api.softmax_attention`. kernel: tokamax's name, "triton" or "xla"."""
    mask_rnm, reads_rn = mask_lib.dense(rule, q_tokens, k_tokens)
    bias_rhnm = None
    if scores_rhnm is not None:
        # Theirs is added after the scale.
        bias_rhnm = scale * scores_rhnm.astype(jnp.float32)
    out_rnhv = _attend(kernel, scale, q_rnhq, k_rmhq, v_rmhv, bias_rhnm, mask_rnm[:, None])
    return mask_lib.silenced(out_rnhv, reads_rn)


def _call(kernel: str, scale: float, *args: jax.Array | None) -> jax.Array:
    q_rnhq, k_rmhq, v_rmhv, bias_rhnm, mask_r1nm = args
    options = {"bias": bias_rhnm, "mask": mask_r1nm, "scale": scale, "implementation": kernel}
    return library().dot_product_attention(
        *(q_rnhq, k_rmhq, v_rmhv), **options, precision=_precision(kernel, q_rnhq.dtype)
    )


def _precision(kernel: str, dtype: jnp.dtype) -> jax.lax.DotAlgorithmPreset | None:
    """What the kernel multiplies in; tokamax's own choice would depend on the machine traced on.

    On CUDA as XLA does: float32 as TF32, unless JAX's default_matmul_precision asks for more.
    """
    if dtype == jnp.bfloat16:
        return None
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
    if kernel == "triton" and not exact:
        return jax.lax.DotAlgorithmPreset.TF32_TF32_F32
    return jax.lax.DotAlgorithmPreset.F32_F32_F32


# Traced for a GPU on whatever machine this is: without the setting tokamax refuses where it finds
# none. It must hold while the backward pass is traced too, hence the rules.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernel: str, scale: float, *args: jax.Array | None) -> jax.Array:
    with library().config.cross_compile(True):
        return _call(kernel, scale, *args)


def _attend_forward(kernel: str, scale: float, *args: jax.Array | None):
    *floats, mask_r1nm = args
    with library().config.cross_compile(True):
        return jax.vjp(lambda *floats: _call(kernel, scale, *floats, mask_r1nm), *floats)


def _attend_backward(kernel: str, scale: float, pullback, d_rnhv: jax.Array):
    with library().config.cross_compile(True):
        return *pullback(d_rnhv), None


_attend.defvjp(_attend_forward, _attend_backward)
