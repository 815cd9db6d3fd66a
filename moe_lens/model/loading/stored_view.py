"""A checkpoint as its family stores it: without a trainer's names, and with numbers where it holds packed ones."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.model.families.bailing import norm_columns
from moe_lens.model.families.bailing_config import BailingMoeConfig
from moe_lens.model.loading.checkpoint import Checkpoint, OpenFiles, StoredTensor
from moe_lens.model.loading.formats.packed_tensor import PackedTensor
from moe_lens.model.loading.formats.view import method_of, packing_of, unpacked
from moe_lens.model.loading.kept_bits import INSTEAD
from moe_lens.model.loading.key_mapping import without_wrappers
from moe_lens.model.loading.quantising import METHOD, PackingConfig


def locate(
    source: str, raw: Mapping[str, Any], hub: Mapping[str, Any], variant: str | None, to: torch.dtype = torch.float32
) -> tuple[Checkpoint, bool]:
    """A checkpoint's tensors by the names of the family, and whether they differ from those that are stored.

    Args:
        source: Folder or name on the hub.
        raw: Its config.json.
        hub: See `HUB_ARGUMENTS`.
        variant: Of the names of files.
        to: What packed matrices are unpacked to.

    Raises:
        CheckpointError: see `Checkpoint.locate`, and packed tensors that are not whole.
        UnsupportedModelError: packed in a format that is not read.
    """
    stored = Checkpoint.locate(source, hub, variant)
    seen = without_wrappers(stored)
    said = packing_of(raw)
    if said is not None and said.get("quant_method") != METHOD:
        seen = unpacked(seen, said, to)
    if raw["model_type"] == BailingMoeConfig.model_type and raw.get("norm_head"):
        seen = _with_normed_head(seen, to)
    return seen, seen is not stored


def _with_normed_head(checkpoint: Checkpoint, to: torch.dtype) -> Checkpoint:
    """A view in which the unembedding is what the first Lings compute with, not what they store."""
    head = checkpoint.tensors.get("lm_head.weight")
    if head is None:
        return checkpoint  # the loader says that it is missing
    normed = PackedTensor(
        head.file, head.name, head.shape, "BF16", {"weight": head}, lambda of: norm_columns(of["weight"].float()), to
    )
    return Checkpoint(checkpoint.files, {**checkpoint.tensors, head.name: normed})


def read_packing(raw: Mapping[str, Any], kwargs: dict[str, Any]) -> None:
    """Drop a `quantization_config` that says of a packed checkpoint what its config.json says.

    Args:
        raw: config.json.
        kwargs: Arguments of `from_pretrained`; changed.

    Raises:
        InputError: it says something else, and is no wish to pack the numbers anew (of a folder that was saved packed,
            they cannot be); or it is to stay packed, and is not.
        UnsupportedModelError: weights that are pickled, and packed.
    """
    said, asked = packing_of(raw), kwargs.get("quantization_config")
    given = asked if isinstance(asked, Mapping) else getattr(asked, "to_dict", dict)()
    method = str(getattr(given.get("quant_method", ""), "value", given.get("quant_method", "")))
    if asked is not None and kwargs.get("gguf_file") is not None:
        wish = getattr(asked, "scheme", type(asked).__name__)
        raise InputError(
            f"quantize={wish!r}: the matrices of a GGUF file are unpacked when it is read, not packed anew; leave it "
            "out, or load a folder that save_pretrained wrote from the unpacked model"
        )
    if isinstance(asked, PackingConfig) and asked.scheme == "stored" and said is None:
        raise InputError(f'quantize="stored": config.json does not say that this checkpoint is packed; {INSTEAD}')
    if said is None:
        return
    if said.get("quant_method") == METHOD:
        if asked is not None and given.get("scheme") not in ("stored", said.get("scheme")):
            wish = given.get("scheme") or method or "another packing"
            raise InputError(
                f"{wish} is asked for, and this folder holds a model that was saved in {said.get('scheme')}: "
                "leave quantize out, or load what that model was packed from"
            )
        kwargs.pop("quantization_config", None)  # it comes back as it was saved, without a word
        return
    if kwargs.get("use_safetensors") is False:
        raise UnsupportedModelError(f"pickled weights that are packed by {method_of(said)} are not read: convert them")
    if asked is not None and method != METHOD:
        if method != method_of(said):
            raise InputError(
                f"quantization_config says {method or 'nothing'}, and the checkpoint is packed by {method_of(said)}; "
                'leave it out, or pass quantize="stored" to keep its bits, or "nf4" or "int8" to pack the numbers anew'
            )
        del kwargs["quantization_config"]


class LazyTensor:
    """A stored tensor that is read when it is indexed, as transformers does with a slice of a safetensors file."""

    def __init__(self, stored: StoredTensor):
        self._stored = stored

    def __getitem__(self, _: Any) -> Tensor:
        return self._stored.read(OpenFiles())
