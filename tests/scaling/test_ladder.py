import pytest

from rankjax.models import dlrm, hstu, rankmixer
from rankjax.scaling import ladder


def test_varies_one_field_only():
    found = ladder.along(rankmixer.Config(tokens=4, width=16), layers=(1, 2, 4))
    assert (found.name, found.axis, found.values) == ("rankmixer L", "L", (1, 2, 4))
    assert {(c.tokens, c.width) for c in found.configs} == {(4, 16)}
    assert ladder.along(hstu.Config(history=8), history=(8, 16)).axis == "S"


@pytest.mark.parametrize(
    "sizes, match",
    [
        ({"tokens": (2,)}, "expected one of"),  # a plain network has no tokens
        ({"width": (8,), "layers": (1,)}, "found fields"),
        ({"width": (16, 8)}, "increasing"),
        ({"width": ()}, "increasing"),
        ({"width": (8, 8)}, "increasing"),
    ],
)
def test_refuses(sizes, match):
    with pytest.raises(ValueError, match=match):
        ladder.along(dlrm.Config(), **sizes)


def test_compound_sizes_grow_along_several_axes():
    base = rankmixer.Config(tokens=4, layers=1, width=16)
    found = ladder.compound(base, {}, {"layers": 2}, {"tokens": 8, "layers": 2, "width": 32})
    assert (found.name, found.axis, found.values) == ("rankmixer all", "all", (1, 2, 3))
    assert [(c.tokens, c.layers, c.width) for c in found.configs] == [
        (4, 1, 16),
        (4, 2, 16),
        (8, 2, 32),
    ]


@pytest.mark.parametrize(
    "steps, match",
    [
        ([{}], "found 1 sizes"),
        ([{}, {"expansion": 8}], "found fields"),
        ([{"layers": 2}, {"layers": 1, "width": 32}], "expected a larger size"),
        ([{}, {}], "expected a larger size"),
        ([{}, {"width": 18}], "no multiple"),
    ],
)
def test_a_compound_ladder_refuses(steps, match):
    with pytest.raises(ValueError, match=match):
        ladder.compound(rankmixer.Config(tokens=4, layers=1, width=16), *steps)


def test_a_size_that_the_architecture_refuses():
    with pytest.raises(ValueError, match="width"):
        ladder.along(rankmixer.Config(tokens=8, width=16), width=(12, 16))


def test_a_field_that_came_later_changes_no_identity_at_its_default():
    config = rankmixer.Config(tokens=4, width=16)
    known = ladder.identity(config)
    assert "experts" not in known and known["width"] == 16
    more = ladder.identity(rankmixer.Config(tokens=4, width=16, experts=2))
    assert more == {**known, "experts": 2}


def test_an_unknown_config():
    with pytest.raises(ValueError, match="expected a Config of"):
        ladder.architecture_of({"width": 8})
