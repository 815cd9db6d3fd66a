"""However a model is kept, what is done to it and read of it is that of a model that holds the same numbers plainly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_lens import LogitLens, PartialSum, names
from moe_lens.hooked_moe import HookedMoE
from moe_lens.interventions import expert_attribution
from moe_lens.interventions.metrics import Logit
from moe_lens.model.loading.pretrained import load_pretrained
from moe_lens.model.loading.quantising import quantise
from tests.matrix.configs import build, tokens
from tests.model.test_quantised import unpacked
from tests.model.test_stored_bits import build_in_fp8
from tests.wrapped import GATED, INNER, deviation

ALL = {"model": "disk", "lm_head": "disk"}


def with_a_hook(model: HookedMoE) -> Tensor:
    """Logits while a hook of the caller's own halves what experts give."""
    model.add_hook(names.mlp(names.EXPERT_OUT, model.moe_layers[0]), lambda value, hook: value / 2)
    try:
        return model(tokens())
    finally:
        model.reset_hooks()


def under(made: Callable[[HookedMoE], Any]) -> Callable[[HookedMoE], Tensor]:
    def logits(model: HookedMoE) -> Tensor:
        with made(model):
            return model(tokens())

    return logits


def lens(model: HookedMoE) -> Tensor:
    reader = LogitLens(model)
    _, cache = model.run_with_cache(tokens())
    layers = [cache[names.block(names.RESID_POST, layer)] for layer in range(model.cfg.n_layers)]
    assert reader.decode(cache, PartialSum(ranks=[0])) is not None
    return torch.stack([reader.logits(resid, layer) for layer, resid in enumerate(layers)])


def attributed(model: HookedMoE) -> Tensor:
    model.requires_grad_(True)
    try:
        return expert_attribution(model, tokens(), Logit(3)).values
    finally:
        model.requires_grad_(False)


MEASURED: dict[str, Callable[[HookedMoE], Tensor]] = {
    "ablated": under(lambda model: model.ablate({model.moe_layers[0]: [1, 2]})),
    "rerouted": under(lambda model: model.ablate({model.moe_layers[0]: [1, 2]}, how="reroute")),
    "the largest kept": under(lambda model: model.keep_top(1)),
    "steered": under(lambda model: model.steer_experts({model.moe_layers[-1]: {3: "on", 4: -2.0}})),
    "with a hook": with_a_hook,
    "lens": lens,
    "attributed": attributed,
}


@pytest.fixture(scope="module", params=["bf16", "int8", "nf4", "offloaded", "stored"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[HookedMoE, HookedMoE]:
    """A model that is kept in some way, and one that holds the same numbers."""
    path: Path = tmp_path_factory.mktemp("stored")
    build("deepseek").save_pretrained(path)
    if request.param == "bf16":
        model = HookedMoE.from_pretrained(path, dtype=torch.bfloat16)
        plain: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    elif request.param == "offloaded":
        model = HookedMoE.from_pretrained(path, device_map=ALL, offload_folder=str(path / "off"))
        plain = build("deepseek")
    elif request.param == "stored":
        build_in_fp8(path, "deepseek")
        model = HookedMoE.from_pretrained(path, quantize="stored")
        plain = load_pretrained(str(path))[0]
    else:
        packed = build("deepseek")
        quantise(packed, request.param)
        plain = unpacked(build("deepseek"), packed)
        model = HookedMoE.from_hf(packed, check=False)
    reference = HookedMoE.from_hf(plain, check=False)
    return model.requires_grad_(False), reference.requires_grad_(False)


@pytest.mark.parametrize("what", MEASURED)
def test_what_is_done_and_read_is_that_of_plain_numbers(kept: tuple[HookedMoE, HookedMoE], what: str) -> None:
    mine, theirs = (MEASURED[what](model).detach().float() for model in kept)
    scale = float(theirs.nan_to_num().abs().max())
    assert scale > 0 and deviation(mine.nan_to_num(), theirs.nan_to_num()) <= 2e-5 * scale
    if what in ("ablated", "rerouted", "the largest kept", "steered", "with a hook"):
        with torch.no_grad():
            assert deviation(theirs, kept[1](tokens()).float()) > 1e-3 * scale, "negative control: it changes something"


@torch.no_grad()
def test_listening_inside_attention_selects_eager_attention_and_nothing_else_changes_a_bit() -> None:
    """What docs/families.md and docs/hooks.md say of bfloat16, and float32."""
    text = "The old man looked at the sea and then he went home to his wife."
    for dtype, least, most in ((torch.bfloat16, 1e-3, 0.05), (torch.float32, 0.0, 1e-5)):
        model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=dtype, check=False)
        logits, largest = model(text), model(text).abs().max().item()
        outside = [name for name, point in model.hook_dict.items() if not INNER.search(point.name or name)]
        kept = [name for name in outside if not name.endswith(GATED)]
        assert torch.equal(model.run_with_cache(text, names_filter=kept)[0], logits)
        assert least < deviation(model.run_with_cache(text)[0], logits) / largest <= most
