"""What every test file needs: programs that compile fast, and room for them."""

import gc
import os
import pathlib

# Eight devices on any machine, for meshes; what asks for none runs on the first.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

# Tests compile thousands of programs and run each on a few rows: without the compiler's costly
# passes they take half the time. Processes that a test starts compile as users' do.
jax.config.update("jax_disable_most_optimizations", True)

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
