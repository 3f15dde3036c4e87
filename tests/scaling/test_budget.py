"""A budget leaves out the costliest sizes, and the same command goes on with the same study."""

import dataclasses
import json
import math

import polars as pl
import pytest

from rankjax import cli, embedding, train
from rankjax.models import dlrm
from rankjax.scaling import budget, estimate, ladder, probe, study, workers
from tests import tiny
from tests.scaling import test_estimate

BASE = dlrm.Config(layers=2, width=8, tasks=2)
WIDTHS = ladder.along(BASE, width=(2, 4, 8, 16, 32))
LAYERS = ladder.along(BASE, layers=(1, 2, 3, 4))
ONE = {"learning_rates": (1e-2,), "table_rates": (0.1,), "embedding_stds": (0.1,)}
# With the fakes of test_estimate a final trial takes 120 FLOPs a parameter, layers x width: of the
# widths 4, 8, 16, 32, 64, of the layers 8, 24, 32 and the base, which counts among the widths.
ALL = 120 * (4 + 8 + 16 + 32 + 64 + 8 + 24 + 32)


def ask(**options) -> study.Study:
    return study.Study(log="log", ladders=(WIDTHS, LAYERS), **(ONE | options))


def price(asked: study.Study, of=None) -> estimate.Estimate:
    return estimate.make(
        asked, {}, test_estimate.params, test_estimate.work, of or {}, workers=1
    )  # fmt: skip


def sizes_of(asked: study.Study) -> dict[str, tuple[int, ...]]:
    return {x.axis: x.values for x in asked.ladders}


@pytest.mark.parametrize(
    ("flops", "widths", "layers"),
    [
        (ALL, (2, 4, 8, 16, 32), (1, 2, 3, 4)),
        # Five widths are more than a power law needs; 64 parameters go.
        (ALL - 1, (2, 4, 8, 16), (1, 2, 3, 4)),
        (ALL - 120 * 64, (2, 4, 8, 16), (1, 2, 3, 4)),
        # Both have four: the widths' largest costs 32, as the layers' largest does, and is first.
        (ALL - 120 * 64 - 1, (2, 4, 8), (1, 2, 3, 4)),
        (ALL - 120 * (64 + 32) - 1, (2, 4, 8), (1, 2, 3)),
        (ALL - 120 * (64 + 32 + 32), (2, 4, 8), (1, 2, 3)),
    ],
)
def test_the_costliest_sizes_go_first_by_hand(flops, widths, layers):
    chosen, dropped = budget.choose(ask(), budget.Spending(max_flops=float(flops)), price)
    assert sizes_of(chosen) == {"D": widths, "L": layers}
    assert len(dropped) == 9 - len(widths) - len(layers)
    assert price(chosen).flops <= flops
    assert dropped == ["dlrm_mlp D 32", "dlrm_mlp D 16", "dlrm_mlp L 4"][: len(dropped)]


def test_long_ladders_are_cut_before_those_that_a_power_law_needs_whole():
    """The layers' largest costs ten times the widths', but four sizes are what a law needs."""
    layers = ladder.along(BASE, layers=(1, 2, 3, 80))
    asked = dataclasses.replace(ask(), ladders=(WIDTHS, layers))
    dropped = budget.choose(asked, budget.Spending(max_flops=120.0 * 780), price)[1]
    assert dropped == ["dlrm_mlp D 32"]
    dropped = budget.choose(asked, budget.Spending(max_flops=120.0 * 200), price)[1]
    assert dropped == ["dlrm_mlp D 32", "dlrm_mlp L 80"]


def test_what_cannot_be_cut_is_told_with_its_least_bill():
    """Rounded up, so that the number told is enough."""
    assert price(budget.choose(ask(), budget.Spending(max_flops=7200.0), price)[0]).flops == 7200
    with pytest.raises(
        ValueError, match=r"found --max-flops 7199, but with 3 sizes .* it takes 7200 FLOPs; expect"
    ):
        budget.choose(ask(), budget.Spending(max_flops=7199.0), price)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.23401e12, "1.235e+12"), (7.0, "7"), (9999.9, "1e+04"), (0.0012344, "0.001235")],
)
def test_rounded_up(value, text):
    assert budget._rounded_up(value) == text and float(text) >= value


def of_widths(seconds: float) -> dict:
    """The smallest of each ladder was measured; others follow in proportion to FLOPs."""
    return {
        x.name: {x.configs[0]: test_estimate.measured(100, 100 * seconds)}
        | {x.configs[-1]: test_estimate.measured(1, seconds)}
        for x in (WIDTHS, LAYERS)
    }


def test_hours_by_hand():
    """A second a parameter: all takes 188 seconds on one worker, the widths' largest 64."""
    timed = lambda asked: price(asked, of_widths(1.0))
    assert timed(ask()).seconds == pytest.approx(188)
    for seconds, dropped in ((189, 0), (187, 1), (123, 2)):
        spending = budget.Spending(max_hours=seconds / 3600)
        assert len(budget.choose(ask(), spending, timed)[1]) == dropped
    both = budget.Spending(max_hours=1.0, max_flops=ALL - 1.0)  # the FLOPs are what is exceeded
    assert budget.choose(ask(), both, timed)[1] == ["dlrm_mlp D 32"]
    with pytest.raises(ValueError, match=r"about 0\.01667 hours on 1 worker"):
        budget.choose(ask(), budget.Spending(max_hours=1 / 3600), timed)


