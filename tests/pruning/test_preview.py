import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from moe_lens import HookedMoE, names
from moe_lens.errors import InputError, MoELensError, UnfitError, UnsupportedModelError
from moe_lens.interventions import CleanRun, Loss, coalitions
from moe_lens.interventions.coalitions import added_losses
from moe_lens.interventions.selection_bias import selection_bias
from moe_lens.model.families.table import FAMILIES, here
from moe_lens.pruning import plan, score
from moe_lens.pruning import preview as preview_module
from moe_lens.pruning.merging import grouped
from moe_lens.pruning.preview import side_by_side
from moe_lens.pruning.weight_matching import averaged, matching, members, views
from tests.families import CONFIGS, build, tokens
from tests.matrix import configs
from tests.pruning import smaller
from tests.pruning.smaller import by_hand, make_plan, whole
from tests.pruning.test_scores import texts

STAY = {0: (0, 1, 2, 5, 6, 7), 1: (0, 2, 3, 4, 5, 7), 2: (1, 2, 3, 4, 6, 7)}


def hooked_and_plan(name, top_k=3):
    hooked = HookedMoE.from_hf(whole(name), check=False)
    return hooked, make_plan(hooked, {layer: STAY[layer] for layer in hooked.moe_layers}, top_k)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_preview_is_the_smaller_model(name, top_k):
    """Against a plain transformers model with slices of the parameters: ≤ 1e-5 of logits of the order of 10."""
    hooked, plan = hooked_and_plan(name, top_k)
    with torch.no_grad():
        before, expected = (
            hooked(tokens()),
            by_hand(name, dict(zip(plan.layers, plan.kept, strict=True)), top_k)(tokens()).logits,
        )
        with plan.preview(hooked):
            found = hooked(tokens())
        after = hooked(tokens())
    assert (found - expected).abs().max() <= 1e-5
    assert (before - expected).abs().max() > 0.01
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["deepseek", "gpt_oss", "deepseek_v3"])
def test_experts_that_are_gone_cost_what_the_preview_costs(name):
    """The fast way of studies, many plans side by side, against one plan at a time; a bias brings none back."""
    hooked, plan = hooked_and_plan(name)
    if name == "deepseek_v3":
        hooked._moe(1).gate.e_score_correction_bias.data[1] = 100.0  # expert 1 of layer 1 goes
    gone = torch.ones(2, len(hooked.moe_layers), hooked.n_experts, dtype=torch.bool)
    gone[1] = False
    for row, kept in enumerate(plan.kept):
        gone[0, row, list(kept)] = False
    metric, run = Loss(tokens()), CleanRun.of(hooked, tokens())
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(len(tokens())))
    added = added_losses(hooked, run, metric, gone, pairs, "prune").view(2, -1)

    def nats() -> torch.Tensor:
        found = torch.nn.functional.cross_entropy(hooked(tokens())[:, :-1].mT, tokens()[:, 1:], reduction="none")
        return found.double().sum(1)

    with torch.no_grad():
        whole = nats()
        with plan.preview(hooked):
            expected = nats() - whole
    assert torch.allclose(added[0], expected, atol=1e-4, rtol=0) and bool(expected.abs().min() > 0.01)
    assert torch.equal(added[1], torch.zeros_like(added[1]))


GROUPED = {"deepseek_v2, groups": {"n_group": 2, "topk_group": 1}, "deepseek_v3": {"n_group": 2, "topk_group": 1}}


@pytest.mark.typed
@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_chosen_as_if_what_is_gone_had_never_been(name, monkeypatch):
    """Coalitions and previews against plain models with slices of parameters and biases: ≤ 1e-4 nats of a text."""
    monkeypatch.setitem(smaller.CHANGES, name, GROUPED[name])
    hooked, plan = hooked_and_plan(name)
    plain = by_hand(name, dict(zip(plan.layers, plan.kept, strict=True)), 3)
    for layer, kept in zip(plan.layers, plan.kept, strict=True):
        bias = selection_bias(hooked, layer)
        if bias is not None:
            bias.data = 2 * torch.rand(8, generator=torch.Generator().manual_seed(layer))
            bias.data[list(plan.pruned(layer))[0]] += 2  # its group would be chosen for it
            plain.model.layers[layer].mlp.gate.e_score_correction_bias.data = bias.data[list(kept)]
    run, x = CleanRun.of(hooked, tokens()), tokens()
    gone = torch.ones(2, len(plan.layers), 8, dtype=torch.bool)
    gone[0] = False
    for row, kept in enumerate(plan.kept):
        gone[1, row, list(kept)] = False
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(len(x)))

    def nats(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1].mT, x[:, 1:], reduction="none").double().sum(1)

    def added():
        return added_losses(hooked, run, Loss(x), gone, pairs, "prune").view(2, -1)

    with torch.no_grad():
        expected, whole = nats(plain(x).logits), nats(hooked(x))
        with plan.preview(hooked):
            assert torch.allclose(nats(hooked(x)), expected, atol=1e-4, rtol=0)
        assert torch.allclose(added()[1], expected - whole, atol=1e-4, rtol=0)
        assert torch.equal(added()[0], torch.zeros(len(x)).double()) and bool((expected - whole).abs().min() > 0.01)
        assert torch.equal(nats(hooked(x)), whole), "biases are as they were"
        monkeypatch.setattr(coalitions, "no_bias", lambda model, gone: nullcontext())
        assert torch.allclose(added()[1], expected - whole, atol=1e-4, rtol=0) == (name != "deepseek_v3")


