"""Saves are atomic, complete, and typed by what they are restored into."""

import resource
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import checkpoint


def tree(value: float) -> dict:
    return {"tables": {"a": jnp.full((300, 16), value)}, "step": jnp.int32(value)}


def test_restores_what_was_saved_and_keeps_the_newest(tmp_path):
    for step in (3, 7):
        checkpoint.save(tmp_path / "c", step, tree(step), {"seed": 5})
    assert checkpoint.steps(tmp_path / "c") == [7]
    found, meta = checkpoint.restore(tmp_path / "c", tree(0.0))
    np.testing.assert_array_equal(found["tables"]["a"], 7.0)
    assert meta == {"seed": 5} and int(found["step"]) == 7


def test_a_copied_folder_restores(tmp_path):
    checkpoint.save(tmp_path / "c", 1, tree(1.0), {})
    shutil.copytree(tmp_path / "c", tmp_path / "copy")
    shutil.rmtree(tmp_path / "c")
    np.testing.assert_array_equal(
        checkpoint.restore(tmp_path / "copy", tree(0.0))[0]["tables"]["a"], 1.0
    )


def test_nothing_saved_is_said(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    with pytest.raises(FileNotFoundError, match="expected step None"):
        checkpoint.restore(tmp_path / "none", tree(0.0))


def test_another_shape_is_refused(tmp_path):
    checkpoint.save(tmp_path / "c", 1, tree(1.0), {})
    with pytest.raises(ValueError, match="300"):
        checkpoint.restore(
            tmp_path / "c", {"tables": {"a": jnp.zeros((299, 16))}, "step": jnp.int32(0)}
        )


def test_a_half_written_save_is_never_restored(tmp_path):
    checkpoint.save(tmp_path / "c", 1, tree(1.0), {})
    shutil.copytree(tmp_path / "c" / "1", tmp_path / "c" / "2.orbax-checkpoint-tmp")
    assert checkpoint.latest(tmp_path / "c") == 1
    np.testing.assert_array_equal(checkpoint.restore(tmp_path / "c", tree(0.0))[0]["step"], 1)


def test_no_room_on_the_disk_loses_nothing_that_was_saved(tmp_path):
    """Files may not grow beyond 2 kB for the second save, as on a full disk."""
    checkpoint.save(tmp_path / "c", 1, tree(1.0), {"seed": 0})
    rng = np.random.default_rng(0)
    big = {"tables": {"a": jnp.asarray(rng.normal(size=(300, 16)))}, "step": jnp.int32(2)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
        with pytest.raises(OSError, match="step 1 is still there"):
            checkpoint.save(tmp_path / "c", 2, big, {"seed": 0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    np.testing.assert_array_equal(checkpoint.restore(tmp_path / "c", big, 1)[0]["step"], 1)


def test_rows_that_only_fill_up_may_differ(tmp_path):
    """As between meshes of 8, 3 and 1 devices, for 5 rows."""
    table = lambda rows: {"tables": {"a": {"embedding": jnp.zeros((rows, 2))}}, "w": jnp.ones(4)}
    x = np.arange(10.0).reshape(5, 2)
    saved = table(8)
    saved["tables"]["a"]["embedding"] = saved["tables"]["a"]["embedding"].at[:5].set(x)
    checkpoint.save(tmp_path, 1, saved, {})
    for rows in (5, 6, 8, 16):
        found = checkpoint.restore(tmp_path, table(rows), rows={"a": 5})[0]
        got = found["tables"]["a"]["embedding"]
        assert got.shape == (rows, 2)
        np.testing.assert_array_equal(got[:5], x)
    for like, rows in ((table(4), {"a": 5}), (table(6), {}), (table(16), {"a": 9})):
        with pytest.raises(ValueError, match=r"step 1.*embedding.*found float32\[8, 2\]"):
            checkpoint.restore(tmp_path, like, rows=rows)
    other = table(6) | {"w": jnp.ones(5)}
    with pytest.raises(ValueError, match=r"\['w'\]: found float32\[4\], expected float32\[5\]"):
        checkpoint.restore(tmp_path, other, rows={"a": 5})


@pytest.mark.parametrize("what", ["d", "manifest.ocdbt", "_METADATA"])
def test_a_step_with_a_part_missing_is_named_and_the_one_before_is_usable(what, tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tree(float(step)), {}, keep=2)
    gone = tmp_path / "2" / "state" / what
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(ValueError, match=r"step 2: cannot be read .*goes on from step 1"):
        checkpoint.restore(tmp_path, tree(0.0))
    shutil.rmtree(tmp_path / "2")
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, tree(0.0))[0]["step"], 1)
