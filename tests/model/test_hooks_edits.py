"""An edit does what the hook table says: every hook against the plain re-implementation, on every family."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import names
from moe_lens.errors import HookError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.hooks.layer_hooks import rank_order
from moe_lens.model.loading.pretrained import load_pretrained
from tests.families import CONFIGS, build
from tests.model.tiny import BASE, golden
from tests.wrapped import Case, as_hook, deviation, on, untouched, wrapped

FP32 = 1e-5  # relative to the largest logit
FP64 = 1e-10

families = pytest.mark.parametrize("family", CONFIGS)
TABLE = [hook.name for hook in names.MLP_HOOKS]
WHICH = re.compile(f"({names.N_ACTIVE}|{names.EXPERT_INDICES}|{names.EXPERT_KEPT})$")
"""Hooks whose values are no quantities: they cannot be halved."""
GROUPED = ["deepseek_v2, groups", "deepseek_v3"]


def replaced(value: Tensor, one_token: bool) -> Tensor:
    """Another value of the same shape, for the whole batch or for the token at (1, 4) alone."""
    generator = torch.Generator().manual_seed(3)
    if value.is_floating_point():
        other = value * 0.7 + 0.5 * torch.randn(value.shape, generator=generator).to(value.dtype)
    elif value.dtype == torch.bool:
        other = torch.rand(value.shape, generator=generator) < 0.5
    elif value.shape[-1] == 1:  # numbers of experts: 1, 2 or 4 in place of 3; expert groups leave 4
        other = (value + torch.randint(3, value.shape, generator=generator)) % 4 + 1
    else:  # ids: another expert in every slot, none twice
        other = (value + torch.randint(1, 8, (*value.shape[:2], 1), generator=generator)) % 8
    if not one_token:
        return other
    edited = value.clone()
    edited[1, 4] = other[1, 4]
    return edited


def agree(case: Case, name: str, change: Callable[[Tensor], Tensor], bound: float) -> Tensor:
    """Logits with one hook edited; they, and all that comes after the hook in its layer, are the plain model's."""
    plain = case.plain(case.tokens, on(name, change))
    watched = [n for n in case.plain.values if n.startswith(f"blocks.{case.last}.") and n in case.exact]
    with untouched(case.model), torch.no_grad(), case.model.hooks([(name, as_hook(change))]):
        logits, cache = case.model.run_with_cache(case.tokens, names_filter=watched)
    assert deviation(logits, plain) <= bound * plain.abs().max().item()
    for at in watched:
        ours, theirs = cache[at], case.plain.values[at]
        if theirs.is_floating_point():
            assert deviation(ours, theirs) <= bound * theirs.abs().max().item(), at
        else:
            assert torch.equal(ours, theirs), at
    return logits


# --- the table ---


@families
@pytest.mark.parametrize("one_token", [False, True], ids=["batch", "token"])
def test_edits_of_the_table_are_those_of_the_plain_layer(family: str, one_token: bool) -> None:
    case = wrapped(family)
    for hook in TABLE:
        name = names.mlp(hook, case.last)
        if name not in case.model.hook_dict:
            assert hook == names.SHARED_OUT
            assert not case.model.has_shared(case.last)
            continue
        logits = agree(case, name, lambda value: replaced(value, one_token), FP32)
        if not one_token:
            assert deviation(logits, case.logits) > 1e-2, hook
        elif hook != names.SHARED_OUT:
            # The other text and what comes before the token are untouched, but for rounding: groups of rows changed.
            assert deviation(logits[0], case.logits[0]) <= FP32 * case.logits.abs().max().item()
            assert deviation(logits[1, :4], case.logits[1, :4]) <= FP32 * case.logits.abs().max().item()
            assert deviation(logits[1, 4:], case.logits[1, 4:]) > 1e-3, hook


@families
def test_edits_in_the_first_sparse_layer_travel_through_the_others(family: str) -> None:
    case = wrapped(family)
    first = case.model.moe_layers[0]
    for hook in (names.ROUTER_LOGITS, names.EXPERT_INDICES, names.EXPERT_OUT):
        agree(case, names.mlp(hook, first), lambda value: replaced(value, False), 2 * FP32)


