"""`rankjax data split`: shards from the command line (what they hold: test_shards.py)."""

import json

import pytest

from rankjax import cli
from rankjax.data import event_log
from tests import tiny


def test_the_command_splits_and_joins(tmp_path, capsys):
    log = tiny.log(tmp_path / "log")
    cli.main(["data", "split", str(log), str(tmp_path / "two"), "--shards", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == [
        *("00000", "00001", "items.arrow", "log.json", "users.arrow")
    ]
    cli.main(["data", "split", str(tmp_path / "two"), str(tmp_path / "one"), "--only", "1"])
    some = event_log.EventLog.open(tmp_path / "one")
    assert 0 < some.rows("impressions") < found["rows"]["impressions"]
    assert some.fingerprint["shards"] == "[1] of 2"


def test_too_many_shards(tmp_path, capsys):
    log = tiny.log(tmp_path / "log")
    with pytest.raises(SystemExit):
        cli.main(["data", "split", str(log), str(tmp_path / "many"), "--shards", "9"])
    assert capsys.readouterr().err == "rankjax: shards: found 9, expected 1 .. 8, the users\n"
    assert not (tmp_path / "many").exists()
