"""The bill adds up, and is printed in the units that people read."""

import io
import json
import math

import pytest
import rich.console

from rankjax.models import dlrm
from rankjax.scaling import estimate, forecast, ladder, study

BASE = dlrm.Config(layers=2, width=8, tasks=2)
LADDERS = ladder.along(BASE, width=(4, 8, 16)), ladder.along(BASE, layers=(1, 2, 3))
SHAPE = (8, 5, 4)
KIB = 1024


def params(config) -> int:
    return config.width * config.layers


def work(spec) -> forecast.Work:
    """A step a trial; FLOPs are 100 a parameter, of a scored span 10."""
    size = params(spec.model)
    return forecast.Work(
        model=spec.model,
        dense_params=size,
        training_flops=100.0 * size,
        evaluation_flops={"validation": 10.0 * size, "test": 10.0 * size},
        steps={SHAPE: (1, 100.0 * size)},
        scoring={span: {SHAPE: (1, 10.0 * size)} for span in ("validation", "test")},
    )


def measured(size: int, seconds: float, limit: int | None = None) -> forecast.Measured:
    """A step of so many seconds and nothing beside it; nan = does not fit."""
    beside = dict.fromkeys(("compile", "score", "score_compile", "first", "begin"), 1e-12)
    return forecast.Measured(
        flops=100.0 * size, score_flops=10.0 * size, step=seconds, **beside,
        memory_bytes=size * KIB, limit_bytes=limit,
    )  # fmt: skip


def ask(**options) -> study.Study:
    one = {"learning_rates": (1e-2,), "table_rates": (0.1,), "embedding_stds": (0.1,)}
    return study.Study(log="log", ladders=LADDERS, **(one | options))


def bill(asked=None, rows=None, of=None, workers=2) -> estimate.Estimate:
    return estimate.make(asked or ask(), rows or {}, params, work, of or {}, workers)


def test_sums_by_ladder_and_stage_by_hand():
    found = estimate.summary(bill())
    assert [x["ladder"] for x in found["ladders"]] == ["dlrm_mlp D", "dlrm_mlp L"]
    widths, layers = found["ladders"]
    assert widths["sizes"] == [4, 8, 16] and widths["dense_params"] == [8, 16, 32]
    assert (widths["trials"], layers["trials"], found["trials"]) == (3, 2, 5)  # one shared
    assert widths["training_flops"] == 100 * (8 + 16 + 32)
    assert widths["evaluation_flops"] == 20 * (8 + 16 + 32)
    assert layers["training_flops"] == 100 * (8 + 24)
    assert found["training_flops"] == 100 * 88 and found["evaluation_flops"] == 20 * 88
    assert found["stages"]["final"]["trials"] == 5 and found["stages"]["sweep"]["trials"] == 0
    assert found["hours"] is None and widths["memory_bytes"] is None and widths["fits"] is None
    assert json.loads(json.dumps(found)) == found


def test_what_may_coincide_is_counted_as_least_and_most():
    found = estimate.summary(bill(ask(learning_rates=(1e-3, 1e-2))))
    assert (found["trials_least"], found["trials"]) == (found["trials"] - 1, found["trials"])
    base = 100 * params(BASE)
    by_stage = sum(x["training_flops"] for x in found["stages"].values())
    assert by_stage == found["training_flops"]
    exact = estimate.summary(bill(ask(learning_rates=(1e-3, 1e-2), seeds=(0, 1))))
    # A further seed trains five sizes, and the shared one once more at most.
    assert exact["training_flops"] - found["training_flops"] == 100 * 88 + base


def test_rows_that_are_there_cost_nothing():
    asked = ask()
    ids = [x.job.request.trial.id for x in bill().lines]
    rows = {name: {"validation_ne": 1.0, "test_read": True} for name in ids[:3]}
    assert len(bill(asked, rows).lines) == 2
    done = {name: {"validation_ne": 1.0, "test_read": True} for name in ids}
    nothing = estimate.summary(bill(asked, done))
    assert nothing["trials"] == nothing["training_flops"] == nothing["hours"] == 0


def test_hours_by_hand():
    """Widths 4 and 16 take 1 and 4 seconds, so 8 takes 2; layers 1 and 3 take 1 and 2."""
    small, base, large = LADDERS[0].configs
    one, _, three = LADDERS[1].configs
    of = {
        "dlrm_mlp D": {small: measured(8, 1.0), large: measured(32, 4.0)},
        "dlrm_mlp L": {one: measured(8, 1.0), three: measured(24, 2.0)},
    }
    assert params(base) == 16
    made = bill(of=of, workers=1)
    assert [x.seconds for x in made.lines] == pytest.approx([1, 2, 4, 1, 2])
    assert made.seconds == pytest.approx(10) and made.hours == pytest.approx(10 / 3600)
    found = estimate.summary(bill(of=of, workers=2))
    assert found["worker_hours"] == pytest.approx(10 / 3600)
    assert found["hours"] == pytest.approx(5 / 3600)  # 1, 4 beside 2, 1, 2
    assert found["ladders"][0]["memory_bytes"] == 32 * KIB


def test_a_size_that_does_not_fit_is_named():
    large = LADDERS[0].configs[-1]
    of = {
        "dlrm_mlp D": {LADDERS[0].configs[0]: measured(8, 1.0)}
        | {large: measured(32, math.nan, limit=20 * KIB)},
        "dlrm_mlp L": {LADDERS[1].configs[0]: measured(8, 1.0)},
    }
    found = estimate.summary(bill(of=of))
    (line,) = found["does_not_fit"]
    assert line == (
        "dlrm_mlp D 16 does not fit: its training step takes 32 KiB; a worker has 20 KiB"
    )
    assert found["ladders"][0]["fits"] is False and found["ladders"][1]["fits"] is None
    # What was measured is taken further in proportion: 1 + 2 + 4 and 1 + 3.
    assert found["worker_hours"] == pytest.approx(11 / 3600)
    assert line in printed(found)


def printed(found: dict) -> str:
    screen = rich.console.Console(file=io.StringIO(), width=80)
    for part in estimate.tables(found):
        screen.print(part, soft_wrap=isinstance(part, str))
    return screen.file.getvalue()


def test_for_people_nothing_is_cut_off_at_80_columns():
    of = {x.name: {x.configs[0]: measured(8, 3600.0)} for x in LADDERS}
    asked = ask(learning_rates=(1e-3, 1e-2), seeds=(0, 1))
    found = estimate.summary(bill(asked, of=of))
    text = printed(found)
    assert "…" not in text and "dlrm_mlp D" in text and "1, 2, 3" in text
    assert f"{found['trials_least']} to {found['trials']}" in text
    assert f"about {found['hours']:.3g} h on 2 workers, then the trees and the report" in text
    assert "worker time" in text and "evaluation FLOPs" in text


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0, "0 s"), (0.01, "36 s"), (0.05, "3 min"), (1.5, "90 min"), (2, "2 h"), (None, "")],
)
def test_times(hours, text):
    assert estimate._time(hours) == text


def test_bytes():
    assert estimate._bytes(2048) == "2 KiB" and estimate._bytes(3 * 2**20) == "3 MiB"
    assert estimate._bytes(2000 * 2**20) == "1.95 GiB"
