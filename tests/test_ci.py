""".ci/: the README's two bash blocks are found literally, and a failing block fails the run."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
STUDY = "mkdir -p studies/quick\necho x > studies/quick/report.html\necho studies/quick/report.html"
TESTS = "echo '3 passed, 1 skipped in 0.12s'"


def readme(study: str = STUDY, tests: str = TESTS) -> str:
    python = "```python\nprint('```')\n```\n"
    return f"# x\n```bash\n{study}\n```\n{python}\ntext\n```bash\n{tests}\n```\n"


def block(path: pathlib.Path, name: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / ".ci" / "blocks.py"), str(path), name]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def ci_run(folder: pathlib.Path, text: str) -> subprocess.CompletedProcess:
    (folder / ".ci").mkdir()
    for name in ("run", "blocks.py"):
        shutil.copy(ROOT / ".ci" / name, folder / ".ci" / name)
    (folder / "README.md").write_text(text)
    command = ["bash", str(folder / ".ci" / "run")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_blocks_are_literal(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(readme(study="a \\\n  --b '```c'\n\n# d"))
    assert block(path, "study").stdout == "a \\\n  --b '```c'\n\n# d\n"
    assert block(path, "tests").stdout == TESTS + "\n"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("```bash\na\n```\n", "found 1 ```bash blocks, expected exactly 2"),
        ("```bash\na\n```\n" * 3, "found 3 ```bash blocks, expected exactly 2"),
        ("```bash\na\n```\n```bash\nb\n", "never closed"),
    ],
)
def test_another_number_of_blocks_is_an_error(tmp_path, text, match):
    path = tmp_path / "README.md"
    path.write_text(text)
    done = block(path, "study")
    assert done.returncode == 1 and match in done.stderr and not done.stdout


def test_the_repository_has_both_blocks():
    for name, word in (("study", "rankjax study quick"), ("tests", "pytest")):
        done = block(ROOT / "README.md", name)
        assert done.returncode == 0, done.stderr
        assert word in done.stdout and "venv" in done.stdout


@pytest.mark.parametrize(
    ("blocks", "status", "match"),
    [
        ({}, 0, "both blocks passed"),
        ({"tests": f"false\n{TESTS}"}, 1, "FAILED: tests block"),
        ({"tests": "echo '1 failed, 3 passed in 1.0s'"}, 1, "closing line is 1 failed"),
        ({"tests": "echo nothing ran"}, 1, "closing line is missing"),
        ({"study": "echo studies/none/report.html"}, 1, "no report that exists"),
        ({"study": f"{STUDY}\nexit 3"}, 1, "FAILED: study block"),
    ],
)
def test_run_fails_where_a_block_fails(tmp_path, blocks, status, match):
    done = ci_run(tmp_path, readme(**blocks))
    assert done.returncode == status, done.stdout + done.stderr
    assert match in done.stdout + done.stderr