@pytest.mark.typed
@pytest.mark.parametrize(
    ("name", "groups", "stay", "top_k", "left"),
    [
        ("deepseek_v2, groups", (4, 2), (0, 2, 4, 6), 3, "[1, 1, 1, 1]"),  # a token would find two
        ("deepseek_v2, groups", (4, 2), (0, 1, 2, 4, 6), 3, "[2, 1, 1, 1]"),  # some tokens would
        ("deepseek_v2, groups", (4, 2), (0, 1, 2, 4, 5), 3, None),
        ("deepseek_v2, groups", (4, 2), (0, 1), 2, "[2, 0, 0, 0]"),
        ("deepseek_v3", (4, 2), (0, 1, 2, 4, 5), 3, "[2, 1, 2, 0]"),  # ranked by two: expert 2 would be lost
        ("deepseek_v3", (4, 2), (0, 1, 4, 5), 3, None),
        ("deepseek_v3", (1, 1), (3,), 1, "[1]"),  # transformers' router fails
        ("deepseek_v3", (1, 1), (3, 6), 1, None),
    ],
)
def test_groups_with_too_few_left_are_refused_before_the_work(name, groups, stay, top_k, left, monkeypatch):
    monkeypatch.setitem(smaller.CHANGES, name, {"n_group": groups[0], "topk_group": groups[1]})
    hooked = HookedMoE.from_hf(whole(name), check=False)
    plan = make_plan(hooked, {1: tuple(range(8)), 2: stay}, top_k)
    gone = torch.ones(1, 2, 8, dtype=torch.bool)
    gone[0, 0], gone[0, 1, list(stay)] = False, False
    said = "" if left is None else f"layer 2 would keep {re.escape(left)} experts in the {groups[0]} groups"
    with pytest.raises(UnfitError, match=said) if left else nullcontext(), torch.no_grad(), plan.preview(hooked):
        routing = hooked.routing(tokens())
        assert not torch.isin(routing.layer(2).indices[..., :top_k], torch.tensor(plan.pruned(2))).any()
    with pytest.raises(UnfitError, match=said) if left else nullcontext():
        side_by_side([None, plan], hooked)
    if top_k == hooked.top_k:
        run, pairs = CleanRun.of(hooked, tokens()), torch.tensor([[0, 0]])
        with pytest.raises(UnfitError, match=said) if left else nullcontext():
            added_losses(hooked, run, Loss(tokens()), gone, pairs, "prune")


def test_layers_with_fewer_active_experts_keep_the_first():
    hooked, _ = hooked_and_plan("olmoe")
    layer = 1
    scores = score(hooked, [texts()], "frequency")
    with torch.no_grad(), plan(scores, top_k={layer: 1}).preview(hooked):
        found = hooked(tokens())
    with torch.no_grad():
        expected = hooked.run_with_hooks(tokens(), fwd_hooks=hooked.keep_top(1, layers=[layer]).fwd_hooks)
        whole = hooked(tokens())
    assert torch.equal(found, expected) and not torch.equal(found, whole)


def test_a_selection_bias_cannot_bring_a_pruned_expert_back():
    hooked, plan = hooked_and_plan("deepseek_v3")
    router = hooked._moe(1).gate
    router.e_score_correction_bias.data[1] = 100.0  # expert 1 of layer 1 goes
    before = router.e_score_correction_bias.clone()
    assert bool((hooked.routing(tokens()).layer(1).indices == 1).any(-1).all())
    with plan.preview(hooked):
        assert not bool((hooked.routing(tokens()).layer(1).indices == 1).any())
    assert torch.equal(router.e_score_correction_bias, before)


