"""What this machine has and lacks: packages, jax and its devices, memory, disk, extras, data.

`run` looks and returns a JSON-able report, `show` prints it as a table. jax is tried in a process
of its own, so that an accelerator plugin that fails, hangs or kills the process is one line of the
report. `python -m rankjax.doctor` needs only packaging and rich of all dependencies.
"""

import glob
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from typing import Any

import rich.console
import rich.table
import rich.text
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import rankjax
from rankjax import memory

PROBLEM, WARNING, NOTE = "problem", "warning", "note"
GIB = 2**30
DATA_VARIABLE = "RANKJAX_DATA"
# What these need of each other is checked too: the usual way in which an upgrade breaks jax.
STACK = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "chex")
# Installed and tested together; another set may work and is only noted.
TRIED = {
    "3.11": {"jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8", "orbax-checkpoint": "0.12.8"},
    "3.12": {"jax": "0.12.0.1", "flax": "0.12.12", "optax": "0.2.8", "orbax-checkpoint": "0.12.8"},
}


def run(folder: pathlib.Path = pathlib.Path()) -> dict[str, Any]:
    """Looks at this machine; changes nothing, never raises for what it finds.

    Args:
      folder: where logs and studies will be written (its free disk space is reported).
    Returns: JSON-able facts under "rankjax", "python", "machine", "packages", "jax", "extras",
      "data", and what follows from them: "findings", a list of {"status", "what", "advice"} with
      status "problem", "warning" or "note", and "ok": no finding is a problem.
    """
    found: list[dict[str, str]] = []
    report = {
        "rankjax": rankjax.__version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "machine": machine(folder, found),
        "packages": packages(found),
        "extras": extras(),
        "jax": jax_devices(found),
        "data": data_folder(found),
    }
    _accelerators(report, found)
    _tried_together(report, found)
    report["findings"] = sorted(found, key=lambda f: (PROBLEM, WARNING, NOTE).index(f["status"]))
    report["ok"] = all(f["status"] != PROBLEM for f in found)
    return report


def _finding(found: list[dict[str, str]], status: str, what: str, advice: str) -> None:
    found.append({"status": status, "what": what, "advice": advice})


# --- the machine -----------------------------------------------------------------------------


def machine(folder: pathlib.Path, found: list[dict[str, str]]) -> dict[str, Any]:
    """Cores, memory and disk that this process may use; None where the system does not say."""
    total, available = (None if x is None else x / GIB for x in memory.of_machine())
    shared = _free("/dev/shm")
    facts = {
        "system": platform.platform(),
        "cores": _cores(),
        "memory_gib": total,
        "memory_available_gib": available,
        "disk_free_gib": _free(folder),
        "shared_memory_free_gib": shared,
        "nvidia": _nvidia(),
        "tpu_devices": sorted(glob.glob("/dev/accel[0-9]*")),
    }
    if available is not None and available < 2:
        advice = "close other programs, or choose a smaller batch and world"
        _finding(found, WARNING, f"{available:.1f} GiB of memory is available", advice)
    if facts["disk_free_gib"] is not None and facts["disk_free_gib"] < 2:
        where = pathlib.Path(folder).resolve()
        what = f"{facts['disk_free_gib']:.1f} GiB of disk is free under {where}"
        _finding(found, WARNING, what, "write logs and studies to another disk")
    if shared is not None and shared < 0.25:
        what = f"{1024 * shared:.0f} MiB of shared memory (/dev/shm) is free"
        advice = "loader processes hand batches over through it: docker run --shm-size=2g"
        _finding(found, NOTE, what, advice)
    return facts


def _cores() -> float:
    """Cores that this process may use: affinity and the container's quota, whichever is less."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    quota, _, period = memory.read("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(cores, int(quota) / int(period)) if quota.isdigit() else cores


def _free(folder: str | pathlib.Path) -> float | None:
    """GiB that may still be written to the folder's disk."""
    try:
        return shutil.disk_usage(folder).free / GIB
    except OSError:
        return None


