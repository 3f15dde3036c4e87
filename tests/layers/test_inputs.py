"""The list of a candidate's inputs: complete, in group order, each the feature that it names."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from rankjax.layers import inputs
from tests import builders


def test_names_groups_and_order():
    features = builders.features(builders.batch(np.random.default_rng(0)))
    pooled = [inputs.Input("history_mean.item", "history", jnp.zeros((4, 4, 4)))]
    found = inputs.collect(features, pooled)
    assert [(x.name, x.group) for x in found] == [
        ("user.age", "user"),
        ("user.spend", "user"),
        ("candidate.item", "item"),
        ("candidate.price", "item"),
        ("candidate.tag", "item"),
        ("candidate.hour", "context"),
        ("history_mean.item", "history"),
    ]
    assert [x.name for x in found if x.dense] == ["user.spend", "candidate.price"]
    assert list(inputs.groups(found)) == ["user", "item", "context", "history"]
    assert [x.name for x in inputs.groups(found)["user"]] == ["user.age", "user.spend"]
    assert inputs.concat(found, "bfloat16").shape == (4, 4, 4 + 1 + 4 + 1 + 4 + 4 + 4)
    assert inputs.concat(found, "bfloat16").dtype == jnp.bfloat16


def test_groups_follow_the_schema_whatever_side_a_feature_is_on():
    features = builders.features(builders.batch(np.random.default_rng(0)))
    move = {"hour": "user", "item": "history"}
    moved = tuple(
        dataclasses.replace(f, group=move.get(f.name, f.group)) for f in features.schema.features
    )
    schema = dataclasses.replace(features.schema, features=moved)
    features = dataclasses.replace(features, schema=schema)
    pooled = [inputs.Input("history_mean.item", "history", jnp.zeros((4, 4, 4)))]
    names = [x.name for x in inputs.collect(features, pooled)]
    assert names == [
        *("user.age", "user.spend", "candidate.hour"),
        *("candidate.item", "history_mean.item"),
        *("candidate.price", "candidate.tag"),
    ]


def test_every_candidate_of_a_packed_row_gets_its_own_samples_user():
    batch = builders.batch(np.random.default_rng(0))
    found = {x.name: x.value for x in inputs.collect(builders.packed(batch, 2), [])}
    got = np.asarray(found["user.age"]).reshape(4, 4, 4)
    for row, candidate in np.argwhere(batch.candidate_mask):
        np.testing.assert_array_equal(got[row, candidate], batch.user["age"][row, 0])
