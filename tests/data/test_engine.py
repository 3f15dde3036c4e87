"""engine: pieces here and on a Ray cluster of two workers; an import is the same to the byte."""

import functools
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys

import polars as pl
import pytest

from rankjax import cli
from rankjax.data import engine, event_log, importer
from rankjax.data.own import schema_file
from tests.data.own import scenarios

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a cluster of two CPUs, started for these tests alone."""
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    port = 20_000 + os.getpid() % 10_000
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    start = [*ray, "start", "--head", "--num-cpus", "2", "--port", str(port), "--block"]
    start += ["--include-dashboard=false", "--disable-usage-stats"]
    log = (tmp_path_factory.mktemp("ray") / "log").open("w")
    cluster = subprocess.Popen(
        start, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        found = f"127.0.0.1:{port}"
        _wait_for(found, cluster)
        yield found
    finally:
        os.killpg(cluster.pid, signal.SIGTERM)
        cluster.wait(60)


def _wait_for(address: str, cluster: subprocess.Popen) -> None:
    import time

    for _ in range(60):
        assert cluster.poll() is None, "the cluster ended"
        try:
            engine.connected(address).shutdown()
            return
        except ValueError:
            time.sleep(1)
    raise AssertionError("no cluster within a minute")


def _square(folder: pathlib.Path, x: int) -> int:
    """Kills its worker once at 3, always at 13; refuses 7. Counts its calls."""
    with (folder / f"{x}").open("a") as f:
        f.write("x")
    if x == 7:
        raise ValueError("found 7, expected another number")
    if x == 13 or (x == 3 and (folder / "3").stat().st_size == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return x * x


def test_here():
    assert list(engine.here(lambda x: x * x, [3, 1, 2])) == [9, 1, 4]
    assert engine.peak_mib() >= 0


@pytest.mark.slow
@needs_ray
def test_pieces_on_workers_one_of_which_dies(address, tmp_path):
    work = functools.partial(_square, tmp_path)
    with engine.on_ray(address, tmp_path) as workers:
        assert list(workers(work, range(7))) == [x * x for x in range(7)]
        assert (tmp_path / "3").read_text() == "xx" and (tmp_path / "2").read_text() == "x"
        assert workers.peak_mib > 10
        with pytest.raises(ValueError, match=r"^found 7, expected another number$"):
            list(workers(work, [5, 7]))
        assert (tmp_path / "7").read_text() == "x"  # a mistake is not tried again
        with pytest.raises(ChildProcessError, match="died 3 times at one piece"):
            list(workers(work, [13]))
        assert list(workers(work, [])) == []
    assert not list(tmp_path.glob(".seen*"))


@pytest.mark.slow
@needs_ray
def test_what_a_node_does_not_see(address, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_seen", lambda names: ("far", names[:1], engine.versions()))
    with (
        pytest.raises(ValueError, match=rf"node far: found no folder {tmp_path}, expected"),
        engine.on_ray(address, tmp_path),
    ):
        pass
    monkeypatch.undo()
    with (
        pytest.raises(ValueError, match=r"found no file .*here\.parquet, expected it on all nodes"),
        engine.on_ray(address, tmp_path, [tmp_path / "nowhere.parquet"]),
    ):
        pass
    monkeypatch.setattr(engine, "_seen", lambda names: ("far", [], {"rankjax": "0"}))
    with (
        pytest.raises(ValueError, match=r"node far: found {'rankjax': '0'}, expected {.*as here"),
        engine.on_ray(address, tmp_path),
    ):
        pass


@needs_ray
def test_no_cluster(tmp_path, capsys):
    (tmp_path / "x.parquet").touch()
    (tmp_path / "schema.toml").write_text("")
    with pytest.raises(ValueError, match=r"found no Ray cluster at 127\.0\.0\.1:9, expected one"):
        engine.connected("127.0.0.1:9")


def parquet(folder: pathlib.Path, config: dict, parts: int) -> list[pathlib.Path]:
    """The scenario's files as several Parquet files each."""
    folder.mkdir(parents=True)
    files = scenarios.used(config, scenarios.split_off(scenarios.world()))
    for name, rows in files.items():
        frame = pl.DataFrame(rows, infer_schema_length=None)
        size = -(-frame.height // parts)
        for k in range(parts):
            path = folder / f"{name.partition('.')[0]}-{k}.parquet"
            frame.slice(k * size, size).write_parquet(path)
    return sorted(folder.iterdir())


def same_bytes(one: pathlib.Path, other: pathlib.Path) -> None:
    names = [sorted(p.relative_to(x) for p in x.rglob("*") if p.is_file()) for x in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
@needs_ray
@pytest.mark.parametrize("name", ["requests", "mixed_impressions", "lists", "orders", "clicks"])
def test_an_import_on_workers_has_the_same_bytes(name, address, tmp_path):
    config = scenarios.config(name)
    paths = parquet(tmp_path / "raw", config, 3)
    schema = schema_file.parse(config, "schema")
    one = importer.run(schema, paths, tmp_path / "one", chunk=20, shards=2)
    with engine.on_ray(address, tmp_path, paths) as workers:
        run = functools.partial(importer.run, schema, paths, chunk=20, engine=workers)
        same_bytes(one, run(tmp_path / "two", shards=2))
        again = event_log.EventLog.open(run(tmp_path / "three"), verify=True)
    assert again.fingerprint == event_log.EventLog.open(one).fingerprint


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [5, 14, 25])
def test_an_import_that_stopped_at_any_piece_goes_on(after, tmp_path):
    config = scenarios.config("requests")
    paths = parquet(tmp_path / "raw", config, 3)
    schema = schema_file.parse(config, "schema")
    done = []

    def stopping(work, pieces):
        for piece in pieces:
            if len(done) == after:
                raise Stopped
            done.append(piece)
            yield work(piece)

    run = functools.partial(importer.run, schema, paths, chunk=20)
    with pytest.raises(Stopped):
        run(tmp_path / "two", engine=stopping)
    assert not (tmp_path / "two").exists()
    same_bytes(run(tmp_path / "one"), run(tmp_path / "two"))


@pytest.mark.slow
@needs_ray
def test_the_command_on_a_cluster(address, tmp_path, capsys):
    config = scenarios.config("requests")
    parquet(tmp_path / "raw", config, 2)
    text = scenarios.SCHEMAS["requests"]
    (tmp_path / "schema.toml").write_text(f'name = "requests"\n{text}')
    argv = ["data", "import", str(tmp_path / "raw" / "*.parquet")]
    argv += ["--schema", str(tmp_path / "schema.toml"), "--out"]
    cli.main([*argv, str(tmp_path / "one"), "--json"])
    cli.main([*argv, str(tmp_path / "two"), "--json", "--engine", "ray", "--address", address])
    assert '"peak_memory_mib_of_workers"' in capsys.readouterr().out
    same_bytes(tmp_path / "one", tmp_path / "two")
    # A file without the users: named before any work, whoever would have done it.
    path = tmp_path / "raw" / "shown-1.parquet"
    pl.read_parquet(path).drop("u").write_parquet(path)
    with pytest.raises(SystemExit):
        cli.main([*argv, str(tmp_path / "three"), "--engine", "ray", "--address", address])
    err = capsys.readouterr().err
    assert "shown-1.parquet: found columns" in err and "expected 'u' too" in err
    assert not (tmp_path / "three").exists()
