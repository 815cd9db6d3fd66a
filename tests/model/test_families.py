"""A closed world: what is not in the table is refused by name, as quantised experts are; configs describe models."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    FineGrainedFP8Config,
    GptOssConfig,
    JetMoeConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, convert_moe_packed_tensors
from transformers.utils.quantization_config import Mxfp4Config

from moe_lens.cli.main import main
from moe_lens.errors import CheckpointError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.families.refusals import REFUSED
from moe_lens.model.families.table import FAMILIES, family_of, here
from moe_lens.model.hf_compat import OLDEST, RELEASE
from moe_lens.model.loading.model_info import config_info, model_info
from moe_lens.model.loading.sizes_that_fit import check_runs
from tests.matrix.configs import build, class_of, config, tokens

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
    with pytest.raises(UnsupportedModelError, match="'nemo' is not supported. .*TransformerBridge. Supp.*: afmoe, "):
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


def test_layers_that_give_a_token_different_numbers_of_experts_are_refused() -> None:
    same = HookedMoE.from_hf(build("hunyuan_v1_moe", num_experts_per_tok=[3] * 4, moe_topk=None))
    assert same.top_k == 3
    with pytest.raises(UnsupportedModelError, match=r"layers of this hunyuan_v1_moe give a token .* experts, \[2, 3\]"):
        HookedMoE.from_hf(build("hunyuan_v1_moe", num_experts_per_tok=[3, 2, 3, 3], moe_topk=None))


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


class ParamWrapper(nn.Module):
    """What PEFT puts around a module to change its parameters."""

    __module__ = "peft.tuners.lora.layer"

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer


@pytest.mark.parametrize(
    ("family", "wrapped"),
    [
        ("mixtral", "model.layers.1.mlp.experts"),
        ("dbrx", "transformer.blocks.1.ffn.experts.mlp"),
        ("jetmoe", "model.layers.1.mlp.input_linear"),
        ("mixtral", "model.layers.1.mlp.gate"),
        ("mixtral", "model.layers.1.self_attn.q_proj"),
        ("mixtral", "lm_head"),
    ],
)
def test_adapters_are_to_be_merged_first_wherever_they_lie(family: str, wrapped: str) -> None:
    model: Any = build(family)
    model.set_submodule(wrapped, ParamWrapper(model.get_submodule(wrapped)))
    with pytest.raises(
        UnsupportedModelError, match=rf"PEFT lies on {re.escape(wrapped)} \(ParamWrapper\): merge first"
    ) as error:
        HookedMoE.from_hf(model)
    assert "uantise" not in str(error.value)
    model.set_submodule(wrapped, model.get_submodule(wrapped).base_layer)
    HookedMoE.from_hf(model)


def test_an_adapter_that_comes_after_wrapping_is_refused_at_the_next_pass() -> None:
    hooked = HookedMoE.from_hf(build("mixtral"))
    model: Any = hooked.original_model
    before = hooked(tokens())
    moe = hooked._moe(1)
    moe.experts = ParamWrapper(moe.experts)
    model.peft_config = {}  # PEFT leaves it on every model that it changes
    with pytest.raises(UnsupportedModelError, match=r"PEFT lies on model\.layers\.1\.mlp\.experts \(ParamWrapper\)"):
        hooked(tokens())
    moe.experts = moe.experts.base_layer
    assert torch.equal(hooked(tokens()), before)


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


def test_a_format_whose_library_is_absent_is_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("mixtral").save_pretrained(tmp_path)
    write(tmp_path, load_file(tmp_path / "model.safetensors"), {"quant_method": "aqlm"})
    capsys.readouterr()
    assert main(["routing", "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "aqlm" in said.lower() and said.count("\n") == 1


# --- what a model is ---


@pytest.mark.parametrize("model_type", here())
def test_a_config_tells_the_sizes_that_the_model_has(model_type: str) -> None:
    info = config_info(config(model_type))
    hf = build(model_type)
    assert info.parameters == sum(parameter.numel() for parameter in hf.parameters())
    stacked = (".input_linear.", ".output_linear.") if model_type == "jetmoe" else (".experts.",)
    packed = {
        name: p
        for name, p in hf.named_parameters()
        if any(part in name for part in stacked) and "shared" not in name and p.dim() > 1
    }
    unused = sum(packed.pop(name).numel() for name in [*packed] if "vision_moe" in name)  # by tokens of text
    # LongCat's identities have rows in one of two parameters, which nothing uses.
    rows = {name: len(p) if info.n_identities else info.n_experts for name, p in packed.items()}
    idle = sum(p.numel() - info.top_k * p.numel() // rows[name] for name, p in packed.items())
    assert info.active == info.parameters - unused - idle
    assert info.memory(torch.bfloat16) == 2 * info.parameters
    model = HookedMoE.from_hf(hf, check=False)
    assert (info.moe_layers, info.n_experts, info.top_k) == (model.moe_layers, model.n_experts, model.top_k)
    assert info.has_shared == bool(model.n_shared_experts)
    assert info.n_identities == model.n_identity_experts
    assert info.d_expert == model.W_out[model.moe_layers[0]].shape[1]


# Fields as the models' own config.json has them; thousand millions of parameters, as their authors round them. Those of
# Qwen3 (3.3), gpt-oss (3.6) and JetMoE (2.2) leave the input embedding (0.3, 0.6, 0.1) out of what is active, those of
# DeepSeek say 37.
KNOWN: dict[str, tuple[PreTrainedConfig, float, float]] = {
    "Mixtral-8x7B": (MixtralConfig(), 46.7, 12.9),
    "DeepSeek-V3": (DeepseekV3Config(), 671.0, 37.6),
    "Qwen1.5-MoE-A2.7B": (
        Qwen2MoeConfig(num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408, norm_topk_prob=False),
        14.3,
        2.7,
    ),
    "OLMoE-1B-7B": (OlmoeConfig(hidden_size=2048, intermediate_size=1024), 6.9, 1.3),
    "Qwen3-30B-A3B": (
        Qwen3MoeConfig.from_dict(
            {"num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768}
        ),
        30.5,
        3.4,
    ),
    "jetmoe-8b": (JetMoeConfig(num_hidden_layers=24), 8.5, 2.3),
    "gpt-oss-20b": (GptOssConfig(num_hidden_layers=24, num_local_experts=32), 20.9, 4.2),
}


@pytest.mark.parametrize("name", KNOWN)
def test_large_models_have_the_sizes_that_are_known_of_them(name: str) -> None:
    known, total, active = KNOWN[name]
    info = config_info(known)
    assert (round(info.parameters / 1e9, 1), round(info.active / 1e9, 1)) == (total, active)


def test_the_16b_model_has_the_parameters_that_its_checkpoint_has(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent / "deepseek_moe_16b.json", tmp_path / "config.json")
    assert model_info(tmp_path).parameters == 16_375_728_128


def test_a_model_without_experts_is_refused() -> None:
    dense = config("deepseek", first_k_dense_replace=4)
    with pytest.raises(UnsupportedModelError, match="this deepseek has no layer with experts"):
        config_info(dense)
    with pytest.raises(UnsupportedModelError, match="'llama' is not supported"):
        config_info(LlamaConfig())


@pytest.mark.typed
def test_models_and_info_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in (*FAMILIES, *REFUSED))
    config("glm4_moe").save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    known, _, here = capsys.readouterr().out.partition("in bfloat16 ")
    assert here.startswith("fits: 0.2 MiB in ") and "\nin nf4 " in here  # of the machine
    assert known == (
        "model type  glm4_moe\n"
        "layers      4, of which 3 have experts: 1–3\n"
        "experts     8 of width 24, 3 for each token, and shared experts\n"
        "width       40\n"
        "router      sigmoid, 3 largest of the best groups + bias, normalised, × routed_scaling_factor\n"
        "parameters  113,080 (69,880 active for each token)\n"
        "memory      0.4 MiB in float32, 0.2 MiB in bfloat16, for the parameters alone\n"
    )
    assert main(["info", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().out.startswith("model type  glm4_moe\n")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_group": 3}, "n_group is 3, and 8 experts cannot stand in so many groups"),  # three tokens as eight thirds
        ({"n_group": 0}, "n_group is 0"),
        ({"topk_group": 9}, "topk_group is 9, and there are 4 groups"),
        (
            {"topk_group": 1, "num_experts_per_tok": 3},
            "num_experts_per_tok is 3, and a token may choose among 2 experts",
        ),
    ],
)
def test_groups_that_experts_cannot_stand_in_are_refused(changes, said, tmp_path, capsys) -> None:
    model = build("deepseek_v3")
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(CheckpointError, match=said):
        HookedMoE.from_hf(model)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    assert main(["info", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    greedy = {
        **config("deepseek_v2").to_dict(),
        "topk_method": "greedy",
    }  # has no groups
    (tmp_path / "config.json").write_text(json.dumps({**greedy, **changes}))
    assert main(["info", str(tmp_path)]) == 0


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("mixtral", {"num_attention_heads": 5}, "keys of width 16, 2 times each, do not fit queries of width 40"),
        ("gpt_oss", {"num_key_value_heads": 3}, "is the number of heads a multiple of that of key-value heads?"),
        ("glm4_moe", {"partial_rotary_factor": 3.0}, "heads are of width 8, and rotary angles are for 24"),
        ("deepseek_v3", {"v_head_dim": 0}, "values are of width 0"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "the experts of this qwen3_moe are of width 0"),
        (
            "mixtral",
            {"sliding_window": 0},
            "RuntimeError: Attempting to broadcast a dimension of length 7",
        ),
        ("gpt_oss", {"sliding_window": -1}, "head_dim 8, sliding_window -1, rope_parameters"),
        ("gpt_oss", {"sliding_window": None}, "cannot be run: TypeError"),
        ("gpt_oss", {"partial_rotary_factor": 0}, "cannot be run: RuntimeError: "),
        ("solar_open", {"partial_rotary_factor": 0.5}, "cannot be run: RuntimeError: "),
    ],
)
def test_sizes_with_which_transformers_cannot_be_run_are_refused(model_type, changes, said, tmp_path) -> None:
    raw = json.loads(config(model_type, head_dim=8).to_json_string(use_diff=False))
    if "partial_rotary_factor" in changes:
        changes = {"rope_parameters": {**raw["rope_parameters"], **changes}}
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(CheckpointError, match=re.escape(said)):
        model_info(tmp_path)
    if RELEASE[:2] == OLDEST and said == "values are of width 0":
        return  # it computes with no numbers
    with pytest.raises((RuntimeError, TypeError, ValueError)), torch.no_grad():  # transformers itself
        class_of(model_type)._from_config(AutoConfig.from_pretrained(tmp_path)).eval()(tokens())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert model_info(tmp_path).model_type == model_type, "a control: as it was, it is fine"


@pytest.mark.parametrize(
    "changes",
    [{"router_jitter_noise": float("nan")}, {"attention_dropout": 1.5}, {"router_aux_loss_coef": float("inf")}],
)
def test_what_training_alone_reads_is_no_reason_to_refuse(changes, tmp_path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    assert model_info(tmp_path).top_k == 3
    assert torch.equal(HookedMoE.from_pretrained(str(tmp_path))(tokens()), model(tokens()).logits)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported. A model without experts belongs in"),
        ({"model_type": "doge"}, "model_type 'doge' is not supported: its experts are rows of an embedding"),
        ({"model_type": "nosuch"}, "model_type 'nosuch' is unknown to transformers"),
        ({"model_type": None}, "has no model_type"),
        ({"hidden_size": "many"}, "Field 'hidden_size' expected int, got str"),
        ({"hidden_act": "nosuch"}, "KeyError: 'nosuch'"),
        ({"num_hidden_layers": 0}, "this mixtral has no layer with experts"),
        ({"num_experts_per_tok": 99}, "this mixtral has 8 experts, and its config asks for 99 a token"),
        ({"quantization_config": 3}, "is no config that transformers understands"),
        ("{broken", "cannot be read as JSON"),
        ("[1]", "holds a JSON list; expected an object"),
        (None, "there is no such folder, and the hub may not be asked (HF_HUB_OFFLINE)"),
    ],
)
def test_info_says_in_one_line_what_is_wrong(
    changes: dict[str, Any] | str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps({**config("mixtral").to_dict(), **changes}) if isinstance(changes, dict) else changes
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert main(["info", "no/such" if text is None else str(tmp_path)]) == 2
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err.count("\n") == 1
    assert seen.err.startswith("moe-lens: error: ") and said in seen.err


class Runs(torch.nn.Module):
    """A model whose forward is a function of tokens."""

    def __init__(self, forward: Any):
        super().__init__()
        self.forward = forward


def test_a_forward_that_asks_for_values_is_passed_and_one_that_is_not_implemented_is_not() -> None:
    for asks in (lambda ids: ids.sum().item(), lambda ids: ids.nonzero(), lambda ids: ids.to("cpu")):
        check_runs(Runs(asks), [], None)

    def fail(ids: torch.Tensor) -> None:
        raise NotImplementedError("rope type spiral")

    with pytest.raises(CheckpointError, match="cannot be run: NotImplementedError: rope type spiral"):
        check_runs(Runs(fail), [], None)
