"""Replaying and steering routing, against the plain re-implementation, on every family."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.interventions.rerouting import reselect
from moe_lens.routing import Routing
from tests.families import CONFIGS, tokens
from tests.interventions.by_hand import LAYERS, Notes, bound, rerouted
from tests.wrapped import deviation, untouched, wrapped

families = pytest.mark.parametrize("family", CONFIGS)
OTHER = tokens(seed=7)


def loop(indices: list[int], scores: list[float], wishes: list[int]) -> list[int]:
    """`reselect` for one token: who is in, who is out, who fills the free slots."""
    on = [e for e, wish in enumerate(wishes) if wish > 0]
    slots: list[Any] = [None if wishes[e] < 0 else e for e in indices if e >= 0]
    best = lambda experts: sorted(experts, key=lambda e: (-scores[e], e))  # noqa: E731
    for e in best(set(on) - set(slots)):
        if None not in slots:
            leaves = best(c for c in slots if c not in on)[-1]
            slots[slots.index(leaves)] = None
        slots[slots.index(None)] = e
    free = [e for e in range(len(scores)) if e not in slots and wishes[e] == 0 and scores[e] > -torch.inf]
    for e in best(free)[: slots.count(None)]:
        slots[slots.index(None)] = e
    return slots


@given(data=st.data())
def test_selecting_again_is_what_a_loop_makes_of_it(data: st.DataObject) -> None:
    n, k = 7, 3
    scores = data.draw(st.lists(st.sampled_from([-torch.inf, 0.0, 0.1, 0.2, 0.5, 0.9, 1.5]), min_size=n, max_size=n))
    indices = data.draw(st.permutations(range(n)))[:k]
    slots = data.draw(st.integers(1, k))
    indices[slots:] = [-1] * (k - slots)  # a token may have fewer experts than others
    wishes = data.draw(st.lists(st.sampled_from([-1, 0, 0, 0, 1]), min_size=n, max_size=n))
    while wishes.count(1) > slots:
        wishes[wishes.index(1)] = 0
    expected = loop(indices, scores, wishes)
    given_ = torch.tensor([[indices]]), torch.tensor([[scores]]), torch.tensor([[wishes]], dtype=torch.int8)
    if None in expected:
        with pytest.raises(
            InputError, match=re.escape(f"layer 4, token (batch 0, position 0): fewer than {slots} experts")
        ):
            reselect(4, *given_)
        return
    found = reselect(4, *given_)[0, 0].tolist()
    assert found[slots:] == [-1] * (k - slots)
    found, indices = found[:slots], indices[:slots]
    assert sorted(found) == sorted(expected)
    assert [e for e, was in zip(found, indices, strict=True) if was in expected] == [
        e for e in indices if e in expected
    ]


# --- replaying ---


@families
@pytest.mark.parametrize("what", ["both", "indices", "weights"])
def test_recorded_routing_is_replayed_on_another_input(family: str, what: Any) -> None:
    case = wrapped(family)
    routing = case.model.routing(OTHER)
    edits = {}
    if what != "weights":
        edits["hook_expert_indices"] = lambda layer, _: routing.layer(layer).indices
    if what != "indices":
        edits["hook_routing_weights"] = lambda layer, value: routing.layer(layer).weights.to(value)
    plain = case.plain(case.tokens, Notes(edits))
    with untouched(case.model), torch.no_grad(), case.model.force_routing(routing, what=what):
        ours = case.model(case.tokens)
    assert deviation(ours, plain) <= bound(plain, LAYERS)
    assert deviation(ours, case.logits) > 1e-2


@families
def test_a_run_s_own_routing_changes_nothing(family: str) -> None:
    case = wrapped(family)
    for what in ("both", "indices", "weights"):
        with torch.no_grad(), case.model.force_routing(case.model.routing(case.tokens), what=what):
            assert torch.equal(case.model(case.tokens), case.logits), what


def test_a_cache_is_routing_too_and_layers_restrict() -> None:
    case = wrapped("deepseek")
    with torch.no_grad():
        _, cache = case.model.run_with_cache(OTHER, names_filter=lambda name: "mlp" in name)
        routing = case.model.routing(OTHER)
        runs = []
        for recorded in (cache, routing):
            with case.model.force_routing(recorded, layers=[2]):
                runs.append(case.model(case.tokens))
        with case.model.force_routing(routing):
            everywhere = case.model(case.tokens)
    assert torch.equal(*runs)
    assert deviation(runs[0], everywhere) > 1e-3
    _, single = case.model.run_with_cache(OTHER[:1], names_filter=lambda n: "mlp" in n, remove_batch_dim=True)
    with torch.no_grad(), case.model.force_routing(single):
        one = case.model(case.tokens[:1])
    with torch.no_grad(), case.model.force_routing(case.model.routing(OTHER[:1])):
        assert torch.equal(case.model(case.tokens[:1]), one)


def test_replay_in_generation_ends_with_the_record() -> None:
    case = wrapped("deepseek")
    prompt = case.tokens[:1, :6]
    options: Any = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    options["output_logits"] = True
    free = case.model.generate(prompt, **options)
    with untouched(case.model):
        own = case.model.force_routing(case.model.routing(prompt))
        same = case.model.generate(prompt, interventions=[own], **options)
        other = case.model.force_routing(case.model.routing(OTHER[:1, :6]))
        out = case.model.generate(prompt, interventions=[other], **options)
    assert all(torch.equal(one, two) for one, two in zip(same.logits, free.logits, strict=True))
    assert all(deviation(one, two) > 1e-3 for one, two in zip(out.logits, free.logits, strict=True))


@pytest.mark.typed
def test_a_record_follows_its_tokens_whichever_side_padding_is_on() -> None:
    """Own routing changes nothing, and another text's does what it does to each text alone, where padding has moved."""
    case = wrapped("deepseek")
    texts, others = ([of[:1, :8], of[1:, :5]] for of in (case.tokens, OTHER))
    right, left = (torch.cat([texts[0], F.pad(texts[1], side)]) for side in ((0, 3), (3, 0)))
    mask = {"right": torch.ones(2, 8).long(), "left": torch.ones(2, 8).long()}
    mask["right"][1, 5:] = mask["left"][1, :3] = 0
    recorded = case.model.routing(
        torch.cat([others[0], F.pad(others[1], (0, 3), value=9)]), attention_mask=mask["right"]
    )
    options: Any = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    options["output_logits"] = True
    with untouched(case.model), torch.no_grad():
        with case.model.force_routing(recorded):
            runs = [
                case.model(given, attention_mask=mask[side])[mask[side].bool()]
                for given, side in ((right, "right"), (left, "left"))
            ]
        alone = []
        for text, other in zip(texts, others, strict=True):
            with case.model.force_routing(case.model.routing(other)):
                alone.append(case.model(text)[0])
        for found in runs:
            assert deviation(found, torch.cat(alone)) <= bound(found, LAYERS)
        plain = torch.cat([case.model(text)[0] for text in texts])
        assert deviation(runs[0], plain) > 1e-2
        own = case.model.force_routing(case.model.routing(right, attention_mask=mask["right"]))
        free, same = (
            case.model.generate(right, attention_mask=mask["right"], interventions=some, **options)
            for some in ([], [own])
        )
        for one, two in zip(free.logits, same.logits, strict=True):
            assert deviation(one, two) <= bound(two, LAYERS)
        with own, pytest.raises(InputError, match="of text 1, 5 tokens were recorded, and 8 of this input are no pad"):
            case.model(right)
        with (
            case.model.force_routing(case.model.routing(right)),
            case.model.use_experts(2),
            pytest.raises(InputError, match="the recorded routing has 3 experts a token; this pass 2"),
        ):
            case.model(right)


