"""MoECache: experts aligned to tokens, partial sums, and parts that make the whole, on every family."""

from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_lens import names
from moe_lens.errors import HookError, InputError
from moe_lens.model.cache.moe_cache import MoECache
from moe_lens.partial_sum import PartialSum
from moe_lens.routing import Routing
from tests.model.caches import F64, FAMILIES, SHARED, close, fresh, full, quiet, same
from tests.wrapped import Case, wrapped


def by_hand(kept: MoECache, layer: int, which: PartialSum) -> Tensor:
    """A partial sum token by token, from the raw activations."""
    out, weights = kept[f"blocks.{layer}.mlp.hook_expert_out"], kept[f"blocks.{layer}.mlp.hook_routing_weights"]
    indices = kept[f"blocks.{layer}.mlp.hook_expert_indices"]
    total = torch.zeros_like(out[..., 0, :])
    for b in range(out.shape[0]):
        for p in range(out.shape[1]):
            if which.residual != "none":
                total[b, p] += kept[f"blocks.{layer}.hook_resid_{which.residual}"][b, p]
            for rank in range(out.shape[2]):
                asked = which.ranks is None or rank in which.ranks
                asked &= which.experts is None or int(indices[b, p, rank]) in which.experts
                if asked:
                    total[b, p] += (weights[b, p, rank] if which.weighted else 1) * out[b, p, rank]
            if which.shared and kept.model.n_shared_experts:
                total[b, p] += kept[f"blocks.{layer}.mlp.hook_shared_out"][b, p]
    return total


def sums(top_k: int = 3, n_experts: int = 8) -> st.SearchStrategy[dict[str, Any]]:
    """Keywords of sums that are not empty."""
    chosen = st.one_of(
        st.just({}),
        st.fixed_dictionaries({"ranks": st.sets(st.integers(0, top_k - 1))}),
        st.fixed_dictionaries({"experts": st.sets(st.integers(0, n_experts - 1))}),
    )
    rest = {"residual": st.sampled_from(["mid", "pre", "none"]), "weighted": st.booleans(), "shared": st.booleans()}
    named = st.tuples(chosen, st.fixed_dictionaries(rest)).map(lambda two: two[0] | two[1])
    return named.filter(lambda kw: kw["residual"] != "none" or kw["shared"] or kw.get("ranks", kw.get("experts", 1)))


# Partial sums


@pytest.mark.parametrize("name", SHARED)
@given(chosen=sums())
def test_partial_sums_are_what_they_say(name: str, chosen: dict[str, Any]):
    _, _, kept = full(name)
    which = PartialSum(**chosen)
    result = kept.partial_sum(2, which)
    assert close(result.values, by_hand(kept, 2, which))
    assert (result.layer, result.which, result.dense) == (2, which, False)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_experts_and_the_shared_ones_complete_the_layer(name: str):
    case, _, kept = full(name)
    for layer in case.model.moe_layers:
        post = kept["resid_post", layer]
        assert close(kept.partial_sum(layer, shared=True).values, post)
        assert close(kept.partial_sum(layer, ranks=range(case.model.top_k), shared=True).values, post)
        assert close(kept.partial_sum(layer, experts=range(case.model.n_experts), shared=True).values, post)
        assert not close(kept.partial_sum(layer, ranks=range(case.model.top_k - 1), shared=True).values, post, 1e-6)
        assert torch.equal(kept.partial_sum(layer, ranks=[]).values, kept["resid_mid", layer])


def test_a_dense_layer_gives_its_mlp_and_says_so():
    _, _, kept = full("deepseek")
    mid, post = kept["resid_mid", 0], kept["resid_post", 0]
    for which in (PartialSum(), PartialSum(shared=True), PartialSum(weighted=False)):
        result = kept.partial_sum(0, which)
        assert result.dense and close(result.values, post)
    nothing = kept.partial_sum(0, ranks=[])
    assert nothing.dense and torch.equal(nothing.values, mid)
    for which in (PartialSum(ranks=[0]), PartialSum(experts=[3])):
        with pytest.raises(
            HookError, match=r"layer 0 is dense and has no 'u \+ .*the layers with experts are \[1, 2\]"
        ):
            kept.partial_sum(0, which)
    with pytest.raises(HookError, match="layer 0 has no shared experts: the sum 'shared' is empty there"):
        kept.partial_sum(0, residual="none", ranks=[], shared=True)


