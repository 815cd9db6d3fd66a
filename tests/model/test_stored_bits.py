"""Checkpoints that stay in their own bits: the model is, to the bit, the one that is unpacked while it is loaded."""

import copy
import math
import pickle
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.accelerate import compute_module_sizes

from moe_lens import names
from moe_lens.errors import CheckpointError, InputError, MoELensError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.experts.packed import PackedLinear
from moe_lens.model.experts.stored_bits import KeptMatrices, Whole
from moe_lens.model.families.table import here
from moe_lens.model.loading.checkpoint import Checkpoint
from moe_lens.model.loading.device_map import Size, plan_memory
from moe_lens.model.loading.dispatch import places
from moe_lens.model.loading.model_info import here as on
from moe_lens.model.loading.model_info import model_info
from moe_lens.model.loading.quantising import Packer, packed_in
from tests.matrix.configs import build, tokens
from tests.model.test_device_map import machine
from tests.model.test_stored_formats import in_mxfp4, pack, scales, write

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def in_fp8(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Store a checkpoint's large matrices in FP8; blocks of 16 leave odd edges at widths of 40, 56 and 24."""
    stored = dict[str, Tensor]()
    for seed, (name, value) in enumerate(tensors.items()):
        large = any(part in name for part in ("proj", "experts", "linear")) and value.ndim in (2, 3)
        if not large or "visual" in name:
            stored[name] = value
            continue
        blocks = [math.ceil(length / 16) for length in value.shape[-2:]]
        stored[name] = (value / 0.1).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.from_numpy(scales(*value.shape[:-2], *blocks, seed=seed))
    write(folder, stored, FP8)
    return stored


def build_in_fp8(folder: Path, model_type: str, **sizes: Any) -> dict[str, Tensor]:
    """A checkpoint in FP8 of a family."""
    build(model_type, **sizes).save_pretrained(folder)
    return in_fp8(folder, load_file(folder / "model.safetensors"))


def seen(model: HookedMoE) -> dict[str, Tensor]:
    """All that a model gives: logits, what hooks inside the experts hold, and the gradient of what experts read."""
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens(), names_filter=lambda hook: ".mlp." in hook)
    start = torch.zeros(model.cfg.d_model, dtype=model.cfg.dtype, requires_grad=True)
    shift = partial(lambda start, x, hook: x + start, start)
    moved = model.run_with_hooks(tokens(), fwd_hooks=[(names.block(names.RESID_PRE, 0), shift)])
    return {**cache.cache_dict, "logits": logits, "gradient": torch.autograd.grad(moved.square().sum(), start)[0]}


def stored_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's packed tensors: of their numbers and of what they are unpacked with."""
    weights = Checkpoint.locate(str(folder), {}).tensors
    plain = ("norm", "embed", "lm_head", "bias", "router", "gate.weight", "activation", "input_scale", "quant_state")
    return sum(of.nbytes for name, of in weights.items() if not any(part in name for part in (*plain, "_shape")))


WAYS = [
    ("fp8 in blocks", "qwen3_moe", torch.bfloat16),
    pytest.param("fp8, one scale", "deepseek", torch.bfloat16, marks=pytest.mark.typed),
    ("fbgemm_fp8", "qwen3_moe", torch.float32),
    ("bitsandbytes 4 bits", "deepseek", torch.float32),
    ("bitsandbytes 4 bits, scales packed too", "qwen3_moe", torch.bfloat16),
    ("bitsandbytes 8 bits", "qwen3_moe", torch.float32),
    ("gptq 4 bits", "deepseek", torch.bfloat16),
    ("awq gemm", "qwen3_moe", torch.float16),
    ("compressed-tensors pack-quantized, in another order", "deepseek", torch.float32),
    ("modelopt nvfp4", "qwen3_moe", torch.bfloat16),
]


