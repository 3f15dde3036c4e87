import dataclasses

import numpy as np
import pytest

from rankjax.data.sources import world_tables
from rankjax.data.sources.world_tables import DAY, World

CONFIG = World(users=10, slots=400, creators=100, seed=5)


def test_shelves_hold_one_item_after_another():
    W = world_tables.tables(CONFIG)
    slot = np.arange(CONFIG.slots)
    life = np.exp(np.array([np.log(20), np.log(1500)])) * DAY
    assert (W.life >= life[0]).all() and (W.life <= life[1]).all()
    for time in (0, 17 * DAY + 5, CONFIG.horizon - 1):
        item = W.occupant(slot, np.full(len(slot), time))
        assert len(set(item.tolist())) == len(slot)
        assert (W.birth[item] <= time).all() and (time < W.birth[item] + W.life).all()
    assert W.occupant(slot, np.zeros(len(slot))).tolist() == W.first.tolist()
    last = W.occupant(slot, np.full(len(slot), CONFIG.horizon - 1.0))
    assert last.max() == W.items - 1


def test_categories_are_contiguous_and_own_their_creators():
    W = world_tables.tables(CONFIG)
    category = W.feature["category"][W.first]
    for k in range(24):
        shelves = np.arange(W.category_start[k], W.category_start[k + 1])
        assert (category[shelves] == k).all()
    assert W.category_start[-1] == CONFIG.slots
    # A shelf's items share its category; a creator works in one category.
    count = np.diff([*W.first, W.items])
    np.testing.assert_array_equal(np.repeat(category, count), W.feature["category"])
    assert CONFIG.creators_per_category == 4
    np.testing.assert_array_equal(W.feature["creator"] // 4, W.feature["category"])


def test_factors_have_the_variances_of_the_recipe():
    W = world_tables.tables(World(slots=3000, creators=600))
    amplitude = np.arange(1, 25.0) ** -0.8
    np.testing.assert_allclose(W.spectrum, amplitude / np.sqrt((amplitude**2).sum()))
    # Within a creator only the item's own .15 is left.
    own = [W.factors[W.feature["creator"] == k] for k in range(600)]
    own = np.concatenate(
        [(x - x.mean(0)) * np.sqrt(len(x) / (len(x) - 1)) for x in own if len(x) > 1]
    )
    np.testing.assert_allclose((own**2).mean(0) / W.spectrum**2, 0.15, rtol=0.1)
    quality = [W.quality[W.feature["creator"] == k] for k in range(600)]
    quality = np.concatenate([x - x.mean() for x in quality if len(x) > 20])
    assert quality.std() == pytest.approx(0.6, rel=0.05)


@pytest.mark.parametrize(("name", "terms"), [("click", 192), ("sequence", 64), ("like", 48)])
def test_crosses_are_standardised(name, terms):
    W = world_tables.tables(CONFIG)
    cross = getattr(W, name)
    assert cross.amplitude.shape == (terms,)
    assert (cross.amplitude.astype(float) ** 2).sum() == pytest.approx(1, rel=1e-6)
    decay = 1.2 if name == "sequence" else 1.0
    assert cross.amplitude[0] / cross.amplitude[8] == pytest.approx((11 / 3) ** decay, rel=1e-5)
    order = np.zeros(terms, int)
    mean = np.ones(terms)
    for table in cross.fields.values():
        used = ~(table == 1).all(0)
        order += used
        phi = table[:, used].astype(float)
        np.testing.assert_allclose(phi.mean(0), 0.8 / np.sqrt(1.64), atol=1e-6)
        np.testing.assert_allclose(phi.std(0), 1 / np.sqrt(1.64), atol=1e-6)
        mean *= table.astype(float).mean(0)
    assert set(order.tolist()) <= ({2, 3} if name == "sequence" else {2, 3, 4})
    assert float(cross.mean) == pytest.approx(cross.amplitude @ mean, rel=1e-5)
    items = np.stack([(~(cross.fields[k] == 1).all(0)) for k in world_tables.ITEM])
    assert items.any(0).all(), "a term without an item field cannot rank"
    if name == "sequence":
        past = np.stack([(~(cross.fields[k] == 1).all(0)) for k in world_tables.SEQUENCE])
        assert past.any(0).all()


def test_one_look_up_is_the_product_of_four():
    W = world_tables.tables(CONFIG)
    item = np.arange(0, W.items, 7)
    product = np.ones((len(item), 192))
    for k in world_tables.ITEM:
        product *= W.click.fields[k][W.feature[k][item]].astype(float)
    np.testing.assert_allclose(W.click.item[W.combination[item]], product, rtol=1e-5)


def test_streams_are_apart():
    draws = [world_tables.generator(0, s, b).random() for s, b in ((0, 0), (1, 0), (1, 1))]
    assert len(set(draws)) == 3
    assert world_tables.generator(1, 1, 0).random() not in draws


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"users": 0}, "users=0, expected an integer >= 1"),
        ({"users": 10.0}, "users=10.0, expected an integer"),
        ({"creators": 2000}, "creators=2000, expected at most 1000"),
        ({"creators": 10}, "creators=10, expected an integer >= 24"),
        ({"held_out": 1.0}, "held_out=1.0, expected between 0 and 1"),
        ({"requests": 0.0}, "requests=0.0, expected > 0"),
        ({"days": 10**6}, "days=1000000, expected at most"),
        ({"scales": (1.0,)}, "5 scale_weights, expected 1"),
        ({"mix": (0.5, 0.5, 0.5)}, "mix=.*sum to 1"),
    ],
)
def test_a_bad_config_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(CONFIG, **change)
