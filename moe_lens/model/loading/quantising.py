"""Models whose large matrices are packed in 4 or 8 bits while they are loaded; such models saved, and read back.

transformers' own loader does the work, through a quantiser that is registered with it: a matrix is packed as soon as it
is read, so that the whole model never is in memory. Matrices that stay in the bits of their checkpoint come the same
way (`kept_bits.py`), and are put where they belong.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lens.errors import InputError
from moe_lens.model.experts.moe_layers import experts_by_layer
from moe_lens.model.experts.packed import Packed, PackedLinear
from moe_lens.model.experts.quantised import (
    BLOCK,
    PackedMatrices,
    Scheme,
    Wish,
    check_blocks,
    check_scheme,
    check_wish,
)
from moe_lens.model.experts.stored_bits import KeptMatrices, StoredBits
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

    def __init__(self, scheme: Wish = "nf4", **_: Any):
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.scheme: Wish = check_wish(scheme)
        self.method = ""
        """Of "stored": how the checkpoint is packed."""
        self.widths: Mapping[str, float] = {}
        """Of "stored": bytes of a number of each parameter that stays packed, by name."""

    def to_dict(self) -> dict[str, Any]:
        """What config.json says."""
        return {"quant_method": METHOD, "scheme": self.scheme}


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
        self.places = matrices_of(model, self.quantization_config.scheme)
        if self.pre_quantized:
            for name, place in self.places.items():
                place.pack(model.get_parameter(name).detach(), self.quantization_config.scheme)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Let transformers take no detour around weights that cannot be read (Jamba's rounds): packed ones can."""
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:  # noqa: ARG002
        """Whether a parameter is one of those that are packed."""
        return param_name in self.places

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of a parameter's number when it is packed: transformers divides models among GPUs by them."""
        plain = float(super().param_element_size(model, param_name, param))
        if self.pre_quantized or param_name not in self.places:
            return plain
        if self.quantization_config.scheme == "stored":
            return self.quantization_config.widths.get(param_name, plain)
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
        return _Pack(self.places, self.quantization_config, self.problems)

    def is_serializable(self) -> Any:
        """Packed matrices are buffers."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Gradients pass, but packed numbers have none."""
        return False


class _Pack:
    """An operation of transformers' loader."""

    def __init__(self, places: "dict[str, Place]", config: PackingConfig, problems: list[str]):
        self.places, self.config, self.problems = places, config, problems

    def convert(self, input_dict: dict[str, Any], missing_keys: Any = None, **_: Any) -> dict[str, Any]:
        """Pack; what is left is for the loader to put where it belongs."""
        left = dict[str, Any]()
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if isinstance(weight, StoredBits):
                self.places[name].put(KeptMatrices(weight, self.config.method))
            elif self.config.scheme == "stored" or name not in self.places:  # Ernie's experts of images
                left[name] = weight
                continue
            else:
                if not all(bool(end.isfinite()) for end in weight.aminmax()):
                    self.problems.append(f"{name} is NaN or infinite in places")
                self.places[name].pack(weight, self.config.scheme)
            if missing_keys is not None:
                missing_keys.discard(name)
        return left


register_quantization_config(METHOD)(PackingConfig)
register_quantizer(METHOD)(Packer)


class Place(NamedTuple):
    """A parameter of a model that can be packed."""

    holder: nn.Module
    name: str
    """What the holder calls it."""
    cut: Callable[[Tensor], Tensor]
    """From its numbers to one matrix for each expert, or to that of a linear layer alone."""

    def pack(self, weight: Tensor, scheme: Any) -> None:
        """Keep it in 4 or 8 bits from now on.

        Args:
            weight: Its numbers, as they were stored.
            scheme: How to pack them.
        """
        self.put(PackedMatrices.pack(self.cut(weight), scheme, self.name))

    def put(self, packed: Packed) -> None:
        """Put packed matrices in its place."""
        if isinstance(self.holder, nn.Linear):
            PackedLinear.convert(self.holder, packed)
        else:
            delattr(self.holder, self.name)
            self.holder.add_module(self.name, packed)
        for module in self.holder.modules():
            module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]  # the loader is not to fill it


def matrices_of(model: PreTrainedModel, scheme: Wish) -> dict[str, Place]:
    """By name, the matrices of experts and of the blocks' linear layers.

    Routers, norms, biases, embeddings and unembedding are not among them; nor, in 4 bits, a linear layer whose numbers
    are no multiple of 64.

    Raises:
        UnsupportedModelError: an unknown family, or experts that cannot be cut into the scheme's blocks.
    """
    family = family_of(model.config)
    paths = {module: name for name, module in model.named_modules()}
    found: dict[str, Place] = {}
    for experts in experts_by_layer(model, family).values():
        for holder, name in experts.matrices():
            found[f"{paths[holder]}.{name}"] = Place(holder, name, experts.cut)
            if scheme != "stored":
                check_blocks(name, experts.cut(getattr(holder, name)).shape, scheme)
    routers = {family.router, *([family.shared_gate] if family.shared_gate else [])}
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    for name, linear in model.named_modules():
        if type(linear) is not nn.Linear or not name.startswith(blocks) or routers & set(name.split(".")):
            continue
        if scheme in ("int8", "stored") or linear.weight.numel() % BLOCK == 0:
            found[f"{name}.weight"] = Place(linear, "weight", _alone)
    return found


def _alone(weight: Tensor) -> Tensor:
    return weight[None]


def packed_width(scheme: Scheme, shape: Sequence[int]) -> float:
    """Bytes of a packed number with its share of a scale.

    Args:
        scheme: "nf4", "fp4" or "int8".
        shape: of the matrices.
    """
    return 1 + 4 / shape[-1] if scheme == "int8" else 0.5 + 4 / BLOCK


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
    for name, place in matrices_of(model, scheme).items():
        with align_module_device(place.holder):
            place.pack(model.get_parameter(name).detach(), scheme)


def read_quantize(quantize: Wish | None, kwargs: dict[str, Any]) -> None:
    """Put our config in the place of `quantize`, or of bitsandbytes' own, which leaves experts out.

    Args:
        quantize: The scheme, or "stored"; None for what the arguments say.
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
    kwargs["quantization_config"] = PackingConfig(scheme=check_wish(quantize))


def packed_in(model: nn.Module) -> list[tuple[str, Packed]]:
    """The packed matrices of a model, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Packed)]
