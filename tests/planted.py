"""A tiny model in which a known expert serves a known domain, its texts, and texts in which domains mean nothing."""

import random
from functools import cache
from typing import Any

import torch

from moe_lens import HookedMoE
from moe_lens.data import Domain, Passage, Reading
from moe_lens.model.loading.tokenizer import load_tokenizer
from moe_lens.studies import Atlas, StudyResult, run
from tests.families import build
from tests.studies.tiny import TOKENIZER

WORDS = {
    "sea": ["ship", "water", "sail", "fish", "wind", "storm"],
    "law": ["court", "judge", "state", "party", "right", "order"],
    "art": ["paint", "colour", "music", "song", "book", "poem"],
}
LAYER = 2
PLANTED = {"sea": 2, "law": 5, "art": 7}
"""The expert of each domain in the last layer; the other layers do nothing."""


def planted_model(*, echo: bool = False, shuffled: bool = False) -> HookedMoE:
    """A token of each domain is sent to the domain's expert, which alone says that the domain's tokens come next.

    The other active experts are chosen by what else is in the token's embedding, and do nothing.

    Args:
        echo: The other experts say the same as the domain's expert, which has most of the weight; all speak softly, so
            that predictions differ by nats and no more; and it is so in all layers, so that in each there is something
            that one expert can be compared with.
        shuffled: Numbers of routers and experts change places at random, each within its layer's matrix.
    """
    sizes: dict[str, Any] = {"hidden_size": 32, "n_routed_experts": 16, "num_experts_per_tok": 4}
    hf = build("deepseek", vocab_size=4096, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)
    tokenizer = load_tokenizer(str(TOKENIZER))
    generator = torch.Generator().manual_seed(0)
    read, say = torch.linalg.qr(torch.randn(32, 6, generator=generator)).Q.T.split(3)
    groups: dict[int, int] = {}
    for number, words in enumerate(WORDS.values()):
        groups |= {token: number for word in words for token in tokenizer.encode(f" {word}", add_special_tokens=False)}
    decoder, head = hf.model, hf.lm_head
    with torch.no_grad():
        head.weight.mul_(0.1)
        for norm in (decoder.norm, *(layer.post_attention_layernorm for layer in decoder.layers)):
            norm.weight.fill_(1)
        for token, group in groups.items():
            own = decoder.embed_tokens.weight[token] - read.T @ (read @ decoder.embed_tokens.weight[token])
            decoder.embed_tokens.weight[token] = 4 * read[group] + own
            head.weight[token] += say[group]
        for layer in decoder.layers:
            layer.self_attn.o_proj.weight.zero_()
            mlp = layer.mlp
            if not hasattr(mlp, "experts"):
                mlp.down_proj.weight.zero_()
                continue
            mlp.shared_experts.down_proj.weight.zero_()
            mlp.experts.down_proj.zero_()
            mlp.gate.weight.copy_(0.2 * (mlp.gate.weight - mlp.gate.weight @ read.T @ read))
        m = hf.config.moe_intermediate_size
        for number in range(1, len(decoder.layers)) if echo else [LAYER]:
            mlp, loud = decoder.layers[number].mlp, 6.0 if not echo else 0.1 if number == LAYER else 0.05
            for group in range(len(PLANTED) if echo else 0):
                mlp.experts.gate_up_proj[:, [group, m + group]] = read[group]
                mlp.experts.down_proj[:, :, group] = loud * say[group]
            for group, expert in enumerate(PLANTED.values()):
                # a logit of 0.85: some 40 % of the token's weight; with an echo, nearly all of it
                mlp.gate.weight[expert] = (1.2 if echo else 0.15) * read[group]
                mlp.experts.gate_up_proj[expert, [0, m]] = read[group]
                mlp.experts.down_proj[expert, :, 0] = loud * say[group]
            if shuffled:
                for weight in (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj):
                    order = torch.randperm(weight.numel(), generator=generator)
                    weight.copy_(weight.flatten()[order].view_as(weight))
    return HookedMoE.from_hf(hf, tokenizer).requires_grad_(False)


def planted_domains(*, shuffled: bool = False, sources: int = 12, words: int = 24) -> list[Domain]:
    """Texts of each domain's words alone, or of all words alike; the i-th sources of all domains are parallel."""
    found = []
    for name, vocabulary in WORDS.items():
        draw = random.Random(name)
        drawn = sum(WORDS.values(), []) if shuffled else vocabulary
        texts = [" " + " ".join(draw.choices(drawn, k=words)) for _ in range(sources)]
        found.append(Domain(name, tuple(Passage(t, f"book/{name}/{i}", f"{name}:{i}") for i, t in enumerate(texts))))
    return found


ATLAS_READING = Reading(tokens=None, context=64)
OWN_TEXT = " the ship and the judge"


@cache
def planted_atlas() -> tuple[HookedMoE, StudyResult]:
    """The model and its atlas, for many tests."""
    model = planted_model()
    return model, run(Atlas(texts=(OWN_TEXT,)), model, planted_domains(), reading=ATLAS_READING)
