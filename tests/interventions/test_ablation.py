"""Ablations against the plain re-implementation, on every family; what they promise about the rest of the model."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_lens import names
from moe_lens.errors import HookError, InputError
from moe_lens.interventions.ablation_values import derangement
from moe_lens.interventions.expert_means import ExpertMeans
from moe_lens.interventions.metrics import LogitDifference
from moe_lens.interventions.patching import patch
from moe_lens.selection import Selection
from moe_lens.storage import save_tensors
from tests.families import CONFIGS, tokens
from tests.interventions.by_hand import FP32, LAYERS, bound, replaced, rerouted, slots_of, zeroed
from tests.wrapped import Case, deviation, untouched, wrapped

families = pytest.mark.parametrize("family", CONFIGS)
few = pytest.mark.parametrize("family", ["deepseek", "deepseek_v3", "qwen2_moe"])


def used(case: Case, layer: int, count: int = 2) -> list[int]:
    """The experts of a layer that most tokens use."""
    chosen = case.model.routing(case.tokens).layer(layer).indices
    return torch.bincount(chosen.flatten(), minlength=8).argsort(descending=True)[:count].tolist()


def run(case: Case, intervention: Any, **kwargs: Any) -> torch.Tensor:
    with untouched(case.model), torch.no_grad(), intervention:
        return case.model(case.tokens, **kwargs)


# --- zero ---


@families
@pytest.mark.parametrize("renormalize", [False, True], ids=["as they are", "renormalised"])
def test_a_zeroed_expert_adds_nothing_and_the_others_keep_their_weights(family: str, renormalize: bool) -> None:
    case = wrapped(family)
    experts = {layer: used(case, layer, 1) for layer in case.model.moe_layers[-2:]}
    ours = run(case, case.model.ablate(experts, renormalize=renormalize))
    plain = case.plain(case.tokens, zeroed(slots_of(experts), renormalize))
    assert deviation(ours, plain) <= bound(plain, LAYERS)
    assert deviation(ours, case.logits) > 1e-2
    assert deviation(ours, case.plain(case.tokens, zeroed(slots_of(experts), not renormalize))) > 1e-3


@families
def test_the_hooks_show_zeros_for_what_is_left_out_and_the_rest_as_it_was(family: str) -> None:
    case = wrapped(family)
    experts = used(case, case.last)
    wanted = [names.mlp(hook.name, case.last) for hook in names.MLP_HOOKS]
    wanted = [name for name in wanted if name in case.model.hook_dict]
    with torch.no_grad():
        _, before = case.model.run_with_cache(case.tokens, names_filter=wanted)
        with case.model.ablate({case.last: experts}):
            _, after = case.model.run_with_cache(case.tokens, names_filter=wanted)
    indices = before["expert_indices", case.last]
    gone = torch.isin(indices, torch.tensor(experts))
    assert torch.equal(after["expert_indices", case.last], indices)
    assert torch.equal(after["expert_kept", case.last], ~gone)
    assert before["expert_kept", case.last].all()
    for name in ("routing_weights", "expert_pre", "expert_pre_linear", "expert_post", "expert_out", "expert_weighted"):
        assert (after[name, case.last][gone] == 0).all(), name
        kept, was = after[name, case.last][~gone], before[name, case.last][~gone]
        assert deviation(kept, was) <= bound(was), name
    whole = after["expert_weighted", case.last].sum(2)
    assert deviation(whole, after["routed_out", case.last]) <= bound(whole)


@few
def test_an_expert_that_nobody_uses_can_go_without_a_trace(family: str) -> None:
    case = wrapped(family)
    one = case.tokens[:1, :1]
    idle = next(e for e in range(8) if e not in case.model.routing(one).layer(case.last).indices)
    with torch.no_grad():
        plain = case.model(one)
        with case.model.ablate({case.last: [idle]}):
            assert torch.equal(case.model(one), plain)


def test_what_is_left_out_is_not_computed() -> None:
    case = wrapped("deepseek")
    rows: list[int] = []
    experts: Any = case.model._moe(2).experts
    compute = experts._apply_gate
    experts._apply_gate = lambda projected: (rows.append(len(projected)), compute(projected))[1]
    try:
        run(case, case.model.ablate(layers=[1]))
        run(case, case.model.keep_top(1))
        run(case, case.model.ablate(layers=[2]))
    finally:
        del experts._apply_gate
    n_tokens = case.tokens.numel()
    assert rows == [3 * n_tokens, n_tokens, 0]


@families
def test_shared_experts_can_be_taken_out_too(family: str) -> None:
    case = wrapped(family)
    if not case.model.has_shared(case.last):
        with pytest.raises(InputError, match="no shared experts"):
            case.model.ablate(shared=True)
        return
    plain = case.plain(case.tokens, lambda name, value: value * 0 if "shared_out" in name else value)
    assert deviation(run(case, case.model.ablate(shared=True)), plain) <= bound(plain, LAYERS)
    whole = case.plain(case.tokens, lambda name, v: v * 0 if name.endswith(("shared_out", "routed_out")) else v)
    ours = run(case, case.model.ablate(ranks=range(3), shared=True))
    assert deviation(ours, whole) <= bound(whole, LAYERS)


# --- where ---


@few
@pytest.mark.parametrize("kind", ["positions", "slice", "mask", "predicate"])
def test_tokens_can_be_chosen(family: str, kind: str) -> None:
    case = wrapped(family)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, [3, 8]] = True
    where: Any = [3, 8]
    if kind == "slice":
        mask[:] = torch.arange(12) >= 5
        where = slice(5, None)
    elif kind == "mask":
        mask[0, 3] = False
        where = mask
    elif kind == "predicate":
        common = int(case.tokens[1, 3])
        mask = case.tokens == common
        where = lambda ids: ids == common  # noqa: E731
    slots = lambda layer, indices: (mask[..., None] & (torch.arange(3) < 2)).expand(indices.shape)  # noqa: E731
    ours = run(case, case.model.ablate(ranks=[0, 1], where=where))
    plain = case.plain(case.tokens, zeroed(slots))
    assert deviation(ours, plain) <= bound(plain, LAYERS)
    assert deviation(ours, run(case, case.model.ablate(ranks=[0, 1]))) > 1e-2


@few
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["zero", "resample", "reroute"])
def test_padding_moves_no_position_and_takes_no_part(family: str, side: str, how: Any) -> None:
    """A short text beside a longer one: the same as alone, but for resampling, whose donors are the batch's."""
    case = wrapped(family)
    pad = 4
    short = case.tokens[1, : 12 - pad]
    padding = torch.zeros(pad, dtype=torch.long)
    row = torch.cat([padding, short] if side == "left" else [short, padding])
    real = torch.cat(
        [torch.zeros(pad), torch.ones(12 - pad)] if side == "left" else [torch.ones(12 - pad), torch.zeros(pad)]
    )
    batch, mask = torch.stack([case.tokens[0], row]), torch.stack([torch.ones(12), real]).long()
    made = case.model.ablate(ranks=[0], where=[1, 5], how=how, layers=[case.last])
    with torch.no_grad(), made:
        padded = case.model(batch, attention_mask=mask)[1, mask[1].bool()]
        assert torch.isfinite(padded).all()
        if how != "resample":
            alone = case.model(short[None])[0]
            assert deviation(padded, alone) <= bound(alone, LAYERS)
    with torch.no_grad():
        untouched_ = case.model(batch, attention_mask=mask)[1, mask[1].bool()]
    assert deviation(padded[:1], untouched_[:1]) <= bound(untouched_), "causal: nothing before position 1"
    assert deviation(padded[1:], untouched_[1:]) > 1e-3


