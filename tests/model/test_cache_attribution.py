"""Attribution to logits with the norm's gain in place, against the definition; TransformerLens's own is the control."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.ActivationCache import ActivationCache

from moe_lens import names
from moe_lens.errors import HookError, InputError
from moe_lens.model.cache.moe_cache import MoECache
from tests.families import CONFIGS
from tests.model.caches import F64, FAMILIES, close, fresh, full


def by_definition(case: Any, kept: MoECache, component: Tensor) -> Tensor:
    """What a component adds to every logit: (c / rms(final residual) ⊙ gain) W_U, from the parameters alone."""
    model = case.model.original_model
    final = kept["resid_post", -1]
    rms = (final.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    norm, head = model.get_submodule("model.norm"), model.get_submodule("lm_head")
    weights = [module.state_dict() for module in (norm, head)]
    gain, unembed = (next(v for name, v in held.items() if name.endswith("weight")) for held in weights)
    return component / rms * gain @ unembed.T


@pytest.mark.parametrize("name", FAMILIES)
def test_attributions_are_the_definition_and_sum_to_the_logits(name: str):
    case, _, kept = full(name)
    stack, labels = kept.decompose_experts()
    # In float64, DeepSeek's norms are exact; other families' go through float32.
    tolerance = F64 if name.startswith("deepseek,") or name == "deepseek" else 1e-6
    right = case.tokens.roll(-1, 1)
    attrs = kept.logit_attrs(stack, right)
    assert attrs.shape == (len(labels), 2, 12)
    for component, attr in zip(stack, attrs, strict=True):
        expected = by_definition(case, kept, component).gather(-1, right[..., None])[..., 0]
        assert (attr - expected).abs().max() <= tolerance * by_definition(case, kept, stack.sum(0)).abs().max()
    logits = case.logits.gather(-1, right[..., None])[..., 0]  # of transformers' own model, before wrapping
    assert close(attrs.sum(0), logits, tolerance)
    wrong = (right + 5) % 101
    difference = kept.logit_attrs(stack, right, wrong)
    assert close(difference, attrs - kept.logit_attrs(stack, wrong), F64)
    assert close(difference.sum(0), logits - case.logits.gather(-1, wrong[..., None])[..., 0], tolerance * 10)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformerlens_is_off_by_the_gain(name: str):
    case, _, kept = full(name)
    stack, _ = kept.decompose_experts()
    theirs = ActivationCache(kept.cache_dict, case.model)
    logits = case.logits[..., 7]
    assert not close(theirs.logit_attrs(stack, 7).sum(0), logits, 0.01)
    gain = next(iter(case.model.original_model.get_submodule("model.norm").parameters())).detach()
    assert close(theirs.logit_attrs(stack * gain, 7), kept.logit_attrs(stack, 7), F64)
    assert close(theirs.apply_ln_to_stack(stack) * gain, kept.apply_ln_to_stack(stack), F64)


def test_by_expert_and_by_rank_agree():
    _, _, kept = full("deepseek")
    ranks, experts = (kept.logit_attrs(kept.decompose_experts(by=by)[0], 3).sum(0) for by in ("rank", "expert"))
    assert close(ranks, experts)


@pytest.mark.typed
@pytest.mark.parametrize(
    "tokens",
    [
        5,
        torch.tensor(5),
        torch.tensor([5]),
        torch.tensor([5, 9]),
        torch.arange(12),
        torch.arange(12)[None],
        torch.arange(24).view(2, 12),
    ],
    ids=["id", "scalar", "one", "batch", "pos", "one by pos", "batch by pos"],
)
def test_tokens_of_every_shape(tokens: Any):
    case, _, kept = full("deepseek")
    stack, _ = kept.decompose_experts()
    attrs = kept.logit_attrs(stack, tokens)
    if isinstance(tokens, torch.Tensor) and tokens.shape == (2,):
        tokens = tokens[:, None]
    wanted = torch.as_tensor(tokens).expand(2, 12)
    assert close(attrs.sum(0), case.logits.gather(-1, wanted[..., None])[..., 0])
    assert close(
        attrs, ActivationCache(kept.cache_dict, case.model).logit_attrs(stack * case.model.ln_final.weight, tokens)
    )


def test_a_batch_as_long_as_its_texts_is_read_as_one_token_per_item():
    case, _, _ = full("deepseek")
    kept = fresh("deepseek", tokens=case.tokens[:, :2])
    stack, _ = kept.decompose_experts()
    per_item, per_position = (
        kept.logit_attrs(stack, torch.tensor([5, 9])),
        kept.logit_attrs(stack, torch.tensor([[5, 9]])),
    )
    assert close(per_item[:, 1], kept.logit_attrs(stack, 9)[:, 1])
    assert close(per_position[:, :, 1], kept.logit_attrs(stack, 9)[:, :, 1])


def test_a_string_is_a_token(monkeypatch: pytest.MonkeyPatch):
    case, _, kept = full("deepseek")
    monkeypatch.setattr(type(case.model), "to_single_token", lambda self, text: {" cat": 7, " dog": 9}[text])
    stack, _ = kept.decompose_experts()
    assert torch.equal(kept.logit_attrs(stack, " cat", " dog"), kept.logit_attrs(stack, 7, 9))


@pytest.mark.parametrize("pos_slice", [3, -1, (2, 7), [0, 5]])
def test_positions_and_items(pos_slice: Any):
    case, _, kept = full("deepseek")
    at = slice(*pos_slice) if isinstance(pos_slice, tuple) else pos_slice
    whole = kept.logit_attrs(kept.decompose_experts(return_labels=False), 7)
    part = kept.decompose_experts(pos_slice=pos_slice, return_labels=False)
    assert close(kept.logit_attrs(part, 7, pos_slice=pos_slice), whole[:, :, at])
    assert close(kept.logit_attrs(part, 7, pos_slice=pos_slice, batch_slice=1), whole[:, 1][..., at])
    assert close(kept.logit_attrs(part, 7, pos_slice=pos_slice, batch_slice=(1, 2)), whole[:, 1:2][..., at])
    item = part[:, 1:2]  # what has been cut is not cut once more
    for cut in ([1], (1, 2)):
        with pytest.raises(InputError, match="holds 1 items of the batch, and the cache 2; batch_slice takes"):
            kept.logit_attrs(item, 7, pos_slice=pos_slice, batch_slice=cut)
        with pytest.raises(InputError, match="holds 1 items of the batch, and the cache 2; batch_slice takes"):
            kept.apply_ln_to_stack(item, 1, pos_slice=pos_slice, batch_slice=cut)
    with pytest.raises(InputError, match="expected a whole number, or several, in a list, or a Slice, or a Tensor"):
        kept.logit_attrs(part, 7, pos_slice=slice(1, 2))  # pyright: ignore[reportArgumentType]
    one = fresh("deepseek", tokens=case.tokens[:1]).remove_batch_dim()
    stack = one.decompose_experts(return_labels=False)
    assert close(one.logit_attrs(stack, 7, has_batch_dim=False), whole[:, 0])
    assert close(one.logit_attrs(stack, torch.arange(12)).sum(0), case.logits[0].diagonal())


def test_what_does_not_fit_is_refused():
    _, _, kept = full("deepseek")
    stack, _ = kept.decompose_experts()
    for tokens, message in (
        (101, "expected ids from 0 to 100"),
        (-1, "tokens is -1; expected a whole number from 0"),
        (torch.arange(5), r"tokens have shape \(5,\); expected one, or what fits components of \(2, 12\) tokens"),
        (torch.zeros(3, 12).long(), r"tokens have shape \(3, 12\)"),
        (torch.zeros(4, 2, 12).long(), r"tokens have shape \(4, 2, 12\)"),
    ):
        with pytest.raises(InputError, match=message):
            kept.logit_attrs(stack, tokens)
    with pytest.raises(InputError, match=r"shapes \(\(\), \(12,\)\); expected the same"):
        kept.logit_attrs(stack, 3, torch.arange(12))
    poor = fresh("deepseek", names_filter=[names.block(names.RESID_POST, 2)])
    with pytest.raises(HookError, match=r"names_filter=\['ln_final.hook_scale'\]"):
        poor.logit_attrs(poor["resid_post", 2][None], 3)


def test_components_of_other_tokens_than_the_cache_are_refused():
    case, _, kept = full("deepseek")
    one = fresh("deepseek", tokens=case.tokens[:1])  # where a broadcast would fit
    for cache, batch in ((kept, 2), (one, 1)):
        whole, last = (cache.decompose_experts(pos_slice=cut, return_labels=False) for cut in (None, -1))
        for ask in (
            lambda *args, cache=cache, **words: cache.logit_attrs(args[0], 7, **words),
            cache.apply_ln_to_stack,
        ):
            with pytest.raises(InputError, match=rf"of \({batch},\) tokens, and the cache has \({batch}, 12\) there"):
                ask(last)
            with pytest.raises(InputError, match=rf"of \({batch}, 12\) tokens, and the cache has \({batch},\) there"):
                ask(whole, pos_slice=-1)
            with pytest.raises(
                InputError, match=r"shape \(\d+, \d, 12, 5\); expected .* \[component, batch, pos, 32\]"
            ):
                ask(whole[..., :5])
        with pytest.raises(InputError, match="there; pos_slice says"):
            cache.logit_attrs(kept.decompose_experts(return_labels=False)[:, : 3 - batch], 7)
        with pytest.raises(InputError, match="there; pos_slice says"):
            kept.apply_ln_to_stack(whole[:batch, 0], has_batch_dim=False)
        final = cache["resid_post", -1][:, -1]  # a component without an axis for components, as in demos
        assert close(
            cache.apply_ln_to_stack(final, pos_slice=-1), cache.apply_ln_to_stack(final[None], pos_slice=-1)[0]
        )
        assert close(cache.apply_ln_to_stack(final, pos_slice=-1) @ case.model.W_U, case.logits[:batch, -1])
    alone = one.decompose_experts(return_labels=False)
    assert close(one.logit_attrs(alone[:, 0], 7, has_batch_dim=False), one.logit_attrs(alone, 7)[:, 0])
    assert close(one.apply_ln_to_stack(alone[:, 0], has_batch_dim=False), one.apply_ln_to_stack(alone)[:, 0])


def test_a_last_position_that_is_padding_is_refused():
    """Positions count columns: behind a shorter text, the last is none of its tokens."""
    case, _, _ = full("deepseek")
    mask = torch.ones_like(case.tokens)
    mask[1, 7:] = 0
    _, kept = case.model.run_with_cache(case.tokens, attention_mask=mask)
    stack = kept.decompose_experts(return_labels=False)[..., -1, :]
    for ask in (
        lambda: kept.logit_attrs(stack, 7, pos_slice=-1),
        lambda: kept.decompose_experts(pos_slice=-1),
        lambda: kept.decompose_resid(pos_slice=-1),
        lambda: kept.accumulated_resid(pos_slice=-2),
        lambda: kept.stack_head_results(pos_slice=-1),
        lambda: kept.get_full_resid_decomposition(pos_slice=-1),
        lambda: case.model.run_with_cache(case.tokens, attention_mask=mask, pos_slice=-1),
        lambda: case.model.routing(case.tokens, attention_mask=mask, pos_slice=-1),
    ):
        with pytest.raises(InputError, match=r"at position -\d, text 1 has padding: .* \(padding_side='left'\)"):
            ask()
    assert kept.decompose_resid(pos_slice=-6).shape[-2:] == (2, 32)  # 12 columns, 7 of them tokens of either text
    assert kept.decompose_resid(pos_slice=11).shape[-2:] == (2, 32)  # a column that was named as such
    first = kept.apply_slice_to_batch_dim([0])
    assert first.decompose_resid(pos_slice=-1).shape[-2:] == (1, 32)


def test_the_embedding_is_a_component_of_a_pass_from_embeddings():
    case, _, kept = full("deepseek")
    embedded = case.model(case.tokens, stop_at_layer=0)
    _, given = case.model.run_with_cache(embedded)
    assert "hook_embed" in kept and "hook_embed" not in given
    near = 1e-6  # everything is listened to, so that attention is eager, where angles are in float32
    assert close(given.decompose_resid(), kept.decompose_resid(), near)
    assert close(given.get_full_resid_decomposition().sum(0), given["resid_post", -1], F64)
    assert close(given.decompose_resid().sum(0), given["resid_post", -1], F64)
    assert not close(given.decompose_resid(incl_embeds=False).sum(0), given["resid_post", -1], 0.01)
    poor = fresh("deepseek", names_filter=lambda name: name.endswith(("hook_attn_out", "hook_mlp_out")))
    assert close(poor.decompose_resid(incl_embeds=False), kept.decompose_resid()[1:], F64)
    with pytest.raises(HookError, match=r"names_filter=\['blocks.0.hook_resid_pre'\]"):
        poor.decompose_resid()
    with pytest.raises(HookError, match="without the embedding there is no component before layer 0"):
        poor.decompose_resid(0, incl_embeds=False)


def test_half_precision_is_summed_in_float32():
    _, _, kept = full("deepseek")
    stack, _ = kept.decompose_experts()
    exact, coarse = kept.logit_attrs(stack.bfloat16().double(), 7), kept.logit_attrs(stack.bfloat16(), 7)
    assert coarse.dtype == torch.float32
    assert close(coarse.double(), exact, 1e-6)


@pytest.mark.parametrize("name", ["deepseek", *(n for n in CONFIGS if n in ("qwen2_moe", "mixtral"))])
def test_components_of_what_a_block_reads(name: str):
    """Before a block, and before its experts: the norm's gain there, too."""
    case, _, kept = full(name)
    tolerance = F64 if name == "deepseek" else 1e-6
    for layer in (1, 2):
        stack, _ = kept.decompose_experts(layer, apply_ln=True)
        assert close(stack.sum(0), kept[f"blocks.{layer}.ln1.hook_out"], tolerance)
        mid = kept.apply_ln_to_stack(kept["resid_mid", layer][None], layer, mlp_input=True)
        assert close(mid[0], kept[f"blocks.{layer}.ln2.hook_out"], tolerance)
        assert torch.equal(kept["resid_mid", layer], full(name)[2]["resid_mid", layer])
    final, _ = kept.decompose_experts(apply_ln=True, pos_slice=-1)
    assert close(final.sum(0) @ case.model.W_U, case.logits[:, -1], tolerance)


