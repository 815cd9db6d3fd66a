"""Linear layers and embeddings that are packed, or somebody's own: models with them run, and no part is the whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear
from transformers.integrations.gemma_quant import QuantizedLinear

from moe_lens import HookedMoE, LogitLens
from moe_lens.errors import UnsupportedModelError
from tests.matrix.configs import build, tokens


class Beside(nn.Module):
    """A layer, and an addition of low rank, as adapters are written by hand."""

    def __init__(self, linear: Any):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


class ShowingAWeight(Beside):
    @property
    def weight(self) -> Tensor:
        return self.linear.weight


class Inside(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input.sum(-1, keepdim=True)


def inside(linear: Any) -> nn.Module:
    made = Inside(linear.in_features, linear.out_features, bias=linear.bias is not None)
    made.load_state_dict(linear.state_dict())
    return made


def patched(linear: Any) -> nn.Module:
    own = linear.forward
    linear.forward = lambda x: 2 * own(x)
    return linear


def exchange(model: Any, name: str, made: Any) -> None:
    """Put what `made` makes of a linear layer in its place, in a model that may be wrapped."""
    owner = model if name == "lm_head" else model.model.layers[1].self_attn
    owner = getattr(owner, "original_component", owner)
    there = getattr(owner, name)
    setattr(owner, name, made(getattr(there, "original_component", there)))


OF = {"q_proj": "W_Q", "o_proj": "W_O", "lm_head": "W_U"}


@pytest.mark.parametrize("late", [False, True], ids=["before it is wrapped", "afterwards"])
@pytest.mark.parametrize("made", [Beside, ShowingAWeight, inside, patched])
@pytest.mark.parametrize("name", OF)
def test_a_weight_that_is_not_all_is_refused_and_the_model_runs(name: str, made: Any, late: bool) -> None:
    hf, ids = build("mixtral"), tokens()
    before = hf(ids).logits
    if not late:
        exchange(hf, name, made)
    model: Any = HookedMoE.from_hf(hf)
    if late:
        assert getattr(model, OF[name]) is not None  # a control
        exchange(hf, name, made)
    logits, cache = model.run_with_cache(ids)
    assert (logits - before).abs().max() > 0.1, "a control"
    assert (LogitLens(model).unembed(cache["resid_post", -1]) - logits).abs().max() <= 1e-5  # float32, of about 3
    part = model.unembed if name == "lm_head" else model.blocks[1].attn
    reads = [lambda: getattr(model, OF[name]), lambda: getattr(part, OF[name]), model.get_params]
    reads += [lambda: cache.logit_attrs(cache["resid_post", -1], 3)] if name == "lm_head" else []
    for read in reads:
        with pytest.raises(UnsupportedModelError, match=r"forward .*Merge what was added into the layer's weight"):
            read()
    for other in set(OF.values()) - {OF[name]}:
        assert torch.isfinite(getattr(model, other)).all()


@pytest.mark.parametrize(("name", "flags"), [("o_proj", ["attn_result"]), ("q_proj", ["split_qkv_input", "attn_in"])])
def test_heads_that_would_be_computed_without_an_addition_are_refused(name: str, flags: list[str]) -> None:
    hf, ids = build("mixtral"), tokens()
    exchange(hf, name, Beside)
    model: Any = HookedMoE.from_hf(hf)
    plain = model(ids)
    for flag in ("attn_result", "split_qkv_input", "attn_in"):
        getattr(model, f"set_use_{flag}")(True)
        if flag in flags:
            with pytest.raises(UnsupportedModelError, match="Merge what was added"):
                model.run_with_cache(ids)
        else:
            found = model.run_with_cache(ids)[0]
            assert (found - plain).abs().max() <= 1e-5 * plain.abs().max()  # float32, heads summed in another order
        getattr(model, f"set_use_{flag}")(False)
    assert torch.equal(model(ids), plain)


@pytest.mark.typed
@pytest.mark.parametrize("how", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_weights_that_bitsandbytes_has_packed_are_read_as_numbers(how: dict[str, Any], tmp_path: Path) -> None:
    wide: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    hf = build("mixtral", **wide)
    hf.save_pretrained(tmp_path)
    exact: Any = HookedMoE.from_hf(hf)
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32
    )
    model: Any = HookedMoE.from_hf(packed)
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        found, right = getattr(model, name), getattr(exact, name)
        assert found.shape == right.shape and not torch.equal(found, right)
        half_a_step = 0.16 if "load_in_4bit" in how else 0.004  # of nf4 at its widest, and of 8 bits: of the largest
        assert (found - right).abs().max() <= half_a_step * right.abs().max()
        assert torch.equal(getattr(model.blocks[1].attn, name), found[1])
    _, cache = model.run_with_cache(tokens())
    heads = torch.einsum("bphd,hdm->bpm", cache["z", 1], model.W_O[1].float())
    off = (heads - cache["attn_out", 1]).abs().max() / heads.abs().max()
    assert off <= 0.03  # the products are bfloat16 where the processor has them; in 8 bits, activations are packed too
    assert (cache.stack_head_results(2)[4:8].sum(0) - heads).abs().max() <= 1e-5 * heads.abs().max()  # float32
    model.set_use_attn_result(True)
    with pytest.raises(UnsupportedModelError, match=r"use_attn_result.* want numbers"):
        model.run_with_cache(tokens())


class HalfTable(nn.Module):
    """A table that takes half the room, and a number behind it."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.weight = nn.Parameter(table.weight.detach().half())

    def forward(self, ids: Tensor) -> Tensor:
        return 1.001 * nn.functional.embedding(ids, self.weight).float()