@pytest.mark.parametrize("family", ["deepseek", "deepseek, normalised"])
def test_edits_in_float64(family: str) -> None:
    """Other families round to float32 on the way: in their norms, rotary tables or routers."""
    case = wrapped(family, torch.float64)
    for hook in TABLE:
        name = names.mlp(hook, case.last)
        if name in case.model.hook_dict:
            agree(case, name, lambda value: replaced(value, False), FP64)


@families
def test_an_edit_of_the_middle_of_a_block_changes_the_stream_too(family: str) -> None:
    case = wrapped(family)
    for layer in range(case.model.cfg.n_layers):
        mid, post = names.block(names.RESID_MID, layer), names.block(names.RESID_POST, layer)
        out, normed = names.block(names.BLOCK_MLP_OUT, layer), f"blocks.{layer}.ln2.hook_out"
        plain = case.plain(case.tokens, on(mid, lambda value: replaced(value, False)))
        with untouched(case.model), torch.no_grad():
            edit = as_hook(lambda value: replaced(value, False))
            with case.model.hooks([(mid, edit)]):
                logits, cache = case.model.run_with_cache(case.tokens, names_filter=[mid, post, out, normed])
            _, before = case.model.run_with_cache(case.tokens, names_filter=[mid, out])
        assert torch.equal(cache[mid], replaced(before[mid], False))
        assert torch.equal(cache[post], cache[mid] + cache[out])
        assert deviation(cache[out], before[out]) > 1e-3, "the MLP read the edit"
        norm = case.hf.model.layers[layer].post_attention_layernorm
        assert torch.equal(cache[normed], norm(cache[mid])), "through the norm"
        assert deviation(logits, plain) <= 2 * FP32 * plain.abs().max().item()


# --- routing ---


@families
def test_a_forbidden_expert_is_chosen_by_nobody_and_the_others_share_its_affinity(family: str) -> None:
    case = wrapped(family)
    name = names.mlp(names.ROUTER_LOGITS, case.last)
    expert = int(case.model.routing(case.tokens).indices[-1].flatten().mode().values)

    def forbid(logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., expert] = float("-inf")
        return logits

    with untouched(case.model), torch.no_grad(), case.model.hooks([(name, as_hook(forbid))]):
        ours, cache = case.model.run_with_cache(case.tokens, names_filter=lambda n: n in case.exact)
    theirs = case.plain(case.tokens, on(name, forbid))
    assert deviation(ours, theirs) <= FP32 * theirs.abs().max().item()
    indices = cache[names.mlp(names.EXPERT_INDICES, case.last)]
    assert torch.equal(indices, case.plain.values[names.mlp(names.EXPERT_INDICES, case.last)])
    if family == "deepseek_v3":
        return  # a correction bias is added after the score: −inf makes the affinity 0, and does not exclude
    assert not (indices == expert).any()


@families
def test_forced_experts_get_their_own_affinity_normalised_and_scaled_by_the_family(family: str) -> None:
    case = wrapped(family)
    config: Any = case.hf.config
    name, weights_name = (names.mlp(n, case.last) for n in (names.EXPERT_INDICES, names.ROUTING_WEIGHTS))
    forced = torch.tensor([6, 1, 3]).expand(2, 12, 3)
    with untouched(case.model), torch.no_grad(), case.model.hooks([(name, as_hook(lambda _: forced))]):
        _, cache = case.model.run_with_cache(
            case.tokens, names_filter=[name, weights_name, names.mlp(names.ROUTER_LOGITS, case.last)]
        )
    assert torch.equal(cache[name], forced), "in the order in which they were given"
    logits = cache[names.mlp(names.ROUTER_LOGITS, case.last)]
    affinity = logits.sigmoid() if case.model.family.score == "sigmoid" else logits.softmax(-1)
    weights = affinity[..., [6, 1, 3]]
    if family in ("gpt_oss", "mixtral") or (getattr(config, "norm_topk_prob", False) and "v2" not in family):
        weights = weights / weights.sum(-1, keepdim=True)
    if family.startswith(("deepseek_v2", "deepseek_v3")):
        weights = weights * config.routed_scaling_factor
    assert deviation(cache[weights_name], weights) <= 1e-6


