"""Softmax attention with a data-free mask (LONGER, OneTrans, GRAB)."""

from rankjax.kernels.softmax_attention.api import IMPLEMENTATIONS, softmax_attention

__all__ = ["IMPLEMENTATIONS", "softmax_attention"]
