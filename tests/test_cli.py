"""Commands print one JSON object when asked; mistakes end with one line and exit status 2."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from rankjax import cli, doctor, schema
from rankjax.data import event_log
from rankjax.scaling import presets, study, workers
from tests import tiny


def run(capsys, *argv) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of one command."""
    status = 0
    try:
        cli.main([str(x) for x in argv])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def test_an_unknown_command_is_refused_with_the_usage(capsys):
    status, out, err = run(capsys, "fit")
    assert status == 2 and out == ""
    assert "'fit'" in err and "usage: rankjax COMMAND" in err


@pytest.mark.parametrize("argv", [(), ("--help",)])
def test_usage_lists_every_command(argv, capsys):
    status, out, err = run(capsys, *argv)
    assert status == 0 and err == ""
    for name, command in cli.COMMANDS.items():
        for sub in [""] if callable(command) else command:
            assert f"  {name} {sub}".rstrip() in out


@pytest.mark.parametrize("argv", [("study",), ("data", "nothing"), ("train", "log", "--nothing")])
def test_arguments_that_no_command_has(argv, capsys):
    status, _, err = run(capsys, *argv)
    assert status == 2 and "Traceback" not in err


def test_doctor_prints_json(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda: {"ok": False, "checks": []})
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 1 and json.loads(out) == {"ok": False, "checks": []}


@pytest.mark.slow
def test_doctor_of_this_machine(capsys):
    status, out, _ = run(capsys, "doctor", "--json")
    assert json.loads(out)["ok"] is (status == 0)


@pytest.mark.parametrize(
    "argv",
    [
        ("data", "movielens", "{}/raw", "{}/log"),
        ("data", "ebnerd", "{}/raw", "{}/log"),
        ("train", "{}/log"),
        ("study", "run", "{}/log", "{}/study"),
        ("baseline", "{}/log"),
        ("report", "{}/study"),
    ],
)
def test_a_missing_folder_is_one_line(argv, capsys, tmp_path):
    status, out, err = run(capsys, *(x.format(tmp_path) for x in argv))
    assert status == 2 and out == ""
    assert err.startswith("rankjax: ") and str(tmp_path) in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_world_of_a_size(capsys, tmp_path):
    argv = ("data", "world", tmp_path, "--impressions", 10000, "--workers", 1, "--json")
    status, out, _ = run(capsys, *argv)
    found = json.loads(out)
    assert status == 0 and found["tasks"] == ["click", "like"]
    assert 10_000 <= found["rows"]["impressions"] < 40_000
    assert 0 < found["floors"]["click"]["oracle_ne"] < 1
    assert event_log.EventLog.open(found["log"]).rows("impressions") == found["rows"]["impressions"]
    # Again: nothing is made. Another seed in the same folder: refused.
    assert run(capsys, *argv)[1] == out
    status, _, err = run(capsys, *argv, "--seed", 1)
    assert status == 2 and "found a log with fingerprint" in err


def test_train_prints_the_result(capsys, tmp_path):
    log = tiny.log(tmp_path / "log", requests=120, events=300)
    sizes = ("--architecture", "dlrm_mlp", "--layers", 1, "--width", 4, "--history", 5)
    config = ("--batch", 64, "--tables.width", 4, "--optimizer.learning-rate", 0.01)
    argv = ("train", log, "--out", tmp_path / "out", *sizes, *config)
    status, out, _ = run(capsys, *argv, "--json")
    found = json.loads(out)
    assert status == 0 and found["architecture"] == "dlrm_mlp"
    assert (found["layers"], found["width"], found["batch"]) == (1, 4, 64)
    assert found["learning_rate"] == 0.01
    assert found["validation_ne"] > 0 and found["test_ne"] is None
    status, out, _ = run(capsys, *argv)  # for people; trained already
    assert status == 0 and "validation_ne" in out
    # Another seed into the same folder is a mistake of the caller.
    status, _, err = run(capsys, *argv, "--seed", 1)
    assert status == 2 and err.startswith("rankjax: ")


