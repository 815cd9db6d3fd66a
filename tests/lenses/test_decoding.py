"""How a cache is gone over: controls, chunks, padding, what is missing, and files."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lens import HookedMoE, PartialSum, names
from moe_lens.errors import HookError, InputError
from moe_lens.lenses import LensResult, LogitLens, TunedLens
from moe_lens.lenses.lens_result import QUANTITIES
from moe_lens.model.cache.moe_cache import MoECache
from tests.families import CONFIGS, build, tokens
from tests.model.caches import F64, close, fresh, full
from tests.wrapped import untouched, wrapped

TOKENS = tokens()
SUMS = (*PartialSum.figure2(3), *PartialSum.controls(3))
FIELDS = (*QUANTITIES, "top_tokens", "top_logits", "top_probs", "expert", "weight")


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return HookedMoE.from_hf(build("deepseek"))


@pytest.fixture(scope="module")
def cache(model: HookedMoE) -> MoECache:
    return model.run_with_cache(TOKENS, names_filter=LogitLens(model).hooks())[1]


def same(one: LensResult, other: LensResult, select: Any = lambda value: value, atol: float = 1e-6) -> bool:
    def equal(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=atol, rtol=1e-6, equal_nan=True)

    return all(equal(select(getattr(one, name)), getattr(other, name)) for name in FIELDS)


# Any expert at any token, and the controls made of them


@pytest.mark.parametrize("name", CONFIGS)
def test_any_expert_can_be_computed_at_any_token(name: str):
    """Selected ones give what the run gave; others what a run gives in which they are forced."""
    case, _, kept = full(name)
    for layer in case.model.moe_layers:
        x, indices = kept[names.mlp(names.MLP_IN, layer)], kept["expert_indices", layer]
        with untouched(case.model):
            ours = case.model.expert_outputs(layer, x, indices)
        assert close(ours, kept["expert_out", layer])
        others = (indices + 1) % case.model.n_experts
        hook = names.mlp(names.EXPERT_INDICES, layer)
        with case.model.hooks(fwd_hooks=[(hook, lambda value, hook, others=others: others)]):
            forced = fresh(name)
        assert close(case.model.expert_outputs(layer, x, others), forced["expert_out", layer])
        assert not close(case.model.expert_outputs(layer, x, others), ours, 1e-3)


def test_experts_that_do_not_exist_are_refused(model: HookedMoE):
    x = torch.zeros(2, 32)
    with pytest.raises(InputError, match="there is no expert 8; expected ids from 0 to 7"):
        model.expert_outputs(1, x, torch.tensor([[0], [8]]))
    with pytest.raises(HookError, match=r"layer 0 has no experts; MoE layers are \[1, 2\]"):
        model.expert_outputs(0, x, torch.tensor([[0], [1]]))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("residual", ["mid", "pre", "none"])
def test_controls_are_what_they_say(residual: Any, weighted: bool):
    case, _, kept = full("deepseek")
    point = kept[f"resid_{residual}", 2] if residual != "none" else torch.zeros_like(kept["resid_mid", 2])
    routing = kept.routing(2)
    options: Any = {"residual": residual, "weighted": weighted}
    active = PartialSum(drawn="active", **options)
    picked = kept.selected_expert(2, active)
    rank = (routing.indices == picked.expert[..., None]).int().argmax(-1)
    weight = routing.weights.gather(-1, rank[..., None])
    out = kept["expert_out", 2].take_along_dim(rank[..., None, None], -2).squeeze(-2)
    assert bool((routing.indices == picked.expert[..., None]).any(-1).all()) and len(rank.unique()) == 3
    assert close(kept.partial_sum(2, active).values, point + out * (weight if weighted else 1))
    unselected = PartialSum(drawn="unselected", **options)
    picked = kept.selected_expert(2, unselected)
    assert not bool((routing.indices == picked.expert[..., None]).any())
    weight = routing.weights[..., :1] if weighted else torch.ones(1, dtype=torch.float64)
    assert torch.equal(picked.weight, weight[..., 0].expand_as(picked.weight))
    out = case.model.expert_outputs(2, kept[names.mlp(names.MLP_IN, 2)], picked.expert[..., None])[..., 0, :]
    assert close(kept.partial_sum(2, unselected).values, point + out * weight)


def test_draws_are_even_seeded_and_each_tokens_own():
    many = fresh("deepseek", torch.randint(3, 101, (40, 50)))
    ids = torch.arange(8)

    def drawn(which: PartialSum, layer: int) -> tuple[Tensor, Tensor]:
        """The experts, and their places among those that could be drawn."""
        expert, indices = many.selected_expert(layer, which).expert, many["expert_indices", layer]
        active = (indices[..., None] == ids).any(-2)
        could = active if which.drawn == "active" else ~active
        assert bool(could.gather(-1, expert[..., None]).all())
        if which.drawn == "active":
            return expert, (indices == expert[..., None]).int().argmax(-1)
        return expert, (could & (ids < expert[..., None])).sum(-1)

    kinds: list[tuple[Any, int]] = [("active", 3), ("unselected", 5)]
    for kind, among in kinds:
        which = PartialSum(drawn=kind)
        expert, place = drawn(which, 1)
        counts = place.flatten().bincount(minlength=among).double()
        expected = 2000 / among
        assert float(((counts - expected) ** 2 / expected).sum()) < 20  # χ² with 4 degrees exceeds 20 in 0.05 %
        assert torch.equal(expert, many.selected_expert(1, PartialSum(drawn=kind)).expert)
        for other in (drawn(PartialSum(drawn=kind, seed=1), 1), drawn(which, 2)):  # another seed, another layer
            assert abs(float((other[1] == place).double().mean()) - 1 / among) < 0.06  # five standard deviations
        some = torch.tensor([3, 17]), torch.tensor([49, 0])
        assert torch.equal(many.selected_expert(1, which, at=some).expert, expert[some])
        assert close(many.partial_sum(1, which, at=some).values, many.partial_sum(1, which).values[some])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_lens_reads_sums_of_any_precision(dtype: torch.dtype):
    """Weighted outputs are float32 where routing weights are; decoding reads the same."""
    case = wrapped("mixtral", dtype)
    lens, sums = LogitLens(case.model), [PartialSum(ranks=[0]), PartialSum(ranks=[0, 1])]
    with torch.no_grad():
        _, kept = case.model.run_with_cache(case.tokens, names_filter=lens.hooks(sums=sums))
        for which in sums:
            stream = kept.partial_sum(1, which).values
            read = lens.logits(stream, 1)
            assert read.dtype == dtype and torch.equal(read, lens.unembed(stream))
            assert torch.equal(read, lens.unembed(stream.to(dtype)))
            best = lens.decode(kept, which, layers=[1], top=1).top_logits[0, 0]
            assert torch.equal(best.to(dtype), read.topk(1).values)


def test_experts_that_the_router_is_forbidden_are_not_drawn():
    """As in the preview of a plan: the smaller model does not have them."""
    model, gone, name = full("deepseek")[0].model, [1, 4], names.mlp(names.ROUTER_LOGITS, 1)
    which = PartialSum(drawn="unselected")

    def forbid(logits: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return logits.index_fill(-1, torch.tensor(gone), -torch.inf)

    with model.hooks([(name, forbid)]), torch.no_grad():
        _, kept = model.run_with_cache(
            torch.randint(3, 101, (40, 50)), names_filter=LogitLens(model).hooks(sums=[which])
        )
    expert, indices = kept.selected_expert(1, which).expert, kept["expert_indices", 1]
    assert not torch.isin(expert, torch.tensor(gone)).any() and not (indices == expert[..., None]).any()
    left = torch.ones(40, 50, 8, dtype=torch.bool).scatter(-1, indices, False)
    left[..., gone] = False
    place = (left & (torch.arange(8) < expert[..., None])).sum(-1).flatten().bincount(minlength=3).double()
    assert float(((place - 2000 / 3) ** 2 / (2000 / 3)).sum()) < 16  # χ² with 2 degrees exceeds 16 in 0.03 %
    gone[:] = [0, 1, 2, 3, 4]
    with model.hooks([(name, forbid)]), torch.no_grad():
        _, kept = model.run_with_cache(TOKENS, names_filter=LogitLens(model).hooks(sums=[which]))
    with pytest.raises(InputError, match="all 3 experts are always active: none is left unselected"):
        kept.selected_expert(1, which)


def test_where_all_experts_are_active_none_is_left():
    model = HookedMoE.from_hf(build("deepseek", num_experts_per_tok=8))
    _, kept = model.run_with_cache(TOKENS, names_filter=LogitLens(model).hooks())
    with pytest.raises(InputError, match="all 8 experts are always active: none is left unselected"):
        LogitLens(model).decode(kept, PartialSum(drawn="unselected"))


# Chunks


@given(rows=st.integers(1, 30), block=st.integers(1, 30))
def test_chunks_change_nothing(model: HookedMoE, cache: MoECache, rows: int, block: int):
    whole = LogitLens(model).decode(cache, SUMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_lens.lenses.decoding.CHUNK", 101 * rows)
        patch.setattr("moe_lens.lenses.metrics.BLOCK", 101 * block)
        assert same(whole, LogitLens(model).decode(cache, SUMS))


class Largest(TorchDispatchMode):
    """Remembers the greatest tensor over the vocabulary that was made."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [value for value in (out if isinstance(out, list | tuple) else [out]) if isinstance(value, Tensor)]
        whole = [value.numel() for value in made if value.dim() > 1 and value.shape[-1] == 101 and len(value) != 32]
        self.seen = max([self.seen, *whole])
        return out


