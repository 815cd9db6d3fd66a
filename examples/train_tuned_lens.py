# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Training a TunedLens
#
# You learn here to train a lens of your own, to resume and save it, and to see what it gains on the LogitLens.
#
# A TunedLens puts an affine translator before the final norm, one for each layer, trained so that the lens's prediction is
# near the model's final one (Belrose et al. 2023). Here it is trained for a few steps on the texts of the package.

# %%
import tempfile
from pathlib import Path

import torch

from moe_lens import HookedMoE, PartialSum
from moe_lens.data import embedded_domains
from moe_lens.lenses import LogitLens, TunedLens

torch.set_num_threads(1)
model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)

# %% [markdown]
# A corpus is any iterable of texts; a few passages of every domain are held out. Training streams the rest, and starts over
# when it ends.

# %%
passages = [[passage.text for passage in domain.passages] for domain in embedded_domains()]
held_out = [text for texts in passages for text in texts[:2]]
corpus = [text for texts in passages for text in texts[2:42]]
print(len(corpus), "passages to train on,", len(held_out), "held out")

# %% [markdown]
# `checkpoint=` makes the training resumable: after an interruption the same call continues where it was, and ends with the
# same translators.

# %%
folder = Path(tempfile.mkdtemp())
lens = TunedLens.fit(
    model,
    corpus,
    held_out=held_out,
    steps=12,
    batch=4,
    context=64,
    lr=1.0,
    seed=0,
    checkpoint=folder / "training.safetensors",
    progress=False,
)
assert lens.tuning is not None
lens.tuning.to_frame().round(3)

# %% [markdown]
# The table shows KL(final ‖ lens) in nats a token, before training (the LogitLens) and after. In the last layer there is
# nothing to learn: the model itself reads that stream.
#
# ## Saving
#
# A saved lens holds the model's name and a fingerprint of its final norm and unembedding, which are checked at load.

# %%
lens.save_pretrained(folder / "lens")
again = TunedLens.from_pretrained(folder / "lens", model)
sorted((path.name, path.stat().st_size) for path in (folder / "lens").iterdir())

# %% [markdown]
# ## Reading with it
#
# The lens that comes with the package was trained for longer, on the model's own training mixture, and has a second lens,
# `mid`, for the stream before the experts. The translators are trained on layers' outputs, so
# reading partial sums with them is extrapolation: compare sums within one lens.

# %%
shipped = TunedLens.from_pretrained("tiny-deepseekmoe", model)
assert shipped.mid is not None
text = "Das Kind sah den Hund und"
sums = [PartialSum(shared=True), PartialSum(ranks=[0]), PartialSum(ranks=[])]
_, cache = model.run_with_cache(text, names_filter=shipped.hooks(sums=sums))
for name, each in (
    ("LogitLens", LogitLens(model)),
    ("12 steps", again),
    ("shipped", shipped),
    ("shipped, u", shipped.mid),
):
    read = each.decode(cache, sums, top=1)
    for column, which in enumerate(sums):
        nats = read.kl_final[:, column].nanmean((-1, -2))
        best = [model.to_str_tokens(row[0, -1])[0] if row[0, -1] >= 0 else "-" for row in read.top_tokens[:, column]]
        print(
            f"{name:11s} {which.label:24s}",
            "  ".join(f"{x:5.2f} {token!r:9s}" for x, token in zip(nats, best, strict=True)),
        )
