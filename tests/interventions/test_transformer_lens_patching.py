"""TransformerLens's own patching functions work on a HookedMoE, and agree with ours."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest
import torch
import transformer_lens.patching as tl
from torch import Tensor

from moe_lens.interventions.metrics import LogitDifference
from moe_lens.interventions.patching import patch
from tests.wrapped import untouched, wrapped

FP32 = 1e-5  # TransformerLens keeps values in float32
METRIC = LogitDifference(5, 6)
FAMILIES = pytest.mark.parametrize("family", ["deepseek", "mixtral", "gpt_oss"])
HELPERS = {
    "resid_pre": tl.get_act_patch_resid_pre,
    "resid_mid": tl.get_act_patch_resid_mid,
    "attn_out": tl.get_act_patch_attn_out,
    "mlp_out": tl.get_act_patch_mlp_out,
}


def corrupt(tokens: Tensor) -> Tensor:
    corrupted = tokens.clone()
    corrupted[:, 3:5] = (corrupted[:, 3:5] + 31) % 98 + 3
    return corrupted


@FAMILIES
@pytest.mark.parametrize("site", HELPERS)
def test_the_helpers_agree_with_ours(family: str, site: str):
    case = wrapped(family, torch.float64)
    corrupted = corrupt(case.tokens)
    with torch.no_grad(), untouched(case.model):
        _, cache = case.model.run_with_cache(case.tokens, names_filter=lambda name: "attn.hook_" not in name[:-9])
        theirs = HELPERS[site](case.model, corrupted, cache, METRIC)
    ours = patch(case.model, case.tokens, corrupted, site, METRIC).values
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() <= FP32 * case.logits.abs().max()
    assert ours.std() > 1e-3


@FAMILIES
def test_block_every_and_attention_heads_run(family: str):
    case = wrapped(family, torch.float64)
    corrupted = corrupt(case.tokens)
    with torch.no_grad(), untouched(case.model):
        _, cache = case.model.run_with_cache(case.tokens)
        every: Any = tl.get_act_patch_block_every(case.model, corrupted, cache, METRIC)
        heads: Any = tl.get_act_patch_attn_head_out_all_pos(case.model, corrupted, cache, METRIC)
    sites = [patch(case.model, case.tokens, corrupted, site, METRIC).values for site in HELPERS if site != "resid_mid"]
    assert (every - torch.stack(sites)).abs().max() <= FP32 * case.logits.abs().max()
    assert heads.shape == (3, 4)
    assert heads.std() > 1e-4


def test_the_generic_function_patches_ranks():
    case = wrapped("deepseek", torch.float64)
    corrupted = corrupt(case.tokens)

    def slot(activation: Tensor, index: Sequence[int], clean: Any) -> Tensor:
        activation[:, :, index[1]] = clean[:, :, index[1]]
        return activation

    index = pd.DataFrame(
        [(layer, rank) for layer in case.model.moe_layers for rank in range(3)], columns=["layer", "rank"]
    )
    with torch.no_grad(), untouched(case.model):
        _, cache = case.model.run_with_cache(case.tokens, names_filter=lambda name: "expert_weighted" in name)
        theirs: Any = tl.generic_activation_patch(
            case.model, corrupted, cache, METRIC, slot, "expert_weighted", index_df=index
        )
    ours = patch(case.model, case.tokens, corrupted, "expert_weighted", METRIC, over=("layer", "rank")).values
    assert (theirs.view_as(ours) - ours).abs().max() <= FP32 * case.logits.abs().max()
