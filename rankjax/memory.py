"""How much memory this machine has, and lets this process take: Linux, containers included."""

import pathlib


def of_machine() -> tuple[int | None, int | None]:
    """Bytes of memory: all (or the container's limit), and available now; None where the system
    does not say."""
    lines = (line.split() for line in read("/proc/meminfo").splitlines())
    kib = {words[0]: int(words[1]) for words in lines if len(words) > 1}
    total, available = (
        kib[key] * 1024 if key in kib else None for key in ("MemTotal:", "MemAvailable:")
    )
    limit = read("/sys/fs/cgroup/memory.max")
    if total is not None and limit.isdigit():
        total = min(total, int(limit))
        used = read("/sys/fs/cgroup/memory.current")
        if available is not None and used.isdigit():
            available = min(available, max(0, int(limit) - int(used)))
    return total, available


def peak_mib() -> float:
    """The most memory that this process has had, in MiB; 0 where the system does not say.

    Not getrusage's figure, which starts with that of the process that started this one.
    """
    lines = (line.split() for line in read("/proc/self/status").splitlines())
    return next((int(words[1]) / 1024 for words in lines if words[:1] == ["VmHWM:"]), 0.0)


def read(path: str) -> str:
    """What a file of the system says, without white space at its ends; "" where it says nothing."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
