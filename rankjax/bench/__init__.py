"""Throughput of the loader, the embedding step, the training step, blocks and kernels; JSON out.

rounds    interleaved measuring, and the PyTorch peers beside it
loading   the loader alone
tables    the embedding step, as the table grows
steps     the training step, whole and in parts
blocks    every architecture's block beside plain PyTorch, pruning, ways to write per-token layers
block_cases, block_inputs  the blocks, with all that goes into them
kernels   attention by every implementation, jagged rows; attention_cases, attention_peers
tuning    which tiles a kind of device likes best
weak      what a device computes and exchanges as devices grow, from the compiled step
layers    size, compile time and memory of the step, layers scanned or not, recomputed or not
commands  `rankjax bench ...`
"""

from rankjax.bench.commands import COMMANDS

__all__ = ["COMMANDS"]
