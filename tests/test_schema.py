import dataclasses
import json

import pytest

from rankjax.schema import Feature, Schema, Table, Task


def schema(**options) -> Schema:
    base = {
        "tables": (Table(name="user", rows=5), Table(name="item", rows=9)),
        "features": (
            Feature(name="user", side="user", group="who", table="user"),
            Feature(name="item", side="item", group="what", table="item"),
            Feature(name="page", side="context", group="where", table="item"),
            Feature(name="act", side="event", group="did", kind="dense", action=True),
        ),
        "tasks": (Task(name="click"), Task(name="like", weight="click")),
        "primary_task": "like",
    }
    return Schema(**(base | options))


def test_what_a_batch_carries():
    found = schema()
    assert [f.name for f in found.user] == ["user"]
    assert [f.name for f in found.history] == ["item", "act"]
    assert [f.name for f in found.candidate] == ["item", "page"]
    assert found.groups == ("who", "what", "where", "did") and found.primary == 1


def test_json_and_back_is_the_same_static_value():
    found = Schema.from_json(json.loads(json.dumps(schema().to_json())))
    assert found == schema() and hash(found) == hash(schema())
    assert hash(dataclasses.replace(found, time_exact=False)) != hash(found)


ITEM = Feature(name="item", side="item", group="what", table="item")


@pytest.mark.parametrize(
    "options, match",
    [
        ({"primary_task": "buy"}, "primary_task='buy'"),
        ({"tasks": (Task(name="like", weight="click"),)}, "unknown weight 'click'"),
        ({"tables": (Table(name="user", rows=5),)}, "unknown table 'item'"),
        ({"tables": (Table(name="user", rows=5),) * 2}, "table name occurs twice"),
        ({"features": (ITEM, ITEM)}, "occurs twice"),
        (
            {"features": (ITEM, Feature(name="item", side="event", group="x", kind="dense"))},
            "are item features and event or context",
        ),
    ],
)
def test_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        schema(**options)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"side": "shop"}, "side='shop'"),
        ({"kind": "text"}, "kind='text'"),
        ({"table": ""}, "kind='id' with table=''"),
        ({"kind": "dense"}, "kind='dense' with table='item'"),
        ({"values": 3}, "needs kind='ids'"),
        ({"action": True}, "belongs to side='event'"),
    ],
)
def test_a_feature_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        Feature(**({"name": "x", "side": "item", "group": "g", "table": "item"} | options))


@pytest.mark.parametrize("rows", [1, 2**31])
def test_a_table_holds_int32_ids(rows):
    with pytest.raises(ValueError, match=r"expected 2 \.\. 2\*\*31 - 1"):
        Table(name="t", rows=rows)


def test_the_action_is_the_first_single_id_that_says_what_the_user_did():
    action = Feature(name="kind", side="event", group="a", table="item", action=True)
    dwell = Feature(name="dwell", side="event", group="a", kind="dense", action=True)
    place = Feature(name="place", side="event", group="a", table="item")
    assert schema(features=(dwell, place, action)).action is action
    assert schema(features=(dwell, place)).action is None