@pytest.mark.parametrize("family", GROUPED)
def test_forcing_an_expert_of_a_group_that_was_not_chosen_gives_it_its_unmasked_affinity(family: str) -> None:
    case = wrapped(family)
    name = names.mlp(names.EXPERT_INDICES, case.last)

    def outside(indices: Tensor) -> Tensor:
        """Two experts per group, two groups chosen: the first slot gets an expert of a third group."""
        chosen_groups = torch.zeros(*indices.shape[:2], 4, dtype=torch.bool).scatter(-1, indices // 2, True)
        group = (~chosen_groups).int().argmax(-1)
        return torch.cat([group[..., None] * 2 + 1, indices[..., 1:]], -1)

    agree(case, name, outside, FP32)
    with torch.no_grad(), case.model.hooks([(name, as_hook(outside))]):
        _, cache = case.model.run_with_cache(case.tokens, names_filter="blocks.2.hook_routing_weights")
    assert (cache["routing_weights", 2][..., 0] > 1e-4).all(), "a masked affinity would be zero"


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        (torch.tensor([0, 1, 8]).expand(2, 12, 3), "returned experts 0…8; expected ids from 0 to 7"),
        (torch.tensor([0, 1, -1]).expand(2, 12, 3), "returned experts -1…1; expected ids from 0 to 7"),
        (torch.tensor([5, 1, 5]).expand(2, 12, 3), "returned expert 5 twice at (batch, pos) (0, 0)"),
        (torch.tensor([5, 1]).expand(2, 12, 2), "shape (2, 12, 2); expected a tensor of shape (2, 12, 3)"),
        (torch.tensor([5.0, 1.0, 2.0]).expand(2, 12, 3), "returned torch.float32; expected torch.int64"),
        (torch.tensor([True, False, True]).expand(2, 12, 3), "returned torch.bool; expected torch.int64"),
        ("experts", "returned str; expected a tensor"),
    ],
    ids=["too large", "negative", "duplicate", "wrong shape", "floats", "booleans", "no tensor"],
)
def test_indices_that_cannot_be_forced_are_refused(indices: Any, says: str) -> None:
    case = wrapped("deepseek")
    with untouched(case.model), pytest.raises(HookError, match=re.escape(says)) as error:
        case.model.run_with_hooks(case.tokens, fwd_hooks=[("blocks.2.hook_expert_indices", as_hook(lambda _: indices))])
    assert "blocks.2.mlp.hook_expert_indices" in str(error.value)
    with torch.no_grad():
        assert torch.equal(case.model(case.tokens), case.logits)


def test_an_expert_forced_twice_is_found_at_its_token() -> None:
    case = wrapped("deepseek")

    def twice(indices: Tensor) -> Tensor:
        indices[1, 7, 2] = indices[1, 7, 0]
        return indices

    with untouched(case.model), pytest.raises(HookError, match=re.escape("(batch, pos) (1, 7)")):
        case.model.run_with_hooks(case.tokens, fwd_hooks=[("blocks.1.hook_expert_indices", as_hook(twice))])


@pytest.mark.parametrize("hook", [n for n in TABLE if n not in (names.EXPERT_INDICES, names.MLP_IN, names.MLP_OUT)])
def test_wrong_shapes_and_types_are_refused_by_name(hook: str) -> None:
    case = wrapped("deepseek")
    name = names.mlp(hook, 1)
    other = torch.float32 if hook == names.N_ACTIVE else torch.int64
    short, whole = as_hook(lambda value: value[:, :-1]), as_hook(lambda value: value.to(other))
    for wrong, says in ((short, "expected a tensor of shape"), (whole, f"returned {other}")):
        with untouched(case.model), pytest.raises(HookError, match=says) as error:
            case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, wrong)])
        assert name in str(error.value)


