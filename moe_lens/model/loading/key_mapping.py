"""Names of stored tensors: what trainers put before them taken off, and what the caller maps them to."""

import logging
import re
from collections.abc import Mapping

from moe_lens.errors import CheckpointError, UnsupportedModelError
from moe_lens.model.loading.checkpoint import Checkpoint, StoredTensor

_LOG = logging.getLogger(__name__)
WRAPPER = "_original_component."
"""What TransformerLens puts into the names of parameters."""
_LEADING = {
    "module.": "DataParallel and DistributedDataParallel",
    "base_model.model.": "PEFT",
}
"""What the names of a whole checkpoint begin with, and what puts it there."""
_INSIDE = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
"""What can stand anywhere in a name: no model calls a part of itself so."""


def without_wrappers(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the names of the model itself, without those of what it was wrapped in when it was saved.

    Raises:
        UnsupportedModelError: adapters of PEFT that are not merged.
        CheckpointError: two tensors would have one name.
    """
    names = {name: name for name in checkpoint.tensors}
    taken = dict[str, str]()
    for part, by in _INSIDE.items():
        if any(part in name for name in names.values()):
            names = {stored: name.replace(part, "") for stored, name in names.items()}
            taken[part] = by
    while found := next((lead for lead in _LEADING if names and all(n.startswith(lead) for n in names.values())), None):
        names = {stored: name.removeprefix(found) for stored, name in names.items()}
        taken[found] = _LEADING[found]
    if not taken:
        return checkpoint
    adapters = [name for name in names if re.search(r"\.(lora_\w+|base_layer)\.", name)]
    if adapters:
        raise UnsupportedModelError(
            f"{checkpoint.places} holds an adapter of PEFT that is not merged ({adapters[0]}). Merge it first "
            "(merge_and_unload) and load what save_pretrained then writes"
        )
    said = ", ".join(f"{part} of {by}" for part, by in taken.items())
    _LOG.warning("Names in %s hold what they were saved in: %s is taken off", checkpoint.places, said)
    return _renamed(checkpoint, names)


def mapped(checkpoint: Checkpoint, key_mapping: Mapping[str, str]) -> Checkpoint:
    """The checkpoint under names in which patterns are replaced, one after the other, as transformers does.

    Args:
        checkpoint: As it is stored.
        key_mapping: Replacements by pattern.

    Raises:
        CheckpointError: two tensors would have one name.
    """
    names = dict[str, str]()
    for stored in checkpoint.tensors:
        names[stored] = stored
        for pattern, replacement in key_mapping.items():
            names[stored] = re.sub(pattern, replacement, names[stored])
    return _renamed(checkpoint, names)


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    found = dict[str, StoredTensor]()
    for stored, name in names.items():
        if name in found:
            raise CheckpointError(f"{checkpoint.places}: {stored} and {found[name].name} would both be {name}")
        found[name] = checkpoint.tensors[stored]
    return Checkpoint(checkpoint.files, found)
