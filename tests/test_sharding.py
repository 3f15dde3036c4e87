"""The mesh, and which array is split along which axis."""

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from rankjax import models, sharding
from rankjax.scaling import presets, sizes
from tests import tiny

SCHEMA = tiny.tiny_schema(users=10, items=20, time_exact=True, tasks=("click", "like"))


def test_data_takes_what_the_others_leave():
    found = sharding.mesh(sharding.MeshConfig(model=2))
    assert dict(found.shape) == {"replica": 1, "data": 4, "model": 2}
    found = sharding.mesh(sharding.MeshConfig(replica=2, data=2, model=2))
    assert found.devices.shape == (2, 2, 2)
    assert dict(sharding.mesh(sharding.MeshConfig(), jax.devices()[:3]).shape)["data"] == 3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data": 3}, "8 devices, expected replica 1 x data 3 x model 1"),
        ({"model": 3}, "8 devices, expected replica 1 x data -1 x model 3"),
        ({"model": 16}, "8 devices, expected replica 1 x data -1 x model 16"),
        ({"model": 0}, "model=0, expected >= 1"),
        ({"data": 0}, "data=0, expected >= 1"),
        ({"strategy": "magic"}, "strategy='magic', expected one of"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        sharding.mesh(sharding.MeshConfig(**change))


def test_an_axis_stays_whole_where_it_cannot_be_split():
    on = sharding.mesh(sharding.MeshConfig(data=4, model=2))
    rules = sharding.STRATEGIES["fsdp_tensor"]
    of = lambda names, shape: sharding.spec(names, shape, rules, on)
    assert of(("token", "embed", "mlp"), (6, 8, 16)) == PartitionSpec("model", "data", None)
    assert of(("token", "embed", "mlp"), (7, 8, 16)) == PartitionSpec(None, "data", "model")
    assert of(("token", "embed", "mlp"), (7, 6, 15)) == PartitionSpec(None, None, None)
    assert of(("batch", None), (8, 3)) == PartitionSpec("data", None)
    slices = sharding.mesh(sharding.MeshConfig(replica=2, data=2, model=2))
    found = sharding.spec(("batch",), (8,), rules, slices)
    assert found == PartitionSpec(("replica", "data"))


@pytest.mark.parametrize("name", models.MODELS)
def test_every_parameter_has_names(name):
    """And tensor parallelism splits the products of every architecture that has large ones."""
    params = sizes.abstract_params(presets.model(name, 2), SCHEMA, 16)
    on = sharding.mesh(sharding.MeshConfig(data=4, model=2))
    for strategy in sharding.STRATEGIES:
        found = traverse_util.flatten_dict(
            sharding.Placement(on, strategy).parameters(params), sep="/"
        )
        split = {path for path, own in found.items() if any(own.spec)}
        flat = traverse_util.flatten_dict(params, sep="/")
        assert set(found) == set(flat)
        if strategy == "data":
            assert not split
        if strategy.startswith("fsdp"):
            whole = sum(x.size for path, x in flat.items() if path not in split)
            largest = max((flat[path].size for path in set(flat) - split), default=0)
            assert whole < 0.5 * sum(x.size for x in flat.values()) and largest < 5000


def test_tensor_parallelism_splits_tokens_heads_and_hidden_units():
    on = sharding.mesh(sharding.MeshConfig(data=4, model=2))
    of = lambda name: traverse_util.flatten_dict(
        sharding.Placement(on, "tensor").parameters(
            sizes.abstract_params(presets.model(name, 2), SCHEMA, 16)
        ),
        sep="/",
    )
    assert of("rankmixer")["block_0/ffn/ffn_in/kernel"].spec[0] == "model"
    assert of("mtgr")["layer_0/query/kernel"].spec == PartitionSpec(None, "model")
    assert of("mtgr")["layer_0/out/kernel"].spec == PartitionSpec("model", None)
    assert of("transformer")["block_0/ffn_out/kernel"].spec == PartitionSpec("model", None)
    assert of("mtgr")["head/experts_kernel"].spec[0] == "model"


def test_arrays_lie_where_a_placement_says():
    place = sharding.placement(sharding.MeshConfig(data=4, model=2))
    x = np.zeros((8, 3), np.float32)
    found = jax.jit(place.batched)(x)
    want = NamedSharding(place.mesh, PartitionSpec("data", None))
    assert found.sharding.is_equivalent_to(want, 2)
    assert place.rows.spec == PartitionSpec(sharding.AXES)


def test_optimizer_state_lies_beside_its_parameters():
    place = sharding.placement(sharding.MeshConfig(data=4, model=2, strategy="fsdp"))
    params = {"a": {"kernel": np.zeros((8, 3))}, "b": {"bias": np.zeros(3)}}
    state = optax.adam(1.0).init(params)
    found = place.beside_parameters(state, params)
    assert found[0].mu["a"]["kernel"].spec == found[0].nu["a"]["kernel"].spec
    assert found[0].mu["a"]["kernel"].spec == PartitionSpec("data", None)
    assert found[0].mu["b"]["bias"].spec == PartitionSpec(None)
    assert found[0].count.spec == PartitionSpec()
