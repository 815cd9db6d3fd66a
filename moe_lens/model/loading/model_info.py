"""What a model is, from its config alone: no weights are read or made."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

from moe_lens.errors import CheckpointError, InputError, MoELensError, UnsupportedModelError, one_line
from moe_lens.model.experts.expert_weights_view import top_k_of
from moe_lens.model.experts.moe_layers import attention_experts, decoder_layers, experts_by_layer, moe_blocks
from moe_lens.model.families.table import check_release, family_of
from moe_lens.model.loading.checkpoint import read_config
from moe_lens.model.loading.device_map import Size, gibibytes, plan_memory, slow_dtype
from moe_lens.model.loading.formats.view import FORMATS, method_of, packing_of
from moe_lens.model.loading.kept_bits import kept_of, widths
from moe_lens.model.loading.machine import Machine
from moe_lens.model.loading.pretrained import resolve_name
from moe_lens.model.loading.sizes import packed_size, size_of
from moe_lens.model.loading.sizes_that_fit import check_attention, check_runs
from moe_lens.model.loading.stored_view import locate

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class ModelInfo:
    """The sizes of a Mixture-of-Experts model."""

    model_type: str
    n_layers: int
    moe_layers: tuple[int, ...]
    """Layers that have experts."""
    d_model: int
    n_experts: int
    """Routed experts of a layer, `n_identities` among them."""
    n_identities: int
    """Routed experts without parameters, which give back what they read."""
    top_k: int
    """Routed experts active for a token."""
    has_shared: bool
    """Whether shared experts run for every token."""
    d_expert: int
    """Hidden width of one routed expert."""
    rule: str
    """How experts are chosen and weighted."""
    parameters: int
    """All of them; tied ones are counted once, buffers are not."""
    active: int
    """All but those of the routed experts that a token does not use. Embeddings count whole; some authors, those of
    gpt-oss for example, leave the input embedding out."""
    note: str
    """What is particular to the family's hooks."""
    dtype: torch.dtype
    """That the config says the checkpoint is in."""
    numbers: Mapping[str, int] = field(repr=False)
    """How many each parameter has, by name."""
    in_nf4: Size | None = field(repr=False)
    """Bytes in 4 bits; None where the family's matrices cannot be cut into blocks."""
    packed_by: str = ""
    """How the checkpoint is packed, where it is in a way that is read here."""
    stored: Size | str = field(default="", repr=False)
    """Bytes with its matrices as they are packed in the checkpoint, or why they are not known."""

    def memory(self, dtype: torch.dtype) -> int:
        """Bytes that the parameters take; activations and caches come on top."""
        return self.parameters * dtype.itemsize


def here(info: ModelInfo, machine: Machine) -> list[tuple[str, str]]:
    """How a model would be loaded on a machine, as it is stored and in 4 bits: the bytes, and where they would be.

    In float32 too, where that is quicker.
    """
    stored = {name: number * info.dtype.itemsize for name, number in info.numbers.items()}
    ways = [(str(info.dtype).removeprefix("torch."), size_of(info.numbers, info.dtype, streamed=True))]
    if info.in_nf4 is not None:
        ways.append(("nf4", info.in_nf4))
    slow = slow_dtype(info.dtype, {gpu: 0 for gpu in machine.gpus} | {"cpu": ways[0][1].total}, machine.slowdown)
    if slow:
        ways.append(("float32", size_of(info.numbers, torch.float32, streamed=True, stored=stored)))
    found = [(f"in {how}", _where(size, machine)) for how, size in ways]
    if info.packed_by:
        where = info.stored if isinstance(info.stored, str) else _where(info.stored, machine)
        found.append(("as stored", f"{where} ({info.packed_by}, with --quantize stored)"))
    return [*found, ("speed", f"{slow}: --dtype float32 is quicker")] if slow else found


def _where(size: Size, machine: Machine) -> str:
    try:
        plan = plan_memory(size, machine)
    except InputError as error:
        return str(error)
    return f"{gibibytes(size.total)}: {plan}" if len(plan.places) > 1 else f"fits: {plan}"


def model_info(name_or_path: str | Path, **hub: Any) -> ModelInfo:
    """Sizes of a model by hub name, folder, config.json, or `"tiny-deepseekmoe"`; no weights are read.

    Raises:
        CheckpointError: there is no config.json, or it cannot be understood.
        UnsupportedModelError: the family is not supported, or the model has no experts.
    """
    source = resolve_name(str(name_or_path))
    if Path(source).name == "config.json" and Path(source).is_file():
        source = str(Path(source).parent)
    path, raw = read_config(source, hub)
    check_release(raw["model_type"])
    if raw["model_type"] not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{path}: model_type {raw['model_type']!r} is unknown to transformers {transformers.__version__}"
        )
    try:
        info = config_info(AutoConfig.from_pretrained(source, **hub), partial(_as_stored, source, raw, hub))
        return replace(info, packed_by=_packed_by(raw))
    except MoELensError:
        raise
    except Exception as error:  # a config can be wrong in as many ways as there are models that read it
        raise CheckpointError(
            f"{path} is no config that transformers understands: {type(error).__name__}: {one_line(error)}"
        ) from error