def test_a_partial_sum_and_its_keywords_are_one_thing():
    _, _, kept = full("deepseek")
    assert torch.equal(kept.partial_sum(-1, ranks=[1]).values, kept.partial_sum(2, PartialSum(ranks=[1])).values)
    with pytest.raises(InputError, match="a PartialSum or its keywords, not both"):
        kept.partial_sum(1, PartialSum(), shared=True)
    with pytest.raises(InputError, match="there is no rank 3; the model has ranks 0 to 2"):
        kept.partial_sum(1, ranks=[0, 3])
    with pytest.raises(InputError, match="there is no expert 8; the model has experts 0 to 7"):
        kept.partial_sum(1, experts=[8])
    with pytest.raises(HookError, match="there is no layer 3; the model has layers 0 to 2"):
        kept.partial_sum(3)


MID, INDICES, WEIGHTS = (
    names.block(names.RESID_MID, 1),
    names.mlp(names.EXPERT_INDICES, 1),
    names.mlp(names.ROUTING_WEIGHTS, 1),
)
OUT, WEIGHTED, ROUTED = (names.mlp(name, 1) for name in (names.EXPERT_OUT, names.EXPERT_WEIGHTED, names.ROUTED_OUT))


@pytest.mark.parametrize(
    ("held", "which"),
    [
        ([MID, ROUTED], PartialSum()),
        ([MID, WEIGHTED], PartialSum()),
        ([MID, OUT, WEIGHTS], PartialSum()),
        ([MID, OUT, WEIGHTS], PartialSum(ranks=[1])),
        ([MID, WEIGHTED, INDICES], PartialSum(experts=[1, 5])),
        ([MID, OUT, WEIGHTS, INDICES], PartialSum(experts=[1, 5])),
        ([OUT], PartialSum(residual="none", weighted=False)),
    ],
)
def test_what_was_not_cached_is_made_of_what_was(held: list[str], which: PartialSum):
    _, _, whole = full("deepseek")
    part = fresh("deepseek", names_filter=held)
    assert close(part.partial_sum(1, which).values, whole.partial_sum(1, which).values)


@pytest.mark.parametrize(
    ("held", "which", "needed"),
    [
        ([ROUTED], PartialSum(), MID),
        ([MID], PartialSum(), WEIGHTED),
        ([MID, ROUTED], PartialSum(ranks=[0]), WEIGHTED),
        ([MID, OUT], PartialSum(ranks=[0]), WEIGHTED),
        ([MID, WEIGHTED, WEIGHTS], PartialSum(ranks=[0], weighted=False), OUT),
        ([MID, WEIGHTED], PartialSum(experts=[0]), INDICES),
        ([MID, ROUTED], PartialSum(shared=True), names.mlp(names.SHARED_OUT, 1)),
    ],
)
def test_a_message_names_what_to_cache_and_caching_it_helps(held: list[str], which: PartialSum, needed: str):
    with pytest.raises(HookError) as error:
        fresh("deepseek", names_filter=held).partial_sum(1, which)
    assert f"run_with_cache(…, names_filter=['{needed}'])" in str(error.value)
    fresh("deepseek", names_filter=[*held, needed]).partial_sum(1, which)


# Experts and routing


def expert_by_hand(case: Case, kept: MoECache, layer: int, expert: int) -> Tensor:
    """An expert on every token, whether chosen or not, from the parameters (SwiGLU)."""
    x = kept[f"blocks.{layer}.mlp.hook_in"]
    branch = torch.nn.functional.silu(x @ case.model.W_gate[layer, expert])
    return branch * (x @ case.model.W_in[layer, expert]) @ case.model.W_out[layer, expert]


