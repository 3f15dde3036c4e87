"""Memory of a machine and of a container, as Linux prints them."""

import subprocess
import sys

import pytest

from rankjax import memory

FREE = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    8000 kB"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (None, None)),
        ({"meminfo": FREE}, (16_384_000, 8_192_000)),
        ({"meminfo": FREE, "memory.max": "max"}, (16_384_000, 8_192_000)),
        (
            {"meminfo": FREE, "memory.max": "5000000", "memory.current": "2000000"},
            (5_000_000, 3_000_000),
        ),
        ({"meminfo": FREE, "memory.max": "50", "memory.current": "60"}, (50, 0)),
        ({"memory.max": "50"}, (None, None)),
    ],
)
def test_a_container_has_what_its_limit_leaves(files, expected, monkeypatch):
    monkeypatch.setattr(memory, "read", lambda path: files.get(path.rsplit("/", 1)[1], ""))
    assert memory.of_machine() == expected


def test_this_machine_has_some():
    total, available = memory.of_machine()
    assert total is None or 0 < available <= total
    assert memory.read("/nowhere") == ""


@pytest.mark.skipif(not memory.peak_mib(), reason="/proc/self/status has no VmHWM here")
def test_the_peak_of_a_process_stays_when_the_memory_is_given_back():
    code = "from rankjax.memory import peak_mib as peak; a = peak(); b'x' * 2**28; print(a, peak())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, after = map(float, done.stdout.split())
    assert 1 < before < 200 and 250 < after - before < 300  # its own, not pytest's
