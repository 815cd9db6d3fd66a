"""Matrices in 4 and 8 bits: what is unpacked, and that every family computes what the unpacked matrices would give."""

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config
from transformers.integrations.accelerate import compute_module_sizes

from moe_lens import names
from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.experts.expert_weights_view import Experts, Rows, grouped_product, multiplied
from moe_lens.model.experts.nonstandard_experts import Llama4Experts
from moe_lens.model.experts.packed import Matrices, PackedLinear
from moe_lens.model.experts.quantised import PackedMatrices
from moe_lens.model.families.table import here
from moe_lens.model.loading.device_map import Size, plan_memory
from moe_lens.model.loading.dispatch import places
from moe_lens.model.loading.quantising import Packer, PackingConfig, packed_in, quantise
from tests.matrix.configs import build, tokens
from tests.wrapped import deviation

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NormalFloat, arXiv 2305.14314, appendix E."""


def matrices(shape: tuple[int, ...] = (3, 40, 24), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_hand(weight: Tensor, scheme: str) -> Tensor:
    """Each number rounded to the nearest that its scheme has."""
    if scheme == "int8":
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return (weight / scale).round() * scale
    blocks = weight.reshape(len(weight), -1, 64)
    scale, code = blocks.abs().amax(-1, keepdim=True), torch.tensor(NF4)
    return (code[((blocks / scale)[..., None] - code).abs().argmin(-1)] * scale).view_as(weight)


def keeping(module: nn.Module, x: Tensor) -> tuple[Tensor, list[int]]:
    """The output, and how large the tensors are that it keeps for its gradient."""
    kept = list[int]()

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return module(x), kept


@pytest.mark.typed
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_what_is_unpacked_is_the_nearest_that_there_is(scheme: Any) -> None:
    weight = matrices()  # rows of 24 are no multiple of 64: read as matrices, bitsandbytes mixes up blocks on the CPU
    packed = PackedMatrices.pack(weight, scheme)
    expected = by_hand(weight, scheme)
    assert deviation(packed.read(), expected) <= 1e-6
    assert deviation(packed.read([2, 0]), expected[[2, 0]]) <= 1e-6
    assert packed.read([]).shape == (0, 40, 24)
    assert packed.numel() == weight.numel()
    assert repr(packed) == f"PackedMatrices({scheme}, {tuple(weight.shape)})"
    assert packed.nbytes < weight.nbytes / (6 if scheme == "nf4" else 3)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_many_numbers_are_unpacked_some_at_a_time(scheme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA bitsandbytes counts numbers in 32 bits: a layer of DeepSeek-V3's experts has more than that."""
    packed = PackedMatrices.pack(matrices((7, 16, 24), torch.bfloat16), scheme)
    whole, asked = packed.read(), list[int]()

    def counted(self: PackedMatrices, data: Tensor, scale: Tensor) -> Tensor:
        asked.append(len(data))
        return unpack(self, data, scale)

    unpack = PackedMatrices._unpacked
    monkeypatch.setattr(PackedMatrices, "_unpacked", counted)
    monkeypatch.setattr("moe_lens.model.experts.quantised.AT_ONCE", 2 * 16 * 24 + 1)
    assert torch.equal(packed.read(), whole) and asked == [2, 2, 2, 1]
    assert torch.equal(packed.read([4, 1]), whole[[4, 1]]) and packed.read([]).shape == (0, 16, 24)


