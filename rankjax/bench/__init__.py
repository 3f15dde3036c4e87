"""Throughput of the loader, the embedding step and the training step; JSON out.

rounds    interleaved measuring, and the PyTorch peers beside it
loading   the loader alone
tables    the embedding step, as the table grows
steps     the training step, whole and in parts
commands  `rankjax bench ...`
"""

from rankjax.bench.commands import COMMANDS

__all__ = ["COMMANDS"]
