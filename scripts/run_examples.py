"""Execute every example, and keep its notebook in step with it.

An example is a script under examples/ in jupytext's percent format, with its executed notebook beside it. Without
arguments every example is executed from its script, and a notebook whose cells differ from the script is an error;
`--write` writes the executed notebooks instead.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

EXAMPLES = Path(__file__).parents[1] / "examples"


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """What a reader would see of a notebook before it runs: kind and source of its cells."""
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells if cell.source.strip()]


def run(script: Path, *, write: bool) -> str | None:
    """Execute one example in its own folder; the reason if it failed or its notebook is out of step."""
    notebook = jupytext.read(script)
    written = script.with_suffix(".ipynb")
    if not write:
        if not written.is_file():
            return f"{written.name} is missing; write it with `make notebooks`"
        if cells(nbformat.read(written, as_version=4)) != cells(notebook):
            return f"{written.name} is out of step with {script.name}; write it again with `make notebooks`"
    # "python3" is the kernel of the very interpreter that runs this script.
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    try:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(script.parent)}}).execute()
    except CellExecutionError as error:
        return str(error)
    if write:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times, which would change the file at every run
            if cell.cell_type == "code":  # progress bars and warnings are of the machine that it ran on
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        notebook.metadata.pop("jupytext", None)
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"
        nbformat.write(notebook, written)
    return None


def main() -> int:
    """Exit status 1 if any example failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the executed notebooks")
    arguments = parser.parse_args()
    scripts = sorted(EXAMPLES.glob("*.py"))
    if not scripts:
        print(f"no examples in {EXAMPLES}")
        return 1
    # Two at a time, on one thread each; notebooks that are kept are written as a reader would run them.
    workers = 1 if arguments.write else 2
    if workers > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    failures = 0
    with ThreadPoolExecutor(workers) as pool:
        for script, reason in zip(scripts, pool.map(partial(run, write=arguments.write), scripts), strict=True):
            failures += reason is not None
            print(f"{script.name}: {reason or 'ok'}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
