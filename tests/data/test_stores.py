"""stores: a path of an object store is refused, not made a folder of its name."""

import pathlib

import pytest

from rankjax import cli
from rankjax.data import stores
from tests import tiny
from tests.data.own import scenarios


@pytest.mark.parametrize("folder", ["logs/world", "/logs/a:b", "c:/logs", "x:"])
def test_a_mounted_folder_is_a_path(folder):
    assert stores.mounted(folder) == pathlib.Path(folder)


@pytest.mark.parametrize("command", ["import", "world", "study", "log", "train", "out"])
def test_every_command_says_so(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = str(tiny.log(tmp_path / "log"))
    (tmp_path / "schema.toml").write_text(f'name = "requests"\n{scenarios.SCHEMAS["requests"]}')
    schema = ["--schema", "schema.toml"]
    cli_of = {
        "import": ["data", "import", "x.parquet", *schema, "--out", "gs://bucket/log"],
        "world": ["data", "world", "gs://bucket/log", "--impressions", "10000"],
        "study": ["study", "run", log, "gs://bucket/log", "--dry-run"],
        "log": ["study", "run", "gs://bucket/log", "study"],
        "train": ["train", "gs://bucket/log"],
        "out": ["train", log, "--out", "gs://bucket/log"],
    }
    (tmp_path / "x.parquet").touch()
    with pytest.raises(SystemExit) as ended:
        cli.main(cli_of[command])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and not (tmp_path / "gs:").exists()
    assert line.startswith("rankjax: gs:/bucket/log") and "found a path of an object store" in line
