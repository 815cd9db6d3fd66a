# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A probe on one expert's activations
#
# You learn here to collect what one expert computes over a corpus, and to train something on it: a linear probe in 25 lines, held
# against two controls. A sparse autoencoder takes the same rows.

# %%
import tempfile
from pathlib import Path

import torch

from moe_lens import HookedMoE
from moe_lens.data import Reading, embedded_domains
from moe_lens.studies import collect

torch.set_num_threads(1)
model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
texts = [domain for domain in embedded_domains() if domain.name in ("german", "french")]

# %% [markdown]
# ## Collect
#
# The busiest expert of layer 3, and its neurons at every token that is routed to it. `collect` writes shards that resume; hooks of
# single experts keep only their rows, and say which token each belongs to.

# %%
routing = model.routing(model.to_tokens([passage.text for domain in texts for passage in domain.passages[:4]])[:, :64])
expert = int(routing.layer(3).indices.flatten().mode().values)
hook = f"blocks.3.mlp.experts.{expert}.hook_post"
stored = collect(
    model,
    texts,
    Path(tempfile.mkdtemp()) / "rows",
    hooks=[hook],
    reading=Reading(tokens=2000, context=64, shard_tokens=2000),
)
rows = {}
for domain in stored.documents()["domain"].unique():
    shards = list(stored.shards(domain))
    rows[domain] = (
        torch.cat([s[hook] for s in shards]),
        torch.cat([s["document"][s[f"{hook.rpartition('.')[0]}.token"]] for s in shards]),
    )
{domain: tuple(values.shape) for domain, (values, _) in rows.items()}

# %% [markdown]
# ## Train
#
# Is a token of German or of French text? Whole documents are held out, since tokens of one text resemble each other. The controls:
# the same probe with labels shuffled among documents, and the larger class.

# %%
x = torch.cat([values for values, _ in rows.values()])
y = torch.cat([torch.full((len(values),), float(i)) for i, (values, _) in enumerate(rows.values())])
documents = torch.cat([ids + 10_000 * i for i, (_, ids) in enumerate(rows.values())])
test = documents % 2 == 1
x = (x - x[~test].mean(0)) / x[~test].std(0).clamp(min=1e-6)


def accuracy(labels: torch.Tensor) -> float:
    """Of a logistic regression, on the documents that it was not trained on."""
    weights = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=50)

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        logits = x[~test] @ weights[1:] + weights[0]
        value = (
            torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[~test]) + 1e-3 * weights.square().sum()
        )
        value.backward()
        return value

    optimiser.step(loss)
    return float(((x[test] @ weights[1:] + weights[0] > 0) == labels[test].bool()).float().mean())


unique = documents.unique()
shuffled = dict(zip(unique.tolist(), (unique[torch.randperm(len(unique))] >= 10_000).float().tolist(), strict=True))
print(f"expert {expert}, {len(x)} tokens, {len(unique)} documents")
print(
    f"probe {accuracy(y):.2f}; shuffled {accuracy(torch.tensor([shuffled[d] for d in documents.tolist()])):.2f}; ",
    end="",
)
print(f"larger class {max(float(y[test].mean()), 1 - float(y[test].mean())):.2f}")

# %% [markdown]
# The expert's neurons tell the languages apart better than chance. That it can be read there does not say that the model uses it:
# that takes an intervention, as in `ablate_experts` and `localise_experts`.
