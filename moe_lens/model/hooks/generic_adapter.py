"""An adapter of our own, for families that TransformerLens has none for.

It hooks the boundaries of a layer's parts and leaves every computation to transformers: embedding, residual stream,
norms, attention (or the state-space or convolution layer in its place), MLP, and the experts inside.
"""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from moe_lens.model.families.family import Family, Layout
from moe_lens.model.hooks.components import LayerPart, Norm, Unembedding, adapt
from moe_lens.model.hooks.moe_block import BareExperts, MoEBlock
from moe_lens.model.hooks.recomputing import KeptWhileHooked
from moe_lens.model.tl_compat import (
    ArchitectureAdapter,
    BlockBridge,
    EmbeddingBridge,
    GeneralizedComponent,
    NormalizationBridge,
    UnembeddingBridge,
)

MIXERS = {"self_attn": "attn", "linear_attn": "linear_attn", "mamba": "mamba", "conv": "conv"}
"""Modules of a layer that mix positions, and the names of their components; a layer has one of them."""


def centres(module: nn.Module) -> bool:
    """Whether a norm subtracts the mean."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("LayerNorm")


def adds_one(module: nn.Module) -> bool | None:
    """Whether an RMS norm multiplies by 1 + weight, not by weight; None if by neither. A family may have both kinds."""
    probe: Any = copy.copy(module)
    probe.__dict__["_parameters"] = {
        name: None if weight is None else torch.full(weight.shape, 0.5, device="cpu")
        for name, weight in module._parameters.items()
    }
    with torch.no_grad():
        large = torch.full((1, 1, probe.weight.shape[-1]), 1e3, device="cpu")  # beside which any eps is nothing
        times = type(module).forward(probe, large).mean().item()
    return next((found for found, factor in ((False, 0.5), (True, 1.5)) if abs(times - factor) < 0.01), None)


def norm_of(name: str, module: nn.Module, cfg: Any) -> GeneralizedComponent:
    """The component of a norm: with `hook_scale` and `hook_normalized` where it is an ordinary one."""
    kind = type(module).__name__
    if centres(module):
        return adapt(NormalizationBridge(name, cfg, uses_rms_norm=False, uses_weight_offset=False), Norm)
    ordinary = hasattr(module, "weight") and not any(word in kind for word in ("Gated", "InputScaled"))
    if kind.endswith("RMSNorm") and ordinary and (offset := adds_one(module)) is not None:
        return adapt(NormalizationBridge(name, cfg, uses_rms_norm=True, uses_weight_offset=offset), Norm)
    return LayerPart(name)


class Layer(KeptWhileHooked, BlockBridge):
    """A decoder layer: its parts are what the layer at hand has of those that its family can have."""

    family: Family
    hook_aliases: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, name: str, family: Family, cfg: Any):
        super().__init__(name, submodules={}, hook_alias_overrides={})
        self.__dict__.update(family=family, cfg=cfg)
        del self.hook_mlp_in
        self._hook_registry.pop("hook_mlp_in")
        layout = _layout(family)
        self.hook_aliases = {} if layout.streams else {"hook_resid_pre": "hook_in", "hook_resid_post": "hook_out"}

    def _maybe_wire_capture_hooks(self) -> None:
        """TransformerLens's further points on the inputs of attention and MLP: not here."""

    def set_original_component(self, original_component: nn.Module) -> None:
        """Wrap a layer, and find its parts."""
        super().set_original_component(original_component)
        layout = _layout(self.family)
        parts: dict[str, GeneralizedComponent] = {}
        layer: Any = original_component
        mlp = getattr(layer, layout.mlp, None)
        mixer = layout.attn or next((name for name in MIXERS if getattr(layer, name, None) is not None), None)
        single = mixer is None and layout.ln1 == layout.ln2  # a layer that either mixes positions or is an MLP
        if single and mlp is not None and not hasattr(mlp, "experts"):
            mixer, mlp = layout.mlp, None
        ln2 = None if single and mlp is None else layout.ln2
        ln1 = None if single and mlp is not None else layout.ln1
        for key, name in (("ln1", ln1), ("ln1_post", layout.ln1_post), ("ln2", ln2), ("ln2_post", layout.ln2_post)):
            module = _find(layer, name)
            if name is not None and module is not None:
                parts[key] = norm_of(name, module, self.__dict__["cfg"])
        if mixer is not None:
            parts[MIXERS.get(mixer, "attn")] = LayerPart(mixer)
        if mlp is not None:
            block = adapt(LayerPart(layout.mlp), BareExperts if layout.bare else MoEBlock)
            block.__dict__.update(family=self.family, layer=layer)
            parts["mlp"] = block
        for key, name in layout.others:
            parts[key] = norm_of(name, _find(layer, name), self.__dict__["cfg"])
        # Parts inside others come last: they are looked up through the wrapped ones.
        self.submodules = dict(sorted(parts.items(), key=lambda part: (part[1].name or "").count(".")))
        if layout.multiplier is not None:
            for key in (*MIXERS.values(), "mlp"):
                if key in parts:
                    parts[key].__dict__["multiplied"] = layer, layout.multiplier
        if "mlp" in parts and "ln2_post" in parts and str(layout.ln2_post).startswith(f"{layout.mlp}."):
            parts["mlp"].__dict__["shows_output"] = False
            parts["ln2_post"].__dict__["summed_point"] = parts["mlp"].hook_out
        aliases = dict(self.hook_aliases)
        if layout.stream not in ("shortcut", "other"):
            mixed = next((key for key in MIXERS.values() if key in parts), None)
            if mixed is not None:
                aliases["hook_attn_out"] = "ln1_post.hook_out" if "ln1_post" in parts else f"{mixed}.hook_out"
            if "mlp" in parts and layout.stream != "rescaled":
                aliases["hook_mlp_out"] = "ln2_post.hook_out" if "ln2_post" in parts else "mlp.hook_out"
        self.hook_aliases = aliases
        if layout.stream in ("sequential", "rescaled") and "mlp" in parts:
            self.hook_resid_mid = HookPoint()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; experts that stand in it without a block of their own learn from it how many tokens come."""
        mlp = self._modules.get("mlp")
        stream = args[0] if args else kwargs["hidden_states"]
        with mlp.passing(*stream.shape[:2]) if isinstance(mlp, BareExperts) else nullcontext():
            return super().forward(*args, **kwargs)


def _layout(family: Family) -> Layout:
    assert family.layout is not None
    return family.layout


def _find(module: Any, path: str | None) -> Any:
    for name in (path or "").split(".") if path else ():
        module = getattr(module, name, None)
    return module if path else None


class GenericAdapter(ArchitectureAdapter):
    """Hooks at the boundaries that a family's `Layout` names."""

    def __init__(self, cfg: Any, family: Family, model: nn.Module):
        super().__init__(cfg)
        self.family = family
        layout = _layout(family)
        self.weight_processing_conversions = {}
        # What TransformerLens reconstructs in its own norms and shows of a config.
        self._set_rms_rotary_defaults()
        self.cfg.rmsnorm_uses_offset = layout.offset
        config: Any = model.config
        self.text = text = config.get_text_config()
        layers = _find(model, f"{layout.decoder}.{layout.layers}")
        self.cfg.n_layers = len(layers)  # configs may count a layer as two
        factor = getattr(text, layout.embed_multiplier) if layout.embed_multiplier else 1.0
        norm = f"{layout.decoder}.{layout.final_norm}"
        if centres(_find(model, norm)):
            self.cfg.normalization_type, self.cfg.uses_rms_norm, self.cfg.final_rms = "LN", False, False
        self.component_mapping = {
            "embed": EmbeddingBridge(f"{layout.decoder}.{layout.embed}", output_contribution_scale=float(factor)),
            "blocks": Layer(f"{layout.decoder}.{layout.layers}", family, self.cfg),
            "ln_final": norm_of(norm, _find(model, norm), self.cfg),
            "unembed": adapt(UnembeddingBridge(layout.head), Unembedding),
        }

    @property
    def logits_factor(self) -> float:
        """What the family multiplies the unembedding's output by."""
        layout, text = _layout(self.family), self.text
        factor = float(getattr(text, layout.logits_multiplier)) if layout.logits_multiplier else 1.0
        return factor / float(getattr(text, layout.logits_divisor)) if layout.logits_divisor else factor

    @property
    def n_logits(self) -> int | None:
        """How many tokens have logits; None for all that are embedded."""
        return getattr(self.text, "unpadded_vocab_size", None)

    def apply_output_logits_transform(self, logits: torch.Tensor) -> Tensor:
        """What the family does to the unembedding's output: cuts off what pads the vocabulary, scales it, bounds it."""
        return super().apply_output_logits_transform(logits[..., : self.n_logits] * self.logits_factor)