def test_logits_of_more_than_a_chunk_never_exist(model: HookedMoE, cache: MoECache, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moe_lens.lenses.decoding.CHUNK", 101 * 5)
    with Largest() as largest:
        LogitLens(model).decode(cache, SUMS)
    assert largest.seen == 101 * 5
    monkeypatch.undo()
    with Largest() as largest:
        LogitLens(model).decode(cache, SUMS)
    assert largest.seen == 101 * 24  # control: the mode sees what is made


# Positions, padding, and caches of other shapes


def test_positions_are_read_as_they_are_in_the_whole(model: HookedMoE, cache: MoECache):
    whole, some = (LogitLens(model).decode(cache, SUMS, positions=at) for at in (None, [9, 3]))
    assert same(whole, some, lambda value: value[:, :, :, [9, 3]])
    assert not same(whole, some, lambda value: value[:, :, :, [3, 9]])


def test_a_cache_of_some_positions_knows_what_follows_them(model: HookedMoE, cache: MoECache):
    lens = LogitLens(model)
    _, part = model.run_with_cache(TOKENS, names_filter=lens.hooks(), pos_slice=[2, 7])
    sums = SUMS[:5]  # those without drawing, which goes by the place in the cache
    whole, some = lens.decode(cache, sums, positions=[2, 7]), lens.decode(part, sums)
    assert torch.equal(some.targets, TOKENS[:, [3, 8]])
    assert same(whole, some)
    _, one = model.run_with_cache(TOKENS, names_filter=lens.hooks(), pos_slice=-1)
    assert same(lens.decode(cache, sums, positions=[-1]), lens.decode(one, sums))


def test_without_a_batch_axis_it_is_a_batch_of_one(model: HookedMoE, cache: MoECache):
    lens = LogitLens(model)
    _, bare = model.run_with_cache(TOKENS[:1], names_filter=lens.hooks(), remove_batch_dim=True)
    assert bare["resid_mid", 1].ndim == 2
    _, batched = model.run_with_cache(TOKENS[:1], names_filter=lens.hooks())
    assert same(lens.decode(batched, SUMS), lens.decode(bare, SUMS))


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_not_read_and_follows_nothing(model: HookedMoE, left: bool):
    lens = LogitLens(model)
    rows = TOKENS[:, :8]
    real = slice(4, 12) if left else slice(0, 8)
    padded, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    padded[:, real], mask[:, real] = rows, 1
    padded[1], mask[1] = TOKENS[1], 1
    _, kept = model.run_with_cache(padded, names_filter=lens.hooks(), attention_mask=mask)
    result = lens.decode(kept, SUMS[:5])
    hidden = mask[0] == 0
    for name in FIELDS:
        value = getattr(result, name)[:, :, 0, hidden]
        assert bool((value.isnan() if value.is_floating_point() else value == -1).all()), name
    targets = torch.cat([rows[0, 1:], torch.tensor([-1])])
    assert torch.equal(result.targets[0, real], targets) and bool((result.targets[0, hidden] == -1).all())
    _, alone = model.run_with_cache(rows[:1], names_filter=lens.hooks())
    if not left:  # with padding on the left, positions differ, and with them rotary embeddings by rounding
        assert same(lens.decode(alone, SUMS[:5]), result, atol=2e-5) is False  # the other row is there
    ours = lens.decode(alone, SUMS[:5])
    assert torch.allclose(ours.entropy[1:, :2, 0], result.entropy[1:, :2, 0, real], atol=2e-5, rtol=0)
    assert len(result.to_frame()) == 2 * 5 * 20 + 2 * 20  # 20 real tokens; the dense layer has two of the sums


def test_targets_can_be_given(model: HookedMoE, cache: MoECache):
    lens = LogitLens(model)
    other = torch.tensor([[7], [-1]])
    result = lens.decode(cache, SUMS[:1], layers=[1], positions=[-1], targets=other, top=101)
    place = (result.top_tokens[0, 0, 0, 0] == 7).nonzero()
    assert int(result.target_rank[0, 0, 0, 0]) == int(place)
    assert float(result.cross_entropy[0, 0, 0, 0].exp()) == pytest.approx(
        1 / float(result.top_probs[0, 0, 0, 0, place]), rel=1e-5
    )
    assert int(result.target_rank[0, 0, 1, 0]) == -1 and bool(result.cross_entropy[0, 0, 1, 0].isnan())
    with pytest.raises(InputError, match=r"targets are \(2, 1\), from 0 to 101; expected ids below 101"):
        lens.decode(cache, SUMS, positions=[-1], targets=torch.tensor([[101], [0]]))
    with pytest.raises(InputError, match=r"from -100 to 0; expected ids below 101, or −1 for none"):
        lens.decode(cache, SUMS, positions=[-1], targets=torch.tensor([[-100], [0]]))
    with pytest.raises(InputError, match=r"in the shape \(2, 12\) of batch and positions"):
        lens.decode(cache, SUMS, targets=other)


def test_a_stream_of_another_width_is_refused(model: HookedMoE):
    lens = LogitLens(model)
    for call in (lens.unembed, lambda resid: lens.logits(resid, 1), lambda resid: lens.translate(resid, 1)):
        assert call(torch.zeros(2, model.cfg.d_model)).shape[0] == 2
        for shape in ((2, 3), (3,), (2, model.cfg.d_model, 1)):
            with pytest.raises(InputError, match=f"expected .*a last axis of {model.cfg.d_model}"):
                call(torch.zeros(shape))


def test_lenses_of_reduced_precision_read_nearly_the_same(cache: MoECache, model: HookedMoE):
    lens = LogitLens(model)
    half = MoECache({name: value.clone() for name, value in cache.items()}, model, tokens=cache.tokens).to(
        "cpu", torch.bfloat16
    )
    one, other = lens.decode(cache, SUMS), lens.decode(half, SUMS)
    # bfloat16 keeps 8 bits: logits of ± 10 move by up to 0.04, and the entropy of a token with them
    assert torch.allclose(one.entropy, other.entropy, atol=0.05, rtol=0, equal_nan=True)
    assert bool(other.cross_entropy.isnan().all())  # this cache was not told what follows


# Dense layers, experts that nobody selected, and other bad input


def test_dense_layer_reads_as_a_whole_and_has_no_experts(model: HookedMoE, cache: MoECache):
    lens = LogitLens(model)
    result = lens.decode(cache, [*SUMS, PartialSum(experts=[3])], layers=[0, 1], top=2)
    whole = cache["resid_mid", 0] + cache["mlp_out", 0]
    with torch.no_grad():
        assert torch.equal(result.top_tokens[0, 0], lens.logits(whole, 0).topk(2).indices)
        assert torch.equal(result.top_tokens[0, 5], lens.logits(cache["resid_mid", 0], 0).topk(2).indices)
    assert torch.equal(result.top_tokens[0, 0], result.top_tokens[0, 1])
    nothing = [2, 3, 4, 6, 7, 8, 9]
    assert bool((result.top_tokens[0, nothing] == -1).all()) and bool(result.kl_final[0, nothing].isnan().all())
    assert bool((result.expert[0] == -1).all()) and bool(result.weight[0].isnan().all())
    shown = set(result.to_frame().query("layer == 0")["sum"])
    assert shown == {SUMS[0].label, SUMS[1].label, SUMS[5].label}
    for which in (PartialSum(ranks=[0]), PartialSum(experts=[3]), PartialSum(drawn="active")):
        with pytest.raises(
            HookError, match=rf"'{re.escape(which.label)}' cannot be read: layers \[0\] are dense; .* \[1, 2\]"
        ):
            lens.decode(cache, [SUMS[0], which], layers=[0])


def test_experts_are_read_where_they_were_selected_and_named_where_never(model: HookedMoE, cache: MoECache):
    lens = LogitLens(model)
    each = PartialSum.each_expert(8)
    result = lens.decode(cache, [*each, PartialSum(experts=[0, 1])], positions=[0, 1])
    for layer in (1, 2):
        indices = cache["expert_indices", layer]
        for expert in range(8):
            here = (indices[:, :2] == expert).any(-1)
            assert torch.equal(result.top_tokens[layer, expert, ..., 0] >= 0, here)
            assert torch.equal(result.expert[layer, expert] == expert, here)
            assert torch.equal(result.kl_final[layer, expert].isnan(), ~here)
        pair = ((indices[:, :2] == 0) | (indices[:, :2] == 1)).any(-1)
        assert torch.equal(result.top_tokens[layer, 8, ..., 0] >= 0, pair)
    assert result.never_selected == ()  # in the text, wherever it was read
    silent = model.run_with_cache(TOKENS, names_filter=lens.hooks(sums=each))[1]
    indices = silent["expert_indices", 2]
    indices[indices == 5] = 6
    result = lens.decode(silent, each, layers=[1, 2])
    assert result.never_selected == ((2, 5),)
    assert set(result.to_frame().query("layer == 2")["sum"]) == {which.label for which in each} - {"u + expert 5"}


def test_what_is_missing_is_named_all_of_it(model: HookedMoE):
    lens = LogitLens(model)
    sums = [PartialSum(ranks=[0]), PartialSum(drawn="unselected"), PartialSum(residual="pre", weighted=False)]
    wanted = lens.hooks([1], sums)
    _, held = model.run_with_cache(TOKENS, names_filter=wanted)
    lens.decode(held, sums, layers=[1])
    assert {name.rpartition(".")[2] for name in wanted} == {
        "hook_resid_post", "hook_resid_mid", "hook_resid_pre", "hook_expert_indices", "hook_routing_weights",
        "hook_routed_out", "hook_shared_out", "hook_expert_weighted", "hook_expert_out", "hook_in",
        "hook_router_logits",
    }  # fmt: skip
    made_of_others = {"hook_routed_out", "hook_expert_weighted"}
    for lacking in wanted:
        rest = {name: value for name, value in held.items() if name != lacking}
        poor = MoECache(rest, model, tokens=held.tokens)
        if lacking.rpartition(".")[2] in made_of_others:
            lens.decode(poor, sums, layers=[1])
            continue
        with pytest.raises(HookError, match=f"the cache does not hold .*{lacking}"):
            lens.decode(poor, sums, layers=[1])
    _, poor = model.run_with_cache(TOKENS, names_filter=[names.block(names.RESID_MID, 1)])
    with pytest.raises(HookError, match=r"hook_expert_indices, .*hook_routing_weights, .*hook_routed_out"):
        lens.decode(poor, sums, layers=[1])


def test_fewer_hooks_are_wanted_where_less_is_read(model: HookedMoE):
    lens = LogitLens(model)
    everything, few = lens.hooks(), lens.hooks(sums=PartialSum.figure2(3))
    assert set(few) < set(everything)
    assert not any(name.endswith(("hook_expert_out", "hook_resid_pre", "hook_in")) for name in few)
    _, kept = model.run_with_cache(TOKENS, names_filter=few)
    assert same(lens.decode(kept, SUMS[:5]), lens.decode(model.run_with_cache(TOKENS)[1], SUMS[:5]), atol=1e-5)


def test_bad_input_is_refused(model: HookedMoE, cache: MoECache):
    lens = LogitLens(model)
    other = wrapped("deepseek").model
    with pytest.raises(InputError, match="the cache was made by another model"):
        LogitLens(other).decode(cache, SUMS)
    point = torch.zeros(2, model.cfg.d_model)
    for each in (lens, TunedLens(model, [*torch.zeros(3, 32, 32)], [*torch.zeros(3, 32)])):
        with pytest.raises(InputError, match=r"got a stream \[2, 32\] at layer 9; expected layer 0 to 2"):
            each.translate(point, 9)
        with pytest.raises(InputError, match=r"got a stream \[2, 31\] at layer 1"):
            each.translate(point[:, 1:], 1)
    with pytest.raises(InputError, match="cache is a dict; expected the MoECache"):
        lens.decode(dict(cache.cache_dict), SUMS)
    wrong: list[tuple[dict[str, Any], str]] = [
        (
            {"sums": SUMS, "positions": [12]},
            "positions: got 12; expected .* 0 to 11, or from the end -12 to -1",
        ),
        ({"sums": SUMS, "layers": [3]}, "layers: got 3; expected numbers from 0 to 2"),
        ({"sums": []}, "at least one sum"),
        ({"sums": SUMS, "positions": []}, r"positions: got \[\]; expected whole numbers"),
        ({"sums": SUMS, "positions": [True, False]}, r"positions: got \[True, False\]; expected whole numbers"),
        ({"sums": SUMS, "layers": 1}, "layers: got 1; expected whole numbers"),
        ({"sums": SUMS, "layers": np.array([True, False])}, "layers: got a mask of 2; expected one of 3"),
        ({"sums": PartialSum(ranks=[3])}, "there is no rank 3; the model has ranks 0 to 2"),
        ({"sums": PartialSum(experts=[8])}, "there is no expert 8; the model has experts 0 to 7"),
        ({"sums": SUMS, "top": 102}, "top is 102; expected 1 to 101"),
    ]
    for arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            lens.decode(cache, **arguments)


def test_layers_and_positions_are_numbers_in_their_order_or_masks(model: HookedMoE, cache: MoECache):
    lens = LogitLens(model)
    there: Any = np.array([False, True, True])
    expected = lens.decode(cache, SUMS[0], layers=[1, 2], positions=[11, 0])
    ways: list[Any] = [(there, np.array([11, 0])), (np.array([1, 2]), [-1, 0]), (range(-2, 0), (11, -12))]
    for layers, positions in ways:
        found = lens.decode(cache, SUMS[0], layers=layers, positions=positions)
        assert found.layers == (1, 2) and found.positions == (11, 0) and same(found, expected)
        assert lens.hooks(layers) == lens.hooks([1, 2])


# Tables and files


def test_frames_are_aligned(model: HookedMoE, cache: MoECache):
    result = LogitLens(model).decode(cache, SUMS, positions=[3, 5], top=2)
    cells = result.to_frame()
    assert len(cells) == 2 * len(SUMS) * 2 * 2 + 3 * 2 * 2  # the dense layer has three of the sums
    at = {"layer": 2, "sum": SUMS[3].label, "batch": 1, "pos": 5}
    (row,) = [row for row in cells.to_dict("records") if at.items() <= row.items()]
    assert row["token"] == int(result.top_tokens[2, 3, 1, 1, 0])
    for name in (*QUANTITIES, "expert", "weight"):
        assert row[name] == pytest.approx(float(getattr(result, name)[2, 3, 1, 1])), name
    at |= {"sum": SUMS[1].label, "place": 1}
    (row,) = [row for row in result.top_frame().to_dict("records") if at.items() <= row.items()]
    assert row["token"] == int(result.top_tokens[2, 1, 1, 1, 1])
    assert row["text"] == f"#{int(result.top_tokens[2, 1, 1, 1, 1])}"


@pytest.mark.typed
def test_a_result_on_disk_comes_back(model: HookedMoE, cache: MoECache, tmp_path: Path):
    result = LogitLens(model).decode(cache, [*SUMS, PartialSum(experts=[3, 5])], layers=[0, 2])
    result.save(tmp_path / "lens.safetensors")
    again = LensResult.load(tmp_path / "lens.safetensors")
    for name, value in vars(result).items():
        if isinstance(value, Tensor):
            other = getattr(again, name)
            assert value.dtype == other.dtype and torch.equal(value.nan_to_num(-7), other.nan_to_num(-7)), name
        else:
            assert value == getattr(again, name), name
    cache.routing(1)
    with pytest.raises(InputError, match="holds LensResult; expected a MoECache"):
        MoECache.from_disk(tmp_path / "lens.safetensors", model)
    assert repr(result) == "LensResult(2 layers × 10 sums × 2 × 12 tokens)"


def test_close_is_as_strict_as_it_says():
    assert close(torch.ones(3), torch.ones(3)) and not close(torch.ones(3), torch.ones(3) + 1e-6, F64)
