"""Pooled histories against NumPy, one event at a time; padding and other samples are not read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import history_pooling
from tests import builders
from tests.references import din as reference

NAMES = ["item", "price", "tag", "action"]  # an event's features, in schema order


def pool(poolings=("mean", "target"), **options):
    return history_pooling.HistoryPooling(poolings, **({"attention_hidden": (6,)} | options))


def parameters(module, features, rng):
    return builders.moved(jax.jit(module.init)(jax.random.key(0), features), rng)


def values(module, params, features):
    # Input is no pytree: only its arrays leave the jitted function.
    found = jax.jit(lambda p, f: {x.name: x.value for x in module.apply(p, f)})(params, features)
    return {name: np.asarray(x) for name, x in found.items()}


@pytest.mark.parametrize("hidden", [(6,), (6, 3)])
@pytest.mark.parametrize("activation", history_pooling.ACTIVATIONS)
def test_is_the_mean_and_the_papers_target_attention(activation, hidden):
    rng = np.random.default_rng(0)
    batch = builders.batch(rng)
    features = builders.features(batch)
    module = pool(attention_activation=activation, attention_hidden=hidden)
    params = parameters(module, features, rng)
    got = values(module, params, features)
    assert sorted(got) == sorted(f"history_{p}.{n}" for p in ("mean", "target") for n in NAMES)
    p = builders.float64(params["params"]["attention"])
    for row, candidate in np.argwhere(batch.candidate_mask):
        one = builders.one(batch, row, candidate)
        want = {
            "mean": reference.mean(one["history"]),
            "target": reference.target(one["history"], one["candidate"], p, activation),
        }
        for kind, x_w in want.items():
            found = [got[f"history_{kind}.{n}"][row, candidate] for n in NAMES]
            np.testing.assert_allclose(np.concatenate(found), x_w, rtol=0, atol=2e-5)


def test_only_the_history_of_a_dense_feature_is_dense():
    features = builders.features(builders.batch(np.random.default_rng(0)))
    found = pool(("mean",)).apply({}, features)
    assert [x.name for x in found if x.dense] == ["history_mean.price"]


def test_parameter_count():
    features = builders.features(builders.batch(np.random.default_rng(0)))
    module = pool(("target",), attention_hidden=(6, 3), attention_activation="dice")
    params = module.init(jax.random.key(0), features)
    want = (4 * 9 + 4) * 6 + 6 + (6 * 3 + 3) + (3 + 1) + 3 * (6 + 3)
    assert builders.count(params) == want
    assert not pool(("mean",)).init(jax.random.key(0), features)


@pytest.mark.parametrize("samples_per_row", [2, 4])
def test_packed_rows_pool_like_rows_of_their_own(samples_per_row):
    rng = np.random.default_rng(0)
    batch = builders.batch(rng)
    features, module = builders.features(batch), pool()
    params = parameters(module, features, rng)
    want = values(module, params, features)
    got = values(module, params, builders.packed(batch, samples_per_row))
    valid = batch.candidate_mask
    for name, x in got.items():
        alone = x.reshape(want[name].shape)[valid]
        np.testing.assert_allclose(alone, want[name][valid], rtol=0, atol=1e-5)


def test_what_stands_at_padding_is_never_read():
    rng = np.random.default_rng(0)
    batch = builders.batch(rng)
    features, module = builders.features(batch), pool()
    params = parameters(module, features, rng)
    mask = jnp.asarray(batch.history_mask)[..., None]
    dirty = {k: jnp.where(mask, x, jnp.nan) for k, x in features.history.items()}
    dirty = dataclasses.replace(features, history=dirty)
    want, got = values(module, params, features), values(module, params, dirty)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])

    def total(p, f):
        return sum(x.value.sum() for x in module.apply(p, f))

    for grad in jax.tree.leaves(jax.jit(jax.grad(total))(params, dirty)):
        assert np.isfinite(grad).all()


def test_an_empty_history_gives_zeros():
    rng = np.random.default_rng(0)
    batch = builders.batch(rng, lengths=(0, 0, 0, 0))
    features, module = builders.features(batch), pool()
    got = values(module, parameters(module, features, rng), features)
    assert all((x == 0).all() for x in got.values())


def test_the_order_of_candidates_is_the_order_of_the_output():
    rng = np.random.default_rng(0)
    batch = builders.batch(rng, candidates=(4, 4, 4, 4))
    features, module = builders.features(batch), pool()
    params = parameters(module, features, rng)
    order = np.array([2, 0, 3, 1])
    shuffled = {k: x[:, order] for k, x in features.candidate.items()}
    want = values(module, params, features)
    got = values(module, params, dataclasses.replace(features, candidate=shuffled))
    for name in want:
        np.testing.assert_allclose(got[name], want[name][:, order], rtol=0, atol=1e-6)
    spread = np.ptp(want["history_target.item"][0], axis=0)
    assert spread.min() > 0  # target attention does look at the candidate


def test_without_user_features_samples_are_still_kept_apart():
    rng = np.random.default_rng(0)
    batch = builders.batch(rng)
    schema = dataclasses.replace(
        batch.schema, features=tuple(f for f in batch.schema.features if f.side != "user")
    )
    bare = dataclasses.replace(batch, user={}, schema=schema)
    module = pool(("mean",))
    want = values(module, {}, builders.features(batch))
    for features in (builders.features(bare), builders.packed(bare, 2)):
        got = values(module, {}, features)
        for name in want:
            x = got[name].reshape(want[name].shape)[batch.candidate_mask]
            np.testing.assert_allclose(x, want[name][batch.candidate_mask], rtol=0, atol=1e-6)


def test_target_attention_needs_an_item_feature():
    features = builders.features(builders.batch(np.random.default_rng(0)))
    rest = tuple(f for f in features.schema.features if f.side != "item")
    schema = dataclasses.replace(features.schema, features=rest)
    features = dataclasses.replace(features, schema=schema)
    with pytest.raises(ValueError, match="no feature of side 'item'"):
        pool(("target",)).init(jax.random.key(0), features)
    assert [x.name for x in pool(("mean",)).apply({}, features)] == ["history_mean.action"]


def test_a_schema_without_history_features_gives_no_inputs():
    features = builders.features(builders.batch(np.random.default_rng(0)))
    rest = tuple(f for f in features.schema.features if f.side in ("user", "context"))
    schema = dataclasses.replace(features.schema, features=rest)
    assert pool().apply({}, dataclasses.replace(features, schema=schema)) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (((), (36,), "sigmoid"), r"pooling=\(\)"),
        ((("max",), (36,), "sigmoid"), "pooling='max'"),
        ((("mean", "mean"), (36,), "sigmoid"), "pooling=.*different names"),
        ((("mean",), (), "sigmoid"), r"attention_hidden=\(\)"),
        ((("mean",), (8, 0), "sigmoid"), r"attention_hidden\[1\]=0"),
        ((("mean",), (36,), "relu"), "attention_activation='relu'"),
    ],
)
def test_bad_settings_are_refused(arguments, match):
    with pytest.raises(ValueError, match="a.Config: " + match):
        history_pooling.check("a.Config", *arguments)
