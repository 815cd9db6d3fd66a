"""Interventions on the plain re-implementation, written as loops over tokens: what ours are held against."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.plain_moe import Edit, allowed_experts, largest
from tests.wrapped import Case

FP32 = 1e-5  # relative to the largest logit; an edit in one layer
LAYERS = 2e-5  # edits in several layers


def bound(plain: Tensor, relative: float = FP32) -> float:
    return relative * plain.abs().max().item()


class Notes:
    """An edit that notes what a layer's hooks see, and hands each value to the functions that are there for it."""

    def __init__(self, edits: dict[str, Callable[[int, Tensor], Tensor]]):
        self.edits, self.values = edits, {}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        _, layer, *_, hook = name.split(".")
        if ".mlp." not in name or not layer.isdigit():
            return value
        edit = self.edits.get(hook)
        value = value if edit is None else edit(int(layer), value.clone())
        self.values[int(layer), hook] = value
        return value

    def seen(self, layer: int, hook: str) -> Tensor:
        return self.values[layer, hook]


Slots = Callable[[int, Tensor], Tensor]
"""(layer, indices) → which slots are meant."""


def slots_of(experts: Mapping[int, Iterable[int]]) -> Slots:
    def chosen(layer: int, indices: Tensor) -> Tensor:
        wanted = set(experts.get(layer, ()))
        return torch.tensor([[[e in wanted for e in token] for token in row] for row in indices.tolist()])

    return chosen


def zeroed(slots: Slots, renormalize: bool = False) -> Edit:
    """Weighted outputs set to zero, the others rescaled."""

    def edit(layer: int, weighted: Tensor) -> Tensor:
        out = slots(layer, notes.seen(layer, "hook_expert_indices"))
        weights = notes.seen(layer, "hook_routing_weights")
        for b, p in [(b, p) for b in range(len(weighted)) for p in range(weighted.shape[1])]:
            whole = sum(weights[b, p, k].item() for k in range(weights.shape[2]))
            rest = sum(weights[b, p, k].item() for k in range(weights.shape[2]) if not out[b, p, k])
            for k in range(weights.shape[2]):
                if out[b, p, k]:
                    weighted[b, p, k] = 0
                elif renormalize:
                    weighted[b, p, k] *= whole / rest
        return weighted

    notes = Notes({"hook_expert_weighted": edit})
    return notes


def replaced(slots: Slots, value: Callable[[int, int, int, int, int], Tensor]) -> Edit:
    """Outputs replaced, by `value(layer, expert, batch, pos, rank)`."""

    def edit(layer: int, outputs: Tensor) -> Tensor:
        indices = notes.seen(layer, "hook_expert_indices")
        for b, p, k in slots(layer, indices).nonzero().tolist():
            outputs[b, p, k] = value(layer, int(indices[b, p, k]), b, p, k)
        return outputs

    notes = Notes({"hook_expert_out": edit})
    return notes


def candidates(case: Case, layer: int, logits: Tensor) -> tuple[Tensor, list[int]]:
    """What the family takes the largest of, for one token, and the experts that it takes them from."""
    config: Any = case.hf.config
    kind = config.model_type
    if kind == "gpt_oss":
        return logits, list(range(8))
    if kind == "deepseek_v3":
        bias = case.hf.model.layers[layer].mlp.gate.e_score_correction_bias
        scores = logits.float().sigmoid() + bias
        return scores, allowed_experts(scores, config.n_group, config.topk_group, 2)
    scores = logits.softmax(-1)
    if kind == "deepseek_v2" and config.topk_method == "group_limited_greedy":
        return scores, allowed_experts(scores, config.n_group, config.topk_group, 1)
    return scores, list(range(8))


def rerouted(case: Case, wishes: Callable[[int, int, int, list[int]], tuple[set[int], set[int]]]) -> Edit:
    """Experts forced out of and into the selection: `wishes(layer, batch, pos, chosen)` → (out, in)."""

    def edit(layer: int, indices: Tensor) -> Tensor:
        logits = notes.seen(layer, "hook_router_logits")
        for b, p in [(b, p) for b in range(len(indices)) for p in range(indices.shape[1])]:
            chosen: list[Any] = indices[b, p].tolist()
            out, into = wishes(layer, b, p, chosen)
            scores, allowed = candidates(case, layer, logits[b, p])
            chosen = [None if e in out else e for e in chosen]
            for e in sorted(into - set(chosen), key=lambda e: -scores[e].item()):
                if None not in chosen:
                    weakest = min((c for c in chosen if c not in into), key=lambda c: scores[c].item())
                    chosen[chosen.index(weakest)] = None
                chosen[chosen.index(None)] = e
            free = [e for e in allowed if e not in chosen and e not in out]
            for e in [free[i] for i in largest(scores[free], len(free))][: chosen.count(None)]:
                chosen[chosen.index(None)] = e
            indices[b, p] = torch.tensor(chosen)
        return indices

    notes = Notes({"hook_expert_indices": edit})
    return notes
