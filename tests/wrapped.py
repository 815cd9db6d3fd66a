"""Each tiny family once: wrapped, as transformers' own, and with the plain re-implementation inside."""

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedModel

from moe_lens import names
from moe_lens.hooked_moe import HookedMoE
from tests.families import build, tokens
from tests.plain_moe import Installed

GATED = ("hook_mlp_in", "attn.hook_result", "_input", "attn_in")
"""Endings of TransformerLens's hooks that stay silent until a `set_use_…` switches them on."""

INNER = re.compile(r"attn\.(hook_(?!in$|out$)|kv_b_proj\.)")
"""Hook points of the attention module itself (scores, pattern, rotated and normed queries and keys, latents, cosines,
and queries, keys and values of DeepSeek-V2 and V3): listening to one selects TransformerLens's eager attention."""
INNER_OF_HEADS = re.compile(rf"{INNER.pattern}|attn\.[qk]_norm\.")
"""The same in Qwen3, whose norms of queries and keys are of each head."""


def plain_transformers(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A family's model, with the experts that transformers itself would choose; its grouped products refuse float64."""
    model = build(name, dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model


class Case:
    """A family's wrapped model; `hf` and `plain` are further copies of the same weights, never wrapped."""

    def __init__(self, name: str, dtype: torch.dtype):
        self.name, self.dtype = name, dtype
        self.tokens = tokens()
        hf = plain_transformers(name, dtype)
        with torch.no_grad():
            self.logits: Tensor = hf(self.tokens).logits  # before wrapping
        self.model = HookedMoE.from_hf(hf, check=False)
        self.last = self.model.moe_layers[-1]
        points = {name: point.name or name for name, point in self.model.hook_dict.items()}
        self.fire = {name for name in points if not name.endswith(GATED)}
        """Hook names, canonical or not, that fire."""
        inner = INNER_OF_HEADS if name == "qwen3_moe" else INNER
        self.exact = {name for name in self.fire if not inner.search(points[name])}
        """Those that can be listened to without selecting eager attention."""
        self.found = self.state()
        self.weights = [tensor.clone() for tensor in self.tensors()]

    def tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def state(self) -> dict[str, Any]:
        """What tests that share the model must leave as it was, as they must its weights."""
        model: Any = self.model
        config = model.original_model.config
        switches = {name: bool(value) for name, value in vars(model.cfg).items() if name.startswith("use_")}
        return {
            "hooks": listening(model),
            "claimed": model.owner.claimed,
            "training": [name for name, module in model.named_modules() if module.training],
            "parameters": [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()],
            "attention": config._attn_implementation,
            "switches": switches,
            "tokenizer": model.tokenizer,
        }

    def check(self) -> None:
        """Nothing, if it is as it was found; hook points of single experts, which stay once made, are removed."""
        model, found, self.found = self.model, self.found, self.state()
        assert self.found == found, f"a test has changed the shared model {self.name!r}"
        assert all(map(torch.equal, self.tensors(), self.weights)), f"a test has changed weights of {self.name!r}"
        for hooks in (hooks for _, hooks in model._layer_hooks()):
            hooks.experts.clear()
        for name in [name for name in model.hook_dict if names.parse_expert(name) is not None]:
            del model._all_hooks[name], model._hook_registry[name]

    def some(self) -> list[str]:
        """One name for each hook point that fires, of the first and of the last layer and outside of the layers."""
        names = {self.model.hook_dict[name].name or name for name in self.fire}
        return sorted(n for n in names if n.startswith(("blocks.0.", f"blocks.{self.last}.")) or "blocks" not in n)

    @property
    def hf(self) -> PreTrainedModel:
        return _hf(self.name, self.dtype)

    @property
    def plain(self) -> Installed:
        return _plain(self.name, self.dtype)


SHARED: list[Case] = []
"""Those that the test that runs has asked for."""


def wrapped(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """A model for many tests; each leaves it as it was, which is checked when it ends."""
    case = _case(name, dtype)
    SHARED.append(case)
    return case


def check_shared() -> None:
    """Whether the models that a test has used are as they were before."""
    used = {id(case): case for case in SHARED}
    SHARED.clear()
    for case in used.values():
        case.check()


@cache
def _case(name: str, dtype: torch.dtype) -> Case:
    return Case(name, dtype)


@cache
def _hf(name: str, dtype: torch.dtype) -> PreTrainedModel:
    return plain_transformers(name, dtype)


@cache
def _plain(name: str, dtype: torch.dtype) -> Installed:
    return Installed(plain_transformers(name, dtype))


def as_hook(change: Callable[[Tensor], Any]) -> Callable[[Tensor, HookPoint], Any]:
    return lambda value, hook: change(value)


def on(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
    """An `edit` for the plain re-implementation which changes one hook."""
    return lambda at, value: change(value) if at == name else value


def listening(model: HookedMoE) -> list[str]:
    """Hook points somebody still listens to."""
    found = [name for name, point in model.named_modules() if isinstance(point, HookPoint) and point.has_hooks()]
    return found + [name for name, point in model.hook_dict.items() if point.has_hooks()]


@contextmanager
def untouched(model: HookedMoE) -> Generator[None]:
    """The model must be without hooks afterwards."""
    yield
    assert listening(model) == []


def deviation(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()


def checkpoint_activations(model: Any) -> None:
    """Have transformers compute layers again in the backward pass, by the method's name on this transformers."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