@pytest.mark.parametrize("numbers", [1, 3 * 24, 5 * 24 + 1])
def test_8_bits_are_unpacked_in_blocks_of_rows(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor: in between they are in float32, which is to stay in its cache."""
    packed, rows = PackedMatrices.pack(matrices((3, 16, 24), torch.bfloat16), "int8"), list[int]()
    in_steps = packed.data * (packed.scale / 127)[..., None]

    def counted(self: Tensor, source: Tensor) -> Tensor:
        rows.append(len(source))
        return copied(self, source)

    copied = Tensor.copy_
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "copy_", counted)
        patched.setattr("moe_lens.model.experts.quantised.IN_CACHE", numbers)
        found = packed.read(), packed.read([2, 0])
    assert torch.equal(found[0], in_steps.bfloat16()) and torch.equal(found[1], in_steps[[2, 0]].bfloat16())
    assert sum(rows) == 5 * 16 and max(rows) == max(1, numbers // 24)


@pytest.mark.typed
def test_each_expert_is_unpacked_just_before_its_product_unless_that_changes_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of Llama 4 all at once: with two threads, torch rounds a batch of products otherwise than one of them."""
    weight: Any = PackedMatrices.pack(matrices((4, 64, 64)), "int8")
    of_llama4: Any = Llama4Experts.product
    ids = torch.tensor([0] * 5 + [2] * 5 + [3] * 5)
    ends = torch.tensor([5, 5, 10, 15], dtype=torch.int32)
    rows, x = Rows(ids, torch.arange(5).repeat(3), ends, 5), matrices((15, 64))
    asked, read = list[list[int]](), PackedMatrices.read
    monkeypatch.setattr(PackedMatrices, "read", lambda self, which: (asked.append(list(which)), read(self, which))[1])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for product in (grouped_product, partial(of_llama4, None)):
            whole = product(x, read(weight), rows)
            apart, together = (
                multiplied(x, Matrices(weight, True, 4), rows, product, alone) for alone in (True, False)
            )
            assert torch.equal(together, whole)
            assert deviation(apart, whole) <= (0 if product is grouped_product else 1e-5)
            assert asked == [[0], [2], [3], [0, 2, 3]]
            asked.clear()
    finally:
        torch.set_num_threads(threads)
    assert Experts.alone and not Llama4Experts.alone


def test_8_bits_need_no_kernel_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """That for CUDA takes float16 alone."""

    def refused(*_: Any) -> Any:
        raise ValueError("A must be float16, got torch.bfloat16")

    monkeypatch.setattr("bitsandbytes.functional.int8_vectorwise_quant", refused)
    weight = matrices(dtype=torch.bfloat16)
    weight[1, 2] = 0
    packed = PackedMatrices.pack(weight, "int8")
    assert not packed.read()[1, 2].any(), "a row of zeros"
    step = weight.abs().amax(-1, keepdim=True).float() / 127
    assert bool(((packed.float().read() - weight.float()).abs() <= 0.5001 * step).all())


def test_scales_stay_exact_when_a_model_is_cast() -> None:
    packed = PackedMatrices.pack(matrices(), "nf4")
    before = packed.scale.clone()
    half = copy.deepcopy(packed).to(torch.bfloat16)
    assert half.scale.dtype == torch.float32 and torch.equal(half.scale, before)
    assert half.read().dtype == torch.bfloat16
    assert torch.equal(half.read(), packed.read().bfloat16())
    assert torch.equal(packed.to(torch.float64).read().float(), packed.to(torch.float32).read())


def test_a_linear_layer_is_packed_in_place_and_differentiates() -> None:
    linear = nn.Linear(24, 40)
    PackedLinear.convert(linear, PackedMatrices.pack(linear.weight.detach()[None], "int8"))
    plain = nn.Linear(24, 40)
    plain.weight.data, plain.bias.data = linear.weight, linear.bias.data
    x = matrices((5, 24)).requires_grad_()
    ours, kept = keeping(linear, x)
    theirs, kept_by_plain = keeping(plain, x)
    assert max(kept, default=0) < 24 * 40 <= max(kept_by_plain), "no unpacked weight is kept for the gradient"
    assert deviation(ours, theirs) <= 1e-6
    mine, reference = (torch.autograd.grad(out.square().sum(), x)[0] for out in (ours, theirs))
    assert deviation(mine, reference) <= 1e-4


def unpacked(model: Any, packed: Any) -> Any:
    """A model with the matrices that `packed` unpacks."""
    modules = dict(model.named_modules())
    for name, stored in packed_in(packed):
        owner, _, attribute = name.rpartition(".")
        holder, attribute = modules[owner], "weight" if attribute == "packed" else attribute
        parameter = getattr(holder, attribute)
        parameter.data = stored.read().view_as(parameter)
    return model


SHAPES = (
    "dbrx", "deepseek_v3", "gemma4_text", "gpt_oss", "jetmoe", "llama4_text", "longcat_flash", "nemotron_h", "olmoe"
)  # fmt: skip
"""Every way in which experts are stored and called."""


@pytest.mark.parametrize("model_type", [name for name in SHAPES if name in here()])
def test_a_family_computes_what_unpacked_matrices_give(model_type: str) -> None:
    packed = build(model_type).requires_grad_(True)
    before = sum(parameter.numel() for parameter in packed.parameters())
    with torch.no_grad():
        exact = packed(tokens()).logits
    quantise(packed, "nf4" if len(model_type) % 2 else "int8")
    stored = packed_in(packed)
    assert before == sum(p.numel() for p in packed.parameters()) + sum(part.numel() for _, part in stored)
    reference = HookedMoE.from_hf(unpacked(build(model_type).requires_grad_(True), packed), check=False)
    model = HookedMoE.from_hf(packed)
    layer = model.moe_layers[-1]
    found = {}
    for name, of in (("packed", model), ("unpacked", reference)):
        with torch.no_grad():
            logits, cache = of.run_with_cache(tokens(), names_filter=lambda hook: ".mlp." in hook)
        start = torch.zeros(of.cfg.d_model, requires_grad=True)
        shift = partial(lambda start, x, hook: x + start, start)
        moved = of.run_with_hooks(tokens(), fwd_hooks=[(names.mlp(names.MLP_IN, layer), shift)])
        found[name] = (logits, cache, torch.autograd.grad(moved.square().sum(), start)[0])
    logits, cache, gradient = found["packed"]
    assert torch.equal(logits, found["unpacked"][0])
    for hook in (names.EXPERT_POST, names.EXPERT_OUT, names.ROUTED_OUT):
        assert deviation(cache[names.mlp(hook, layer)], found["unpacked"][1][names.mlp(hook, layer)]) <= 2e-5 * float(
            cache[names.mlp(hook, layer)].abs().max()
        )
    assert deviation(gradient, found["unpacked"][2]) <= 2e-5 * float(gradient.abs().max())
    assert deviation(model.W_in[layer, 1], reference.W_in[layer, 1]) == 0
    assert deviation(model.W_out[layer], reference.W_out[layer]) == 0
    assert deviation(logits, exact) > 1e-3 * float(exact.abs().max()), "negative control: packing changes numbers"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    build("mixtral").save_pretrained(folder)
    return folder


def logits(model: HookedMoE) -> Tensor:
    with torch.no_grad():
        return model(tokens())


@pytest.mark.typed
def test_loading_packs_as_packing_does_and_what_is_saved_comes_back(stored: Path, tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(stored)
    quantise(reference, "nf4")
    expected = logits(HookedMoE.from_hf(reference))
    model = HookedMoE.from_pretrained(stored, quantize="nf4")
    assert torch.equal(logits(model), expected)
    theirs = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert torch.equal(logits(HookedMoE.from_pretrained(stored, quantization_config=theirs)), expected)
    model.save_pretrained(tmp_path / "packed")
    again = HookedMoE.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again), expected)
    for name, part in packed_in(again.original_model):
        other = dict(packed_in(model.original_model))[name]
        assert all(torch.equal(part.get_buffer(half), other.get_buffer(half)) for half in ("data", "scale"))
    sizes = [sum(f.stat().st_size for f in at.glob("*.safetensors")) for at in (stored, tmp_path / "packed")]
    assert sizes[1] < sizes[0] / 2
    with pytest.raises(OSError, match=r"model\.safetensors"):  # rather than experts at random
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with pytest.raises(UnsupportedModelError, match="this model is quantised"):
        model.state_dict()
    assert "experts in nf4" in repr(model)
    inner: Any = model.original_model
    assert not inner.hf_quantizer.is_trainable
    assert model._experts(1).sizes()[1] == 3 * model.W_in[1, 0].numel()
    x = torch.randn(1, 4, model.cfg.d_model)
    by_hand = (silu(x @ model.W_gate[1, 2]) * (x @ model.W_in[1, 2])) @ model.W_out[1, 2]
    with torch.no_grad():
        found = model.expert_outputs(1, x, torch.full((1, 4, 1), 2))[:, :, 0]
    assert deviation(found, by_hand) <= 1e-5 * float(by_hand.abs().max())


