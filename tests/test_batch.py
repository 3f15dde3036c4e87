import dataclasses

import jax
import numpy as np
import pytest

from tests import builders, tiny


def test_is_a_pytree_with_static_schema():
    batch = tiny.batch().without_impression()
    again = jax.tree.map(lambda x: x, batch)
    assert again.schema is batch.schema and again.one_time and again.impression is None
    shapes = jax.jit(lambda b: b.candidate_mask.sum())(batch)
    assert int(shapes) == int((batch.candidate_sample >= 0).sum())


def test_user_of_candidate_is_of_its_own_sample():
    rng = np.random.default_rng(0)
    batch = builders.batch(rng)
    alone, packed = builders.features(batch), builders.packed(batch, 2)
    want = np.asarray(alone.user_of_candidate("age"))
    got = np.asarray(packed.user_of_candidate("age")).reshape(want.shape)
    valid = np.asarray(batch.candidate_mask)
    np.testing.assert_array_equal(got[valid], want[valid])


def test_several_times_are_refused_by_name():
    features = builders.features(builders.batch(np.random.default_rng(0)))
    features.require_one_time("m")
    with pytest.raises(ValueError, match=r"^m: .*different times"):
        dataclasses.replace(features, one_time=False).require_one_time("m")


def test_what_a_schema_misses_is_named():
    batch = tiny.batch()
    batch.check(batch.schema)
    history = {name: x for name, x in batch.history.items() if name != "dwell"}
    with pytest.raises(ValueError, match=r"history lacks \['dwell'\]; found .*'action'.*expected"):
        dataclasses.replace(batch, history=history).check(batch.schema)
    none = dataclasses.replace(batch, candidate_sample=batch.candidate_sample[:, :0])
    with pytest.raises(ValueError, match=r"shape \(6, 0\), expected at least one candidate"):
        none.check(batch.schema)
    none = dataclasses.replace(batch, history_sample=batch.history_sample[:, :0])
    with pytest.raises(ValueError, match=r"history_sample .* expected at least one history"):
        none.check(batch.schema)
