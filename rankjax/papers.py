"""What a model file says of its paper: named sizes, printed figures, and what was left open.

Every file of `rankjax.models` holds one `PAPER`. `rankjax models` lists the sizes, docs/fidelity.md
is made of the figures and decisions, and a test holds each figure against its tolerance.
"""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A named size of an architecture.

    config: the whole Config. chosen: which of its fields the paper does not print, and how they
    were chosen; "" = every field that decides the size is printed. n: at how many tokens a
    sequence model's paper_flops are taken; None = the config's own. tokens: at how many feature
    tokens paper_params and paper_flops are taken where the config leaves T to the data.
    """

    config: Any
    chosen: str = ""
    n: int | None = None
    tokens: int | None = None

    @property
    def counted(self) -> Any:
        """The Config whose paper_params and paper_flops are listed."""
        if self.tokens is None:
            return self.config
        return dataclasses.replace(self.config, tokens=self.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A number that the paper prints, and how ours is computed.

    what: what is counted, in the paper's own scope. where: table, figure or section. ours is
    called without arguments. tolerance: the largest relative deviation that the test allows
    (0 = equal); None = no target, the deviation is only printed, and `note` says why.
    per_batch: printed for a batch whose size is not printed, while ours counts one candidate; the
    batch that it implies is shown in place of a deviation.
    """

    what: str
    printed: float
    ours: Callable[[], float]
    where: str
    tolerance: float | None = 0.0
    note: str = ""
    per_batch: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paper:
    """A model file's record of its source.

    evidence: how much of the paper could be read ("" = the whole text); a model made from figures
    or reports of others says so here. leaves_open: pairs (what the paper leaves open, our choice).
    deviations: pairs (what we do otherwise, why).
    """

    title: str
    arxiv: str = ""
    evidence: str = ""
    sizes: dict[str, Size] = dataclasses.field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    leaves_open: tuple[tuple[str, str], ...] = ()
    deviations: tuple[tuple[str, str], ...] = ()
