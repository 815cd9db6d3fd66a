"""Router logits in parts: they sum to the logits in every family, and each part is what an edit of it would do."""

from typing import Any

import pytest
import torch

from moe_lens import HookedMoE, names
from moe_lens.errors import HookError, InputError
from moe_lens.lenses.router_attribution import router_attrs, router_attrs_hooks
from tests.families import CONFIGS, build, tokens

TOKENS = tokens()


def cached(model: HookedMoE, layer: int, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model.run_with_cache(TOKENS, names_filter=router_attrs_hooks(model, layer, **kwargs))[1]


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return HookedMoE.from_hf(build("deepseek"))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("heads", [True, False])
def test_the_components_make_the_router_logits_in_every_family(name, heads):
    hf = build(name)
    with torch.no_grad():
        plain = hf(TOKENS, output_router_logits=True).router_logits if name == "mixtral" else None
    model = HookedMoE.from_hf(hf, check=False)
    layer = model.moe_layers[-1]
    cache = cached(model, layer, heads=heads)
    attrs = router_attrs(cache, layer, heads=heads)
    logits = cache["router_logits", layer]
    assert torch.allclose(attrs.values.sum(0), logits, atol=2e-5, rtol=0)
    if plain is not None:
        assert torch.allclose(attrs.values.sum(0).flatten(0, 1), plain[layer], atol=2e-5, rtol=0)
    # Every component counts: leaving any of them out is far off (but the constant, where a router has no bias).
    for label, value in zip(attrs.labels, attrs.values, strict=True):
        assert value.abs().max() > 1e-3 or label == "constant"
    assert (sum("head" in label for label in attrs.labels) == 4 * (layer + 1)) is heads
    assert len(set(attrs.labels)) == len(attrs.labels)
    by_expert = router_attrs(cache, layer, by="expert", heads=heads)
    assert torch.allclose(by_expert.values.sum(0), logits, atol=2e-5, rtol=0)


def test_a_component_is_what_an_edit_of_it_does_with_the_norm_frozen(model):
    """Take one head, one rank and the shared experts out of what stands before the router; the scale is as it was."""
    layer, hf = 2, build("deepseek")
    cache = cached(model, layer)
    attrs = router_attrs(cache, layer)
    norm, rows = hf.model.layers[layer].post_attention_layernorm.weight, hf.model.layers[layer].mlp.gate.weight
    mid = model.run_with_cache(TOKENS, names_filter="blocks.2.hook_resid_mid")[1]["resid_mid", 2]
    scale = (mid.square().mean(-1, keepdim=True) + hf.config.rms_norm_eps).sqrt()
    assert torch.allclose((mid * norm / scale) @ rows.T, attrs.logits, atol=1e-5, rtol=0)
    z = cache["blocks.1.attn.hook_z"]
    parts = {
        "embed": hf.model.embed_tokens.weight[TOKENS],
        "1_head_3": z[:, :, 3] @ hf.model.layers[1].self_attn.o_proj.weight[:, 24:32].T,
        "1_rank_2": cache["expert_weighted", 1][:, :, 2],
        "1_shared_out": cache["shared_out", 1],
        "0_mlp_out": cache["mlp_out", 0],
    }
    for label, part in parts.items():
        without = ((mid - part) * norm / scale) @ rows.T
        expected = attrs.logits - without
        assert torch.allclose(attrs.values[attrs.labels.index(label)], expected, atol=1e-5, rtol=0), label
        assert expected.abs().max() > 0.05


def test_experts_are_ranks_under_the_names_of_those_who_had_them(model):
    cache = cached(model, 2)
    ranks, experts = router_attrs(cache, 2), router_attrs(cache, 2, by="expert")
    chosen = cache.routing(1).indices
    at = (1, 7)
    for rank in range(model.top_k):
        expert = int(chosen[(*at, rank)])
        expected = ranks.values[(ranks.labels.index(f"1_rank_{rank}"), *at)]
        assert torch.equal(experts.values[(experts.labels.index(f"1_expert_{expert}"), *at)], expected)
    idle = set(range(8)) - set(chosen[at].tolist())
    assert all(not experts.values[(experts.labels.index(f"1_expert_{e}"), *at)].any() for e in idle)
    assert not any("rank" in label for label in experts.labels)


def test_slots_that_a_token_does_not_use_are_nobodys(model):
    with model.use_experts(mass=0.5, most=3):
        cache = cached(model, 2)
    ranks, experts = router_attrs(cache, 2), router_attrs(cache, 2, by="expert")
    chosen = cache.routing(1).indices
    empty = chosen < 0
    assert empty.any() and not empty.all()
    at = empty.nonzero()[0][:2].tolist()
    sums = [[label.startswith("1_") and "shared" not in label for label in of.labels] for of in (ranks, experts)]
    right, found = (of.values[torch.tensor(rows)].sum(0) for of, rows in zip((ranks, experts), sums, strict=True))
    torch.testing.assert_close(found, right, atol=1e-6, rtol=0)  # float32: the same parts added in another order
    mine = set(chosen[tuple(at)].tolist()) - {-1}
    idle = [e for e in range(8) if e not in mine]
    assert not any(experts.values[(experts.labels.index(f"1_expert_{e}"), *at)].any() for e in idle)


def test_centred_parts_decide_the_same_softmax(model):
    attrs = router_attrs(cached(model, 2), 2)
    centred = attrs.centred()
    assert torch.allclose(centred.values.mean(-1), torch.zeros(()), atol=1e-6)
    probs = centred.values.sum(0).softmax(-1)
    assert torch.allclose(probs, attrs.logits.softmax(-1), atol=1e-5, rtol=0)


def test_frames_are_aligned(model):
    attrs = router_attrs(cached(model, 1), 1)
    frame = attrs.to_frame()
    assert len(frame) == attrs.values.numel()
    row = frame[
        (frame["component"] == "0_head_2") & (frame["batch"] == 1) & (frame["pos"] == 5) & (frame["expert"] == 3)
    ]
    assert row["logit"].item() == pytest.approx(attrs.values[attrs.labels.index("0_head_2"), 1, 5, 3].item())
    one = attrs.to_frame(expert=3)
    assert set(one["expert"]) == {3} and len(one) * 8 == len(frame)
    with pytest.raises(InputError, match="no expert 8; the layer has 0 to 7"):
        attrs.to_frame(expert=8)


def test_a_cache_without_a_batch_axis_will_do(model):
    wanted = router_attrs_hooks(model, 2)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS[:1], names_filter=wanted, remove_batch_dim=True)
        _, batched = model.run_with_cache(TOKENS[:1], names_filter=wanted)
    for by in ("rank", "expert"):
        whole = router_attrs(batched, 2, by=by)
        assert torch.equal(router_attrs(cache, 2, by=by).values, whole.values[:, 0])


