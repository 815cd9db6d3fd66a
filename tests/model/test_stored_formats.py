"""Checkpoints that are stored packed: what is read is what a formula, written here anew, says of the stored bytes."""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.utils.quantization_config import Mxfp4Config

from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.loading.checkpoint import Checkpoint, OpenFiles
from moe_lens.model.loading.config_json import believed_config
from moe_lens.model.loading.formats.view import FORMATS, UNREAD, method_of, unpacked
from moe_lens.model.loading.pretrained import load_pretrained
from moe_lens.model.loading.quantising import PackingConfig, packed_in
from tests.matrix.configs import build

ROOT = Path(__file__).parents[2]
Stored = tuple[dict[str, Tensor], np.ndarray]
"""Tensors by what follows the name of the layer (`q_proj`), and the numbers that they stand for [out, in]."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def bits_of(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Rows of unsigned numbers as one stream of bits in words, the lowest bit first."""
    stream = np.unpackbits(numbers.astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    stream = stream.reshape(len(numbers), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=-1, bitorder="little").view(np.int32)


def pairs(numbers: np.ndarray) -> np.ndarray:
    """Two numbers of four bits in each byte, the first in the lower half."""
    return (numbers[..., 0::2] | numbers[..., 1::2] << 4).astype(np.uint8)


def in_blocks(values: np.ndarray, scale: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each number times the scale of the block that it is in."""
    out = np.empty_like(values, np.float32)
    for row in range(values.shape[0]):
        for column in range(0, values.shape[1], width):
            out[row, column : column + width] = (
                values[row, column : column + width] * scale[row // height, column // width]
            )
    return out


def floats8(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.from_numpy(random(seed).normal(size=shape).astype(np.float32)).to(torch.float8_e4m3fn)


def scales(*shape: int, seed: int) -> np.ndarray:
    return random(seed + 1).uniform(0.05, 0.15, shape).astype(np.float32)


def fp8_blocks(rows: int, columns: int, seed: int) -> Stored:
    weight, scale = floats8((rows, columns), seed), scales(math.ceil(rows / 40), math.ceil(columns / 24), seed=seed)
    numbers = in_blocks(weight.float().numpy(), scale, 40, 24)
    return {"weight": weight, "weight_scale_inv": torch.from_numpy(scale), "activation_scale": torch.ones(())}, numbers


def fp8_rows(rows: int, columns: int, seed: int) -> Stored:
    weight, scale = floats8((rows, columns), seed), scales(rows, 1, seed=seed)
    return {"weight": weight, "weight_scale": torch.from_numpy(scale)}, weight.float().numpy() * scale


def fp8_one(rows: int, columns: int, seed: int) -> Stored:
    weight, scale = floats8((rows, columns), seed), scales(1, seed=seed)
    beside = {"weight_scale": torch.from_numpy(scale), "input_scale": torch.ones(1)}
    return {"weight": weight, **beside}, weight.float().numpy() * scale


def mxfp8(rows: int, columns: int, seed: int) -> Stored:
    weight = floats8((rows, columns), seed)
    power = random(seed).integers(122, 126, (rows, math.ceil(columns / 32)))
    numbers = in_blocks(weight.float().numpy(), 2.0 ** (power - 127), 1, 32)
    return {"weight": weight, "weight_scale_inv": torch.from_numpy(power.astype(np.uint8))}, numbers


def mxfp8_e8m0(rows: int, columns: int, seed: int) -> Stored:
    stored, numbers = mxfp8(rows, columns, seed)
    return {"weight": stored["weight"], "weight_scale": stored["weight_scale_inv"].view(torch.float8_e8m0fnu)}, numbers


def mxfp8_bytes(rows: int, columns: int, seed: int) -> Stored:
    stored, numbers = mxfp8(rows, columns, seed)
    return {"weight": stored["weight"], "weight_scale": stored["weight_scale_inv"]}, numbers


def int8_rows(rows: int, columns: int, seed: int) -> Stored:
    weight, scale = random(seed).integers(-127, 128, (rows, columns)), scales(rows, 1, seed=seed) / 64
    stored = {"weight": torch.from_numpy(weight.astype(np.int8)), "weight_scale": torch.from_numpy(scale)}
    return stored, (weight * scale).astype(np.float32)


def int8_groups(rows: int, columns: int, seed: int) -> Stored:
    weight, scale = random(seed).integers(-127, 128, (rows, columns)), scales(rows, columns // 16, seed=seed) / 64
    zero = random(seed + 2).integers(-8, 8, scale.shape)
    of = random(seed + 3).permutation(np.arange(columns) // 16)
    stored = {"weight": weight.astype(np.int8), "weight_scale": scale, "weight_g_idx": of.astype(np.int32)}
    stored["weight_zero_point"] = zero.astype(np.int8)
    numbers = ((weight - zero[:, of]) * scale[:, of]).astype(np.float32)
    return {name: torch.from_numpy(value) for name, value in stored.items()}, numbers


def words4(rows: int, columns: int, seed: int, *, zeros: bool = False, order: bool = False, group: int = 16) -> Stored:
    group = group if group > 0 else columns
    number, groups = random(seed).integers(-8, 8, (rows, columns)), math.ceil(columns / group)
    scale, zero = scales(rows, groups, seed=seed) / 4, np.zeros((rows, groups), int)
    of = np.arange(columns) // group
    stored = {"weight_packed": bits_of(number + 8, 4), "weight_scale": scale, "weight_shape": np.array([rows, columns])}
    if zeros:
        zero = random(seed + 2).integers(-8, 8, (rows, groups))
        stored["weight_zero_point"] = np.ascontiguousarray(bits_of((zero + 8).T, 4).T)
    if order:
        of = random(seed + 3).permutation(of)
        stored["weight_g_idx"] = of.astype(np.int32)
    numbers = ((number - zero[:, of]) * scale[:, of]).astype(np.float32)
    return {name: torch.from_numpy(value) for name, value in stored.items()}, numbers


def nvfp4(rows: int, columns: int, seed: int) -> Stored:
    index, scale = random(seed).integers(0, 16, (rows, columns)), floats8((rows, columns // 16), seed + 1).abs()
    numbers = in_blocks(E2M1[index], scale.float().numpy() / np.float32(16), 1, 16)
    one = {"weight_global_scale": torch.tensor([16.0])}
    return {"weight_packed": torch.from_numpy(pairs(index)), "weight_scale": scale, **one}, numbers


def modelopt(rows: int, columns: int, seed: int) -> Stored:
    stored, numbers = nvfp4(rows, columns, seed)
    renamed = {"weight": stored["weight_packed"], "weight_scale": stored["weight_scale"]}
    return {**renamed, "weight_scale_2": torch.tensor(1 / 16), "input_scale": torch.tensor(1.0)}, numbers


def mxfp4_pack(rows: int, columns: int, seed: int) -> Stored:
    index, power = random(seed).integers(0, 16, (rows, columns)), random(seed).integers(122, 126, (rows, columns // 32))
    numbers = in_blocks(E2M1[index], 2.0 ** (power - 127), 1, 32)
    packed = {"weight_packed": pairs(index), "weight_scale": power.astype(np.uint8)}
    return {name: torch.from_numpy(value) for name, value in packed.items()}, numbers


def gptq(
    rows: int, columns: int, seed: int, *, bits: int = 4, offset: int = 1, order: bool = False, group: int = 32
) -> Stored:
    group = group if group > 0 else columns
    number, groups = random(seed).integers(0, 2**bits, (rows, columns)), columns // group
    zero, scale = random(seed + 1).integers(0, 2**bits, (rows, groups)), scales(rows, groups, seed=seed) / 2**bits
    scale = scale.astype(np.float16)
    of = np.arange(columns) // group
    of = random(seed + 2).permutation(of) if order else of
    stored = {
        "qweight": np.ascontiguousarray(bits_of(number, bits).T),
        "qzeros": bits_of((zero.T - offset) % 2**bits, bits),
        "scales": np.ascontiguousarray(scale.T),
        "g_idx": of.astype(np.int32),
    }
    numbers = ((number - zero[:, of]) * scale.astype(np.float32)[:, of]).astype(np.float32)
    return {name: torch.from_numpy(value) for name, value in stored.items()}, numbers


def awq(rows: int, columns: int, seed: int, *, group: int = 32) -> Stored:
    stored, numbers = gptq(rows, columns, seed, offset=0, group=group)
    number = random(seed).integers(0, 16, (rows, columns)).T
    zero = random(seed + 1).integers(0, 16, (rows, len(stored["scales"]))).T

    def words(values: np.ndarray) -> Tensor:
        """Of eight columns, the even ones in the lower half of a word, the odd ones in the upper."""
        eight = values.reshape(len(values), -1, 8)
        return torch.from_numpy(
            bits_of(np.concatenate((eight[..., 0::2], eight[..., 1::2]), -1).reshape(values.shape), 4)
        )

    return {"qweight": words(number), "qzeros": words(zero), "scales": stored["scales"]}, numbers


def bnb4(rows: int, columns: int, seed: int, *, nested: bool = True) -> Stored:
    index, code = (
        random(seed).integers(0, 16, rows * columns),
        np.sort(random(seed).uniform(-1, 1, 16).astype(np.float32)),
    )
    blocks = rows * columns // 64
    how: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
    high_first = (index[0::2] << 4 | index[1::2]).astype(np.uint8)[:, None]
    stored: dict[str, np.ndarray] = {"weight": high_first, "weight.quant_map": code}
    scale = scales(blocks, seed=seed)
    stored["weight.absmax"] = scale
    if nested:
        of, coarse = random(seed).integers(0, 256, blocks), scales(math.ceil(blocks / 256), seed=seed)
        fine = np.sort(random(seed).uniform(-1, 1, 256).astype(np.float32))
        scale = fine[of] * coarse[np.arange(blocks) // 256] + np.float32(0.125)
        stored |= {
            "weight.absmax": of.astype(np.uint8),
            "weight.nested_absmax": coarse,
            "weight.nested_quant_map": fine,
        }
        how |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.125}
    stored["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(how).encode(), np.uint8).copy()
    numbers = (code[index] * scale[np.arange(rows * columns) // 64]).reshape(rows, columns).astype(np.float32)
    return {name: torch.from_numpy(value) for name, value in stored.items()}, numbers


def bnb4_in_bfloat16(rows: int, columns: int, seed: int) -> Stored:
    stored, numbers = bnb4(rows, columns, seed)
    return {**stored, "weight": stored["weight"].view(-1, 2).view(torch.bfloat16)}, numbers


def bnb8(rows: int, columns: int, seed: int) -> Stored:
    weight, largest = random(seed).integers(-127, 128, (rows, columns)), scales(rows, seed=seed)
    stored = {"weight": weight.astype(np.int8), "SCB": largest, "weight_format": np.array(0, np.uint8)}
    numbers = (weight * (largest.astype(np.float64) / 127)[:, None]).astype(np.float32)
    return {name: torch.from_numpy(value) for name, value in stored.items()}, numbers


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


BNB = {"quant_method": "bitsandbytes"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
WAYS: dict[str, tuple[dict[str, Any], Callable[[int, int, int], Stored]]] = {
    "fp8 in blocks": ({"quant_method": "fp8", "weight_block_size": [40, 24]}, fp8_blocks),
    "fp8, one scale": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_one),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, fp8_rows),
    "mxfp8": ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, mxfp8),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_one),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, modelopt),
    "modelopt mxfp8": ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, mxfp8_bytes),
    "modelopt mxfp8, E8M0": ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, mxfp8_e8m0),
    "compressed-tensors mxfp8-quantized": (
        compressed("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32), mxfp8_bytes,
    ),
    "compressed-tensors mxfp8-quantized, E8M0": (
        compressed("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32), mxfp8_e8m0,
    ),
    "compressed-tensors float-quantized": (compressed("float-quantized", num_bits=8, strategy="channel"), fp8_rows),
    "compressed-tensors int-quantized": (compressed("int-quantized", num_bits=8, strategy="channel"), int8_rows),
    "compressed-tensors int-quantized, in another order": (
        compressed("int-quantized", num_bits=8, group_size=16, actorder="group"), int8_groups,
    ),
    "compressed-tensors pack-quantized": (compressed("pack-quantized", num_bits=4, group_size=16), words4),
    "compressed-tensors pack-quantized, one group": (
        compressed("pack-quantized", num_bits=4, strategy="channel", group_size=-1),
        lambda *at: words4(*at, zeros=True, group=-1),
    ),
    "compressed-tensors pack-quantized, zeros": (
        compressed("pack-quantized", num_bits=4, group_size=16),
        lambda *at: words4(*at, zeros=True),
    ),
    "compressed-tensors pack-quantized, in another order": (
        compressed("pack-quantized", num_bits=4, group_size=16),
        lambda *at: words4(*at, zeros=True, order=True),
    ),
    "compressed-tensors nvfp4-pack-quantized": (compressed("nvfp4-pack-quantized", num_bits=4), nvfp4),
    "compressed-tensors mxfp4-pack-quantized": (compressed("mxfp4-pack-quantized", num_bits=4), mxfp4_pack),
    "bitsandbytes 4 bits": ({**BNB, "load_in_4bit": True}, lambda *at: bnb4(*at, nested=False)),
    "bitsandbytes 4 bits, scales packed too": ({**BNB, "load_in_4bit": True}, bnb4),
    "bitsandbytes 4 bits, in numbers of another kind": (
        {**BNB, "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, bnb4_in_bfloat16,
    ),
    "bitsandbytes 8 bits": ({**BNB, "load_in_8bit": True}, bnb8),
    "gptq 4 bits": (GPTQ, gptq),
    "gptq 8 bits, in another order": ({**GPTQ, "bits": 8}, lambda *at: gptq(*at, bits=8, order=True)),
    "gptq 3 bits": ({**GPTQ, "bits": 3}, lambda *at: gptq(*at, bits=3)),
    "gptq, one group": ({**GPTQ, "group_size": -1}, lambda *at: gptq(*at, group=-1)),
    "gptq_v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, lambda *at: gptq(*at, offset=0)),
    "auto-round as gptq": ({**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, gptq),
    "awq gemm": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq),
    "awq gemm, one group": (
        {"quant_method": "awq", "bits": 4, "group_size": -1, "version": "gemm"},
        lambda *at: awq(*at, group=-1),
    ),
}  # fmt: skip
"""What config.json says, and the tensors of a matrix."""

SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 96, "num_hidden_layers": 2},
    "deepseek": {"hidden_size": 64, "moe_intermediate_size": 96, "intermediate_size": 96, "num_hidden_layers": 2},
}


def write(folder: Path, tensors: dict[str, Tensor], said: dict[str, Any] | None) -> None:
    file = folder / "model.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps({**raw, **({"quantization_config": said} if said else {})}))


def pack(folder: Path, way: str, model_type: str) -> dict[str, Tensor]:
    """A checkpoint of which every matrix of the layers is packed; its numbers by name."""
    build(model_type, **SIZES[model_type]).save_pretrained(folder)
    said, make = WAYS[way]
    stored, numbers = dict[str, Tensor](), dict[str, Tensor]()
    for seed, (name, value) in enumerate(load_file(folder / "model.safetensors").items()):
        if name.endswith("_proj.weight"):
            parts, exact = make(value.shape[0], value.shape[1], seed)
            stored |= {f"{name.removesuffix('weight')}{part}": one for part, one in parts.items()}
            numbers[name] = torch.from_numpy(exact)
        else:
            stored[name] = numbers[name] = value
    write(folder, stored, said)
    return numbers


@pytest.mark.typed
@pytest.mark.parametrize("way", WAYS)
def test_a_matrix_is_what_a_formula_gives(way: str, tmp_path: Path) -> None:
    said, make = WAYS[way]
    parts, exact = make(96, 160, 3)
    save_file({f"q_proj.{part}": one for part, one in parts.items()}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.locate(str(tmp_path), {})
    for dtype in (torch.float32, torch.bfloat16):
        seen = unpacked(checkpoint, said, dtype)
        assert seen.tensors.keys() == {"q_proj.weight"}, "scales are no parameters"
        found, wanted = seen.tensors["q_proj.weight"].read(OpenFiles()), torch.from_numpy(exact)
        assert found.dtype == dtype and found.shape == seen.tensors["q_proj.weight"].shape == wanted.shape
        assert (found.float() - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize(
    ("way", "model_type"),
    [
        ("fp8 in blocks", "qwen3_moe"),
        ("gptq 4 bits", "deepseek"),
        ("bitsandbytes 4 bits", "qwen3_moe"),
        ("gptq, one group", "qwen3_moe"),
        ("awq gemm, one group", "qwen3_moe"),
        ("compressed-tensors pack-quantized, one group", "qwen3_moe"),
    ],
)
def test_a_model_has_the_numbers_that_its_checkpoint_stands_for(way: str, model_type: str, tmp_path: Path) -> None:
    numbers = pack(tmp_path, way, model_type)
    found = {dtype: load_pretrained(str(tmp_path), dtype=dtype)[0] for dtype in (torch.float32, torch.bfloat16)}
    write(tmp_path, numbers, None)
    for dtype, model in found.items():
        plain = load_pretrained(str(tmp_path), dtype=dtype)[0].state_dict()
        state = model.state_dict()
        assert state.keys() == plain.keys()
        for name, value in state.items():
            error = (value.float() - plain[name].float()).abs().max()
            assert error <= torch.finfo(dtype).eps * plain[name].abs().max(), name
        assert not hasattr(model.config, "quantization_config"), "what is saved says that it is packed no more"


def test_a_packed_checkpoint_is_packed_anew_on_request(tmp_path: Path) -> None:
    numbers = pack(tmp_path, "fp8 in blocks", "deepseek")
    packed = packed_in(load_pretrained(str(tmp_path), quantization_config=PackingConfig(scheme="int8"))[0])
    write(tmp_path, numbers, None)
    plain = packed_in(load_pretrained(str(tmp_path), quantization_config=PackingConfig(scheme="int8"))[0])
    assert len(plain) == len(packed) > 8
    for (name, one), (_, other) in zip(packed, plain, strict=True):
        assert torch.equal(one.get_buffer("data"), other.get_buffer("data")), name


def in_mxfp4(folder: Path) -> dict[str, Tensor]:
    """A checkpoint of a gpt-oss; its numbers by name."""
    build("gpt_oss", hidden_size=64, intermediate_size=96).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    numbers = dict(stored)
    for seed, name in enumerate(name for name in numbers if name.endswith(("gate_up_proj", "down_proj"))):
        experts, inner, outer = stored.pop(name).shape
        parts = [mxfp4_pack(outer, inner, 100 * seed + expert) for expert in range(experts)]
        blocks = torch.stack([one["weight_packed"] for one, _ in parts])
        stored[f"{name}_blocks"] = blocks.view(experts, outer, inner // 32, 16)
        stored[f"{name}_scales"] = torch.stack([one["weight_scale"] for one, _ in parts])
        numbers[name] = torch.stack([torch.from_numpy(exact).T for _, exact in parts])
    write(folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return numbers


@pytest.mark.typed
def test_gpt_oss_s_experts_are_read_as_they_are_stored(tmp_path: Path) -> None:
    numbers = in_mxfp4(tmp_path)
    model = load_pretrained(str(tmp_path), dtype=torch.float32)[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, numbers[name].float()), name


DEEPSEEK_V3 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_deepseek_v3_s_576_rows_are_four_blocks_and_a_half(tmp_path: Path) -> None:
    """Negative control: blocks of 576 / 5 rows, as dividing by the number of scales gives, are another matrix."""
    weight, scale = floats8((576, 256), 0), scales(5, 2, seed=0)
    stored = {"a.weight": weight, "a.weight_scale_inv": torch.from_numpy(scale)}
    save_file(stored, tmp_path / "model.safetensors")
    found = unpacked(Checkpoint.locate(str(tmp_path), {}), DEEPSEEK_V3, torch.float32).tensors["a.weight"]
    exact = in_blocks(weight.float().numpy(), scale, 128, 128)
    assert torch.equal(found.read(OpenFiles()), torch.from_numpy(exact))
    assert np.abs(exact - in_blocks(weight.float().numpy(), scale, 116, 128)).max() > 0.01


@pytest.mark.typed
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    def seen(said: dict[str, Any], **tensors: Tensor) -> Tensor:
        named = {name.replace("__", "."): value for name, value in tensors.items()}
        save_file(named, tmp_path / "model.safetensors")
        view = unpacked(Checkpoint.locate(str(tmp_path), {}), said, torch.float32)
        return view.tensors["a.weight"].read(OpenFiles())

    weight = floats8((64, 64), 0)
    with pytest.raises(CheckpointError, match=r"a\.weight is packed \(F8_E4M3\), and its scale is missing"):
        seen(DEEPSEEK_V3, a__weight=weight)
    with pytest.raises(CheckpointError, match=r"a\.weight cannot be unpacked: 64 × 64 numbers .* need 1 × 1 scales"):
        seen(DEEPSEEK_V3, a__weight=weight, a__weight_scale_inv=torch.ones(2, 1))
    with pytest.raises(CheckpointError, match=r"a\.weight is I8, and nothing beside it says how fp8 packed it"):
        seen(DEEPSEEK_V3, a__weight=torch.ones(4, 4, dtype=torch.int8))
    with pytest.raises(CheckpointError, match=r"qweight is packed \(I32\), and its scale and zeros is missing"):
        seen(GPTQ, a__qweight=torch.ones(4, 4, dtype=torch.int32))
    with pytest.raises(UnsupportedModelError, match="in the format marlin-24, which is not read"):
        seen(compressed("marlin-24", num_bits=4), a__weight=weight)
    with pytest.raises(UnsupportedModelError, match="after its matrices were rotated"):
        seen({**compressed("pack-quantized", num_bits=4), "transform_config": {"u": {}}}, a__weight=weight)
    with pytest.raises(UnsupportedModelError, match=r"AWQ in the layout gemv of 4 bits; only gemm of 4"):
        seen({"quant_method": "awq", "version": "GEMV"}, a__weight=weight)
    with pytest.raises(UnsupportedModelError, match=r"GPTQ in the layout marlin"):
        seen({**GPTQ, "checkpoint_format": "marlin"}, a__weight=weight)
    with pytest.raises(UnsupportedModelError, match=r"a\.qweight is in words of I16; only I32 is read"):
        seen({**GPTQ, "pack_dtype": "int16"}, a__qweight=torch.ones(4, 4, dtype=torch.int16))
    with pytest.raises(UnsupportedModelError, match=r"packed by quanto \(tensors that only its own.*Read are awq, "):
        seen({"quant_method": "quanto"}, a__weight=weight)


@pytest.mark.parametrize("within", ["quantization_config", "compression_config"])
def test_no_group_has_fewer_columns_than_none_but_for_the_one_of_all(within: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"

    def read(size: int, *nested: str) -> None:
        said: Any = {"group_size": size}
        for key in (*nested, within):
            said = {key: said}
        file.write_text(json.dumps({"model_type": "olmoe", **said}))
        believed_config(file)

    read(-1)
    read(-1, "weights", "group_0", "config_groups")
    with pytest.raises(CheckpointError, match=rf": {within}\.group_size is -2; expected columns of a group, or -1"):
        read(-2)
    with pytest.raises(CheckpointError, match=rf": {within}\.config_groups\.group_0\.weights\.group_size is -2;"):
        read(-2, "weights", "group_0", "config_groups")


def test_another_packing_than_the_stored_one_is_not_taken_for_it(tmp_path: Path) -> None:
    pack(tmp_path, "fp8 in blocks", "deepseek")
    with pytest.raises(InputError, match="quantization_config says mxfp4, and the checkpoint is packed by fp8"):
        HookedMoE.from_pretrained(tmp_path, quantization_config=Mxfp4Config(dequantize=True))
    HookedMoE.from_pretrained(tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True))


def test_the_page_says_what_happens_with_each_format_and_each_that_is_read_is_tried() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    spec = importlib.util.spec_from_file_location("script_families", ROOT / "scripts" / "families.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.formats() in page and "| `gptq` | read: 2, 3, 4 and 8 bits" in page
    tried = {method_of(said) for said, _ in WAYS.values()}
    assert FORMATS.keys() - tried == {"mxfp4", "modelopt_fp4", "torchao"}, "two have tests of their own"
    assert FORMATS["modelopt_fp4"].find is FORMATS["modelopt"].find
    assert not FORMATS.keys() & UNREAD.keys()


def test_scales_of_another_form_or_kind_are_refused(tmp_path: Path) -> None:
    """Negative control: as many scales, along the other side, would give another matrix."""

    def read(said: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
        save_file({f"a.{name}": value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors")
        return unpacked(Checkpoint.locate(str(tmp_path), {}), said, torch.float32).tensors["a.weight"].read(OpenFiles())

    block, made = WAYS["fp8 in blocks"][0], fp8_blocks(80, 96, 0)[0]
    assert torch.equal(read(block, made), torch.from_numpy(fp8_blocks(80, 96, 0)[1]))
    scale = made["weight_scale_inv"]
    for wrong, said in (
        (scale.T, r"need 2 × 4 scales, and there are 4 × 2"),
        (scale.int(), r"a\.weight_scale_inv is I32, which a\.weight cannot be unpacked with"),
        (scale.index_fill(0, torch.tensor([1]), torch.inf), r"a\.weight is NaN .*, as is a\.weight_scale_inv"),
    ):
        with pytest.raises(CheckpointError, match=said):
            read(block, {**made, "weight_scale_inv": wrong})
    made = nvfp4(16, 32, 0)[0]  # its second scale divides: an infinite one would give zeros
    with pytest.raises(CheckpointError, match="NaN or infinite in places, as is a.weight_global_scale"):
        read(compressed("nvfp4-pack-quantized", num_bits=4), {**made, "weight_global_scale": torch.tensor([torch.inf])})
    with pytest.raises(CheckpointError, match="what is packed is not as compressed-tensors packs it: tuple index"):
        read(compressed("nvfp4-pack-quantized", num_bits=4), {**made, "weight_packed": made["weight_packed"].flatten()})
    for said, made, scale in (  # bytes are exponents, or places in a table, only where the format has them so
        (GPTQ, gptq(64, 64, 0)[0], "scales"),
        (WAYS["awq gemm"][0], awq(64, 64, 0)[0], "scales"),
        (WAYS["bitsandbytes 8 bits"][0], bnb8(64, 64, 0)[0], "SCB"),
        (WAYS["bitsandbytes 4 bits"][0], bnb4(64, 64, 0, nested=False)[0], "weight.absmax"),
        (WAYS["modelopt nvfp4"][0], modelopt(64, 64, 0)[0], "weight_scale"),
        (compressed("nvfp4-pack-quantized", num_bits=4), nvfp4(64, 64, 0)[0], "weight_scale"),
        (WAYS["compressed-tensors int-quantized"][0], int8_rows(64, 64, 0)[0], "weight_scale"),
        (WAYS["compressed-tensors pack-quantized"][0], words4(64, 64, 0)[0], "weight_scale"),
    ):
        assert read(said, made).shape == (64, 64), "a control: with its own scales it is read"
        with pytest.raises(CheckpointError, match=rf"a\.{scale} is U8, which a\.weight cannot be unpacked with"):
            read(said, {**made, scale: made[scale].float().mul(9).to(torch.uint8)})
    made = mxfp4_pack(16, 32, 0)[0]
    with pytest.raises(CheckpointError, match=r"its scales are torch\.float8_e4m3fn, and powers of two are expected"):
        read(
            WAYS["compressed-tensors mxfp4-pack-quantized"][0],
            {**made, "weight_scale": torch.ones(16, 1).to(torch.float8_e4m3fn)},
        )
    made = gptq(64, 64, 0)[0]
    with pytest.raises(CheckpointError, match=r"a\.qweight is F32, which a\.weight cannot be unpacked with"):
        read(GPTQ, {**made, "qweight": made["qweight"].float()})


def test_what_the_config_says_lies_beside_a_matrix_must_lie_there(tmp_path: Path) -> None:
    def read(said: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
        save_file({f"a.{name}": value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors")
        return unpacked(Checkpoint.locate(str(tmp_path), {}), said, torch.float32).tensors["a.weight"].read(OpenFiles())

    made, exact = words4(32, 64, 0, zeros=True, order=True)
    said = compressed("pack-quantized", num_bits=4, group_size=16, symmetric=False, actorder="group")
    assert torch.equal(read(said, made), torch.from_numpy(exact))
    for part in ("weight_zero_point", "weight_g_idx"):
        with pytest.raises(CheckpointError, match=rf"a\.weight_packed is packed \(I32\), and its {part} is missing"):
            read(said, {name: value for name, value in made.items() if name != part})
    plain, exact = words4(32, 64, 0)
    assert torch.equal(read(compressed("pack-quantized", num_bits=4, group_size=16), plain), torch.from_numpy(exact))
    made, exact = gptq(64, 64, 0, order=True)
    assert torch.equal(read({**GPTQ, "desc_act": True}, made), torch.from_numpy(exact))
    with pytest.raises(CheckpointError, match="its order is missing"):
        read({**GPTQ, "desc_act": True}, {name: value for name, value in made.items() if name != "g_idx"})


@pytest.mark.parametrize("make", [gptq, awq])
def test_groups_of_another_size_than_the_config_says_are_those_of_the_scales(make: Any, tmp_path: Path) -> None:
    """auto-round packs some layers in other groups (`extra_config`)."""

    def read(said: int, group: int, columns: int = 96) -> tuple[Tensor, Tensor]:
        tensors, exact = make(64, columns, 0, group=group)
        tensors = {f"a.{name}": value for name, value in tensors.items() if name != "g_idx"}
        save_file(tensors, tmp_path / "model.safetensors")
        how = {**GPTQ, "quant_method": make.__name__, "group_size": said}
        found = unpacked(Checkpoint.locate(str(tmp_path), {}), how, torch.float32).tensors["a.weight"]
        return found.read(OpenFiles()), torch.from_numpy(exact)

    for said, group in ((32, 32), (32, 16), (16, 32), (32, -1), (-1, 32), (48, 48)):
        found, exact = read(said, group)
        assert torch.equal(found, exact), (said, group)
    with pytest.raises(CheckpointError, match=r"160 columns in groups of 32 need 5 scales, and there are 4"):
        read(32, 40, 160)


def test_a_matrix_in_other_bits_than_the_rest_is_read_as_its_own_name_says(tmp_path: Path) -> None:
    made, exact = words4(32, 64, 0)
    save_file({f"l.3.{name}": value for name, value in made.items()}, tmp_path / "model.safetensors")

    def read(targets: list[str], bits: int, others: int) -> Tensor:
        said = compressed("pack-quantized", num_bits=others, group_size=16)
        said["config_groups"]["group_0"]["targets"] = ["re:l.*", "Linear"]
        said["config_groups"]["group_1"] = {"targets": targets, "weights": {"num_bits": bits, "group_size": 16}}
        view = unpacked(Checkpoint.locate(str(tmp_path), {}), said, torch.float32)
        return view.tensors["l.3.weight"].read(OpenFiles())

    assert torch.equal(read(["l.3"], 4, 8), torch.from_numpy(exact)), "a name comes before a pattern"
    for bits, words in ((8, 16), (2, 4)):
        with pytest.raises(CheckpointError, match=rf"64 numbers of {bits} bits take {words} words, and there are 8"):
            read(["l.4"], 4, bits)


@pytest.mark.parametrize("form", [(2, 1, 48), (2, 48, 1)])
def test_llama_4_s_experts_in_fbgemm_fp8_have_a_scale_for_each_output(form: tuple[int, ...], tmp_path: Path) -> None:
    """As many inputs as outputs, so that a scale for each input would fit, too."""
    weight = floats8((96, 48), 0).view(2, 48, 48)
    scale = torch.from_numpy(scales(2, 48, seed=0))
    stored = {"experts.down_proj": weight, "experts.down_proj_scale": scale.view(form)}
    save_file(stored, tmp_path / "model.safetensors")
    view = unpacked(Checkpoint.locate(str(tmp_path), {}), {"quant_method": "fbgemm_fp8"}, torch.float32)
    found = view.tensors["experts.down_proj"].read(OpenFiles())
    assert torch.equal(found, weight.float() * scale[:, None, :])
    assert not torch.equal(found, weight.float() * scale[:, :, None])
