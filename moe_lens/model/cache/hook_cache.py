"""How activations are held: by hook name, moved, sliced, and kept on disk."""

import copy
import operator
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.utilities import Slice, get_act_name

from moe_lens import names
from moe_lens.checked import Positive
from moe_lens.errors import HookError, InputError
from moe_lens.model.cache.absent_model import AbsentModel
from moe_lens.model.cache.identity import difference, identity
from moe_lens.model.devices import check_kept
from moe_lens.model.unknown_hooks import instead_of
from moe_lens.protocols import Hooked, HookedModel
from moe_lens.reprs import Summary
from moe_lens.storage import believed, load_tensors, save_tensors

_GRAD = "_grad"
Cut = Slice | int | np.integer[Any] | tuple[int, ...] | list[int] | Tensor | NDArray[Any] | None
"""TransformerLens's `SliceInput`, or a `Slice`: `3`, `(2, 5)` for 2:5, `[1, 4]`, or None for everything."""

# Not typing.Self, which the run-time checker of annotations in tests cannot place.
_Cache = TypeVar("_Cache", bound="HookCache")


def as_slice(where: Cut) -> Slice:
    """TransformerLens's `Slice` of whatever stands for one."""
    return where if isinstance(where, Slice) else Slice(cast(Any, where))


def check_from_end(where: Cut, mask: Tensor | None) -> None:
    """Nothing, where a position that is counted from the end is one of every text's tokens.

    Args:
        where: What stands for a `Slice`.
        mask: True at real tokens, [batch, pos] or [pos]; None where there is no padding.

    Raises:
        InputError: In some text there is padding at that position.
    """
    where = as_slice(where)
    if mask is None or not isinstance(where.slice, int) or where.slice >= 0:
        return
    there = where.apply(mask, dim=-1)
    if not bool(there.all()):
        raise InputError(
            f"at position {where.slice}, text {int((~there.reshape(-1)).nonzero()[0])} has padding: positions count "
            "all columns. Pad on the left (padding_side='left'), and the last one is every text's last token"
        )


