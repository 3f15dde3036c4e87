"""The bill of a training step before it is run, from shapes alone, with no accelerator at hand.

compiled  what a step compiles to: FLOPs, memory, and what devices exchange
targets   devices that can be compiled for: pods, cards, simulated CPUs
bill      memory, time and cost of a step on a target, and what to change where it does not fit
sweep     one step planned in several ways, beside each other
commands  `rankjax plan`
"""

from rankjax.plan.compiled import batch, collectives, figures, lowered

__all__ = ["batch", "collectives", "figures", "lowered"]
