"""Saving a wrapped model under the names that its family's checkpoints have."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

WRAPPER = "_original_component."


def original_state(model: PreTrainedModel, original_names: Collection[str]) -> dict[str, Tensor]:
    """The state of a wrapped model under the names it had before it was wrapped."""
    found = {name.replace(WRAPPER, ""): value for name, value in model.state_dict().items()}
    return {name: found[name] for name in original_names}


def save_pretrained(
    model: PreTrainedModel, original_names: Collection[str], tokenizer: Any, folder: Path, **kwargs: Any
) -> None:
    """Transformers' `save_pretrained`, of the model as it was before it was wrapped."""
    model.save_pretrained(folder, state_dict=original_state(model, original_names), **kwargs)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