# --- ranks ---


def test_ties_go_to_the_lowest_index() -> None:
    indices = torch.tensor([[5, 2, 7, 0], [3, 1, 2, 6]])
    weights = torch.tensor([[0.2, 0.2, 0.4, 0.2], [0.25, 0.25, 0.25, 0.25]])
    order = rank_order(indices, weights)
    assert indices.gather(1, order).tolist() == [[7, 0, 2, 5], [1, 2, 3, 6]]


@families
def test_ties_in_a_model_go_to_the_lowest_index(family: str) -> None:
    """Router logits set equal: every slot weighs the same, and ranks are by index."""
    case = wrapped(family)
    wanted = torch.tensor([1, 4, 5])

    def tie(logits: Tensor) -> Tensor:
        tied = torch.full_like(logits, -9.0)
        tied[..., wanted] = 3.0
        return tied

    with torch.no_grad(), case.model.hooks([(names.mlp(names.ROUTER_LOGITS, case.last), as_hook(tie))]):
        _, cache = case.model.run_with_cache(case.tokens, names_filter=lambda n: f"blocks.{case.last}.mlp.hook_" in n)
    indices = cache[names.mlp(names.EXPERT_INDICES, case.last)]
    weights = cache[names.mlp(names.ROUTING_WEIGHTS, case.last)]
    if "group" not in family and family != "deepseek_v3":
        assert (indices == wanted).all()
        assert torch.equal(weights, weights[..., :1].expand_as(weights))
    same = weights[..., :-1] == weights[..., 1:]
    assert (indices[..., :-1] < indices[..., 1:])[same].all()


@families
def test_ranks_are_fixed_at_selection(family: str) -> None:
    """Edited weights and forced experts stay in the slots in which they were put."""
    case = wrapped(family)
    indices, weights, out = (
        names.mlp(n, case.last) for n in (names.EXPERT_INDICES, names.ROUTING_WEIGHTS, names.EXPERT_WEIGHTED)
    )
    with torch.no_grad():
        _, before = case.model.run_with_cache(case.tokens, names_filter=[indices, weights, out])
        with case.model.hooks([(weights, as_hook(lambda w: w.flip(-1)))]):
            _, flipped = case.model.run_with_cache(case.tokens, names_filter=[indices, weights, out])
        with case.model.hooks([(indices, as_hook(lambda i: i.flip(-1)))]):
            _, turned = case.model.run_with_cache(case.tokens, names_filter=[indices, weights, out])
    assert torch.equal(flipped[indices], before[indices])
    assert torch.equal(flipped[weights], before[weights].flip(-1))
    assert torch.equal(turned[indices], before[indices].flip(-1))
    assert deviation(turned[weights], before[weights].flip(-1)) <= 1e-6
    assert deviation(turned[out], before[out].flip(-2)) <= 1e-5 * before[out].abs().max().item()


# --- the original code's interventions ---


@pytest.fixture(scope="module")
def original() -> HookedMoE:
    return HookedMoE.from_hf(*load_pretrained(str(BASE)))


@pytest.mark.parametrize("name", ["zero_expert", "mask_router_logit", "uniform_weights", "patch_resid_pre_p0_pos5"])
def test_interventions_of_the_original_code_are_reproduced_by_hooks(original: HookedMoE, name: str) -> None:
    truth = golden()
    layer, expert = int(truth["iv.layer"]), int(truth["iv.expert"])

    def zero(out: Tensor) -> Tensor:
        return out.masked_fill((truth[f"L{layer}.topk_idx"] == expert)[..., None], 0.0)

    def mask(logits: Tensor) -> None:
        logits[..., expert] = float("-inf")

    def patch(stream: Tensor) -> None:
        stream[0, 5] = stream[1, 5]

    edits: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
        "zero_expert": ("hook_expert_out", zero),
        "mask_router_logit": ("hook_router_logits", mask),
        "uniform_weights": ("hook_routing_weights", lambda w: torch.full_like(w, 0.25)),
        "patch_resid_pre_p0_pos5": ("hook_resid_pre", patch),
    }
    hook, change = edits[name]
    with torch.no_grad():
        logits = original.run_with_hooks(truth["input_ids"], fwd_hooks=[(f"blocks.{layer}.{hook}", as_hook(change))])
        plain = original(truth["input_ids"])
    assert deviation(logits, truth[f"iv.{name}.logits"]) <= 1e-4
    assert deviation(plain, truth[f"iv.{name}.logits"]) > 1e-2
    if name == "zero_expert":  # the same by the expert's own hook, which does not need to know where it was used
        own: list[Any] = [(names.expert("hook_out", layer, expert), as_hook(torch.zeros_like))]
        with torch.no_grad():
            assert torch.equal(original.run_with_hooks(truth["input_ids"], fwd_hooks=own), logits)


