"""Interventions as values: where they are in force, how they nest, and that nothing is left of them."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.interventions.expert_means import ExpertMeans
from tests.families import CONFIGS, build, tokens
from tests.interventions.by_hand import LAYERS, bound, slots_of, zeroed
from tests.wrapped import Case, deviation, untouched, wrapped

families = pytest.mark.parametrize("family", CONFIGS)
OPTIONS: Any = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}


class Halt(Exception):
    """Raised by hooks below."""


def every(case: Case) -> list[Any]:
    """One intervention of each kind."""
    model, layers = case.model, case.model.moe_layers[-2:]
    means = ExpertMeans.measure(model, tokens(6, 12, seed=9)).filled()
    made = [
        model.ablate({at: [0, 3] for at in layers}),
        model.ablate(ranks=[1], renormalize=True, where=slice(1, None)),
        model.ablate(ranks=[0], how="mean", reference=means),
        model.ablate(ranks=[0], layers=layers, how="resample", fallback="mean", reference=means),
        model.ablate([(at, 5) for at in layers], how="reroute", where=lambda ids: ids > 20),
        model.keep_top(1, renormalize=True),
        model.keep_top(2, by="random"),
        model.force_routing(model.routing(tokens(seed=7))),
        model.steer_experts({layers[-1]: {1: "on", 2: "off", 3: 0.5}}),
        model.steer_experts({layers[-1]: {1: "on"}}, rule="steermoe"),
    ]
    return made + ([model.ablate(shared=True)] if model.has_shared(layers[-1]) else [])


def test_hooks_without_a_batch_axis_change_nothing_about_interventions() -> None:
    case, seen = wrapped("deepseek"), []
    tokens_of_one = case.tokens[:1]
    point = names.mlp(names.EXPERT_OUT, case.last)
    own: Any = [(point, lambda value, hook: seen.append(value.dim()))]  # noqa: ARG005
    recorded = case.model.force_routing(case.model.routing(tokens_of_one))
    for made in [recorded, *(one for one in every(case) if one.label != recorded.label)]:
        found = [
            case.model.run_with_hooks(tokens_of_one, fwd_hooks=made.fwd_hooks + own, remove_batch_dim=without)
            for without in (False, True)
        ]
        assert torch.equal(*found), made
    assert set(seen[::2]) == {4} and set(seen[1::2]) == {3}  # the user's own is shown none


def test_one_value_acts_the_same_in_all_three_ways() -> None:
    case = wrapped("deepseek")
    for made in every(case):
        with untouched(case.model), torch.no_grad():
            with made as entered:
                assert entered is made
                inside = case.model(case.tokens)
            assert torch.equal(case.model.run_with_hooks(case.tokens, fwd_hooks=made.fwd_hooks), inside), made
            with case.model.hooks(made.fwd_hooks):
                assert torch.equal(case.model(case.tokens), inside)
            assert torch.equal(case.model(case.tokens), case.logits)
        assert deviation(inside, case.logits) > 1e-4, made
        assert repr(made).startswith("Intervention(")


def test_generation_with_interventions_is_generation_inside_them() -> None:
    case = wrapped("deepseek")
    one, two = case.model.keep_top(1), case.model.ablate(shared=True)
    prompt = case.tokens[:1, :5]
    with untouched(case.model):
        free = case.model.generate(prompt, **OPTIONS)
        given_ = case.model.generate(prompt, interventions=[one, two], **OPTIONS)
        with one, two:
            assert torch.equal(case.model.generate(prompt, **OPTIONS), given_)
        assert not torch.equal(given_, free)
        assert torch.equal(case.model.generate(prompt, **OPTIONS), free)


@families
def test_generation_works_inside_every_kind(family: str) -> None:
    """A step of one token: nothing to resample from but the mean."""
    case = wrapped(family)
    prompt = case.tokens[:, :6]
    for made in every(case):
        if "force_routing" in made.label:
            made = case.model.force_routing(case.model.routing(prompt))
        with untouched(case.model):
            out = case.model.generate(prompt, interventions=[made], **OPTIONS)
        assert out.shape == (2, 9)


def test_cached_and_uncached_generation_agree_inside_an_intervention() -> None:
    case = wrapped("deepseek")
    prompt = case.tokens[:2, :5]
    some = torch.ones(2, 5, dtype=torch.bool)
    some[0, 1] = False
    kinds = (
        case.model.keep_top(1),
        case.model.ablate(ranks=[0], how="reroute"),
        case.model.ablate(shared=True),
        case.model.ablate(ranks=[0], where=some),
        case.model.force_routing(case.model.routing(case.tokens[:2, 5:10])),
    )
    options: Any = {**OPTIONS, "output_logits": True}
    free = case.model.generate(prompt, **options).logits
    for made in kinds:
        cached, whole = (
            case.model.generate(prompt, interventions=[made], use_past_kv_cache=use, **options).logits
            for use in (True, False)
        )
        for mine, theirs, plain in zip(whole, cached, free, strict=True):
            assert deviation(mine, theirs) <= bound(theirs, LAYERS), made
            assert deviation(mine, plain) > 1e-3
    with kinds[-1], pytest.raises(InputError, match=r"routing has \(2, 5\) \[batch, pos\]; the input has \(2, 4\)"):
        case.model.generate(prompt[:, :4], use_past_kv_cache=False, **OPTIONS)
    with kinds[-1], pytest.raises(InputError, match=r"routing has \(2, 5\) \[batch, pos\]; the input has \(2, 6\)"):
        case.model(case.tokens[:2, :6])


# --- nesting ---


def test_the_outer_one_acts_first_at_a_hook_point() -> None:
    """Rescaling after an ablation is not an ablation after rescaling."""
    case = wrapped("deepseek")
    indices = case.model.routing(case.tokens).layer(2).indices
    ablated, kept = case.model.ablate({2: [3]}), case.model.keep_top(2, layers=[2], renormalize=True)
    name = names.mlp(names.ROUTING_WEIGHTS, 2)
    with torch.no_grad():
        _, before = case.model.run_with_cache(case.tokens, names_filter=name)
        found = {}
        for order in ((ablated, kept), (kept, ablated)):
            with untouched(case.model), order[0], order[1]:
                _, cache = case.model.run_with_cache(case.tokens, names_filter=name)
            found[order[0]] = cache[name]
    weights, gone = before[name], indices == 3
    low = torch.arange(3) >= 2
    first = weights.masked_fill(gone, 0)
    dropped = first < first.topk(2).values[..., -1:]
    scale = first.sum(-1, keepdim=True) / first.masked_fill(dropped, 0).sum(-1, keepdim=True)
    assert torch.allclose(found[ablated], (first * scale).masked_fill(dropped, 0), atol=1e-7)
    scale = weights.sum(-1, keepdim=True) / weights.masked_fill(low, 0).sum(-1, keepdim=True)
    assert torch.allclose(found[kept], (weights * scale).masked_fill(low | gone, 0), atol=1e-7)
    assert deviation(found[ablated], found[kept]) > 1e-3


@families
def test_ablations_add_up(family: str) -> None:
    case = wrapped(family)
    one, two = {case.last: [0, 4]}, {case.last: [5], case.model.moe_layers[0]: [1]}
    with untouched(case.model), torch.no_grad():
        with case.model.ablate(one), case.model.ablate(two):
            nested = case.model(case.tokens)
        with case.model.ablate({case.last: [0, 4, 5], case.model.moe_layers[0]: [1]}):
            assert torch.equal(case.model(case.tokens), nested)
    plain = case.plain(case.tokens, zeroed(slots_of({case.last: [0, 4, 5], case.model.moe_layers[0]: [1]})))
    assert deviation(nested, plain) <= bound(plain, LAYERS)


@families
@settings(max_examples=4)
@given(data=st.data())
def test_wishes_about_the_selection_add_up_whoever_has_them(family: str, data: st.DataObject) -> None:
    """What one forbids, another does not bring back."""
    case = wrapped(family)
    order = data.draw(st.permutations([0, 1, 2, 3]))
    made = [
        case.model.ablate({case.last: [0]}, how="reroute"),
        case.model.ablate({case.last: [5]}, how="reroute"),
        case.model.steer_experts({case.last: {2: "on"}}),
        case.model.steer_experts({case.last: {7: "off"}}),
    ]
    if "groups" in family or family == "deepseek_v3":  # of four experts in two groups, three have to remain
        made[1] = made[3] = made[0]
    name = names.mlp(names.EXPERT_INDICES, case.last)
    first, *rest = (made[i] for i in order)
    with untouched(case.model), torch.no_grad(), first, rest[0], rest[1], rest[2]:
        _, cache = case.model.run_with_cache(case.tokens, names_filter=name)
    whole = case.model.steer_experts({case.last: {0: "off", 5: "off", 7: "off", 2: "on"}})
    if made[1] is made[0]:
        whole = case.model.steer_experts({case.last: {0: "off", 2: "on"}})
    with torch.no_grad(), whole:
        _, once = case.model.run_with_cache(case.tokens, names_filter=name)
    assert torch.equal(cache[name].sort(-1).values, once[name].sort(-1).values)


def test_a_later_wish_outweighs_an_earlier_one() -> None:
    case = wrapped("deepseek")
    on, off = case.model.steer_experts({2: {4: "on"}}), case.model.ablate({2: [4]}, how="reroute")
    name = names.mlp(names.EXPERT_INDICES, 2)
    with torch.no_grad():
        with on, off:
            _, cache = case.model.run_with_cache(case.tokens, names_filter=name)
        assert not (cache[name] == 4).any()
        with off, on:
            _, cache = case.model.run_with_cache(case.tokens, names_filter=name)
        assert (cache[name] == 4).any(-1).all()


def test_an_ablation_inside_forced_routing_sees_the_forced_experts() -> None:
    case = wrapped("deepseek")
    routing = case.model.routing(tokens(seed=7))
    name, weighted = names.mlp(names.EXPERT_INDICES, 2), names.mlp(names.EXPERT_WEIGHTED, 2)
    forced = routing.layer(2).indices
    expert = int(forced.flatten().mode().values)
    for how in ("zero", "reroute"):
        with (
            torch.no_grad(),
            case.model.force_routing(routing, what="indices"),
            case.model.ablate({2: [expert]}, how=how),
        ):
            _, cache = case.model.run_with_cache(case.tokens, names_filter=[name, weighted])
        if how == "zero":
            assert torch.equal(cache[name], forced)
            assert (cache[weighted][forced == expert] == 0).all()
        else:
            assert not (cache[name] == expert).any()
            assert torch.equal(cache[name][forced != expert], forced[forced != expert])


def test_its_repr_says_what_it_does_and_where() -> None:
    model = wrapped("deepseek").model

    def special(ids: torch.Tensor) -> torch.Tensor:
        return ids > 20

    shown = {
        model.ablate({2: [4]}, where=[3, 0], renormalize=True): "ablate experts {2: [4]} at [0, 3], zero, renormalised",
        model.ablate(ranks=[0], layers=[1], how="resample", seed=3): "ablate ranks [0] of layers [1], resample, seed 3",
        model.ablate(shared=True, where=slice(2, None)): "ablate shared at slice(2, None, None), zero",
        model.ablate(where=torch.ones(2, 12).bool()): "ablate all ranks where a mask [2, 12] is true, zero",
        model.keep_top(1, layers=[2], by="random"): "keep_top 1 of all ranks of layers [2], by random, seed 0",
        model.steer_experts({1: {2: "on"}}, where=special): "steer_experts {1: {2: 'on'}} where special, affinity",
    }  # fmt: skip
    assert [repr(one) for one in shown] == [f"Intervention({says})" for says in shown.values()]


def test_entered_twice_it_acts_twice() -> None:
    case = wrapped("deepseek")
    push, twice = case.model.steer_experts({2: {3: 0.7}}), case.model.steer_experts({2: {3: 1.4}})
    with untouched(case.model), torch.no_grad():
        with push:
            once = case.model(case.tokens)
            with push:
                both = case.model(case.tokens)
            assert torch.equal(case.model(case.tokens), once)
        with twice:
            expected = case.model(case.tokens)
    assert deviation(both, expected) <= bound(expected)
    assert deviation(once, expected) > 1e-3


# --- nothing is left ---


@families
@settings(max_examples=6)
@given(data=st.data())
def test_no_hook_is_left_however_an_intervention_ends(family: str, data: st.DataObject) -> None:
    """Something raises at any hook point, those of single experts among them, in any nesting, on any way in."""
    case = wrapped(family)
    made = data.draw(st.lists(st.sampled_from(every(case)), min_size=1, max_size=3))
    experts = [names.expert(hook.name, at, 3) for at in case.model.moe_layers for hook in names.EXPERT_HOOKS]
    name = data.draw(st.sampled_from([*sorted(case.fire), *experts]))
    error = data.draw(st.sampled_from([Halt, KeyboardInterrupt, torch.cuda.OutOfMemoryError]))
    how = data.draw(st.sampled_from(["with", "fwd_hooks", "generate"]))

    def halt(value: Any, hook: Any) -> None:
        raise error("now")

    with untouched(case.model), torch.no_grad():
        try:
            if how == "fwd_hooks":
                hooks: list[Any] = [hook for one in made for hook in one.fwd_hooks]
                case.model.run_with_hooks(case.tokens, fwd_hooks=[*hooks, (name, halt)])
            elif how == "generate":
                with case.model.hooks([(name, halt)]):
                    case.model.generate(case.tokens, interventions=made, **OPTIONS)
            else:
                with made[0], made[-1], case.model.hooks([(name, halt)]):
                    case.model(case.tokens)
        except (error, InputError):
            pass
        else:
            assert name in experts, "an expert that nobody uses may not fire"
        assert torch.equal(case.model(case.tokens), case.logits)
        assert all(hooks._routing is None and hooks._slots is None for _, hooks in case.model._layer_hooks())
        assert case.model.current_tokens() is None


@pytest.mark.typed
def test_what_is_refused_while_running_leaves_nothing_either() -> None:
    case = wrapped("deepseek")
    bad = case.model.ablate(ranks=[0], where=lambda ids: ids)
    with untouched(case.model):
        for _ in range(2):
            with pytest.raises(InputError, match="where returned"), case.model.keep_top(1), bad:
                case.model(case.tokens)
        with pytest.raises(InputError, match="where returned"):
            case.model.generate(case.tokens, interventions=[case.model.keep_top(1), bad], **OPTIONS)


@pytest.mark.typed
def test_a_value_is_its_own_copy() -> None:
    made = wrapped("deepseek").model.keep_top(1)
    assert copy.copy(made) is made and copy.deepcopy(made) is made


def test_a_value_pickles_without_its_model_and_is_bound_to_another() -> None:
    case, other = wrapped("deepseek"), HookedMoE.from_hf(build("deepseek"), check=False)
    for made in every(case):
        assert copy.deepcopy(made) is made
        if "where" in repr(made) and "lambda" in repr(made):
            with pytest.raises((pickle.PicklingError, AttributeError)):
                pickle.dumps(made)  # a function without a name is no value
            continue
        data = pickle.dumps(made)
        assert b"HookedMoE" not in data, "no model in it"
        came = pickle.loads(data)
        assert repr(came) == repr(made)
        for use in (came.__enter__, lambda came=came: came.fwd_hooks):
            with pytest.raises(InputError, match=r"was unpickled and has no model yet: use intervention.bind\(model\)"):
                use()
        with torch.no_grad(), made:
            expected = case.model(case.tokens)
        with untouched(other), torch.no_grad(), came.bind(other):
            assert torch.equal(other(case.tokens), expected), made
        assert deviation(expected, case.logits) > 1e-4, "negative control: it does something"


def test_what_another_model_lacks_is_named_when_it_is_bound() -> None:
    deepseek, olmoe = wrapped("deepseek").model, wrapped("olmoe").model
    assert deepseek.ablate({2: [0]}).bind(olmoe).model is olmoe
    with pytest.raises(InputError, match="layer 0 is dense"):
        olmoe.ablate({0: [1]}).bind(deepseek)


@pytest.mark.untyped
def test_interventions_are_interventions_on_this_model() -> None:
    case = wrapped("deepseek")
    other = HookedMoE.from_hf(build("deepseek"), check=False)
    bad: Any
    for bad, says in (
        ([other.keep_top(1)], "made for another model"),
        (["keep_top"], "expected an Intervention in it, not 'keep_top'"),
        (
            case.model.keep_top(1),
            "interventions is Intervention(keep_top 1, by weight); expected several: put a single",
        ),
    ):
        with untouched(case.model), pytest.raises(InputError, match=re.escape(says)):
            case.model.generate(case.tokens, interventions=bad, **OPTIONS)
