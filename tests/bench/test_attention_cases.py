"""attention_cases: rows of users, and what they cost by formula, against counts pair by pair."""

import numpy as np
import pytest

from rankjax.batch import HISTORY
from rankjax.bench import attention_cases as cases


@pytest.mark.parametrize("layout", ["full", "jagged"])
def test_pairs_are_those_that_the_rule_allows(layout):
    s = cases.shape(layout, 40, 200, bias=True, heads=2, width=8)
    assert len(s.lengths) == 5 and all(sum(users) == 40 for users in s.lengths)
    p = cases.problem(s)
    allowed = int(cases.RULE.allow(p.tokens, p.tokens).sum())
    assert s.pairs == allowed
    assert (layout == "full") == (s.pairs == 5 * 40 * 41 // 2)
    assert s.all_pairs == 5 * 2 * 40 * 40
    # Two products of 2 * width FLOPs a pair and head; backward five.
    assert s.flops() == {"forward": 4 * 8 * 2 * allowed, "forward_backward": 14 * 8 * 2 * allowed}


def test_rows_hold_about_as_many_tokens_as_asked():
    assert len(cases.shape("full", 64, 1000, bias=False).lengths) == 15
    assert len(cases.shape("full", 4096, 1000, bias=False).lengths) == 1


def test_tokens_leave_padding_behind_users():
    t = cases.tokens_of([[2, 3], [1]], 7)
    np.testing.assert_array_equal(t.role > 0, [[1] * 5 + [0] * 2, [1] + [0] * 6])
    np.testing.assert_array_equal(t.segment[0, :5], [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(t.position[0, :5], [0, 1, 0, 1, 2])
    assert (np.asarray(t.role)[0, :5] == HISTORY).all()
    times = np.asarray(t.bias_time)[0]
    assert times[1] > times[0] and times[4] > times[3] > times[2] > 0


def test_programs_are_compiled_and_give_gradients():
    p = cases.problem(cases.shape("jagged", 24, 24, bias=True, heads=1, width=4))
    attention = lambda p, arrays, bias: cases.silu_attention(p, arrays, bias, implementation="xla")
    found = cases.programs(p, attention)
    out = found["forward"][0](*found["forward"][1])
    again, (arrays, bias) = found["forward_backward"][0](*found["forward_backward"][1])
    np.testing.assert_array_equal(out, again)
    assert [x.shape for x in arrays] == [out.shape] * 3
    assert bias.position.shape == (47,) and bias.time.shape == (129,)
