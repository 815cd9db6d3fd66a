# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A smaller model: which experts can go?
#
# You learn here to choose experts that can go, to measure the cost beside random choices, and to write the smaller checkpoint.
#
# Three methods choose which of the embedded model's experts to drop. Plans are measured before anything is written, on texts
# that they were not made from; then one becomes a checkpoint for transformers.

# %%
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from moe_lens import HookedMoE, viz
from moe_lens import pruning as prune
from moe_lens.data import embedded_domains

model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)

# %% [markdown]
# Each domain's sources are split into two halves: plans made from one half are measured on the other, and the other way round.

# %%
domains = [domain for domain in embedded_domains() if domain.name in ("french", "code")]
halves = prune.halved(domains, model, n_tokens=600, context=128)
found = prune.frontier(model, halves, ["reap", "frequency", "random"], keep=[0.5, 0.75], specialists="reap")
table = found.to_frame()
table[table["calibrated"] == "all"].pivot_table(index=["method", "kept"], columns="domain", values="ratio").round(2)

# %% [markdown]
# The table shows perplexity divided by that of the whole model. A method that is no better than `random` has found nothing.

# %%
folder = Path(tempfile.mkdtemp())
figure = viz.frontier(found)
figure.write_html(folder / "frontier.html")
figure

# %% [markdown]
# Specialists: models that keep the experts that one domain needs, measured on both domains.

# %%
viz.specialists(found, kept=32)

# %% [markdown]
# ## From a plan to a checkpoint
#
# Scores can be saved, and a plan is made from them. Its preview computes what the smaller model would, without a copy of the
# weights.

# %%
scores = prune.score(model, halves[0], "reap")
plan = prune.plan(scores, keep=0.5, domain="french")
print(plan)

prompt = model.to_tokens("Le système de fichiers est")
with torch.no_grad(), plan.preview(model):
    previewed = model(prompt)

# %% [markdown]
# The checkpoint has the family's own format. (For DeepSeekMoE, which transformers does not know, `from moe_lens import HookedMoE` comes
# first; Mixtral, OLMoE, Qwen-MoE and DeepSeek-V2 load without it.)

# %%
smaller = prune.export("tiny-deepseekmoe", plan, folder / "french-half")
loaded = AutoModelForCausalLM.from_pretrained(smaller, dtype=torch.float32)
with torch.no_grad():
    exported = loaded(prompt).logits
print(f"{loaded.config.n_routed_experts} experts a layer; largest difference {(exported - previewed).abs().max():.1e}")
assert (exported - previewed).abs().max() < 1e-5 * previewed.abs().max()
