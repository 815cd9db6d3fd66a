"""What moe_lens uses of transformers below its public surface, checked at import, and the releases that are tested.

Other modules import these names from here. Of the models of `transformers.models`, families/deepseek.py and
families/bailing.py alone use the source; what they use is listed here too.
"""

import inspect
import re
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

from moe_lens.errors import UntestedVersionWarning
from moe_lens.model.touchpoints import require

OLDEST, NEWEST = (5, 20), (5, 24)
"""The minor releases of transformers that are tested, from the first to the last."""
RELEASE = tuple(int(part) for part in re.findall(r"\d+", version("transformers"))[:3])
"""The one that is installed."""

_V2 = "transformers.models.deepseek_v2.modeling_deepseek_v2:DeepseekV2"
_GLM = "transformers.models.glm4_moe.modeling_glm4_moe:Glm4Moe"
_LLAMA = "transformers.models.llama.modeling_llama:Llama"
TOUCHPOINTS = (
    "transformers.cache_utils:DynamicLayer",
    "transformers.cache_utils:DynamicSlidingWindowLayer",
    "transformers.initialization:normal_",
    "transformers.conversion_mapping:get_checkpoint_conversion_mapping",
    "transformers.conversion_mapping:register_checkpoint_conversion_mapping",
    "transformers.conversion_mapping:get_model_conversion_mapping",
    "transformers.core_model_loading:convert_and_load_state_dict_in_model._weight_conversions=",
    "transformers.core_model_loading:Concatenate",
    "transformers.core_model_loading:MergeModulelist",
    "transformers.core_model_loading:Split",
    "transformers.core_model_loading:WeightConverter",
    "transformers.core_model_loading:WeightRenaming",
    "transformers.core_model_loading:dot_natural_key",
    "transformers.core_model_loading:rename_source_key",
    "transformers.core_model_loading:revert_weight_conversion",
    "transformers.generation:GenerationConfig._get_default_generation_params",
    "transformers.integrations.moe:grouped_mm_experts_forward._apply_gate=",
    "transformers.modeling_layers:GradientCheckpointingLayer",
    "transformers.modeling_rope_utils:RopeParameters",
    "transformers.modeling_rope_utils:dynamic_rope_update",
    "transformers.modeling_utils:PreTrainedModel._adjust_missing_and_unexpected_keys",
    "transformers.modeling_utils:PreTrainedModel._from_config",
    "transformers.modeling_utils:PreTrainedModel._get_dtype_plan",
    "transformers.modeling_utils:PreTrainedModel._is_hf_initialized=",
    "transformers.modeling_utils:PreTrainedModel._no_split_modules",
    "transformers.modeling_utils:PreTrainedModel._skip_keys_device_placement",
    "transformers.configuration_utils:PreTrainedConfig._attn_implementation",
    "transformers.configuration_utils:PreTrainedConfig._experts_implementation",
    "transformers.quantizers.base:_assign_is_quantized._is_quantized=",
    "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "transformers.models.auto.modeling_auto:MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "transformers.models.auto.tokenization_auto:get_tokenizer_config",
    "transformers.quantizers:HfQuantizer._process_model_before_weight_loading",
    "transformers.quantizers:HfQuantizer.get_quantize_ops",
    "transformers.quantizers:HfQuantizer.get_state_dict_and_metadata",
    "transformers.quantizers:HfQuantizer.param_needs_quantization",
    "transformers.quantizers.auto:register_quantization_config",
    "transformers.quantizers.auto:register_quantizer",
    "transformers.utils:is_gguf_available",
    "transformers.utils.generic:TransformersKwargs",
    "transformers.utils.hub:cached_file",
    "transformers.utils.hub:cached_files._raise_exceptions_for_missing_entries=",
    "transformers.utils.hub:is_offline_mode",
    "transformers.utils.hub:resolve_revision",
    "transformers.utils.output_capturing:OutputRecorder",
    "transformers.utils.output_capturing:install_output_capuring_hook",
    "transformers.utils.output_capturing:maybe_install_capturing_hooks",
    *(f"{_V2}{name}" for name in ("RMSNorm", "Experts", "MLP", "DecoderLayer", "PreTrainedModel", "Model")),
    f"{_V2}ForCausalLM",
    *(f"{_GLM}{name}" for name in ("Attention", "DecoderLayer", "MoE", "RMSNorm", "RotaryEmbedding")),
    *(f"{_GLM}{name}" for name in ("PreTrainedModel", "Model", "ForCausalLM")),
    f"{_LLAMA}Attention",
    f"{_LLAMA}RotaryEmbedding",
)
require("transformers", TOUCHPOINTS, [".".join(map(str, minor)) for minor in (OLDEST, NEWEST)])

if RELEASE[:2] > NEWEST:
    warnings.warn(
        f"transformers {version('transformers')} is newer than {'.'.join(map(str, NEWEST))}, the newest that moe_lens "
        "is tested with. Every model is checked when it is wrapped, unless check=False; what has changed beyond that "
        "check is not known",
        UntestedVersionWarning,
        stacklevel=2,
    )

from transformers import initialization  # noqa: E402
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # noqa: E402
from transformers.conversion_mapping import (  # noqa: E402
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import (  # noqa: E402
    Concatenate,
    MergeModulelist,
    Split,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402
from transformers.modeling_rope_utils import RopeParameters, dynamic_rope_update  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config  # noqa: E402
from transformers.quantizers import HfQuantizer  # noqa: E402
from transformers.quantizers.auto import register_quantization_config, register_quantizer  # noqa: E402
from transformers.utils import is_gguf_available  # noqa: E402
from transformers.utils.generic import TransformersKwargs  # noqa: E402
from transformers.utils.hub import cached_file, is_offline_mode, resolve_revision  # noqa: E402
from transformers.utils.output_capturing import (  # noqa: E402
    OutputRecorder,
    install_output_capuring_hook,
    maybe_install_capturing_hooks,
)
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

__all__ = [
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "NEWEST",
    "OLDEST",
    "RELEASE",
    "Concatenate",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GradientCheckpointingLayer",
    "MergeModulelist",
    "OutputRecorder",
    "RopeParameters",
    "Split",
    "TransformersKwargs",
    "cached_file",
    "dot_natural_key",
    "dynamic_rope_update",
    "WeightConverter",
    "WeightRenaming",
    "cache_of",
    "cache_word",
    "rename_source_key",
    "revert_weight_conversion",
    "get_model_conversion_mapping",
    "get_checkpoint_conversion_mapping",
    "get_tokenizer_config",
    "initialization",
    "install_output_capuring_hook",
    "is_gguf_available",
    "is_offline_mode",
    "maybe_install_capturing_hooks",
    "register_checkpoint_conversion_mapping",
    "HfQuantizer",
    "QuantizationConfigMixin",
    "register_quantization_config",
    "register_quantizer",
    "resolve_revision",
]


@cache
def cache_word(function: Callable[..., Any]) -> str:
    """What a function of transformers calls the key-value cache: `cache` from 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """The key-value cache that an output of transformers holds, under either of these names."""
    return output.cache if hasattr(output, "cache") else output.past_key_values
