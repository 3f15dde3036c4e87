"""Sizes, random parameters and random features for the blocks that `rankjax bench models` times."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rankjax.batch import Features
from rankjax.schema import Feature, Schema, Table, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """N candidates of T feature tokens; R rows of S events and C candidates; D wide, H heads."""

    candidates: int  # N
    tokens: int  # T
    rows: int  # R
    history: int  # S
    listed: int  # C
    width: int  # D
    heads: int = 2  # H


SIZES = {
    # So small that what is left is starting operations.
    "tiny": Size(candidates=6, tokens=4, rows=3, history=5, listed=2, width=8),
    # What studies on two cores use, and one where matrix products take most of the time.
    "small": Size(candidates=512, tokens=8, rows=16, history=50, listed=8, width=32),
    "large": Size(candidates=512, tokens=16, rows=16, history=111, listed=16, width=64),
}


def flat(params: Any) -> dict[str, np.ndarray]:
    """Parameters by their path, as in "ffn/ffn_in/kernel"."""
    return {k: np.asarray(x) for k, x in traverse_util.flatten_dict(params, sep="/").items()}


def random_params(shapes: Any, rng: np.random.Generator) -> Any:
    """Of the size that initialisers give, and none at 0 or 1, so that a forgotten one is seen."""

    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        x = rng.normal(size=shape).astype(np.float32)
        if path[-1] == "scale":
            return 1 + 0.1 * x
        return 0.1 * x if len(shape) < 2 or path[-1] == "bias" else x / np.float32(shape[-2] ** 0.5)

    found = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict({k: draw(k, x.shape) for k, x in found.items()})


def normal(*shape: int) -> np.ndarray:
    """Standard normal float32, the same for the same shape."""
    return np.random.default_rng(list(shape)).normal(size=shape).astype(np.float32)


def features(s: Size) -> Features:
    """R requests of C candidates; the histories' lengths fall from S to about S / 2."""
    tables = (Table(name="item", rows=2), Table(name="age", rows=2), Table(name="action", rows=2))
    found = (
        Feature(name="age", side="user", group="user", table="age"),
        Feature(name="item", side="item", group="item", table="item"),
        Feature(name="action", side="event", group="action", table="action", action=True),
    )
    R, S, C, E = s.rows, s.history, s.listed, s.width
    rng = np.random.default_rng(2)
    lengths_r1 = S - (np.arange(R) * S // (2 * R))[:, None]
    valid_rs, slot_s = np.arange(S) < lengths_r1, np.arange(S, dtype=np.int32)
    zero_rc = jnp.zeros((R, C), jnp.int32)
    order_rs = np.where(valid_rs, slot_s - lengths_r1, 0).astype(np.int32)
    candidate = rng.normal(size=(R, C, E)).astype(np.float32)
    history = {n: rng.normal(size=(R, S, E)).astype(np.float32) for n in ("item", "action")}
    return Features(
        user={"age": jnp.asarray(rng.normal(size=(R, 1, E)).astype(np.float32))},
        history={name: jnp.asarray(x) for name, x in history.items()},
        candidate={"item": jnp.asarray(candidate)},
        history_sample=jnp.where(valid_rs, 0, -1),
        candidate_sample=zero_rc,
        history_time=jnp.asarray(order_rs * 3600),
        candidate_time=zero_rc,
        history_order=jnp.asarray(order_rs),
        candidate_order=zero_rc,
        history_action=jnp.asarray(np.where(valid_rs, rng.integers(1, 4, (R, S)), 0)),
        schema=Schema(
            tables=tables, features=found, tasks=(Task(name="click"),), primary_task="click"
        ),
        one_time=True,
    )
