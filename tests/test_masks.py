"""Truth tables, written by hand from the papers' masks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankjax import masks
from rankjax.batch import CANDIDATE, CONTEXT, GLOBAL, HISTORY, PAD, Tokens

ROLES = {"u": CONTEXT, "h": HISTORY, "g": GLOBAL, "c": CANDIDATE, ".": PAD}


def tokens(roles, times, positions, segments=None, groups=None):
    """One row; the candidates' groups are their slots, unless given."""
    row = {
        "segment": segments or [0] * len(roles),
        "role": [ROLES[x] for x in roles],
        "time": times,
        "position": positions,
        "group": groups or list(range(len(roles))),
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


def test_hstu_code_with_contextual_tokens():
    """id(p) = max(p - c + 1, 0), clipped at max_id = n - c + 1 - m; allow = (i == j) or
    id_i > id_j, or (id_i == 0 and id_j < max_id): the public code's mask, number by number."""
    c, history, m = 3, 4, 2
    n = c + history + m
    ids = np.clip(np.arange(n) - c + 1, 0, n - c + 1 - m)
    want = (np.arange(n)[:, None] == np.arange(n)) | (ids[:, None] > ids)
    want |= (ids[:, None] == 0) & (ids < ids.max())
    times = [0] * c + list(range(1, history + 1)) + [9, 9]
    positions = [*range(c + history), c + history, c + history]
    t = tokens("u" * c + "h" * history + "c" * m, times, positions)
    got = masks.MaskRule(context="history").allow(t, t)[0]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("window", [0, 1, 2, 9])
def test_hstu_code_with_a_window(window):
    """allow and (id_i - id_j <= w), where candidates share the id after the last event's."""
    history, m = 5, 2
    ids = np.minimum(np.arange(history + m), history)
    want = (np.arange(history + m)[:, None] == np.arange(history + m)) | (ids[:, None] > ids)
    want &= ids[:, None] - ids <= window
    t = tokens("hhhhhcc", [1, 2, 3, 4, 5, 9, 9], [0, 1, 2, 3, 4, 5, 5])
    np.testing.assert_array_equal(masks.MaskRule(window=window).allow(t, t)[0], want)


def test_grab_rows_of_four_events():
    """h1, h2, h3, h4 partial, h'1 .. h'4 full tokens of the same times: 20 allowed cells."""
    t = tokens("hhhhcccc", [1, 2, 3, 4, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2, 3])
    want = table(
        "1000 0000",
        "1100 0000",
        "1110 0000",
        "1111 0000",
        "0000 1000",
        "1000 0100",
        "1100 0010",
        "1110 0001",
    )
    got = np.asarray(masks.MaskRule().allow(t, t)[0])
    np.testing.assert_array_equal(got, want)
    assert got.sum() == 4 * 5


def test_longer_is_the_printed_mask_reversed():
    """Printed: globals first, newest event first, j >= i. Ours: [H old -> new | user | candidate],
    everything reversed, so that a token reads what stands before it and itself."""
    history, users = 3, 2
    n = history + users + 1
    printed = np.arange(n)[None, :] >= np.arange(n)[:, None]  # candidate, users, events
    t = tokens("hhhggc", [1, 2, 3, 3, 3, 9], list(range(n)))
    got = masks.MaskRule().allow(t, t)[0]
    np.testing.assert_array_equal(got, printed[::-1, ::-1])


def test_longer_with_two_candidates_and_padding():
    t = tokens("h.hgcc", [1, 0, 2, 0, 9, 9], [0, 1, 2, 3, 4, 4])
    want = table("100 000", "000 000", "101 000", "101 100", "101 110", "101 101")
    np.testing.assert_array_equal(masks.MaskRule().allow(t, t)[0], want)


def test_onetrans_pyramid():
    """Three events, two candidates of two NS tokens each; the pyramid's queries are the newest
    event and all NS tokens, its keys everything."""
    t = tokens(
        "hhhcccc", [1, 2, 3, 9, 9, 9, 9], [0, 1, 2, 3, 4, 3, 4], groups=[0, 0, 0, 4, 4, 5, 5]
    )
    want = table(
        "100 00 00",
        "110 00 00",
        "111 00 00",
        "111 10 00",
        "111 11 00",
        "111 00 10",
        "111 00 11",
    )
    rule = masks.MaskRule(candidates="causal")
    np.testing.assert_array_equal(rule.allow(t, t)[0], want)
    kept = Tokens(**{name: x[:, 2:] for name, x in vars(t).items()})
    np.testing.assert_array_equal(rule.allow(kept, t)[0], want[2:])


def test_context_is_read_at_any_distance():
    t = tokens("uhhhc", [0, 1, 2, 3, 9], [0, 1, 2, 3, 4])
    want = table("1 000 0", "1 100 0", "1 110 0", "1 011 0", "1 001 1")
    np.testing.assert_array_equal(masks.MaskRule(window=1).allow(t, t)[0], want)


def test_a_block_of_the_mask_is_the_mask_of_a_block():
    t = tokens("uhhhcc", [0, 3, 4, 9, 4, 10], [0, 1, 2, 3, 2, 4])
    q, k = (Tokens(**{n: x[:, s] for n, x in vars(t).items()}) for s in (slice(2, 6), slice(1, 4)))
    rule = masks.MaskRule(context="full", history="time")
    np.testing.assert_array_equal(rule.allow(q, k), rule.allow(t, t)[:, 2:6, 1:4])


@pytest.mark.parametrize("field", ["context", "history", "candidates"])
def test_unknown_values_are_refused(field):
    with pytest.raises(ValueError, match=f"MaskRule: {field}='backwards', expected one of"):
        masks.MaskRule(**{field: "backwards"})


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match="window=-1, expected >= 0 or None"):
        masks.MaskRule(window=-1)


