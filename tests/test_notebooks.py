"""The notebooks run from top to bottom on a small world, and are the same text as their scripts."""

import json
import os
import pathlib

import nbformat
import pytest

from rankjax.data import event_log

COLAB = pathlib.Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(path.stem for path in COLAB.glob("*.ipynb"))


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_notebooks():
    assert NOTEBOOKS == ["own_data", "quickstart"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_and_its_script_are_in_step(name):
    jupytext = pytest.importorskip("jupytext")
    notebook = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert cells(notebook) == cells(jupytext.read(COLAB / f"{name}.py")), (
        f"run: jupytext --to ipynb colab/{name}.py"
    )
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs are not kept"


def run(name: str, folder: pathlib.Path, monkeypatch) -> list[nbformat.NotebookNode]:
    """Executes a notebook on a small world in `folder`; its code cells with their outputs."""
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("RANKJAX_NOTEBOOK_USERS", "40")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    path = [str(COLAB.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    notebook = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(o.get("text", "") for o in cell.outputs)


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, monkeypatch):
    code = run("quickstart", tmp_path, monkeypatch)
    study = tmp_path / "studies" / "quickstart" / "study"
    assert (study / "report.html").stat().st_size > 0
    assert (study / "results.parquet").exists()
    assert "report.html" in printed(code[-1])
    shown = {kind for o in code[-2].outputs for kind in o.get("data", {})}
    assert "application/vnd.plotly.v1+json" in shown
    # The training run's cell shows the model's NE beside the oracle's, and a silent alarm.
    one = next(cell for cell in code if "trial.run(" in cell.source)
    shown = one.outputs[-1]["data"]["text/plain"]
    assert "'oracle_ne'" in shown and "'alarm': False" in shown


@pytest.mark.slow
def test_own_data_goes_from_files_to_a_report(tmp_path, monkeypatch):
    code = run("own_data", tmp_path, monkeypatch)
    folder = tmp_path / "studies" / "own_data"
    log = event_log.EventLog.open(folder / "log", verify=True)
    with (folder / "files" / "impressions.csv").open() as lines:
        assert log.rows("impressions") == sum(1 for _ in lines) - 1
    assert [t.name for t in log.schema.tasks] == ["clicked", "liked"]
    assert any(f.counter for f in log.schema.features)
    by_source = {name: cell for cell in code for name in CELLS if name in cell.source}
    assert "[impressions]" in printed(by_source["guess.starter"])
    assert "Label rates" in printed(by_source["describe.describe"])
    assert "error" not in printed(by_source["check.check"])
    study = folder / "study"
    assert json.loads((study / "summary.json").read_text())["trees"]["test_ne"] > 0
    assert (study / "report.html").exists() and "report.html" in printed(code[-1])


CELLS = ("guess.starter", "describe.describe", "check.check")
