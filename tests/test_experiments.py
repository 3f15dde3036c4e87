"""The experiments ask for the studies that docs/studies.md describes; nothing is trained."""

import dataclasses
import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from rankjax import embedding, models, train
from rankjax.data import event_log, samples
from rankjax.data.sources import synthetic
from rankjax.models import dlrm
from rankjax.scaling import sizes, trial
from tests import tiny

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
WIDE, MIXER, SEQUENCE = (8, 32, 128, 512), (8, 16, 32, 64), (8, 16, 32, 64)


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked_of(name: str, folder: pathlib.Path, **log):
    return load(name).ask(event_log.EventLog.open(tiny.log(folder / "log", **log)))


def ladders(asked) -> dict[str, tuple[int, ...]]:
    return {one.name: one.values for one in asked.ladders}


def test_ebnerd_goes_along_every_axis_at_two_budgets(tmp_path):
    asked = asked_of("ebnerd_axes", tmp_path, tasks=("click",))
    assert ladders(asked) == {
        "dlrm_mlp D": WIDE,
        "dcnv2_din D": WIDE,
        "rankmixer T": (2, 4, 8, 16),
        "rankmixer L": (1, 2, 4, 8),
        "rankmixer D": MIXER,
        "hstu S": (10, 25, 50, 100),
        "hstu L": (1, 2, 4, 8),
        "hstu D": SEQUENCE,
    }
    assert asked.budgets == (60_000, 240_000) and asked.seeds == (0, 1)
    assert asked.learning_rates == (3e-4, 1e-3, 3e-3, 9e-3)
    assert asked.table_rates == (0.005, 0.015, 0.05) and asked.embedding_stds == (0.01, 0.05)
    assert asked.training.batch == 256
    for one in asked.ladders:
        for value, config in zip(one.values, one.configs):
            found = asked.samples_of(config)
            assert found.organisation == "request" and found.max_candidates == 16
            assert found.history == (value if one.axis == "S" else 50)


@pytest.mark.parametrize("which", ["world", "ebnerd"])
def test_all_architectures_have_a_compound_ladder_and_the_nine_their_axes(which, tmp_path):
    module = load("all_architectures")
    asked = module.ask(event_log.EventLog.open(tiny.log(tmp_path / "log")), which)
    names = {one.name: one for one in asked.ladders}
    studied = {one.architecture for one in asked.ladders}
    assert studied == {*module.NINE, *module.BASELINES} and len(studied) >= 18
    assert studied <= set(models.MODELS)
    for name in studied:
        assert len(names[f"{name} all"].configs) >= 3
    for name in module.NINE:
        for axis, field in type(module.NINE[name]).axes.items():
            first, *more = names[f"{name} {axis}"].values
            assert more == [2 * first, 4 * first], (name, field)
    assert asked.seeds == (0, 1) and len(asked.learning_rates) == 3
    logistic = names["dlrm_mlp all"].configs[0]
    assert logistic.layers == 0


def test_the_cross_builds_for_every_tokenizer(tmp_path):
    module = load("all_architectures")
    log = event_log.EventLog.open(tiny.log(tmp_path / "log"))
    for kind, tokens in module.CROSSED:
        asked = module.crossed(log, "world", kind, tokens)
        assert [one.name for one in asked.ladders] == ["rankmixer D", "heteroatt D"]
        for one in asked.ladders:
            assert sizes.dense_params(one.configs[0], log.schema, 16) > 0


def test_the_page_of_all_architectures_shows_the_committed_rows(capsys):
    module = load("all_architectures")
    page = (EXPERIMENTS.parent / "docs" / "architectures.md").read_text()
    shows = {"tables": module.show, "cross": module.show_cross, "bfloat16": module.show_bfloat16}
    for folder in sorted((EXPERIMENTS / "results" / "all_architectures").iterdir()):
        for name, show in shows.items():
            if name == "tables" or (folder / name).exists():
                show(folder)
                shown = capsys.readouterr().out.strip()
                assert f"<!-- {folder.name}: {name} -->\n{shown}\n<!--" in page


