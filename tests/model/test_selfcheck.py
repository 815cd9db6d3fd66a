"""The self-check passes what is whole, quickly, and names law, layer and deviation of what is not."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_lens import names
from moe_lens.errors import HookError, SelfCheckError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.hooks.self_check import TOLERANCE, self_check
from tests.families import CONFIGS, build, tokens
from tests.wrapped import untouched, wrapped

families = pytest.mark.parametrize("family", CONFIGS)


@families
def test_what_is_whole_passes_in_less_than_a_second(family: str) -> None:
    case = wrapped(family)
    started = time.process_time()
    with untouched(case.model):
        deviations = self_check(case.model)
    assert time.process_time() - started < 1.0
    assert all(0 <= value <= 1e-6 for value in deviations.values()), "far inside of the tolerance"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype_passes(dtype: torch.dtype) -> None:
    hf = build("deepseek", dtype)
    assert HookedMoE.from_hf(hf).moe_layers == (1, 2)


class Lying(nn.Module):
    """A MoE block that adds something which no hook shows."""

    def __init__(self, block: Any, lie: float):
        super().__init__()
        self.gate, self.experts, self.shared_experts = block.gate, block.experts, block.shared_experts
        self.lie = lie

    def forward(self, x: Tensor) -> Tensor:
        _, weights, indices = self.gate(x)
        routed = self.experts(x.reshape(-1, x.shape[-1]), indices, weights).view(x.shape)
        return routed + self.shared_experts(x) + self.lie * x


def liar(lie: float) -> Any:
    hf: Any = build("deepseek")
    hf.model.layers[2].mlp = Lying(hf.model.layers[2].mlp, lie)
    return hf


def test_a_block_that_adds_what_no_hook_shows_is_found() -> None:
    with pytest.raises(SelfCheckError, match=r"layer 2: routed_out \+ shared_out = mlp_out fails by [\d.]+e-0[123]"):
        HookedMoE.from_hf(liar(0.05))
    assert HookedMoE.from_hf(liar(0.0)).moe_layers == (1, 2), "negative control: the same block without the lie"


def test_the_check_can_be_skipped() -> None:
    model = HookedMoE.from_hf(liar(0.05), check=False)
    with torch.no_grad():
        assert model(tokens()).shape == (2, 12, 101)


def test_a_block_that_scales_the_stream_is_found() -> None:
    hf: Any = build("deepseek")
    layer = hf.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.01
    with pytest.raises(SelfCheckError, match=r"layer 1: resid_mid \+ mlp_out = resid_post fails by"):
        HookedMoE.from_hf(hf)


def test_nan_is_traced_to_its_layer() -> None:
    hf: Any = build("deepseek")
    with torch.no_grad():
        hf.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(SelfCheckError, match=r"NaN; the first .* are at blocks.1.hook_attn_out \(layer 1\)"):
        HookedMoE.from_hf(hf)


def test_a_kernel_that_depends_on_who_listens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_lens.model.hooks.layer_hooks import LayerHooks

    honest = LayerHooks.over_slots

    def listens(self: LayerHooks, name: str, value: Tensor, place: Tensor | None = None) -> Tensor:
        out = honest(self, name, value, place)
        return out * 1.001 if self.has_listeners(name) and name == names.EXPERT_WEIGHTED else out

    monkeypatch.setattr(LayerHooks, "over_slots", listens)
    with pytest.raises(SelfCheckError, match="observing changed the logits by"):
        HookedMoE.from_hf(build("deepseek"))


@pytest.mark.typed
def test_a_model_that_cannot_be_run_is_refused_in_a_line_and_want_of_memory_is_left_as_it_is(monkeypatch) -> None:
    hf = build("mixtral")
    hf.config.sliding_window = 0
    with pytest.raises(SelfCheckError, match="be run: RuntimeError: The size of tensor a .* sizes in its config"):
        HookedMoE.from_hf(hf)
    hf.config.sliding_window = 1
    model = HookedMoE.from_hf(hf)
    for error in (torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")):

        def scarce(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(type(model), "forward", scarce)
        with pytest.raises(type(error), match=str(error)):
            self_check(model)


@pytest.mark.typed
@pytest.mark.parametrize("stray", [{"clip_qkv": 0.3}, {}])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_hooks_that_would_change_attention_are_refused_where_it_is_reconstructed_otherwise(
    family: str, stray: dict[str, Any]
) -> None:
    """transformers reads clip_qkv in OLMoE alone; TransformerLens obeys it in Mixtral, and cannot in Qwen3."""
    hf = build(family, **stray)
    with torch.no_grad():
        plain = hf(tokens()).logits
        model = HookedMoE.from_hf(hf)
        logits, cache = model.run_with_cache(tokens(), names_filter=lambda name: ".mlp." in name or "attn_out" in name)
        assert torch.equal(logits, plain) and names.block(names.ATTN_OUT, 0) in cache
        if stray:
            with pytest.raises(HookError, match=r"layer 0: there are hooks inside attention.*such as clip_qkv"):
                model.run_with_cache(tokens())
        else:
            torch.testing.assert_close(model.run_with_cache(tokens())[0], plain, rtol=0, atol=1e-4)


def test_a_field_that_the_family_reads_is_no_reason_to_refuse_hooks_inside_attention() -> None:
    hf = build("olmoe", clip_qkv=0.3)
    with torch.no_grad():
        plain = hf(tokens()).logits
        found, _ = HookedMoE.from_hf(hf).run_with_cache(tokens())
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)
    assert (build("olmoe")(tokens()).logits - plain).abs().max() > 1, "negative control: it is obeyed"


def test_attention_that_is_made_bidirectional_later_is_not_shown_as_causal() -> None:
    model = HookedMoE.from_hf(hf := build("qwen3_moe"))
    with torch.no_grad():
        causal = model(tokens())
        hf.config.is_causal = False
        assert (model(tokens()) - causal).abs().max() > 0.1, "negative control: it is obeyed"
        with pytest.raises(HookError, match="layer 0: is_causal is False, so that tokens attend to later ones"):
            model.run_with_cache(tokens())
        hf.config.is_causal = True
        torch.testing.assert_close(model.run_with_cache(tokens())[0], causal, rtol=0, atol=1e-4)
