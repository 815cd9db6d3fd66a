"""The embedded model: offline, in the original format, and worth looking at."""

from importlib import resources

import pytest
import torch
from safetensors import safe_open

from moe_lens import HookedMoE
from moe_lens.data.domains import embedded_domains

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)


def test_it_is_a_deepseekmoe_to_the_letter(model):
    assert (model.n_experts, model.top_k, model.n_shared_experts) == (64, 6, 2)
    assert model.moe_layers == (1, 2, 3, 4, 5)
    config = model.original_model.config
    assert (config.scoring_func, config.norm_topk_prob) == ("softmax", False)


def test_the_checkpoint_has_the_original_names_and_fits(model):
    folder = resources.files("moe_lens") / "assets" / "tiny-deepseekmoe"
    size = sum(len(file.read_bytes()) for file in folder.iterdir())
    assert size <= 20e6
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        names = set(file.keys())
        assert file.get_tensor("model.layers.3.mlp.experts.63.down_proj.weight").dtype == torch.bfloat16
    assert {"model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"} <= names


def test_bos_stands_once_in_whatever_way_a_text_comes(model):
    bos = model.tokenizer.bos_token_id
    messages = [{"role": "user", "content": "The old man"}]
    rendered = model.tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
    assert rendered.startswith(model.tokenizer.bos_token)
    for tokens in (model.to_tokens("The old man"), model.to_tokens(rendered), model.to_tokens([rendered, "The"])[:1]):
        assert tokens[0, 0] == bos
        assert (tokens[0] == bos).sum() == 1
    assert (model.to_tokens(rendered, prepend_bos=False) == bos).sum() == 1  # the text's own
    assert (model.to_tokens("The old man", prepend_bos=False) == bos).sum() == 0


def test_it_was_trained(model):
    """Far better than guessing among 4096 tokens (8.3 nats) in every domain; shuffled text is the control."""
    generator = torch.Generator().manual_seed(0)
    for domain in embedded_domains():
        tokens = model.to_tokens(domain.passages[0].text)[:, :200]
        shuffled = tokens[
            :, torch.cat([torch.tensor([0]), 1 + torch.randperm(tokens.shape[1] - 1, generator=generator)])
        ]
        with torch.no_grad():
            loss, control = (model(t, return_type="loss").item() for t in (tokens, shuffled))
        assert loss < 4.5, domain.name
        assert control > loss + 1, domain.name


def test_it_loads_offline_in_bfloat16_too():
    model = HookedMoE.from_pretrained("tiny-deepseekmoe")
    assert model.cfg.dtype == torch.bfloat16
