# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What the experts of a DeepSeekMoE do
#
# You learn here to load a model, to read routing and experts from its cache, to edit them with hooks, and to read through a lens.
#
# A small trained DeepSeekMoE is part of the package: 6 layers (the first is dense), 64 routed experts of
# which 6 are active, and 2 shared experts. It was trained on English, French and German prose, mathematics and Python code.

# %%
import torch
from transformer_lens.hook_points import HookPoint

from moe_lens import HookedMoE, LogitLens, PartialSum
from moe_lens.viz.coloured_tokens import routing_tokens

model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
print(model.moe_layers, model.n_experts, model.top_k, model.n_shared_experts)

# %% [markdown]
# ## Cache
#
# Every part of a MoE layer is a hook point. Slots are sorted by routing weight: rank 0 is the top expert.

# %%
text = "The old man looked at the sea. Der alte Mann sah auf das Meer. Le vieil homme regardait la mer."
logits, cache = model.run_with_cache(text)
for name in ("router_logits", "expert_indices", "routing_weights", "expert_out", "routed_out", "shared_out"):
    print(f"{name:16s} {tuple(cache[name, 3].shape)}")

# %% [markdown]
# The parts sum to the whole: the active experts' contributions plus the shared experts' output is what the layer adds to the
# residual stream.

# %%
parts = cache["expert_weighted", 3].sum(2) + cache["shared_out", 3]
print((parts - cache["mlp_out", 3]).abs().max().item())

# %% [markdown]
# ## Routing

# %%
routing = cache.routing(5)
for position in range(1, 16):
    token = model.to_str_tokens(text)[position]
    chosen = zip(routing.indices[0, position].tolist(), routing.weights[0, position].tolist(), strict=True)
    print(f"{token!r:12s}", "  ".join(f"{expert:2d}:{weight:.2f}" for expert, weight in chosen))

# %% [markdown]
# The same text, coloured by the weight of one expert: the one with the largest total weight in the German sentence, in the
# last layer.

# %%
tokens = [str(token) for token in model.to_str_tokens(text)]
german = slice(tokens.index(" Der"), tokens.index(" Le"))
expert = int(routing.dense_weights()[0, german].sum(0).argmax())
print("expert", expert)
routing_tokens(tokens, routing, expert=expert)

# %% [markdown]
# ## Hooks
#
# An edit is a function of the activation. Here that expert is first forbidden before selection (the router selects again, by
# its own rule); then, instead, its output alone is set to zero (the other experts keep their weights).


# %%
def forbid(router_logits: torch.Tensor, hook: HookPoint) -> torch.Tensor:
    router_logits[..., expert] = -torch.inf
    return router_logits


def silence(rows: torch.Tensor, hook: HookPoint) -> torch.Tensor:
    return torch.zeros_like(rows)


names = {
    "as it is": [],
    "forbidden": [("blocks.5.hook_router_logits", forbid)],
    "silenced": [(f"blocks.5.mlp.experts.{expert}.hook_out", silence)],
}
for name, hooks in names.items():
    loss = model.run_with_hooks(text, fwd_hooks=hooks, return_type="loss", loss_per_token=True)[0]
    inside = loss[german.start - 1 : german.stop - 1]
    print(f"{name:10s} German sentence {inside.mean().item():.3f} nats a token, whole text {loss.mean().item():.3f}")

# %% [markdown]
# ## A lens
#
# Any partial sum of experts can be read through the final norm and the unembedding. u, the residual stream before the experts,
# is the control: where it already predicts the same token, the expert has not changed the prediction.

# %%
sums = [PartialSum(ranks=[]), PartialSum(ranks=[0]), PartialSum()]
read = LogitLens(model).decode(cache, sums, positions=[german.stop - 2], top=3)
for layer in model.moe_layers:
    row = read.layers.index(layer)
    for column, which in enumerate(sums):
        best = read.top_tokens[row, column, 0, 0]
        probability = read.top_probs[row, column, 0, 0, 0].item()
        print(f"layer {layer}  {which.label:20s} {probability:.2f}  {model.to_str_tokens(best)}")
