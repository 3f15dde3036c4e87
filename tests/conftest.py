"""What every test file needs: that its worker has room for the programs that it compiles."""

import gc
import pathlib

import jax
import pytest

MAPS = pathlib.Path("/proc/self/maps")
MANY = 20_000


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Drops all compiled programs once they hold many memory maps.

    A program holds about ten of them and Linux gives a process 65,530: a worker that kept the
    programs of all files would end in a segmentation fault of the compiler.
    """
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MANY:
        jax.clear_caches()
        gc.collect()