# --- changes in place ---

IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "returns nothing": lambda value: (value.mul_(0.5), None)[1],
    "returns it": lambda value: value.mul_(0.5),
}


@families
def test_a_change_in_place_is_an_edit(family: str) -> None:
    """Of what passes here alone: queries, keys and values read one tensor, all layers one pair of cosines and sines."""
    case = wrapped(family)
    with untouched(case.model), torch.no_grad():
        for name in case.some():
            if not name.startswith(f"blocks.{case.last}") or WHICH.search(name):
                continue
            halved = case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, as_hook(lambda value: value * 0.5))])
            for how, change in IN_PLACE.items():
                in_place = case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, as_hook(change))])
                assert torch.equal(in_place, halved), (name, how)
            assert deviation(halved, case.logits) > 0, name


def test_a_change_in_place_reaches_nothing_that_others_hold() -> None:
    """The ids, embeddings and residual stream that the caller has passed; what an earlier hook has kept as it was."""
    case = wrapped("olmoe")
    layer, kept = case.last, []
    stream, ids = case.model(case.tokens, stop_at_layer=layer).detach(), case.tokens.clone()
    hf: Any = case.model.original_model
    embedded = hf.get_input_embeddings()(ids).detach()
    given = {"resid_pre": (stream, layer), "hook_embed": (embedded, None), "embed.hook_in": (ids, None)}
    before = {name: value.clone() for name, (value, _) in given.items()}
    with untouched(case.model), torch.no_grad():
        for name, (value, start) in given.items():
            point = names.block(names.RESID_PRE, start or 0) if value.is_floating_point() else name
            out = case.model.run_with_hooks(value, [(point, as_hook(torch.zero_))], start_at_layer=start)
            assert deviation(out, case.logits) > 0, name
            assert torch.equal(value, before[name]), name
        for name in (names.block(names.RESID_POST, layer - 1), names.mlp(names.EXPERT_OUT, layer - 1)):
            keep = (name, lambda value, hook: kept.append(value))
            later = [(name, as_hook(torch.zero_)), (names.block(names.RESID_PRE, layer), as_hook(torch.zero_))]
            case.model.run_with_hooks(case.tokens, [keep, *later])
            assert torch.equal(kept.pop(), case.model.run_with_cache(case.tokens, names_filter=name)[1][name])


@pytest.mark.parametrize("past_the_count", [False, True])
def test_a_change_in_place_counts_however_it_is_made(past_the_count: bool) -> None:
    """`.data` and numpy change a tensor without torch's counting it."""
    case = wrapped("olmoe")

    def spoil(value: Tensor, hook: Any) -> None:  # noqa: ARG001
        (value.data if past_the_count else value).zero_()

    with untouched(case.model), torch.no_grad():
        for name in (names.block(names.ATTN_OUT, 1), names.mlp(names.EXPERT_OUT, 1)):
            zeroed = case.model.run_with_hooks(case.tokens, [(name, as_hook(torch.zeros_like))])
            assert torch.equal(case.model.run_with_hooks(case.tokens, [(name, spoil)]), zeroed)
            assert deviation(zeroed, case.logits) > 0


