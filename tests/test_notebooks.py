"""The notebook runs from top to bottom on a small world, and is the same text as its script."""

import os
import pathlib

import nbformat
import pytest

COLAB = pathlib.Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(path.stem for path in COLAB.glob("*.ipynb"))


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_is_a_quickstart():
    assert "quickstart" in NOTEBOOKS


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


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("RANKJAX_NOTEBOOK_USERS", "40")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    path = [str(COLAB.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    notebook = nbformat.read(COLAB / "quickstart.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()

    study = tmp_path / "studies" / "quickstart" / "study"
    assert (study / "report.html").stat().st_size > 0
    assert (study / "results.parquet").exists()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = "".join(o.get("text", "") for o in code[-1].outputs)
    assert "report.html" in printed
    shown = {kind for o in code[-2].outputs for kind in o.get("data", {})}
    assert "application/vnd.plotly.v1+json" in shown
    # The training run's cell shows the model's NE beside the oracle's, and a silent alarm.
    one = next(cell for cell in code if "trial.run(" in cell.source)
    shown = one.outputs[-1]["data"]["text/plain"]
    assert "'oracle_ne'" in shown and "'alarm': False" in shown
