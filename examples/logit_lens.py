# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What the model would predict after one expert
#
# You learn here to read what each expert would predict, in one position and over texts, beside the sums that show how much is due to it.
#
# The LogitLens over partial sums of experts: FinalNorm(u + Σ gᵣEᵣ) W_U, with u the residual stream between attention and
# experts, and the sum over some of the active experts (Figure 2 of arXiv 2603.05806), on the embedded model. Controls stand
# beside each sum, since u dominates all of them: a prediction that u alone makes is not due to an expert.

# %%
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from moe_lens import HookedMoE, LogitLens, PartialSum, viz
from moe_lens.data import embedded_domains

model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
lens = LogitLens(model)
figure2, controls = PartialSum.figure2(model.top_k), PartialSum.controls(model.top_k)
sums = (*figure2, *(which for which in controls if which not in figure2))
[which.label for which in sums]

# %% [markdown]
# ## One position
#
# Only the hooks that these sums need are cached. Rows are layers, columns are sums; a cell shows the most likely next token,
# and below it the expert and its weight. Layer 0 is dense: it has no experts.

# %%
text = "The old man looked at the sea. Der alte Mann sah auf das Meer, und"
_, cache = model.run_with_cache(text, names_filter=lens.hooks(sums=sums))
read = lens.decode(cache, sums)
Console(width=150).print(viz.lens_text(read, read.positions[-1]))

# %% [markdown]
# The same as a figure; hovering shows the five most likely tokens.

# %%
viz.lens_table(read, read.positions[-1])

# %% [markdown]
# ## A whole text
#
# One position is an anecdote. Over held-out text of every domain: how far is each sum's prediction from the model's final one
# (KL in nats), and is its most likely token the same?

# %%
frames = []
for domain in embedded_domains():
    tokens = model.to_tokens("\n".join(passage.text for passage in domain.passages[:5]), truncate=False)[0, :96]
    _, cache = model.run_with_cache(tokens, names_filter=lens.hooks(sums=sums))
    read = lens.decode(cache, sums)
    frames.append(read.to_frame().assign(domain=domain.name))
    print(f"{domain.name:12s}", len(tokens), "tokens")

# %%
frame: Any = pd.concat(frames)
frame.groupby(["sum", "layer"], sort=False)["kl_final"].mean().unstack().round(2)

# %%
frame.groupby(["sum", "layer"], sort=False)["agrees_final"].mean().unstack().round(2)

# %% [markdown]
# By how many nats does one expert bring u nearer to the final prediction? An expert that was not selected, added with the
# weight of rank 0, is the control: the difference between those two columns is due to the router's choice.

# %%
kl = frame[frame["layer"] > 0].groupby(["layer", "sum"])["kl_final"].mean().unstack()
pd.DataFrame(
    {name: kl["u"] - kl[f"u + {name}"] for name in ("rank 0", "random active expert", "rank 5", "unselected expert")}
).round(3)

# %% [markdown]
# ## Over layers
#
# KL, entropy and the rank of the next token for a few sums of the last domain; controls are grey and dashed.

# %%
few = [PartialSum(shared=True), PartialSum(), PartialSum(ranks=[0]), *controls]
viz.lens_trajectory(lens.decode(cache, few))

# %% [markdown]
# ## Adding experts one by one
#
# KL(ensemble ‖ lens): what the first j experts lack of all of them.

# %%
cumulative = PartialSum.cumulative(model.top_k)
some: Any = lens.decode(cache, cumulative, layers=model.moe_layers).to_frame()
some.groupby(["sum", "layer"], sort=False)["kl_ensemble"].mean().unstack().round(3)
