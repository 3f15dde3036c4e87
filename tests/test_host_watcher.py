"""The watcher: who ended first, from the notes that lie in the folder."""

import json
import os
import subprocess
import sys
import time

import pytest

from rankjax import host_watcher

ME = {"run": "a", "index": 0, "count": 2, "machine": "here", "pid": 11}
OTHER = {**ME, "index": 1, "machine": "there", "pid": 12, "how": "ended with E: why", "step": 7}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    (tmp_path / "hosts").mkdir()
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    return tmp_path


def watched(folder, said, **me):
    """What the watcher says of a host that wrote this and was gone."""
    read, write = os.pipe()
    os.write(write, said)
    os.close(write)
    return host_watcher.watch(folder, {**ME, **me}, 0.0, read)


def note(folder, **fields):
    (folder / "hosts" / "1.json").write_text(json.dumps({**OTHER, **fields}))


def test_a_host_that_ends_well_leaves_no_word(folder):
    assert watched(folder, b"step 3\ndone\n") is None
    assert not list((folder / "hosts").iterdir())


def test_a_host_that_is_gone_is_named_with_its_last_step(folder, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: note(folder, at=time.time() + 1))
    found = watched(folder, b"step 3\nstep 5\n")
    assert found.startswith("rankjax: host 0 of 2 (here, pid 11) ended without a word")
    assert "after step 5" in found and "no sign" not in found
    assert f"Newest complete checkpoint: step 6 in {folder / 'checkpoints'}" in found
    assert json.loads((folder / "hosts" / "0.json").read_text())["step"] == 5


def test_an_error_is_told(folder):
    found = watched(folder, b"error ValueError: bad\n")
    assert "host 0 of 2 (here, pid 11) ended with ValueError: bad before the first step" in found
    assert "of host 1 there is no sign" in found


def test_the_first_end_is_the_cause(folder):
    note(folder, at=time.time() - 2)
    found = watched(folder, b"step 7\nerror F: other\n")
    assert found.startswith("rankjax: host 1 of 2 (there, pid 12) ended with E: why after step 7")
    assert "host 0 ended with it" in found


def test_who_went_without_a_word_comes_before_errors_and_clocks(folder):
    """The other one's clock is ahead; it met an error, as the first one was gone."""
    note(folder, at=time.time() - 2)
    assert watched(folder, b"").startswith("rankjax: host 0 of 2 (here, pid 11) ended without")
    note(folder, at=time.time() - 2, how=host_watcher.ENDED)
    found = watched(folder, b"error E: why\n")
    assert found.startswith("rankjax: host 0 of 2 (here, pid 11) ended with E: why")


def test_notes_of_another_run_are_not_read(folder):
    note(folder, at=time.time(), run="b")
    assert "of host 1 there is no sign" in watched(folder, b"step 3\n")


def test_a_host_that_waits_for_a_dead_one_is_ended(folder):
    """Itself it would wait for a minute, or forever."""
    host = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    read, write = os.pipe()
    args = str(folder), json.dumps({**ME, "pid": host.pid}), "0.1"
    watcher = subprocess.Popen(
        [sys.executable, "-I", host_watcher.__file__, *args],
        stdin=read,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(read)
    note(folder, at=time.time())
    assert host.wait(timeout=60) == -9
    os.close(write)
    assert "host 1 of 2 (there, pid 12)" in watcher.communicate(timeout=60)[1]
