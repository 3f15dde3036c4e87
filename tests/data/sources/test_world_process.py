import dataclasses

import numpy as np
import pytest

from rankjax.data.sources import world_process, world_tables
from rankjax.data.sources.world_tables import World
from tests.references import world as reference

CONFIG = World(users=60, requests=4.0, seed=1)


@pytest.fixture(scope="module")
def block():
    return world_process.simulate(CONFIG, 0, parts=True)


def test_the_reference_prototype_gives_the_same_log(block):
    """Figures of the reference prototype (one process, in memory) for this configuration."""
    x = block.impressions
    found = (len(x["item"]), int(x["click"].sum()), int(x["like"].sum()), int(x["item"].sum()))
    assert found == (2442, 422, 120, 4393483)
    assert int(x["time"].sum()) == 12097927263
    assert x["p_click"].sum() == pytest.approx(412.5129485, rel=1e-7)


def test_the_logit_is_the_recipe_recomputed_from_the_past(block):
    W = world_tables.tables(CONFIG)
    world = {
        **{"v": W.factors, "quality": W.quality, "birth": W.birth, "feature": W.feature},
        **{"slope": W.position_slope, "segment": W.segment, "country": W.country},
        "spectrum": W.spectrum,
        **{
            k: (getattr(W, k).fields, getattr(W, k).amplitude)
            for k in ("click", "sequence", "like")
        },
    }
    x = block.impressions
    clicks = np.bincount(x["user"], x["click"], minlength=CONFIG.users)
    busy = int(np.argmax(clicks))
    assert clicks[busy] >= 15
    rows = np.flatnonzero(x["user"] == busy)
    user = {name: int(v[busy]) for name, v in block.users.items()}
    names = ("time", "position", "item", "surface", "click", "like")
    logged = [{name: x[name][i].item() for name in names} for i in rows]
    want = reference.logits(world, user, logged)
    got = {k: x[f"part_{k}"][rows].astype(float) for k in world_process.PARTS}
    for k in ("interest", "loyalty", "satiation", "cross", "sequence", "item", "position"):
        np.testing.assert_allclose(got[k], [w[k] for w in want], atol=2e-5, err_msg=k)
    assert all(np.ptp(got[k]) > 0.05 for k in world_process.PARTS if k != "user")
    assert np.ptp(got["user"]) == 0  # one latent bias per user
    logit = -1.1 + sum(got.values())
    np.testing.assert_allclose(x["p_click"][rows], 1 / (1 + np.exp(-logit)), atol=1e-5)
    known = logit - got["user"] - got["taste"] + [w["known_taste"] for w in want]
    np.testing.assert_allclose(x["p_known"][rows], 1 / (1 + np.exp(-known)), atol=1e-5)
    like = np.array([w["like"] for w in want])
    np.testing.assert_allclose(x["p_like"][rows], 1 / (1 + np.exp(-like)), atol=1e-5)


def test_requests_and_candidates(block):
    x = block.impressions
    order = np.lexsort((x["position"], x["request"], x["time"]))
    np.testing.assert_array_equal(order, np.arange(len(order)))
    requests, first, size = np.unique(x["request"], return_index=True, return_counts=True)
    assert requests.max() < block.requests
    assert size.min() >= 4 and size.max() == 16
    by_request = np.lexsort((x["position"], x["request"]))
    place = np.concatenate([np.arange(n) for n in size])
    np.testing.assert_array_equal(x["position"][by_request], place)
    pairs = np.stack([x["request"], x["item"]], 1)
    assert len(np.unique(pairs, axis=0)) == len(pairs), "an item twice in a request"
    for column in ("user", "time", "surface"):
        np.testing.assert_array_equal(x[column][by_request], np.repeat(x[column][first], size))
    user, time = x["user"][first], x["time"][first]
    assert (np.diff(time)[np.diff(user) == 0] >= 60).all()
    assert time.min() >= 0 and time.max() < CONFIG.horizon
    W = world_tables.tables(CONFIG)
    assert (W.birth[x["item"]] <= x["time"]).all(), "an item before its birth"


def test_events_are_the_clicks(block):
    x, e = block.impressions, block.events
    clicked = x["click"]
    want = np.stack([x["user"], x["time"] + 2 * (x["position"] + 1), x["item"], 1 + 2 * x["like"]])
    want = want[:, clicked]
    want = want[:, np.lexsort((want[1], want[0]))]
    got = np.stack([e["user"], e["time"], e["item"], e["action"]])
    np.testing.assert_array_equal(got, want)
    assert not (x["like"] & ~x["click"]).any()


def test_labels_are_draws_from_the_truth(block):
    x = block.impressions
    for y, p in ((x["click"], x["p_click"]), (x["like"][x["click"]], x["p_like"][x["click"]])):
        assert abs((y - p).sum()) < 4 * np.sqrt((p * (1 - p)).sum())
    # Not only on average: what the logit says beyond the mean is what the labels show.
    p, y = x["p_click"], x["click"]
    high = p > np.median(p)
    assert abs((y - p)[high].sum()) < 4 * np.sqrt((p * (1 - p))[high].sum())
    assert p[high].mean() > 2 * p[~high].mean()


def test_a_block_depends_on_the_config_and_its_number_only(block):
    again = world_process.simulate(CONFIG, 0, parts=False)
    assert set(block.impressions) - set(again.impressions) == {
        f"part_{name}" for name in world_process.PARTS
    }
    for name, values in again.impressions.items():
        np.testing.assert_array_equal(values, block.impressions[name])
    # A full block does not feel that further blocks exist.
    one = dataclasses.replace(CONFIG, users=40, block=30)
    two = dataclasses.replace(one, users=60)
    for b in (0, 1):
        x, y = (world_process.simulate(c, b, parts=False).impressions["item"] for c in (one, two))
        assert (len(x) == len(y) and (x == y).all()) == (b == 0)
    other = world_process.simulate(dataclasses.replace(CONFIG, seed=2), 0, parts=False)
    assert len(other.impressions["item"]) != len(block.impressions["item"])
