"""`rankjax study`: what the command line asks for."""

import dataclasses

import numpy as np
import pytest

from rankjax import cli, schema
from rankjax.data import event_log
from rankjax.scaling import commands
from tests import tiny


@pytest.fixture
def counted(tmp_path):
    """A log with one counter."""
    made, files = tiny.columns(requests=120, events=300)
    signal = schema.Feature(
        name="signal", side="context", group="context", kind="dense", counter=True
    )
    files["impressions"]["signal"] = np.ones(len(files["impressions"]["time"]), np.float32)
    made = dataclasses.replace(made, features=(*made.features, signal))
    return event_log.write_log(tmp_path / "log", made, **files, fingerprint={"counted": 1})


def test_a_study_leaves_the_counters_out_where_asked(monkeypatch, counted, tmp_path):
    asked = []
    monkeypatch.setattr(commands, "_run", lambda plan, *_: asked.append(plan))
    cli.main(["study", "run", str(counted), str(tmp_path / "study")])
    cli.main(["study", "run", str(counted), str(tmp_path / "study"), "--no-counters"])
    assert [plan.counters for plan in asked] == [True, False]