@pytest.mark.untyped
def test_bad_input_is_named(model):
    cache = cached(model, 2, heads=False)
    with pytest.raises(HookError, match=r"the cache lacks \['blocks.0.attn.hook_z'"):
        router_attrs(cache, 2)
    with pytest.raises(HookError, match=r"layer 0 has no router; the layers with experts are \[1, 2\]"):
        router_attrs(cache, 0)
    with pytest.raises(InputError, match="by is 'head'"):
        router_attrs(cache, 2, by="head", heads=False)  # pyright: ignore[reportArgumentType]


def test_families_without_the_hooks_are_told_what_is_left():
    from tests.matrix.configs import build as build_any

    glm = HookedMoE.from_hf(build_any("glm4_moe"), check=False)
    with pytest.raises(HookError, match="no hooks for its heads; pass heads=False"):
        router_attrs_hooks(glm, glm.moe_layers[-1])
    whole = router_attrs(cached(glm, glm.moe_layers[-1], heads=False), glm.moe_layers[-1], heads=False)
    assert torch.allclose(whole.values.sum(0), whole.logits, atol=2e-5, rtol=0)
    several_streams = HookedMoE.from_hf(build_any("deepseek_v4"), check=False)
    with pytest.raises(HookError, match="cannot be taken apart: it has no hooks"):
        router_attrs_hooks(several_streams, several_streams.moe_layers[-1], heads=False)


def test_an_edited_run_is_noticed(model):
    double = [(names.block(names.RESID_PRE, 1), lambda value, hook: value * 2)]
    with torch.no_grad(), model.hooks(fwd_hooks=double):
        _, cache = model.run_with_cache(TOKENS, names_filter=router_attrs_hooks(model, 2))
    with pytest.raises(InputError, match="miss its router logits by .* a hook edited the run"):
        router_attrs(cache, 2)
