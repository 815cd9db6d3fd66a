# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # The paper's figures, with controls and verdicts
#
# "MoE Lens – An Expert Is All You Need" reads DeepSeekMoE 16B in three figures and a table. You learn here to draw each of them for
# any model and any texts, beside the control that it needs, and what may be concluded from it. The model is the embedded one and the
# texts are few, so that it takes seconds: `moe-lens report` is the same with more of both.

# %%
import torch

from moe_lens import HookedMoE, LogitLens, PartialSum, viz
from moe_lens.data import Reading, embedded_domains
from moe_lens.studies import LensStudy, RoutingStudy, SingleExpertStudy, judge, run

torch.set_num_threads(1)
model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
texts = [domain for domain in embedded_domains() if domain.name in ("german", "code")]
reading = Reading(tokens=240, context=24)  # of each domain; short windows, so that ten sources have their turn
studies = {
    "routing": run(RoutingStudy(nulls=True), model, texts, reading=reading),
    "single_expert": run(SingleExpertStudy(treatments=("dropped", "random")), model, texts, reading=reading),
    "lens": run(LensStudy(), model, texts, reading=reading),
}

# %% [markdown]
# Intervals are over sources, and there are none below ten: of a domain with fewer, all figures below show points alone.

# %%
sources = studies["routing"].tables["most_specialised"].groupby("domain")[["sources", "tokens"]].first()
assert min(sources["sources"]) >= 10, "a domain with fewer than ten sources has no interval"
sources

# %% [markdown]
# ## Figure 1: how specialised experts are
#
# In each layer, the share of a domain's tokens that have its most specialised expert among their active ones. Intervals are over
# sources; the null of the same colour is what the same texts give with a random router, by the token alone, and with uniform routing.

# %%
viz.most_specialised(studies["routing"])

# %% [markdown]
# How many experts of a layer take half of a domain's assignments, beside the same nulls.

# %%
viz.experts_for_half(studies["routing"])

# %% [markdown]
# ## Figure 2: what single experts predict
#
# The paper's table, of one passage: rows are layers, columns sums of experts read through the final norm and the unembedding.

# %%
text = texts[1].passages[0].text
sums = PartialSum.figure2(model.top_k)
_, cache = model.run_with_cache(model.to_tokens(text)[:, :24], names_filter=LogitLens(model).hooks(sums=sums))
read = LogitLens(model).decode(cache, sums, top=3)
viz.lens_table(read, -1)

# %% [markdown]
# A table of one position measures nothing. Over all tokens: KL to the model's own prediction, of one expert alone beside no expert
# (the residual stream) and beside an active expert drawn at random.

# %%
viz.lens_by_layer(studies["lens"])

# %% [markdown]
# ## Figure 3: what it costs to keep k experts
#
# Perplexity divided by that of the whole model, on a logarithmic scale and not normalised; beside k of the active experts at random.

# %%
viz.perplexity_by_k(studies["single_expert"])

# %% [markdown]
# ## Figure 4: how alike hidden states are
#
# The cosine of u + g₀E₀ with the whole layer is high, and so is that of u alone: the residual stream is on both sides.

# %%
viz.similarity_by_layer(studies["single_expert"], residual=True)

# %% [markdown]
# Without the residual stream, the top expert against the *other* experts of the same token:

# %%
viz.similarity_by_layer(studies["single_expert"], residual=False)

# %% [markdown]
# ## Verdicts
#
# Each claim has a number and an inference, judged by rules that were written before anything was run: *holds* and *contradicted* take
# a whole simultaneous interval on one side. With so little text much stays undecided; that is the honest answer.

# %%
judge(studies).to_frame()[["claim", "number", "inference"]]
