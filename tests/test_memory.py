"""Memory of a machine and of a container, as Linux prints them."""

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
