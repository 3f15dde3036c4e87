"""Every architecture trains on a mesh of eight devices as it does on one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rankjax import embedding, models, optim, packing, sharding, train
from tests.models import test_all_models as suite

pytestmark = pytest.mark.slow  # eight devices on two cores
R = 8
CONFIG = train.TrainConfig(
    tables=embedding.TableConfig(width=4, init_std=0.3),
    # Adam with its usual eps steps by the sign of what is rounding.
    optimizer=optim.OptimConfig(learning_rate=0.01, eps=1e-3),
)


@functools.cache
def batches():
    """Two steps' worth; one row is padding, as that of a ragged last batch is."""
    found = [suite.random_batch(samples=R, seed=seed) for seed in (0, 1)]
    none = np.full_like(found[1].candidate_sample[-1], -1)
    sample = np.concatenate([found[1].candidate_sample[:-1], none[None]])
    weights = np.where(sample[..., None] >= 0, found[1].weights, 0).astype(np.float32)
    found[1] = dataclasses.replace(found[1], candidate_sample=sample, weights=weights)
    return [batch.without_impression() for batch in found]


def trained(name, place):
    """(state, losses and logits of two steps), as NumPy."""
    schema, config = batches()[0].schema, suite.config_of(name)
    program = train.program(config, schema, CONFIG, place)
    rates = train.rates_of(CONFIG, 2)
    state, outs = train.init(config, schema, CONFIG, batches()[0], place), []
    for step, batch in enumerate(batches()):
        if place is not None:
            batch = jax.device_put(batch, place.rows)
        state, out = program.step(state, batch, rates(step), jax.random.key(0))
        outs.append((out["loss"], out["logits"], out["grad_norm"]["dense"]))
    if place is not None:
        assert not state.tables["user"]["embedding"].sharding.is_fully_replicated
    return jax.tree.map(np.asarray, (state, outs))


@functools.cache
def alone(name):
    return trained(name, None)


@pytest.mark.parametrize("name", sorted(models.MODELS))
@pytest.mark.parametrize("mesh", ["data 8", "fsdp 4, tensor 2"])
def test_eight_devices_train_as_one(name, mesh):
    config = {
        "data 8": sharding.MeshConfig(),
        "fsdp 4, tensor 2": sharding.MeshConfig(data=4, model=2, strategy="fsdp_tensor"),
    }[mesh]
    (got, outs), (want, wanted) = trained(name, sharding.placement(config)), alone(name)
    for g, w in zip(jax.tree.leaves(outs), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5)
    assert_same_state(got, want)


def assert_same_state(got, want):
    for g, w in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=2e-4)  # Adam's step is 0.01
    for name, table in want.tables.items():
        for kind, w in table.items():
            rows = len(w)  # behind them the mesh has some to spare, which nobody reads
            np.testing.assert_allclose(got.tables[name][kind][:rows], w, rtol=0, atol=1e-4)
            acc = got.table_optimizer[name][kind][:rows]
            np.testing.assert_allclose(acc, want.table_optimizer[name][kind], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["mtgr", "hstu", "onetrans", "rankmixer"])
def test_uneven_shares_train_as_one_device(name):
    """MTGR's dynamic batch: devices hold about as many entries, and so other numbers of samples."""
    batch, config = suite.different_lengths(), suite.config_of(name)
    place = sharding.placement(sharding.MeshConfig(), jax.devices()[:4])
    sizes = {"history": batch.history_sample.shape[1], "candidates": 6}
    shared = packing.pack_shares(batch, 4, **sizes)
    rows = len(shared.candidate_sample) // 4
    seats = shared.candidate_sample.reshape(4, -1, sizes["candidates"])
    assert len({int((seat.max(axis=1) + 1).sum()) for seat in seats}) > 1 and rows >= 1
    states = []
    for own, on in ((batch, None), (shared, place)):
        own = own.without_impression()
        program = train.program(config, batch.schema, CONFIG, on)
        state = train.init(config, batch.schema, CONFIG, own, on)
        put = own if on is None else on.put(own)
        rates = train.rates_of(CONFIG, 2)(1)
        state, out = program.step(state, put, rates, jax.random.key(0))
        states.append((jax.tree.map(np.asarray, state), float(out["loss"])))
    (want, loss), (got, found) = states
    assert found == pytest.approx(loss, rel=1e-5)
    assert_same_state(got, want)