KEPT = (0, 1, 2, 4, 5, 7)
COUNTED = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def sliced(model_type):
    """The plain model of the matrix that has the rows of the kept experts alone."""
    fewer: dict[str, Any] = dict.fromkeys(named(model_type), len(KEPT))
    big, small = configs.build(model_type), configs.build(model_type, **fewer)
    for (name, target), (other, value) in zip(every(small), every(big), strict=True):
        assert name == other
        cut = [axis for axis, (a, b) in enumerate(zip(target.shape, value.shape, strict=True)) if a != b]
        target.data.copy_(value.index_select(cut[0], torch.tensor(KEPT)) if cut else value)
    return small


def named(model_type):
    return [name for name in COUNTED if hasattr(configs.config(model_type), name)]


def every(model):
    return [*model.named_parameters(), *model.named_buffers()]


@pytest.mark.parametrize("model_type", ["afmoe", "ernie4_5_moe", "hy_v3", "lfm2_moe", "minimax_m2"])
def test_no_bias_for_the_choice_brings_a_pruned_expert_back_wherever_it_lies(model_type, monkeypatch):
    """Against slices of the parameters: ≤ 2e-5 of the largest logit. Without forbidding, pruned experts come."""
    hooked, expected = HookedMoE.from_hf(configs.build(model_type), check=False), sliced(model_type)
    assert not hasattr(getattr(hooked._moe(hooked.moe_layers[0]), hooked.family.router), "e_score_correction_bias")
    gone = torch.tensor([3, 6])
    for name, value in every(hooked.original_model):
        if "bias" in name and value.shape[-1] == hooked.n_experts:
            value.data[..., gone] += 50
    plan = make_plan(hooked, dict.fromkeys(hooked.moe_layers, KEPT), hooked.top_k)
    x = configs.tokens()
    with torch.no_grad():
        wanted = expected(x).logits
        with plan.preview(hooked):
            found, routing = hooked(x), hooked.routing(x)
            with hooked.ablate({hooked.moe_layers[-1]: [0]}, how="reroute"):
                again = hooked.routing(x)
        whole = hooked(x)
        monkeypatch.setattr(preview_module, "reselect", lambda layer, indices, scores, wishes: indices)
        with plan.preview(hooked):
            broken = hooked.routing(x)
    assert not torch.isin(routing.indices, gone).any() and not torch.isin(again.indices, gone).any()
    assert torch.isin(broken.indices, gone).any()
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    assert (whole - wanted).abs().max() > 0.01


def test_pruned_coalitions_are_previews_where_a_bias_ranks_all_experts():
    """LongCat's router, which chooses among no groups, takes no bias of each token's own."""
    hooked = HookedMoE.from_hf(configs.build("longcat_flash"), check=False)
    layer = hooked.moe_layers[-1]
    hooked._moe(layer).router.e_score_correction_bias.data[2] = 100.0
    x, gone = configs.tokens(1, 9), torch.zeros(2, len(hooked.moe_layers), hooked.n_experts, dtype=torch.bool)
    gone[0, -1, 2], gone[1, -1, 0] = True, True
    run = CleanRun.of(hooked, x)
    added = added_losses(hooked, run, Loss(x), gone, torch.tensor([[0, 0], [1, 0]]), "prune")
    everyone = tuple(range(hooked.n_experts))
    with torch.no_grad():
        clean = hooked(x, return_type="loss")
        for found, out in zip(added, (2, 0), strict=True):
            stay = dict.fromkeys(hooked.moe_layers, everyone) | {layer: tuple(e for e in everyone if e != out)}
            with make_plan(hooked, stay, hooked.top_k).preview(hooked):
                assert not (hooked.routing(x).layer(layer).indices == out).any()
                expected = float((hooked(x, return_type="loss") - clean) * (x.shape[1] - 1))
            assert float(found) == pytest.approx(expected, abs=1e-4)
    assert abs(float(added[0])) > 1e-2


def test_families_that_choose_among_groups_hold_their_bias_where_a_preview_looks_for_it():
    """It decides on the groups, before experts can be forbidden one by one."""
    for name, family in FAMILIES.items():
        if family.bias and family.groups and name in here() and name not in configs.TEXT:
            hooked = HookedMoE.from_hf(configs.build(name), check=False)
            router = getattr(hooked._moe(hooked.moe_layers[0]), hooked.family.router)
            assert hasattr(router, "e_score_correction_bias"), name


