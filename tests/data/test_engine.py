"""engine: pieces here and on a Ray cluster of two workers; an import is the same to the byte."""

import functools
import importlib.util
import os
import pathlib
import signal

import polars as pl
import pytest

from rankjax import cli
from rankjax.data import engine, event_log, importer
from rankjax.data.own import schema_file
from tests import ray_clusters
from tests.data.own import scenarios

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
)


@pytest.fixture(scope="module")
def address():
    with ray_clusters.started() as address:
        yield address


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
def test_a_node_that_does_not_see_a_file(address, tmp_path):
    missing = tmp_path / "nowhere.parquet"
    with (
        pytest.raises(ValueError, match=rf"node .*: found no file {missing}, expected it on all"),
        engine.on_ray(address, tmp_path, [missing]),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_what_a_node_says():
    names = ["/data/.marker", "/data/a.parquet"]
    engine._compare("node 1", names, [], engine.versions(), pathlib.Path("/data"))
    for missing, found, message in (
        (names, engine.versions(), "node 1: found no folder /data, expected the same one on all"),
        ([], {"rankjax": "0"}, r"node 1: found {'rankjax': '0'}, expected {'python': .* as here"),
    ):
        with pytest.raises(ValueError, match=message):
            engine._compare("node 1", names, missing, found, pathlib.Path("/data"))


@needs_ray
def test_no_cluster(tmp_path, capsys):
    address = "127.0.0.1:9"
    (tmp_path / "x.parquet").touch()
    (tmp_path / "schema.toml").write_text(f'name = "requests"\n{scenarios.SCHEMAS["requests"]}')
    argv = [
        "data",
        "import",
        str(tmp_path / "x.parquet"),
        "--schema",
        str(tmp_path / "schema.toml"),
    ]
    with pytest.raises(SystemExit):
        cli.main([*argv, "--out", str(tmp_path / "log"), "--engine", "ray", "--address", address])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rankjax: found no Ray cluster at {address} (")
    assert "expected one: start it with `ray start --head`" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["schema.toml", "x.parquet"]


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
