"""What every test file needs: that the compiled programs of the files before it are gone."""

import gc

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """A compiled program holds about ten memory maps, and Linux gives a process 65,530.

    A worker that kept the programs of all files would end in a segmentation fault of the compiler.
    """
    yield
    jax.clear_caches()
    gc.collect()
