"""What machines must share is compared before they train; each complaint names the machine."""

import dataclasses
import multiprocessing
import os
import pathlib

import pytest

from rankjax.scaling import nodes, study
from tests import tiny, trials

ME = os.uname().nodename


@pytest.fixture
def expected(tmp_path):
    asked = trials.asked(tiny.log(tmp_path / "log", requests=60, events=100))
    folder = tmp_path / "study"
    log = study.open_folder(asked, folder)
    with nodes.expecting(asked, folder, log) as found:
        yield found
    assert not list(folder.glob("shared-*"))


def test_a_machine_that_shares_all_has_no_complaint(expected):
    assert nodes.complaint(expected) is None
    nodes.check(expected)


def test_a_folder_that_is_not_shared_is_told(expected):
    away = dataclasses.replace(expected, machine="head", marker="/nowhere/shared-1")
    said = nodes.complaint(away)
    assert said.startswith(f"{ME}: found no /nowhere/shared-1, which head has written; expected ")
    other = dataclasses.replace(expected, token="of another run")
    assert "found no " in nodes.complaint(other)
    with pytest.raises(nodes.Differs, match="found no "):
        nodes.check(other)


def test_locks_that_do_not_reach_are_told(expected):
    """As on a file system that keeps locks to each machine: the marker seems unlocked."""
    copy = pathlib.Path(expected.marker).with_name("copy")
    copy.write_text(expected.token)
    unlocked = dataclasses.replace(expected, marker=str(copy))
    assert f"{ME}: found {copy} unlocked, while " in nodes.complaint(unlocked)
    old = 2 * nodes.LEADS
    os.utime(copy, (copy.stat().st_atime - old, copy.stat().st_mtime - old))
    assert nodes.complaint(unlocked) is None  # its leader was killed; jobs go on without it
    nodes.lead(unlocked)
    assert "unlocked" in nodes.complaint(unlocked)


def test_another_log_is_told(expected, tmp_path):
    other = dataclasses.replace(expected, fingerprint={**expected.fingerprint, "requests": 61})
    said = nodes.complaint(other)
    assert said == (
        f"{ME}: found log {{'requests': 60}}, expected {{'requests': 61}} as on {expected.machine}"
    )
    gone = dataclasses.replace(expected.study, log=str(tmp_path / "gone"))
    assert "gone" in nodes.complaint(dataclasses.replace(expected, study=gone))


def test_another_version_is_told(expected):
    there = {**nodes.versions(), "jax": "0.9.9"}
    said = nodes.complaint(dataclasses.replace(expected, versions=there))
    assert f"versions {{'jax': '{nodes.versions()['jax']}'}}, expected {{'jax': '0.9.9'}}" in said


def _versions(pipe):
    pipe.send(nodes.versions())


def test_versions_are_the_same_in_every_process():
    here, there = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=_versions, args=(there,)).start()
    assert here.recv() == nodes.versions()


def test_rows_are_waited_for(expected, monkeypatch):
    folder = pathlib.Path(expected.marker).parent
    looked = []

    def load_rows(folder):
        looked.append(folder)
        row = {"validation_ne": 1.0, "test_read": True}
        wanted = study.requests(expected.study, {}, lambda c: c.width)[0]
        return ({r.trial.id: row for r in wanted} if len(looked) > 1 else {}), {}

    monkeypatch.setattr(study, "load_rows", load_rows)
    nodes.wait_for_rows(expected.study, folder, lambda c: c.width)
    assert len(looked) == 2
    monkeypatch.setattr(nodes, "SEEN", 0.0)
    monkeypatch.setattr(study, "load_rows", lambda folder: ({}, {}))
    nodes.wait_for_rows(expected.study, folder, lambda c: c.width)  # gives up
    assert not nodes.complete(expected.study, folder, lambda c: c.width)