def test_in_generation_positions_count_the_tokens_before() -> None:
    case = wrapped("deepseek")
    out, prompt = 5, case.tokens[:1, :6]
    options: Any = {"max_new_tokens": out, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with untouched(case.model):
        free = case.model.generate(prompt, **options)
        assert torch.equal(
            case.model.generate(prompt, interventions=[case.model.ablate(ranks=[0], where=[40])], **options), free
        )
        for where in ([6, 7, 8], slice(6, None), lambda ids: ids > 50):
            made = case.model.ablate(ranks=[0, 1], where=where)
            cached = case.model.generate(prompt, interventions=[made], **options)
            whole = prompt  # the same without a cache, by full forward passes
            for _ in range(out):
                with torch.no_grad(), made:
                    whole = torch.cat([whole, case.model(whole)[:, -1:].argmax(-1)], 1)
            assert torch.equal(cached, whole)
        assert not torch.equal(
            case.model.generate(
                prompt, interventions=[case.model.ablate(ranks=[0, 1], where=slice(6, None))], **options
            ),
            free,
        )


@pytest.mark.typed
@pytest.mark.parametrize("how", ["generate", "generate_stream", "hf_generate"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_mask_has_the_columns_of_the_prompt_though_generation_moves_padding(how: str, cached: bool) -> None:
    case = wrapped("deepseek")
    long, short = case.tokens[:1, :8], case.tokens[1:, :5]
    padded, real = torch.cat([long, F.pad(short, (0, 3))]), torch.ones(2, 8).long()
    real[1, 5:] = 0
    where = torch.zeros(2, 8, dtype=torch.bool)
    where[0, 6], where[1, [0, 3]] = True, True
    zeroed: list[list[list[int]]] = []

    def look(weights: Tensor, hook: Any) -> None:  # noqa: ARG001
        zeroed.append((weights == 0).all(-1).nonzero().tolist())

    name = names.mlp(names.ROUTING_WEIGHTS, 2)
    made = case.model.ablate(layers=[2], where=where)
    with untouched(case.model), torch.no_grad(), made, case.model.hooks([(name, look)]):
        words: Any = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "use_past_kv_cache": cached}
        out = getattr(case.model, how)(padded, attention_mask=real, **words)
        if how == "generate_stream":
            next(out)
            case.model(padded, attention_mask=real)
            assert zeroed.pop() == where.nonzero().tolist(), "between pieces, columns are those of what is passed"
            list(out)
        moved = [[0, 6], [1, 3], [1, 6]]
        later = [] if cached else moved
        assert zeroed == [moved, later, later], "three columns to the right, and no new token"
        zeroed.clear()
        with pytest.raises(InputError, match=r"where is a mask of shape \(2, 8\); expected \(2, 7\) \[batch, pos\]"):
            getattr(case.model, how)(padded[:, :7], **words) if how != "generate_stream" else case.model(padded[:, :7])
        zeroed.clear()
        case.model(padded, attention_mask=real)
        assert zeroed == [where.nonzero().tolist()]


def test_transformers_own_generation_tells_which_tokens_pass() -> None:
    """Padding in front, beams, and no cache: positions are those of each text, and padding is never selected."""
    case = wrapped("deepseek")
    long, short = case.tokens[:1, :8], case.tokens[1:, :5]
    padded, mask = torch.cat([long, F.pad(short, (3, 0))]), torch.ones(2, 8).long()
    mask[1, :3] = 0
    options: Any = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "return_type": "tokens"}
    with untouched(case.model):
        free, changed = case.model.hf_generate(long, **options), []
        for where in ([5, 6, 9], slice(6, None), -1, lambda ids: ids > 50):
            made = case.model.ablate(ranks=[0, 1], where=where)
            expected = case.model.generate(long, interventions=[made], verbose=False, **options)
            with made:
                assert torch.equal(case.model.hf_generate(long, **options), expected)
                both = case.model.hf_generate(padded, attention_mask=mask, **options)
                assert torch.equal(both[:1], expected)
                assert torch.equal(both[1:, 3:], case.model.hf_generate(short, **options))
            changed.append(not torch.equal(expected, free))
        assert any(changed)
        with case.model.ablate(ranks=[0, 1], where=[5, 6, 9]):
            padding = {"attention_mask": mask, **options}
            fixed = case.model.hf_generate(padded, cache_implementation="static", **padding)
            assert torch.equal(fixed, case.model.hf_generate(padded, **padding))
            beams = [case.model.hf_generate(long, num_beams=3, use_cache=cached, **options) for cached in (True, False)]
            assert torch.equal(*beams)
        columns = torch.zeros(1, 8, dtype=torch.bool)
        with case.model.ablate(ranks=[0], where=columns), pytest.raises(InputError, match=r"expected \(3, 8\)"):
            case.model.hf_generate(long, num_beams=3, **options)
    assert case.model.current_tokens() is None


def test_a_key_value_cache_of_one_s_own_is_counted_too() -> None:
    case = wrapped("deepseek")
    made = case.model.ablate(ranks=[0], where=[7])
    with untouched(case.model), torch.no_grad(), made:
        whole = case.model(case.tokens)
        _, past = case.model(case.tokens[:, :6], return_type="logits_and_cache", use_cache=True)
        rest = case.model(case.tokens[:, 6:], past_key_values=past)
    assert deviation(rest, whole[:, 6:]) <= bound(whole, LAYERS)
    assert deviation(whole, case.logits) > 1e-3


# --- mean ---


def reference(case: Case, batch: int = 6) -> ExpertMeans:
    return ExpertMeans.measure(case.model, tokens(batch, 12, seed=9))


@families
def test_an_expert_s_rows_get_its_mean_over_the_reference(family: str) -> None:
    case = wrapped(family)
    means = reference(case).filled()
    experts = {layer: used(case, layer) for layer in case.model.moe_layers[-2:]}
    ours = run(case, case.model.ablate(experts, how="mean", reference=means))
    plain = case.plain(case.tokens, replaced(slots_of(experts), lambda at, e, b, p, k: means.of(at)[e]))
    assert deviation(ours, plain) <= bound(plain, LAYERS)
    assert deviation(ours, run(case, case.model.ablate(experts))) > 1e-3, "not the same as zero"
    if case.model.has_shared(case.last):
        ours = run(case, case.model.ablate(shared=True, how="mean", reference=means, layers=[case.last]))
        plain = case.plain(
            case.tokens,
            lambda name, v: (
                means.shared_of(case.last).expand_as(v) if name == names.mlp(names.SHARED_OUT, case.last) else v
            ),
        )
        assert deviation(ours, plain) <= bound(plain)


def test_the_reference_may_be_texts_tokens_a_cache_means_or_their_file(tmp_path: Path) -> None:
    case = wrapped("deepseek")
    texts = tokens(6, 12, seed=9)
    with torch.no_grad():
        _, cache = case.model.run_with_cache(texts, names_filter=lambda name: ".mlp.hook_" in name)
    means = reference(case)
    means.save(tmp_path / "means.safetensors")
    given: list[Any] = [texts, cache, means, tmp_path / "means.safetensors"]
    runs = [run(case, case.model.ablate({2: [3]}, how="mean", reference=one)) for one in given]
    assert all(deviation(one, runs[0]) <= bound(runs[0]) for one in runs)
    assert deviation(runs[0], case.logits) > 1e-3
    alone = [ExpertMeans.measure(case.model, one, layers=[2]) for one in (texts[0], texts[:1])]
    assert torch.equal(alone[0].counts, alone[1].counts)


def test_a_file_that_is_not_there_is_not_read_as_a_text(tmp_path: Path) -> None:
    model = wrapped("deepseek").model
    (tmp_path / "means.json").write_text("{}")
    for path in ("means.pt", "runs/means", "means.json", str(tmp_path / "means.bin")):
        with pytest.raises(InputError, match=f"there is no file {path}; if this is a text, put it in a list"):
            model.ablate({2: [3]}, how="mean", reference=path)
    for there in (tmp_path / "means.json", str(tmp_path / "means.json"), str(tmp_path)):
        with pytest.raises(InputError, match="cannot be read as safetensors"):
            model.ablate({2: [3]}, how="mean", reference=there)


def test_means_whose_layers_were_edited_are_refused(tmp_path: Path) -> None:
    means = reference(wrapped("deepseek"))
    for layers in ([2, 2], [2], "23", [1.5, 2]):
        tensors = {"experts": means.experts, "counts": means.counts}
        save_tensors(tmp_path / "means.safetensors", "ExpertMeans", tensors, {"layers": layers})
        with pytest.raises(InputError, match="means.safetensors holds no ExpertMeans"):
            ExpertMeans.load(tmp_path / "means.safetensors")


# --- resample ---


def test_any_seed_draws() -> None:
    case, most = wrapped("deepseek"), 2**63 - 1
    for made in (
        lambda seed: case.model.keep_top(1, by="random", seed=seed),
        lambda seed: case.model.ablate(ranks=[0], how="resample", seed=seed),
    ):
        largest, another = run(case, made(most)), run(case, made(most - 1))
        assert torch.equal(largest, run(case, made(most))) and deviation(largest, another) > 1e-4
    cache = case.model.run_with_cache(case.tokens)[1]
    for drawn in ("active", "unselected"):
        largest, another = (cache.partial_sum(case.last, drawn=drawn, seed=seed) for seed in (most, most - 1))
        assert not torch.equal(largest.values, another.values)


@families
def test_resampling_takes_the_expert_s_output_at_another_token(family: str) -> None:
    case = wrapped(family)
    name = names.mlp(names.EXPERT_OUT, case.last)
    wanted = [name, names.mlp(names.EXPERT_INDICES, case.last)]
    expert = used(case, case.last, 1)[0]
    made = case.model.ablate({case.last: [expert]}, how="resample", seed=3)
    with torch.no_grad():
        _, before = case.model.run_with_cache(case.tokens, names_filter=wanted)
        with untouched(case.model), made:
            ours, after = case.model.run_with_cache(case.tokens, names_filter=wanted)
            assert torch.equal(case.model(case.tokens), ours), "seeded"
    rows = before["expert_indices", case.last] == expert
    old, new = before[name][rows], after[name][rows]
    assert torch.equal(after[name][~rows], before[name][~rows])
    assert not (old == new).all(-1).any(), "no token keeps its own"
    key = lambda row: row.tolist()  # noqa: E731
    assert sorted(map(key, old)) == sorted(map(key, new)), "each output is used once"
    places = {tuple(place): i for i, place in enumerate(rows.nonzero().tolist())}
    plain = case.plain(
        case.tokens, replaced(slots_of({case.last: [expert]}), lambda at, e, b, p, k: new[places[b, p, k]])
    )
    assert deviation(ours, plain) <= bound(plain)
    other = run(case, case.model.ablate({case.last: [expert]}, how="resample", seed=4))
    assert deviation(other, ours) > 1e-4, "another seed"


@given(groups=st.lists(st.integers(0, 4), max_size=30), seed=st.integers(0, 99))
def test_a_derangement_moves_every_row_within_its_group(groups: list[int], seed: int) -> None:
    given_ = torch.tensor(groups, dtype=torch.long)
    donors, alone = derangement(given_, seed)
    assert sorted(donors.tolist()) == list(range(len(groups)))
    assert torch.equal(given_[donors], given_)
    for row, donor in enumerate(donors.tolist()):
        single = groups.count(groups[row]) == 1
        assert bool(alone[row]) == single == (donor == row)


@pytest.mark.typed
def test_a_single_token_has_nobody_to_take_from() -> None:
    case = wrapped("deepseek")
    one = case.tokens[:1, :1]
    expert = int(case.model.routing(one).layer(2).indices[0, 0, 0])
    made = case.model.ablate({2: [expert]}, how="resample")
    with (
        untouched(case.model),
        torch.no_grad(),
        pytest.raises(InputError, match=f"expert {expert} of layer 2 has one token"),
        made,
    ):
        case.model(one)
    means = reference(case).filled()
    fallback = case.model.ablate({2: [expert]}, how="resample", fallback="mean", reference=means)
    with torch.no_grad():
        with fallback:
            ours = case.model(one)
        with case.model.ablate({2: [expert]}, how="mean", reference=means):
            assert torch.equal(case.model(one), ours)


@pytest.mark.typed
@few
def test_shared_experts_are_resampled_among_all_tokens(family: str) -> None:
    case = wrapped(family)
    name = names.mlp(names.SHARED_OUT, case.last)
    made = case.model.ablate(shared=True, layers=[case.last], how="resample")
    with torch.no_grad():
        _, before = case.model.run_with_cache(case.tokens, names_filter=name)
        with made:
            _, after = case.model.run_with_cache(case.tokens, names_filter=name)
    old, new = before[name].flatten(0, 1), after[name].flatten(0, 1)
    assert sorted(old.tolist()) == sorted(new.tolist())
    assert not (old == new).all(-1).any()


# --- reroute ---


@families
def test_a_rerouted_expert_s_place_is_taken_by_the_next_with_its_own_affinity(family: str) -> None:
    case = wrapped(family)
    layers = case.model.moe_layers[-2:]
    experts = {layer: used(case, layer, 1) for layer in layers}
    made = case.model.ablate(experts, how="reroute")
    wanted = [names.mlp(hook, at) for at in layers for hook in (names.EXPERT_INDICES, names.ROUTING_WEIGHTS)]
    with untouched(case.model), torch.no_grad(), made:
        ours, cache = case.model.run_with_cache(case.tokens, names_filter=wanted)
    plain = case.plain(case.tokens, rerouted(case, lambda at, b, p, chosen: (set(experts.get(at, ())), set())))
    assert deviation(ours, plain) <= bound(plain, LAYERS)
    for layer in layers:
        indices = cache["expert_indices", layer]
        assert torch.equal(indices, case.plain.values[names.mlp(names.EXPERT_INDICES, layer)])
        assert not torch.isin(indices, torch.tensor(experts[layer])).any()
        before = case.model.routing(case.tokens).layer(layers[0]).indices
        if layer == layers[0]:
            stays = before != experts[layer][0]
            assert torch.equal(indices[stays], before[stays]), "nobody else moves"
    assert deviation(ours, run(case, case.model.ablate(experts))) > 1e-3, "not the same as zero"


@families
def test_the_expert_of_a_rank_can_be_rerouted(family: str) -> None:
    case = wrapped(family)
    made = case.model.ablate(ranks=[0], layers=[case.last], how="reroute", where=slice(4, None))
    plain = case.plain(
        case.tokens,
        rerouted(case, lambda at, b, p, chosen: (set(chosen[:1]) if at == case.last and p >= 4 else set(), set())),
    )
    assert deviation(run(case, made), plain) <= bound(plain)


def test_rerouting_is_not_minus_infinity_in_the_logits() -> None:
    """There the model's own softmax lets the others grow."""
    case = wrapped("deepseek")
    expert = used(case, 2, 1)[0]
    weights = names.mlp(names.ROUTING_WEIGHTS, 2)

    def mask(logits: torch.Tensor, hook: Any) -> torch.Tensor:
        logits[..., expert] = -torch.inf
        return logits

    with torch.no_grad():
        _, free = case.model.run_with_cache(case.tokens, names_filter=[weights, names.mlp(names.EXPERT_INDICES, 2)])
        with case.model.ablate({2: [expert]}, how="reroute"):
            _, ours = case.model.run_with_cache(case.tokens, names_filter=weights)
        with case.model.hooks([(names.mlp(names.ROUTER_LOGITS, 2), mask)]):
            _, masked = case.model.run_with_cache(case.tokens, names_filter=weights)
    hit = (free["expert_indices", 2] == expert).any(-1)
    stays = (free["expert_indices", 2] != expert) & hit[..., None]
    assert torch.equal(ours[weights][stays], free[weights][stays])
    grown = masked[weights].sum(-1)[hit] / ours[weights].sum(-1)[hit]
    assert (grown > 1).all() and grown.max() > 1.3


# --- the top experts alone ---


@families
@pytest.mark.parametrize("k", [0, 1, 2])
def test_keeping_the_top_experts_drops_the_others_contributions(family: str, k: int) -> None:
    case = wrapped(family)
    ranks = torch.arange(3)
    by: Any
    for by, gone in (("weight", ranks >= k), ("last", ranks < 3 - k)):
        for renormalize in [False, True] if k else [False]:
            ours = run(case, case.model.keep_top(k, by=by, renormalize=renormalize))
            plain = case.plain(case.tokens, zeroed(lambda at, indices: gone.expand(indices.shape), renormalize))  # noqa: B023
            assert deviation(ours, plain) <= bound(plain, LAYERS)
            assert deviation(ours, case.logits) > 1e-2


@few
def test_random_experts_are_kept_anew_for_every_token(family: str) -> None:
    case = wrapped(family)
    made = case.model.keep_top(2, by="random", seed=5)
    kept = [names.mlp(names.EXPERT_KEPT, at) for at in case.model.moe_layers]
    with untouched(case.model), torch.no_grad(), made:
        ours, cache = case.model.run_with_cache(case.tokens, names_filter=kept)
        assert torch.equal(case.model(case.tokens), ours), "seeded"
    masks = torch.stack([cache[name] for name in kept])
    assert (masks.sum(-1) == 2).all()
    counts = masks.sum((1, 2))
    assert (counts.min(-1).values > 0).all() and not (masks == masks[:, :1, :1]).all(), "not the same rank everywhere"
    assert not torch.equal(masks[0], masks[-1]), "nor in every layer"
    plain = case.plain(case.tokens, zeroed(lambda at, _: ~cache[names.mlp(names.EXPERT_KEPT, at)]))
    assert deviation(ours, plain) <= bound(plain, LAYERS)


def test_keeping_all_changes_nothing_and_layers_restrict() -> None:
    case = wrapped("deepseek")
    assert torch.equal(run(case, case.model.keep_top(3, renormalize=True)), case.logits)
    ours = run(case, case.model.keep_top(1, layers=[2]))
    plain = case.plain(
        case.tokens, zeroed(lambda at, i: ((torch.arange(3) >= 1) & torch.tensor(at == 2)).expand(i.shape))
    )
    assert deviation(ours, plain) <= bound(plain)


@pytest.mark.parametrize("by", ["weight", "last", "random"])
def test_what_is_kept_is_chosen_by_the_weights_that_an_outer_intervention_left(by: Any) -> None:
    """A re-route puts the newcomer, of the smallest weight, into slot 0; and what is ablated cannot be kept."""
    model, layer, text = wrapped("deepseek").model, 2, wrapped("deepseek").tokens
    weights, kept = names.mlp(names.ROUTING_WEIGHTS, layer), names.mlp(names.EXPERT_KEPT, layer)
    outer: Any
    rerouted = {"ranks": [0], "how": "reroute"}
    for outer in (rerouted, {"ranks": [0]}, {"ranks": [2], "renormalize": True}):
        with torch.no_grad(), model.ablate(**outer):
            _, seen = model.run_with_cache(text, names_filter=[weights, kept])
            with model.keep_top(1, by=by, layers=[layer], renormalize=True):
                _, left = model.run_with_cache(text, names_filter=[weights, kept])
        was, slot = seen[weights], left[kept].int().argmax(-1)
        there = seen[kept]
        assert (left[kept].sum(-1) == 1).all() and there.gather(-1, slot[..., None]).all()
        if by != "random":
            largest, smallest = was.argmax(-1), was.masked_fill(~there, torch.inf).argmin(-1)
            assert torch.equal(slot, largest if by == "weight" else smallest)
        assert torch.allclose(left[weights].sum(-1), was.sum(-1))
        if outer is rerouted:
            assert not was.argmax(-1).eq(0).any(), "or slots would be in the order of weights"


# --- gradients ---


def test_gradients_flow_past_what_is_left_out() -> None:
    case = wrapped("deepseek", torch.float64)
    made = case.model.ablate(ranks=[1], layers=[2], renormalize=True)
    name = names.mlp(names.ROUTING_WEIGHTS, 2)

    def loss(nudge: torch.Tensor) -> torch.Tensor:
        nudged = [(name, lambda weights, hook: weights + nudge)]
        with case.model.hooks(nudged), made:
            return case.model(case.tokens, return_type="loss")

    nudge = torch.zeros(2, 12, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(nudge), nudge)
    step = torch.zeros_like(nudge)
    step[1, 4, 0], step[0, 7, 1] = 1e-5, 1e-5
    with torch.no_grad():
        found = (loss(step) - loss(-step)) / 2
    assert abs(found - (grad * step).sum()) <= 1e-6 * found.abs()
    case.model.zero_grad()


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"experts": {0: [1]}}, "layer 0 is dense; the layers with experts are 1, 2"),
        ({"experts": {7: [1]}}, "there is no layer 7; the model has layers 0 to 2"),
        ({"experts": {1: [8]}}, "there is no expert 8 in layer 1; it has experts 0 to 7"),
        ({"ranks": [3]}, "there is no rank 3; the model has ranks 0 to 2"),
        ({"how": "none"}, "how is 'none'; expected one of ('zero', 'mean', 'resample', 'reroute')"),
        ({"fallback": "zero"}, "fallback is 'zero'; expected one of ('error', 'mean')"),
        ({"how": "mean"}, "pass reference="),
        ({"how": "resample", "fallback": "mean"}, "pass reference="),
        ({"how": "zero", "reference": "text"}, "uses no reference"),
        ({"how": "mean", "reference": Path("nowhere")}, "there is no file nowhere"),
        ({"how": "mean", "reference": []}, "the reference is []; expected ExpertMeans, their file, a cache, a text"),
        ({"how": "mean", "reference": 3}, "the reference is int; expected ExpertMeans"),
        ({"how": "reroute", "shared": True, "ranks": [0]}, "shared ones are not selected"),
        ({"how": "mean", "renormalize": True}, "every weight is still in use"),
        ({"shared": True, "renormalize": True}, "every weight is still in use"),
        *(({"how": how, "seed": 0}, f"seed=0 with how={how!r}") for how in ("zero", "mean", "reroute")),
        *(({"how": how, "fallback": "mean"}, f"fallback='mean' with how={how!r}") for how in ("zero", "reroute")),
        ({"fallback": "error"}, "only how='resample' draws tokens"),
        ({"experts": {1: range(6)}, "how": "reroute"}, "layer 1: 2 experts would be left; a token needs 3"),
        ({"experts": Selection(ranks=[0]), "layers": [1]}, "the Selection says them all"),
    ],
)
@pytest.mark.untyped
def test_ablations_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        wrapped("deepseek").model.ablate(**options)


