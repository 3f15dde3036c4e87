"""Features and labels of a schema.toml: what contradicts itself is refused, the rest is kept."""

import pytest

from rankjax.data.own import inputs


@pytest.mark.parametrize(
    "test",
    [
        *({}, {"equals": 1, "above": 2}, {"one_of": (1,), "at_least": 0}),
        *({"at_least": 0, "above": 0}, {"equals": 1, "below": 2}, {"equals": 1, "one_of": (1,)}),
        {"at_least": 0, "above": 0, "below": 5},
    ],
)
def test_a_condition_has_one_test_or_a_range(test):
    with pytest.raises(ValueError, match=r"expected exactly one of equals, .*, below, or a range"):
        inputs.Condition(column="c", **test)


@pytest.mark.parametrize("equals", [(1, 2), {"a": 1}])
def test_equals_compares_with_one_value(equals):
    with pytest.raises(ValueError, match=r"equals: found .*, expected one value"):
        inputs.Condition(column="c", equals=equals)


@pytest.mark.parametrize(
    "test",
    [
        {"equals": False},
        {"equals": 0},
        {"one_of": ("a", "b")},
        {"at_least": 0.0},
        {"above": 0},
        {"below": 0},
    ],
)
def test_a_test_that_is_false_or_zero_is_a_test(test):
    condition = inputs.Condition(column="c", **test)
    assert inputs.Label(column="c", weight="w", **test).condition == condition
    (name,) = test
    assert getattr(condition, name) == test[name]


def test_a_label_without_a_test_is_its_column():
    assert inputs.Label(column="c").condition is None
    with pytest.raises(ValueError, match="expected exactly one of equals"):
        inputs.Label(column="c", equals=1, above=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"derive": "minute"}, r"derive: found 'minute', expected \['hour', 'weekday'"),
        ({"derive": "hour", "column": "c"}, "found both derive='hour' and column='c'"),
        ({"ids": "hash"}, "found ids='hash' with rows=None, expected `rows`"),
        ({"ids": "given"}, "found ids='given' with rows=None, expected `rows`"),
        ({"ids": "vocabulary", "rows": 9}, "found ids='vocabulary' with rows=9"),
        ({"rows": 1}, r"rows: found 1, expected 2 .. 2\*\*31 - 1"),
        ({"rows": 2**31}, "rows: found 2147483648"),
        ({"min_count": 0}, "min_count: found 0, expected >= 1"),
        ({"kind": "ids", "values": 0}, "values: found 0, expected >= 1"),
        ({"at": "c"}, "at needs kind='dense', found 'id'"),
        ({"transform": "log"}, "transform needs kind='dense', found 'id'"),
        ({"separator": "|"}, "separator needs kind='ids', found 'id'"),
        ({"kind": "dense", "separator": "|"}, "separator needs kind='ids', found 'dense'"),
    ],
)
def test_contradictions_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        inputs.Input(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"derive": "hour"},
        {"ids": "given", "rows": 2},
        {"ids": "hash", "rows": 2**31 - 1},
        {"ids": "vocabulary", "min_count": 1},
        {"rows": 5},  # of the ids that [ids] says
        {"kind": "ids", "separator": "|", "values": 1},
        {"kind": "dense", "transform": "none", "at": "c"},
    ],
)
def test_what_fits_together_is_kept(given):
    found = inputs.Input(**given)
    assert {name: getattr(found, name) for name in given} == given


def test_sides():
    action, hour, age = (
        {"x": inputs.Input(**given)}
        for given in ({"action": True}, {"derive": "hour"}, {"derive": "log_age"})
    )
    for side in ("context", "catalogue"):
        with pytest.raises(
            ValueError, match=r"features.x: found an action, expected it in \[events\]"
        ):
            inputs.check_side(action, side)
        with pytest.raises(ValueError, match=r"features.x: found derive='log_age', expected it on"):
            inputs.check_side(age, side)
    with pytest.raises(ValueError, match=r"features.x: found derive='hour'"):
        inputs.check_side(hour, "catalogue")
    for features in (action, hour, age, {"x": inputs.Input(column="c")}):
        inputs.check_side(features, "event")
    inputs.check_side({"x": inputs.Input(column="c")}, "catalogue")
    inputs.check_side(hour, "context")
