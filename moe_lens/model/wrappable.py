"""Whether what is to be wrapped is a language model of transformers at all, and not something around or beside one."""

from typing import Any

from torch import nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_lens.errors import InputError, UnsupportedModelError


def check_wrappable(model: Any) -> None:
    """Refuse what is no language model of transformers, or is wrapped already.

    Raises:
        InputError: no model of transformers, or one inside another module.
        UnsupportedModelError: no head that predicts tokens, or wrapped before.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    if any(isinstance(module, GeneralizedComponent) for module in modules):
        raise UnsupportedModelError(
            "this model is already wrapped: wrapping changes a transformers model in place, and once. "
            "Use the HookedMoE that wraps it, or load the model anew"
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
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not predict tokens: it has no unembedding. Expected the causal language "
            "model of its family, as AutoModelForCausalLM loads it"
        )


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what TransformerLens cannot use as a tokenizer.

    Raises:
        InputError: no tokenizer of transformers, or one that was not loaded from anywhere.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"expected a tokenizer of transformers, as AutoTokenizer.from_pretrained loads it, got "
            f"{type(tokenizer).__name__}"
        )
    if "name_or_path" not in tokenizer.init_kwargs:
        raise InputError(
            "this tokenizer was not loaded from anywhere, and TransformerLens loads tokenizers again to add the "
            "BOS token: save it with its save_pretrained, and pass what AutoTokenizer loads from there"
        )
