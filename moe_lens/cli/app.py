"""The application that commands are added to.

Modules of the command line import torch, and what needs it, inside functions only: help, versions and mistakes on the
command line are answered at once.
"""

import typer

app = typer.Typer(
    help="Look into the experts of Mixture-of-Experts language models.\n\n"
    "A study runs a model over texts and saves its tables to a folder. `report` runs five studies and shows them on "
    "one page, or shows saved studies; `show` prints saved studies in the terminal; `compare` compares two of them. "
    "For the options of a command: moe-lens COMMAND --help.",
    add_completion=False,
    rich_markup_mode=None,
)
