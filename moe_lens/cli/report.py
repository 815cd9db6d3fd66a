"""`moe-lens report`: load, study, write, say where the page is."""

import logging
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_lens import HookedMoE, __version__
from moe_lens.data import embedded_domains, load_domain
from moe_lens.errors import InputError
from moe_lens.report import OutputFolder, Settings, batched, n_steps, run, write


def make_report(
    name: str, files: Mapping[str, Path], *, tokens: int, out: Path, seed: int, dtype: str, device: str
) -> None:
    """Make the report; raises `MoELensError` for whatever the user can put right."""
    started = time.monotonic()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of libraries; what the user has to know is raised
    console = Console(stderr=True)
    domains = [load_domain(domain, path) for domain, path in files.items()] if files else embedded_domains()
    settings = Settings(name, tokens, seed, dtype, device)
    with OutputFolder(out) as folder:
        with console.status(f"loading {name}"):
            model = _load(name, getattr(torch, dtype), device)
        if not model.moe_layers:
            raise InputError(f"{name} has no layer with experts")
        batches = batched(model, domains, settings)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            steps = progress.add_task("reading the domains", total=n_steps(model, batches))
            report = run(model, domains, batches, settings, lambda: progress.advance(steps))
        with console.status("writing the page"):
            page = write(report, folder, version=__version__)
    console.print(f"done in {time.monotonic() - started:.0f} s", highlight=False)
    print(page.resolve())


def _load(name: str, dtype: torch.dtype, device: str) -> HookedMoE:
    if device == "auto":
        return HookedMoE.from_pretrained(name, dtype=dtype, device_map="auto").eval()
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: {reason}") from None
    model = HookedMoE.from_pretrained(name, dtype=dtype).eval()
    if place.type != "cpu":
        model.original_model.to(place)
    return model
