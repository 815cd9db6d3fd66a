"""Loading the model that a command names, quietly, on the device that it names, in every process that takes part."""

import logging
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_lens.cli.processes import place
from moe_lens.errors import InputError
from moe_lens.freed_memory import keep_freed_memory

if TYPE_CHECKING:
    from moe_lens import HookedMoE


SMALL = 2**26
"""Bytes of a small model. With two threads the embedded one, of 40 MB, takes longer than with one, and where other
programs run, many times as long: threads that wait for one another do so at full speed."""


def quiet() -> None:
    """Silence messages of libraries: what the user has to know is raised."""
    import transformers

    # The hub's says each retry, and accelerate's where parameters are, which is said below.
    for library in ("transformers", "huggingface_hub", "accelerate"):
        logging.getLogger(library).setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs as an error what it raises
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def load_model(
    name: str,
    dtype: str,
    device: str,
    max_memory: Mapping[int | str, int | str] | None = None,
    quantize: Any = None,
    trust_tokenizer: bool = False,
) -> "HookedMoE":
    """The model, for reading only.

    Args:
        name: On the hub, a folder, or the embedded one.
        dtype: What it computes in; "auto" is the checkpoint's own, float32 for the embedded model.
        device: "auto" puts it where there is room; under torchrun, "cuda" is this process's own device.
        max_memory: Bounds "auto", by place.
        quantize: How large matrices are packed; None for not at all.
        trust_tokenizer: Whether to run code that comes with its tokenizer.

    Raises:
        InputError: There is no such device, or the model has no layer with experts.
        MoELensError: The model cannot be loaded.
    """
    import torch

    from moe_lens import HookedMoE
    from moe_lens.model.loading.pretrained import EMBEDDED

    where: dict[str, Any] = {"max_memory": max_memory} if device == "auto" else {"device": place(device)}
    trust = "tokenizer" if trust_tokenizer else False
    dtype = "float32" if dtype == "auto" and name == EMBEDDED else dtype
    model = HookedMoE.from_pretrained(name, dtype=dtype, quantize=quantize, trust_remote_code=trust, **where)
    if not model.moe_layers:
        raise InputError(f"{name} has no layer with experts")
    if is_small(model):
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
    return model.eval().requires_grad_(False)


def where_it_is(model: "HookedMoE") -> str | None:
    """The dtype of a large model, and what of it is in which place; None for one that is small and in main memory."""
    from moe_lens.model.loading.device_map import said
    from moe_lens.model.loading.dispatch import places

    found = places(model.original_model)
    if found.keys() == {"cpu"} and found["cpu"] < 2**30:
        return None
    dtype = str(next(model.original_model.parameters()).dtype).removeprefix("torch.")
    return f"{model.cfg.model_name} in {dtype}: {said(found)}"


def is_small(model: "HookedMoE") -> bool:
    """Whether a model is in main memory, and its matrices so small that threads wait longer than they compute."""
    from moe_lens.model.loading.dispatch import places

    found = places(model.original_model)
    return found.keys() == {"cpu"} and found["cpu"] < SMALL