def test_what_is_read_together_with_experts_and_is_none_of_them_stays(tmp_path: Path) -> None:
    """The checkpoint of an Ernie 4.5 VL numbers the vision's experts behind the text's."""
    plain, packed = build("ernie4_5_vl_moe"), build("ernie4_5_vl_moe")
    plain.save_pretrained(tmp_path)
    quantise(packed, "int8")
    model = HookedMoE.from_pretrained(tmp_path, quantize="int8")
    assert torch.equal(logits(model), logits(HookedMoE.from_hf(packed)))
    state = plain.state_dict()
    vision = {name: value for name, value in model.original_model.named_parameters() if "vision_moe.experts" in name}
    assert vision and not any("text_moe.experts" in name for name, _ in model.original_model.named_parameters())
    for name, value in vision.items():
        assert torch.equal(value, state[name.replace("._original_component", "")]), name


def test_a_packed_model_changes_its_dtype_by_every_word_for_it(stored: Path) -> None:
    one, other = (HookedMoE.from_pretrained(stored, quantize="nf4") for _ in range(2))
    assert torch.equal(logits(one.to(torch.bfloat16)), logits(other.bfloat16()))
    assert torch.equal(logits(one.to("cpu", dtype=torch.float64)), logits(other.double()))
    assert one.cfg.dtype == torch.float64
    with pytest.raises(TypeError, match="floating point"):
        one.to(torch.int8)
    assert one.cfg.dtype == torch.float64


