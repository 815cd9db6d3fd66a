"""TransformerLens's components, mended where they are slow, inexact or deaf.

`adapt` gives a component of an adapter's template one of the classes below on top of its own. Norms and attention call
transformers' own forward unless somebody listens inside them; `hook_resid_mid` is the residual stream itself; the MoE
block gets the hook points of `names.MLP_HOOKS`.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from moe_lens import names
from moe_lens.model.bypass import BLOCKS, block_forward, experts_of
from moe_lens.model.contract import Experts
from moe_lens.model.experts import LayerHooks, call_hook, experts_forward
from moe_lens.model.families import Family
from moe_lens.model.router import route, rule_of
from moe_lens.model.scaling import ExactForward, unscaled


def _on_device(experts: Experts, *arguments: Any) -> Tensor:
    with experts.on_device():
        return experts_forward(experts, *arguments)


@cache
def _combined(mended: type, original: type) -> type:
    return type(f"{mended.__name__}{original.__name__}", (mended, original), {})


def adapt(component: GeneralizedComponent, mended: type) -> Any:
    """Put `mended` in front of the component's class."""
    component.__class__ = _combined(mended, type(component))
    return component


def edit_stream(point: HookPoint | None, stream: Tensor) -> None:
    """Let the hooks of `hook_resid_mid` read and edit the stream that a part reads and the block adds to afterwards.

    transformers' blocks keep no other reference to it than this tensor, so an edit is copied into it. Hooks get a
    copy: what their graph has saved stays as it was.
    """
    if point is None or not point.has_hooks():
        return
    seen, edited = call_hook(point, stream.clone(), "hook_resid_mid")
    if edited:
        stream.copy_(seen)


class Part(GeneralizedComponent):
    """A part of a layer that transformers computes: hooks at its input and its output, nothing inside.

    What it computes is shown as it is added to the residual stream: times the layer's multiplier, where there is one.
    """

    residual_point: HookPoint | None = None
    """`hook_resid_mid` of the block, on the part that reads the stream after attention."""
    multiplier: float = 1.0
    shows_output: bool = True
    """Whether its output is shown here, and not at the input of a norm that it ends with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the part between its two hooks."""
        named = not args
        x = kwargs["hidden_states"] if named else args[0]
        edit_stream(self.residual_point, x)
        if self.hook_in.has_hooks():
            x = self.hook_in(x.clone())  # a copy: a change in place is not one of the stream, which others read too
        component: Any = self.original_component
        out = component(**{**kwargs, "hidden_states": x}) if named else component(x, *args[1:], **kwargs)
        out = self._finish(out, x)
        return (self._shown(out[0]), *out[1:]) if isinstance(out, tuple) else self._shown(out)

    def _finish(self, out: Any, x: Tensor) -> Any:  # noqa: ARG002
        """What is left to do before the output is shown."""
        return out

    def _shown(self, out: Tensor) -> Tensor:
        point = self.hook_out
        if not point.has_hooks() or not self.shows_output:
            return out
        if self.multiplier == 1.0:
            return point(out)
        seen, edited = call_hook(point, out * self.multiplier, point.name or "hook_out")
        return unscaled(seen, out, self.multiplier) if edited else out


