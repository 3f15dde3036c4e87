"""ray_cluster: what is not there is told at once; every node answers for itself."""

import os
import socket
import sys

import pytest

from rankjax import ray_cluster
from tests import ray_clusters


@pytest.fixture(scope="module")
def cluster():
    with ray_clusters.started() as address:
        yield address


def refused(address: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message), ray_cluster.connected(address):
        pass


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused("auto", r"found no Ray .*pip install 'rankjax\[ray\]'")


@pytest.mark.parametrize("address", ["nowhere", "ray://127.0.0.1:1", "head:"])
def test_no_address(address):
    pytest.importorskip("ray")
    refused(address, f"found Ray address '{address}', expected HOST:PORT or auto")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "[::1]:9", "127.0.0.1:99999"])
def test_nobody_listens(address, monkeypatch):
    pytest.importorskip("ray")
    message = r"found no Ray cluster at .*:9.* \(.*expected one: start it with `ray start --head`"
    refused(address, message)
    monkeypatch.setenv("RAY_ADDRESS", address)
    refused(None, message)
    refused("auto", message)


def test_no_cluster_on_this_machine(monkeypatch):
    ray = pytest.importorskip("ray")

    def none(**_):
        raise ConnectionError("Could not find any\nrunning Ray instance.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", none)
    refused(None, r"found no Ray cluster at this machine \(Could not find any running .*`ray start")


def _look(what: str) -> tuple[str, str, str | None]:
    if what == "fail":
        raise LookupError("there is\nnothing")
    return what, socket.gethostname(), os.environ.get("SAID")


@pytest.mark.slow
def test_every_node_answers(cluster):
    with ray_cluster.connected(cluster) as ray:
        nodes = ray_cluster.alive(ray)
        with ray_cluster.connected("nowhere") as again:  # what is connected stays so
            assert again is ray
        asked = ray_cluster.answers(ray, nodes, _look, "x", environment={"SAID": "y"})
        ((name, said),) = asked
        assert name == socket.gethostname() and said == ("x", name, "y")
        with pytest.raises(ValueError, match=rf"node {name}: found .*there is nothing, expected"):
            list(ray_cluster.answers(ray, nodes, _look, "fail"))
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_node_that_does_not_answer_in_time_is_named(cluster, monkeypatch):
    monkeypatch.setattr(ray_cluster, "ANSWER", 0)
    with ray_cluster.connected(cluster) as ray:
        nodes = ray_cluster.alive(ray)
        with pytest.raises(ValueError, match=rf"nodes \['{socket.gethostname()}'\]: found no ans"):
            list(ray_cluster.answers(ray, nodes, _look, "x"))
