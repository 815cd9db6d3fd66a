"""TransformerLens's components, patched where they are slow, inexact, or not reached by an edit.

`adapt` gives a component of an adapter's template one of the classes below on top of its own. Norms and attention call
transformers' own forward unless somebody listens inside them; `hook_resid_mid` is the residual stream itself.
"""

from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any, ClassVar

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformers import Cache

from moe_lens.errors import HookError, UnsupportedModelError
from moe_lens.model.experts.offloaded_experts import at_hand, numbers_of
from moe_lens.model.hooks.bypassed import refuse_replaced, refuse_torch_hooks
from moe_lens.model.hooks.head_views import name_conversion, view_as_others
from moe_lens.model.hooks.latent_cache import check_keys_are_stored, latents_of
from moe_lens.model.hooks.layer_hooks import call_hook
from moe_lens.model.hooks.named_parameters import NamedParameters
from moe_lens.model.hooks.readable_weight import refuse_own_forward, weight_of
from moe_lens.model.hooks.scaling import ExactForward, unscaled
from moe_lens.model.tl_compat import GeneralizedComponent


class Mended:
    """What every class that `combined` makes has, so that its instances can be pickled."""

    mends: tuple[type, type]
    """The classes that it is made of."""

    def __reduce_ex__(self, _: Any) -> Any:
        """Of which classes it is, and what it holds."""
        return _empty, (_made_of(type(self)),), vars(self)


@cache
def combined(patched: type, original: type) -> type:
    """A class that is both, the patched one first."""
    mended = issubclass(patched, Mended) or issubclass(original, Mended)
    bases = (patched, original) if mended else (Mended, patched, original)
    return type(f"{patched.__name__}{original.__name__}", bases, {"mends": (patched, original)})


def _made_of(kind: type) -> Any:
    """A class as pickle can name it."""
    return tuple(_made_of(each) for each in vars(kind)["mends"]) if "mends" in vars(kind) else kind


def _empty(made_of: Any) -> Any:
    """An instance of a class that `_made_of` describes, without its attributes."""
    kind: Any = _class_of(made_of)
    return kind.__new__(kind)


def _class_of(made_of: Any) -> type:
    return combined(*(_class_of(each) for each in made_of)) if isinstance(made_of, tuple) else made_of


