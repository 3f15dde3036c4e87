"""SiLU attention with a relative bias and a data-free mask (HSTU, arXiv 2402.17152)."""

from rankjax.kernels.hstu_attention.api import IMPLEMENTATIONS, hstu_attention
from rankjax.kernels.hstu_attention.bias import TIME_BUCKETS, RelativeBias

__all__ = ["IMPLEMENTATIONS", "TIME_BUCKETS", "RelativeBias", "hstu_attention"]
