"""Targets: which devices they give, and what is said where one cannot be compiled for."""

import importlib.util
import sys

import jax
import pytest

from rankjax import flops
from rankjax.plan import targets


def test_cpus_are_those_here():
    found = targets.find("cpu:2")
    assert list(found.devices) == jax.devices()[:2] and found.chip is None


@pytest.mark.parametrize(
    "name", ["", "v5e", "v9:2x2", "v5e:2,2", "cpu:0", "cpu:99", "h200:2x2", "h200:0", "h200:9"]
)
def test_targets_that_there_are_not(name):
    with pytest.raises(ValueError, match="found target"):
        targets.find(name)


def test_without_libtpu_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ValueError, match=r"compiled by libtpu.*pip install 'jax\[tpu\]'"):
        targets.find("v5e:2x2")


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="the CUDA plugin is here"
)
def test_without_the_cuda_plugin_it_is_said_what_to_install():
    with pytest.raises(ValueError, match=r"h200:8 is compiled by JAX's CUDA plugin.*jax\[cuda12\]"):
        targets.find("h200:8")


def test_peaks_are_those_that_utilisation_is_counted_by():
    for chip in targets.CHIPS.values():
        assert flops.PEAK[chip.kind] == chip.peak
