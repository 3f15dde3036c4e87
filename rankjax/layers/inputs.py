"""From Features to what a feature-interaction model reads of one candidate: a list of inputs.

User features, the candidate's own (item and context) features and the compressed history, ordered
by semantic group, so that neighbours belong together when a tokenizer cuts the concatenation.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rankjax.batch import Features

HISTORY = "history"  # the group of pooled history features


@dataclasses.dataclass(frozen=True)
class Input:
    """One feature of every candidate: value [R, C, W]."""

    name: str  # "user.age", "candidate.item", "history_mean.item": unique in a list
    group: str
    value: jax.Array
    dense: bool = False  # a number (or its pooled history), W = 1; else an embedding


def collect(features: Features, pooled: list[Input]) -> list[Input]:
    """All inputs of the candidates, each [R, C, W], in the order of `schema.groups`.

    The pooled history comes last (in its place where the schema has a group "history"). Within a
    group: user features, candidate features, pooled history, each in schema order.
    """
    schema = features.schema
    found = [
        Input(f"user.{f.name}", f.group, features.user_of_candidate(f.name), f.kind == "dense")
        for f in schema.user
    ]
    found += [
        Input(f"candidate.{f.name}", f.group, features.candidate[f.name], f.kind == "dense")
        for f in schema.candidate
    ]
    found += pooled
    order = {group: i for i, group in enumerate(schema.groups)}
    return sorted(found, key=lambda x: order.get(x.group, len(order)))


def groups(inputs: list[Input]) -> dict[str, list[Input]]:
    """{group: its inputs}, in the order of the list."""
    found: dict[str, list[Input]] = {}
    for x in inputs:
        found.setdefault(x.group, []).append(x)
    return found


def concat(inputs: list[Input], dtype: str) -> jax.Array:
    """All inputs side by side, [R, C, sum of W], in `dtype`."""
    return jnp.concatenate([x.value.astype(dtype) for x in inputs], axis=-1)