@pytest.mark.parametrize("name", ["deepseek", "mixtral", "olmoe", "qwen2_moe"])
def test_an_experts_output_stands_where_its_tokens_are(name: str):
    case, _, kept = full(name)
    layer = case.last
    seen = torch.zeros(2, 12, dtype=torch.int64)
    for expert in range(case.model.n_experts):
        rows = kept.expert_out(layer, expert=expert)
        assert torch.equal(rows.mask, (kept["expert_indices", layer] == expert).any(-1))
        assert close(rows.values[rows.mask], expert_by_hand(case, kept, layer, expert)[rows.mask])
        assert not rows.values[~rows.mask].any()
        weight = kept.routing(layer).dense_weights()[..., expert]
        assert close(kept.expert_out(layer, expert=expert, weighted=True).values, rows.values * weight[..., None])
        seen += rows.mask
    assert (seen == case.model.top_k).all()


def test_an_expert_that_nobody_chose_is_all_zero():
    _, _, kept = full("deepseek")
    poor = MoECache({name: kept[name] for name in (OUT, INDICES)}, kept.model)
    poor.cache_dict[INDICES] = poor[INDICES].clamp(max=6)
    rows = poor.expert_out(1, expert=7)
    assert not rows.mask.any() and not rows.values.any()


def test_another_experts_nan_stays_where_it_is():
    _, _, kept = full("deepseek")
    out, indices = kept["expert_out", 1].clone(), kept["expert_indices", 1]
    out[indices == 4] = torch.nan
    broken = MoECache({OUT: out, INDICES: indices, MID: kept[MID]}, kept.model)
    for expert in range(8):
        values = broken.expert_out(1, expert=expert).values
        assert values.isnan().any() == (expert == 4)
    chosen = PartialSum(experts=[1, 2], weighted=False)
    assert close(broken.partial_sum(1, chosen).values, kept.partial_sum(1, chosen).values)


@pytest.mark.typed
def test_padding_is_masked_from_an_experts_rows():
    case, _, kept = full("deepseek")
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :5] = False
    padded = MoECache(kept.cache_dict, case.model, tokens=case.tokens, mask=mask)
    for expert in range(8):
        rows, all_rows = padded.expert_out(1, expert=expert), kept.expert_out(1, expert=expert)
        assert torch.equal(rows.mask, all_rows.mask & mask)
        assert torch.equal(rows.values, all_rows.values * mask[..., None])
    assert padded.routing(1).mask is mask
    assert set(Routing.stack([padded.routing(1)]).to_frame().query("batch == 1").pos) == set(range(5, 12))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_run_knows_its_padding(side: str):
    case = wrapped("deepseek", torch.float64)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, slice(5) if side == "left" else slice(-5, None)] = 0
    with torch.no_grad():
        _, kept = case.model.run_with_cache(case.tokens, names_filter=quiet, attention_mask=mask)
    frame = Routing.stack([kept.routing(layer) for layer in (1, 2)]).to_frame()
    assert len(frame) == 2 * 3 * int(mask.sum())
    counts = sum(kept.expert_out(1, expert=expert).mask.int() for expert in range(8))
    assert torch.equal(torch.as_tensor(counts), 3 * mask)
    assert kept.tokens is not None and torch.equal(kept.tokens, case.tokens)
    with torch.no_grad():
        _, part = case.model.run_with_cache(case.tokens, names_filter=quiet, attention_mask=mask, pos_slice=(3, 9))
    assert part.mask is not None and torch.equal(part.mask, mask[:, 3:9].bool())
    assert torch.equal(part.expert_out(1, expert=2).mask, kept.expert_out(1, expert=2).mask[:, 3:9])


