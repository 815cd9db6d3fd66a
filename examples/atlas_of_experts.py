# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Which expert is German's, and what breaks without it?
#
# You learn here to find a domain's expert with how sure that is, what it writes, and what its removal costs beside controls.
#
# The atlas gathers, for every expert, which tokens choose it and how sure that is, what it writes, and what taking it
# out costs. Its folder opens from the disk; here its tables are read. Few tokens are used, so that this takes seconds.

# %%
import tempfile
from pathlib import Path

from moe_lens import HookedMoE
from moe_lens.data import Reading, embedded_domain
from moe_lens.studies import Atlas

model = HookedMoE.from_pretrained("tiny-deepseekmoe")
folder = Path(tempfile.mkdtemp())
domains = [embedded_domain(name) for name in ("german", "code")]
atlas = model.atlas(domains, folder, study=Atlas(knockout_tokens=128), reading=Reading(tokens=512, context=40))
tables = atlas.result.tables
print(atlas.result.findings())

# %% [markdown]
# ## Whose tokens choose it
#
# `difference` is the share minus the mean share of the other domains; `token_alone` is what the share would be if every token
# chose as it does in all domains; `p_value` is corrected for all experts, layers and domains; `first` is the share of
# resamples of the sources in which the expert is its layer's most specialised for German.

# %%
german = tables["domains"].query("domain == 'german' and layer == 4").sort_values("difference", ascending=False)
german[["expert", "share", "low", "high", "token_alone", "difference", "p_value", "first"]].head(3).round(3)

# %% [markdown]
# ## What it writes
#
# Tokens that its mean output promotes, minus the mean over the layer's experts. Those that recur are found in both halves
# of the sources.

# %%
expert = int(german["expert"].iloc[0])
words = dict(zip(tables["words"]["token"], tables["words"]["text"], strict=True))
writing = tables["writing"].query(f"of == 'mean' and layer == 4 and expert == {expert} and effect == 'promoted'")
writing.assign(text=[words[token] for token in writing["token"]])[["text", "value", "recurs"]].round(2)

# %% [markdown]
# ## What breaks without it
#
# Nats a token that the loss of each domain grows by; and on German, beside other experts of the layer that carry as much of
# its routing weight. A star takes both: that the expert costs more than nothing, and more than each of these.

# %%
without = tables["knockouts"].query(f"layer == 4 and expert == {expert}")
print(without[["read", "added", "low", "high", "first_order", "tokens"]].round(4))
held = tables["compared"].query(f"layer == 4 and expert == {expert} and domain == 'german'")
held[["added", "control_least", "control_most", "all_low", "all_high", "over_most", "over_most_low", "starred"]].round(
    4
)

# %% [markdown]
# ## All of it, on the expert's own page
#
# The card is the page of the atlas, in a frame; `.save("card.html")` writes it to a file. `AtlasFolder("moe-lens-atlas")` of
# `moe_lens.atlas` takes up an atlas that `moe-lens atlas` made.

# %%
atlas.expert(4, expert)
