"""The chosen engine trains, and a setting of another one is a mistake."""

import importlib.util

import pytest

from rankjax import cli
from rankjax.scaling import engines, presets, ray_engine, slurm_engine, workers


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"address": "head:6379"}, "--address with --engine local, expected ray"),
        ({"engine": "slurm", "resources": ray_engine.Resources(gpus=1)}, "--resources .*ray"),
        ({"engine": "ray", "slurm": slurm_engine.Slurm(jobs=2)}, "--slurm with --engine ray"),
    ],
)
def test_settings_of_another_engine_are_refused(flags, match):
    with pytest.raises(ValueError, match=match):
        engines.Engine(**flags)


def test_each_engine_gets_what_was_asked(monkeypatch, tmp_path):
    called = []
    for module in (workers, ray_engine, slurm_engine):
        note = lambda *args, name=module.__name__, **more: called.append((name, args, more))
        monkeypatch.setattr(module, "run", note)
    resources, slurm = ray_engine.Resources(cpus=2), slurm_engine.Slurm(jobs=3)
    by_ray = engines.Engine(engine="ray", address="head:1", resources=resources)
    engines.run("study", tmp_path, engines.Engine(), 2)
    engines.run("study", tmp_path, by_ray, 5)
    engines.run("study", tmp_path, engines.Engine(engine="slurm", slurm=slurm))
    assert called == [
        (workers.__name__, ("study", tmp_path), {"workers": 2}),
        (ray_engine.__name__, ("study", tmp_path, resources), {"address": "head:1", "at_once": 5}),
        (slurm_engine.__name__, ("study", tmp_path, slurm), {}),
    ]
    with pytest.raises(
        ValueError, match=r"--workers 2 with --engine slurm, expected --slurm\.jobs"
    ):
        engines.run("study", tmp_path, engines.Engine(engine="slurm"), 2)


@pytest.mark.parametrize(
    ("args", "package", "says"),
    [
        (["--engine", "ray", "--address", "127.0.0.1:1"], "ray", "no Ray cluster at 127.0.0.1:1"),
        (["--engine", "slurm"], "submitit", "found no sbatch, srun on PATH"),
        (["--engine", "slurm", "--workers", "2"], "rankjax", "expected --slurm.jobs"),
        (["--engine", "slurm", "--dry-run"], "rankjax", "found --dry-run with --engine slurm"),
        (["--engine", "ray", "--max-hours", "1"], "rankjax", "found --max-hours with --engine ra"),
    ],
)
def test_an_engine_that_is_not_there_is_told_before_the_world_is_made(
    args, package, says, tmp_path, monkeypatch, capsys
):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(presets, "quick", lambda folder: pytest.fail("made"))
    for command in (["quick"], ["run", "no log"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["study", *command, str(tmp_path / "study"), *args])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1 and says in said