# --- steering ---


@families
def test_a_number_is_added_to_the_router_logit(family: str) -> None:
    case = wrapped(family)
    pushes = {layer: {2: 3.0, 5: -1.5} for layer in case.model.moe_layers[-2:]}

    def push(layer: int, logits: Tensor) -> Tensor:
        for expert, value in pushes.get(layer, {}).items():
            logits[..., expert] += value
        return logits

    plain = case.plain(case.tokens, Notes({"hook_router_logits": push}))
    with untouched(case.model), torch.no_grad(), case.model.steer_experts(pushes):
        ours = case.model(case.tokens)
    assert deviation(ours, plain) <= bound(plain, LAYERS)
    assert deviation(ours, case.logits) > 1e-2


@pytest.mark.parametrize(
    ("pushes", "rule"), [({2: 3.0}, "affinity"), ({2: "on", 5: -1.5}, "affinity"), ({2: "on", 6: "off"}, "steermoe")]
)
def test_gradients_pass_through_steering(pushes: Any, rule: Any) -> None:
    case = wrapped("deepseek", torch.float64)
    point = names.block(names.RESID_MID, case.last)

    def loss(extra: Tensor) -> Tensor:
        return case.model.run_with_hooks(case.tokens, fwd_hooks=[(point, lambda x, hook: x + extra)]).square().sum()

    with case.model.steer_experts({case.last: pushes}, rule=rule):
        extra = torch.zeros(case.model.cfg.d_model, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(extra), extra)
        with torch.no_grad():
            step = 1e-6 * slope / slope.norm()
            measured = (loss(step) - loss(-step)) / 2e-6
    (free,) = torch.autograd.grad(loss(extra), extra)
    # Central differences: losses of some 1e3, rounded by 1e-16 of that, over steps of 2e-6; 9e-9 of the slope is found.
    assert measured == pytest.approx(float(slope.norm()), rel=1e-7)
    assert abs(float(measured - free.norm())) > 1e-2 * float(free.norm())  # the control: without steering, 1 to 4 % off


