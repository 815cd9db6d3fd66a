"""Every family's MoE layer written out once more: loops over tokens, no packing, nothing of moe_lens's own kernel.

`install` puts it into a plain transformers model, so that a whole forward pass shows what an edit does to the logits.
`edit(name, value)` sees each value of the hook table under its hook name and shape; what it returns takes effect.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

Edit = Callable[[str, Tensor], Tensor]


def unedited(name: str, value: Tensor) -> Tensor:
    return value


def largest(values: Tensor, count: int) -> list[int]:
    """Positions of the largest values, largest first, ties to the lowest position."""
    numbers = values.tolist()
    return sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))[:count]


def allowed_experts(scores: Tensor, groups: int, kept: int, best_of_group: int) -> list[int]:
    """Experts of the groups whose best experts score highest together."""
    size = len(scores) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    group_scores = torch.stack([scores[list(m)].sort(descending=True).values[:best_of_group].sum() for m in members])
    return sorted(e for g in largest(group_scores, kept) for e in members[g])


def choose(config: Any, logits: Tensor, bias: Tensor | None, k: int) -> tuple[list[int], Tensor]:
    """Experts that one token uses, and the affinity of all experts."""
    kind = config.model_type
    if kind == "gpt_oss":
        return largest(logits, k), logits.exp()  # what a softmax over all would divide by cancels below
    if kind == "deepseek_v3":
        assert bias is not None
        affinity = 1 / (1 + (-logits.float()).exp())
        allowed = allowed_experts(affinity + bias, config.n_group, config.topk_group, 2)
        return [allowed[i] for i in largest((affinity + bias)[allowed], k)], affinity
    exponent = (logits if kind == "deepseek" else logits.float()).exp()
    affinity = exponent / exponent.sum()
    if kind == "deepseek_v2" and config.topk_method == "group_limited_greedy":
        allowed = allowed_experts(affinity, config.n_group, config.topk_group, 1)
        return [allowed[i] for i in largest(affinity[allowed], k)], affinity
    return largest(affinity, k), affinity


def weigh(config: Any, affinity: Tensor, chosen: list[int]) -> Tensor:
    """Routing weights of the chosen experts, with the family's normalisation and scale."""
    weights = affinity[chosen]
    kind = config.model_type
    if kind in ("gpt_oss", "mixtral") or (kind != "deepseek_v2" and config.norm_topk_prob):
        weights = weights / weights.sum()
    return weights * config.routed_scaling_factor if kind in ("deepseek_v2", "deepseek_v3") else weights


class PlainExpert:
    """One expert: `pre` and `pre_linear` from x, `post` from both, `out` from `post`."""

    def __init__(self, config: Any, experts: Any, index: int):
        self.oss = config.model_type == "gpt_oss"
        self.limit, self.alpha = getattr(config, "swiglu_limit", 0.0), getattr(config, "swiglu_alpha", 0.0)
        first, self.down = experts.gate_up_proj[index], experts.down_proj[index]
        if self.oss:
            self.gate, self.up = first.T[0::2], first.T[1::2]
            self.down = self.down.T
            bias = experts.gate_up_proj_bias[index]
            self.gate_bias, self.up_bias = bias[0::2], bias[1::2]
            self.down_bias = experts.down_proj_bias[index]
        else:
            half = first.shape[0] // 2
            self.gate, self.up = first[:half], first[half:]
            self.gate_bias = self.up_bias = self.down_bias = 0.0

    def pre(self, x: Tensor) -> Tensor:
        return self.gate @ x + self.gate_bias

    def pre_linear(self, x: Tensor) -> Tensor:
        return self.up @ x + self.up_bias

    def post(self, pre: Tensor, linear: Tensor) -> Tensor:
        if self.oss:
            pre, linear = pre.clamp(max=self.limit), linear.clamp(-self.limit, self.limit)
            return pre / (1 + (-self.alpha * pre).exp()) * (linear + 1)
        return pre / (1 + (-pre).exp()) * linear

    def out(self, post: Tensor) -> Tensor:
        return self.down @ post + self.down_bias