@pytest.mark.parametrize(("way", "model_type", "dtype"), WAYS)
def test_a_model_in_its_checkpoint_s_bits_is_the_unpacked_one(
    way: str, model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    pack(tmp_path, way, model_type)
    plain = HookedMoE.from_pretrained(tmp_path, dtype=dtype)
    kept = HookedMoE.from_pretrained(tmp_path, dtype=dtype, quantize="stored")
    expected, found = seen(plain), seen(kept)
    assert expected.keys() == found.keys() and len(found) > 10
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    layer = kept.moe_layers[-1]
    for of in ("W_gate", "W_in", "W_out"):
        assert torch.equal(getattr(kept, of)[layer, 5], getattr(plain, of)[layer, 5])
        assert torch.equal(getattr(kept, of)[layer, [6, 2]], getattr(plain, of)[layer, [6, 2]])
    packed = packed_in(kept.original_model)
    assert sum(part.nbytes for _, part in packed) == stored_bytes(tmp_path)
    assert sum(part.numel() for _, part in packed) > 0.8 * sum(p.numel() for p in plain.original_model.parameters())
    if way == "fp8 in blocks":
        anew = HookedMoE.from_pretrained(tmp_path, dtype=dtype, quantize="nf4")
        assert not torch.equal(seen(anew)["logits"], found["logits"]), "negative control: packing anew changes numbers"


def test_gpt_oss_stays_in_its_four_bits(tmp_path: Path) -> None:
    in_mxfp4(tmp_path)
    plain, kept = (HookedMoE.from_pretrained(tmp_path, dtype=torch.bfloat16, quantize=how) for how in (None, "stored"))
    expected, found = seen(plain), seen(kept)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert torch.equal(kept.W_in[1, 3], plain.W_in[1, 3]) and torch.equal(kept.W_gate[1], plain.W_gate[1])
    packed = packed_in(kept.original_model)
    assert len(packed) == 2 * len(kept.moe_layers) and "experts in mxfp4 as stored" in repr(kept)
    assert sum(part.nbytes for _, part in packed) == sum(part.numel() for _, part in packed) * 17 // 32


FAMILIES = (
    "deepseek_v3",
    "granitemoe",
    "jetmoe",
    "llama4_text",
    "longcat_flash",
    "mixtral",
    "nemotron_h",
    "qwen2_moe",
    "qwen3_vl_moe",
)
"""Experts that are stored alone, joined, in one tensor, transposed, without a branch, and called in other ways."""
TURNED = "qwen3_vl_moe"
"""Published checkpoints of it have experts' matrices the other way round than the model."""


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=[pytest.mark.typed] * (name == TURNED)) for name in FAMILIES if name in here()],
)
def test_however_a_family_stores_its_experts_they_stay(model_type: str, tmp_path: Path) -> None:
    stored = build_in_fp8(tmp_path, model_type)
    if model_type == TURNED:
        write(tmp_path, {name: value.mT if ".experts." in name else value for name, value in stored.items()}, FP8)
    dtype = torch.bfloat16 if len(model_type) % 3 == 0 else torch.float32  # a bias of qwen2_moe's is rounded with it
    plain, kept = (HookedMoE.from_pretrained(tmp_path, dtype=dtype, quantize=how) for how in (None, "stored"))
    assert all(
        isinstance(holder, KeptMatrices)
        for layer in kept.moe_layers
        for holder in kept._experts(layer)._parameters()[: 1 + kept._experts(layer).has_gate]
    )
    expected, found = seen(plain), seen(kept)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


REARRANGED = {
    "dbrx": "w1 of this dbrx cannot stay as it is stored .the experts of a layer are one matrix",
    "inkling2_text": r"gate_up_proj of this inkling2_text .*transformers rearranges it .*Interleave\(dim=1\)",
    "ernie4_5_vl_moe": "gate_up_proj of this ernie4_5_vl_moe .*rearranges it while it is read: ErnieFuse",
}


@pytest.mark.parametrize("model_type", [name for name in REARRANGED if name in here()])
def test_experts_that_cannot_stay_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    build_in_fp8(tmp_path, model_type)
    with pytest.raises(
        UnsupportedModelError, match=f'{REARRANGED[model_type]}.*leave quantize out, or write quantize="nf4"'
    ):
        HookedMoE.from_pretrained(tmp_path, quantize="stored")
    HookedMoE.from_pretrained(tmp_path)


