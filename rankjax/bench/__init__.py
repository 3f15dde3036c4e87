"""Throughput of the loader, the embedding step, the training step and the blocks; JSON out.

rounds    interleaved measuring, and the PyTorch peers beside it
loading   the loader alone
tables    the embedding step, as the table grows
steps     the training step, whole and in parts
blocks    every architecture's block beside plain PyTorch, pruning, ways to write per-token layers
block_cases, block_inputs  the blocks, with all that goes into them
commands  `rankjax bench ...`
"""

from rankjax.bench.commands import COMMANDS

__all__ = ["COMMANDS"]
