# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What does an expert do? Ablate it
#
# You learn here to take experts out in four ways, to hold the cost against a control, to run with fewer experts or another text's routing,
# and to steer a generation.
#
# How often a router selects an expert says little about what the expert is for. Here experts of the embedded model are
# ablated in four ways, and the change of the loss says how much they mattered.

# %%
import tempfile
from pathlib import Path

import plotly.express as px
import torch

from moe_lens import HookedMoE
from moe_lens.data import TokenBatch, embedded_domains, tokenize
from moe_lens.interventions import ExpertMeans, Intervention

torch.manual_seed(0)
model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)

# %% [markdown]
# Text of three domains: one part to choose experts on, another to measure the loss on.

# %%
wanted = ("english", "french", "code")
domains = [domain for domain in embedded_domains() if domain.name in wanted]
texts = {domain.name: tokenize(domain, model, n_tokens=800, context=64, batch_tokens=256) for domain in domains}
chosen_on = {name: [batch for batch in batches][0::2] for name, batches in texts.items()}
measured_on = {name: [batch for batch in batches][1::2] for name, batches in texts.items()}


@torch.no_grad()
def loss(batches: list[TokenBatch], *interventions: Intervention) -> float:
    """Mean nats a token of text, with the interventions active."""
    nats, count = 0.0, 0
    for batch in batches:
        hooks = [hook for intervention in interventions for hook in intervention.fwd_hooks]
        logits = model.run_with_hooks(batch.tokens, fwd_hooks=hooks, attention_mask=batch.mask.long())
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
        counted = batch.counted[:, 1:]
        nats, count = nats - logprobs[counted].sum().item(), count + int(counted.sum())
    return nats / count


plain = {name: loss(batches) for name, batches in measured_on.items()}
print({name: round(value, 3) for name, value in plain.items()})

# %% [markdown]
# ## The experts that French text uses more than other text does
#
# In every layer: the three experts whose share of French tokens exceeds their mean share of the other domains' tokens most.


# %%
def shares(batches: list[TokenBatch]) -> torch.Tensor:
    """Share of the counted tokens that choose each expert [layer, expert]."""
    counts, tokens = torch.zeros(len(model.moe_layers), model.n_experts), 0
    for batch in batches:
        routing = model.routing(batch.tokens, attention_mask=batch.mask.long())
        chosen = routing.indices[:, batch.counted]
        counts += torch.stack([torch.bincount(of_layer.flatten(), minlength=model.n_experts) for of_layer in chosen])
        tokens += int(batch.counted.sum())
    return counts / tokens


share = {name: shares(batches) for name, batches in chosen_on.items()}
others = torch.stack([value for name, value in share.items() if name != "french"]).mean(0)
top = (share["french"] - others).topk(3).indices
french = {layer: experts.tolist() for layer, experts in zip(model.moe_layers, top, strict=True)}
print(french)

# %% [markdown]
# The control is three other experts of each layer that French text uses about as often, but that are not particular to French.

# %%
control = {}
for row, layer in enumerate(model.moe_layers):
    free = [e for e in range(model.n_experts) if e not in french[layer]]
    control[layer] = []
    for expert in french[layer]:
        gap = (share["french"][row, free] - share["french"][row, expert]).abs()
        control[layer].append(free.pop(int(gap.argmin())))
print(control)

# %% [markdown]
# ## Four ways to ablate them
#
# - `zero`: they add nothing, and are not computed.
# - `mean`: their output is their mean output over reference texts.
# - `resample`: their output is what they computed for another token of the batch.
# - `reroute`: the router cannot select them, and takes the next expert.

# %%
batches = [batch for of_domain in chosen_on.values() for batch in of_domain]
reference = [batch.tokens[row, batch.mask[row]] for batch in batches for row in range(len(batch.tokens))]
means = ExpertMeans.measure(model, reference).filled()
rows = []
for who, experts in (("French experts", french), ("control", control)):
    interventions = {
        "zero": model.ablate(experts),
        "mean": model.ablate(experts, how="mean", reference=means),
        "resample": model.ablate(experts, how="resample", fallback="mean", reference=means),
        "reroute": model.ablate(experts, how="reroute"),
    }
    for how, intervention in interventions.items():
        for domain, batches in measured_on.items():
            rows.append({"who": who, "how": how, "domain": domain, "nats": loss(batches, intervention) - plain[domain]})
for row in rows:
    if row["domain"] in ("french", "english"):
        print(f"{row['who']:15s} {row['how']:9s} {row['domain']:8s} {row['nats']:+.3f} nats a token")

# %% [markdown]
# The figure is written to a file, and shown.

# %%
figure = px.bar(rows, x="domain", y="nats", color="who", facet_col="how", barmode="group", height=340)
figure.update_layout(template="plotly_white", yaxis_title="loss added, nats a token")
target = Path(tempfile.mkdtemp()) / "ablation.html"
figure.write_html(target, include_plotlyjs="cdn")
print("saved", target.name)
figure

# %% [markdown]
# ## How many experts does a token need?
#
# Only k experts of every token are computed: those with the largest weights, or those with the smallest.

# %%
english = measured_on["english"]
for k in range(model.top_k + 1):
    kept, last = loss(english[:1], model.keep_top(k)), loss(english[:1], model.keep_top(k, by="last"))
    print(f"k = {k}: {kept:.3f} nats; with the k smallest weights instead {last:.3f}")

# %% [markdown]
# ## Which experts, or what they read?
#
# The routing of an English text is replayed on a French one: French is read by the English text's experts.

# %%
batch = measured_on["french"][0]
n = min(batch.tokens.shape[1], english[0].tokens.shape[1])
rows_of = min(len(batch.tokens), len(english[0].tokens))
ours, theirs = batch.tokens[:rows_of, :n], english[0].tokens[:rows_of, :n]
with torch.no_grad():
    own = model(ours, return_type="loss").item()
    with model.force_routing(model.routing(theirs)):
        swapped = model(ours, return_type="loss").item()
    with model.force_routing(model.routing(theirs), what="weights"):
        weights = model(ours, return_type="loss").item()
print(f"own routing {own:.3f}, English text's {swapped:.3f}, its weights alone {weights:.3f} nats a token")

# %% [markdown]
# ## Steering a generation
#
# The same experts are forced into the selection, or out of it, while the model generates.

# %%
prompt = "The old man"
on = model.steer_experts({layer: {expert: "on" for expert in experts} for layer, experts in french.items()})
off = model.steer_experts({layer: {expert: "off" for expert in experts} for layer, experts in french.items()})
for label, interventions in (("as it is", []), ("French experts on", [on]), ("off", [off])):
    torch.manual_seed(0)
    out = model.generate(prompt, max_new_tokens=12, do_sample=False, verbose=False, interventions=interventions)
    print(f"{label:18s} {out!r}")