def _packed_by(raw: Mapping[str, Any]) -> str:
    method = method_of(packing_of(raw) or {})
    return method if method in FORMATS else ""


def _as_stored(source: str, raw: dict[str, Any], hub: dict[str, Any], model: Any, dtype: torch.dtype) -> Size | str:
    """Bytes of a model of which the packed matrices stay so, from the headers of its files if those are here."""
    if not _packed_by(raw):
        return ""
    try:
        checkpoint, _ = locate(source, raw, {**hub, "local_files_only": True}, None)
    except CheckpointError:
        return "its size can be said when its files are here"
    try:
        return packed_size(model, dtype, "stored", widths(model, kept_of(model, checkpoint)))
    except (InputError, UnsupportedModelError) as error:
        return str(error)


def config_info(
    config: PreTrainedConfig, as_stored: Callable[[Any, torch.dtype], Size | str] | None = None
) -> ModelInfo:
    """Sizes of the model that a transformers config describes.

    Args:
        config: Of the model.
        as_stored: What `ModelInfo.stored` is, given the model without numbers and its dtype.

    Raises:
        UnsupportedModelError: the family is not supported, or the model has no experts.
        CheckpointError: a token cannot have as many experts as the config asks for, or sizes do not fit one another.
    """
    family = family_of(config)
    # Building a model writes to its config, and quantised parameters are counted as what they stand for.
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    decoder = family.layout.decoder if family.layout else "model"
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and "language_model" not in decoder
    with torch.device("meta"):
        model = (AutoModelForCausalLM if causal else AutoModelForImageTextToText).from_config(config)
    layers, blocks, found = decoder_layers(model, family), moe_blocks(model, family), experts_by_layer(model, family)
    if not found:
        raise UnsupportedModelError(f"this {config.model_type} has no layer with experts")
    text = config.get_text_config()
    first = next(iter(found))
    experts, moe = found[first], blocks[first]
    top_k = top_k_of(moe, getattr(moe, family.router), text, family.top_k)
    if not 1 <= top_k <= experts.n_experts:
        raise CheckpointError(
            f"this {config.model_type} has {experts.n_experts} experts, and its config asks for {top_k} a token"
        )
    check_attention(layers, model)
    if not (d_expert := int(experts.second()[0].shape[1])):
        raise CheckpointError(f"the experts of this {config.model_type} are of width 0")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    said: Any = config.dtype or text.dtype or torch.bfloat16
    dtype = getattr(torch, said) if isinstance(said, str) else said
    sizes = [of_layer.sizes() for of_layer in (*found.values(), *attention_experts(model, family))]
    idle = sum(every - one * min(top_k, experts.n_matrices) for every, one in sizes)
    inner = bool(family.layout and family.layout.inner)
    for at, experts_of_text in found.items() if inner else ():  # no token of text uses the others
        modules = [module for name, module in layers[at].named_modules() if name.endswith(".experts")]
        others = [module for module in modules if module is not experts_of_text.module]
        idle += sum(parameter.numel() for module in others for parameter in module.parameters())
    info = ModelInfo(
        model_type=config.model_type,
        n_layers=len(layers),
        moe_layers=tuple(found),
        d_model=int(text.hidden_size),
        n_experts=experts.n_experts,
        n_identities=experts.n_identities,
        top_k=top_k,
        has_shared=bool(family.shared) and any(family.shared in name for name, _ in model.named_modules()),
        d_expert=d_expert,
        rule=family.rule(top_k, bool(getattr(text, "norm_topk_prob", True))),
        parameters=parameters,
        active=parameters - idle,
        note=family.note,
        dtype=dtype,
        numbers={name: parameter.numel() for name, parameter in model.named_parameters()},
        in_nf4=_in_nf4(model, dtype),
        stored="" if as_stored is None else as_stored(model, dtype),
    )
    check_runs(model, [of_layer.module for of_layer in found.values()], text)
    return info


def _in_nf4(model: Any, dtype: torch.dtype) -> Size | None:
    try:
        return packed_size(model, dtype, "nf4")
    except UnsupportedModelError:
        return None