@pytest.mark.parametrize("model_type", ["mixtral", "glm4_moe"])
def test_what_an_embedding_gives_stays_as_it_is(model_type: str) -> None:
    """TransformerLens would cast it to the table's dtype."""
    hf: Any = build(model_type)
    hf.model.embed_tokens = HalfTable(hf.model.embed_tokens)
    right = hf(tokens()).logits
    model: Any = HookedMoE.from_hf(hf)
    logits, cache = model.run_with_cache(tokens(), names_filter="hook_embed")
    assert torch.equal(logits, right) and cache["hook_embed"].dtype == torch.float32
    with pytest.raises(UnsupportedModelError, match=r"HalfTable\.forward .*: W_E is a table"):
        model.W_E  # noqa: B018
    hf = build(model_type)
    hf.model.embed_tokens = nn.Sequential(hf.model.embed_tokens)
    with pytest.raises(UnsupportedModelError, match="the embedding is a Sequential, which has no weight"):
        HookedMoE.from_hf(hf)


def in_8_bits(linear: nn.Linear) -> nn.Module:
    made = QuantizedLinear(linear.in_features, linear.out_features, num_bits=8)
    scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    made.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
    made.weight_scale.data = scale
    return made


def in_float8(linear: nn.Linear) -> nn.Module:
    made = CompressedTensorsFP8Linear(linear.in_features, linear.out_features)
    scale = linear.weight.detach().abs().amax(1) / 448
    made.weight = nn.Parameter((linear.weight / scale[:, None]).to(torch.float8_e4m3fn), requires_grad=False)
    made.weight_scale.data = scale[None]
    return made


@torch.no_grad()
@pytest.mark.parametrize(("name", "made"), [("lm_head", in_8_bits), ("o_proj", in_float8), ("q_proj", in_float8)])
def test_layers_that_transformers_has_packed_are_not_read_without_their_scales(name: str, made: Any) -> None:
    hf = build("mixtral")
    exchange(hf, name, made)
    right = hf(tokens()).logits
    model: Any = HookedMoE.from_hf(hf)
    assert torch.equal(model(tokens()), right)
    with pytest.raises(UnsupportedModelError, match=r"computes by more than its weight.*HookedMoE\.from_pretrained"):
        getattr(model, OF[name])
    if name == "lm_head":
        _, cache = model.run_with_cache(tokens())
        assert (LogitLens(model).unembed(cache["resid_post", -1]) - right).abs().max() <= 1e-5  # float32, of about 3
    if name == "o_proj":
        with pytest.raises(UnsupportedModelError, match="packed in float8, and there are hooks inside attention"):
            model.run_with_cache(tokens())


@torch.no_grad()
def test_rows_of_a_packed_router_are_not_read_without_their_scales() -> None:
    hf: Any = build("gemma4_text")
    layer = max(at for at, layer in enumerate(hf.model.layers) if hasattr(layer, "router"))
    right = HookedMoE.from_hf(build("gemma4_text")).W_router[layer]
    assert torch.equal(right, hf.model.layers[layer].router.proj.weight), "a control"
    hf.model.layers[layer].router.proj = in_8_bits(hf.model.layers[layer].router.proj)
    model: Any = HookedMoE.from_hf(hf, check=False)
    with pytest.raises(UnsupportedModelError, match="W_router: a QuantizedLinear has its numbers packed"):
        model.W_router[layer]


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["granitemoe", "mixtral"])
def test_hooks_of_the_embedding_show_and_edit_what_enters_the_stream(model_type: str) -> None:
    """Also where the model multiplies by a factor after it."""
    model: Any = HookedMoE.from_hf(build(model_type))
    seen = {name: model.run_with_cache(tokens())[1][name] for name in ("hook_embed", "blocks.0.hook_resid_pre")}
    assert torch.allclose(*seen.values(), atol=0, rtol=1e-6)  # float32: one product, rounded once or not
    factor = (seen["hook_embed"] / model.W_E[tokens()]).median()
    assert (factor > 2) == (model_type == "granitemoe"), "a control"
    with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: value + 1)]):
        _, cache = model.run_with_cache(tokens(), names_filter="blocks.0.hook_resid_pre")
    edited = cache["blocks.0.hook_resid_pre"]
    assert torch.allclose(edited, seen["hook_embed"] + 1, atol=1e-5, rtol=0)  # float32, of about 12
