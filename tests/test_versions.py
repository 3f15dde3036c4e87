"""versions: what is compared between machines changes with the sources and the packages."""

import pathlib
import shutil
import subprocess
import sys

import numpy as np

import rankjax
from rankjax import versions


def test_packages_by_name():
    found = versions.of("numpy")
    assert found["numpy"] == np.__version__ and found["rankjax"].startswith(rankjax.__version__)
    assert found["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert versions.of().keys() == {"python", "rankjax"}


def test_an_edited_source_is_another_version(tmp_path):
    home = pathlib.Path(rankjax.__file__).parent
    for name in ("__init__.py", "versions.py"):
        (tmp_path / "rankjax").mkdir(exist_ok=True)
        shutil.copy(home / name, tmp_path / "rankjax" / name)

    def said() -> str:
        code = "from rankjax import versions; print(versions.of()['rankjax'])"
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    before = said()
    assert said() == before
    with (tmp_path / "rankjax" / "versions.py").open("a") as f:
        f.write("# edited\n")
    assert said() != before