@pytest.mark.parametrize("name", FAMILIES)
def test_routing_is_what_the_router_chose(name: str):
    case, _, kept = full(name)
    for layer in case.model.moe_layers:
        routing = kept.routing(layer)
        logits = kept["router_logits", layer]
        x, router = kept[f"blocks.{layer}.mlp.hook_in"], case.model.W_router[layer]
        if name != "gpt_oss":  # has a bias, too
            assert close(logits, (x @ router.to(x).T).to(logits.dtype), F64 if logits.dtype == x.dtype else 1e-6)
        assert routing.logits is logits
        assert routing.probs is not None
        assert torch.equal(routing.probs, logits.sigmoid() if name == "deepseek_v3" else logits.softmax(-1))
        assert (routing.weights.diff(dim=-1) <= 0).all()
        if name not in ("deepseek_v3", "deepseek_v2, groups"):  # which choose by more than the logit
            assert torch.equal(routing.indices.sort(-1).values, logits.topk(case.model.top_k).indices.sort(-1).values)
            assert (routing.margin() > 0).all()


def test_routing_without_logits_and_in_half_precision():
    kept = fresh("deepseek", names_filter=[INDICES, WEIGHTS])
    assert kept.routing(1).logits is None and kept.routing(1).probs is None
    half = fresh("deepseek").to("cpu", torch.bfloat16)
    routing = half.routing(1)
    assert routing.weights.dtype == torch.bfloat16 and routing.indices.dtype == torch.int64
    assert routing.probs is not None and routing.probs.dtype == torch.float32
    with pytest.raises(HookError, match=WEIGHTS):
        fresh("deepseek", names_filter=[INDICES]).routing(1)


def test_a_dense_layer_has_no_routing():
    _, _, kept = full("deepseek")
    for ask in (
        lambda: kept.routing(0),
        lambda: kept.expert_out(0, expert=1),
        lambda: kept["router_logits", 0],
        lambda: kept["blocks.0.mlp.hook_expert_out"],
        lambda: kept["blocks.0.mlp.experts.3.hook_out"],
    ):
        with pytest.raises(HookError, match=r"layer 0 is dense and has no .*; the layers with experts are \[1, 2\]"):
            ask()
    with pytest.raises(InputError, match="there is no expert 8"):
        kept.expert_out(1, expert=8)


# The whole in parts


@pytest.mark.parametrize("by", ["rank", "expert"])
@pytest.mark.parametrize("name", FAMILIES)
def test_components_sum_to_the_residual_stream(name: str, by: Any):
    case, _, kept = full(name)
    for layer in (None, 2, 0):
        stack, labels = kept.decompose_experts(layer, by=by)
        whole = kept["resid_post", -1] if layer is None else kept["resid_pre", layer]
        assert len(labels) == len(set(labels)) == len(stack)
        assert close(stack.sum(0), whole)
    # Every component counts: leaving one out is seen.
    stack, labels = kept.decompose_experts(by=by)
    for row, label in enumerate(labels):
        if stack[row].any():
            assert not close(stack.sum(0) - stack[row], kept["resid_post", -1], 1e-7), label
    expected = (
        1
        + 3
        + sum(
            (case.model.top_k if by == "rank" else case.model.n_experts) + bool(case.model.n_shared_experts)
            if layer in case.model.moe_layers
            else 1
            for layer in range(3)
        )
    )
    assert len(labels) == expected


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-6),
        (torch.bfloat16, 2**-6),
        (torch.float16, 2**-9),
    ],  # 13 parts, a rounding each, of the largest value
)
def test_components_sum_in_every_precision(dtype: torch.dtype, tolerance: float):
    case = wrapped("deepseek", dtype)
    with torch.no_grad():
        _, kept = case.model.run_with_cache(case.tokens, names_filter=quiet)
    for by in ("rank", "expert"):
        stack, _ = kept.decompose_experts(by=by)
        assert stack.dtype == dtype
        assert close(stack.float().sum(0), kept["resid_post", -1].float(), tolerance)


