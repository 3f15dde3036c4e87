"""Claims are exclusive and end with their holder; a file is there whole or not at all."""

import pytest

from rankjax.scaling import folders


def test_a_claim_is_exclusive(tmp_path):
    with folders.claimed(tmp_path / "t") as first, folders.claimed(tmp_path / "t") as second:
        assert first and not second
    with folders.claimed(tmp_path / "t") as again:
        assert again


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    folders.write_atomically(path, b"old")
    with pytest.raises(TypeError):
        folders.write_atomically(path, "no bytes")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
