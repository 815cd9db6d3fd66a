"""Models whose large matrices are packed in 4 or 8 bits while they are loaded; such models saved, and read back.

transformers' own loader does the work, through a quantiser that is registered with it: a matrix is packed as soon as it
is read, so that the whole model never is in memory.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lens.errors import InputError
from moe_lens.model.experts.moe_layers import experts_by_layer
from moe_lens.model.experts.quantised import BLOCK, PackedLinear, PackedMatrices, Scheme, check_scheme
from moe_lens.model.families.table import family_of
from moe_lens.model.hf_compat import (
    HfQuantizer,
    QuantizationConfigMixin,
    register_quantization_config,
    register_quantizer,
)

METHOD = "moe_lens"
"""What config.json calls it."""
VARIANT = "packed"
"""Of the names of files. Without moe_lens, transformers finds none and says so; it would fill experts at random."""


class PackingConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed model."""

    def __init__(self, scheme: Scheme = "nf4", **_: Any):
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.scheme: Scheme = check_scheme(scheme)


class Packer(HfQuantizer):
    """Packs what transformers' loader reads, or makes room for what was packed before."""

    requires_calibration = False
    quantization_config: PackingConfig
    state: dict[str, Tensor] | None = None
    """What is saved, by the names that parameters had before the model was wrapped."""

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:  # noqa: ARG002
        """What `save_pretrained` writes."""
        return self.state, {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        self.problems = list[str]()
        self.to_pack = packers(model, self.quantization_config.scheme)
        if self.pre_quantized:
            for name, pack in self.to_pack.items():
                pack(model.get_parameter(name).detach())

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:  # noqa: ARG002
        """Whether a parameter is one of those that are packed."""
        return param_name in self.to_pack

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of a parameter's number when it is packed: transformers divides models among GPUs by them."""
        if self.pre_quantized or param_name not in self.to_pack:
            return float(super().param_element_size(model, param_name, param))
        return packed_width(self.quantization_config.scheme, param.shape)

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse places from which packed numbers would have to be brought back in every pass.

        Raises:
            InputError: the disk, or main memory beside a GPU.
        """
        there = {str(place) for place in device_map.values()} if isinstance(device_map, Mapping) else set[str]()
        if "disk" in there or ("cpu" in there and len(there) > 1):
            raise InputError(
                f"device_map puts parts of a packed model in {', '.join(sorted(there))}; packed weights are on GPUs or "
                "in main memory as a whole: name one of these, or leave device_map out"
            )

    def get_quantize_ops(self) -> Any:
        """What the loader calls with each of them."""
        return _Pack(self.to_pack, self.problems)

    def is_serializable(self) -> Any:
        """Packed matrices are buffers."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Gradients pass, but packed numbers have none."""
        return False


class _Pack:
    """An operation of transformers' loader."""

    def __init__(self, to_pack: dict[str, Callable[[Tensor], None]], problems: list[str]):
        self.to_pack, self.problems = to_pack, problems

    def convert(self, input_dict: dict[str, Any], missing_keys: Any = None, **_: Any) -> dict[str, Tensor]:
        """Pack; nothing is left for the loader to put anywhere."""
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if not all(bool(end.isfinite()) for end in weight.aminmax()):
                self.problems.append(f"{name} is NaN or infinite in places")
            self.to_pack[name](weight)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


register_quantization_config(METHOD)(PackingConfig)
register_quantizer(METHOD)(Packer)


def packers(model: PreTrainedModel, scheme: Scheme) -> dict[str, Callable[[Tensor], None]]:
    """By name, what packs each matrix of experts and of the blocks' linear layers, given its numbers.

    Routers, norms, biases, embeddings and unembedding are not among them; nor, in 4 bits, a linear layer whose numbers
    are no multiple of 64.

    Raises:
        UnsupportedModelError: an unknown family.
    """
    family = family_of(model.config)
    places = {module: name for name, module in model.named_modules()}
    found: dict[str, Callable[[Tensor], None]] = {}
    for experts in experts_by_layer(model, family).values():
        for holder, name in experts.matrices(scheme):
            found[f"{places[holder]}.{name}"] = partial(_done, holder, partial(experts.pack, holder, name), scheme)
    routers = {family.router, *([family.shared_gate] if family.shared_gate else [])}
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    for name, linear in model.named_modules():
        if type(linear) is not nn.Linear or not name.startswith(blocks) or routers & set(name.split(".")):
            continue
        if scheme == "int8" or linear.weight.numel() % BLOCK == 0:
            found[f"{name}.weight"] = partial(_done, linear, partial(PackedLinear.convert, linear, name), scheme)
    return found


def packed_width(scheme: Scheme, shape: Sequence[int]) -> float:
    """Bytes of a packed number with its share of a scale.

    Args:
        scheme: "nf4", "fp4" or "int8".
        shape: of the matrices.
    """
    return 1 + 4 / shape[-1] if scheme == "int8" else 0.5 + 4 / BLOCK


def _done(holder: Any, pack: Callable[[Tensor, Scheme], None], scheme: Scheme, weight: Tensor) -> None:
    pack(weight, scheme)
    for module in holder.modules():
        module._is_hf_initialized = True  # the loader is not to fill it


@torch.no_grad()
def quantise(model: PreTrainedModel, scheme: Scheme) -> None:
    """Pack a model that is loaded and not wrapped yet, one matrix after the other, in place and for good.

    Args:
        model: Of transformers.
        scheme: "nf4", "fp4" or "int8".

    Raises:
        InputError: an unknown scheme, or bitsandbytes is not installed.
        UnsupportedModelError: an unknown family, or experts that cannot be cut into the scheme's blocks.
    """
    model_: Any = model
    model_.hf_quantizer = Packer(PackingConfig(scheme=check_scheme(scheme)), pre_quantized=False)
    model_.config.quantization_config = model_.hf_quantizer.quantization_config
    for name, pack in packers(model, scheme).items():
        with align_module_device(model.get_submodule(name.rpartition(".")[0])):
            pack(model.get_parameter(name).detach())


def read_quantize(quantize: Scheme | None, kwargs: dict[str, Any]) -> None:
    """Put our config in the place of `quantize`, or of bitsandbytes' own, which leaves experts out.

    Args:
        quantize: The scheme; None for what the arguments say.
        kwargs: Arguments of `from_pretrained`; changed.

    Raises:
        InputError: two wishes, an unknown scheme, or a setting of bitsandbytes that is not ours.
    """
    asked = kwargs.get("quantization_config")
    theirs = asked if isinstance(asked, dict) else getattr(asked, "to_dict", dict)()
    bits = {word: kwargs.pop(word, None) or theirs.get(word) for word in ("load_in_4bit", "load_in_8bit")}
    if quantize is None and not any(bits.values()):
        return
    if quantize is not None and (asked is not None or any(bits.values())):
        raise InputError(f"from_pretrained: got quantize={quantize!r} and another quantisation; expected one of them")
    if quantize is None:
        quantize = theirs.get("bnb_4bit_quant_type", "nf4") if bits["load_in_4bit"] else "int8"
        if theirs.get("llm_int8_skip_modules"):
            raise InputError("llm_int8_skip_modules is not taken: routers, norms, embeddings and unembedding stay")
        if theirs.get("bnb_4bit_use_double_quant"):
            warnings.warn("bnb_4bit_use_double_quant: scales stay in float32, exact and 0.4 bits more", stacklevel=4)
        compute = theirs.get("bnb_4bit_compute_dtype")
        if bits["load_in_4bit"] and compute not in (None, "float32") and not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = compute
    kwargs["quantization_config"] = PackingConfig(scheme=check_scheme(quantize))


def packed_in(model: nn.Module) -> list[tuple[str, PackedMatrices]]:
    """The packed matrices of a model, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PackedMatrices)]
