"""DLRM-MLP against float64 NumPy, its parameter count, and the configurations that it refuses."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from rankjax.models import dlrm
from tests import builders
from tests.references import dlrm as reference

SMALL = dlrm.Config(layers=3, width=8, tasks=2)
WIDTH = (4 + 1) + (4 + 1 + 4) + 4  # user, item and context inputs of the tests' schema
POOLED = 4 + 1 + 4 + 4


@functools.cache
def initial(config):
    features = builders.features(builders.batch(np.random.default_rng(0)))
    model = dlrm.DLRMMLP(config)
    return jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), features)


def score(config, params, features):
    model = dlrm.DLRMMLP(config)
    return np.asarray(jax.jit(functools.partial(model.apply, train=False))(params, features)[0])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm": "layer"},
        {"norm": "rms", "norm_place": "pre"},
        {"pooling": ("target", "mean"), "attention_activation": "dice"},
    ],
)
def test_logits_are_the_references(change):
    rng = np.random.default_rng(1)
    config = dataclasses.replace(SMALL, **change)
    batch = builders.batch(rng)
    params = builders.moved(initial(config), rng)
    got = score(config, params, builders.features(batch))
    c, p = config, builders.float64(params["params"])
    for row, candidate in np.argwhere(batch.candidate_mask):
        want = reference.logits(
            *(builders.one(batch, row, candidate), p, c.layers, c.pooling),
            *(c.attention_activation, c.norm, c.norm_place),
        )
        np.testing.assert_allclose(got[row, candidate], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_parameter_count(norm):
    params = initial(dataclasses.replace(SMALL, norm=norm))
    W, D, L, K = WIDTH + POOLED, 8, 3, 2
    want = W * D + D + (L - 1) * (D * D + D) + D * K + K
    assert builders.count(params) == want + L * {"none": 0, "rms": D, "layer": 2 * D}[norm]


def test_parameter_count_with_target_attention():
    params = initial(dataclasses.replace(SMALL, pooling=("mean", "target"), layers=1))
    items, own, F = 9, 4, 36
    attention = (4 * items + own) * F + F + F + 1
    assert builders.count(params["params"]["history"]) == attention
    assert builders.count(params) == attention + (WIDTH + 2 * POOLED) * 8 + 8 + 8 * 2 + 2


def test_only_float32_parameters_and_logits():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params = initial(config)
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}
    features = builders.features(builders.batch(np.random.default_rng(0)))
    assert score(config, params, features).dtype == np.float32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 0}, "width=0"),
        ({"layers": True}, "layers=True"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"pooling": ("mean", "mean")}, "pooling=.*different names"),
        ({"pooling": "mean"}, "pooling='mean', expected a tuple"),
        ({"init": "zeros"}, "init='zeros'"),
    ],
)
def test_a_bad_config_is_refused(change, match):
    with pytest.raises(ValueError, match="dlrm.Config: " + match):
        dataclasses.replace(SMALL, **change)


def test_a_config_goes_to_json_and_back():
    assert dlrm.Config(**json.loads(json.dumps(dataclasses.asdict(SMALL)))) == SMALL
    assert SMALL.paper_params() is None and SMALL.paper_flops() is None


def test_windows_are_refused():
    features = builders.features(builders.batch(np.random.default_rng(0), one_time=False))
    with pytest.raises(ValueError, match=r"dlrm_mlp: .* different times"):
        dlrm.DLRMMLP(SMALL).init(jax.random.key(0), features, train=False)
