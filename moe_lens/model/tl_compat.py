"""What moe_lens uses of TransformerLens below its public surface, checked at import.

Other modules import these names from here. Public are `transformer_lens.hook_points`, `.ActivationCache`, `.utilities`
and `.model_bridge.TransformerBridge`; what `HookedMoE` overrides or reads of their private parts is listed too.
"""

from moe_lens.model.touchpoints import require

_COMPONENTS = "transformer_lens.model_bridge.generalized_components"
_ADAPTER = "transformer_lens.model_bridge.architecture_adapter:ArchitectureAdapter"
_BRIDGE = "transformer_lens.model_bridge:TransformerBridge"
TOUCHPOINTS = (
    # the bridge: what is overridden, called and kept
    *(
        f"{_BRIDGE}.{name}"
        for name in (
            "_accepts_derived_position_ids",
            "_ensure_generation_supported",
            "_finalize_return",
            "_gated_hook_reason",
            "_is_embedding_stage_hook",
            "_pos_slice_dim",
            "_prepare_loss_attention_mask",
            "_resolve_hook_point",
            "_scan_existing_hooks",
            "_stack_block_params",
            "_validate_attention_fork_supported",
            "_warn_gated_skipped",
            "check_hooks_to_add",
            "get_hook_point",
            "hook_dict",
            "_capture_hf_cache=",
            "_hook_registry=",
            "_last_hf_cache=",
            "_start_residual=",
            "original_model=",
        )
    ),
    "transformer_lens.model_bridge.bridge_core:BridgeCore",
    "transformer_lens.model_bridge.exceptions:StopAtLayerException",
    "transformer_lens.model_bridge.sources._bridge_builder:build_bridge_config_from_hf",
    "transformer_lens.model_bridge.sources._bridge_builder:detect_tokenizer_bos_eos",
    "transformer_lens.model_bridge.sources.transformers_driver:TransformersDriver._model=",
    # adapters
    *(
        f"{_ADAPTER}.{name}"
        for name in (
            "_gated_mlp",
            "_qkvo_weight_conversions",
            "_set_rms_rotary_defaults",
            "apply_output_logits_transform",
            "prepare_model",
            "component_mapping=",
            "weight_processing_conversions=",
        )
    ),
    "transformer_lens.factories.architecture_adapter_factory:ArchitectureAdapterFactory.register_adapter",
    "transformer_lens.factories.architecture_adapter_factory:ArchitectureAdapterFactory.select_architecture_adapter",
    # components
    *(
        f"{_COMPONENTS}:{name}"
        for name in (
            "BlockBridge._maybe_wire_capture_hooks",
            "BlockBridge._start_at_layer_idx=",
            "BlockBridge._stop_at_layer_idx=",
            "BlockBridge._teardown_capture_hooks",
            "EmbeddingBridge._output_contribution_scale=",
            "LinearBridge",
            "MoEBridge._router_hook_aliases=",
            "MoEBridge._sparse_required=",
            "PositionEmbeddingsAttentionBridge",
            "RMSNormalizationBridge",
            "RotaryEmbeddingBridge",
            "UnembeddingBridge",
        )
    ),
    *(
        f"{_COMPONENTS}.base:GeneralizedComponent.{name}"
        for name in (
            "original_component",
            "set_original_component",
            "_hook_registry=",
            "_hook_scaled_output",
            "hook_aliases=",
            "submodules=",
        )
    ),
    f"{_COMPONENTS}.attention:AttentionBridge._apply_attn_dropout",
    f"{_COMPONENTS}.attention:AttentionBridge._masked_softmax",
    f"{_COMPONENTS}.attention:AttentionBridge._setup_qkv_hook_reshaping",
    f"{_COMPONENTS}.mla_attention:MLAAttentionBridge._v_head_dim=",
    f"{_COMPONENTS}.normalization:NormalizationBridge._apply_weight_and_bias",
    "transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion:BaseTensorConversion",
    # the cache
    "transformer_lens.ActivationCache:ActivationCache._batch_size",
    "transformer_lens.ActivationCache:ActivationCache._ensure_head_results",
    "transformer_lens.ActivationCache:ActivationCache._get_cached_ln_scale",
    "transformer_lens.ActivationCache:ActivationCache._uses_ln_centering",
)
require("transformer-lens", TOUCHPOINTS, ["4.3"])

from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import (  # noqa: E402
    BaseTensorConversion,
)
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory  # noqa: E402
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter  # noqa: E402
from transformer_lens.model_bridge.bridge_core import BridgeCore  # noqa: E402
from transformer_lens.model_bridge.exceptions import StopAtLayerException  # noqa: E402
from transformer_lens.model_bridge.generalized_components import (  # noqa: E402
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MoEBridge,
    PositionEmbeddingsAttentionBridge,
    RMSNormalizationBridge,
    RotaryEmbeddingBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge  # noqa: E402
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent  # noqa: E402
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge  # noqa: E402
from transformer_lens.model_bridge.sources._bridge_builder import (  # noqa: E402
    build_bridge_config_from_hf,
    detect_tokenizer_bos_eos,
)
from transformer_lens.model_bridge.sources.transformers_driver import TransformersDriver  # noqa: E402

__all__ = [
    "ArchitectureAdapter",
    "ArchitectureAdapterFactory",
    "AttentionBridge",
    "BaseTensorConversion",
    "BlockBridge",
    "BridgeCore",
    "EmbeddingBridge",
    "GeneralizedComponent",
    "LinearBridge",
    "MoEBridge",
    "NormalizationBridge",
    "PositionEmbeddingsAttentionBridge",
    "RMSNormalizationBridge",
    "RotaryEmbeddingBridge",
    "StopAtLayerException",
    "TransformersDriver",
    "UnembeddingBridge",
    "build_bridge_config_from_hf",
    "detect_tokenizer_bos_eos",
]