def test_a_log_with_a_damaged_byte_is_not_trained_on(capsys, tmp_path):
    log = tiny.log(tmp_path / "log")
    path = log / "impressions.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    status, _, err = run(capsys, "train", log, "--architecture", "dlrm_mlp")
    assert status == 2 and "impressions.arrow: found crc32" in err
    status, _, err = run(capsys, "study", "run", log, tmp_path / "study")
    assert status == 2 and "impressions.arrow: found crc32" in err


def test_baseline_prints_the_metrics_and_joins_a_study(capsys, tmp_path):
    log = tiny.log(tmp_path / "log", requests=120, events=300)
    status, out, _ = run(capsys, "baseline", log, "--budget", 50, "--json")
    found = json.loads(out)
    assert status == 0 and found["rows"] == 50 and found["test_ne"] > 0
    status, out, _ = run(capsys, "baseline", log)  # for people, on the whole train span
    assert status == 0 and "validation_ne" in out
    argv = ("baseline", log, "--study", tmp_path / "study", "--json")
    status, _, err = run(capsys, *argv)
    assert status == 2 and "found no study.json" in err and err.count("\n") == 1
    opened = event_log.EventLog.open(log)
    study.open_folder(presets.study_of(opened, budgets=(70,)), tmp_path / "study")
    found = json.loads(run(capsys, *argv)[1])
    assert found["rows"] == 70
    assert json.loads((tmp_path / "study" / "baseline.json").read_text()) == found


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


def test_commands_leave_the_counters_out_where_asked(capsys, monkeypatch, counted):
    columns = [
        json.loads(run(capsys, "baseline", counted, *more, "--json")[1])["features"]
        for more in ((), ("--no-counters",))
    ]
    assert columns[0] == columns[1] + 1
    logs = []
    result = lambda spec, log, *_, **__: (logs.append(log), ({}, {}))[1]
    monkeypatch.setattr(cli.trial, "run", result)
    run(capsys, "train", counted)
    run(capsys, "train", counted, "--no-counters")
    assert ["signal" in [f.name for f in log.schema.features] for log in logs] == [True, False]


def test_a_full_disk_is_one_line(capsys, monkeypatch):
    def full():
        raise OSError(28, "No space left on device", "runs/one")

    monkeypatch.setitem(cli.COMMANDS, "doctor", full)
    status, _, err = run(capsys, "doctor")
    assert status == 2 and err.count("\n") == 1 and "No space left" in err


def test_a_size_that_an_architecture_refuses(capsys, tmp_path):
    log = tiny.log(tmp_path / "log")
    status, _, err = run(capsys, "train", log, "--architecture", "rankmixer", "--width", 12)
    assert status == 2 and "width" in err and err.count("\n") == 1


def test_ctrl_c_says_that_it_may_go_on(capsys, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "doctor", stopped)
    status, _, err = run(capsys, "doctor")
    assert status == 130 and "run it again" in err


def test_training_starts_again_with_memory_that_it_keeps_once(monkeypatch, capsys):
    started = []

    def execve(path, argv, environment):
        started.append((path, argv, environment))
        raise SystemExit(0)  # the process ends here

    monkeypatch.setattr(workers.os, "execve", execve)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "bin/rankjax", "bench", "--nothing"])
    monkeypatch.setattr(sys, "argv", ["bin/rankjax", "bench", "--nothing"])
    for name in (*workers.KEEP_MEMORY, "RANKJAX_KEEPS_MEMORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", "mine")
    with pytest.raises(SystemExit):
        cli.main()
    (path, argv, environment) = started[0]
    assert path == argv[0] == sys.executable and argv[1:] == ["bin/rankjax", "bench", "--nothing"]
    assert environment.items() >= {**workers.KEEP_MEMORY, **workers.os.environ}.items()
    assert environment["GLIBC_TUNABLES"] == "mine"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        cli.main()  # now it goes on, and refuses the argument
    assert len(started) == 1 and "--nothing" in capsys.readouterr().err
