# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Which experts carry a prediction? Patching and tracing
#
# You learn here to find where a model carries a name: to patch activations of one run into another, by layer, position and expert, and to
# trace with noise.
#
# The embedded model completes `return a + …` with the parameter that it read some tokens before. Two prompts that differ in
# that parameter alone show where its name is carried: activations of one run are patched into the other, one site at a time.

# %%
import tempfile
from pathlib import Path

import torch

from moe_lens import HookedMoE
from moe_lens.interventions import LogitDifference, patch, trace
from moe_lens.selection import Selection
from moe_lens.viz import patch_map, trace_map

model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
clean = "def add(a, b):\n    return a +"
corrupted = "def add(a, c):\n    return a +"
metric = LogitDifference(model.to_single_token(" b"), model.to_single_token(" c"))
for text in (clean, corrupted):
    with torch.no_grad():
        probabilities = model(text)[0, -1].softmax(-1)
    print(repr(text), {token: round(probabilities[model.to_single_token(token)].item(), 3) for token in (" b", " c")})

# %% [markdown]
# ## From the parameter to the end
#
# The residual stream of the clean run is put into the corrupted run, at one layer and position: an effect of 1 restores the
# whole logit difference. In early layers the name sits at the parameter's position, in late layers at the last one.

# %%
resid = patch(model, clean, corrupted, "resid_post", metric)
print(resid, f"clean {resid.clean:.2f}, corrupted {resid.corrupted:.2f}")
patch_map(resid)

# %% [markdown]
# ## Experts
#
# An expert's contribution is g E(x), its routing weight times its output. Experts of the two runs correspond by id: where a
# run did not select an expert, its contribution is zero.

# %%
experts = patch(model, clean, corrupted, "expert_weighted", metric, over=("layer", "expert"))
table = experts.to_frame().sort_values("effect", key=abs, ascending=False)
print(table.head(8).to_string(index=False, float_format="{:.3f}".format))

# %% [markdown]
# Routers select other experts when what they read changes. With `routing="frozen"` later layers keep the experts of the
# corrupted run; the difference is what the patch does by re-routing.

# %%
frozen = patch(model, clean, corrupted, "expert_weighted", metric, over=("layer", "expert"), routing="frozen")
rerouting = (experts.values - frozen.values).abs()
print(f"re-routing changes an effect by up to {rerouting.max().item():.3f} of {experts.clean - experts.corrupted:.3f}")
both = patch(model, clean, corrupted, "routed_out", metric, over=("layer",))
only = patch(model, clean, corrupted, "routing", metric, over=("layer",))
for row, layer in enumerate(both.axes["layer"]):
    print(f"layer {layer}: all experts {both.effect[row]:.3f}, their choice and weights alone {only.effect[row]:.3f}")

# %% [markdown]
# The expert with the largest effect, position by position, in both directions: its clean contribution put into the corrupted
# run, and its corrupted one put into the clean run.

# %%
layer, expert = (int(number) for number in table.iloc[0][["layer", "expert"]])
chosen = Selection(experts={layer: [expert]})
for direction in ("denoising", "noising"):
    result = patch(
        model, clean, corrupted, "expert_weighted", metric, over=("layer", "pos"), selection=chosen, direction=direction
    )
    best = int(result.effect[0].abs().argmax())
    print(f"{layer}.{expert}, {direction}: {result.effect[0, best]:.3f} at {result.tokens[best]!r}")

# %% [markdown]
# ## Causal tracing
#
# Tracing needs no second prompt: the parameter's embeddings get noise (of three times the standard deviation of the
# embeddings), and one site at a time gets its clean value back. Effects are means over draws of the noise, with intervals.

# %%
traced = trace(model, clean, subject=", b", answer=" b", draws=10, seed=0)
print(traced)
effects = traced.to_frame()
for site, rows in effects.groupby("site", sort=False):
    top = rows.loc[rows["effect"].idxmax()].dropna()
    where = ", ".join(f"{name} {int(top[name])}" for name in ("layer", "pos", "expert", "size") if name in top)
    print(f"{site:9s} {top['effect']:.3f} [{top['low']:.3f}, {top['high']:.3f}]  {where}")
target = Path(tempfile.mkdtemp()) / "trace.html"
trace_map(traced).write_html(target)
print("saved", target.name)