@pytest.mark.parametrize("k", [-1, 4, 1.5, True])
@pytest.mark.untyped
def test_k_is_a_number_of_active_experts(k: Any) -> None:
    expected = "the model has 3 active experts: expected 0 to 3" if k == 4 else "expected a whole number"
    with pytest.raises(InputError, match=re.escape(f"k is {k!r}; {expected}")):
        wrapped("deepseek").model.keep_top(k)


@pytest.mark.parametrize("made", ["random", "resample", "shared", "recorded"])
def test_what_depends_on_the_whole_batch_is_refused_in_the_stacked_runs_of_a_sweep(made: str) -> None:
    case = wrapped("deepseek")
    corrupted = case.tokens.roll(1, 1)
    one = {
        "random": case.model.keep_top(1, by="random", layers=[2]),
        "resample": case.model.ablate(
            ranks=[0], layers=[2], how="resample", fallback="mean", reference=reference(case)
        ),
        "shared": case.model.ablate(shared=True, layers=[2], how="resample"),
        "recorded": case.model.force_routing(case.model.routing(case.tokens), layers=[2]),
    }[made]
    with untouched(case.model), one, pytest.raises(InputError, match="needs the tokens of the forward pass"):
        patch(case.model, case.tokens, corrupted, "resid_pre", LogitDifference(5, 6), selection=Selection(layers=[2]))