@families
def test_experts_are_forced_in_and_out_with_their_own_affinity(family: str) -> None:
    case = wrapped(family)
    chosen = case.model.routing(case.tokens).layer(case.last).indices
    order = torch.bincount(chosen.flatten(), minlength=8).argsort(descending=True).tolist()
    often, rarely = order[0], order[-2:]
    made = case.model.steer_experts({case.last: {often: "off", rarely[0]: "on", rarely[1]: "on"}})
    name = names.mlp(names.EXPERT_INDICES, case.last)
    with untouched(case.model), torch.no_grad(), made:
        ours, cache = case.model.run_with_cache(case.tokens, names_filter=name)
    edit = rerouted(case, lambda at, b, p, _: ({often}, set(rarely)) if at == case.last else (set(), set()))
    plain = case.plain(case.tokens, edit)
    assert torch.equal(cache[name].sort(-1).values, case.plain.values[name].sort(-1).values)
    assert not (cache[name] == often).any()
    assert all((cache[name] == e).any(-1).all() for e in rarely)
    assert deviation(ours, plain) <= bound(plain, LAYERS)


@families
def test_steermoe_s_rule_rewrites_the_scores(family: str) -> None:
    """s = log softmax(z); s_on = max s + 0.01, s_off = min s − 0.01, and the router goes on with s."""
    case = wrapped(family)
    made = case.model.steer_experts({case.last: {1: "on", 6: "off"}}, rule="steermoe", where=slice(2, None))

    def rewrite(layer: int, logits: Tensor) -> Tensor:
        if layer != case.last:
            return logits
        scores = logits - logits.logsumexp(-1, keepdim=True)
        high, low = scores.max(-1).values, scores.min(-1).values
        scores[..., 1], scores[..., 6] = high + 0.01, low - 0.01
        return torch.cat([logits[:, :2], scores[:, 2:]], 1)

    plain = case.plain(case.tokens, Notes({"hook_router_logits": rewrite}))
    name = names.mlp(names.EXPERT_INDICES, case.last)
    with untouched(case.model), torch.no_grad(), made:
        ours, cache = case.model.run_with_cache(case.tokens, names_filter=name)
    assert deviation(ours, plain) <= bound(plain, LAYERS)
    if "groups" not in family and family != "deepseek_v3":
        assert (cache[name] == 1).any(-1)[:, 2:].all()
        assert not (cache[name] == 6)[:, 2:].any()
    with torch.no_grad(), case.model.steer_experts({case.last: {1: "on", 6: "off"}}, where=slice(2, None)):
        assert deviation(case.model(case.tokens), ours) > 1e-4, "the other rule keeps affinities"