@pytest.mark.filterwarnings("ignore")  # of torch: what is not batched there is slow
def test_a_hook_that_only_reads_runs_where_nothing_can_be_compared() -> None:
    """In `torch.vmap` no value answers whether it equals another."""
    case = wrapped("olmoe")
    hf: Any = case.model.original_model
    embedded = hf.get_input_embeddings()(case.tokens).detach()
    read = [(names.block(names.RESID_POST, 1), as_hook(lambda value: None))]
    with torch.no_grad():
        found = torch.vmap(lambda one: case.model.run_with_hooks(one[None], fwd_hooks=read)[0])(embedded)
    assert deviation(found, case.logits) <= FP32 * case.logits.abs().max().item()


@families
def test_what_is_cached_stays_what_it_was(family: str) -> None:
    """The published code's trap: a cached E(x) that a later step turned into g·E(x), or into nothing."""
    case = wrapped(family)
    layer = case.last
    hooks = [hook for hook in TABLE if names.mlp(hook, layer) in case.model.hook_dict]
    kept = [names.mlp(hook, layer) for hook in hooks] + [names.block(n.name, layer) for n in names.RESIDUAL_HOOKS]
    with torch.no_grad():
        _, clean = case.model.run_with_cache(case.tokens, names_filter=kept)
    for position, hook in enumerate(hooks):
        if WHICH.search(hook):
            continue
        name = names.mlp(hook, layer)
        spoil = as_hook(IN_PLACE["returns nothing"])
        cache, caching, _ = case.model.get_caching_hooks(kept)
        with untouched(case.model), torch.no_grad():
            case.model.run_with_hooks(case.tokens, fwd_hooks=[*caching, (name, spoil)])
            after = {n: cache[names.mlp(n, layer)] for n in hooks[:position]}
            for before_hook, value in after.items():
                assert torch.equal(value, clean[names.mlp(before_hook, layer)]), (before_hook, hook)
            assert torch.equal(cache[name], clean[name]), "cached before the edit"
            cache.clear()
            case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, spoil), *caching])
        for before_hook in hooks[:position]:
            assert torch.equal(cache[names.mlp(before_hook, layer)], clean[names.mlp(before_hook, layer)])
        assert torch.equal(cache[name], clean[name] * 0.5), "cached after the edit"


@families
@pytest.mark.parametrize("backward", [False, True])
def test_an_edited_tensor_that_is_cached_does_not_follow_later_changes_in_place(family: str, backward: bool) -> None:
    """The layer's output may be the very memory that a hook returned for `hook_routed_out`."""
    case = wrapped(family)
    routed, out = names.mlp(names.ROUTED_OUT, case.last), names.mlp(names.MLP_OUT, case.last)
    cache, caching, _ = case.model.get_caching_hooks(routed)
    edit = [] if backward else [(routed, as_hook(lambda value: value + 1.0))]
    listen: list[Any] = [(routed, lambda grad, hook: None)] if backward else []
    with torch.no_grad():
        case.model.run_with_hooks(case.tokens, fwd_hooks=[*edit, *caching], bwd_hooks=listen)
        expected = cache[routed].clone()
        case.model.run_with_hooks(
            case.tokens, fwd_hooks=[*edit, *caching, (out, as_hook(torch.zero_))], bwd_hooks=listen
        )
    assert torch.equal(cache[routed], expected)
    assert cache[routed].abs().max() > 0


def test_negative_control_the_plain_layer_notices_a_wrong_rule() -> None:
    """Top-k before softmax, or a forgotten normalisation, is far outside the bounds used here."""
    case = wrapped("deepseek")
    theirs = wrapped("deepseek, normalised")
    plain = case.plain
    config: Any = plain.model.config
    config.norm_topk_prob = True
    try:
        assert deviation(plain(case.tokens), case.logits) > 1e-1
    finally:
        config.norm_topk_prob = False
    assert deviation(plain(case.tokens), case.logits) <= FP32 * case.logits.abs().max().item()
    assert theirs.model.family is case.model.family
    assert build("deepseek").config.norm_topk_prob is False
