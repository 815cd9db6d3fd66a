# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Does knowledge of a domain sit in experts of its own?
#
# You learn here to ask whether knowledge of a domain sits in few experts, with a control that carries as much routing weight.
#
# Experts are picked for a domain on one half of its sources and ablated on the other half, and the other way
# round. The control is matched coalitions: other experts that carry as much of the domain's routing weight.
# `moe-lens localise` does this with 40 of them, and more text.

# %%
import torch

from moe_lens import HookedMoE
from moe_lens.data import Reading, embedded_domains
from moe_lens.studies import Localisation, run
from moe_lens.viz import localisation_costs

model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
texts = [domain for domain in embedded_domains() if domain.name in ("german", "code")]
study = Localisation(matched=4, how=("reroute",))
result = run(study, model, texts, reading=Reading(tokens=320, context=32))

# %% [markdown]
# `own` is the increase of the domain's loss without its experts, `others` the increase of the other domain's loss, in nats a
# token; `control_own` and `control_others` are the same for matched coalitions. `estimate` is the difference of both
# differences; intervals need ten sources. `experts` is how many are ablated, and `mass` the share of the routing weight
# that they carry.

# %%
columns = ["domain", "estimate", "low", "high", "own", "others", "control_own", "control_others", "experts"]
columns += ["control_experts", "mass", "control_mass", "sources"]
table = result.tables["contrast"].query("control == 'matched'")[columns]
print(table.set_index("domain").T.round(2))

# %% [markdown]
# A matched coalition is much larger than the picked one, and costs the other domain more: look at `own` beside
# `control_own`, too.

# %%
picked = result.tables["coalitions"].query("coalition == 'picked'")
for domain, rows in picked.groupby("domain"):
    halves = [set(zip(half["layer"], half["expert"], strict=True)) for _, half in rows.groupby("out_of")]
    print(domain, "picked on both halves:", sorted(halves[0] & halves[1]))

# %%
figure = localisation_costs(result)
drawn = figure.to_dict()
print(drawn["layout"]["yaxis"]["title"]["text"], [bars["name"] for bars in drawn["data"]])