def test_components_are_what_their_labels_say():
    _, _, kept = full("deepseek")
    stack, labels = kept.decompose_experts()
    found = dict(zip(labels, stack, strict=True))
    assert torch.equal(found["embed"], kept["hook_embed"])
    assert torch.equal(found["0_mlp_out"], kept["mlp_out", 0])
    assert torch.equal(found["2_attn_out"], kept["attn_out", 2])
    assert torch.equal(found["1_shared_out"], kept["shared_out", 1])
    for rank in range(3):
        assert torch.equal(found[f"2_rank_{rank}"], kept["expert_weighted", 2][:, :, rank])
    stack, labels = kept.decompose_experts(by="expert")
    found = dict(zip(labels, stack, strict=True))
    assert close(found["2_expert_5"], kept.expert_out(2, expert=5, weighted=True).values)
    assert torch.equal(kept.decompose_experts(return_labels=False), kept.decompose_experts()[0])


@pytest.mark.parametrize("by", ["rank", "expert"])
@pytest.mark.parametrize("pos_slice", [3, -1, (2, 7), (0, 12, 3), [0, 5]])
def test_decomposing_some_positions(by: Any, pos_slice: Any):
    _, _, kept = full("deepseek")
    whole = kept.decompose_experts(by=by, return_labels=False)
    at = slice(*pos_slice) if isinstance(pos_slice, tuple) else pos_slice
    assert torch.equal(kept.decompose_experts(by=by, pos_slice=pos_slice, return_labels=False), whole[:, :, at])


def test_decomposition_says_all_that_it_lacks(monkeypatch: pytest.MonkeyPatch):
    held = [
        names.block(names.RESID_PRE, 0),
        names.block(names.ATTN_OUT, 0),
        names.block(names.ATTN_OUT, 1),
        OUT,
        WEIGHTS,
    ]
    poor = fresh("deepseek", names_filter=held)
    with pytest.raises(HookError) as error:
        poor.decompose_experts(2, by="expert")
    assert str([names.block(names.BLOCK_MLP_OUT, 0), INDICES, names.mlp(names.SHARED_OUT, 1)]) in str(error.value)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no run-time checker of annotations
    with pytest.raises(InputError, match="by is 'head'"):
        poor.decompose_experts(by="head")  # pyright: ignore[reportArgumentType]


def test_a_cache_of_only_what_is_needed_decomposes():
    _, _, whole = full("deepseek")
    with pytest.raises(HookError) as error:
        fresh("deepseek", names_filter=["hook_embed"]).decompose_experts()
    wanted = eval(str(error.value).partition("names_filter=")[2].partition(")")[0])
    part = fresh("deepseek", names_filter=wanted)
    assert len(part) == len(wanted) == 1 + 3 + 1 + 2 * 2
    assert torch.equal(part.decompose_experts()[0], whole.decompose_experts()[0])


# Other shapes of a cache


def methods(kept: MoECache) -> dict[str, Tensor]:
    """A value of each method, at layer 1."""
    routing, rows = kept.routing(1), kept.expert_out(1, expert=2)
    assert routing.logits is not None and routing.probs is not None
    return {
        "indices": routing.indices,
        "weights": routing.weights,
        "logits": routing.logits,
        "probs": routing.probs,
        "values": rows.values,
        "mask": rows.mask,
        "sum": kept.partial_sum(1, ranks=[0], shared=True).values,
        "experts": kept.partial_sum(1, experts=[0, 2, 6]).values,
        "dense": kept.partial_sum(0).values,
        "by rank": kept.decompose_experts(return_labels=False)[5],
        "by expert": kept.decompose_experts(by="expert", return_labels=False)[7],
        "attrs": kept.logit_attrs(kept.decompose_experts(return_labels=False), 7, 9).sum(0),
    }


def test_without_a_batch_axis_everything_loses_it():
    case, _, _ = full("deepseek")
    one = fresh("deepseek", tokens=case.tokens[:1])
    bare = fresh("deepseek", tokens=case.tokens[:1], remove_batch_dim=True)
    assert not bare.has_batch_dim
    with_axis, without = methods(one), methods(bare)
    for name, value in without.items():
        assert same(value, with_axis[name][0]), name
    assert close(bare.decompose_experts(by="expert")[0].sum(0), bare["resid_post", -1])
    assert bare.remove_batch_dim() is bare  # a second time changes nothing


