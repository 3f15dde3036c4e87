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