@pytest.mark.untyped
def test_k_may_be_a_numpy_integer() -> None:
    k: Any = np.int64(1)
    assert repr(wrapped("deepseek").model.keep_top(k)) == "Intervention(keep_top 1, by weight)"


@pytest.mark.untyped
def test_keep_top_refuses_other_ways_and_rescaling_nothing() -> None:
    model: Any = wrapped("deepseek").model
    with pytest.raises(InputError, match="by is 'first'"):
        model.keep_top(1, by="first")
    for by in ("weight", "last"):
        with pytest.raises(InputError, match=f"seed=3 with by='{by}'"):
            model.keep_top(1, by=by, seed=3)
    with pytest.raises(InputError, match="k=0"):
        model.keep_top(0, renormalize=True)
    with pytest.raises(InputError, match="layer 0 is dense"):
        model.keep_top(1, layers=[0])


@pytest.mark.typed
def test_rescaling_names_the_token_that_has_nothing_left() -> None:
    case = wrapped("deepseek")
    chosen = case.model.routing(case.tokens).layer(2).indices[1, 4].tolist()
    where = torch.zeros(2, 12, dtype=torch.bool)
    where[1, 4] = True
    made = case.model.ablate({2: chosen}, renormalize=True, where=where)
    with untouched(case.model), pytest.raises(InputError, match=re.escape("layer 2 at (batch 1, position 4)")), made:
        case.model(case.tokens)


