"""docs/add-an-architecture.md, followed to the letter: its file, its line, and what it promises."""

import importlib.util
import inspect
import pathlib
import re
import sys

import pytest

import rankjax.models
from rankjax import catalogue, models
from rankjax.data import event_log
from rankjax.scaling import presets, study, workers
from tests import tiny

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "add-an-architecture.md"


@pytest.fixture(scope="module")
def deepfm(tmp_path_factory):
    """The page's file as rankjax.models.deepfm and its line in MODELS, for this module only."""
    file, line = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path_factory.mktemp("models") / "deepfm.py"
    path.write_text(file, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("rankjax.models.deepfm", path)
    module = importlib.util.module_from_spec(spec)
    name, target = re.fullmatch(r'\s*"(\w+)": deepfm\.(\w+),\s*', line).groups()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "rankjax.models.deepfm", module)
        spec.loader.exec_module(module)
        patch.setattr(rankjax.models, "deepfm", module, raising=False)
        patch.setitem(models.MODELS, name, getattr(module, target))
        yield module


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return event_log.EventLog.open(tiny.log(tmp_path_factory.mktemp("log") / "log", requests=150))


def test_the_page_does_not_shadow_what_is_there():
    assert "deepfm" not in models.MODELS


def test_it_is_listed_with_its_parameters(deepfm):
    config, architecture = catalogue.find("deepfm")
    leaves = dict(catalogue.tree(config))
    assert architecture == "deepfm"
    T = len({path.split("/")[1] for path in leaves if path.startswith("tokenizer/")})
    D = config.width
    count = lambda prefix: sum(
        int(shape[0]) * (int(shape[1]) if len(shape) > 1 else 1)
        for path, shape in leaves.items()
        if not path.startswith(prefix)
    )
    assert count("tokenizer/") == T * D * D + D + (config.layers - 1) * (D * D + D) + D + 1
    assert "## DeepFM" in catalogue.fidelity()


def test_it_holds_what_every_architecture_must(deepfm):
    from tests.models import test_all_models as suite

    # Every test of all architectures that asks for no more than a name; two more by hand.
    alone = [f for name, f in vars(suite).items() if name.startswith("test_")]
    of_all = lambda f: suite.EACH.mark in getattr(f, "pytestmark", ())
    alone = [f for f in alone if of_all(f) and list(inspect.signature(f).parameters) == ["name"]]
    assert len(alone) >= 8
    for function in alone:
        function("deepfm")
    suite.test_packed_rows_score_like_rows_of_their_own("deepfm", 2)
    suite.test_finite_without_any_history("deepfm", "bfloat16")


@pytest.mark.slow
def test_a_study_trains_it_along_its_axes(deepfm, log, tmp_path):
    asked = presets.study_of(
        log, architectures=("deepfm",), history=10, learning_rates=(3e-3,), table_rates=(0.1,),
        embedding_stds=(0.05,), axes={"deepfm": {"width": (4, 8)}},
    )  # fmt: skip
    assert {x.axis for x in presets.ladders("deepfm", 2)} == {"L", "D"}
    assert study.work(asked, tmp_path)
    report = workers.write_report(tmp_path)
    assert report.exists()
    rows, _ = study.load_rows(tmp_path)
    assert {row["architecture"] for row in rows.values()} == {"deepfm"}
    assert all(row["test_ne"] > 0 and row["failed"] is None for row in rows.values())
