"""The parameters of a wrapped model by the names that they have in transformers: all of them, and each once."""

from collections import OrderedDict
from collections.abc import Collection, Generator, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from moe_lens.errors import MoELensError, UnsupportedModelError, a_kind
from moe_lens.model.devices import usable_device
from moe_lens.model.loading.key_mapping import WRAPPER
from moe_lens.model.loading.places import check_places
from moe_lens.model.loading.quantising import packed_in
from moe_lens.model.loading.validate import refuse_adapters
from moe_lens.model.torch_transforms import no_functional_call


class StateError(MoELensError, RuntimeError):
    """A `state_dict` that is not this model's: names what is missing, unexpected or misshapen. Nothing was loaded."""


def original_state(
    model: PreTrainedModel, original_names: Collection[str], *, keep_vars: bool = False
) -> dict[str, Tensor]:
    """The state of a wrapped model under the names it had before it was wrapped.

    Raises:
        UnsupportedModelError: a parameter is gone, or has become one that is computed, since then.
    """
    found = _by_clean_names(model.state_dict(keep_vars=keep_vars))
    if lost := [name for name in original_names if name not in found]:
        check_own(model)
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UnsupportedModelError(
            f"{lost[0]} is gone since the model was wrapped{more}: put a module with the same "
            "parameters in that place, or change the transformers model before it is wrapped"
        )
    return {name: found[name] for name in original_names}


def check_own(model: nn.Module) -> None:
    """Refuse a model of which a parameter is not its own, but computed from others when it is asked for.

    Raises:
        UnsupportedModelError: torch's `prune`, `parametrize`, `weight_norm` or `spectral_norm` is on it; names it.
    """
    for owner, module in model.named_modules():
        computed = list(getattr(module, "parametrizations", {})) if is_parametrized(module) else []
        hooks = module._forward_pre_hooks.values()
        computed += [str(getattr(hook, "_tensor_name", "")) for hook in hooks if isinstance(hook, BasePruningMethod)]
        computed += [hook.name for hook in hooks if isinstance(hook, SpectralNorm | WeightNorm)]
        if computed:
            name = f"{owner}.{computed[0]}".replace(WRAPPER, "")
            raise UnsupportedModelError(
                f"{name} is computed from other parameters (by torch.nn.utils' prune, parametrize or a norm), which no "
                "checkpoint of the family has: make it permanent first (prune.remove, "
                "parametrize.remove_parametrizations, remove_weight_norm, remove_spectral_norm)"
            )


def check_numbers(model: PreTrainedModel) -> None:
    """Refuse a model whose parameters are packed.

    Raises:
        UnsupportedModelError: it is quantised.
    """
    method: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    how = getattr(getattr(method, "quant_method", None), "value", getattr(method, "quant_method", None))
    ours = [f"{name.replace(WRAPPER, '')} is {one.scheme}" for name, one in packed_in(model)]
    packed = ours + [
        f"{name.replace(WRAPPER, '')} is {parameter.dtype}"
        for name, parameter in model.named_parameters()
        if not parameter.is_floating_point() or parameter.element_size() < 2
    ]
    if packed or (method is not None and how != "gguf"):  # a GGUF file may have been unpacked while it was read
        what = packed[0] if packed else f"by {how}"
        raise UnsupportedModelError(
            f"this model is quantised ({what}): packed numbers mean nothing without their scales. The checkpoint it "
            "was loaded from holds it; load it in 16 bits to have its parameters"
        )


def check_readable(model: PreTrainedModel, *, assign: bool = False) -> None:
    """Refuse a model whose parameters are not there as numbers.

    Args:
        model: of transformers.
        assign: whether new tensors are to take the place of those that hold no numbers yet.

    Raises:
        UnsupportedModelError: it is offloaded, quantised, or on the meta device.
    """
    check_numbers(model)
    offloaded = bool(getattr(model, "hf_device_map", None))
    for name, parameter in model.named_parameters():
        if parameter.is_meta and (offloaded or not assign):
            where = "offloaded: save_pretrained writes it" if offloaded else "on the meta device: load it with numbers"
            raise UnsupportedModelError(
                f"{name.replace(WRAPPER, '')} is not in memory, and a state_dict would not hold it: it is {where}"
            )


_ENDS = frozenset(("embed", "ln_final", "unembed"))
"""What is used by itself, without a pass that would look for what was exchanged."""