def test_the_embedded_model_is_packed_by_name() -> None:
    model = HookedMoE.from_pretrained("tiny-deepseekmoe", quantize="int8", dtype=torch.float32)
    exact = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
    text = "The old man looked at the sea and"
    with torch.no_grad():
        losses = [float(of(text, return_type="loss")) for of in (model, exact)]
    assert 0 < abs(losses[0] - losses[1]) < 0.02, "8 bits are near, and not the same"
    assert deviation(model.W_in[3, 17], exact.W_in[3, 17]) < 0.02
    for write in (lambda w: w.mul_(0), lambda w: w.T.zero_(), lambda w: w.__setitem__(0, 1), lambda w: w.__iadd__(1)):
        with pytest.raises(InputError, match="leaves the model as it is"):
            write(model.W_in[3, 17])
    with pytest.raises(InputError, match="leaves the model as it is"):
        torch.add(torch.ones(128, 64), 1, out=model.W_in[3, 17])
    assert type(model.W_in[3, 17] + 1) is Tensor and (model.W_in[3, 17].T @ model.W_in[3, 4]).shape == (64, 64)


@pytest.mark.parametrize(("name", "scheme"), [("mixtral", "nf4"), ("tiny-deepseekmoe", "int8")])
def test_room_is_planned_for_what_is_packed(
    name: str, scheme: Any, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU of 16 GB the numbers of a 16B fit in 4 bits, and as many in 16 bits would not."""
    source = stored if name == "mixtral" else name
    planned = list[Size]()

    def noted(size: Size, *args: Any) -> Any:
        planned.append(size)
        return plan_memory(size, *args)

    monkeypatch.setattr("moe_lens.model.loading.dispatch.plan_memory", noted)
    model = HookedMoE.from_pretrained(source, quantize=scheme, dtype=torch.bfloat16)
    takes = places(model.original_model)["cpu"]
    assert planned[0].packed and planned[0].total == takes
    if name == "mixtral":  # and as transformers counts, to divide a model among GPUs
        plain: Any = build(name)
        plain = plain.to("meta")
        packer = Packer(PackingConfig(scheme), pre_quantized=False)
        packer._process_model_before_weight_loading(plain)
        found = compute_module_sizes(plain.to(torch.bfloat16), packer)[0][""]
        assert found - sum(buffer.nbytes for buffer in plain.buffers()) == takes
    model.save_pretrained(tmp_path)
    HookedMoE.from_pretrained(tmp_path)
    assert planned[1].packed and planned[1].total == takes, "of what is stored packed, too"
    little: Any = {"cpu": takes - 1}
    for of, how in ((source, {"quantize": scheme, "dtype": torch.bfloat16}), (tmp_path, {})):
        with pytest.raises(InputError, match="packed, the model takes .*nor kept on disk"):
            HookedMoE.from_pretrained(of, max_memory=little, **how)


@pytest.mark.parametrize("where", [{"": "disk"}, {"model.embed_tokens": "meta", "": "cpu"}, "sequential"])
def test_packed_numbers_stay_in_one_kind_of_memory(where: Any, stored: Path) -> None:
    with pytest.raises(InputError, match="device_map puts parts of a packed model in .*name one of these"):
        HookedMoE.from_pretrained(stored, quantize="nf4", device_map=where, max_memory={"cpu": "50KB"})


def test_weights_that_are_no_numbers_are_refused(stored: Path, tmp_path: Path) -> None:
    broken = build("mixtral")
    broken.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = torch.nan
    broken.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj is NaN or infinite in places"):
        HookedMoE.from_pretrained(tmp_path, quantize="nf4")


@pytest.mark.parametrize("saved", ["nf4", "fp4", "int8"])
def test_what_was_saved_packed_is_not_packed_otherwise(saved: Any, stored: Path, tmp_path: Path) -> None:
    HookedMoE.from_pretrained(stored, quantize=saved).save_pretrained(tmp_path)
    for wish in ("nf4", "fp4", "int8", "stored"):
        if wish in (saved, "stored"):
            assert f"experts in {saved}" in repr(HookedMoE.from_pretrained(tmp_path, quantize=wish))
            continue
        with pytest.raises(InputError, match=rf"^{wish} is asked for, and this folder .* saved in {saved}: leave quan"):
            HookedMoE.from_pretrained(tmp_path, quantize=wish)
    theirs = FineGrainedFP8Config(dequantize=True)
    with pytest.raises(InputError, match=f"^fp8 is asked for, and this folder .* saved in {saved}"):
        HookedMoE.from_pretrained(tmp_path, quantization_config=theirs)


def test_two_wishes_are_one_too_many(stored: Path) -> None:
    with pytest.raises(InputError, match="got quantize='nf4' and another quantisation"):
        HookedMoE.from_pretrained(stored, quantize="nf4", load_in_8bit=True)
    with pytest.raises(InputError, match="quantize is 'nf5'; expected one of"):
        HookedMoE.from_pretrained(stored, quantize="nf5")  # pyright: ignore[reportArgumentType]


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, stored: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(InputError, match=r"need bitsandbytes: pip install 'moe-lens\[quant\]'"):
        HookedMoE.from_pretrained(stored, quantize="nf4")


@pytest.mark.untyped
def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(InputError, match="quantize is 'nf8'; expected one of 'nf4', 'fp4', 'int8'"):
        quantise(build("olmoe"), "nf8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedModelError, match=r"a matrix of 40 × 23 numbers is no multiple of 64"):
        PackedMatrices.pack(matrices((2, 40, 23)), "nf4", "down_proj")