class HookCache(Summary, ActivationCache):
    """Activations of one run by hook name: what `MoECache` has in common with any other cache."""

    model: Any

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Hooked,
        has_batch_dim: bool = True,
        tokens: Int[Tensor, "*batch pos"] | None = None,
        mask: Bool[Tensor, "*batch pos"] | None = None,
        following: Int[Tensor, "*batch pos"] | None = None,
    ):
        super().__init__(cache_dict, model, has_batch_dim)
        self.tokens = tokens
        self.mask = mask
        self.following = following

    def __getitem__(self, key: Any) -> Tensor:
        """An activation by full name, by either name of a hook that has two, or by shorthand: `cache["expert_out", 3]`.

        Raises:
            HookError: it is not there; the message names the layers that have it, or the `names_filter` that caches it.
        """
        name = self._full_name(key)
        if name not in self.cache_dict:
            raise HookError(self._why_missing([name]))
        return self.cache_dict[name]

    def __contains__(self, key: Any) -> bool:
        try:
            return self._full_name(key) in self.cache_dict
        except HookError:
            return False  # no layer of this model, or no name at all

    def __repr__(self) -> str:
        batch = "" if self.has_batch_dim else ", no batch axis"
        held = [*self.cache_dict][:3] + ["…"] * (len(self) > 3)
        return f"{type(self).__name__}({len(self)} activations, {self._size()}{batch}: {', '.join(held)})"

    def _size(self) -> str:
        return f"{sum(value.nbytes for value in self.cache_dict.values()) / 2**20:.1f} MiB"

    def _facts(self) -> dict[str, Any]:
        return {"activations": len(self), "size": self._size(), **self.cache_dict}

    def _full_name(self, key: Any) -> str:
        if isinstance(key, str):
            name = key if key in self.cache_dict else get_act_name(key)
        else:
            if not isinstance(key, tuple) or not key or not isinstance(key[0], str):
                raise HookError(
                    f'a cache has no {key!r}; expected a hook\'s name, or its short one and a layer: ("q", 3)'
                )
            short, *rest = key
            if rest and isinstance(rest[0], int):
                rest[0] = self._layer(rest[0])
            name = get_act_name(short, *rest)
        if name in self.cache_dict:
            return name
        suffix, bare = _GRAD if name.endswith(_GRAD) else "", name.removesuffix(_GRAD)
        point = (getattr(self.model, "hook_dict", None) or {}).get(bare)  # which a hook knows by its first name
        others = [other + suffix for other in (names.alias(bare), getattr(point, "name", None)) if other]
        return next((other for other in others if other in self.cache_dict), name)

    def _why_missing(self, missing: list[str]) -> str:
        for name in missing:
            bare = name.removesuffix(_GRAD)
            found = names.parse_mlp(bare) or names.parse_expert(bare)
            if found and found[0] not in self.model.moe_layers:
                return self._dense(found[0], name)
        forward = sorted({name.removesuffix(_GRAD) for name in missing})
        known = getattr(self.model, "hook_dict", None)
        for name in [] if known is None else forward:
            assert known is not None
            if name not in known and names.parse_expert(name) is None:
                instead = instead_of(name, known, self.model.moe_layers, getattr(self.model.family, "note", ""))
                return f"the cache does not hold {name!r}, and the model has no such hook; {instead}"
        with_grad = ", incl_bwd=True" if any(name.endswith(_GRAD) for name in missing) else ""
        return (
            f"the cache does not hold {', '.join(missing)}; "
            f"run_with_cache(…, names_filter={forward}{with_grad}) caches it"
        )

    def _dense(self, layer: int, what: str) -> str:
        return f"layer {layer} is dense and has no {what}; the layers with experts are {list(self.model.moe_layers)}"

    def _end(self, layer: Any) -> int:
        """Before which layer parts are taken; None and -1, as in TransformerLens, mean behind the last one."""
        n_layers = self.model.cfg.n_layers
        return n_layers if layer is None or layer in (-1, n_layers) else self._layer(layer)

    def _layer(self, layer: int) -> int:
        n_layers = self.model.cfg.n_layers
        try:
            layer = n_layers if isinstance(layer, bool) else operator.index(layer)
        except TypeError:
            raise HookError(f"there is no layer {layer!r}; expected a whole number") from None
        if not -n_layers <= layer < n_layers:
            raise HookError(f"there is no layer {layer}; the model has layers 0 to {n_layers - 1}")
        return layer % n_layers

    def _moe_layer(self, layer: int, what: str) -> int:
        layer = self._layer(layer)
        if layer not in self.model.moe_layers:
            raise HookError(self._dense(layer, what))
        return layer

    def _where(self, pos_slice: Cut) -> Slice:
        """Positions to take; a single one that is counted from the end must be a token of every text."""
        check_from_end(pos_slice, self.mask)
        return as_slice(pos_slice)

    def _require(self, *wanted: str) -> None:
        missing = [name for name in wanted if name not in self]
        if missing:
            raise HookError(self._why_missing(missing))

    # Its shape, place and precision

    def _batch_size(self) -> int:
        if self.tokens is not None:
            return len(self.tokens)
        aligned = {name: value for name, value in self.cache_dict.items() if not _ragged(name)}
        return ActivationCache(aligned, self.model)._batch_size()

    def remove_batch_dim(self: _Cache, batch_size: Positive | None = None) -> _Cache:
        """Drop the batch axis of a batch of one; tensors of single experts have no batch axis and stay as they are.

        Raises:
            InputError: the batch has more than one item.
        """
        if not self.has_batch_dim:
            return self
        size = self._batch_size() if batch_size is None else batch_size
        if size != 1:
            raise InputError(f"the cache holds a batch of {size}; only a batch of one can lose its batch axis")
        self.cache_dict = {  # another one: copies of the cache may share the dictionary, and keep their axis
            name: value[0] if not _ragged(name) and value.ndim > 0 and len(value) == 1 else value
            for name, value in self.cache_dict.items()
        }
        self.tokens = None if self.tokens is None else self.tokens[0]
        self.mask = None if self.mask is None else self.mask[0]
        self.following = None if self.following is None else self.following[0]
        self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self: _Cache, batch_slice: Cut) -> _Cache:
        """A cache of some items of the batch: views. Tensors of single experts, without a batch axis, are left out.

        Raises:
            InputError: there is no batch axis.
        """
        if not self.has_batch_dim:
            raise InputError("the cache has no batch axis to slice: it was removed")
        items = as_slice(batch_slice)
        size = self._batch_size()
        sliced = copy.copy(self)
        sliced.cache_dict = {
            # Where the first axis is not the batch, TransformerLens keeps one tensor for all items.
            name: items.apply(value) if value.ndim > 0 and len(value) == size else value
            for name, value in self.cache_dict.items()
            if not _ragged(name)
        }
        sliced.tokens = None if self.tokens is None else items.apply(self.tokens)
        sliced.mask = None if self.mask is None else items.apply(self.mask)
        sliced.following = None if self.following is None else items.apply(self.following)
        sliced.has_batch_dim = items.mode != "int"
        return sliced

    def to(self: _Cache, device: torch.device | str, dtype: torch.dtype | None = None) -> _Cache:
        """Move everything to a device, and floating-point tensors to a dtype. Changes the cache and returns it.

        Raises:
            InputError: A device that cannot hold values, or a dtype that is not floating point.
        """
        check_kept(device, dtype)

        def moved(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        self.cache_dict = {name: moved(value) for name, value in self.cache_dict.items()}
        self.tokens = None if self.tokens is None else moved(self.tokens)
        self.mask = None if self.mask is None else moved(self.mask)
        self.following = None if self.following is None else moved(self.following)
        return self

    # By value

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the model, of which the sizes are kept."""
        return {**self.__dict__, "model": AbsentModel(identity(self.model))}

    def __copy__(self: _Cache) -> _Cache:
        """Another cache of the same tensors and the same model."""
        found = object.__new__(type(self))
        found.__dict__.update(self.__dict__)
        return found

    def __deepcopy__(self: _Cache, memo: dict[int, Any]) -> _Cache:
        """A cache of copied tensors, of the same model."""
        found = copy.copy(self)
        others = {name: value for name, value in self.__dict__.items() if name != "model"}
        found.__dict__.update(copy.deepcopy(others, memo))
        return found

    def bind(self: _Cache, model: Hooked) -> _Cache:
        """The same cache with a model, which a cache needs after unpickling; tensors are shared.

        Raises:
            InputError: the model's sizes or routers are not those of the model that made the cache.
        """
        _same_model("the cache", identity(self.model), model)
        found = copy.copy(self)
        found.model = model
        return found

    # On disk

    def to_disk(self, path: str | Path) -> None:
        """Write everything to one safetensors file, bit for bit; a tensor that has two names is written once."""
        tensors: dict[str, Tensor] = {}
        owners: dict[tuple[Any, ...], str] = {}
        same: dict[str, str] = {}
        storages: set[int] = set()
        for name, value in self.cache_dict.items():
            same[name] = owners.setdefault((value.data_ptr(), value.shape, value.stride(), value.dtype), name)
            if same[name] == name:
                storage = value.untyped_storage().data_ptr()
                tensors[name] = value.clone() if storage in storages else value  # safetensors refuses shared memory
                storages.add(storage)
        extra = {"tokens": self.tokens, "mask": self.mask, "following": self.following}
        tensors |= {name: value for name, value in extra.items() if value is not None}
        header = {"names": same, "has_batch_dim": self.has_batch_dim, "model": identity(self.model)}
        save_tensors(path, type(self).__name__, tensors, header)

    @classmethod
    def from_disk(cls: type[_Cache], path: str | Path, model: Hooked) -> _Cache:
        """Read what `to_disk` wrote, onto the CPU.

        Raises:
            InputError: the file is missing, broken or holds something else, or another model made it.
        """
        tensors, header = load_tensors(path, cls.__name__)
        with believed(path, cls.__name__):
            made_by, stored, batched = dict(header["model"]), dict(header["names"]), bool(header["has_batch_dim"])
        _same_model(str(path), made_by, model)
        lost = set(stored.values()) - tensors.keys()
        if lost:
            raise InputError(f"{path} is not whole: it lacks {', '.join(sorted(lost))}")
        return cls(
            {name: tensors[kept] for name, kept in stored.items()},
            model,
            batched,
            tokens=tensors.get("tokens"),
            mask=tensors.get("mask"),
            following=tensors.get("following"),
        )


def following_tokens(
    tokens: Int[Tensor, "batch pos"] | None, mask: Bool[Tensor, "batch pos"] | None
) -> Int[Tensor, "batch pos"] | None:
    """The token after each token; −1 at the last token, at padding, and just before padding."""
    if tokens is None:
        return None
    following = torch.full_like(tokens, -1)
    following[:, :-1] = tokens[:, 1:]
    if mask is None:
        return following
    real = mask.clone()
    real[:, :-1] &= mask[:, 1:]
    return following.masked_fill(~real.to(following.device), -1)


def _ragged(name: str) -> bool:
    """Whether a tensor has one row per token that an expert got, and so neither batch nor position axis."""
    return names.parse_expert(name.removesuffix(_GRAD)) is not None


def _same_model(what: str, made_by: dict[str, Any], model: HookedModel) -> None:
    if (said := difference(made_by, identity(model))) is not None:
        raise InputError(f"{what} was made by {said}")