def test_rerouting_names_the_token_that_has_too_few_experts_left() -> None:
    case = wrapped("deepseek")
    outer, inner = case.model.ablate({2: range(4)}, how="reroute"), case.model.ablate({2: [4, 5]}, how="reroute")
    with untouched(case.model), pytest.raises(InputError, match="layer 2, token .*fewer than 3 experts"), outer, inner:
        case.model(case.tokens)
    grouped = wrapped("deepseek_v2, groups")
    two = grouped.model.routing(grouped.tokens).layer(2).indices[0, 3, :2].tolist()
    made = grouped.model.ablate({2: two}, how="reroute")
    with untouched(grouped.model), pytest.raises(InputError, match="groups that the router leaves out"), made:
        grouped.model(grouped.tokens)


def test_an_expert_that_the_reference_never_used_is_named() -> None:
    case = wrapped("deepseek")
    short = ExpertMeans.measure(case.model, case.tokens[:1, :2])
    unseen = int((short.counts[1] == 0).nonzero()[0])
    with pytest.raises(InputError, match=f"expert {unseen} of layer 2 has no mean"):
        case.model.ablate({2: [unseen]}, how="mean", reference=short)
    made = case.model.ablate(ranks=[0, 1, 2], layers=[2], how="mean", reference=short)
    with untouched(case.model), pytest.raises(InputError, match=r"expert \d of layer 2 has no mean"), made:
        case.model(case.tokens)
    only = ExpertMeans.measure(case.model, case.tokens, layers=[1])
    with pytest.raises(InputError, match=re.escape("no means of layer 2; it has layers [1]")):
        case.model.ablate({2: [0]}, how="mean", reference=only)


