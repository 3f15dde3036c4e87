"""The layout of rankjax/: who imports whom, which test mirrors which file, how long a file is.

Everything here parses files with `ast`; nothing of rankjax is imported.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "rankjax", ROOT / "tests"
MOST_LINES = 400

# Tests of no single file of rankjax/, each with its reason.
TESTS_WITHOUT_FILE = {
    "test_rooms.py": "the layout itself",
    "test_ci.py": ".ci/",
    "test_notebooks.py": "colab/",
    "test_experiments.py": "experiments/",
    "test_launch.py": "experiments/launch/",
    "test_own_schemas.py": "experiments/schemas/",
    "test_add_an_architecture.py": "docs/add-an-architecture.md",
    "kernels/test_hstu_tiles.py": "tiles of hstu_attention, apart for their length",
    "kernels/test_hstu_lowering.py": "hstu_attention as TPUs and GPUs compile it",
    "models/test_sharded.py": "the step of every architecture on a mesh",
    "models/test_compute.py": "layers scanned and computed again, in every architecture",
    "models/test_all_models.py": "what every architecture must hold, one suite for all of them",
    "models/test_implementations.py": "models by every implementation of their attention",
}
# Files of rankjax/ that have no test of their own, each with its reason.
FILES_WITHOUT_TEST: dict[str, str] = {}
# A kernel is a folder with one suite over its implementations: kernels/x/*.py, kernels/test_x.py.
SUITE_FOLDERS = ("kernels",)


def rooms(docstring: str) -> list[str]:
    """Room names in order: the lines "name  caption" of rankjax/__init__.py's docstring."""
    return re.findall(r"^([a-z_]+) {2,}\S", docstring, flags=re.MULTILINE)


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every module below rankjax that the file may import, as ("models", "hstu").

    package: the dotted parts of the file's own package, from which relative imports count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "rankjax" and name[1:] and not name[1].startswith("__"):
                yield name[1:]


def offences(sources: dict[str, str], order: list[str]) -> list[str]:
    """Offending pairs in {"models/hstu.py": text}, each as one line of words."""
    found = []
    for file, text in sorted(sources.items()):
        parts = file.split("/")
        room = parts[0].removesuffix(".py")
        for target in imported(ast.parse(text), ("rankjax", *parts[:-1])):
            if target[0] not in order:
                found.append(f"{file} imports {target[0]}, which the docstring does not list")
            elif room not in order or order.index(target[0]) > order.index(room):
                found.append(f"{file} imports {'.'.join(target)}, a room below its own")
            elif room == target[0] == "models" and file != "models/__init__.py":
                found.append(f"{file} imports {'.'.join(target)}: models never import models")
    return found


def package_files() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def package_sources() -> dict[str, str]:
    files = [p for p in package_files() if p != PACKAGE / "__init__.py"]
    return {p.relative_to(PACKAGE).as_posix(): p.read_text(encoding="utf-8") for p in files}


def package_docstring() -> str:
    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(text)) or ""


def test_a_room_imports_only_rooms_above_it():
    assert not offences(package_sources(), rooms(package_docstring()))


def test_the_docstring_lists_every_room_once():
    listed = rooms(package_docstring())
    there = {room_of(p) for p in package_files()} - {"__init__"}
    assert len(set(listed)) == len(listed)
    assert there - set(listed) == set(), "rooms that the docstring of rankjax does not list"
    assert set(listed) - there == set(), "rooms that the docstring lists and that do not exist"


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("batch.py", "from rankjax import schema, train", "imports train, a room below"),
        ("batch.py", "import rankjax.models.hstu", "imports models.hstu, a room below"),
        ("schema.py", "def f():\n    from rankjax.batch import Batch", "imports batch.Batch"),
        ("layers/mlp.py", "from ..models import hstu", "imports models.hstu, a room below"),
        ("models/a.py", "from . import b", "models never import models"),
        ("models/a.py", "from rankjax.models import b", "models never import models"),
        ("train.py", "from rankjax import attic", "does not list"),
    ],
)
def test_a_planted_offence_is_found(file, text, match):
    order = ["schema", "batch", "layers", "models", "train"]
    (found,) = [line for line in offences({file: text}, order) if match in line]
    assert found.startswith(file)


def test_allowed_imports_are_no_offence():
    text = "from rankjax import __version__\nfrom rankjax.models import hstu\nimport jax, os.path"
    assert not offences({"train.py": text}, ["models", "train"])
    assert not offences({"models/__init__.py": "from rankjax.models import a"}, ["models"])


def mirror(file: str) -> str:
    """ "data/loader.py" -> "data/test_loader.py"; a kernel's files -> the kernel's one suite."""
    parts = file.split("/")
    if parts[0] in SUITE_FOLDERS and len(parts) > 2:
        return f"{parts[0]}/test_{parts[1]}.py"
    return "/".join([*parts[:-1], f"test_{parts[-1]}"])


def test_every_file_has_its_test_and_every_test_its_file():
    files = {f for f in package_sources() if not f.endswith("__init__.py")}
    wanted = {mirror(f) for f in files - set(FILES_WITHOUT_TEST)}
    there = {p.relative_to(TESTS).as_posix() for p in TESTS.rglob("test_*.py")}
    assert wanted - there == set(), "tests that are missing"
    assert there - wanted - set(TESTS_WITHOUT_FILE) == set(), "tests of no file of rankjax/"
    assert set(FILES_WITHOUT_TEST) <= files, "exceptions for files that are gone"


def test_references_are_independent():
    """tests/references/ is the independent truth: it knows neither rankjax nor jax."""
    for path in sorted((TESTS / "references").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"rankjax", "jax", "flax", "optax"}, f"{path.name} imports {names}"


def test_no_file_is_too_long():
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in package_files()}
    too_long = {p.relative_to(ROOT).as_posix(): n for p, n in lengths.items() if n > MOST_LINES}
    assert not too_long, f"more than {MOST_LINES} lines: which second idea moved in?"


def test_init_files_hold_no_functions():
    for path in PACKAGE.rglob("__init__.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            kind = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
            assert not isinstance(node, kind), f"{path.relative_to(ROOT)}:{node.lineno}"


def unsafe(text: str) -> list[str]:
    """Names in Python source by which input could run code: pickle and its kin, eval, YAML."""
    modules = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "yaml"}
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in modules]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in modules:
            found.append(node.module)
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__"):
            found.append(node.id)
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += [] if getattr(node.value, "value", True) is False else ["allow_pickle"]
    return found


def test_no_input_can_run_code():
    for path in package_files():
        assert not unsafe(path.read_text(encoding="utf-8")), path.relative_to(ROOT)


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from yaml import load", "eval(x)", "np.load(f, allow_pickle=True)"],
)
def test_unsafe_ways_are_found(text):
    assert unsafe(text) and not unsafe("np.load(f, allow_pickle=False)\njson.loads(x)")
