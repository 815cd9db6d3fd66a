"""Matrices in 4 and 8 bits: what is unpacked, and that every family computes what the unpacked matrices would give."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_lens import names
from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.experts.quantised import PackedLinear, PackedMatrices
from moe_lens.model.families.table import here
from moe_lens.model.loading.quantising import packed_in, quantise
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


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_what_is_unpacked_is_the_nearest_that_there_is(scheme: Any) -> None:
    weight = matrices()  # rows of 24 are no multiple of 64: read as matrices, bitsandbytes mixes up blocks on the CPU
    packed = PackedMatrices.pack(weight, scheme)
    expected = by_hand(weight, scheme)
    assert deviation(packed.read(), expected) <= 1e-6
    assert deviation(packed.read([2, 0]), expected[[2, 0]]) <= 1e-6
    assert packed.read([]).shape == (0, 40, 24)
    assert packed.numel() == weight.numel()
    assert packed.nbytes < weight.nbytes / (6 if scheme == "nf4" else 3)


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
    PackedLinear.convert(linear, "int8", "q_proj")
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


@pytest.mark.parametrize("model_type", here())
def test_every_family_computes_what_unpacked_matrices_give(model_type: str) -> None:
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
    assert deviation(logits, found["unpacked"][0]) <= 2e-5 * float(logits.abs().max())
    for hook in (names.EXPERT_POST, names.EXPERT_OUT, names.ROUTED_OUT):
        assert deviation(cache[names.mlp(hook, layer)], found["unpacked"][1][names.mlp(hook, layer)]) <= 2e-5 * float(
            cache[names.mlp(hook, layer)].abs().max()
        )
    assert deviation(gradient, found["unpacked"][2]) <= 2e-5 * float(gradient.abs().max())
    assert deviation(model.W_in[layer, 1], reference.W_in[layer, 1]) == 0
    assert deviation(model.W_out[layer], reference.W_out[layer]) == 0
    assert deviation(logits, exact) > 1e-3 * float(exact.abs().max()), "negative control: packing changes numbers"


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(InputError, match="quantize is 'nf8'; expected one of 'nf4', 'int8'"):
        quantise(build("olmoe"), "nf8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedModelError, match=r"a matrix of 40 × 23 numbers is no multiple of 64"):
        PackedMatrices.pack(matrices((2, 40, 23)), "nf4", "down_proj")
