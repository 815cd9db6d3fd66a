"""Loading the model that a command names, quietly, on the device that it names, in every process that takes part."""

import logging
import os
import warnings
from typing import TYPE_CHECKING

from moe_lens.errors import InputError

if TYPE_CHECKING:
    import torch

    from moe_lens import HookedMoE


def quiet() -> None:
    """Silence messages of libraries: what the user has to know is raised."""
    import transformers

    for library in ("transformers", "huggingface_hub", "datasets"):  # the hub's says each retry
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def load_model(name: str, dtype: str, device: str) -> "HookedMoE":
    """The model, for reading only.

    Args:
        name: On the hub, a folder, or the embedded one.
        dtype: What it computes in.
        device: "auto" spreads it; under torchrun, "cuda" is this process's own device.

    Raises:
        InputError: There is no such device, or the model has no layer with experts.
        MoELensError: The model cannot be loaded.
    """
    import torch

    from moe_lens import HookedMoE

    if device == "auto":
        model = HookedMoE.from_pretrained(name, dtype=getattr(torch, dtype), device_map="auto")
    else:
        place = _place(device)
        model = HookedMoE.from_pretrained(name, dtype=getattr(torch, dtype))
        if place.type != "cpu":
            model.original_model.to(place)
    if not model.moe_layers:
        raise InputError(f"{name} has no layer with experts")
    return model.eval().requires_grad_(False)


def join_processes(device: str) -> None:
    """Under torchrun, let this process find the others; without it, nothing."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        if device == "auto":
            raise InputError("--device auto spreads one model over all devices; it does not go together with torchrun")
        on_gpu = _place(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(_place(device))
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")


def leave_processes() -> None:
    """The end of `join_processes`."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _place(device: str) -> "torch.device":
    import torch

    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: {reason}") from None
    return place
