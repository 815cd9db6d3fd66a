"""The places of what was wrapped: whether its owner has put something else there since.

A wrapper knows what it wraps by identity. A norm, a linear layer, an embedding or a head that is exchanged afterwards
gets the wrapper of its place, so that its hooks and `W_*` are those of what is computed; anything else is refused.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from torch import nn

from moe_lens.errors import UnsupportedModelError
from moe_lens.model.tl_compat import (
    EmbeddingBridge,
    GeneralizedComponent,
    LinearBridge,
    NormalizationBridge,
    UnembeddingBridge,
)

_CALLED = (LinearBridge, EmbeddingBridge, UnembeddingBridge)
"""Wrappers that do nothing but call what they wrap, of whatever class."""


class Place(NamedTuple):
    """Where a module of a wrapped model is found."""

    owner: nn.Module
    name: str
    module: nn.Module
    path: str
    """Its name in the transformers model."""
    n_beside: int
    """How many modules its owner has."""


def places_of(model: nn.Module, parts: Collection[nn.Module]) -> tuple[Place, ...]:
    """The places of a model's wrappers, of some other parts, and of all modules around these.

    Args:
        model: of transformers, wrapped.
        parts: modules without a wrapper that are known by identity, such as experts.
    """
    held, found = {id(part) for part in parts}, list[Place]()

    def visit(module: nn.Module, path: str) -> bool:
        """Whether there is something in a module, or the module itself, whose place matters."""
        inner = _wrapped(module) or module
        matters = inner is not module or id(inner) in held
        for name, child in inner._modules.items():
            if child is not None and visit(child, where := f"{path}.{name}" if path else name):
                found.append(Place(inner, name, child, where, len(inner._modules)))
                matters = True
        return matters

    visit(model, "")
    return tuple(found)


def check_places(places: Collection[Place]) -> None:
    """Put each wrapper around what is at its place now, if that can be followed.

    Raises:
        UnsupportedModelError: it cannot, and hooks and parameters would be those of the old module; names the place.
            Or there are more modules in a list than were wrapped, or torch has packed a linear layer.
    """
    for place in places:
        if isinstance(place.module, _CALLED) and type(_wrapped(place.module)).__module__.startswith("torch.ao."):
            raise UnsupportedModelError(
                f"{place.path} was packed by torch's quantisation (torch.ao), which leaves experts as they are and "
                "keeps no matrix that W_U and hooks could read: from_pretrained(…, quantize='int8') packs experts too"
            )
        if len(place.owner._modules) > place.n_beside and isinstance(place.owner, nn.ModuleList):
            raise UnsupportedModelError(
                f"{place.path.rpartition('.')[0]} has {len(place.owner._modules)} modules, and had {place.n_beside} "
                "when the model was wrapped: hooks and parameters would be those of the old ones alone. Take the "
                "others out (del model.blocks[-1]), or put them into the transformers model, and its config, before "
                "it is wrapped"
            )
    moved = [place for place in places if place.owner._modules.get(place.name) is not place.module]
    if not moved:
        return
    new = [_there(place) for place in moved]
    elsewhere = {id(_wrapped(place.module)) for place in places if place not in moved}
    for place, now in zip(moved, new, strict=True):
        if id(now) in elsewhere:
            raise UnsupportedModelError(
                f"{place.path}: the {type(now).__name__} there is used in another place too, and hooks could not tell "
                "the two apart: give each its own (copy.deepcopy)"
            )
        elsewhere.add(id(now))
    for place, now in zip(moved, new, strict=True):
        wrapper: Any = place.module
        GeneralizedComponent.set_original_component(wrapper, now)
        place.owner._modules[place.name] = place.module


def _there(place: Place) -> nn.Module:
    """What its owner has put at a place, without a wrapper that it may have from elsewhere."""
    now = place.owner._modules.get(place.name)
    now, old = _wrapped(now) or now, _wrapped(place.module) or place.module
    if now is None or not _is_followed(place.module, old, now):
        put = "nothing is" if now is None else f"another {type(now).__name__} was put"
        raise UnsupportedModelError(
            f"{place.path}: {put} in the place of the {type(old).__name__} that was wrapped, whose hooks and "
            "parameters would still be the old ones: put that back and change its parameters in place, or change the "
            "transformers model before it is wrapped"
        )
    return now


def _is_followed(wrapper: nn.Module, old: nn.Module, now: nn.Module) -> bool:
    """Whether a wrapper does around the new module all that it did around the old one."""
    if wrapper is old or getattr(wrapper, "hooks", None) is not None or len(_wrappers(wrapper)) > 1:
        return False
    if any(each is wrapper for each in now.modules()):  # it calls the wrapper, which would call it
        return False
    identity = isinstance(wrapper, NormalizationBridge) and isinstance(now, nn.Identity)
    return type(now) is type(old) or isinstance(wrapper, _CALLED) or identity


def _wrappers(module: nn.Module) -> list[nn.Module]:
    return [each for each in module.modules() if isinstance(each, GeneralizedComponent)]


def _wrapped(module: nn.Module | None) -> nn.Module | None:
    return module.original_component if isinstance(module, GeneralizedComponent) else None