def test_a_mask_of_another_shape_is_refused_and_positions_need_a_forward_pass() -> None:
    case = wrapped("deepseek")
    made = case.model.ablate(ranks=[0], where=torch.ones(2, 11, dtype=torch.bool))
    with untouched(case.model), pytest.raises(InputError, match=re.escape("shape (2, 11); expected (2, 12)")), made:
        case.model(case.tokens)
    resid = torch.randn(2, 12, 32)
    with (
        untouched(case.model),
        pytest.raises(InputError, match="where= needs the tokens"),
        case.model.ablate(ranks=[0], where=[3]),
    ):
        case.model.blocks[2].mlp(resid)
    with torch.no_grad(), case.model.ablate(ranks=[0, 1, 2]):  # every token needs to be told nothing
        alone = case.model.blocks[2].mlp(resid)
        assert torch.equal(alone, case.model._moe(2).shared_experts(resid))


def test_wrong_bounds_would_be_seen() -> None:
    """Negative control: ablating another expert is far outside of every bound above."""
    case = wrapped("deepseek")
    one, other = used(case, 2)
    plain = case.plain(case.tokens, zeroed(slots_of({2: [other]})))
    assert deviation(run(case, case.model.ablate({2: [one]})), plain) > 100 * bound(plain, FP32)