class Norm(GeneralizedComponent):
    """A norm that runs once, as transformers computes it; an edit of `hook_scale` or `hook_normalized` rebuilds it."""

    residual_point: HookPoint | None = None
    """`hook_resid_mid` of the block, on the norm before its MLP."""
    summed_point: HookPoint | None = None
    """`mlp.hook_out` of a MoE block that this norm ends."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # noqa: ARG002
        """Normalise, firing hooks on the way."""
        edit_stream(self.residual_point, hidden_states)
        if self.summed_point is not None and self.summed_point.has_hooks():
            hidden_states = self.summed_point(hidden_states.clone())
        # A copy for hooks: a change in place is one of what the norm reads, not of the residual stream.
        x = self.hook_in(hidden_states.clone()) if self.hook_in.has_hooks() else hidden_states
        component: Any = self.original_component
        native = component(x)
        scale_point, normalized_point = self.hook_scale, self.hook_normalized
        if not scale_point.has_hooks() and not normalized_point.has_hooks():
            return self.hook_out(native)
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        centred = wide if self.uses_rms_norm else wide - wide.mean(-1, keepdim=True)
        eps = component.variance_epsilon if hasattr(component, "variance_epsilon") else component.eps
        scale, scaled = call_hook(scale_point, (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt(), "hook_scale")
        normalized, edited = call_hook(normalized_point, centred / scale, "hook_normalized")
        rebuilt = self._rebuilt(normalized, x.dtype)
        if not (scaled or edited):
            return self.hook_out(native)
        if not scale_point.fwd_hooks and not normalized_point.fwd_hooks:
            return self.hook_out(ExactForward.apply(rebuilt, native))
        # Forward and backward hooks together cannot be told from an edit but by the value.
        unedited = self._rebuilt((centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()).detach(), x.dtype)
        same = torch.equal(rebuilt.detach(), unedited)
        return self.hook_out(ExactForward.apply(rebuilt, native) if same else rebuilt)

    def _rebuilt(self, normalized: Tensor, dtype: torch.dtype) -> Tensor:
        component: Any = self.original_component
        with align_module_device(component):  # accelerate keeps the weights of offloaded layers elsewhere
            return self._apply_weight_and_bias(normalized, dtype)


class Attention(GeneralizedComponent):
    """Attention by transformers' own forward, unless somebody listens to scores, pattern or rotated keys and queries.

    Then TransformerLens's eager reconstruction runs (float32: within 1e-5).
    """

    def _reconstructs(self) -> bool:
        inner = (p for n, p in self._modules.items() if isinstance(p, HookPoint) and n not in ("hook_in", "hook_out"))
        flags = ("use_split_qkv_input", "use_attn_in", "use_attn_result")
        return any(p.has_hooks() for p in inner) or any(getattr(self.config, flag, False) for flag in flags)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attend, firing hooks on the way."""
        if self._reconstructs():
            return super().forward(*args, **kwargs)
        if args:
            args = (self.hook_in(args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = self.hook_in(kwargs["hidden_states"])
        component: Any = self.original_component
        out = component(*args, **kwargs)
        return (self.hook_out(out[0]), *out[1:]) if isinstance(out, tuple) else self.hook_out(out)


class Unembedding(GeneralizedComponent):
    """The unembedding without the bias of zeros that TransformerLens adds: it costs time, and would be saved."""

    def set_original_component(self, original_component: nn.Module) -> None:
        """Wrap the module as it is."""
        GeneralizedComponent.set_original_component(self, original_component)


class MoEBlock(GeneralizedComponent):
    """The MLP of a block; a layer with experts gets its hook points here, a dense layer keeps those it has."""

    family: Family
    hooks: LayerHooks | None = None
    contract: Experts
    """Its experts, where it has any, whatever modules hold them."""
    layer: Any = None
    """The decoder layer around it, where shared experts may be."""
    moe: Any = None
    """The module of transformers that holds router and experts."""
    beside: Callable[..., Tensor] | None = None
    """What computes shared experts that are not in the block but beside it."""

    def set_original_component(self, original_component: nn.Module) -> None:
        """Wrap the block and, when it has experts, take the router and the experts apart."""
        super().set_original_component(original_component)
        moe = self._holder(original_component)
        if moe is not None and moe is not original_component and self.family.layout and self.family.layout.inner:
            # Such a layer asks whether its MLP is of the class that holds experts: what wraps it is.
            self.__class__ = _combined(type(self), type(original_component))
        experts = experts_of(moe, self.family)
        if experts is not None:
            self.__dict__.update(moe=moe, contract=experts)
            self._open(moe, getattr(moe, self.family.router), experts)

    def _holder(self, original_component: nn.Module) -> Any:
        inner = self.family.layout.inner if self.family.layout else None
        return getattr(original_component, inner, None) if inner else original_component

    def _open(self, moe: Any, router: Any, experts: Experts) -> None:
        family, block = self.family, self.original_component
        shared = getattr(block, family.shared, None) if family.shared else None
        beside = getattr(self.layer, family.shared, None) if family.shared and shared is None else None
        has_shared = shared is not None or beside is not None or family.constant is not None
        self.__dict__["hooks"] = hooks = LayerHooks(-1, linear_branch=experts.has_gate, shared=has_shared)
        hooks.factors = _factors(family, moe, router, self.layer)
        if isinstance(self._modules.get("hook_router_scores"), HookPoint):
            self._hook_registry.pop("hook_router_scores")
            del self.hook_router_scores
        self.hook_aliases = {}
        for name, point in hooks.points.items():
            setattr(self, name, point)
        # partials, not closures: a deep copy of the model then has hooks of its own
        rule = rule_of(family, router, experts.n_experts)
        compute = partial(_on_device, experts, hooks)
        if family.experts in BLOCKS:
            own = BLOCKS[family.experts]
            select = partial(route, partial(own.route, moe), hooks, rule)
            others = partial(_constant, moe, family.constant, hooks) if family.constant else shared
            moe.forward = partial(block_forward, select, compute, others, own.returns_logits)
        else:
            router.forward = partial(route, router.forward, hooks, rule)
            experts.module.forward = compute
        if shared is not None:
            self._open_shared(block, shared, hooks)
        elif beside is not None:
            # The layer adds it to what the block returns: the block does so itself, and the layer then adds zero.
            self.__dict__["beside"] = partial(_shared, beside.forward, None, hooks)
            beside.forward = _nothing

    def _open_shared(self, moe: Any, shared: Any, hooks: LayerHooks) -> None:
        """Hook the shared experts' output, after their own sigmoid gate where the family has one.

        The block multiplies by the gate after both have run. While somebody listens, the product is made here and the
        gate then answers +∞, whose sigmoid is exactly 1.
        """
        shared_gate = getattr(moe, self.family.shared_gate, None) if self.family.shared_gate else None
        if shared_gate is None:
            shared.forward = partial(_shared, shared.forward, None, hooks)
            return
        shared.forward = partial(_shared, shared.forward, shared_gate.forward, hooks)
        shared_gate.forward = partial(_shared_gate, shared_gate.forward, hooks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, having told its hooks how many tokens come."""
        if self.hooks is None:
            return super().forward(*args, **kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        with self.passing(*hidden_states.shape[:2]):
            return super().forward(*args, **kwargs)

    @contextmanager
    def passing(self, batch: int, pos: int) -> Generator[None]:
        """While tokens pass, the hooks know how they are laid out."""
        assert self.hooks is not None
        self.hooks.start(batch, pos)
        try:
            yield
        finally:
            self.hooks.finish()

    def _finish(self, out: Any, x: Tensor) -> Any:
        return out if self.beside is None else out + self.beside(x)


class BareExperts(MoEBlock):
    """The experts of a layer whose router stands beside them: there is no block around the two.

    The layer gives them flat tokens; `hook_in` and `hook_out` show them by batch and position, as everything does.
    """

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
    openness: Callable[..., Tensor] | None,
    hooks: LayerHooks,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    out = compute(x, *args, **kwargs)
    if openness is not None and hooks.heard(names.SHARED_OUT):
        out = openness(x).sigmoid() * out
    return hooks.over_tokens(names.SHARED_OUT, out)


def _shared_gate(openness: Callable[..., Tensor], hooks: LayerHooks, x: Tensor) -> Tensor:
    logits = openness(x)
    return torch.full_like(logits, torch.inf) if hooks.heard(names.SHARED_OUT) else logits
