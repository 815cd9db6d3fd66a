# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Which experts is a prediction due to?
#
# You learn here to say which experts a prediction is due to, exactly and by gradients, and to tell an expert's own effect from that of
# re-routing.
#
# An attribution says, for every expert of every layer, how much of a metric would be missing without it. Knock-outs are
# exact and cost a run for each expert; gradients estimate all of them with one forward and one backward pass.

# %%
import tempfile
from pathlib import Path

import torch

from moe_lens import HookedMoE
from moe_lens.interventions import LogitDifference, Loss, expert_attribution
from moe_lens.viz.attribution import attribution_map

model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
tokens = model.to_tokens("Der alte Mann sah auf das Meer und dachte an seine Frau.")
print(tokens.shape[1], "tokens; loss", Loss(tokens)(model(tokens)).item())

# %% [markdown]
# ## Three estimates, and the exact values
#
# A positive value raises the metric. The metric is a loss here, so experts that help the model have negative values. The
# result holds a value for every layer, expert and position; `total()` sums over positions.

# %%
cheap = {
    "direct": expert_attribution(model, tokens, Loss(tokens), method="direct"),
    "gradient": expert_attribution(model, tokens, Loss(tokens), method="gradient"),
    "integrated": expert_attribution(model, tokens, Loss(tokens), method="integrated", routing="frozen", steps=64),
}
truth = expert_attribution(model, tokens, Loss(tokens), method="knockout")
frozen = expert_attribution(model, tokens, Loss(tokens), method="knockout", routing="frozen")
active = truth.used() > 0


def ranks(values: torch.Tensor) -> torch.Tensor:
    return values[active].double().argsort().argsort().double()


print(int(active.sum()), "active pairs of layer and expert")
for name, found in cheap.items():
    with_free, with_frozen = (
        torch.corrcoef(torch.stack([ranks(found.total()), ranks(exact.total())]))[0, 1].item()
        for exact in (truth, frozen)
    )
    print(f"{name:10s} rank correlation with knock-out: {with_free:.2f}, routing frozen: {with_frozen:.2f}")

# %% [markdown]
# A map of the exact effects: the experts that this sentence would miss most are red.

# %%
figure = attribution_map(truth)
target = Path(tempfile.mkdtemp()) / "attribution.html"
figure.write_html(target)
print(f"{target.name}: {target.stat().st_size / 2**20:.1f} MiB")

# %% [markdown]
# ## Integrated gradients are complete
#
# Integrated gradients of a layer, with the routing of later layers frozen, sum to the effect of all its experts together.
# The first layer with experts writes most of the residual stream, so the loss changes steeply on the path from its
# baseline: with 16 steps, the default, the sum would still be 15 % off there.

# %%
integrated = cheap["integrated"]
assert integrated.difference is not None
for layer, found, expected in zip(integrated.layers, integrated.total().sum(1), integrated.difference, strict=True):
    print(f"layer {layer}: sum {found.item():+.5f}, all experts of the layer at once {expected.item():+.5f}")

# %% [markdown]
# ## Re-routing
#
# Knocking an expert out changes what later routers read, so some of them select other experts. Free − frozen is that part of
# the effect.

# %%
effect = truth.rerouting(frozen)
for layer, of, whole in zip(effect.layers, effect.total().abs(), truth.total().abs(), strict=True):
    print(f"layer {layer}: {of.sum().item() / whole.sum().item():.0%} of the size of the effects")

# %% [markdown]
# ## One prediction
#
# After "Der alte Mann sah auf", why is the next token " das" rather than " the"? The direct attribution to the difference of
# two logits is exact for what each expert itself writes to the residual stream; the table shows the largest.

# %%
prompt = model.to_tokens("Der alte Mann sah auf")
answer = LogitDifference(model.to_single_token(" das"), model.to_single_token(" the"))
direct = expert_attribution(model, prompt, answer, method="direct")
print("logit difference", round(direct.clean, 2), "of which experts write", round(direct.total().sum().item(), 2))
print(direct.to_frame().sort_values("value", ascending=False).head(5).to_string(index=False))