def _nvidia() -> list[str]:
    """One line a GPU from nvidia-smi, [] without it or where it fails."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


# --- packages and extras ---------------------------------------------------------------------


def version(name: str) -> str | None:
    """The installed version of a distribution, None where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(name: str, extra: str = "") -> list[Requirement]:
    """What a distribution needs here: always (extra ""), or more for this extra."""
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    needs = [Requirement(line) for line in lines]
    always = [r for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    return [r for r in needs if r not in always and r.marker.evaluate({"extra": extra})]


def unmet(need: Requirement, seen: frozenset[str] = frozenset()) -> list[str]:
    """What is missing or has another version, as words; follows extras like jax[cuda12]."""
    found, wanted = version(need.name), f"{need.name}{need.specifier}"
    if found is None:
        return [f"{wanted} (missing)"]
    if not need.specifier.contains(found, prereleases=True):
        return [f"{wanted} (found {found})"]
    if str(need) in seen:
        return []
    seen = seen | {str(need)}
    inner = [r for extra in sorted(need.extras) for r in requirements(need.name, extra)]
    return list(dict.fromkeys(line for r in inner for line in unmet(r, seen)))


def packages(found: list[dict[str, str]]) -> dict[str, str | None]:
    """{distribution: version} of what rankjax needs; mismatches become findings."""
    wanted_python = "3.11"
    if sys.version_info[:2] < tuple(map(int, wanted_python.split("."))):
        what = f"Python {platform.python_version()}, expected {wanted_python} or newer"
        _finding(found, PROBLEM, what, "make a virtual environment with a newer Python")
    if version("rankjax") is None:
        what = "rankjax runs from a folder and is not installed: its needs cannot be checked"
        _finding(found, PROBLEM, what, "pip install -e . (in the checkout)")
    needs = requirements("rankjax")
    for line in (line for need in needs for line in unmet(need)):
        _finding(found, PROBLEM, f"rankjax needs {line}", "pip install -U rankjax")
    for owner in STACK:
        if version(owner) is not None:
            for line in (line for need in requirements(owner) for line in unmet(need)):
                advice = f"pip install -U {owner}, or a fresh virtual environment"
                what = f"{owner} {version(owner)} needs {line}"
                _finding(found, PROBLEM, what, advice)
    _plugins(found)
    names = dict.fromkeys([*(canonicalize_name(r.name) for r in needs), "jaxlib"])
    return {name: version(name) for name in names}


def _plugins(found: list[dict[str, str]]) -> None:
    """jax leaves a CUDA plugin aside whose version is not jaxlib's, with a warning at most."""
    jaxlib = version("jaxlib")
    for name in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        plugin = version(name)
        if jaxlib and plugin and Version(plugin).release[:3] != Version(jaxlib).release[:3]:
            what = f"{name} {plugin} beside jaxlib {jaxlib}: jax will not use the GPU"
            _finding(found, PROBLEM, what, "pip install -U 'rankjax[gpu]'")


def extras() -> dict[str, dict[str, Any]]:
    """{extra: {"present", "missing", "install"}} for every extra of rankjax."""
    try:
        names = importlib.metadata.metadata("rankjax").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for name in names:
        needs = requirements("rankjax", name)
        missing = list(dict.fromkeys(line for need in needs for line in unmet(need)))
        install = f"pip install 'rankjax[{name}]'"
        found[name] = {"present": not missing, "missing": missing, "install": install}
    return found


def _tried_together(report: dict[str, Any], found: list[dict[str, str]]) -> None:
    """Notes a stack newer than what was tested: it may work, and is the first thing to suspect."""
    for name, tried in (TRIED.get(".".join(platform.python_version_tuple()[:2])) or {}).items():
        here = report["packages"].get(name)
        if here and Version(here) > Version(tried):
            what = f"{name} {here} is newer than {tried}, with which rankjax was tested"
            _finding(found, NOTE, what, f"if something breaks: pip install {name}=={tried}")


# --- jax and accelerators --------------------------------------------------------------------


def probe() -> None:
    """Starts jax, runs a small program, prints one line of JSON. Called in a child process."""
    import jax
    import jax.numpy as jnp

    total = jax.jit(lambda x_ij: (x_ij @ x_ij).sum())(jnp.ones((64, 64)))
    facts = {
        "backend": jax.default_backend(),
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()],
        "x64": bool(jax.config.jax_enable_x64),
        "computes": float(total) == 64.0**3,
    }
    print(json.dumps(facts))


def jax_devices(found: list[dict[str, str]], timeout: float = 180.0) -> dict[str, Any]:
    """Backend, devices, x64 flag, and jax's own messages, from a child process.

    Where jax does not start, "error" holds its last line, and "cpu_works" says whether it does
    with JAX_PLATFORMS=cpu.
    """
    facts = _probe(dict(os.environ), timeout)
    if "error" in facts:
        facts["cpu_works"] = "error" not in _probe({**os.environ, "JAX_PLATFORMS": "cpu"}, timeout)
        advice = "reinstall jax: pip install -U rankjax"
        if facts["cpu_works"]:
            advice = "JAX_PLATFORMS=cpu works; for the accelerator see the driver and the plugin"
        _finding(found, PROBLEM, f"jax does not start: {facts['error']}", advice)
        return facts
    if not facts["computes"]:
        what = f"jax computes a wrong sum on {facts['backend']}"
        _finding(found, PROBLEM, what, "update the driver, or set JAX_PLATFORMS=cpu")
    if facts["x64"]:
        what = "jax_enable_x64 is on: arrays may become float64, slower and twice as large"
        _finding(found, NOTE, what, "unset JAX_ENABLE_X64")
    return facts