def test_no_detour_is_taken_around_weights_that_are_packed(tmp_path: Path) -> None:
    """Jamba has one for layers whose weight cannot be read; it adds and subtracts a bias, and rounds between."""
    build_in_fp8(tmp_path, "jamba")
    plain = HookedMoE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = HookedMoE.from_pretrained(tmp_path, dtype=torch.bfloat16, quantize="stored")
    assert any("dt_proj" in name for name, _ in packed_in(kept.original_model))
    with torch.no_grad():
        expected = plain(tokens())
        assert torch.equal(kept(tokens()), expected)
        vars(kept.original_model.config)["_is_quantized"] = True
        assert not torch.equal(kept(tokens()), expected), "negative control: the detour"


def test_experts_that_are_not_all_stored_alike_are_refused(tmp_path: Path) -> None:
    stored = build_in_fp8(tmp_path, "mixtral", num_hidden_layers=1)
    name = next(name for name in stored if name.endswith("experts.3.w1.weight"))
    some = {**stored, name: stored[name].float()}
    del some[f"{name}_scale_inv"]
    write(tmp_path, some, FP8)
    with pytest.raises(UnsupportedModelError, match="gate_up_proj .*some of its matrices are packed, and others not"):
        HookedMoE.from_pretrained(tmp_path, quantize="stored")
    write(tmp_path, {**stored, f"{name}_scale_inv": stored[f"{name}_scale_inv"].bfloat16()}, FP8)
    with pytest.raises(UnsupportedModelError, match="its matrices are stored in different shapes or dtypes"):
        HookedMoE.from_pretrained(tmp_path, quantize="stored")
    write(tmp_path, {**stored, f"{name}_scale_inv": stored[f"{name}_scale_inv"] * torch.inf}, FP8)
    with pytest.raises(CheckpointError, match=r"experts\.3\.w1\.weight is NaN or infinite in places"):
        HookedMoE.from_pretrained(tmp_path, quantize="stored")
    write(tmp_path, {**stored, f"{name}_scale_inv": torch.ones(2, 2)}, FP8)
    with pytest.raises(MoELensError, match="different shapes|cannot be unpacked"):
        HookedMoE.from_pretrained(tmp_path, quantize="stored")


def test_what_is_not_packed_has_no_bits_to_keep(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='quantize="stored": config.json does not say that this checkpoint is packed'):
        HookedMoE.from_pretrained("tiny-deepseekmoe", quantize="stored")
    build("mixtral").save_pretrained(tmp_path)
    write(tmp_path, load_file(tmp_path / "model.safetensors"), FP8)
    with pytest.raises(InputError, match='quantize="stored": no experts or linear layers of this checkpoint are pa'):
        HookedMoE.from_pretrained(tmp_path, quantize="stored")
    model = HookedMoE.from_pretrained("tiny-deepseekmoe", quantize="int8")
    model.save_pretrained(tmp_path / "packed")
    again = HookedMoE.from_pretrained(tmp_path / "packed", quantize="stored")
    assert torch.equal(again.W_in[3, 17], model.W_in[3, 17]), "what moe_lens packed comes back so in any case"


def test_only_what_is_asked_for_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_in_fp8(tmp_path, "mixtral", num_hidden_layers=1)
    model = HookedMoE.from_pretrained(tmp_path, quantize="stored")
    asked = list[list[int]]()

    def counted(self: Whole, experts: Any) -> Tensor:
        if self.shape[0] == 8:  # of experts, not of a linear layer
            asked.append(list(experts))
        return read(self, experts)

    read = Whole.read
    monkeypatch.setattr(Whole, "read", counted)
    assert model.W_out[0, 5].ndim == 2 and model.W_in[0, [4, 1]].ndim == 3
    assert asked == [[5], [4, 1], [4, 1]], "a matrix alone; two that are joined, of two experts"
    asked.clear()
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens()[:1, :1], names_filter=names.mlp(names.EXPERT_INDICES, 0))
    chosen = cache[names.mlp(names.EXPERT_INDICES, 0)].flatten().tolist()
    assert sorted(asked) == sorted([expert] for expert in chosen * 3), "a token's experts and no others, one at a time"
    with pytest.raises(InputError, match="leaves the model as it is"):
        model.W_in[0, 1].mul_(0)


