"""Truth tables, written by hand from the papers' masks."""

import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import masks
from rankjax.batch import CANDIDATE, CONTEXT, HISTORY, PAD, Tokens

ROLES = {"u": CONTEXT, "h": HISTORY, "c": CANDIDATE, ".": PAD}


def tokens(roles, times, positions, segments=None):
    """One row; the candidates' groups are their slots."""
    row = {
        "segment": segments or [0] * len(roles),
        "role": [ROLES[x] for x in roles],
        "time": times,
        "position": positions,
        "group": list(range(len(roles))),
        "bias_time": times,
    }
    return Tokens(**{name: jnp.asarray([x], jnp.int32) for name, x in row.items()})


def table(*rows):
    return np.array([[x == "1" for x in row.replace(" ", "")] for row in rows])


def test_hstu_with_context_and_three_candidate_times():
    # Two context tokens, three events at 10, 20, 30, candidates at 20, 31, 5, padding.
    t = tokens("uuhhhccc.", [0, 0, 10, 20, 30, 20, 31, 5, 0], [0, 1, 2, 3, 4, 3, 5, 2, 0])
    want = table(
        "10 000 000 0",
        "11 000 000 0",
        "11 100 000 0",
        "11 110 000 0",
        "11 111 000 0",
        "11 100 100 0",  # the event of its own time is unread
        "11 111 010 0",
        "11 000 001 0",
        "00 000 000 0",
    )
    np.testing.assert_array_equal(masks.MaskRule().allow(t, t)[0], want)


def test_mtgr_nine_tokens():
    # age, ctr, seq1, seq2 static; rt2 (time 10) earlier than rt1 (time 20); a target after both,
    # one between them, one before both.
    t = tokens("uuuuhhccc", [0, 0, 0, 0, 10, 20, 25, 15, 5], list(range(9)))
    want = table(
        "1111 00 000",
        "1111 00 000",
        "1111 00 000",
        "1111 00 000",
        "1111 10 000",
        "1111 11 000",
        "1111 11 100",
        "1111 10 010",
        "1111 00 001",
    )
    rule = masks.MaskRule(context="full", history="time")
    np.testing.assert_array_equal(rule.allow(t, t)[0], want)


def test_events_of_one_time():
    t = tokens("hhh", [7, 7, 9], [0, 1, 2])
    by_position = masks.MaskRule().allow(t, t)[0]
    by_time = masks.MaskRule(history="time").allow(t, t)[0]
    full = masks.MaskRule(history="full").allow(t, t)[0]
    np.testing.assert_array_equal(by_position, table("100", "110", "111"))
    np.testing.assert_array_equal(by_time, table("110", "110", "111"))
    np.testing.assert_array_equal(full, table("111", "111", "111"))


def test_packed_samples_do_not_read_each_other():
    t = tokens("uuhhhcc", [0, 0, 1, 1, 2, 9, 9], [0, 0, 1, 1, 2, 2, 3], [0, 1, 0, 1, 1, 0, 1])
    want = table(
        "10 000 00",
        "01 000 00",
        "10 100 00",
        "01 010 00",
        "01 011 00",
        "10 100 10",
        "01 011 01",
    )
    np.testing.assert_array_equal(masks.MaskRule().allow(t, t)[0], want)


def test_candidates_of_one_group_read_each_other():
    t = tokens("ccc", [1, 1, 1], [0, 0, 0])
    t = Tokens(**(vars(t) | {"group": jnp.asarray([[4, 4, 5]])}))
    np.testing.assert_array_equal(masks.MaskRule().allow(t, t)[0], table("110", "110", "001"))


def test_a_block_of_the_mask_is_the_mask_of_a_block():
    t = tokens("uhhhcc", [0, 3, 4, 9, 4, 10], [0, 1, 2, 3, 2, 4])
    q, k = (Tokens(**{n: x[:, s] for n, x in vars(t).items()}) for s in (slice(2, 6), slice(1, 4)))
    rule = masks.MaskRule(context="full", history="time")
    np.testing.assert_array_equal(rule.allow(q, k), rule.allow(t, t)[:, 2:6, 1:4])


@pytest.mark.parametrize("field", ["context", "history"])
def test_unknown_values_are_refused(field):
    with pytest.raises(ValueError, match=f"MaskRule: {field}='backwards', expected one of"):
        masks.MaskRule(**{field: "backwards"})
