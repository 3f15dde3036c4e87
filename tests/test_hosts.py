"""Several processes on one machine train as one, and say which of them failed."""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from rankjax import checkpoint, hosts
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def started(out, log, *, count=2, devices=2, **more):
    """The processes of one run; `logs` gives each its own log."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    coordinator = f"127.0.0.1:{free_port()}"
    logs = more.pop("logs", [log] * count)
    found = []
    for index in range(count):
        asked = {
            **{"coordinator": coordinator, "count": count, "index": index},
            **{"log": str(logs[index]), "out": str(out)},
            **more,
        }
        found.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.one_of_many_hosts", json.dumps(asked)],
                cwd=ROOT,
                env={**os.environ, "XLA_FLAGS": flags},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return found


def ended(processes):
    """(exit statuses, what each printed, its watcher's words included)."""
    try:
        said = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [p.returncode for p in processes], said


def trained(out, log, **more):
    status, said = ended(started(out, log, **more))
    assert status == [0] * len(status), "\n".join(said)
    return finals(out)


def finals(out):
    """Of every host its arrays; of tables the parts of all hosts, one behind the other."""
    every = [dict(np.load(path)) for path in sorted(out.glob("final-*.npz"))]
    for key in every[0]:
        if key.startswith("tables/"):
            whole = np.concatenate([part[key] for part in every])
            for part in every:
                part[key] = whole
    return every


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tiny.log(tmp_path_factory.mktemp("log") / "log", requests=200, events=400)


@pytest.fixture(scope="module")
def whole(log, tmp_path_factory):
    """Two processes of two devices, never stopped."""
    return trained(tmp_path_factory.mktemp("whole"), log)


def assert_close(found, want):
    """Up to rounding; tables may be filled up to another multiple."""
    assert found.keys() == want.keys()
    np.testing.assert_array_equal(found["impression"], want["impression"])
    for key in want.keys() - {"steps_now", "impression"}:
        rows = min(len(found[key]), len(want[key]))
        np.testing.assert_allclose(
            found[key][:rows], want[key][:rows], rtol=2e-3, atol=2e-4, err_msg=key
        )


@pytest.mark.slow
def test_two_processes_train_as_one(whole, log, tmp_path):
    for key, x in whole[0].items():
        np.testing.assert_array_equal(x, whole[1][key], err_msg=key)
    (one,) = trained(tmp_path, log, count=1, devices=4)
    assert_close(one, whole[0])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert all(line["exchange/bytes"] > 0 for line in lines)


@pytest.mark.slow
def test_a_killed_host_is_named_and_the_run_goes_on(whole, log, tmp_path):
    """With the same bits on as many hosts; on one process of four devices up to rounding."""
    out = tmp_path / "out"
    status, said = ended(started(out, log, die=(1, 4)))
    assert all(status)
    for words in said:
        assert "host 1 of 2" in words and "ended without a word" in words, words
        assert f"Newest complete checkpoint: step 4 in {out / 'checkpoints'}" in words, words
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    again = trained(out, log)
    assert again[0]["steps_now"] == whole[0]["steps_now"] - 4
    for key in whole[0].keys() - {"steps_now"}:
        np.testing.assert_array_equal(again[0][key], whole[0][key], err_msg=key)
    (one,) = trained(copy, log, count=1, devices=4)
    assert_close(one, whole[0])


@pytest.mark.slow
def test_a_signal_to_one_host_saves_and_stops_all(log, tmp_path):
    status, said = ended(started(tmp_path, log, stop=(1, 2)))
    assert all(status)
    told = [re.search(r"asked to stop; saved after step (\d+)", words) for words in said]
    assert all(told), said
    steps = {int(found.group(1)) for found in told}
    assert steps == {checkpoint.latest(tmp_path / "checkpoints")}


@pytest.mark.slow
def test_what_differs_on_many_hosts_is_gathered_whole(whole):
    """Of different lengths, with 64-bit integers: the predictions of both hosts are all there."""
    impressions = whole[0]["impression"]
    assert impressions.dtype == np.int64 and len(np.unique(impressions)) == len(impressions) > 0


def commands(log, out, *more, each=((), ())):
    """`rankjax train` on two hosts; each: what differs between them."""
    where = f"127.0.0.1:{free_port()}"
    found = []
    for index, own in enumerate(each):
        argv = ["train", log, "--architecture", "dlrm_mlp", "--batch", 60, "--json", *more, *own]
        argv += ["--join.coordinator", where, "--join.count", 2, "--join.index", index]
        argv += [] if "--out" in own else ["--out", out]
        code = f"from rankjax import cli; cli.main({[str(x) for x in argv]!r})"
        flags = {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        found.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env={**os.environ, **flags},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return ended(found)


def result(said):
    return json.loads(next(line for line in said.splitlines() if line.startswith("{")))


@pytest.mark.slow
def test_the_command_on_two_hosts_and_once_more(log, tmp_path):
    """A finished run, started again, has nothing to train and reports the same."""
    first, again = (commands(log, tmp_path / "out", "--log-every", 5) for _ in range(2))
    for status, said in (first, again):
        assert status == [0, 0], said
        assert "validation_ne" not in said[1]  # one host prints
    found, later = (result(said[0]) for _, said in (first, again))
    assert found["exchange_bytes"] > 0 and 0 < found["validation_ne"] < 2
    same = [key for key in found if key.startswith(("validation_", "progressive_"))]
    assert {key: found[key] for key in same} == {key: later[key] for key in same}


@pytest.mark.slow
def test_hosts_that_were_started_otherwise_say_so(log, tmp_path):
    for index, (own, match) in enumerate(
        [
            (("--mesh.model", 2), "host 1 of 2 .*: found mesh .*, expected"),
            (("--test",), "host 1 of 2 .*: found test True, expected False"),
            (("--out", tmp_path / "elsewhere"), "host 1 of 2: sees another .* than host 0"),
        ]
    ):
        status, said = commands(log, tmp_path / str(index), each=((), own))
        assert all(status), said
        for words in said:
            assert re.search(match, words), words


@pytest.mark.slow
@pytest.mark.parametrize("what", ["log", "clock"])
def test_a_host_that_differs_is_named(what, log, tmp_path):
    other = tiny.log(tmp_path / "other", requests=200, events=401)
    more = {"log": {"logs": [log, other]}, "clock": {"clock": (1, 3600)}}[what]
    status, said = ended(started(tmp_path / "out", log, **more))
    assert all(status)
    match = {"log": "found log ", "clock": "its clock is +3600 s from that of host 0 of 2"}[what]
    for words in said:
        assert f"HostError: host 1 of 2 ({socket.gethostname()}): {match}" in words, words
    assert checkpoint.latest(tmp_path / "out" / "checkpoints") is None


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(hosts.HostError, match=f"host 0 of 2 .*cannot serve .*{where}"):
            hosts.join(hosts.HostConfig(coordinator=where, count=2, index=0))


def test_a_coordinator_that_does_not_answer_is_named():
    where = f"127.0.0.1:{free_port()}"
    with pytest.raises(hosts.HostError, match=f"host 1 of 2 .*host 0 does not answer at {where}"):
        hosts.join(hosts.HostConfig(coordinator=where, count=2, index=1, timeout=0))


@pytest.mark.parametrize(
    "config, match",
    [
        ({"coordinator": "a:1"}, "expected all of them, or none, or auto"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, r"index=2, expected 0 \.\. 1"),
        ({"coordinator": "a", "count": 2, "index": 0}, "coordinator 'a', expected address:port"),
    ],
)
def test_refused_configurations(config, match):
    with pytest.raises(hosts.HostError, match=match):
        hosts.join(hosts.HostConfig(**config))


def test_a_lone_process_asks_nobody():
    hosts.join(hosts.HostConfig())
    hosts.check_same({"log": object()})
    hosts.wait("nobody")
    assert hosts.alone() and hosts.any_of(True, False) == (True, False)
    x = np.arange(3)
    assert hosts.gathered(x)[0] is x
    with hosts.Stop().listening() as stop:
        assert not stop.wished


def test_a_lone_process_takes_sigterm_as_ctrl_c_and_leaves_others_handlers():
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(KeyboardInterrupt), hosts.Stop().listening():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        met = []
        signal.signal(signal.SIGTERM, lambda *_: met.append(1))
        with hosts.Stop().listening():
            os.kill(os.getpid(), signal.SIGTERM)
        assert met == [1]
        # A thread may not set a handler, and need not.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            pool.submit(lambda: hosts.Stop().listening().__enter__()).result()
    finally:
        signal.signal(signal.SIGTERM, before)


def fail():
    raise ValueError("bad")


def test_what_host_0_cannot_do_fails_everywhere(monkeypatch):
    done = []
    hosts.first_does(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ValueError, match=r"^bad$"):
        hosts.first_does(fail)
    # As the second of two, which is told what the first one met.
    told = [np.frombuffer(b"ValueError: bad", np.uint8), np.zeros(0, np.uint8)]
    monkeypatch.setattr(hosts, "alone", lambda: False)
    monkeypatch.setattr(hosts, "gathered", lambda x: told)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(hosts.HostError, match=r"^host 0 of 1: ValueError: bad$"):
        hosts.first_does(fail)
    told[0] = told[1]
    hosts.first_does(fail)
