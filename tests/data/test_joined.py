"""joined: several arrays read as one give what their concatenation gives."""

import numpy as np
import pytest

from rankjax.data.joined import Joined


def pairs():
    """(Joined, the array that it stands for): plain, reordered, of rows of 3; one part is empty."""
    g = np.random.default_rng(0)
    for width in ((), (3,)):
        parts = [g.integers(0, 100, (n, *width)).astype(np.int32) for n in (4, 0, 7, 1)]
        whole, order = np.concatenate(parts), g.permutation(12)
        yield Joined(parts), whole
        yield Joined(parts, order), whole[order]
        yield Joined(parts, order[:5]), whole[order[:5]]


@pytest.mark.parametrize("number", range(6))
def test_reads_as_the_whole_array(number):
    column, whole = list(pairs())[number]
    n = len(whole)
    assert (len(column), column.shape, column.ndim) == (n, whole.shape, whole.ndim)
    assert column.dtype == whole.dtype
    rows = np.array([[0, n - 1, 2], [3, 3, 1]])
    for key in (
        *(slice(None), slice(1, n - 1), slice(n, 0, -2), slice(3, 3)),
        *(0, -1, np.int64(2), rows, rows[0].tolist(), np.array([-1, 0])),
        *(np.arange(n) % 2 == 0, np.zeros(n, bool), np.empty(0, np.int64)),
        *(..., (slice(None), None)),
    ):
        found = column[key]
        np.testing.assert_array_equal(found, whole[key])
        assert np.asarray(found).dtype == whole.dtype
    far = np.array([[-5, 0], [n, n + 9]])
    np.testing.assert_array_equal(
        column.take(far, axis=0, mode="clip"), whole.take(far, axis=0, mode="clip")
    )
    np.testing.assert_array_equal(column.take(rows), whole.take(rows, axis=0))
    np.testing.assert_array_equal(np.asarray(column), whole)
    np.testing.assert_array_equal(np.asarray(column, np.float64), whole.astype(np.float64))
    np.testing.assert_array_equal(column == 3, whole == 3)
    np.testing.assert_array_equal(2 + column * column, 2 + whole * whole)


def test_refused():
    column = Joined([np.arange(3), np.arange(2)])
    for rows in ([5], [-6]):
        with pytest.raises(IndexError, match=r"of 5"):
            column.take(rows)
    for wrong in ({"axis": 1}, {"mode": "wrap"}):
        with pytest.raises(ValueError, match="expected 0, raise or clip"):
            column.take([0], **wrong)
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(column, copy=False)
