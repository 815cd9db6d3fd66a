"""Saving a wrapped model under the names that its family's checkpoints have."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moe_lens.model.hooks.whole_state import original_state


def save_pretrained(
    model: PreTrainedModel, original_names: Collection[str], tokenizer: Any, folder: Path, **kwargs: Any
) -> None:
    """Transformers' `save_pretrained`, of the model as it was before it was wrapped."""
    model.save_pretrained(folder, state_dict=original_state(model, original_names), **kwargs)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
