# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Your own model, your own texts
#
# You learn here to wrap a model that is in memory, to load one from a folder, to make domains of lists and tables, and to
# read what a study says about them. The model is a small Qwen3-MoE with random weights: it knows nothing, so it is also the control
# for everything that the other examples find in a trained one.

# %%
import tempfile
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_lens import HookedMoE
from moe_lens.data import Domain, Reading
from moe_lens.studies import RoutingStudy, StudyResult, run

tokenizer = HookedMoE.from_pretrained("tiny-deepseekmoe").tokenizer
torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    num_experts=16, num_experts_per_tok=4, moe_intermediate_size=32, decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip
own = Qwen3MoeForCausalLM(config)

# %% [markdown]
# ## A model in memory
#
# `from_hf` wraps it in place, and checks on a few tokens that the parts of every layer sum to its output.

# %%
model = HookedMoE.from_hf(own.eval(), tokenizer, name="my-qwen3-moe")
model

# %% [markdown]
# ## A model in a folder
#
# What `save_pretrained` writes, or a name on the hub. `moe-lens info FOLDER` describes it from its config alone.

# %%
folder = Path(tempfile.mkdtemp())
model.save_pretrained(folder / "model")
again = HookedMoE.from_pretrained(folder / "model", dtype=torch.float32)
assert isinstance(AutoTokenizer.from_pretrained(folder / "model"), type(tokenizer))
assert torch.equal(again("The old man"), model("The old man"))

# %% [markdown]
# ## Texts
#
# A domain is a name and texts: a list, a table with a column of sources, files (`Domain.of` takes what you have, the command line
# `--domain NAME=FILE`). Sources are what intervals are over: texts of one author or page belong to one source.

# %%
recipes = [
    f"Take {n} eggs, {n} spoons of flour and some milk, and stir until the dough is smooth." for n in range(2, 16)
]
letters = pd.DataFrame(
    {
        "text": [
            f"Dear {name}, thank you for your letter. We hope to see you in spring."
            for name in "ABCDEFGHIJKLMNOPQRSTUVWX"
        ],
        "author": list("aabbccddeeffgghhiijjkkll"),
    }
)
domains = [Domain.of("recipes", recipes, sources=range(len(recipes))), Domain.of("letters", letters, sources="author")]
[(domain.name, len(domain.passages), len({passage.source for passage in domain.passages})) for domain in domains]

# %% [markdown]
# ## A study of them
#
# With `out=` it is saved as it goes: interrupted, the same call resumes. Findings are a few lines, each with its interval and null.

# %%
result = run(RoutingStudy(nulls=True), model, domains, reading=Reading(tokens=320, context=32), out=folder / "routing")
print(StudyResult.load(folder / "routing").findings())

# %% [markdown]
# A random model routes the two kinds of texts differently, too, since their tokens differ. `token_alone` is the largest share
# of a layer if every token drew its experts as often as it does in these texts, whatever its context: that is nearly all of each
# share. `random_router` is the same for other random rows, which happen to like other tokens.

# %%
best = result.tables["most_specialised"].set_index(["domain", "layer"])
table = pd.DataFrame(best.query("routing == 'model'")[["expert", "share", "low", "high", "sources"]])
table["token_alone"] = best.query("routing == 'token_unigram'")["share"]
table["random_router"] = best.query("routing == 'random_router'")["share"]
table.round(2)