def test_a_best_size_is_chosen_on_validation_and_a_tie_is_called_one(tmp_path, capsys):
    module = load("all_architectures")
    rows = []
    #        architecture  L  width  validation  test  (two seeds each, std .0014)
    sizes = [("dlrm_mlp", 0, 8, 0.99, 0.95), ("dlrm_mlp", 1, 8, 0.92, 0.930)]
    sizes += [("dlrm_mlp", 1, 32, 0.95, 0.90), ("din", 1, 8, 0.9, 0.931), ("hstu", 1, 8, 0.9, 0.8)]
    for name, layers, width, validation, test in sizes:
        for seed in (-1e-3, 1e-3):
            row = {"architecture": name, "axis": "all", "axis_value": width, "tokens": None}
            row |= {"history": None, "layers": layers, "width": width, "stage": "final"}
            row |= {"dense_params": 1, "training_flops": 1e9, "learning_rate": 1e-3}
            row |= {"validation_ne": validation, "test_ne": test + seed, "test_auc": 0.7}
            rows.append(row)
    pl.DataFrame(rows).write_parquet(tmp_path / "results.parquet")
    module.show(tmp_path)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| ")]
    found = {x.split(" | ")[0]: x.split(" | ")[1:5] for x in lines}
    assert found["| `hstu`"] == ["L 1, D 8", ".8000 ± .0014", ".7000 ± .0000", "better"]
    assert found["| `dlrm_mlp`"][0] == "L 1, D 8"  # not D 32, which only the test span prefers
    assert found["| `din`"][-1] == "tie"
    assert found["| `logistic regression`"][-1] == "worse"


def test_movielens_gives_windows_to_the_sequence_model_only(tmp_path):
    asked = asked_of("movielens_architectures", tmp_path, tasks=("positive",), time_exact=False)
    assert ladders(asked) == {
        "dlrm_mlp D": WIDE,
        "dcnv2_din D": WIDE,
        "rankmixer D": MIXER,
        "hstu D": SEQUENCE,
    }
    assert asked.budgets == (200_000,) and asked.seeds == (0, 1)
    for one in asked.ladders:
        windows = one.architecture == "hstu"
        for config in one.configs:
            found = asked.samples_of(config)
            assert found.organisation == ("window" if windows else "impression")
            assert (found.history, found.max_candidates, found.max_realtime) == (50, 32, 64)
            # Positions must reach over all events that a window may hold.
            assert not windows or config.realtime == found.max_realtime


def test_daily_training_predicts_the_test_span_before_it_learns_from_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    log = event_log.EventLog.open(tiny.log(tmp_path / "log", requests=200, events=400))
    spec = trial.Trial(
        model=dlrm.Config(layers=1, width=8, tasks=2),
        training=train.TrainConfig(batch=32, tables=embedding.TableConfig(width=4)),
        samples=samples.SampleConfig(organisation="request", history=10),
        budget=None,
    )
    held_out, _ = trial.run(spec, log, tmp_path / "trial", test=True)
    found = load("ebnerd_daily").daily(spec, log, tmp_path / "trial")
    assert found["impressions"] == np.count_nonzero(log.column("impressions", "span") == 2)
    assert found["ne"] > 0 and found["ne"] != held_out["test_ne"]


@pytest.mark.parametrize("name", ["ebnerd_axes", "movielens_architectures"])
def test_without_folders_it_prints_how_to_call_it(name):
    command = [sys.executable, str(EXPERIMENTS / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXPERIMENTS.parent)
    assert done.returncode == 1 and f"python experiments/{name}.py RAW STUDY" in done.stderr


def test_the_log_of_a_study_is_found_again(tmp_path):
    module = load("all_architectures")
    prepared = synthetic.prepare(synthetic.World(users=60, requests=3.0), tmp_path / "a" / "world")
    log, which = module.opened(tmp_path / "a")
    assert (log.folder, which) == (pathlib.Path(prepared), "world")
    counted = tiny.log(tmp_path / "b" / "counted")
    log, which = module.opened(tmp_path / "b")
    assert (log.folder, which) == (pathlib.Path(counted), "ebnerd")


def test_every_architecture_has_a_size_in_bfloat16_that_is_also_swept_in_float32(tmp_path):
    module = load("all_architectures")
    log = event_log.EventLog.open(tiny.log(tmp_path / "log"))
    for which in ("world", "ebnerd"):
        asked = module.ask(log, which)
        ends = {one.name: (one.configs[0], one.configs[-1]) for one in asked.ladders}
        low = module.in_bfloat16(log, which)
        assert {one.architecture for one in low.ladders} == {n.split()[0] for n in ends}
        for one in low.ladders:
            (config,) = one.configs
            assert config.dtype == "bfloat16"
            twin = dataclasses.replace(config, dtype="float32")
            assert twin in ends[f"{one.architecture} all"] and config.layers > 0
        assert set(low.learning_rates) <= set(asked.learning_rates)
        assert set(low.table_rates) <= set(asked.table_rates)