def plain_moe(config: Any, moe: Any, x: Tensor, edit: Edit = unedited) -> Tensor:
    """The MoE layer's output [b, p, d] from what enters it."""
    x = edit("hook_in", x)
    batch, pos, _ = x.shape
    where = [(b, p) for b in range(batch) for p in range(pos)]
    router = moe.router if config.model_type == "gpt_oss" else moe.gate
    wide = torch.float32 if config.model_type in ("deepseek_v2", "deepseek_v3") else x.dtype
    logits = x.to(wide) @ router.weight.to(wide).T + (router.bias if config.model_type == "gpt_oss" else 0)
    logits = edit("hook_router_logits", logits)

    counts = edit("hook_n_active", torch.full((batch, pos, 1), config.num_experts_per_tok))
    n_slots = int(counts.max())

    routed_by: dict[tuple[int, int], tuple[list[int], Tensor]] = {}
    for at in where:
        chosen, affinity = choose(config, logits[at], getattr(router, "e_score_correction_bias", None), int(counts[at]))
        chosen = sorted(chosen)
        routed_by[at] = [chosen[i] for i in largest(affinity[chosen], len(chosen))], affinity
    indices = torch.tensor([(routed_by[at][0] + [-1] * n_slots)[:n_slots] for at in where]).view(batch, pos, -1)
    indices = edit("hook_expert_indices", indices)
    each_weights = [weigh(config, routed_by[at][1], indices[at][: int(counts[at])].tolist()) for at in where]
    weights = torch.stack([pad(weights, (0, n_slots - len(weights))) for weights in each_weights])
    weights = weights.view(batch, pos, -1)
    if config.model_type not in ("mixtral", "deepseek_v2", "deepseek_v3"):
        weights = weights.to(logits.dtype)
    weights = edit("hook_routing_weights", weights)
    kept = edit("hook_expert_kept", indices >= 0)

    experts = [PlainExpert(config, moe.experts, e) for e in range(moe.experts.num_experts)]
    slots = [(b, p, k) for b, p in where for k in range(indices.shape[-1])]

    def each(compute: Callable[[PlainExpert, tuple[int, int, int]], Tensor]) -> Tensor:
        rows = [compute(experts[int(indices[slot])], slot) for slot in slots]
        rows = [row if kept[slot] else torch.zeros_like(row) for row, slot in zip(rows, slots, strict=True)]
        return torch.stack(rows).view(*indices.shape, -1)

    pre = edit("hook_expert_pre", each(lambda expert, slot: expert.pre(x[slot[:2]])))
    linear = edit("hook_expert_pre_linear", each(lambda expert, slot: expert.pre_linear(x[slot[:2]])))
    post = edit("hook_expert_post", each(lambda expert, slot: expert.post(pre[slot], linear[slot])))
    out = edit("hook_expert_out", each(lambda expert, slot: expert.out(post[slot])))
    weighted = edit("hook_expert_weighted", out * weights[..., None])
    routed = edit("hook_routed_out", weighted.sum(2).to(x.dtype))
    shared = getattr(moe, "shared_expert", None) or getattr(moe, "shared_experts", None)
    if shared is not None:
        hidden = x @ shared.gate_proj.weight.T
        hidden = hidden / (1 + (-hidden).exp()) * (x @ shared.up_proj.weight.T)
        shared_out = hidden @ shared.down_proj.weight.T
        if config.model_type == "qwen2_moe":
            shared_out = shared_out / (1 + (-(x @ moe.shared_expert_gate.weight.T)).exp())
        routed = routed + edit("hook_shared_out", shared_out)
    return edit("hook_out", routed)


class Installed:
    """A transformers model whose MoE layers run `plain_moe`; call it with tokens and an edit, then read `.values`."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.edit = model, unedited
        self.values: dict[str, Tensor] = {}
        for layer, block in enumerate(model.model.layers):
            if hasattr(block.mlp, "experts"):
                block.mlp.forward = lambda x, layer=layer, moe=block.mlp: self._run(layer, moe, x)
            block.post_attention_layernorm.register_forward_pre_hook(
                lambda _, args, layer=layer: self._mid(layer, args[0])
            )

    def _hook(self, name: str, value: Tensor) -> Tensor:
        self.values[name] = value = self.edit(name, value)
        return value

    def _run(self, layer: int, moe: Any, x: Tensor) -> Any:
        out = plain_moe(self.model.config, moe, x, lambda name, value: self._hook(f"blocks.{layer}.mlp.{name}", value))
        return (out, None) if self.model.config.model_type == "gpt_oss" else out

    def _mid(self, layer: int, stream: Tensor) -> None:
        # The block adds to this very tensor afterwards: the edit is the residual stream's.
        edited = self._hook(f"blocks.{layer}.hook_resid_mid", stream.clone())
        if not torch.equal(edited, stream):
            stream.copy_(edited)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, edit: Edit = unedited, **kwargs: Any) -> Tensor:
        self.edit, self.values = edit, {}
        try:
            return self.model(tokens, **kwargs).logits
        finally:
            self.edit = unedited