def test_experts_that_a_table_gives_to_tokens_cannot_be_pruned():
    hooked = HookedMoE.from_hf(configs.build("deepseek_v4"), check=False)
    everyone = tuple(range(hooked.n_experts))
    by_token = make_plan(hooked, {**dict.fromkeys(hooked.moe_layers, everyone), 1: KEPT}, hooked.top_k)
    with pytest.raises(UnsupportedModelError, match="layer 1 .* by the token's id"), by_token.preview(hooked):
        pass
    plan = make_plan(hooked, {0: everyone, 1: everyone, 2: KEPT, 3: KEPT}, hooked.top_k)
    with plan.preview(hooked):
        indices = hooked.routing(configs.tokens()).indices
    assert (
        not torch.isin(indices[2:], torch.tensor([3, 6])).any() and torch.isin(indices[:2], torch.tensor([3, 6])).any()
    )


def test_an_error_inside_restores_everything():
    hooked, plan = hooked_and_plan("deepseek_v3")
    merged = grouped(plan, torch.eye(8).expand(len(plan.layers), 8, 8).double(), torch.ones(len(plan.layers), 8))
    state = {name: value.clone() for name, value in hooked.original_model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), merged.preview(hooked):
        changed = [n for n, value in hooked.original_model.state_dict().items() if not torch.equal(value, state[n])]
        assert any("experts" in name for name in changed) and any("bias" in name for name in changed)
        raise KeyboardInterrupt
    assert all(torch.equal(value, state[name]) for name, value in hooked.original_model.state_dict().items())
    assert not any(point.has_hooks() for point in hooked.hook_dict.values())


def test_a_plan_of_another_model_is_refused():
    _, plan = hooked_and_plan("olmoe")
    other = HookedMoE.from_hf(build("mixtral"), check=False)
    with (
        pytest.raises(
            InputError, match="is for a model with other router weights than this one; .*'olmoe.*' and 'mixtral"
        ),
        plan.preview(other),
    ):
        pass


def test_pruned_experts_have_no_affinity_in_a_preview():
    hooked, plan = hooked_and_plan("olmoe")
    with plan.preview(hooked):
        _, cache = hooked.run_with_cache(
            tokens(),
            names_filter=lambda name: name.endswith((names.ROUTER_LOGITS, names.EXPERT_INDICES, names.ROUTING_WEIGHTS)),
        )
    probs = cache.routing(1).probs
    assert float(probs[..., list(plan.pruned(1))].max()) == 0
    assert torch.allclose(probs.sum(-1), torch.ones(()))


# --- merging ---


def permuted(matrices, order):
    return {name: value[order] for name, value in matrices.items()}


def test_neurons_are_matched_and_a_permuted_copy_averages_to_itself():
    torch.manual_seed(0)
    expert = {name: torch.randn(16, 32, dtype=torch.float64) for name in ("W_in", "W_gate", "W_out")}
    order = torch.randperm(16)
    copy = permuted(expert, order)
    assert torch.equal(order[matching(expert, copy)], torch.arange(16))
    merged = averaged([expert, copy], torch.tensor([3.0, 1.0]))
    assert all(torch.allclose(merged[name], expert[name], atol=1e-14) for name in expert)
    naive = {name: 0.75 * expert[name] + 0.25 * copy[name] for name in expert}
    assert not torch.allclose(naive["W_in"], expert["W_in"], atol=0.1)


def test_averages_weigh_by_share_and_never_chosen_experts_count_alike():
    a, b = ({"W_in": torch.full((1, 2), value)} for value in (1.0, 3.0))
    assert averaged([a, b], torch.tensor([1.0, 3.0]))["W_in"].tolist() == [[2.5, 2.5]]
    assert averaged([a, b], torch.tensor([0.0, 0.0]))["W_in"].tolist() == [[2.0, 2.0]]


def test_groups_follow_the_cosine_of_router_logits():
    _, plan = hooked_and_plan("olmoe")
    logits = torch.randn(50, 8, dtype=torch.float64)
    logits[:, 3] = 2 * logits[:, 0]  # expert 3 of layer 0 goes; expert 0 stays
    logits[:, 4] = -logits[:, 1] + 3 * logits[:, 6]
    products = (logits.T @ logits).expand(3, 8, 8)
    merged = grouped(plan, products, torch.arange(8.0).expand(3, 8))
    assert merged.merged is not None and merged.merged[0, 3] == 0 and merged.merged[0, 4] == 6
    assert members(merged, 0, 0) == (0, 3) and members(merged, 0, 1) == (1,)
    assert set(merged.merged) == {(layer, e) for layer in plan.layers for e in plan.pruned(layer)}


