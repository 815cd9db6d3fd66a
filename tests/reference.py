"""DeepSeekMoE written out once more, from the equations of arXiv 2401.06066 and on the checkpoint's own tensors.

Independent of moe_lens and of transformers' model classes, slow and short. `edit` sees every intermediate value under
its hook name (`blocks.2.mlp.hook_expert_out`, …; shapes of the hook table) and what it returns takes effect: router
logits re-route, indices make the weights follow, anything else is used as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Edit = Callable[[str, Tensor], Tensor]


def rotary(config: Mapping[str, Any], position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [batch, pos, head width]; the frequencies are float32 constants in every dtype, as originally."""
    width = config["hidden_size"] // config["num_attention_heads"]
    base, scaling = float(config.get("rope_theta", 10000.0)), config.get("rope_scaling") or {}
    factor, longest = scaling.get("factor", 1.0), config["max_position_embeddings"]
    length = int(position_ids.max()) + 1
    if scaling.get("type") == "dynamic" and length > longest:
        base *= (factor * length / longest - (factor - 1)) ** (width / (width - 2))
    frequency = 1.0 / base ** (torch.arange(0, width, 2).float() / width)
    if scaling.get("type") == "linear":
        frequency = frequency / factor
    angle = position_ids[..., None].to(dtype) * frequency.to(dtype)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def attention(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [batch, pos, d] and pattern [batch, head, query, key]."""
    heads = config["num_attention_heads"]
    groups = heads // (config.get("num_key_value_heads") or heads)
    batch, pos, _ = x.shape

    def project(name: str) -> Tensor:
        y = F.linear(x, weights[f"{name}_proj.weight"], weights.get(f"{name}_proj.bias"))
        return y.view(batch, pos, -1, config["hidden_size"] // heads).transpose(1, 2)

    def rotate(y: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        return y * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    q, k = rotate(project("q")), rotate(project("k")).repeat_interleave(groups, 1)
    v = project("v").repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    pattern = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    z = (pattern @ v).transpose(1, 2).reshape(batch, pos, -1)
    return F.linear(z, weights["o_proj.weight"], weights.get("o_proj.bias")), pattern


def moe(weights: Mapping[str, Tensor], config: Mapping[str, Any], x: Tensor, edit: Edit) -> Tensor:
    """One Mixture-of-Experts layer; slots are in rank order, by the routing weights before any edit of them."""
    logits = edit("hook_router_logits", F.linear(x, weights["gate.weight"]))
    affinity = logits.softmax(-1)
    indices = affinity.sort(dim=-1, descending=True, stable=True).indices[..., : config["num_experts_per_tok"]]
    indices = edit("hook_expert_indices", indices)
    gates = affinity.gather(-1, indices)
    if config.get("norm_topk_prob") and config["num_experts_per_tok"] > 1:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    gates = edit("hook_routing_weights", gates)

    def matrices(name: str) -> Tensor:
        stack = torch.stack([weights[f"experts.{e}.{name}_proj.weight"] for e in range(config["n_routed_experts"])])
        return stack[indices]

    activation = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[config.get("hidden_act", "silu")]
    pre = edit("hook_expert_pre", torch.einsum("bpd,bpkmd->bpkm", x, matrices("gate")))
    linear = edit("hook_expert_pre_linear", torch.einsum("bpd,bpkmd->bpkm", x, matrices("up")))
    post = edit("hook_expert_post", activation(pre) * linear)
    out = edit("hook_expert_out", torch.einsum("bpkm,bpkdm->bpkd", post, matrices("down")))
    weighted = edit("hook_expert_weighted", out * gates[..., None])
    routed = edit("hook_routed_out", weighted.sum(2))
    if not config.get("n_shared_experts"):
        return routed
    return routed + edit("hook_shared_out", mlp(within(weights, "shared_experts."), activation, x))


def mlp(weights: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    hidden = activation(x @ weights["gate_proj.weight"].T) * (x @ weights["up_proj.weight"].T)
    return hidden @ weights["down_proj.weight"].T


def within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def forward(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    input_ids: Tensor,
    *,
    edit: Edit = lambda _, value: value,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """Run the model in the dtype of `tensors` (original names), and return every intermediate value by hook name.

    Beside the hook table: `blocks.{l}.attn.hook_pattern`, `blocks.{l}.ln1.out`, `ln_final.out`, `logits` and `loss`
    (mean next-token cross-entropy in nats, over all positions). `edit` sees and changes the hook table's alone.
    """
    values: dict[str, Tensor] = {}

    def hook(name: str, value: Tensor) -> Tensor:
        values[name] = edit(name, value)
        return values[name]

    def norm(name: str, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * tensors[f"{name}.weight"]

    batch, pos = input_ids.shape
    dtype = tensors["model.norm.weight"].dtype
    position_ids = torch.arange(pos)[None].expand(batch, pos) if position_ids is None else position_ids
    seen = torch.ones(batch, pos, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    mask = torch.ones(pos, pos, dtype=torch.bool).tril() & seen[:, None]
    mask = mask | (~mask.any(-1, keepdim=True))  # a padded query with nothing to look at looks everywhere
    cos, sin = rotary(config, position_ids, dtype)
    x = hook("hook_embed", tensors["model.embed_tokens.weight"][input_ids])
    for layer in range(config["num_hidden_layers"]):
        weights, block = within(tensors, f"model.layers.{layer}."), f"blocks.{layer}."
        x = hook(f"{block}hook_resid_pre", x)
        normed = values[f"{block}ln1.out"] = norm(f"model.layers.{layer}.input_layernorm", x)
        out, pattern = attention(within(weights, "self_attn."), config, normed, cos, sin, mask)
        values[f"{block}attn.hook_pattern"] = pattern
        x = hook(f"{block}hook_resid_mid", x + hook(f"{block}hook_attn_out", out))
        u = hook(f"{block}mlp.hook_in", norm(f"model.layers.{layer}.post_attention_layernorm", x))
        own = within(weights, "mlp.")
        if "gate.weight" in own:
            out = moe(own, config, u, lambda name, value, block=block: hook(f"{block}mlp.{name}", value))
        else:
            out = mlp(own, F.silu, u)
        x = hook(f"{block}hook_resid_post", x + hook(f"{block}hook_mlp_out", out))
    values["ln_final.out"] = norm("model.norm", x)
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    values["logits"] = F.linear(values["ln_final.out"], tensors[head])
    values["loss"] = F.cross_entropy(values["logits"][:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    return values
