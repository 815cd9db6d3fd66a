"""The hook points of a model by name, those of its experts among them, and the sizes of what they hook."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from moe_lens import names
from moe_lens.checked import Natural
from moe_lens.errors import HookError, InputError, UnsupportedModelError
from moe_lens.model.experts.expert_weights_view import Experts, top_k_of
from moe_lens.model.experts.offloaded_experts import device_of
from moe_lens.model.families.table import Family
from moe_lens.model.hooks.cache_names import Driver
from moe_lens.model.hooks.checked_point import CheckedPoint, check_points
from moe_lens.model.hooks.hook_pairs import check_function
from moe_lens.model.hooks.hook_scope import remove_lost, run_all_blocks
from moe_lens.model.hooks.layer_hooks import LayerHooks
from moe_lens.model.hooks.moe_block import MoEBlock
from moe_lens.model.hooks.ownership import Owner
from moe_lens.model.hooks.refused_methods import RefusedMethods, refuse_methods
from moe_lens.model.hooks.scanning import scan
from moe_lens.model.hooks.torch_hooks import hook_inside
from moe_lens.model.hooks.transformers_names import show_by_their_names
from moe_lens.model.loading.places import places_of
from moe_lens.model.loading.validate import (
    asked_kernel,
    check_kernel,
    check_layers,
    check_tokenizer,
)
from moe_lens.model.tl_compat import detect_tokenizer_bos_eos
from moe_lens.model.torch_transforms import hold_in_one_place
from moe_lens.model.unknown_hooks import instead_of


class HookTable(RefusedMethods):
    """A TransformerBridge that knows the hooks of experts."""

    family: Family
    owner: Owner
    """Which thread the model belongs to at the moment."""

    def __init__(self, model: Any = None, adapter: Any = None, tokenizer: Any = None, family: Family | None = None):
        if family is None:
            raise InputError(
                "HookedMoE is not made by calling it: write HookedMoE.from_pretrained(name_or_path), or "
                "HookedMoE.from_hf(model, tokenizer) for a model of transformers"
            )
        if not any(name.endswith(".experts") for name, _ in model.named_modules()):
            raise UnsupportedModelError(
                f"this {family.model_type} has no layer with experts; "
                "dense models belong in TransformerLens's TransformerBridge"
            )
        self.__dict__.update(family=family, _original_names=tuple(model.state_dict()), _places=(), owner=Owner())
        super().__init__(model, adapter, tokenizer, driver=Driver(model, adapter, tokenizer))
        self.owner.bind(self)
        hold_in_one_place(self, model)
        refuse_methods(model)
        check_points(self, self.owner)
        check_layers(self.blocks, self.cfg.n_layers)
        for layer, block in enumerate(self.blocks):
            # Not modules of the norm: a reference, so that each hook point has one owner and one name.
            parts: Any = block._modules
            reader = parts.get("ln2") or parts.get("mlp")
            if "hook_resid_mid" in parts and reader is not None:
                reader.__dict__["residual_point"] = parts["hook_resid_mid"]
            hooks = getattr(parts.get("mlp"), "hooks", None)
            if isinstance(hooks, LayerHooks):
                hooks.layer, hooks.owner = layer, self.owner
                for name in names.ALIASED:
                    if name in hooks.points:
                        object.__setattr__(block, name, hooks.points[name])
                        self._hook_registry[names.block(name, layer)] = hooks.points[name]
        show_by_their_names(model, adapter.component_mapping["blocks"].name)
        hook_inside(self)
        opened = [mlp.opened() for block in self.blocks if isinstance(mlp := block._modules.get("mlp"), MoEBlock)]
        self.__dict__["_places"] = places_of(model, [part for parts in opened for part in parts])
        dead = (*names.DEAD, *family.dead)
        for name in [name for name in self._hook_registry if name.endswith(dead)]:
            del self._hook_registry[name]
        self.__dict__["_all_hooks"] = {n: p for n, p in super().hook_dict.items() if not n.endswith(dead)}

    def _scan_existing_hooks(self, module: Any, prefix: str = "") -> None:  # noqa: ARG002
        """TransformerLens's, which calls it on the model alone."""
        scan(module, self._hook_registry)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was passed, as it is (TransformerLens loads it again, and sets its pad, BOS and EOS)."""
        return self.__dict__["_tokenizer"]

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        if value is not None:
            check_tokenizer(value)
            self.cfg.tokenizer_prepends_bos, self.cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(value)
        self.__dict__["_tokenizer"] = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or a model read from a pickle, belongs to nobody."""
        super().__setstate__(state)
        self.owner.bind(self)

    @property
    def cfg(self) -> Any:
        """TransformerLens's config. Its `dtype` and `device` are those of the weights, whoever has moved them."""
        cfg, model = self.__dict__["_cfg"], self.__dict__.get("original_model")
        if model is not None:
            weight = model.get_input_embeddings().weight  # that of any model, found without a walk through all of them
            cfg.dtype, place = weight.dtype if weight.is_floating_point() else model.dtype, weight.device
            alone = place.type != "meta" and getattr(cfg, "n_devices", 1) == 1 and not hasattr(model, "hf_device_map")
            if alone and cfg.device is not None and torch.device(cfg.device).type != place.type:
                cfg.device = str(place)
            elif cfg.device == "meta":  # on disk: where it comes to
                cfg.device = str(device_of(model.get_input_embeddings()))
        return cfg

    @cfg.setter
    def cfg(self, value: Any) -> None:
        self.__dict__["_cfg"] = value

    def _layer_hooks(self) -> Iterator[tuple[int, LayerHooks]]:
        for layer, block in enumerate(self.blocks):
            mlp = block._modules.get("mlp")
            if isinstance(mlp, MoEBlock) and mlp.hooks is not None:
                yield layer, mlp.hooks

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that have experts."""
        return tuple(layer for layer, _ in self._layer_hooks())

    def _moe(self, layer: int) -> Any:
        """The module of transformers that holds a layer's router and experts."""
        blocks: Any = self.blocks
        return blocks[layer].mlp.moe

    def to_model_width(self, layer: Natural, routed: Tensor) -> Tensor:
        """The experts' sum as wide as the residual stream, in families whose experts compute in a narrower space.

        Args:
            layer: A MoE layer.
            routed: What `hook_routed_out` holds: [batch, pos, d], d being d_model in most families.
        """
        widens = self.family.widens
        return routed if widens is None else self._moe(layer).get_submodule(widens)(routed)

    def _experts(self, layer: int) -> Experts:
        """The experts of a layer, whatever modules hold them."""
        blocks: Any = self.blocks
        return blocks[layer].mlp.contract

    @property
    def _hf_config(self) -> Any:
        return self.original_model.config

    @property
    def n_experts(self) -> int:
        """Routed experts of a MoE layer, `n_identity_experts` among them."""
        return self._experts(self.moe_layers[0]).n_experts

    @property
    def n_identity_experts(self) -> int:
        """Number of routed experts that return their input: the last ids. They have no neurons and no parameters."""
        return self._experts(self.moe_layers[0]).n_identities

    def has_shared(self, layer: Natural) -> bool:
        """Whether a MoE layer has shared experts, or a constant in their place (JetMoE's bias).

        Args:
            layer: A MoE layer.
        """
        return any(at == layer and names.SHARED_OUT in hooks.points for at, hooks in self._layer_hooks())

    @property
    def top_k(self) -> int:
        """Routed experts active for a token."""
        moe = self._moe(self.moe_layers[0])
        router, config = getattr(moe, self.family.router), self._hf_config.get_text_config()
        return top_k_of(moe, router, config, self.family.top_k)

    @property
    def n_shared_experts(self) -> int:
        """Shared experts of a MoE layer; they are fused into one MLP."""
        if not self.has_shared(self.moe_layers[0]) or self.family.shared is None:
            return 0
        return int(getattr(self._hf_config.get_text_config(), "n_shared_experts", None) or 1)

    def _check_model(self) -> None:
        """Warn where transformers has been asked for another kernel since this was last called; see `validate`.

        Raises:
            UnsupportedModelError: an adapter of PEFT, or something else in the place of a module, was put on it
                meanwhile, or a token is to have more experts than there are, or transformers is to return tuples.
        """
        if not (self._hf_config.return_dict and self._hf_config.get_text_config().return_dict):
            raise UnsupportedModelError(
                "return_dict is False in the config, under which transformers' own layers cannot read one another's "
                "outputs: set it to True; forward returns tensors in any case"
            )
        if not 0 < self.top_k <= self.n_experts:
            raise UnsupportedModelError(
                f"each token is to have {self.top_k} experts, and a layer has {self.n_experts}: expected 1 to "
                f"{self.n_experts} in the config"
            )
        self._check_places()
        experts = self._experts(next(layer for layer, _ in self._layer_hooks())).module
        asked = asked_kernel(experts)
        if asked != self.__dict__.get("_asked_kernel"):
            self.__dict__["_asked_kernel"] = asked
            check_kernel(experts)

    # --- hook points by name ---

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by each of its names; those of single experts are included once they were used."""
        return dict(self._all_hooks) if "_all_hooks" in self.__dict__ else super().hook_dict

    def expert_hooks(self, layer: Natural, expert: Natural) -> dict[str, HookPoint]:
        """Create and return the hook points of one expert; their tensors have a row for each token routed to it.

        Args:
            layer: A MoE layer.
            expert: The id of a routed expert.

        Raises:
            HookError: a dense layer, or no such expert.
        """
        hooks = self._hooks_of(layer)
        if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < self.n_experts:
            raise HookError(f"expert {expert} does not exist; expected 0 to {self.n_experts - 1}")
        made = {}
        for hook in names.EXPERT_HOOKS:
            if hook.name == "hook_pre_linear" and names.EXPERT_PRE_LINEAR not in hooks.points:
                continue
            if hook.name != "hook_out" and expert >= self.n_experts - self.n_identity_experts:
                continue  # an identity has no neurons
            name = names.expert(hook.name, layer, expert)
            point = hooks.experts.setdefault((expert, hook.name), CheckedPoint())
            point.name, point.__dict__["owner"] = name, self.owner
            self._all_hooks[name] = self._hook_registry[name] = made[name] = point
        return made

    def _find(self, name: str) -> HookPoint:
        """The hook point of a name, made on demand for one expert; a helpful error for anything else."""
        if name in self._all_hooks:
            return self._all_hooks[name]
        if (one := names.parse_expert(name)) is not None:
            made = self.expert_hooks(one[0], one[1])
            if name in made:
                return made[name]
            identity = one[1] >= self.n_experts - self.n_identity_experts
            why = "an identity expert has no neurons" if identity else "experts of this family have a single branch"
            raise HookError(f"hook {name!r} does not exist: {why}. There is {', '.join(made)}")
        if (found := names.parse_mlp(name)) is not None and found[0] not in self.moe_layers:
            raise HookError(f"{name}: layer {found[0]} has no experts; MoE layers are {list(self.moe_layers)}")
        instead = instead_of(name, self._all_hooks, self.moe_layers, self.family.note)
        raise HookError(f"hook {name!r} does not exist on this model; {instead}")

    def _resolve_hook_point(
        self,
        name: str,
        aliases: dict[str, str],  # noqa: ARG002
        hook_dict: dict[str, HookPoint],  # noqa: ARG002
    ) -> tuple[str, HookPoint]:
        point = self._find(name)
        return point.name or name, point

    def get_hook_point(self, hook_name: str) -> HookPoint | None:
        """The hook point of a name, or None.

        Args:
            hook_name: Either of the names of a hook that has two.
        """
        try:
            return self._find(hook_name)
        except HookError:
            return None

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook_fn: Any,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
    ) -> None:
        """Add a hook to a point, or to all whose name satisfies a predicate.

        Args:
            name: Of a hook point, or a predicate on names.
            hook_fn: Called with `(activation, hook)`; what it returns, if not None, replaces the activation.
            dir: Forward or backward, where it is called with the gradient.
            is_permanent: Whether `reset_hooks` leaves it.

        Raises:
            HookError: there is no such hook.
            InUseError: the model belongs to another thread.
        """
        self.owner.check()
        check_function(hook_fn)
        _check_direction(dir)
        if isinstance(name, str):
            name = self._find(name).name or name
        else:
            self.points_of(name, hook_fn, dir)
        super().add_hook(name, hook_fn, dir=dir, is_permanent=is_permanent)

    def remove_all_hook_fns(self, direction: Any = "both", *args: Any, **kwargs: Any) -> None:
        """As TransformerLens's.

        Raises:
            HookError: the direction is none.
            InUseError: the model belongs to another thread.
        """
        self.owner.check()
        self.owner.give_up()
        _check_direction(direction, "both")
        super().remove_all_hook_fns(direction, *args, **kwargs)

    def points_of(
        self, name: str | Callable[[str], bool], function: Any, direction: Literal["fwd", "bwd"]
    ) -> list[CheckedPoint]:
        """The hook points that a name or a predicate on names means; those that would never fire are left out.

        Raises:
            HookError: there is no such hook.
            ValueError: the hook named is switched off, as TransformerLens says.
        """
        if isinstance(name, str):
            found: dict[str, Any] = {name: self._find(name)}
        else:
            found = {point.name or n: point for n, point in list(self._all_hooks.items()) if name(n)}
            if not found and not getattr(name, "may_be_none", False):
                raise HookError(
                    "a function from names to True or False chose no hook point; model.hook_dict has their names"
                )
            gated = [n for n in found if self._gated_hook_reason(n) is not None]
            self._warn_gated_skipped("hooks", gated, stacklevel=2)
            found = {n: point for n, point in found.items() if n not in gated}
        for n, point in found.items():
            self.check_hooks_to_add(point, n, function, dir=direction)
        return list({id(point): point for point in found.values()}.values())

    def remove_leftovers(self, known: list[Any]) -> None:
        """Remove the hooks of contexts that were lost: those that no open one has added."""
        ids = {id(handle) for handle in known}
        for point in self._points():
            point.remove_handles({id(handle) for handle in point.temporary()} - ids)
        self.context_level = self.owner.depth
        run_all_blocks(self)
        blocks: Any = self.blocks
        remove_lost(module for block in blocks for module in (block, *block.children()))

    def _points(self) -> list[CheckedPoint]:
        points: Any = {id(point): point for point in self._all_hooks.values()}
        return list(points.values())

    def _hooks_of(self, layer: int) -> LayerHooks:
        hooks = dict(self._layer_hooks()).get(layer)
        if hooks is None:
            raise HookError(f"layer {layer} has no experts; MoE layers are {list(self.moe_layers)}")
        return hooks


def _check_direction(direction: Any, *others: str) -> None:
    words = ("fwd", "bwd", *others)
    if direction not in words:
        raise HookError(f"the direction of a hook is {direction!r}; expected one of {words}")
