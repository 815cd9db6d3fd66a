"""What lies behind the last layer that is loaded is left out, as transformers does it, if config.json speaks of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, PreTrainedModel

from moe_lens import HookedMoE
from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError
from moe_lens.model.families.deepseek import DeepseekConfig
from moe_lens.model.loading.depth import KINDS, PREDICTING, list_of_layers
from moe_lens.model.loading.pretrained import load_pretrained
from tests.matrix.configs import LAYERS, build, tokens


def saved(folder: Path, family: str) -> type[PreTrainedModel]:
    model = build(family)
    model.save_pretrained(folder)
    return type(model)


def add(folder: Path, tensors: dict[str, Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def say(folder: Path, **words: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in PREDICTING}
    (folder / "config.json").write_text(json.dumps({**config, **words}))


def predict_ahead(folder: Path, depth: int) -> None:
    """Layers as DeepSeek-V3 has them behind its last: one more of the same kind, with projections of its own."""
    stored = load_file(folder / "model.safetensors")
    last = f"model.layers.{LAYERS - 1}."
    for at in range(LAYERS, LAYERS + depth):
        copies = {f"model.layers.{at}.{n.removeprefix(last)}": t.clone() for n, t in stored.items() if last in n}
        add(folder, {**copies, f"model.layers.{at}.eh_proj.weight": torch.ones(40, 80)})


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    return load_pretrained(str(folder), **kwargs)[0]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("family", ["deepseek", "deepseek_v3", "mixtral", "gpt_oss", "dbrx", "llama4_text"])
def test_the_first_layers_load_as_transformers_loads_them(tmp_path: Path, family: str) -> None:
    theirs: Any = saved(tmp_path, family).from_pretrained(tmp_path, num_hidden_layers=3)
    right = logits(theirs.eval())
    assert torch.equal(logits(load(tmp_path, num_hidden_layers=3)), right)
    hooked = HookedMoE.from_pretrained(tmp_path, first_n_layers=3)
    assert hooked.cfg.n_layers == 3 and torch.equal(hooked(tokens()), right)
    assert not torch.equal(logits(load(tmp_path)), right)


def test_longcat_s_layers_are_its_blocks(tmp_path: Path) -> None:
    """transformers' `num_hidden_layers` counts the two attention layers of each."""
    theirs: Any = saved(tmp_path, "longcat_flash")
    right = logits(theirs.from_pretrained(tmp_path, num_layers=2).eval())
    asked: list[dict[str, Any]] = [{"num_layers": 2}, {"num_hidden_layers": 4}, {"first_n_layers": 2}]
    for words in asked:
        hooked = HookedMoE.from_pretrained(tmp_path, **words)
        assert hooked.cfg.n_layers == 2 and torch.equal(hooked(tokens()), right)
    assert not torch.equal(logits(load(tmp_path)), right)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 9, but config\.json's model has 4"):
        load(tmp_path, num_layers=9)


@pytest.mark.typed
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "minimax_m3_vl", "mistral_large4"])
def test_the_first_layers_of_a_multimodal_model_are_its_language_model_s(tmp_path: Path, family: str) -> None:
    theirs: Any = saved(tmp_path, family)
    kinds = {
        name: of[:2]
        for name in KINDS
        if (of := getattr(theirs.config_class.from_pretrained(tmp_path).text_config, name, None))
    }
    right = theirs.from_pretrained(tmp_path, text_config={"num_hidden_layers": 2, **kinds}).eval()
    hooked = HookedMoE.from_pretrained(tmp_path, first_n_layers=2)
    assert hooked.cfg.n_layers == 2 and torch.equal(hooked(tokens()), logits(right))


@pytest.mark.parametrize("family", ["gemma4_text", "gemma4"])
def test_the_last_of_the_first_layers_attends_as_it_does_in_the_whole_model(tmp_path: Path, family: str) -> None:
    """A Gemma 4 lets its own last layer attend in full, whatever its config says of that."""
    saved(tmp_path / "whole", family)
    whole = HookedMoE.from_pretrained(tmp_path / "whole")
    for layers in (2, 3):
        first = HookedMoE.from_pretrained(tmp_path / "whole", first_n_layers=layers)
        with torch.no_grad():
            right = whole(tokens(), stop_at_layer=layers)
            assert first.cfg.n_layers == layers and torch.equal(first(tokens(), stop_at_layer=layers), right)
    hf: Any = first.original_model
    assert hf.config.get_text_config().layer_types[2] == "sliding_attention"
    with pytest.raises(UnsupportedModelError, match="can be made of this config: [^\n]* number of `layer_types`"):
        first.save_pretrained(tmp_path / "first")
    assert not (tmp_path / "first").exists()


def test_layers_are_counted_where_the_config_counts_a_list(tmp_path: Path) -> None:
    kind: Any = saved(tmp_path, "nemotron_h")
    kinds = kind.config_class.from_pretrained(tmp_path).layers_block_type
    right = logits(kind.from_pretrained(tmp_path, layers_block_type=kinds[:3]).eval())
    hooked = HookedMoE.from_pretrained(tmp_path, first_n_layers=3)
    assert hooked.cfg.n_layers == 3 and torch.equal(hooked(tokens()), right)
    with pytest.raises(InputError, match="num_hidden_layers has no effect in a nemotron_h, .*; pass first_n_layers"):
        HookedMoE.from_pretrained(tmp_path, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"first_n_layers is 5, but config\.json's model has 4 layers"):
        HookedMoE.from_pretrained(tmp_path, first_n_layers=5)