def method_of(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method in a form that pickle restores: by name it would find what stands in its place by then."""
    return partial(forward.__func__, forward.__self__) if isinstance(forward, MethodType) else forward


def adapt(component: GeneralizedComponent, patched: type) -> Any:
    """Put `patched` in front of the component's class."""
    component.__class__ = combined(patched, type(component))
    return component


def edit_stream(point: HookPoint | None, stream: Tensor) -> None:
    """Let the hooks of `hook_resid_mid` read and edit the stream that a part reads and the block adds to afterwards.

    transformers' blocks keep no other reference to it than this tensor, so an edit is copied into it. Hooks get a
    copy: what their graph has saved stays as it was.
    """
    if point is None or not point.has_hooks():
        return
    seen, edited = call_hook(point, stream.clone())
    if edited:
        stream.copy_(seen)


class LayerPart(NamedParameters):
    """A part of a layer that transformers computes: hooks at its input and its output, nothing inside.

    What it computes is shown as it is added to the residual stream: times the layer's multiplier, where there is one.
    """

    residual_point: HookPoint | None = None
    """`hook_resid_mid` of the block, on the part that reads the stream after attention."""
    multiplied: tuple[Any, str] | None = None
    """The layer, and the name of its multiplier, where there is one."""
    shows_output: bool = True
    """Whether its output is shown here, and not at the input of a norm that it ends with."""

    @property
    def multiplier(self) -> float:
        """What its output is multiplied by, at the moment, where it is added to the residual stream."""
        return 1.0 if self.multiplied is None else float(getattr(*self.multiplied))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the part between its two hooks."""
        named = not args
        x = kwargs["hidden_states"] if named else args[0]
        edit_stream(self.residual_point, x)
        if self.hook_in.has_hooks():
            # A copy: a change in place is not one of the stream, which others read too. Unless it was changed, the part
            # reads the stream itself, which MiniMax's jitter changes for others, too.
            seen, edited = call_hook(self.hook_in, x.clone())
            x = seen if edited else x
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
        factor = self.multiplier
        if factor == 1.0:
            return point(out)
        seen, edited = call_hook(point, out * factor)
        return unscaled(seen, out, factor) if edited else out


class FlatTokens(NamedParameters):
    """A part that transformers gives tokens without their batch axis; its hooks show them by batch and position."""

    layout: tuple[int, int] | None = None
    """Batch and positions of the tokens that are passing."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the part on [batch, pos, …]; what comes back is as flat as what came."""
        if x.dim() != 2 or self.layout is None:
            return super().forward(x, *args, **kwargs)
        out = super().forward(x.reshape(*self.layout, x.shape[-1]), *args, **kwargs)
        return out.reshape(len(x), -1)


class Norm(GeneralizedComponent):
    """A norm that runs once, as transformers computes it; an edit of `hook_scale` or `hook_normalized` rebuilds it."""

    residual_point: HookPoint | None = None
    """`hook_resid_mid` of the block, on the norm before its MLP."""
    summed_point: HookPoint | None = None
    """`mlp.hook_out` of a MoE block that this norm ends."""
    property_aliases: ClassVar[dict[str, str]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    """None: they would be the parameters that there are when a model is wrapped."""

    @property
    def w(self) -> Tensor:
        """The gain, as it is stored."""
        return numbers_of(self.original_component)

    @property
    def b(self) -> Tensor:
        """The bias, of a norm that has one."""
        return numbers_of(self.original_component, "bias")

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
        centred, measured = self._centred_and_scale(wide)
        scale, scaled = call_hook(scale_point, measured)
        normalized, edited = call_hook(normalized_point, centred / scale)
        rebuilt = self._rebuilt(normalized, x.dtype)
        if not (scaled or edited):
            return self.hook_out(native)
        if not scale_point.fwd_hooks and not normalized_point.fwd_hooks:
            return self.hook_out(ExactForward.apply(rebuilt, native))
        # Forward and backward hooks together cannot be told from an edit but by the value.
        unedited = self._rebuilt((centred / measured).detach(), x.dtype)
        same = torch.equal(rebuilt.detach(), unedited)
        return self.hook_out(ExactForward.apply(rebuilt, native) if same else rebuilt)

    def _centred_and_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the norm divides, and by what: by 1 where its owner has put an Identity in its place."""
        component: Any = self.original_component
        if isinstance(component, nn.Identity):
            return x, torch.ones_like(x[..., :1])
        centred = x if self.uses_rms_norm else x - x.mean(-1, keepdim=True)
        eps = component.variance_epsilon if hasattr(component, "variance_epsilon") else component.eps
        return centred, (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def _rebuilt(self, normalized: Tensor, dtype: torch.dtype) -> Tensor:
        component: Any = self.original_component
        if isinstance(component, nn.Identity):
            return normalized.to(dtype)
        with align_module_device(component):  # accelerate keeps the weights of offloaded layers elsewhere
            return self._apply_weight_and_bias(normalized, dtype)


class Attention(NamedParameters):
    """Attention by transformers' own forward, unless hooks are on scores, pattern or rotated keys and queries.

    Then TransformerLens's eager reconstruction runs (float32: within 1e-5). It reads the config by itself, fields that
    the family does not read included: the self-check compares the two.
    """

    property_aliases: ClassVar[dict[str, str]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    """None: W_Q and its like are properties, and nothing is read of them when a model is wrapped."""
    misread: float = 0.0
    """By how much of its largest value the reconstruction differs from the model's own attention, if by too much."""

    def _setup_qkv_hook_reshaping(self) -> None:
        super()._setup_qkv_hook_reshaping()  # pyright: ignore[reportAttributeAccessIssue]
        for module in self.modules():
            if isinstance(module, HookPoint):
                name_conversion(module)
        view_as_others(self)

    def _reconstructs(self) -> bool:
        inner = [part for name, part in self._modules.items() if name not in ("hook_in", "hook_out")]
        inner = [each for part in inner for each in (part.children() if self._has_axes_of_its_own(part) else (part,))]
        inner = [part for part in inner if isinstance(part, HookPoint)]
        flags = ("use_split_qkv_input", "use_attn_in", "use_attn_result")
        return any(p.has_hooks() for p in inner) or any(getattr(self.config, flag, False) for flag in flags)

    def _has_axes_of_its_own(self, part: Any) -> bool:
        """Whether a part sees its activations in another order of axes, or number, where TransformerLens computes.

        So it is always TransformerLens that computes where there are hooks on it.
        """
        if isinstance(part, Norm):  # of each head alone
            weight: Any = getattr(part.original_component, "weight", None)
            return weight is not None and weight.shape[-1] == getattr(self.original_component, "head_dim", None)
        return getattr(part, "name", None) == "kv_b_proj"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attend, firing hooks on the way."""
        component: Any = self.original_component
        past = kwargs.get("cache", kwargs.get("past_key_values"))  # the newer name of transformers, and the older
        latent = past is not None and hasattr(component, "expand_kv")
        if latent:
            check_keys_are_stored(past, component.layer_idx)
        if self._reconstructs():
            refuse_replaced(component)
            refuse_torch_hooks(component)
            if self.misread:
                raise HookError(
                    f"layer {component.layer_idx}: there are hooks inside attention, which TransformerLens computes "
                    f"again for them; that differs from this model's own attention by {self.misread:.1e} of its "
                    "largest value, since it obeys a field of the config that this family ignores (such as clip_qkv), "
                    "or ignores one. Leave these hooks out: run_with_cache(…, names_filter=…)"
                )
            causal = all(getattr(of, "is_causal", True) for of in (component, component.config))
            if not causal and kwargs.get("attention_mask") is None:
                raise HookError(
                    f"layer {component.layer_idx}: is_causal is False, so that tokens attend to later ones, and there "
                    "are hooks inside attention, which TransformerLens computes again for them, and causal. Leave "
                    "these hooks out: run_with_cache(…, names_filter=…)"
                )
            kwargs["attention_mask"] = _mask_of_unfilled(component, past, args, kwargs)
            if not latent:
                return self.reconstructed(*args, past=past, **kwargs)
            points = (self.hook_k, self.hook_v, self.hook_rot_k, self.kv_b_proj.hook_in, self.kv_b_proj.hook_out)
            listens = any(point.has_hooks() for point in points)
            with latents_of(component, self.hook_rot_k, past, listens) as view:
                return self.reconstructed(*args, past=view, **kwargs)
        if args:
            args = (self.hook_in(args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = self.hook_in(kwargs["hidden_states"])
        out = component(*args, **kwargs)
        return (self.hook_out(out[0]), *out[1:]) if isinstance(out, tuple) else self.hook_out(out)

    def reconstructed(self, *args: Any, past: Any, **kwargs: Any) -> Any:
        """What TransformerLens's attention gives, with its hooks, over a key-value cache or None."""
        kwargs.pop("cache", None)
        last: Any = self._modules.get("o")
        if last is not None and getattr(getattr(last, "weight", None), "dtype", None) == torch.float8_e4m3fn:
            raise UnsupportedModelError(
                "attention's output matrix is packed in float8, and there are hooks inside attention, which "
                "TransformerLens computes again for them, in that dtype: load the folder with "
                "HookedMoE.from_pretrained, or leave these hooks out: run_with_cache(…, names_filter=…)"
            )
        with at_hand(*self._multiplied_by_weight()):
            return super().forward(*args, **{**kwargs, "past_key_values": past})

    def _multiplied_by_weight(self) -> list[nn.Module]:
        """Linear layers that TransformerLens does not call, but multiplies by their weights, head by head."""
        on = partial(getattr, self.config)
        names = "o" if on("use_attn_result", False) else ""
        names += "qkv" if on("use_split_qkv_input", False) or on("use_attn_in", False) else ""
        inner: Any = self._modules
        found: list[Any] = [inner[name].original_component for name in names if name in inner]
        for linear in found:
            refuse_own_forward(linear)
            if not linear.weight.is_floating_point():
                raise UnsupportedModelError(
                    f"a {type(linear).__name__} multiplies by a packed weight: use_attn_result, use_attn_in and "
                    "use_split_qkv_input want numbers; cache.stack_head_results and W_O unpack it"
                )
        return found

    def _masked_softmax(self, attn_scores: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """TransformerLens's, in which scores of float64 are masked by what overflows in the softmax's float32.

        Where a query sees no key (padding on the left), nothing would be left of them but NaN, which reaches all rows.
        """
        if dtype is not None and torch.finfo(dtype).bits < torch.finfo(attn_scores.dtype).bits:
            attn_scores = attn_scores.clamp(min=torch.finfo(dtype).min)
        return super()._masked_softmax(attn_scores, dtype)  # pyright: ignore[reportAttributeAccessIssue]

    def _apply_attn_dropout(self, attn_weights: Tensor) -> Tensor:
        """TransformerLens's, and that of a rate which the module keeps as a number (DeepSeek-V2 and V3)."""
        rate = getattr(self.original_component, "attention_dropout", None)
        if isinstance(rate, int | float):
            return nn.functional.dropout(attn_weights, rate, self.training)
        return super()._apply_attn_dropout(attn_weights)  # pyright: ignore[reportAttributeAccessIssue]


def _mask_of_unfilled(component: Any, past: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The mask of a pass that may fill a cache with room for more tokens (a `StaticCache`).

    transformers leaves the mask out there, since its kernels let query i read keys 0 to i. TransformerLens counts
    queries from the last key, which is still empty; here they are counted from the last that is filled.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None or not isinstance(past, Cache):
        return mask
    x = args[0] if args else kwargs["hidden_states"]
    pos = x.shape[1]
    keys, _ = past.get_mask_sizes(pos, component.layer_idx)
    filled = int(past.get_seq_length(component.layer_idx))
    return x.new_ones(1, 1, pos, keys, dtype=torch.bool).tril(filled) if 1 < pos < keys else None


class Unembedding(GeneralizedComponent):
    """The unembedding without the bias of zeros that TransformerLens adds: it costs time, and would be saved."""

    def set_original_component(self, original_component: nn.Module) -> None:
        """Wrap the module as it is."""
        GeneralizedComponent.set_original_component(self, original_component)

    @property
    def W_U(self) -> Tensor:
        """[d_model, d_vocab]."""
        return weight_of(self.original_component).T
