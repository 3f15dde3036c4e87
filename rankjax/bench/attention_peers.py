"""Peers of the attention kernels: cuDNN's causal softmax, and a plain PyTorch HSTU attention."""

import os
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rankjax.bench import attention_cases as cases
from rankjax.kernels.hstu_attention import bias as bias_lib

FOLDER = pathlib.Path(tempfile.gettempdir()) / f"rankjax-bench-kernels-{os.getpid()}"


def cudnn_causal(p: cases.Problem, arrays: Any, bias: None) -> jax.Array:
    """Full rows only: cuDNN's own causal mask, no tokens read."""
    return jax.nn.dot_product_attention(*arrays, is_causal=True, implementation="cudnn")


def items(s: cases.Shape, p: cases.Problem, compiled: bool) -> list[dict[str, Any]]:
    """Entries of torch_peers.py's WORK.json: whole arrays of masks and indices, as is plain.

    The peer compares its output and its gradients' norms with ours before it is timed.
    """
    program, args = cases.programs(p, _reference)["forward_backward"]
    out, (d_arrays, d_bias) = program(*args)
    saved = {f"x:{i}": x for i, x in enumerate(p.arrays)}
    saved |= {f"norm:x:{i}": _norm(x) for i, x in enumerate(d_arrays)}
    saved |= {"a:allow": cases.RULE.allow(p.tokens, p.tokens), "out": out, "cotangent": p.d}
    if p.bias is not None:
        q, k = (jax.tree.map(lambda x, a=a: jnp.expand_dims(x, a), p.tokens) for a in (2, 1))
        for name in ("position", "time"):
            saved[f"p:{name}"] = getattr(p.bias, name)
            saved[f"norm:p:{name}"] = _norm(getattr(d_bias, name))
        saved["a:apart"] = bias_lib.position_index(q, k, p.bias.position.size)
        saved["a:bucket"] = bias_lib.bucket(q, k)
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / "case.npz"
    wide = lambda x: np.asarray(x, np.float32) if x.dtype == jnp.bfloat16 else np.asarray(x)
    np.savez(file, **{name: wide(jnp.asarray(x)) for name, x in saved.items()})
    common = {"kind": "layer", "function": "hstu_attention", "file": str(file)}
    common |= {"options": {"n": s.length}, "compiled": compiled, "dtype": s.dtype}
    return [
        {**common, "name": f"torch/{part}", "part": part}
        for part in ("forward", "forward_backward")
    ]


def _reference(p: cases.Problem, arrays: Any, bias: Any) -> jax.Array:
    return cases.silu_attention(p, arrays, bias, implementation="reference")


def _norm(x: jax.Array) -> np.ndarray:
    return np.float32(np.linalg.norm(np.asarray(x, np.float64)))