def test_a_recomputed_norm_has_its_gain_once():
    case, _, kept = full("deepseek")
    streams, labels = kept.accumulated_resid(apply_ln=True, return_labels=True)
    assert labels[-1] == "final_post"
    assert close(streams[-1] @ case.model.W_U, case.logits)
    first = case.model.original_model.get_submodule("model.norm")(kept["resid_pre", 0])
    assert close(streams[0], first)


@pytest.mark.gpu
def test_a_cache_on_the_cpu_of_a_model_on_the_gpu():
    from moe_lens.hooked_moe import HookedMoE
    from tests.families import build, tokens

    hf: Any = build("deepseek")
    model = HookedMoE.from_hf(hf.cuda(), check=False)
    with torch.no_grad():
        logits, kept = model.run_with_cache(tokens().cuda(), device="cpu", attention_mask=torch.ones(2, 12).cuda())
    stack, _ = kept.decompose_experts()
    assert stack.device.type == "cpu"
    assert close(kept.logit_attrs(stack, 7).sum(0), logits[..., 7].cpu(), 1e-5)
    assert close(kept.decompose_experts(by="expert", apply_ln=True)[0].sum(0) @ model.W_U.cpu(), logits.cpu(), 1e-5)
    assert kept.expert_out(1, expert=3).mask.device.type == "cpu"
    kept.to("cuda")
    assert kept.partial_sum(1, experts=[3, 4]).values.device.type == "cuda"
    assert kept.routing(1).dense_weights().device.type == "cuda"
