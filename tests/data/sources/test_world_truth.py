import os

import numpy as np
import pytest

from rankjax.data.sources import world_truth


def columns(n, start=0):
    p = (np.arange(start, start + n) + 1.0) / 1000
    return {"p_click": p, "p_like": p / 2, "p_known": p / 3, "part_user": p.astype(np.float32)}


def test_chunks_come_back_as_one_mapped_column(tmp_path):
    with world_truth.TruthWriter(tmp_path / "truth.arrow") as writer:
        writer.append(columns(3))
        writer.append(columns(0))
        writer.append(columns(4, start=3))
        path = writer.finish()
    assert world_truth.truth_path(tmp_path / "log") == path
    assert os.listdir(tmp_path) == ["truth.arrow"]
    got = world_truth.load_truth(tmp_path / "log")
    for name, x in columns(7).items():
        np.testing.assert_array_equal(got[name], x)
        assert got[name].dtype == x.dtype
        assert not got[name].flags.owndata and not got[name].flags.writeable


def test_what_is_not_finished_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt), world_truth.TruthWriter(tmp_path / "truth.arrow") as w:
        w.append(columns(3))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    assert world_truth.truth_path(tmp_path / "log") is None


def test_a_log_without_truth_and_a_broken_truth(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no truth\.arrow beside it"):
        world_truth.load_truth(tmp_path / "log")
    (tmp_path / "truth.arrow").write_bytes(b"ARROW1 and then nothing")
    with pytest.raises(ValueError, match=r"truth\.arrow: found no complete Arrow file"):
        world_truth.load_truth(tmp_path / "log")
    (tmp_path / "truth.arrow").unlink()
    with world_truth.TruthWriter(tmp_path / "truth.arrow") as writer:
        writer.append({"p_click": np.ones(2)})
        writer.finish()
    with pytest.raises(ValueError, match=r"expected \['p_like', 'p_known'\] too"):
        world_truth.load_truth(tmp_path / "log")