def test_rows_of_one_expert_are_no_batch():
    case, _, _ = full("deepseek")
    one_token = case.tokens[:1, :1]
    name = next(
        names.expert("hook_out", 1, expert)
        for expert in range(8)
        if len(
            fresh("deepseek", tokens=one_token, names_filter=names.expert("hook_out", 1, expert))[
                names.expert("hook_out", 1, expert)
            ]
        )
    )
    for held in ([name], [name, MID]):
        kept = fresh("deepseek", tokens=one_token, names_filter=held)
        assert kept[name].shape == (1, 32)
        assert kept.remove_batch_dim()[name].shape == (1, 32)
    assert kept[MID].shape == (1, 32)  # position and width: here the batch axis went


def test_a_batch_keeps_its_axis():
    kept = fresh("deepseek")
    with pytest.raises(InputError, match="the cache holds a batch of 2"):
        kept.remove_batch_dim()
    assert kept[MID].shape == (2, 12, 32)


@pytest.mark.parametrize("pos_slice", [-1, (3, 9), [1, 4]])
def test_a_cache_of_some_positions_is_the_same_there(pos_slice: Any):
    _, _, whole = full("deepseek")
    part = fresh("deepseek", pos_slice=pos_slice)
    at = [pos_slice] if isinstance(pos_slice, int) else slice(*pos_slice) if isinstance(pos_slice, tuple) else pos_slice
    expected = methods(whole)
    for name, value in methods(part).items():
        assert same(value, expected[name][:, at]), name


def test_items_of_a_batch():
    case, _, whole = full("deepseek")
    tokens, mask = case.tokens, torch.rand(2, 12) > 0.3
    kept = MoECache(
        {**whole.cache_dict, names.expert("hook_out", 1, 2): torch.zeros(2, 32)}, case.model, tokens=tokens, mask=mask
    )
    assert names.expert("hook_out", 1, 2) in kept
    for at, index in (((1, 2), slice(1, 2)), (1, 1), ([1, 0], [1, 0])):
        part = kept.apply_slice_to_batch_dim(at)
        assert isinstance(part, MoECache) and part.has_batch_dim == (at != 1)
        assert part.tokens is not None and torch.equal(part.tokens, tokens[index])
        assert part.mask is not None and torch.equal(part.mask, mask[index])
        assert names.expert("hook_out", 1, 2) not in part
        expected = methods(kept)
        for name, value in methods(part).items():
            assert same(value, expected[name][index]), name
    with pytest.raises(InputError, match="no batch axis to slice"):
        kept.apply_slice_to_batch_dim(0).apply_slice_to_batch_dim(0)
    assert kept.has_batch_dim and names.expert("hook_out", 1, 2) in kept


# What comes out is new


def test_changing_a_result_leaves_the_cache_alone():
    kept = fresh("deepseek")
    before = {name: value.clone() for name, value in kept.items()}
    for which in (
        PartialSum(ranks=[]),
        PartialSum(residual="none"),
        PartialSum(residual="none", ranks=[0]),
        PartialSum(shared=True),
    ):
        kept.partial_sum(1, which).values.zero_()
    for which in (PartialSum(), PartialSum(residual="none"), PartialSum(ranks=[])):
        kept.partial_sum(0, which).values.zero_()
    kept.expert_out(1, expert=3).values.fill_(7)
    kept.expert_out(1, expert=3).mask.zero_()
    kept.decompose_experts(0)[0].zero_()
    kept.decompose_experts()[0].zero_()
    kept.decompose_experts(apply_ln=True)[0].zero_()
    kept.logit_attrs(kept["resid_post", 2][None], 3).zero_()
    probs = kept.routing(1).probs
    assert probs is not None
    probs.zero_()
    kept.routing(1).dense_weights().zero_()
    assert all(torch.equal(value, before[name]) for name, value in kept.items())
    kept["resid_mid", 1].zero_()  # the stored tensor itself, as in TransformerLens
    assert not kept[MID].any()
