"""doctor: what is found is reported, what is wrong becomes a finding, nothing raises."""

import io
import json
import sys

import pytest
import rich.console
from packaging.requirements import Requirement

from rankjax import doctor, memory

JAX = {"backend": "cpu", "devices": ["cpu:0 cpu"], "x64": False, "computes": True, "messages": []}


def words(report: dict) -> str:
    return " | ".join(f"{f['status']}: {f['what']} -> {f['advice']}" for f in report["findings"])


def fake_versions(monkeypatch, **versions: str | None) -> None:
    real = doctor.version
    named = {name.replace("_", "-"): found for name, found in versions.items()}
    monkeypatch.setattr(doctor, "version", lambda n: named[n] if n in named else real(n))


@pytest.fixture
def quick(monkeypatch):
    """A healthy jax on the CPU without starting the child process."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv(doctor.DATA_VARIABLE, raising=False)
    monkeypatch.setattr(doctor, "_probe", lambda environment, timeout: dict(JAX))
    monkeypatch.setattr(doctor, "_nvidia", lambda: [])


def test_this_machine(monkeypatch, tmp_path):
    """The real thing, child process included."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    report = json.loads(json.dumps(doctor.run(tmp_path)))
    assert report["jax"]["backend"] == "cpu" and report["jax"]["computes"]
    assert report["machine"]["cores"] > 0 and report["machine"]["disk_free_gib"] > 0
    assert report["packages"]["jax"] and report["packages"]["jaxlib"]
    assert {"test", "gpu", "tpu", "peers"} <= set(report["extras"])
    assert report["extras"]["gpu"]["install"] == "pip install 'rankjax[gpu]'"


def test_show_prints_everything_literally(quick, tmp_path):
    report = doctor.run(tmp_path)
    report["findings"] = [{"status": "problem", "what": "[red]x[/red]", "advice": "do [y]"}]
    out = io.StringIO()
    doctor.show(report, rich.console.Console(file=out, width=200))
    for expected in ("pip install 'rankjax[", "problem: [red]x[/red]", "do [y]", "cpu:0 cpu"):
        assert expected in out.getvalue()


def test_a_plugin_that_fails_is_a_finding(monkeypatch):
    """An unknown platform stands for a plugin that does not initialise: same path through jax."""
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_accelerator")
    found = []
    facts = doctor.jax_devices(found)
    assert "no_such_accelerator" in facts["error"] and facts["cpu_works"]
    assert found[0]["status"] == doctor.PROBLEM and "JAX_PLATFORMS=cpu works" in found[0]["advice"]


def test_a_jax_that_hangs_is_a_finding(monkeypatch):
    def late(*args, **kwargs):
        raise doctor.subprocess.TimeoutExpired(cmd="python", timeout=kwargs["timeout"])

    monkeypatch.setattr(doctor.subprocess, "run", late)
    found = []
    facts = doctor.jax_devices(found, timeout=7)
    assert facts == {"error": "no answer within 7 s", "cpu_works": False}
    assert found[0]["status"] == doctor.PROBLEM


def test_a_gpu_without_cuda_says_what_to_install(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_nvidia", lambda: ["NVIDIA H200, 143771 MiB, 570.1"])
    fake_versions(monkeypatch, jax_cuda12_plugin=None)
    report = doctor.run(tmp_path)
    assert "1 GPU (NVIDIA H200, 143771 MiB, 570.1), but jax uses cpu" in words(report)
    assert "warning" in words(report) and "pip install 'rankjax[gpu]'" in words(report)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "note: 1 GPU" in words(doctor.run(tmp_path))


def test_mismatched_versions_are_problems(quick, monkeypatch, tmp_path):
    fake_versions(monkeypatch, jaxlib="0.4.1", flax="0.1", optax=None, jax_cuda12_plugin="0.4.30")
    report = doctor.run(tmp_path)
    assert not report["ok"]
    assert "rankjax needs flax>=0.12 (found 0.1)" in words(report)
    assert "rankjax needs optax>=0.2.8 (missing)" in words(report)
    assert "needs jaxlib" in words(report) and "(found 0.4.1)" in words(report)
    assert "jax-cuda12-plugin 0.4.30 beside jaxlib 0.4.1" in words(report)


def test_a_newer_stack_is_only_noted(quick, monkeypatch, tmp_path):
    assert doctor.run(tmp_path)["packages"]["optax"]
    fake_versions(monkeypatch, optax="99.0")
    assert "note: optax 99.0 is newer than" in words(doctor.run(tmp_path))


def test_unmet_follows_extras(monkeypatch):
    needs = {("a", "gpu"): ["b[c]>=2"], ("b", "c"): ["d==1"]}
    monkeypatch.setattr(
        doctor, "requirements", lambda n, e="": [Requirement(r) for r in needs.get((n, e), [])]
    )
    fake_versions(monkeypatch, a="1", b="2", d=None)
    assert doctor.unmet(Requirement("a[gpu]")) == ["d==1 (missing)"]
    fake_versions(monkeypatch, a="1", b="1", d="1")
    assert doctor.unmet(Requirement("a[gpu]")) == ["b>=2 (found 1)"]
    assert doctor.unmet(Requirement("a")) == []


def test_scarce_machine(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "of_machine", lambda: (4 * doctor.GIB, doctor.GIB // 2))
    monkeypatch.setattr(doctor, "_free", lambda folder: 0.0625)
    said = words(doctor.run(tmp_path))
    assert "0.5 GiB of memory" in said and "64 MiB of shared memory" in said
    assert f"0.1 GiB of disk is free under {tmp_path}" in said


def test_data_folder(quick, monkeypatch, tmp_path):
    (tmp_path / "ml-1m").mkdir()
    monkeypatch.setenv(doctor.DATA_VARIABLE, str(tmp_path))
    assert doctor.run(tmp_path)["data"]["sets"] == ["ml-1m"]
    monkeypatch.setenv(doctor.DATA_VARIABLE, str(tmp_path / "gone"))
    report = doctor.run(tmp_path)
    assert not report["data"]["found"] and "gone is no folder" in words(report) and report["ok"]


def test_not_installed(quick, monkeypatch, tmp_path):
    fake_versions(monkeypatch, rankjax=None)
    report = doctor.run(tmp_path)
    assert not report["ok"] and "is not installed" in words(report)
    assert report["python"]["executable"] == sys.executable