def test_bits_stay_exact_when_a_model_is_cast_and_copied(tmp_path: Path) -> None:
    build_in_fp8(tmp_path, "qwen2_moe", num_hidden_layers=1)  # linear layers with a bias, too
    kept, wide = (
        HookedMoE.from_pretrained(tmp_path, dtype=dtype, quantize="stored") for dtype in (torch.bfloat16, torch.float32)
    )
    assert any(isinstance(m, PackedLinear) and m.bias is not None for m in kept.original_model.modules())
    packed = [part for _, part in packed_in(kept.original_model)]
    before = [buffer.clone() for part in packed for buffer in part.buffers()]
    for part in (copy.deepcopy(packed[-1]), pickle.loads(pickle.dumps(packed[-1]))):
        assert torch.equal(part.float().read([0]).bfloat16(), packed[-1].read([0]))
    assert packed[-1].dtype == torch.bfloat16
    assert torch.equal(kept.to(torch.float32).W_in[0, 3], wide.W_in[0, 3])
    (tmp_path / "model.safetensors").write_bytes(b"")
    after = [buffer for part in packed for buffer in part.buffers()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)), "no view of the file"


def test_saving_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    build_in_fp8(tmp_path / "from", "mixtral", num_hidden_layers=1)
    model = HookedMoE.from_pretrained(tmp_path / "from", quantize="stored")
    with pytest.raises(UnsupportedModelError, match=r"\(fp8 as stored\), .*from, which .*copy that folder; or"):
        model.save_pretrained(tmp_path / "to")
    assert not (tmp_path / "to").exists()
    with pytest.raises(UnsupportedModelError, match="this model is quantised .* is fp8 as stored"):
        model.state_dict()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek"])
def test_room_is_planned_for_what_is_stored(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path, "gptq 4 bits", model_type)
    planned = list[Size]()

    def noted(size: Size, *args: Any) -> Any:
        planned.append(size)
        return plan_memory(size, *args)

    monkeypatch.setattr("moe_lens.model.loading.dispatch.plan_memory", noted)
    model = HookedMoE.from_pretrained(tmp_path, quantize="stored", dtype=torch.bfloat16)
    takes = places(model.original_model)["cpu"]
    assert planned[0].packed and planned[0].total == takes
    hf: Any = model.original_model
    config, plain = hf.config.quantization_config, type(hf)._from_config(copy.deepcopy(hf.config), dtype=torch.bfloat16)
    packer = Packer(config, pre_quantized=False)
    packer._process_model_before_weight_loading(plain)
    counted = compute_module_sizes(plain.to("meta"), packer)[0][""] - sum(buffer.nbytes for buffer in plain.buffers())
    assert abs(counted - takes) < 16, "and as transformers counts, to divide a model among GPUs"
    with pytest.raises(InputError, match="packed, the model takes .*nor kept on disk"):
        HookedMoE.from_pretrained(tmp_path, quantize="stored", dtype=torch.bfloat16, max_memory={"cpu": takes - 1})
    with pytest.raises(InputError, match="device_map puts parts of a packed model in"):
        HookedMoE.from_pretrained(tmp_path, quantize="stored", device_map={"": "disk"})


@pytest.mark.typed
def test_info_says_what_is_stored_packed_and_how_large_it_is(tmp_path: Path) -> None:
    folder, alone = tmp_path / "from", tmp_path / "alone"
    in_mxfp4(folder)
    model = HookedMoE.from_pretrained(folder, quantize="stored")
    takes = places(model.original_model)["cpu"] / 2**20
    said = dict(on(model_info(folder), machine(memory=1)))["as stored"]
    assert said == f"fits: {takes:,.1f} MiB in main memory (mxfp4, with --quantize stored)"
    alone.mkdir()
    shutil.copy(folder / "config.json", alone)
    said = dict(on(model_info(alone), machine(memory=1)))["as stored"]
    assert said == "its size can be said when its files are here (mxfp4, with --quantize stored)"
    assert "as stored" not in dict(on(model_info("tiny-deepseekmoe"), machine(memory=1)))
    (tmp_path / "dbrx").mkdir()
    build_in_fp8(tmp_path / "dbrx", "dbrx")
    assert "cannot stay as it is stored" in dict(on(model_info(tmp_path / "dbrx"), machine(memory=1)))["as stored"]