def test_steering_what_is_so_already_changes_nothing() -> None:
    case = wrapped("deepseek")
    one = case.tokens[:1, :1]
    chosen = case.model.routing(one).layer(1).indices[0, 0].tolist()
    idle = next(e for e in range(8) if e not in chosen)
    with torch.no_grad():
        plain = case.model(one)
        with case.model.steer_experts({1: {chosen[1]: "on", idle: "off"}}):
            assert torch.equal(case.model(one), plain)


# --- bad input ---


@pytest.mark.parametrize(
    ("steering", "says"),
    [
        ({0: {1: "on"}}, "layer 0 is dense; the layers with experts are 1, 2"),
        ({1: {8: 1.0}}, "there is no expert 8 in layer 1; it has experts 0 to 7"),
        ({1: {2: "up"}}, "expert 2 of layer 1: got 'up'; expected a number, 'on' or 'off'"),
        ({1: {2: float("inf")}}, "expert 2 of layer 1: got inf"),
        ({1: {2: float("nan")}}, "expert 2 of layer 1: got nan"),
        ({1: {2: 1e40}}, "expert 2 of layer 1: got 1e+40"),
        ({1: {e: "on" for e in range(4)}}, "layer 1: 4 experts are on; a token has 3"),
        ({1: {e: "off" for e in range(6)}}, "layer 1: 2 experts are not off; a token needs 3"),
        ({}, "expected {layer: [expert, …]}"),
        ({1: [2]}, "steering is {1: [2]}; expected {layer: {expert: a number, 'on' or 'off'}}"),
        ([(1, 2)], "steering is [(1, 2)]; expected {layer: {expert: a number, 'on' or 'off'}}"),
    ],
)
@pytest.mark.untyped
def test_steering_that_cannot_be_is_refused(steering: Any, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        wrapped("deepseek").model.steer_experts(steering)


@pytest.mark.untyped
def test_other_rules_and_other_parts_are_refused() -> None:
    model: Any = wrapped("deepseek").model
    with pytest.raises(InputError, match=re.escape("rule is 'max'; expected one of ('affinity', 'steermoe')")):
        model.steer_experts({1: {1: "on"}}, rule="max")
    with pytest.raises(InputError, match="rule='steermoe' is about 'on' and 'off'"):
        model.steer_experts({1: {1: 0.5}}, rule="steermoe")
    with pytest.raises(InputError, match="what is 'logits'"):
        model.force_routing(model.routing(OTHER), what="logits")
    with pytest.raises(InputError, match="routing is a Tensor; expected what model.routing returns, or a cache"):
        model.force_routing(OTHER)
    _, cache = model.run_with_cache(OTHER, names_filter="hook_embed")
    with pytest.raises(InputError, match="the cache holds routing of no layer; cache hook_expert_indices and"):
        model.force_routing(cache)
    assert model.steer_experts({1: {1: np.float32(0.5)}}).hooks


@pytest.mark.typed
def test_routing_of_another_shape_model_or_layer_is_refused() -> None:
    case = wrapped("deepseek")
    routing = case.model.routing(OTHER)
    for wrong, says in (
        (case.tokens[:, :7], "(2, 12) [batch, pos]; the input has (2, 7)"),
        (case.tokens[:1], "(1, 12)"),
    ):
        with untouched(case.model), pytest.raises(InputError, match=re.escape(says)), case.model.force_routing(routing):
            case.model(wrong)
    with pytest.raises(InputError, match="layer 0 is dense"):
        case.model.force_routing(routing, layers=[0])
    with pytest.raises(InputError, match="there is no routing of layer 1"):
        case.model.force_routing(Routing.stack([routing.layer(2)]), layers=[1])
    more = Routing.from_arrays(torch.zeros(4, 1, 1).long(), torch.ones(4, 1, 1), 16, layers=[1])
    with pytest.raises(InputError, match="chooses 1 of 16 experts; the model chooses 3 of 8"):
        case.model.force_routing(more)
