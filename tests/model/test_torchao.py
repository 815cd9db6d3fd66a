"""Checkpoints that torchao and transformers themselves wrote: the numbers are those of torchao's own dequantize()."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TorchAoConfig

from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.loading.checkpoint import Checkpoint
from moe_lens.model.loading.config_json import believed_config
from moe_lens.model.loading.formats.view import unpacked
from moe_lens.model.loading.streamed_weights import streamed_weights
from tests.matrix.configs import build, tokens
from tests.model.test_stored_formats import SIZES, write

SAID = {"quant_method": "torchao"}
WAYS = ["int8", "int8, activations too", "fp8", "int4 in groups"]


def ways() -> dict[str, Any]:
    ao = pytest.importorskip("torchao.quantization")
    return {
        "int8": ao.Int8WeightOnlyConfig(),
        "int8, activations too": ao.Int8DynamicActivationInt8WeightConfig(),
        "fp8": ao.Float8WeightOnlyConfig(),
        "int4 in groups": ao.IntxWeightOnlyConfig(weight_dtype=vars(torch)["int4"], granularity=ao.PerGroup(32)),
    }


def pack(folder: Path, way: str) -> dict[str, Tensor]:
    """A checkpoint that transformers packed; its numbers as torchao gives them, by transformers' names."""
    asked = TorchAoConfig(ways()[way])
    build("qwen3_moe", torch.bfloat16, **SIZES["qwen3_moe"]).save_pretrained(folder / "plain")
    packed = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=asked, dtype=torch.bfloat16)
    packed.save_pretrained(folder / "packed")
    state = packed.state_dict()
    assert sum(hasattr(value, "qdata") for value in state.values()) == 8, (
        "attention's matrices are of torchao's classes"
    )
    return {name: value.dequantize() if hasattr(value, "qdata") else value for name, value in state.items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_has_the_numbers_that_torchao_gives(way: str, tmp_path: Path) -> None:
    numbers, folder = pack(tmp_path, way), tmp_path / "packed"
    model = HookedMoE.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    state = model.original_model.state_dict()
    clean = {name.replace("_original_component.", ""): value for name, value in state.items()}
    assert [name for name, value in numbers.items() if not torch.equal(clean[name], value)] == []
    plain = HookedMoE.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert not torch.equal(plain(tokens()), model(tokens())), "a control: packing changes numbers"
    on_disk = HookedMoE.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "disk"}).requires_grad_(False)
    assert streamed_weights(on_disk.original_model) is not None
    assert torch.equal(on_disk(tokens()), model(tokens()))
    kept = HookedMoE.from_pretrained(folder, dtype=torch.bfloat16, quantize="stored").requires_grad_(False)
    assert torch.equal(kept(tokens()), model(tokens()))


def test_what_is_not_whole_is_refused_by_name(tmp_path: Path) -> None:
    pack(tmp_path, "int8")
    file, name = tmp_path / "packed" / "model.safetensors", "model.layers.1.self_attn.q_proj"
    with safe_open(file, framework="pt") as opened:
        headers = opened.metadata()
    whole = load_file(file)
    for lacking, message in (
        ((f"{name}._weight_scale",), "q_proj._weight_.* is packed .*, and its scale is missing"),
        (tuple(f"{name}._weight_{role}" for role in ("qdata", "scale", "zero_point")), f"{name}.weight is packed by"),
    ):
        save_file({key: value for key, value in whole.items() if key not in lacking}, file, headers)
        with pytest.raises(CheckpointError, match=message):
            HookedMoE.from_pretrained(tmp_path / "packed")
    save_file(whole, file, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="headers of its files do not say how"):
        HookedMoE.from_pretrained(tmp_path / "packed")


@pytest.mark.typed
def test_without_torchao_a_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("qwen3_moe", **SIZES["qwen3_moe"]).save_pretrained(tmp_path)
    write(tmp_path, load_file(tmp_path / "model.safetensors"), SAID)
    monkeypatch.setitem(sys.modules, "torchao", None)
    for name in [name for name in sys.modules if name.startswith("torchao.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        InputError, match=r"^a checkpoint that is packed by torchao needs torchao: pip install torchao$"
    ):
        unpacked(Checkpoint.locate(str(tmp_path), {}), SAID, torch.float32)


def test_an_axis_in_what_torchao_says_is_no_size_of_the_model(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "olmoe", "quantization_config": {"granularity": {"_data": {"dim": -1}}}}')
    believed_config(file)
    file.write_text('{"model_type": "olmoe", "granularity": {"_data": {"dim": -1}}}')
    with pytest.raises(CheckpointError, match="dim is -1"):
        believed_config(file)
