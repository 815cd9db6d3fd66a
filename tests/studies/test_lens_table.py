"""The example of a domain is chosen by its rule, and read where the rule says."""

from pathlib import Path

import pytest
import torch

import moe_lens
from moe_lens import HookedMoE
from moe_lens.data import Domain, Passage
from moe_lens.model.loading.tokenizer import load_tokenizer
from moe_lens.studies import lens_table
from moe_lens.studies.lens_table import EXAMPLE_TOKENS
from tests.families import build

TOKENIZER = Path(moe_lens.__file__).parent / "assets" / "tiny-deepseekmoe"


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    hf = build("deepseek", vocab_size=4096, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return HookedMoE.from_hf(hf, load_tokenizer(str(TOKENIZER)))


def domain(*texts: str) -> Domain:
    return Domain("d", tuple(Passage(text, "s", f"f:{i}") for i, text in enumerate(texts, start=1)))


def test_first_passage_that_is_long_enough_is_read_at_its_24th_token(model):
    long = "one two three four five six seven eight nine ten " * 3
    (example,) = lens_table(model, [domain("short", long, long + "even longer")], top=3)
    ids = model.to_tokens(long)[0].tolist()
    assert example.origin == "f:2"
    assert list(example.prompt) == ids[: EXAMPLE_TOKENS + 1]  # BOS besides
    assert example.target == ids[EXAMPLE_TOKENS + 1]
    assert example.result.positions == (EXAMPLE_TOKENS,)
    logits = model(torch.tensor([example.prompt]))[0, -1]
    assert example.predicted == int(logits.argmax()) == int(example.result.top_tokens[-1, 0, 0, 0, 0])
    assert example.texts[example.target] == model.tokenizer.decode([example.target])
    assert example.texts.keys() == {*example.prompt, example.target, example.predicted}
    occurring = set(example.result.top_tokens.unique().tolist()) - {-1}
    assert occurring | {example.target} == example.result.texts.keys()
    found = -logits.detach().log_softmax(-1)[example.target]
    assert float(example.result.cross_entropy[-1, 0, 0, 0]) == pytest.approx(float(found), abs=1e-5)


def test_otherwise_the_longest_at_its_last_but_one(model):
    (example,) = lens_table(model, [domain("a few", "a few words more", "a few")])
    ids = model.to_tokens("a few words more")[0].tolist()
    assert (list(example.prompt), example.target, example.origin) == (ids[:-1], ids[-1], "f:2")
