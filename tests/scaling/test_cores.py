"""Processes that do not know of each other take different cores."""

import multiprocessing
import os
import tempfile

import pytest

from rankjax.scaling import cores


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Not the machine's: a study may run there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cores, "_held", [])
    cores.take.cache_clear()
    yield
    for f in cores._held:
        f.close()
    cores.take.cache_clear()


def _take(folder, pipe):
    tempfile.tempdir = folder
    cores.pin(1)
    pipe.send(os.sched_getaffinity(0))
    pipe.recv()


def test_another_process_has_other_cores_until_it_ends(tmp_path):
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        pytest.skip("needs two cores")
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_take, args=(str(tmp_path), there)
    )
    process.start()
    assert here.recv() == {usable[0]}
    assert cores.take(1) == (usable[1],) == cores.take(1)
    here.send("end")
    process.join()
    cores.take.cache_clear()
    assert cores.take(1) == (usable[0],)


def test_where_all_are_taken_they_are_shared():
    usable = sorted(os.sched_getaffinity(0))
    assert cores.take(len(usable)) == tuple(usable)
    assert cores.take(1) == (usable[0],)  # of another process, as far as locks can tell


def test_more_cores_than_there_are_are_refused():
    many = len(os.sched_getaffinity(0)) + 1
    with pytest.raises(ValueError, match=rf"found {many - 1} cores .*expected at least {many}"):
        cores.take(many)
    assert not cores._held