@pytest.mark.typed
def test_a_cache_gives_the_rows_that_a_selection_means() -> None:
    case = wrapped("deepseek")
    with torch.no_grad():
        _, cache = case.model.run_with_cache(case.tokens, names_filter=lambda name: ".mlp.hook_" in name)
    selection = Selection(experts={1: [0, 3], 2: [5]}, where=slice(2, None))
    rows = cache.select("expert_out", selection)
    expected = [
        (layer, b, p, k, e)
        for layer, experts in {1: (0, 3), 2: (5,)}.items()
        for b, text in enumerate(cache["expert_indices", layer].tolist())
        for p, token in enumerate(text)
        for k, e in enumerate(token)
        if p >= 2 and e in experts
    ]
    found = torch.stack([rows.layer, rows.batch, rows.pos, rows.rank, rows.expert], -1).tolist()
    assert [tuple(row) for row in found] == expected
    for value, (layer, b, p, k, _) in zip(rows.values, expected, strict=True):
        assert torch.equal(value, cache["expert_out", layer][b, p, k])
    weights = cache.select("routing_weights", Selection(ranks=[0])).values
    assert torch.equal(weights, torch.cat([cache["routing_weights", at][..., 0].flatten() for at in (1, 2)]))
    one = case.model.run_with_cache(case.tokens[:1], remove_batch_dim=True)[1]
    alone = one.select("expert_out", Selection(layers=[2], where=3)).values
    assert deviation(alone, one["expert_out", 2][3]) == 0
    with pytest.raises(HookError, match=r"router_logits of layer 1 is \(2, 12, 8\); select takes what experts have by"):
        cache.select("router_logits", selection)


def test_random_experts_are_drawn_by_row_and_position_with_a_cache_or_without() -> None:
    model, prompt = wrapped("mixtral").model, tokens(2, 7)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}

    def continued(seed: int, cached: bool) -> torch.Tensor:
        made = model.keep_top(1, by="random", seed=seed)
        return model.generate(prompt, interventions=[made], use_past_kv_cache=cached, **how)

    assert torch.equal(continued(0, True), continued(0, False))
    assert not torch.equal(continued(0, True), continued(1, True)), "another seed draws others"
