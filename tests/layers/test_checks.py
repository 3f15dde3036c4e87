"""The checks that Configs share: what they let pass, and how they name what they do not."""

import dataclasses

import pytest

from rankjax.layers import checks


def test_good_values_pass():
    checks.one_of("a.Config", "norm", "rms", ("layer", "rms"))
    checks.at_least("a.Config", 0, layers=0, width=3)
    checks.dtype("a.Config", "bfloat16")


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", None, True])
def test_at_least_takes_integers_from_the_least_on(value):
    with pytest.raises(ValueError, match=r"a.Config: width=.*, expected an integer >= 1"):
        checks.at_least("a.Config", 1, layers=1, width=value)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"a.Config: norm='x', expected one of \('layer', 'rms'\)"):
        checks.one_of("a.Config", "norm", "x", ("layer", "rms"))
    with pytest.raises(ValueError, match="dtype='int8', expected one of"):
        checks.dtype("a.Config", "int8")


@pytest.mark.parametrize("value", [0, 1.5, -0.1, "half", None, True, float("nan")])
def test_a_share_is_a_number_above_0_and_at_most_1(value):
    checks.share("a.Config", active=1, other=0.25)
    with pytest.raises(ValueError, match=r"a\.Config: active=.*, expected 0 < share <= 1"):
        checks.share("a.Config", active=value)


def test_as_tuple_changes_lists_only():
    assert checks.as_tuple([1, 2]) == (1, 2)
    assert checks.as_tuple("ab") == "ab" and checks.as_tuple((1,)) == (1,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flagged:
    layers: int = 1
    norm: bool = True


@pytest.mark.parametrize("value", ["false", 0, None])
def test_flags_are_true_or_false_and_nothing_that_passes_for_it(value):
    checks.flags("a.Config", Flagged(norm=False))
    with pytest.raises(ValueError, match=r"a\.Config: norm=.*, expected True or False"):
        checks.flags("a.Config", Flagged(norm=value))
