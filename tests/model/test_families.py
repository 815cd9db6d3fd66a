"""A closed world: what is not in the table is refused by name, as quantised experts are; configs describe models."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    FineGrainedFP8Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
)
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, convert_moe_packed_tensors
from transformers.utils.quantization_config import Mxfp4Config

from moe_lens.cli.main import main
from moe_lens.errors import UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.families import FAMILIES, family_of
from moe_lens.model.info import config_info
from moe_lens.model.refusals import REFUSED
from tests.matrix.configs import build, config, tokens

# --- refusals ---


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_a_refused_family_is_named_with_the_reason_and_what_works(model_type: str) -> None:
    assert model_type not in FAMILIES
    refused: Any = PreTrainedConfig()
    refused.model_type = model_type
    with pytest.raises(
        UnsupportedModelError, match=f"'{model_type}' is not supported: {re.escape(REFUSED[model_type])}"
    ) as error:
        family_of(refused)
    assert "olmoe" in str(error.value)


def test_an_unknown_family_and_an_unknown_score_are_refused() -> None:
    unknown: Any = PreTrainedConfig()
    unknown.model_type = "nemo"
    with pytest.raises(UnsupportedModelError, match="'nemo' is not supported. Supported: afmoe, .*TransformerBridge"):
        family_of(unknown)
    odd: Any = config("deepseek_v4")
    odd.scoring_func = "tanh"
    with pytest.raises(UnsupportedModelError, match="scoring_func of this deepseek_v4 is 'tanh'; expected softmax"):
        family_of(odd)
    odd.scoring_func = "sigmoid"
    assert family_of(odd).score == "sigmoid"


def test_layers_with_different_numbers_of_experts_are_refused() -> None:
    hf = build("olmoe")
    hf.model.layers[1].mlp.experts.num_experts = 4
    with pytest.raises(
        UnsupportedModelError, match=r"layers of this olmoe have different numbers of experts, \[4, 8\]"
    ):
        HookedMoE.from_hf(hf)


# --- quantised experts ---


def test_quantised_experts_are_refused_and_the_way_back_is_named() -> None:
    fp8 = build("mixtral")
    fp8.model.layers[1].mlp.experts = FP8Experts(fp8.config)
    with pytest.raises(
        UnsupportedModelError, match=r"FP8Experts is not under.*FineGrainedFP8Config\(dequantize=True\)"
    ):
        HookedMoE.from_hf(fp8)
    mxfp4 = build("gpt_oss", hidden_size=64, intermediate_size=64)
    mxfp4.model.layers[0].mlp.experts = Mxfp4GptOssExperts(mxfp4.config)
    with pytest.raises(UnsupportedModelError, match=r"Mxfp4GptOssExperts is not under.*Mxfp4Config\(dequantize=True\)"):
        HookedMoE.from_hf(mxfp4)


def write(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": quantization}))


def test_fp8_experts_are_dequantised_on_request(tmp_path: Path) -> None:
    plain = build("mixtral", hidden_size=128, intermediate_size=128)
    plain.save_pretrained(tmp_path)
    stored, exact = {}, {}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        if ".experts." in name or "_proj" in name:
            scale = value.abs().max() / 448
            stored[name] = (value / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.expand(
                -(-value.shape[0] // 128), -(-value.shape[1] // 128)
            ).contiguous()
            exact[name] = stored[name].float() * scale
        else:
            stored[name] = exact[name] = value
    save_file(exact, tmp_path / "model.safetensors", metadata={"format": "pt"})
    want = type(plain).from_pretrained(tmp_path)(tokens()).logits
    quantization = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "lm_head"],
    }
    write(tmp_path, stored, quantization)
    model = HookedMoE.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    assert model.W_out[0].dtype == torch.float32
    assert (model(tokens()) - want).abs().max() <= 1e-4 * want.abs().max()


def test_mxfp4_experts_are_dequantised_on_request(tmp_path: Path) -> None:
    plain = build("gpt_oss", hidden_size=64, intermediate_size=64)
    plain.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    blocks, scales = {}, {}
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = stored.pop(name).shape
        blocks[name] = torch.randint(0, 256, (experts, outer, inner // 32, 16), generator=generator).to(torch.uint8)
        scales[name] = torch.full((experts, outer, inner // 32), 124, dtype=torch.uint8)
    stored |= {f"{name}_blocks": value for name, value in blocks.items()}
    stored |= {f"{name}_scales": value for name, value in scales.items()}
    write(tmp_path, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    model = HookedMoE.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True))
    name = "model.layers.2.mlp.experts.down_proj"
    want = convert_moe_packed_tensors(blocks[name], scales[name])
    assert torch.equal(model.W_out[2], want)
    assert torch.isfinite(model(tokens())).all()


# --- what a model is ---


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_config_tells_the_sizes_that_the_model_has(model_type: str) -> None:
    info = config_info(config(model_type))
    hf = build(model_type)
    assert info.parameters == sum(parameter.numel() for parameter in hf.parameters())
    idle = 1 - info.top_k / info.n_experts
    packed = [p.numel() for name, p in hf.named_parameters() if ".experts." in name and "shared" not in name]
    assert info.active == info.parameters - round(sum(packed) * idle)
    assert info.memory(torch.bfloat16) == 2 * info.parameters
    model = HookedMoE.from_hf(hf, check=False)
    assert (info.moe_layers, info.n_experts, info.top_k) == (model.moe_layers, model.n_experts, model.top_k)
    assert info.has_shared == model.has_shared(model.moe_layers[0])
    assert info.d_expert == model.W_out[model.moe_layers[0]].shape[1]


def test_large_models_have_the_sizes_that_are_known_of_them() -> None:
    assert config_info(MixtralConfig()).parameters == 46_702_792_704
    assert config_info(DeepseekV3Config()).parameters == 671_026_404_352


def test_a_model_without_experts_is_refused() -> None:
    dense = config("deepseek", first_k_dense_replace=4)
    with pytest.raises(UnsupportedModelError, match="this deepseek has no layer with experts"):
        config_info(dense)
    with pytest.raises(UnsupportedModelError, match="'llama' is not supported"):
        config_info(LlamaConfig())


def test_models_and_info_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in (*FAMILIES, *REFUSED))
    config("glm4_moe").save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        "model type  glm4_moe\n"
        "layers      4, of which 3 have experts: 1–3\n"
        "experts     8 of width 24, 3 for each token, and shared experts\n"
        "width       40\n"
        "router      sigmoid, 3 largest of the best groups + bias, normalised, × routed_scaling_factor\n"
        "parameters  113,080 (69,880 active for each token)\n"
        "memory      0.4 MiB in float32, 0.2 MiB in bfloat16, for the parameters alone\n"
    )
    assert main(["info", str(tmp_path / "nothing")]) == 2
    assert "No checkpoint" in capsys.readouterr().err