def test_without_times_no_hours_can_be_kept():
    with pytest.raises(ValueError, match=r"no time is known.*with --max-hours"):
        budget.choose(ask(), budget.Spending(max_hours=1.0), price)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_is_above_0(value):
    for name in ("max_flops", "max_hours"):
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(ValueError, match=f"found {flag} {value:g}, expected a number above 0"):
            budget.Spending(**{name: value})


def test_hours_are_of_this_machine():
    budget.Spending(max_flops=1.0).check("slurm")
    for found in (budget.Spending(dry_run=True), budget.Spending(max_hours=1.0)):
        found.check("local")
        with pytest.raises(ValueError, match="with --engine ray, expected --engine local"):
            found.check("ray")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tiny.log(tmp_path_factory.mktemp("log") / "log", requests=120, events=300)


def of_log(log, **options) -> study.Study:
    base = {
        "log": str(log),
        "ladders": (ladder.along(BASE, width=(2, 4, 8, 16)),),
        "history": 5,
        "training": train.TrainConfig(batch=64, tables=embedding.TableConfig(width=4)),
    }
    return study.Study(**(base | ONE | options))


@pytest.fixture
def speed(monkeypatch):
    """Measured seconds a FLOP, in place of the probe; and what was measured."""
    state = {"seconds": 1.0, "asked": []}

    def run(asked, specs, places, limit, on_done):
        state["asked"] += [s.model.width for s in specs]
        return [fake(s.model.width) for s in specs]

    def fake(width):
        flops = 1000.0 * width
        beside = dict.fromkeys(("compile", "score", "score_compile", "first", "begin"), 1e-9)
        return estimate.forecast.Measured(
            flops=flops, score_flops=flops, step=state["seconds"] * width, **beside,
            memory_bytes=1, limit_bytes=2,
        )  # fmt: skip

    monkeypatch.setattr(probe, "run", run)
    return state


def listing(folder) -> list[str]:
    return sorted(f"{p} {p.stat().st_mtime_ns}" for p in folder.rglob("*"))


def test_a_dry_run_writes_nothing(log, tmp_path, speed):
    spending = budget.Spending(dry_run=True)
    asked, bill = budget.prepare(of_log(log), tmp_path / "study", spending)
    assert asked == of_log(log) and not (tmp_path / "study").exists()
    assert bill["trials"] == 4 and bill["hours"] > 0 and bill["dropped"] == []
    assert speed["asked"] == [2, 16]
    study.open_folder(asked, tmp_path / "study")
    before = listing(tmp_path)
    assert budget.prepare(asked, tmp_path / "study", spending) == (asked, bill)
    assert listing(tmp_path) == before
    with pytest.raises(ValueError, match=rf"{tmp_path}/study/study.json: another study.*history"):
        budget.prepare(of_log(log, history=6), tmp_path / "study", spending)
    assert listing(tmp_path) == before


def test_the_bill_of_a_study_is_what_is_left_of_it(log, tmp_path, speed):
    """Before, half-way and after: what the rows say was trained, and what the bill says is left."""
    two = (ladder.along(BASE, width=(2, 4)),)
    asked, spending = of_log(log, ladders=two), budget.Spending(dry_run=True)
    left = lambda: budget.prepare(asked, tmp_path, spending)[1]
    whole = left()
    study.work(asked, tmp_path, stop=lambda: len(study.load_rows(tmp_path)[0]) == 1)
    some, half = pl.read_parquet(tmp_path / "results.parquet"), left()
    assert some.height == half["trials"] == 1
    assert half["training_flops"] + some["training_flops"].sum() == whole["training_flops"]
    assert study.work(asked, tmp_path)
    rows = pl.read_parquet(tmp_path / "results.parquet")
    assert rows["trial"].n_unique() == whole["trials"] == 2
    assert rows["training_flops"].sum() == pytest.approx(whole["training_flops"], rel=1e-12)
    speed["asked"].clear()
    assert left()["trials"] == left()["hours"] == 0
    assert speed["asked"] == []  # nothing is left to be timed