@pytest.mark.typed
@pytest.mark.parametrize("name", ["deepseek", "mixtral", "qwen2_moe"])
def test_merged_experts_are_the_same_in_preview_and_checkpoint(name, tmp_path):
    from transformers import AutoModelForCausalLM

    from moe_lens.pruning import export

    hooked, plan = hooked_and_plan(name)
    torch.manual_seed(0)
    products = torch.randn(len(plan.layers), 40, 8, dtype=torch.float64)
    merged = grouped(plan, products.mT @ products, torch.rand(len(plan.layers), 8))
    layer = plan.layers[0]
    leader = next(iter((merged.merged or {}).values()))
    before = views(hooked, layer, leader)["W_out"].clone()
    with torch.no_grad(), merged.preview(hooked):
        expected = hooked(tokens())
        assert not torch.equal(views(hooked, layer, leader)["W_out"], before)
    folder = export(hooked, merged, tmp_path / "out")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(tokens()).logits
        with plan.preview(hooked):
            dropped = hooked(tokens())
    assert (found - expected).abs().max() <= 1e-5
    assert (found - dropped).abs().max() > 0.001


@pytest.mark.parametrize("name", ["deepseek", "deepseek_v3", "gpt_oss"])
def test_what_is_pruned_is_not_selected_by_an_intervention_inside(name):
    """Three experts of a token; six stay of eight."""
    hooked, plan = hooked_and_plan(name)
    layer = hooked.moe_layers[0]
    stay, gone = plan.of(layer), plan.pruned(layer)
    with torch.no_grad(), plan.preview(hooked):
        with hooked.ablate({layer: stay[:3]}, how="reroute"):
            assert set(hooked.routing(tokens()).layer(layer).indices.unique().tolist()) == set(stay[3:])
        for made, says in (
            (hooked.ablate({layer: stay[:4]}, how="reroute"), "fewer than 3 experts are left"),
            (hooked.steer_experts({layer: {gone[0]: "on"}}), f"expert {gone[0]} is forced in"),
        ):
            with pytest.raises(UnfitError, match=says), made:
                hooked(tokens())


INSIDE = {
    "keep_top last": lambda model, new: model.keep_top(1, by="last"),  # noqa: ARG005
    "keep_top random": lambda model, new: model.keep_top(1, by="random", seed=2),  # noqa: ARG005
    "reroute": lambda model, new: model.ablate({2: [new(1)]}, how="reroute"),
    "reroute the first": lambda model, new: model.ablate(ranks=[0], how="reroute"),  # noqa: ARG005
    "on": lambda model, new: model.steer_experts({2: {new(2): "on"}}),
    "steermoe": lambda model, new: model.steer_experts({2: {new(2): "off", new(4): "on"}}, rule="steermoe"),
    "use_experts": lambda model, new: model.use_experts(4),  # noqa: ARG005
    "mass": lambda model, new: model.use_experts(mass=0.6),  # noqa: ARG005
    "none": lambda model, new: nullcontext(),  # noqa: ARG005
}


@pytest.mark.parametrize(("name", "top_k"), [("deepseek", 1), ("gpt_oss", 2)])
def test_interventions_inside_a_preview_are_those_of_the_smaller_model(name, top_k):
    """Ids mapped, of a token fewer experts than before: ≤ 2e-5 of logits of the order of 10."""
    hooked, plan = hooked_and_plan(name, top_k)
    small = HookedMoE.from_hf(by_hand(name, dict(zip(plan.layers, plan.kept, strict=True)), top_k), check=False)
    found, expected = {}, {}
    with torch.no_grad():
        for label, make in INSIDE.items():
            with make(small, int):
                expected[label] = small(tokens())
            with plan.preview(hooked), make(hooked, STAY[2].__getitem__):
                found[label] = hooked(tokens())
    idle = {"none", *(label for label in INSIDE if "keep_top" in label and top_k == 1)}
    for label, logits in found.items():
        assert (logits - expected[label]).abs().max() <= 2e-5, label
        assert label in idle or (logits - found["none"]).abs().max() > 0.01, label


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda model, gone: model.use_experts(7), "7 experts are wanted .* may choose among 6 of 8"),  # noqa: ARG005
        (lambda model, gone: model.steer_experts({1: {gone: "on"}}, rule="steermoe"), "is forced in, and has no"),
        (lambda model, gone: model.steer_experts(dict.fromkeys([1], dict.fromkeys(STAY[1][:3], "on"))), "it has 2"),  # noqa: ARG005
    ],
)
def test_what_the_smaller_model_has_not_is_refused_inside_a_preview(make, says):
    hooked, plan = hooked_and_plan("gpt_oss", 2)
    with plan.preview(hooked), make(hooked, plan.pruned(1)[0]), pytest.raises(MoELensError, match=says):
        hooked(tokens())
