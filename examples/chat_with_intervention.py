# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A chat, with an intervention while it answers
#
# You learn here to give a chat template's output to a model, to generate with experts muted, steered or few, and to see token by token
# what the router did meanwhile. The embedded model was never trained to chat: it continues in the manner of its texts, and what
# counts is how things are done. Write the name of a chat model instead, and nothing else changes.

# %%
import torch

from moe_lens import HookedMoE

torch.set_num_threads(1)
model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
tokenizer = model.tokenizer
if tokenizer.chat_template is None:  # a chat model brings its own
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"

# %% [markdown]
# A rendered template opens with the model's own special tokens, and no second BOS is put before them.

# %%
messages = [{"role": "user", "content": "Der alte Mann sah auf das Meer und sagte:"}]
prompt = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
tokens = model.to_tokens(prompt)
print(model.to_str_tokens(tokens[0])[:4], tuple(tokens.shape))

# %% [markdown]
# ## Which experts answer
#
# The experts of layer 4 that carry the most weight over the prompt.

# %%
weights = model.routing(tokens).layer(4).dense_weights()[0].mean(0)
busiest = weights.topk(4).indices.tolist()
busiest

# %% [markdown]
# ## Four answers
#
# Interventions are values: each can be given to `generate`, used as a context, or combined. They leave nothing behind.

# %%
interventions = {
    "as it is": [],
    "without the four": [model.ablate({4: busiest}, how="reroute")],
    "top expert alone": [model.keep_top(1)],
    "another one forced": [model.steer_experts({4: {int(weights.argmin()): "on"}})],
}
for name, active in interventions.items():
    answer = model.generate(
        tokens, max_new_tokens=16, do_sample=False, interventions=active, return_type="tokens", verbose=False
    )
    print(f"{name:20s}", tokenizer.decode(answer[0, tokens.shape[1] :]))

# %% [markdown]
# ## Watching while it streams
#
# After the prompt, each new token has its own pass with one position, which hooks see. `experts_in_slots` says which experts a pass
# computes, by rank, after all edits.

# %%
firsts = []


def note(weights: torch.Tensor, hook: object) -> None:
    """The expert with the largest weight, of the newest token."""
    firsts.append(int(model.experts_in_slots(4)[0, -1, 0]))


with model.hooks([("blocks.4.mlp.hook_routing_weights", note)]):
    stream = model.generate_stream(
        tokens, max_new_tokens=8, max_tokens_per_yield=1, do_sample=False, return_type="tokens", verbose=False,
        interventions=[model.ablate({4: busiest}, how="reroute")],
    )  # fmt: skip
    pieces = [piece for piece in stream]
print(firsts)
assert not set(firsts) & set(busiest)  # forbidden experts were chosen at no token, prompt or new
