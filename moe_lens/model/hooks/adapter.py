"""From a transformers model to the component tree of a HookedMoE."""

from contextlib import suppress
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedModel

from moe_lens.errors import UnsupportedModelError
from moe_lens.model.families.table import Family, family_of
from moe_lens.model.hooks.bypassed import Ending
from moe_lens.model.hooks.components import Attention, FlatTokens, Norm, Unembedding, adapt
from moe_lens.model.hooks.generic_adapter import GenericAdapter
from moe_lens.model.hooks.moe_block import MoEBlock
from moe_lens.model.hooks.readable_weight import ReadableTable, ReadableWeight
from moe_lens.model.hooks.recomputing import KeptWhileHooked
from moe_lens.model.loading.transformer_lens_words import PROCESSING, refuse_processing
from moe_lens.model.tl_compat import (
    ArchitectureAdapter,
    ArchitectureAdapterFactory,
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    GeneralizedComponent,
    LinearBridge,
    MoEBridge,
    NormalizationBridge,
    PositionEmbeddingsAttentionBridge,
    RMSNormalizationBridge,
    RotaryEmbeddingBridge,
    UnembeddingBridge,
    build_bridge_config_from_hf,
)


class DeepseekArchitectureAdapter(ArchitectureAdapter):
    """DeepSeekMoE (`model_type "deepseek"`): Llama's attention and norms, first layers dense."""

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        self._set_rms_rotary_defaults()
        self.weight_processing_conversions = {**self._qkvo_weight_conversions()}
        attention = {key: LinearBridge(name=f"{key}_proj") for key in "qkvo"}
        dense = {"dense_gate": "gate_proj", "dense_in": "up_proj", "dense_out": "down_proj"}
        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "rotary_emb": RotaryEmbeddingBridge(name="model.rotary_emb", config=self.cfg),
            "blocks": BlockBridge(
                name="model.layers",
                submodules={
                    "ln1": RMSNormalizationBridge(name="input_layernorm", config=self.cfg),
                    "ln2": RMSNormalizationBridge(name="post_attention_layernorm", config=self.cfg),
                    "attn": PositionEmbeddingsAttentionBridge(name="self_attn", config=self.cfg, submodules=attention),
                    "mlp": MoEBridge(
                        name="mlp",
                        config=self.cfg,
                        submodules={
                            "shared_experts": self._gated_mlp(name="shared_experts", optional=True),
                            **{key: LinearBridge(name=name, optional=True) for key, name in dense.items()},
                        },
                    ),
                },
            ),
            "ln_final": RMSNormalizationBridge(name="model.norm", config=self.cfg),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    def preprocess_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Refuse what a plain TransformerBridge would do next: it misses readers of the norms that it folds."""
        refuse_processing(PROCESSING)
        return state_dict


ArchitectureAdapterFactory.register_adapter("DeepseekForCausalLM", DeepseekArchitectureAdapter)


def build_adapter(model: PreTrainedModel, name: str) -> tuple[ArchitectureAdapter, Family]:
    """TransformerLens's adapter for a model, mended, and the model's family.

    Raises:
        UnsupportedModelError: the family is unknown, or its layers differ in their number of experts or of experts of a
            token.
    """
    family = family_of(model.config)
    experts: list[Any] = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"]
    counts = {int(module.num_experts) for module in experts if isinstance(getattr(module, "num_experts", None), int)}
    if len(counts) > 1:
        raise UnsupportedModelError(
            f"layers of this {family.model_type} have different numbers of experts, {sorted(counts)}; "
            "expected the same number in every layer that has experts"
        )
    routers: list[Any] = [m for name, m in model.named_modules() if name.rpartition(".")[2] == family.router]
    top_ks = {int(router.top_k) for router in routers if isinstance(getattr(router, "top_k", None), int)}
    if len(top_ks) > 1:
        raise UnsupportedModelError(
            f"layers of this {family.model_type} give a token different numbers of experts, {sorted(top_ks)}; "
            "expected the same number in every layer that has experts"
        )
    embedding = model.get_input_embeddings()
    if not isinstance(getattr(embedding, "weight", None), torch.Tensor):
        raise UnsupportedModelError(
            f"the embedding is a {type(embedding).__name__}, which has no weight; expected a table (nn.Embedding): put "
            "what it adds into the table, or write a subclass of nn.Embedding"
        )
    parameter = next(model.parameters())
    if family.layout is not None:
        cfg = build_bridge_config_from_hf(model.config, type(model).__name__, name, parameter.dtype)
        adapter = GenericAdapter(cfg, family, model)
        adapter.cfg.device = str(parameter.device)
        _mend_all(adapter)
        return adapter, family
    adapter = _known(model, name, parameter.dtype)
    if adapter is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no adapter; expected the causal language model of {family.model_type}"
        )
    adapter.cfg.device = str(parameter.device)
    attention = model.config._attn_implementation
    adapter.prepare_model(model)
    # Some adapters force eager attention for every run; here it is chosen when somebody listens to it.
    if attention is not None and model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    adapter.cfg.default_prepend_bos = True  # some adapters say no; here the tokenizer decides in every family
    _mend(adapter, family)
    _mend_all(adapter)
    return adapter, family


def _mend_all(adapter: ArchitectureAdapter) -> None:
    """What the components of all adapters need: passes that end, and an embedding that is what is computed with."""
    for component in (adapter.component_mapping or {}).values():
        if isinstance(component, GeneralizedComponent):
            adapt(component, Ending)
        if isinstance(component, EmbeddingBridge):
            adapt(component, ReadableTable)


def _known(model: PreTrainedModel, name: str, dtype: torch.dtype) -> ArchitectureAdapter | None:
    """TransformerLens's adapter for a model's class, or for the first one that it is derived from; None without any."""
    for kind in type(model).__mro__:
        cfg = build_bridge_config_from_hf(model.config, kind.__name__, name, dtype)
        with suppress(ValueError):
            return ArchitectureAdapterFactory.select_architecture_adapter(cfg)
    return None


def _mend(adapter: ArchitectureAdapter, family: Family) -> None:
    mapping: dict[str, Any] = adapter.component_mapping  # pyright: ignore[reportAssignmentType]
    blocks = mapping["blocks"]
    attention = [c for c in blocks.submodules.values() if isinstance(c, AttentionBridge)]
    within = [component for part in attention for component in part.submodules.values()]  # norms of queries and keys
    mlps = [blocks.submodules["mlp"], *blocks.submodules["mlp"].submodules.values()]
    linear = [component for part in mlps for component in part.submodules.values()]
    for component in (*mapping.values(), *blocks.submodules.values(), *within, *linear):
        if isinstance(component, NormalizationBridge):
            adapt(component, Norm)
        elif isinstance(component, AttentionBridge):
            adapt(component, Attention)
        elif isinstance(component, LinearBridge):
            adapt(component, ReadableWeight)
    adapt(mapping["unembed"], Unembedding)
    adapt(blocks, KeptWhileHooked)
    blocks.hook_aliases = {key: value for key, value in blocks.hook_aliases.items() if key != "hook_resid_mid"}
    blocks.hook_resid_mid = HookPoint()
    mlp = adapt(blocks.submodules["mlp"], MoEBlock)
    mlp.family = family
    # Router and experts are opened by the MoE block itself; TransformerLens's wrappers would add hooks that edits miss.
    for key in [k for k, c in mlp.submodules.items() if c.name in (family.router, "experts", family.shared_gate)]:
        del mlp.submodules[key]
    for component in mlp.submodules.values():
        if component.name == family.shared:
            adapt(component, FlatTokens)
    mlp._sparse_required = ()
    mlp._router_hook_aliases = {}
    mlp.hook_aliases = {}
