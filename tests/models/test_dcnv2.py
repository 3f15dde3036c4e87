"""DCN-V2 + DIN against float64 NumPy, its parameter counts, and what it refuses."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from rankjax.models import dcnv2
from tests import builders, interaction
from tests.references import dcnv2 as reference

SMALL = dcnv2.Config(layers=2, width=8, deep_layers=2, tasks=2, attention_hidden=(6,))
WIDTH = (4 + 1) + (4 + 1 + 4) + 4 + (4 + 1 + 4 + 4)  # all inputs of the tests' schema
KINDS = {
    "full, parallel": {},
    "full, stacked": {"structure": "stacked"},
    "low rank": {"rank": 3},
    "mixture": {"rank": 3, "experts": 2, "structure": "stacked"},
    "cross only": {"deep_layers": 0},
    "deep only": {"layers": 0},
    "dice, two hidden layers": {"attention_activation": "dice", "attention_hidden": (6, 3)},
}


@functools.cache
def initial(config):
    features = builders.features(builders.batch(np.random.default_rng(0)))
    model = dcnv2.DCNv2(config)
    return jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), features)


def score(config, params, features):
    model = dcnv2.DCNv2(config)
    return np.asarray(jax.jit(functools.partial(model.apply, train=False))(params, features)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_papers(kind):
    rng = np.random.default_rng(1)
    config = dataclasses.replace(SMALL, **KINDS[kind])
    batch = builders.batch(rng)
    params = builders.moved(initial(config), rng)
    got = score(config, params, builders.features(batch))
    c, p = config, builders.float64(params["params"])
    for row, candidate in np.argwhere(batch.candidate_mask):
        want = reference.logits(
            *(builders.one(batch, row, candidate), p, c.layers, c.deep_layers, c.pooling),
            *(c.structure, c.attention_activation),
        )
        np.testing.assert_allclose(got[row, candidate], want, rtol=1e-5, atol=1e-5)


def test_parameter_counts():
    W, D, r, n = WIDTH, 8, 3, 2
    cross = {
        "full, parallel": W * W + W,
        "low rank": 2 * W * r + W,
        "mixture": n * (2 * W * r + r * r) + W * n + W,
    }
    for kind, want in cross.items():
        params = initial(dataclasses.replace(SMALL, **KINDS[kind]))["params"]
        assert builders.count(params["cross_0"]) == builders.count(params["cross_1"]) == want
        assert builders.count(params["deep"]) == W * D + D + D * D + D
        head = D if kind == "mixture" else W + D
        assert builders.count(params["heads"]) == head * 2 + 2
        assert builders.count(params["history"]) == (4 * 9 + 4) * 6 + 6 + 6 + 1


@pytest.mark.parametrize("kind", ["full, stacked", "low rank", "mixture"])
def test_gradients_are_the_papers_differences(kind):
    config = dataclasses.replace(SMALL, **KINDS[kind])
    c = config

    def expected(sample, p):
        return reference.logits(sample, p, c.layers, c.deep_layers, c.pooling, c.structure)

    interaction.check_gradients(expected, dcnv2.DCNv2(config), np.random.default_rng(4))


@pytest.mark.parametrize("structure", dcnv2.STRUCTURES)
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("place", ["pre", "post"])
def test_the_files_closed_form_is_exact(structure, norm, place):
    config = dataclasses.replace(SMALL, structure=structure, norm=norm, norm_place=place, rank=3)
    W, D, M, L, K, r, F = WIDTH, 8, 2, 2, 2, 3, 6
    want = L * (2 * W * r + W) + W * D + D + (M - 1) * (D * D + D)
    want += (W + D if structure == "parallel" else D) * K + K
    want += (4 * 9 + 4) * F + F + F + 1  # target attention
    read = W + (M - 1) * D if place == "pre" else M * D
    want += {"none": 0, "rms": 1, "layer": 2}[norm] * read
    assert builders.count(initial(config)["params"]) == want


def test_small_residual_divides_the_cross_matrices():
    small = initial(dataclasses.replace(SMALL, init="small_residual"))["params"]
    lecun = initial(SMALL)["params"]
    want = np.asarray(lecun["cross_0"]["w"]["kernel"]) / 2  # sqrt(2 L), L = 2
    np.testing.assert_allclose(small["cross_0"]["w"]["kernel"], want, rtol=1e-6)
    np.testing.assert_array_equal(
        small["deep"]["dense_0"]["kernel"], lecun["deep"]["dense_0"]["kernel"]
    )


def test_full_rank_factors_are_the_full_matrix():
    """W = U V^T with r = W: the factors I and W' score like W'."""
    rng = np.random.default_rng(2)
    low = dataclasses.replace(SMALL, rank=WIDTH)
    features = builders.features(builders.batch(rng))
    params = builders.moved(initial(SMALL), rng)
    factors = {"params": dict(params["params"])}
    for layer in ("cross_0", "cross_1"):
        identity = {"kernel": np.eye(WIDTH, dtype="f4")}
        factors["params"][layer] = {"v": identity, "u": params["params"][layer]["w"]}
    np.testing.assert_allclose(
        score(low, factors, features), score(SMALL, params, features), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"structure": "serial"}, "structure='serial'"),
        ({"rank": 0}, "rank=0"),
        ({"experts": 2}, "experts=2 with rank=None, expected a rank"),
        ({"layers": 0, "deep_layers": 0}, "layers=0 and deep_layers=0"),
        ({"attention_hidden": ()}, r"attention_hidden=\(\)"),
        ({"width": -1}, "width=-1"),
    ],
)
def test_a_bad_config_is_refused(change, match):
    with pytest.raises(ValueError, match="dcnv2.Config: " + match):
        dataclasses.replace(SMALL, **change)


def test_a_config_goes_to_json_and_back():
    assert dcnv2.Config(**json.loads(json.dumps(dataclasses.asdict(SMALL)))) == SMALL
    assert SMALL.paper_params() is None and SMALL.paper_flops() is None


def test_windows_are_refused():
    features = builders.features(builders.batch(np.random.default_rng(0), one_time=False))
    with pytest.raises(ValueError, match=r"dcnv2_din: .* different times"):
        dcnv2.DCNv2(SMALL).init(jax.random.key(0), features, train=False)