RULES = [
    masks.MaskRule(context=context, history=history, candidates=candidates, window=window)
    for context, history, candidates, window in itertools.product(
        ("causal", "full", "history"), ("causal", "time", "full"), ("group", "causal"), (None, 2)
    )
]


@functools.cache
def judged(rule):
    """(allowed, possible and certain by blocks of 3 and 4, by single tokens), compiled once."""

    @jax.jit
    def judge(q, k):
        by = lambda f, a, b: f(masks.ranges(q, a), masks.ranges(k, b))
        both = rule.possible, rule.certain
        return rule.allow(q, k), *(by(f, 3, 4) for f in both), *(by(f, 1, 1) for f in both)

    return judge


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_properties_of_every_rule(rule, data):
    """No pair in blocks without room, none of padding or of other samples, no later event."""
    least = {"segment": (0, 1), "role": (0, 4), "time": (-3, 3), "position": (0, 5)}
    least |= {"group": (-1, 3), "bias_time": (0, 0)}

    def draw(size, block):
        fields = {
            field: np.array([data.draw(st.lists(st.integers(*ends), min_size=size, max_size=size))])
            for field, ends in least.items()
        }
        for field in ("segment", "role", "group"):  # blocks that are all alike, now and then
            if data.draw(st.booleans()):
                fields[field] = fields[field][:, np.arange(size) // block * block]
        return fields

    q, k = draw(6, 3), draw(8, 4)
    of = lambda fields: Tokens(**{f: jnp.asarray(x, jnp.int32) for f, x in fields.items()})
    found = (np.asarray(x)[0] for x in judged(rule)(of(q), of(k)))
    allow, possible, certain, possible_one, certain_one = found
    room, sure = (np.repeat(np.repeat(x, 3, axis=0), 4, axis=1) for x in (possible, certain))
    assert not np.any(allow & ~room) and not np.any(sure & ~allow)
    np.testing.assert_array_equal(possible_one, allow)  # a single token's ranges say all
    np.testing.assert_array_equal(certain_one, allow)
    face = lambda field: (q[field][0][:, None], k[field][0][None, :])
    (q_role, k_role), (q_segment, k_segment) = face("role"), face("segment")
    assert not np.any(allow & ((q_role == PAD) | (k_role == PAD) | (q_segment != k_segment)))
    (q_time, k_time), (q_group, k_group) = face("time"), face("group")
    candidate = q_role == CANDIDATE
    assert not np.any(allow & candidate & (k_role == HISTORY) & (k_time >= q_time))
    assert not np.any(allow & (k_role == CANDIDATE) & (~candidate | (q_group != k_group)))


def test_blocks_of_a_causal_row_have_room_below_the_diagonal_only():
    n = 16
    t = tokens("h" * n, list(range(n)), list(range(n)))
    found = masks.MaskRule().possible(masks.ranges(t, 4), masks.ranges(t, 4))[0]
    np.testing.assert_array_equal(found, np.tril(np.ones((4, 4), bool)))


def test_blocks_of_a_causal_row_are_full_beside_the_diagonal():
    n = 16
    t = tokens("h" * n, list(range(n)), list(range(n)))
    found = masks.MaskRule().certain(masks.ranges(t, 4), masks.ranges(t, 4))[0]
    np.testing.assert_array_equal(found, np.tril(np.ones((4, 4), bool), -1))
    window = masks.MaskRule(window=9)  # a query of the last block reads half of the second one
    found = window.certain(masks.ranges(t, 4), masks.ranges(t, 4))[0]
    np.testing.assert_array_equal(found[3], [False, False, True, False])


def test_blocks_of_two_samples_have_no_room_for_each_other():
    segments = [0] * 8 + [1] * 8
    t = tokens("h" * 16, [0] * 16, [*range(8)] * 2, segments=segments)
    found = masks.MaskRule(history="full").possible(masks.ranges(t, 4), masks.ranges(t, 4))[0]
    np.testing.assert_array_equal(found, np.kron(np.eye(2), np.ones((2, 2))).astype(bool))
