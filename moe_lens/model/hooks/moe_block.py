"""The MoE block as a component: its router and experts are opened, its hooks are those of `names.MLP_HOOKS`."""

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from moe_lens import names
from moe_lens.errors import UnsupportedModelError
from moe_lens.model.experts.expert_weights_view import Experts
from moe_lens.model.experts.nonstandard_experts import BLOCKS, block_forward, experts_of
from moe_lens.model.families.table import Family
from moe_lens.model.hooks.bypassed import refuse_exchanged, refuse_replaced, refuse_torch_hooks
from moe_lens.model.hooks.components import FlatTokens, combined, method_of
from moe_lens.model.hooks.expert_kernel import experts_forward
from moe_lens.model.hooks.layer_hooks import LayerHooks
from moe_lens.model.hooks.named_parameters import NamedParameters
from moe_lens.model.hooks.router import route
from moe_lens.model.hooks.router_modes import rule_of
from moe_lens.model.hooks.torch_hooks import hooks_of_torch, unchanged


def _on_device(experts: Experts, *arguments: Any) -> Tensor:
    with experts.on_device():
        return experts_forward(experts, *arguments)


class MoEBlock(NamedParameters):
    """The MLP of a block; a layer with experts gets its hook points here, a dense layer keeps those it has."""

    family: Family
    hooks: LayerHooks | None = None
    contract: Experts
    """Its experts, where it has any, whatever modules hold them."""
    layer: Any = None
    """The decoder layer around it, where shared experts may be."""
    moe: Any = None
    """The module of transformers that holds router and experts."""
    flat: bool = False
    """Whether it is given tokens without their batch axis, beside a router that is not in it."""
    beside: Callable[..., Tensor] | None = None
    """What computes shared experts that are not in the block but beside it."""
    silenced: nn.Module | None = None
    """The module of those: the layer still calls it, and gets zero."""
    given: tuple[tuple[str, nn.Module, Callable[..., Any]], ...] = ()
    """Modules that have a forward with hooks inside, with it and what they are called."""
    own: tuple[tuple[nn.Module, Callable[..., Any]], ...] = ()
    """Modules whose forward is not called, since another one is in its place, with that of their class."""

    def set_original_component(self, original_component: nn.Module) -> None:
        """Wrap the block and, when it has experts, take the router and the experts apart."""
        super().set_original_component(original_component)
        moe = self._holder(original_component)
        if moe is not None and moe is not original_component and self.family.layout and self.family.layout.inner:
            # Such a layer asks whether its MLP is of the class that holds experts: what wraps it is.
            self.__class__ = combined(type(self), type(original_component))
        experts = experts_of(moe, self.family)
        if experts is not None:
            self.__dict__.update(moe=moe, contract=experts)
            router = getattr(moe, self.family.router)
            self._open(moe, router, experts)

    def _holder(self, original_component: nn.Module) -> Any:
        inner = self.family.layout.inner if self.family.layout else None
        return getattr(original_component, inner, None) if inner else original_component

    def _open(self, moe: Any, router: Any, experts: Experts) -> None:
        family, block = self.family, self.original_component
        for inside in (experts.module, *self._routing_parts(router), *((moe,) if family.experts in BLOCKS else ())):
            refuse_replaced(inside)
        self._check_bypassed()
        shared = getattr(block, family.shared, None) if family.shared else None
        beside = getattr(self.layer, family.shared, None) if family.shared and shared is None else None
        has_shared = shared is not None or beside is not None or family.constant is not None
        rule = rule_of(family, router, experts.n_experts)
        hooks = LayerHooks(-1, linear_branch=experts.has_gate, shared=has_shared, counts=rule.counts)
        self.__dict__["hooks"] = hooks
        hooks.factors = partial(_factors, family, moe, router, self.layer)
        if isinstance(self._modules.get("hook_router_scores"), HookPoint):
            self._hook_registry.pop("hook_router_scores")
            del self.hook_router_scores
        self.hook_aliases = {}
        for name, point in hooks.points.items():
            setattr(self, name, point)
        # partials, not closures: a deep copy of the model then has hooks of its own
        compute = partial(_on_device, experts, hooks)
        if family.experts in BLOCKS:
            own = BLOCKS[family.experts]
            select = partial(route, partial(own.route, moe), hooks, rule)
            others = partial(_constant, moe, family.constant, hooks) if family.constant else shared
            moe.forward = partial(block_forward, select, compute, others, own.returns_logits)
        else:
            self._give("router", router, partial(route, method_of(router.forward), hooks, rule))
            self._give("experts", experts.module, compute)
        if shared is not None:
            self._open_shared(block, shared, hooks)
        elif beside is not None:
            # The layer adds it to what the block returns: the block does so itself, and the layer then adds zero.
            self.__dict__.update(silenced=beside, beside=partial(_shared, method_of(beside.forward), None, hooks))
            beside.forward = _nothing
            self._check_bypassed()
        replaced = [module for _, module, _ in self.given] + ([moe] if family.experts in BLOCKS else [])
        self.__dict__["own"] = tuple((module, type(module).forward) for module in replaced)

    def opened(self) -> list[nn.Module]:
        """Modules inside, or beside it, that are known by identity; none of a dense layer."""
        if self.moe is None:
            return []
        family, parts = self.family, [self.moe, self.contract.module, self.silenced]
        parts += [getattr(self.moe, family.router)] if family.experts not in BLOCKS else []
        parts += [getattr(self.moe, family.shared_gate, None)] if family.shared_gate else []
        return [part for part in parts if part is not None]

    def _check_bypassed(self) -> None:
        """Refuse changes of modules whose part the block does itself: when it is wrapped, and in every pass.

        Raises:
            UnsupportedModelError: a torch hook, a forward or a module of somebody's own would not be called.
        """
        for module, forward in self.own:
            if type(module).forward is not forward:
                raise UnsupportedModelError(
                    f"{type(module).forward.__qualname__} would not be called: it has come into the class of a module "
                    "with hooks inside since the model was wrapped. Change what it computes by hooks or parameters"
                )
        if self.silenced is not None:
            refuse_exchanged(getattr(self.layer, str(self.family.shared)), self.silenced)
            if getattr(self.silenced, "_old_forward", self.silenced.forward) is not _nothing:
                refuse_replaced(self.silenced)
            refuse_torch_hooks(self.silenced)
        if self.family.experts not in BLOCKS:
            return
        moe, experts = self.moe, self.contract.module
        if experts is not moe:
            refuse_exchanged(moe.experts, experts)
        called = {id(each) for each in (moe, *getattr(moe, self.family.router).modules())}
        for part in experts.modules():
            if id(part) not in called and (part is experts or part._parameters):
                refuse_replaced(part)
                refuse_torch_hooks(part)

    def _open_shared(self, moe: Any, shared: Any, hooks: LayerHooks) -> None:
        """Hook the shared experts' output, after their own sigmoid gate where the family has one.

        The block multiplies by the gate after both have run. While somebody listens, the product is made here and the
        gate then answers +∞, whose sigmoid is exactly 1.
        """
        shared_gate = getattr(moe, self.family.shared_gate, None) if self.family.shared_gate else None
        if shared_gate is None:
            self._give("shared experts", shared, partial(_shared, method_of(shared.forward), None, hooks))
            return
        gate = method_of(shared_gate.forward), shared_gate
        self._give("shared experts", shared, partial(_shared, method_of(shared.forward), gate, hooks))
        self._give("shared gate", shared_gate, partial(_shared_gate, method_of(shared_gate.forward), hooks))

    def _give(self, what: str, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self.__dict__["given"] = (*self.given, (what, module, forward))

    def _routing_parts(self, router: nn.Module) -> list[nn.Module]:
        """The router, and the module in it that makes its logits, where there is one."""
        inner = router._modules.get(self.family.router_weight.partition(".")[0])
        return [router] if inner is None else [router, inner]

    def _with_hooks_inside(self) -> list[nn.Module]:
        """Modules whose outputs hooks have shown when torch's hooks come to see them; none where it is no matter.

        Raises:
            HookError: somebody listens, and a forward was put in the place of one with hooks inside.
            UnsupportedModelError: somebody listens, and a part of the router is not transformers' own.
        """
        assert self.hooks is not None
        heard, parts = self.hooks.heard(), []
        # A block that hands routing on in its own way may not compute with what its router returns.
        if heard or self.family.experts in BLOCKS:
            parts += self._routing_parts(getattr(self.moe, self.family.router))
        if heard:
            for part in parts:
                refuse_replaced(part)
            for what, module, forward in self.given:
                if forward not in (module.forward, getattr(module, "_old_forward", None)):  # accelerate's around it
                    raise self.hooks.unheard(what)
                parts += [module] if what in ("experts", "shared experts") else []
        return [part for part in parts if hooks_of_torch(part)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, having told its hooks how many tokens come."""
        if self.hooks is None:
            return super().forward(*args, **kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        with self.passing(*hidden_states.shape[:2]):
            return super().forward(*args, **kwargs)

    @contextmanager
    def passing(self, batch: int, pos: int) -> Generator[None]:
        """While tokens pass, the hooks know how they are laid out.

        Raises:
            InUseError: another thread uses the model.
            HookError: somebody listens to router or experts, and something else has computed or changed them.
            UnsupportedModelError: what its owner has changed since it was wrapped would not be called.
        """
        assert self.hooks is not None
        self._check_bypassed()
        hooked = self._with_hooks_inside()
        with self.hooks.owner.passing(), unchanged(hooked, self.hooks.layer) if hooked else nullcontext():
            flat = [part for part in self._modules.values() if isinstance(part, FlatTokens)]
            before, layouts = self.hooks.start(batch, pos), [part.layout for part in flat]
            for part in flat:
                part.__dict__["layout"] = batch, pos
            try:
                yield
                self.hooks.check_ran()
            finally:
                self.hooks.finish(before)
                for part, layout in zip(flat, layouts, strict=True):
                    part.__dict__["layout"] = layout

    def _finish(self, out: Any, x: Tensor) -> Any:
        return out if self.beside is None else out + self.beside(x)


class BareExperts(MoEBlock):
    """The experts of a layer whose router stands beside them: there is no block around the two.

    The layer gives them flat tokens; `hook_in` and `hook_out` show them by batch and position, as everything does.
    """

    flat = True

    def _holder(self, original_component: nn.Module) -> Any:  # noqa: ARG002
        return self.layer

    def _open(self, moe: Any, router: Any, experts: Experts) -> None:
        super()._open(moe, router, experts)
        assert self.hooks is not None
        self.hooks.points |= {names.MLP_IN: self.hook_in, names.MLP_OUT: self.hook_out}

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The routed sum."""
        component, hooks = self.original_component, self.hooks
        assert component is not None and hooks is not None
        out = component(hooks.over_tokens(names.MLP_IN, x), indices, weights)
        return hooks.over_tokens(names.MLP_OUT, out)


def _factors(family: Family, moe: Any, router: Any, layer: Any) -> dict[str, float]:
    """What the family multiplies by after the experts, by hook: hooks show the product."""
    multiplier = family.layout.multiplier if family.layout else None
    both = float(getattr(layer, multiplier)) if multiplier else 1.0
    if family.averaged and getattr(moe, family.averaged) == "average":
        both /= 2
    owner = moe if hasattr(moe, family.scaled or "") else router
    routed = both * (float(getattr(owner, family.scaled)) if family.scaled and family.scaled_after else 1.0)
    of_routed = dict.fromkeys((names.ROUTING_WEIGHTS, names.EXPERT_WEIGHTED, names.ROUTED_OUT), routed)
    return {name: factor for name, factor in {**of_routed, names.SHARED_OUT: both}.items() if factor != 1.0}


def _constant(moe: Any, name: str, hooks: LayerHooks, x: Tensor) -> Tensor:
    return hooks.over_tokens(names.SHARED_OUT, getattr(moe, name).expand_as(x))


def _nothing(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_zeros(())


def _shared(
    compute: Callable[..., Tensor],
    gate: tuple[Callable[..., Tensor], nn.Module] | None,
    hooks: LayerHooks,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    out = compute(x, *args, **kwargs)
    if gate is not None and hooks.has_listeners(names.SHARED_OUT):
        openness, module = gate
        refuse_torch_hooks(module)
        out = openness(x).sigmoid() * out
    return hooks.over_tokens(names.SHARED_OUT, out)


def _shared_gate(openness: Callable[..., Tensor], hooks: LayerHooks, x: Tensor) -> Tensor:
    logits = openness(x)
    return torch.full_like(logits, torch.inf) if hooks.has_listeners(names.SHARED_OUT) else logits