def test_the_same_command_goes_on_with_the_same_study(log, tmp_path, speed, capsys):
    """Whatever seconds are measured the second time; but another study is still refused."""
    whole = budget.prepare(of_log(log), tmp_path, budget.Spending(dry_run=True))[1]["hours"]
    spending = budget.Spending(max_hours=0.9 * whole)
    chosen, bill = budget.prepare(of_log(log), tmp_path, spending)
    assert sizes_of(chosen) == {"D": (2, 4, 8)} and bill["dropped"] == ["dlrm_mlp D 16"]
    assert bill["hours"] <= 0.9 * whole
    assert "left out for the budget: dlrm_mlp D 16" in capsys.readouterr().err
    study.open_folder(chosen, tmp_path)
    for seconds in (1e-3, 1e3):
        speed["seconds"] = seconds
        again, _ = budget.prepare(of_log(log), tmp_path, spending)
        assert again == chosen
        said = capsys.readouterr().err
        assert "goes on with the sizes that its study.json holds; --max-hours chooses" in said
    assert study.open_folder(again, tmp_path)
    with pytest.raises(ValueError, match=r"study.json: another study.* here; seeds differ"):
        budget.prepare(of_log(log, seeds=(0, 1)), tmp_path, spending)
    other = (ladder.along(BASE, width=(2, 4, 9, 16)),)
    with pytest.raises(ValueError, match="ladders differ"):
        budget.prepare(of_log(log, ladders=other), tmp_path, spending)
    with pytest.raises(ValueError, match="ladders differ"):
        budget.prepare(of_log(log, ladders=other * 2), tmp_path, spending)


def test_what_a_smaller_choice_makes_the_largest_is_measured_too(log, tmp_path, speed):
    whole = budget.prepare(of_log(log), tmp_path, budget.Spending(dry_run=True))[1]["hours"]
    speed["asked"].clear()
    budget.prepare(of_log(log), tmp_path, budget.Spending(max_hours=0.9 * whole))
    assert speed["asked"] == [2, 16, 8]


def test_flops_need_no_measuring_and_bind_on_resuming_too(log, tmp_path, speed):
    flops = budget.prepare(of_log(log), tmp_path, budget.Spending(max_flops=1e15))[1]
    total = flops["training_flops"] + flops["evaluation_flops"]
    spending = budget.Spending(max_flops=total - 1)
    chosen, _ = budget.prepare(of_log(log), tmp_path, spending)
    assert sizes_of(chosen) == {"D": (2, 4, 8)} and speed["asked"] == []
    study.open_folder(of_log(log), tmp_path / "whole")
    with pytest.raises(
        ValueError, match=r"found a study of .* FLOPs, expected at most --max-flops"
    ):
        budget.prepare(of_log(log), tmp_path / "whole", spending)
    study.open_folder(chosen, tmp_path / "cut")
    assert budget.prepare(of_log(log), tmp_path / "cut", spending)[0] == chosen


def test_on_the_command_line(log, tmp_path, speed, capsys):
    command = ["study", "run", str(log), str(tmp_path / "s"), "--architectures", "dlrm_mlp"]
    command += ["--learning-rates", "0.01", "--table-rates", "0.1", "--embedding-stds", "0.1"]
    cli.main([*command, "--dry-run", "--json"])
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["trials"] == 4 and found["ladders"][0]["sizes"] == [8, 32, 128, 512]
    assert "measuring 2 sizes" in said.err and not (tmp_path / "s").exists()
    cli.main([*command, "--dry-run", "--max-flops", "1e9"])
    assert "dlrm_mlp D" in capsys.readouterr().out
    for flags in (["--max-flops", "0"], ["--max-hours", "-2"], ["--max-flops", "10"]):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, *flags])
        said = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and said[-1].startswith("rankjax: study: found --max-")
    assert not (tmp_path / "s").exists()


def test_a_budget_is_what_is_trained(log, tmp_path, speed, monkeypatch):
    asked = []
    monkeypatch.setattr(workers, "run", lambda one, *_, **__: asked.append(one) or "report")
    monkeypatch.setattr("rankjax.scaling.commands.show", lambda *_: None)
    command = ["study", "run", str(log), str(tmp_path / "s"), "--architectures", "dlrm_mlp"]
    command += ["--learning-rates", "0.01", "--table-rates", "0.1", "--embedding-stds", "0.1"]
    cli.main([*command, "--json"])
    bill = budget.prepare(asked[0], tmp_path, budget.Spending(max_flops=1e15))[1]
    total = bill["training_flops"] + bill["evaluation_flops"]
    cli.main([*command, "--max-flops", str(0.9 * total)])
    assert [x.ladders[0].values for x in asked] == [(8, 32, 128, 512), (8, 32, 128)]


@pytest.mark.slow
def test_estimated_seconds_are_of_the_size_of_the_real_ones(log, tmp_path, capsys):
    """Loosely: another process may take the core at any time."""
    training = train.TrainConfig(batch=4, tables=embedding.TableConfig(width=4))
    three = (ladder.along(BASE, width=(2, 8, 32)),)
    asked = of_log(log, training=training, ladders=three)
    bill = budget.prepare(asked, tmp_path / "s", budget.Spending(dry_run=True), count=1)[1]
    workers.run(asked, tmp_path / "s", workers=1)
    real = study.timing(tmp_path / "s")["seconds_total"].sum()
    ratio = 3600 * bill["worker_hours"] / real
    with capsys.disabled():
        print(f"\nestimated {3600 * bill['worker_hours']:.1f} s, real {real:.1f} s: x {ratio:.2f}")
    assert 1 / 5 < ratio < 5