def test_whole_numbers_of_layers_that_are_left_out_are_none_of_a_model_s(tmp_path: Path) -> None:
    """DeepSeek-V4's first layers choose experts by the token's id, from a table of whole numbers."""
    saved(tmp_path, "deepseek_v4")
    whole = HookedMoE.from_pretrained(tmp_path)
    with torch.no_grad():
        first = HookedMoE.from_pretrained(tmp_path, first_n_layers=1)(tokens(), stop_at_layer=1)
        assert torch.equal(first, whole(tokens(), stop_at_layer=1))


@pytest.mark.typed
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v32", "laguna", "jamba", "longcat_flash", "qwen3_vl_moe"])
def test_a_model_of_the_first_layers_is_saved_as_such(tmp_path: Path, family: str) -> None:
    """Lists of what each layer is are cut, too."""
    saved(tmp_path / "whole", family)
    first = HookedMoE.from_pretrained(tmp_path / "whole", first_n_layers=3)
    first.save_pretrained(tmp_path / "first")
    again = HookedMoE.from_pretrained(tmp_path / "first")
    assert again.cfg.n_layers == 3 and torch.equal(again(tokens()), first(tokens()))


def test_a_config_that_is_passed_may_have_fewer_layers(tmp_path: Path) -> None:
    for name, config in (("deepseek", DeepseekConfig), ("mixtral", MixtralConfig)):
        saved(tmp_path / name, name)
        shallow = config.from_pretrained(tmp_path / name, num_hidden_layers=2)
        assert torch.equal(
            logits(load(tmp_path / name, config=shallow)), logits(load(tmp_path / name, num_hidden_layers=2))
        )


@pytest.mark.parametrize("family", ["deepseek", "deepseek_v3", "glm4_moe", "mixtral"])
@pytest.mark.parametrize("word", PREDICTING)
@pytest.mark.parametrize("depth", [1, 2])
def test_layers_that_predict_ahead_are_left_out_where_config_json_says_how_many(
    tmp_path: Path, family: str, word: str, depth: int
) -> None:
    saved(tmp_path, family)
    right, first = logits(load(tmp_path)), logits(load(tmp_path, num_hidden_layers=3))
    predict_ahead(tmp_path, depth)
    say(tmp_path, **{word: depth})
    assert torch.equal(logits(load(tmp_path)), right)
    assert torch.equal(logits(load(tmp_path, num_hidden_layers=3)), first)
    with pytest.raises(CheckpointError, match=f"num_hidden_layers is 5, but config.json's model has {LAYERS} layers"):
        load(tmp_path, num_hidden_layers=LAYERS + 1)  # the first of them is none of the model's
    say(tmp_path, **{word: depth - 1})
    with pytest.raises(CheckpointError, match=rf"model\.layers\.{LAYERS + depth - 1}\..* is unexpected"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["deepseek", "mixtral"])
def test_what_config_json_contradicts_is_refused_with_fewer_layers_too(tmp_path: Path, family: str) -> None:
    saved(tmp_path, family)
    whole = load_file(tmp_path / "model.safetensors")
    say(tmp_path, num_hidden_layers=3)
    for layers in ({}, {"num_hidden_layers": 2}):
        with pytest.raises(CheckpointError, match=r"model\.layers\.3\..* is unexpected"):
            load(tmp_path, **layers)
    say(tmp_path, num_hidden_layers=LAYERS)
    for name in ("model.other.weight", "model.layers.1.other.weight", "model.tower.layers.3.weight", "layers.x.weight"):
        save_file({**whole, name: torch.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name} is unexpected"):
            load(tmp_path, num_hidden_layers=2)
    name = "model.layers.1.input_layernorm.weight"
    save_file({n: t for n, t in whole.items() if n != name}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load(tmp_path, num_hidden_layers=2)


def test_a_deepseek_s_layers_that_are_left_out_are_config_json_s_too(tmp_path: Path) -> None:
    saved(tmp_path, "deepseek")
    stored = load_file(tmp_path / "model.safetensors")
    expert = "model.layers.3.mlp.experts.7.down_proj.weight"
    add(tmp_path, {expert.replace(".7.", ".8."): stored[expert]})
    with pytest.raises(CheckpointError, match=r"experts\.8\.down_proj\.weight is unexpected"):
        load(tmp_path, num_hidden_layers=2)
    save_file({**stored, expert: stored[expert].T.contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{expert} has shape"):
        load(tmp_path, num_hidden_layers=2)


@pytest.mark.parametrize("layers", [LAYERS + 1, -1])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek"])
def test_other_numbers_of_layers_are_refused(tmp_path: Path, family: str, layers: int) -> None:
    saved(tmp_path, family)
    with pytest.raises(CheckpointError):
        load(tmp_path, num_hidden_layers=layers)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "model.layers"),
        ("dbrx", "transformer.blocks"),
        ("glm4v_moe", "model.language_model.layers"),
        ("llama4", "language_model.model.layers"),
    ],
)
def test_layers_are_those_of_the_language_model(family: str, name: str) -> None:
    with torch.device("meta"):
        model = build(family)
    assert list_of_layers(model) == name
