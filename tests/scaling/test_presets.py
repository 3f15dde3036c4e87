"""What the command line starts from: every preset can be built, on both kinds of log."""

import dataclasses

import pytest

from rankjax import models
from rankjax.data import event_log
from rankjax.scaling import presets, sizes
from tests import tiny


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return event_log.EventLog.open(tiny.log(tmp_path_factory.mktemp("log") / "log"))


def test_presets_are_of_architectures():
    assert presets.LADDERS.keys() <= presets.SMALL.keys() <= models.MODELS.keys()


@pytest.mark.parametrize("architecture", list(models.MODELS))
def test_every_ladder_builds(architecture, log):
    """Parameters as shapes only; those along layers and width grow at every size."""
    found = presets.ladders(architecture, len(log.schema.tasks))
    assert [x.field for x in found] == list(presets.axes_of(architecture))
    for one in found:
        assert len(one.configs) >= 3
        assert all(c.tasks == 2 for c in one.configs)
        params = [sizes.dense_params(c, log.schema, 16) for c in one.configs]
        assert min(params) > 0
        if one.axis in "LD":
            assert params == sorted(set(params))


def test_a_model_of_given_sizes():
    found = presets.model("rankmixer", 3, tokens=4, width=8, layers=None, history=7)
    kept = presets.SMALL["rankmixer"]
    assert (found.tokens, found.width, found.layers, found.tasks) == (4, 8, kept.layers, 3)
    assert dataclasses.replace(found, tokens=8, width=kept.width, tasks=kept.tasks) == kept
    assert presets.model("hstu", 1, history=7).history == 7


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda log: presets.model("dlr", 1), r"found 'dlr', expected one of \['autoint'"),
        (lambda log: presets.model("rankmixer", 1, width=12), "width"),
        (lambda log: presets.world("large"), "found size 'large', expected one of"),
        (lambda log: presets.study_of(log, architectures=("hstu", "x")), r"found .*\['x'\]"),
        (
            lambda log: presets.ladders("dlrm_mlp", 1, {"tokens": (2, 4)}),
            r"found fields \['tokens'\], expected one of",
        ),
    ],
)
def test_refuses(call, match, log):
    with pytest.raises(ValueError, match=match):
        call(log)


def test_worlds():
    assert presets.world(seed=3).seed == 3
    assert presets.world("small").users == 1000
    asked = presets.world("small", impressions=10_000)
    assert 50 < asked.users < 1000
    assert presets.world(impressions=10_000, seed=1) == dataclasses.replace(asked, seed=1)


@pytest.mark.parametrize("windows", [False, True])
def test_organisations(windows, log):
    """Windows are for models of sequences only; the others then take single impressions."""
    asked = presets.study_of(log, windows=windows, history=7)
    for one in asked.ladders:
        for config in one.configs:
            found = asked.samples_of(config)
            sequence = models.MODELS[one.architecture].windows
            wanted = ("window" if sequence else "impression") if windows else "request"
            assert found.organisation == wanted
            assert found.history == (config.history if one.architecture == "hstu" else 7)


def test_a_study_of_some_axes(log):
    axes = {"hstu": {"width": (8, 16)}, "dlrm_mlp": {"layers": (1, 2)}}
    asked = presets.study_of(log, architectures=("hstu",), axes=axes, history=9, seeds=(4,))
    assert [(x.name, x.values) for x in asked.ladders] == [("hstu D", (8, 16))]
    assert asked.ladders[0].configs[0].history == 9
    assert asked.seeds == (4,) and asked.log == str(log.folder)


@pytest.mark.slow
def test_the_quick_study(tmp_path):
    asked = presets.quick(tmp_path)
    assert len({x.architecture for x in asked.ladders}) >= 3
    assert all(len(x.configs) >= 4 for x in asked.ladders)
    schema = event_log.EventLog.open(asked.log).schema
    for one in asked.ladders:
        params = [sizes.dense_params(c, schema, asked.training.tables.width) for c in one.configs]
        assert params == sorted(set(params))
    assert presets.quick(tmp_path) == asked  # the world is there, nothing is made again
