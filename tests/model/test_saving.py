"""What is saved is the family's own checkpoint, with nothing of ours in it: transformers and moe_lens read it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_lens.hooked_moe import HookedMoE
from tests.families import CONFIGS, build
from tests.wrapped import wrapped

families = pytest.mark.parametrize("family", CONFIGS)


def stored(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


@families
def test_a_saved_model_is_read_by_transformers_and_by_us(family: str, tmp_path: Path) -> None:
    case = wrapped(family)
    case.model.save_pretrained(tmp_path / "ours")
    case.hf.save_pretrained(tmp_path / "theirs")
    ours, theirs = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert ours.keys() == theirs.keys(), "no bias of TransformerLens's, no name of its wrappers"
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs")]
    assert configs[0] == configs[1]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(plain(case.tokens).logits, case.logits)
        assert torch.equal(HookedMoE.from_pretrained(tmp_path / "ours")(case.tokens), case.logits)


def test_an_edited_weight_is_saved(tmp_path: Path) -> None:
    model = HookedMoE.from_hf(build("deepseek"), check=False)
    with torch.no_grad():
        model.W_out[1, 3].zero_()
        expected = model(wrapped("deepseek").tokens)
    model.save_pretrained(tmp_path)
    assert not stored(tmp_path)["model.layers.1.mlp.experts.3.down_proj.weight"].any()
    with torch.no_grad():
        assert torch.equal(HookedMoE.from_pretrained(tmp_path)(wrapped("deepseek").tokens), expected)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    hf = build("deepseek", tie_word_embeddings=True)
    ids = wrapped("deepseek").tokens
    with torch.no_grad():
        before = hf(ids).logits
    model = HookedMoE.from_hf(hf, check=False)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in stored(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids), before)
        again = HookedMoE.from_pretrained(tmp_path)
        assert torch.equal(again(ids), before)
    assert again.unembed.weight.data_ptr() == again.embed.weight.data_ptr()


def test_several_shards(tmp_path: Path) -> None:
    case = wrapped("deepseek")
    case.model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(HookedMoE.from_pretrained(tmp_path)(case.tokens), case.logits)