class WholeState(TransformerBridge):
    """A TransformerBridge whose `state_dict` holds the whole model: routers and experts, too."""

    def _check_places(self) -> None:
        """Follow what was exchanged since the model was wrapped; see `places`.

        Raises:
            UnsupportedModelError: an adapter of PEFT was put on it, or something that cannot be followed.
        """
        if "peft_config" in vars(self.original_model):
            refuse_adapters(self.original_model)
        check_places(self.__dict__["_places"])

    def __getattr__(self, name: str) -> Any:
        """TransformerLens's; embedding, final norm and head are those of their places, between passes, too."""
        owner = vars(self).get("owner")
        if name in _ENDS and owner is not None and owner.running is None:
            self._check_places()
        return super().__getattr__(name)

    def _own(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer under its own name; a tied one under the name that it is stored as."""
        self._check_places()
        model: Any = self.original_model
        state = original_state(model, self.__dict__["_original_names"], keep_vars=True)
        by_identity: dict[int, str] = {}
        for name in sorted(state, key=lambda name: name in model.all_tied_weights_keys):
            by_identity.setdefault(id(state[name]), name)
        return {name: value for name, value in state.items() if by_identity[id(value)] == name}

    def named_parameters(
        self,
        prefix: str = "",
        recurse: bool = True,
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter under its name in `state_dict`.

        Raises:
            UnsupportedModelError: duplicates are asked for, as by `torch.func.functional_call`: a parameter has many
                places in the bridge and one name, and torch would put the wrong numbers back.
        """
        if not remove_duplicate:
            raise no_functional_call()
        names = {id(value): name for name, value in self._own().items()}
        for parameter in self.parameters(recurse):
            yield f"{prefix}.{names[id(parameter)]}" if prefix else names[id(parameter)], parameter

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module]]:
        """As torch's, but those that hold parameters follow one another as in the transformers model.

        So a module around this one, as `torch.optim.swa_utils.AveragedModel`, has the parameters in this one's order.

        Args:
            memo: of torch's `named_modules`.
            prefix: put before every name.
            remove_duplicate: of torch's `named_modules`.
        """
        found = list(super().named_modules(memo, prefix, remove_duplicate))
        order = {id(parameter): at for at, parameter in enumerate(self.parameters())}
        held = [[order[id(p)] for p in module._parameters.values() if id(p) in order] for _, module in found]
        ordered = (found[at] for at in sorted(range(len(found)), key=lambda at: min(held[at], default=-1)) if held[at])
        yield from (next(ordered) if own else pair for own, pair in zip(held, found, strict=True))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As torch's, to a device, a dtype, or both; packed and offloaded weights change the dtype they compute in.

        TransformerLens's own sets `cfg.dtype` and reads the whole `state_dict` before torch has agreed to the dtype.

        Args:
            args: of torch's `to`.
            kwargs: of torch's `to`; `print_details`, of TransformerLens's.

        Raises:
            UnsupportedModelError: a device is named, and weights are offloaded.
            InputError: what is named is no device, or none that is here.
        """
        model: Any = self.original_model
        places = [value for value in args if not isinstance(value, torch.dtype)]
        moves = bool(places) or kwargs.keys() & {"device", "tensor"}
        for place in (*places, kwargs.get("device")):
            if not isinstance(place, bool | Tensor | None):
                usable_device(place, meta=True)
        if moves and getattr(model, "hf_device_map", None) and any(p.is_meta for p in model.parameters()):
            raise UnsupportedModelError("weights are offloaded, and cannot be moved: load the model with device=…")
        for dtype in (*args, kwargs.pop("dtype", None)):
            if isinstance(dtype, torch.dtype):
                nn.Module.to(self, dtype)
        if moves:
            super().to(*places, **kwargs)
        return self

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Every parameter and persistent buffer, once, under the name that it has in the transformers model.

        Tied parameters are held once, as in a checkpoint. `save_pretrained` writes a model with its config; this is for
        optimisers, averages of weights, and `torch.save(model.state_dict(), …)`.

        Args:
            destination: a dict to fill.
            prefix: put before every name.
            keep_vars: the parameters themselves instead of detached tensors.

        Raises:
            UnsupportedModelError: the model is offloaded or quantised.
        """
        check_readable(self.original_model)  # pyright: ignore[reportArgumentType]
        destination = OrderedDict() if destination is None else destination
        for name, value in self._own().items():
            destination[prefix + name] = value if keep_vars else value.detach()
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; all is checked before anything is changed.

        Names may also be TransformerLens's (`blocks.0.attn.q.weight`), or have `_original_component` in them.

        Args:
            state_dict: tensors by name.
            strict: refuse names that are missing or unknown; otherwise they are returned, as torch does.
            assign: take the tensors themselves instead of copying them into the model's.

        Raises:
            StateError: tensors are missing, unknown, misshapen, or given twice with different numbers.
            UnsupportedModelError: the model is offloaded or quantised.
        """
        missing, unexpected, problems = self._load(state_dict, assign, strict)
        if strict:
            problems = [*(f"{name} is unexpected" for name in unexpected), *problems]
            problems = [*(f"{name} is missing" for name in missing), *problems]
        if problems:
            raise _refusal(problems)
        return _IncompatibleKeys(missing, unexpected)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as part of a module that holds this model."""
        given = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        missing, unexpected, problems = self._load(given, local_metadata.get("assign_to_params_buffers", False), strict)
        missing_keys += [prefix + name for name in missing]
        unexpected_keys += [prefix + name for name in unexpected] if strict else []
        error_msgs += [prefix + problem for problem in problems]
        # torch goes on to the modules inside, whose names are others: they find what they hold already.
        state_dict |= self._tree(prefix)

    def _tree(self, prefix: str = "") -> dict[str, Tensor]:
        """What the modules of the bridge hold, by their places in it."""
        return nn.Module.state_dict(self, destination=OrderedDict(), prefix=prefix, keep_vars=True)

    def _load(
        self, state_dict: Mapping[str, Any], assign: bool, strict: bool
    ) -> tuple[list[str], list[str], list[str]]:
        """Load if nothing stands against it; the names that are missing and unknown, and what is wrong with others."""
        if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
            raise _refusal([f"it is {a_kind(state_dict)}; expected a dictionary of tensors by name"])
        own, given, problems = self._own(), dict[str, Tensor](), list[str]()
        names = {id(value): name for name, value in own.items()}
        known: dict[str, Tensor] = {**_by_clean_names(self._tree()), **_by_clean_names(self._raw())}
        unexpected = [name for name in state_dict if name.replace(WRAPPER, "") not in known]
        for key, value in state_dict.items():
            if key in unexpected:
                continue
            name = names[id(known[key.replace(WRAPPER, "")])]
            if not isinstance(value, Tensor):
                problems.append(f"{key} is {a_kind(value)}, expected a tensor")
            elif value.shape != own[name].shape:
                problems.append(f"{key} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}")
            elif own[name].is_floating_point() and not value.is_floating_point():
                problems.append(f"{key} is {value.dtype}, expected floating-point numbers")
            elif value.is_meta:
                problems.append(f"{key} is on the meta device and holds no numbers")
            elif name in given and not (given[name] is value or torch.equal(given[name], value)):
                problems.append(f"{key} differs from another tensor that was given for {name}")
            else:
                given[name] = value
        missing = [name for name in own if name not in given]
        if problems or (strict and (missing or unexpected)):
            return missing, unexpected, problems
        check_readable(self.original_model, assign=assign)  # pyright: ignore[reportArgumentType]
        if assign:
            self._assign({id(own[name]): value for name, value in given.items()})
            return missing, unexpected, problems
        with torch.no_grad():
            for name, value in given.items():
                own[name].copy_(value)
        return missing, unexpected, problems

    def _raw(self) -> dict[str, Tensor]:
        return self.original_model.state_dict(keep_vars=True)

    def _assign(self, values: Mapping[int, Tensor]) -> None:
        """Put tensors in the place of others, given by identity, wherever those are: tied parameters stay tied."""
        made: dict[int, Tensor] = {}
        for module in {*self.modules(), *self.original_model.modules()}:
            for held in (module._parameters, module._buffers):
                for name, old in held.items():
                    if old is None or id(old) not in values:
                        continue
                    value = values[id(old)]
                    if id(old) not in made and isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter):
                        value = nn.Parameter(value, old.requires_grad)
                    held[name] = made.setdefault(id(old), value)  # pyright: ignore[reportArgumentType]


def _by_clean_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(WRAPPER, ""): value for name, value in state.items()}


def _refusal(problems: list[str], limit: int = 8) -> StateError:
    lines = problems[:limit] + ([f"and {len(problems) - limit} more"] if len(problems) > limit else [])
    return StateError(
        "this state_dict is not this model's, and nothing was loaded:" + "".join(f"\n  {line}" for line in lines)
    )