def _probe(environment: dict[str, str], timeout: float) -> dict[str, Any]:
    root = str(pathlib.Path(rankjax.__file__).parents[1])
    paths = [root, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    environment["JAX_TRACEBACK_FILTERING"] = "off"  # else the last line is advice, not the error
    command = [sys.executable, "-c", "from rankjax import doctor; doctor.probe()"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout:.0f} s"}
    messages = [line for line in done.stderr.splitlines() if line.strip()]
    try:
        facts = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"error": messages[-1] if messages else f"exit status {done.returncode}"}
    return {**facts, "messages": messages[-5:]}


def _accelerators(report: dict[str, Any], found: list[dict[str, str]]) -> None:
    """An accelerator that stands in the machine and that jax does not use."""
    backend, platforms = report["jax"].get("backend"), os.environ.get("JAX_PLATFORMS", "")
    for devices, kind, extra in (
        (report["machine"]["nvidia"], "gpu", "gpu"),
        (report["machine"]["tpu_devices"], "tpu", "tpu"),
    ):
        if not devices or backend == kind:
            continue
        what = f"{len(devices)} {kind.upper()} ({devices[0]}), but jax uses {backend or 'nothing'}"
        missing = report["extras"].get(extra, {}).get("missing")
        if platforms and not set(platforms.split(",")) & {kind, "cuda"}:
            _finding(found, NOTE, what, f"JAX_PLATFORMS={platforms} says so; unset it to use it")
        elif missing:
            _finding(found, WARNING, what, f"pip install 'rankjax[{extra}]'")
        else:
            messages = " ".join(report["jax"].get("messages", ()))
            _finding(found, WARNING, what, f"the plugin is installed; jax says: {messages}")


def data_folder(found: list[dict[str, str]]) -> dict[str, Any]:
    """The folder of real data sets that tests and experiments read, and what lies in it."""
    default = pathlib.Path(rankjax.__file__).parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get(DATA_VARIABLE) or default)
    names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if DATA_VARIABLE in os.environ and not folder.is_dir():
        what = f"{DATA_VARIABLE}={folder} is no folder"
        _finding(found, WARNING, what, f"correct or unset {DATA_VARIABLE}")
    return {"folder": str(folder), "found": folder.is_dir(), "sets": names}


# --- printing --------------------------------------------------------------------------------


def show(report: dict[str, Any], console: rich.console.Console | None = None) -> None:
    """Prints a report of `run` as a table; findings, worst first, below it."""
    console = console or rich.console.Console()
    table = rich.table.Table("what", "found", title=f"rankjax {report['rankjax']}")

    def row(what: str, found: str) -> None:
        # Text, not markup: a "[gpu]" must be printed as it is.
        table.add_row(rich.text.Text(what), rich.text.Text(found))

    jax_facts, m = report["jax"], report["machine"]
    python = report["python"]
    row("Python", f"{python['version']} ({python['executable']})")
    versions = (f"{name} {found or 'MISSING'}" for name, found in report["packages"].items())
    row("packages", ", ".join(versions))
    devices = ", ".join(jax_facts.get("devices", ())) or f"none: {jax_facts.get('error')}"
    row("jax devices", devices)
    row("jax x64", str(jax_facts.get("x64", "unknown")))
    row("GPUs (nvidia-smi)", ", ".join(m["nvidia"]) or "none")
    row("CPU cores", f"{m['cores']:g}")
    row("memory", f"{_gib(m['memory_gib'])}, {_gib(m['memory_available_gib'])} available")
    row("disk free", _gib(m["disk_free_gib"]))
    row("shared memory free", _gib(m["shared_memory_free_gib"]))
    for name, extra in report["extras"].items():
        missing = f"{extra['install']}   lacks {', '.join(extra['missing'])}"
        row(f"extra: {name}", "present" if extra["present"] else missing)
    data = report["data"]
    row(DATA_VARIABLE, f"{data['folder']}: {', '.join(data['sets']) or 'not found'}")
    console.print(table)
    for finding in report["findings"]:
        console.print(f"{finding['status']}: {finding['what']}", markup=False, highlight=False)
        console.print(f"    {finding['advice']}", markup=False, highlight=False)
    console.print("ok" if report["ok"] else "not ok", highlight=False)


def _gib(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} GiB"


if __name__ == "__main__":
    REPORT = run()
    show(REPORT)
    sys.exit(0 if REPORT["ok"] else 1)
