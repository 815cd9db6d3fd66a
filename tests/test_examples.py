"""The runner of examples notices a cell that fails and a notebook that is out of step with its script."""

from importlib.metadata import version
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from scripts.run_examples import EXAMPLES, FIGURE, cells, client, run

SCRIPT = '# %% [markdown]\n# A sum.\n\n# %%\nvalue = 1 + 1\nprint("it is", value)\n'


@pytest.mark.slow
def test_an_example_is_executed_and_kept_in_step(tmp_path: Path):
    script = tmp_path / "sum.py"
    script.write_text(SCRIPT)
    assert "sum.ipynb is missing" in str(run(script, write=False))
    assert run(script, write=True) is None
    notebook = nbformat.read(tmp_path / "sum.ipynb", as_version=4)
    assert notebook.cells[1].outputs[0].text == "it is 2\n"
    first = (tmp_path / "sum.ipynb").read_bytes()
    assert run(script, write=True) is None
    assert (tmp_path / "sum.ipynb").read_bytes() == first  # nothing in it depends on when it ran
    assert run(script, write=False) is None

    script.write_text(SCRIPT.replace("1 + 1", "1 + 2"))
    assert "out of step" in str(run(script, write=False))
    script.write_text(SCRIPT.replace("1 + 1", "1 + None"))
    assert "TypeError" in str(run(script, write=True))


HOSTED = EXAMPLES / "hosted" / "start.ipynb"


def test_the_hosted_notebook_keeps_the_torch_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its install cell, with pip's line as IPython would read it."""
    (cell,) = [cell for cell in nbformat.read(HOSTED, as_version=4).cells if "install" in cell.metadata.get("tags", ())]
    *python, pip = cell.source.splitlines()
    monkeypatch.chdir(tmp_path)
    exec("\n".join(python), {})
    assert pip == "%pip install --quiet --constraint torch.txt moe-lens"
    assert (tmp_path / "torch.txt").read_text() == f"torch=={version('torch')}\n"


@pytest.mark.slow
def test_the_hosted_notebook_runs_as_it_is_but_for_the_installation(tmp_path: Path):
    notebook = nbformat.read(HOSTED, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    client(notebook, tmp_path).execute()
    (last,) = notebook.cells[-1].outputs
    assert "without it" in last.text
    notebook.cells = notebook.cells[-1:]  # which needs those before it
    with pytest.raises(CellExecutionError, match="NameError"):
        client(notebook, tmp_path).execute()


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda script: script.stem)
def test_every_example_has_its_executed_notebook(script: Path):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert cells(notebook) == cells(jupytext.read(script)) != [], "write it again with `make notebooks`"
    assert "You learn here to " in notebook.cells[0].source, "begin with what one learns"
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert all("image/png" in output.data for output in outputs if FIGURE in output.get("data", {}))
