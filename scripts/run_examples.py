"""Execute every example, and keep its notebook in step with it.

An example is a script under examples/ in jupytext's percent format, with its executed notebook beside it. Without
arguments every example is executed from its script, and a notebook whose cells differ from the script is an error;
`--write` writes the executed notebooks instead.

Each has a Jupyter kernel of its own, which is forked from a process that has imported what examples import: a fresh
interpreter takes longer for that than most examples for what they do.
"""

import argparse
import asyncio
import base64
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from plotly.graph_objects import Figure

from moe_lens.errors import InputError
from moe_lens.viz.figures import save_figure

FIGURE = "application/vnd.plotly.v1+json"
WIDTH = 920
"""Pixels of a picture: of a cell in a window of 1366."""
EXAMPLES = Path(__file__).parents[1] / "examples"

SERVER = multiprocessing.get_context("forkserver")
IMPORTED = ["ipykernel.kernelapp", "plotly.express", "moe_lens.hooked_moe", "moe_lens.studies"]


class Forked(LocalProvisioner):
    """Starts a kernel as a fork, where Jupyter would start an interpreter."""

    process: Any

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        options = cmd[cmd.index("ipykernel_launcher") + 1 :]
        self.process = SERVER.Process(target=_kernel, args=(options, str(kwargs["cwd"])))
        self.process.start()
        self.pid = self.process.pid
        return self.connection_info

    async def poll(self) -> int | None:
        return self.process.exitcode if self.process else 0

    async def wait(self) -> int | None:
        while (status := await self.poll()) is None:
            await asyncio.sleep(0.02)
        self.process = None
        return status

    async def send_signal(self, signum: int) -> None:
        if self.process and self.process.is_alive():
            os.kill(self.process.pid, signum)


def _kernel(options: list[str], folder: str) -> None:
    from ipykernel.kernelapp import IPKernelApp

    os.chdir(folder)
    IPKernelApp.launch_instance([*options, "--log-level=ERROR"], parent_handle=os.getppid())  # with which it ends, too


def client(notebook: nbformat.NotebookNode, folder: Path) -> NotebookClient:
    """Executes a notebook in a folder, in a kernel that is forked."""
    factory = KernelProvisionerFactory.instance()
    factory.provisioners["forked"] = EntryPoint("forked", f"{__name__}:Forked", factory.GROUP_NAME)
    factory.default_provisioner_name = "forked"
    # "python3" is the kernel of the very interpreter that runs this script.
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return NotebookClient(notebook, timeout=300, coalesce_streams=True, resources={"metadata": {"path": str(folder)}})


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """What a reader would see of a notebook before it runs: kind and source of its cells."""
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells if cell.source.strip()]


def add_picture(data: dict[str, Any]) -> None:
    """A picture beside a figure, for what draws none: a server without plotly's extension, and most viewers."""
    if (figure := data.get(FIGURE)) is not None:
        with tempfile.TemporaryDirectory() as folder:
            drawn = Figure(data=figure["data"], layout=figure["layout"])
            picture = save_figure(drawn, Path(folder) / "figure.png", width=WIDTH)
            data["image/png"] = base64.b64encode(picture.read_bytes()).decode()


def run(script: Path, *, write: bool) -> str | None:
    """Execute one example in its own folder; the reason if it failed or its notebook is out of step."""
    notebook = jupytext.read(script)
    written = script.with_suffix(".ipynb")
    if not write:
        if not written.is_file():
            return f"{written.name} is missing; write it with `make notebooks`"
        if cells(nbformat.read(written, as_version=4)) != cells(notebook):
            return f"{written.name} is out of step with {script.name}; write it again with `make notebooks`"
    try:
        client(notebook, script.parent).execute()
        if write:
            for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
                add_picture(output.get("data", {}))
    except (CellExecutionError, InputError) as error:  # the latter: no browser draws pictures here
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
    SERVER.set_forkserver_preload(IMPORTED)
    failures = 0
    with ThreadPoolExecutor(workers) as pool:
        for script, reason in zip(scripts, pool.map(partial(run, write=arguments.write), scripts), strict=True):
            failures += reason is not None
            print(f"{script.name}: {reason or 'ok'}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
