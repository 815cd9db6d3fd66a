"""TransformerLens's components, mended where they are slow, inexact or deaf.

`adapt` gives a component of an adapter's template one of the classes below on top of its own. Norms and attention call
transformers' own forward unless somebody listens inside them; `hook_resid_mid` is the residual stream itself; the MoE
block gets the hook points of `names.MLP_HOOKS`.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from moe_lens import names
from moe_lens.errors import UnsupportedModelError
from moe_lens.model.experts import LayerHooks, call_hook, experts_forward
from moe_lens.model.families import Family
from moe_lens.model.router import route


@cache
def _combined(mended: type, original: type) -> type:
    return type(f"{mended.__name__}{original.__name__}", (mended, original), {})


def adapt(component: GeneralizedComponent, mended: type) -> Any:
    """Put `mended` in front of the component's class."""
    component.__class__ = _combined(mended, type(component))
    return component


class _ExactForward(torch.autograd.Function):
    """The value of one computation with the gradient of another that equals it but for rounding."""

    @staticmethod
    def forward(ctx: Any, differentiated: Tensor, value: Tensor) -> Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class Norm(GeneralizedComponent):
    """A norm that runs once, as transformers computes it; an edit of `hook_scale` or `hook_normalized` rebuilds it."""

    residual_point: HookPoint | None = None
    """`hook_resid_mid` of the block, on the norm before its MLP."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # noqa: ARG002
        """Normalise, firing hooks on the way."""
        if self.residual_point is not None and self.residual_point.has_hooks():
            self._edit_residual(hidden_states)
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
        rebuilt = self._apply_weight_and_bias(normalized, x.dtype)
        if not (scaled or edited):
            return self.hook_out(native)
        if not scale_point.fwd_hooks and not normalized_point.fwd_hooks:
            return self.hook_out(_ExactForward.apply(rebuilt, native))
        # Forward and backward hooks together cannot be told from an edit but by the value.
        unedited = self._apply_weight_and_bias(
            (centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()).detach(), x.dtype
        )
        same = torch.equal(rebuilt.detach(), unedited)
        return self.hook_out(_ExactForward.apply(rebuilt, native) if same else rebuilt)

    def _edit_residual(self, stream: Tensor) -> None:
        """Let hooks read and edit the stream that this norm reads and the block adds to afterwards.

        transformers' blocks keep no other reference to it than this tensor, so an edit is copied into it. Hooks get a
        copy: what their graph has saved stays as it was.
        """
        point = self.residual_point
        assert point is not None
        seen, edited = call_hook(point, stream.clone(), "hook_resid_mid")
        if edited:
            stream.copy_(seen)


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
    """The MLP of a block; a layer with experts gets its hook points here, a dense layer keeps TransformerLens's."""

    family: Family
    hooks: LayerHooks | None = None

    def set_original_component(self, original_component: nn.Module) -> None:
        """Wrap the block and, when it has experts, take the router and the experts apart."""
        super().set_original_component(original_component)
        router = getattr(original_component, self.family.router, None)
        experts = getattr(original_component, "experts", None)
        if router is None or experts is None:
            return
        self._open(original_component, router, experts)

    def _open(self, moe: Any, router: Any, experts: Any) -> None:
        family = self.family
        if not hasattr(experts, "has_gate") or not hasattr(experts, "down_proj"):
            raise UnsupportedModelError(
                f"{type(experts).__name__} is not under transformers' experts contract (packed gate_up_proj and "
                "down_proj); quantised experts replace it: load the model without quantization_config"
            )
        shared = getattr(moe, family.shared, None) if family.shared else None
        self.__dict__["hooks"] = hooks = LayerHooks(-1, linear_branch=experts.has_gate, shared=shared is not None)
        if isinstance(self._modules.get("hook_router_scores"), HookPoint):
            self._hook_registry.pop("hook_router_scores")
            del self.hook_router_scores
        self.hook_aliases = {}
        for name, point in hooks.points.items():
            setattr(self, name, point)
        # partials, not closures: a deep copy of the model then has hooks of its own
        router.forward = partial(route, router.forward, hooks, experts.num_experts)
        experts.forward = partial(experts_forward, experts, hooks, family.interleaved)
        if shared is not None:
            self._open_shared(moe, shared, hooks)

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
        self.hooks.start(*hidden_states.shape[:2])
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.hooks.finish()


def _shared(
    compute: Callable[..., Tensor], openness: Callable[..., Tensor] | None, hooks: LayerHooks, x: Tensor
) -> Tensor:
    out = compute(x)
    if openness is not None and hooks.heard(names.SHARED_OUT):
        out = openness(x).sigmoid() * out
    return hooks.over_tokens(names.SHARED_OUT, out)


def _shared_gate(openness: Callable[..., Tensor], hooks: LayerHooks, x: Tensor) -> Tensor:
    logits = openness(x)
    return torch.full_like(logits, torch.inf) if hooks.heard(names.SHARED_OUT) else logits
