"""A column that lies in several files, read as if it were one array."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class Joined(np.lib.mixins.NDArrayOperatorsMixin):
    """Rows of several arrays in one order: slices, indices and `take` read what they ask for only.

    Arithmetic and comparisons read the whole column into memory, as NumPy functions do.

    Args:
      parts: [n_k] or [n_k, M] each, of one dtype; at least one.
      order: int64 [n], for each row its place in the parts laid one behind the other; None: as they
        lie.
    """

    def __init__(self, parts: Sequence[np.ndarray], order: np.ndarray | None = None):
        self.parts, self.order = tuple(parts), order
        self.starts = np.cumsum([0, *map(len, self.parts)])
        self.dtype = self.parts[0].dtype
        rows = int(self.starts[-1]) if order is None else len(order)
        self.shape = (rows, *self.parts[0].shape[1:])
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, rows: np.ndarray, axis: int = 0, mode: str = "raise") -> np.ndarray:
        """As `ndarray.take` along axis 0; rows may have any shape. mode: "raise" or "clip"."""
        rows = np.asarray(rows)
        if axis != 0 or mode not in ("raise", "clip"):
            raise ValueError(f"Joined.take: axis={axis}, mode={mode!r}, expected 0, raise or clip")
        n = len(self)
        if mode == "clip":
            place = np.clip(rows.ravel(), 0, n - 1)
        else:
            place = rows.ravel()
            if len(place) and not (-n <= place.min() and place.max() < n):
                raise IndexError(f"Joined: found rows {place.min()} .. {place.max()} of {n}")
            place = np.where(place < 0, place + n, place)
        if self.order is not None:
            place = self.order[place]
        return self._gather(place).reshape((*rows.shape, *self.shape[1:]))

    def _gather(self, place: np.ndarray) -> np.ndarray:
        """Rows by their places in the parts, part after part."""
        found = np.empty((len(place), *self.shape[1:]), self.dtype)
        of = np.searchsorted(self.starts, place, side="right") - 1
        # NumPy sorts 16 bits by radix, and more bits by comparisons.
        of = of.astype(np.uint16) if len(self.parts) <= 1 << 16 else of
        by_part = np.argsort(of, kind="stable")
        ends = np.searchsorted(of[by_part], np.arange(len(self.parts) + 1))
        for k in np.flatnonzero(np.diff(ends)):
            at = by_part[ends[k] : ends[k + 1]]
            found[at] = self.parts[k][place[at] - self.starts[k]]
        return found

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            first, stop, step = key.indices(len(self))
            return self.take(np.arange(first, stop, step))
        if isinstance(key, tuple) or key is None or key is Ellipsis:
            return np.asarray(self)[key]
        key = np.asarray(key)
        if key.dtype == bool:
            if key.shape != self.shape[:1]:
                return np.asarray(self)[key]
            key = np.flatnonzero(key)
        found = self.take(key)
        return found if found.ndim else found[()]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("Joined: a column of several files is no array without a copy")
        found = np.concatenate(self.parts)
        found = found if self.order is None else found[self.order]
        return found if dtype is None else found.astype(dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        inputs = tuple(np.asarray(x) if isinstance(x, Joined) else x for x in inputs)
        return getattr(ufunc, method)(*inputs, **kwargs)
