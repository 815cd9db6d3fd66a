"""Checkpoints as trainers leave them: names of what a model was wrapped in, other names, and what lies beside."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lens.errors import CheckpointError, UnsupportedModelError
from moe_lens.model.loading.pretrained import load_pretrained
from tests.matrix.configs import build

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32}


@pytest.fixture(params=["deepseek", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    build(request.param, **({**SMALL, "head_dim": 8} if request.param == "qwen3_moe" else SMALL)).save_pretrained(
        tmp_path
    )
    return tmp_path


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))


def same(folder: Path, plain: dict[str, Tensor], **how: Any) -> bool:
    state = load_pretrained(str(folder), **how)[0].state_dict()
    return state.keys() == plain.keys() and all(torch.equal(value, plain[name]) for name, value in state.items())


def test_what_a_model_was_wrapped_in_is_taken_off_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, tensors = load_pretrained(str(folder))[0].state_dict(), stored(folder)
    for lead, by in {
        "_orig_mod.": "torch.compile",
        "module._orig_mod.": "torch.compile, module. of DataParallel",
        "base_model.model.": "PEFT",
    }.items():
        write(folder, {f"{lead}{name}": value for name, value in tensors.items()})
        with caplog.at_level(logging.WARNING):
            assert same(folder, plain), lead
        assert by in caplog.messages[-1] and "is taken off" in caplog.messages[-1]
    inside = {name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."): value for name, value in tensors.items()}
    assert inside.keys() != tensors.keys()
    write(folder, inside)
    assert same(folder, plain)
    write(folder, {**inside, **{name: value.clone() for name, value in tensors.items()}})
    with pytest.raises(CheckpointError, match=r"would both be model\.layers\.0\.self_attn\."):
        load_pretrained(str(folder))
    write(folder, {f"module.{name}" if "norm" in name else name: value for name, value in tensors.items()})
    with pytest.raises(CheckpointError, match=r"norm\.weight is (unexpected|missing)"):
        load_pretrained(str(folder))
    adapter = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}
    write(folder, {**{f"base_model.model.{name}": value for name, value in tensors.items()}, **adapter})
    with pytest.raises(UnsupportedModelError, match=r"adapter of PEFT that is not merged \(.*lora_A"):
        load_pretrained(str(folder))


@pytest.mark.typed
def test_names_are_mapped_as_the_caller_says(folder: Path) -> None:
    plain, tensors = load_pretrained(str(folder))[0].state_dict(), stored(folder)
    write(
        folder, {name.replace("model.", "trunk.").replace("lm_head", "head"): value for name, value in tensors.items()}
    )
    with pytest.raises(CheckpointError, match="is missing|is unexpected"):
        load_pretrained(str(folder))
    assert same(folder, plain, key_mapping={r"^trunk\.": "model.", "^head": "lm_head"})


def test_tables_of_positions_and_a_head_that_is_the_embedding_may_be_stored(folder: Path) -> None:
    tensors = stored(folder)
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    plain = load_pretrained(str(folder))[0].state_dict()
    write(folder, {**tensors, **tables})
    assert same(folder, plain)
    embedding = tensors["model.embed_tokens.weight"]
    write(folder, {**tensors, "lm_head.weight": embedding.clone()}, tie_word_embeddings=True)
    model: Any = load_pretrained(str(folder))[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(model.lm_head.weight, embedding)


def test_an_adapter_alone_names_its_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base-moe"}')
    with pytest.raises(
        UnsupportedModelError, match=r"is an adapter of PEFT on org/base-moe, not a model\. Load that one"
    ):
        load_pretrained(str(tmp_path))


def test_a_file_of_weights_is_answered_by_its_folder(folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is a file; expected a checkpoint's folder, such as "
    ):
        load_pretrained(str(folder / "model.safetensors"))
