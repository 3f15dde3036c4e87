"""Every model file says of its paper what `rankjax models` and docs/fidelity.md print."""

import sys

import pytest

from rankjax import models, papers

MODULES = {name: sys.modules[cls.__module__] for name, cls in models.MODELS.items()}
EACH = pytest.mark.parametrize("name", sorted(MODULES))
FIGURES = [
    pytest.param(figure, id=f"{name}: {figure.what}")
    for name, module in sorted(MODULES.items())
    for figure in module.PAPER.figures
]


@EACH
def test_every_model_has_its_paper(name):
    paper = MODULES[name].PAPER
    assert isinstance(paper, papers.Paper) and paper.title
    for pair in (*paper.leaves_open, *paper.deviations):
        assert len(pair) == 2 and all(isinstance(x, str) and x for x in pair)


@EACH
def test_every_named_size_is_a_constant_of_its_file(name):
    module = MODULES[name]
    for size, record in module.PAPER.sizes.items():
        assert size == size.lower() and getattr(module, size.upper()) is record.config


@pytest.mark.parametrize("figure", FIGURES)
def test_ours_meets_what_is_printed(figure):
    got = figure.ours()
    assert got > 0 and figure.where
    if figure.tolerance is None:
        assert figure.note or figure.per_batch, "a figure without a target says why"
    else:
        assert abs(got - figure.printed) <= figure.tolerance * abs(figure.printed)


def test_size_names_are_unique():
    modules = set(MODULES.values())
    names = [size for module in modules for size in module.PAPER.sizes]
    assert len(names) == len(set(names))
