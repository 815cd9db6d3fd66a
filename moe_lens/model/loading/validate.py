"""Whether what is to be wrapped is a language model of transformers: not around or beside one, not a shard of one."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.model.tl_compat import GeneralizedComponent

_WRAPPED = "_original_component"
_INSTEAD = (
    "Load the model whole on every process (torchrun -m moe_lens … shares out the texts), or spread its layers over "
    'devices with device_map="auto"'
)


def check_wrappable(model: Any) -> None:
    """Refuse what is no language model of transformers, or is wrapped already.

    Raises:
        InputError: no model of transformers, or one inside another module.
        UnsupportedModelError: no head that predicts tokens, or one that is still to be normed; or wrapped before.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    if any(isinstance(module, GeneralizedComponent) for module in modules):
        raise UnsupportedModelError(
            "this model is already wrapped: wrapping changes a transformers model in place, and once. "
            "Use the HookedMoE that wraps it, or load the model anew"
        )
    for module in modules:
        forward = vars(module).get("forward")
        if getattr(getattr(forward, "func", forward), "__module__", "").startswith("moe_lens."):
            raise UnsupportedModelError(
                f"a part of this model ({type(module).__name__}) is wrapped as a part of another one, and hooks of one "
                "would act in the other: give it its own (copy.deepcopy, before either is wrapped)"
            )
    if not isinstance(model, PreTrainedModel):
        inside = next((type(module).__name__ for module in modules if isinstance(module, PreTrainedModel)), None)
        raise InputError(
            f"expected a causal language model of transformers, got {type(model).__name__}"
            + (f" around a {inside}: pass that one itself. " if inside else ". ")
            + (
                "Of a compiled model it is _orig_mod, of a parallel one module, of a PEFT model what "
                "merge_and_unload() returns"
                if inside
                else "HookedMoE.from_pretrained loads a model by its name or folder"
            )
        )
    refuse_compiled(model)
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not predict tokens: it has no unembedding. Expected the causal language "
            "model of its family, as AutoModelForCausalLM loads it"
        )
    if getattr(model.config.get_text_config(), "norm_head", False):
        raise UnsupportedModelError(
            "config.norm_head says that the unembedding is still to be divided by the norms of its columns, which "
            "from_pretrained does and a model made from a config does not: do it (norm_columns of "
            "moe_lens.model.families.bailing, on lm_head.weight) if the numbers are an original checkpoint's, and set "
            "config.norm_head = False"
        )


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a model that was compiled, or a part of which was: its graph holds no hooks.

    Raises:
        UnsupportedModelError: names the part.
    """
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        compiled = hasattr(forward, "_torchdynamo_orig_callable") and not hasattr(forward, "_torchdynamo_disable")
        if compiled or module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            raise UnsupportedModelError(
                f"{name or 'the model'} is compiled: hooks are Python functions, and its graph would run without them. "
                "Load the model anew, and wrap it uncompiled"
            )


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model that computes with an adapter of PEFT: its own parameters are then only a part of what it does.

    Whatever reads them (`W_Q`, `W_U`, attribution, what is saved) would be silent about the adapter.

    Raises:
        UnsupportedModelError: PEFT has put a module of its own around one of the model's; names it.
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            where = ".".join(part for part in name.split(".") if part != _WRAPPED)
            raise UnsupportedModelError(
                f"an adapter of PEFT lies on {where} ({type(module).__name__}): merge first (merge_and_unload), and "
                "wrap the model that it returns"
            )


def check_layers(blocks: Any, n_layers: int) -> None:
    """Refuse a model whose layers are not those of its config, each one a module of its own.

    Raises:
        UnsupportedModelError: layers were taken out or added, or one, or a part of it, is used twice: hooks could not
            tell them apart.
    """
    if len(blocks) != n_layers:
        raise UnsupportedModelError(
            f"the model has {len(blocks)} layers, and its config says {n_layers}: set config.num_hidden_layers, and "
            "all that it says of each layer, to what there is"
        )
    if len({id(block.original_component) for block in blocks}) < n_layers:
        raise UnsupportedModelError("one layer's module is used twice, and hooks could not tell its two places apart")
    found: dict[nn.Module, int] = {}
    for layer, block in enumerate(blocks):
        for module in block.original_component.modules():
            if module._parameters and (other := found.setdefault(module, layer)) != layer:
                raise UnsupportedModelError(
                    f"layers {other} and {layer} share a module ({type(module).__name__}), and hooks could not tell "
                    "its two places apart: give each its own (copy.deepcopy)"
                )


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is no tokenizer of transformers.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"expected a tokenizer of transformers, as AutoTokenizer.from_pretrained loads it, got "
            f"{type(tokenizer).__name__}"
        )


def refuse_plan(arguments: Mapping[str, Any]) -> None:
    """Refuse to load with tensor or expert parallelism, or fully sharded.

    Raises:
        UnsupportedModelError: the arguments of `from_pretrained` ask for it.
    """
    asked = [name for name in ("tp_plan", "tp_size", "distributed_config") if arguments.get(name) is not None]
    if asked:
        raise UnsupportedModelError(
            f"{asked[0]} splits layers and experts over processes, and a hook would see one process's shard of them. "
            f"{_INSTEAD}"
        )


def refuse_shards(model: Any) -> None:
    """Refuse a model that was loaded in that way.

    Raises:
        UnsupportedModelError: its parameters are shards.
    """
    split = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    size = getattr(model, "tp_size", None) or 1
    if split or size > 1:
        what = f"{split[0]} is a shard" if split else f"it is split over {size} processes"
        raise UnsupportedModelError(
            f"this model was loaded with tensor or expert parallelism, or fully sharded ({what}), and a hook would see "
            f"one process's part of what it names. {_INSTEAD}"
        )


def check_kernel(experts: nn.Module) -> None:
    """Warn where transformers was asked for another kernel than the one whose bits the wrapped model computes.

    Args:
        experts: those of a layer. Of float64, and of families that know one way alone, nothing else can be asked.
    """
    asked = asked_kernel(experts)
    dtype = next((parameter.dtype for parameter in experts.parameters()), None)
    if hasattr(experts, "is_concatenated") and asked not in (None, "grouped_mm") and dtype != torch.float64:
        warnings.warn(
            f"experts_implementation={asked!r} is not used: HookedMoE computes the experts itself, with the bits of "
            f"transformers' 'grouped_mm'. Logits of {asked!r} differ by rounding, in bfloat16 visibly",
            stacklevel=4,
        )


def asked_kernel(experts: nn.Module) -> str | None:
    """The kernel that transformers was asked for, by its name; None where the family knows one way alone."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None)
