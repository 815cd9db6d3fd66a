import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_lens.errors import InputError
from moe_lens.model.families.expert_groups import Groups
from moe_lens.model.families.table import FAMILIES
from moe_lens.pruning import Plan, Scores, plan
from moe_lens.selection import Selection

VALUES = torch.tensor(
    [
        [[5.0, 1, 2, 3], [1, 1, 1, 9]],
        [[1.0, 8, 2, 2], [4, 0, 0, 0]],
    ]
)


def scores(values=VALUES, top_k=2, method="frequency"):
    return Scores(
        method=method,
        model={"name": "m", "n_experts": 4, "moe_layers": [1, 2]},
        layers=(1, 2),
        top_k=top_k,
        domains=("a", "b")[: len(values)],
        tokens=(10, 20)[: len(values)],
        texts="f00",
        values=values,
    )


def test_the_best_of_each_layer_stay_and_domains_count_the_same():
    made = plan(scores(), 0.5)
    assert made.kept == ((0, 1), (0, 3))  # means: 3, 4.5, 2, 2.5 and 2.5, .5, .5, 4.5
    assert made.share_kept == 0.5 and made.even and made.top_k == 2 and made.pruned(1) == (2, 3)
    assert plan(scores(), 2).kept == made.kept


def test_a_specialist_keeps_what_its_domain_needs():
    assert plan(scores(), 2, domain="a").kept == ((0, 3), (0, 3))
    assert plan(scores(), 2, domain="b").kept == ((1, 2), (0, 1))  # ties go to the lower number
    assert plan(scores(), 2, domain="b").method == "frequency on b"
    with pytest.raises(InputError, match="no scores for domain 'c'; there are some for a, b"):
        plan(scores(), 2, domain="c")


@pytest.mark.typed
def test_a_global_budget_takes_the_best_of_all_layers():
    values = torch.tensor([[[1.0, 1, 1, 1], [97, 1, 1, 1]]])
    made = plan(scores(values, top_k=1), 0.5, budget="global")
    assert made.kept == ((0, 1, 2), (0,)) and not made.even and made.share_kept == 0.5
    assert plan(scores(values * torch.tensor([[[1.0], [50.0]]]), top_k=1), 0.5, budget="global").kept == made.kept
    assert made.uniform().kept == ((0, 1), (0, 1))
    assert made.uniform(groups=2).kept == ((0, 2), (0, 2)), "the best of experts 0 and 1, and of 2 and 3"
    with pytest.raises(InputError, match="groups is 3; expected a number that divides the 4 experts"):
        made.uniform(groups=3)
    least = plan(scores(values, top_k=2), 0.5, budget="global")
    assert [len(of) for of in least.kept] == [2, 2]


def test_a_layer_of_negative_scores_takes_its_part_of_a_global_budget():
    """Divided by nothing these are infinite, as those that stay are; and infinite scores are refused."""
    values = torch.rand(1, 3, 8, generator=torch.Generator().manual_seed(0)).double()
    wide = replace(scores(), model={"n_experts": 8}, layers=(0, 1, 2), domains=("a",), tokens=(1,), values=values)
    for lower in (0, 5):  # none is the control
        values[0, 1] -= lower
        assert sum(map(len, plan(wide, 7, budget="global").kept)) == 21
    values[0, 1, 0] = torch.inf
    with pytest.raises(InputError, match="values hold NaN or infinity"):
        replace(wide, values=values)


@pytest.mark.typed
def test_protected_experts_stay_where_a_plan_becomes_uniform(tmp_path):
    worst = [(layer, int(row.argmin())) for layer, row in zip(scores().layers, scores().of(), strict=True)]
    made = plan(scores(), 2, budget="global", protect=worst)
    made.save(tmp_path / "plan.safetensors")
    for each in (made, Plan.load(tmp_path / "plan.safetensors")):
        assert each.protected == tuple(worst)
        assert all(expert in each.uniform().of(layer) for layer, expert in worst)
    free = plan(scores(), 2, budget="global").uniform()
    assert not any(expert in free.of(layer) for layer, expert in worst)  # the control
    layer = scores().layers[0]
    with pytest.raises(InputError, match=rf"1 protected experts would not be kept, such as \({layer}, "):
        plan(scores(), 2, protect={layer: [0, 1]}).uniform(groups=2)


def test_protected_experts_stay():
    made = plan(scores(), 2, protect=[(2, 1)])
    assert made.kept == ((0, 1), (1, 3))
    assert plan(scores(), 2, budget="global", protect=[(2, 1)]).of(2)[0] in (0, 1) and 1 in plan(
        scores(), 2, budget="global", protect=[(2, 1)]
    ).of(2)
    with pytest.raises(InputError, match="1 protected experts do not fit into keep=2, such as"):
        plan(scores(), 2, protect=[(2, 0), (2, 1), (2, 2)])
    with pytest.raises(InputError, match="experts of layer 2: got 4; expected numbers from 0 to 3"):
        plan(scores(), 2, protect=[(2, 4)])


def test_only_selected_experts_stay_however_many():
    values = torch.tensor([[[1.0, 1, 0, 1], [0, 1, 1, 0]]])
    made = plan(scores(values, method="selected"), "selected")
    assert made.kept == ((0, 1, 3), (1, 2))
    with pytest.raises(InputError, match="layer 2 would keep 1 experts, and every token needs 2"):
        plan(scores(torch.tensor([[[1.0, 1, 0, 1], [0, 1, 0, 0]]])), "selected")


def test_layers_can_have_their_own_number_of_active_experts(tmp_path):
    made = plan(scores(), 0.5, top_k={2: 1})
    assert (made.active(1), made.active(2), made.top_k, made.fewer) == (2, 1, 2, {2: 1})
    made.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").fewer == {2: 1}
    assert plan(scores(), 0.5, top_k={1: 1, 2: 1}).fewer == {}


def test_fewer_active_experts_allow_fewer_kept_ones():
    assert plan(scores(), top_k=1).top_k == 1 and plan(scores(), top_k=1).share_kept == 1
    assert plan(scores(), 1, top_k=1).kept == ((1,), (3,))


@pytest.mark.parametrize(
    ("keep", "options", "message"),
    [
        (1, {}, "keep=1 leaves 1 experts a layer, and every token needs 2"),
        (0.2, {}, "keep=0.2 leaves 1 experts a layer"),
        (5, {}, "keep is 5; expected 1 to 4 experts a layer"),
        (1.5, {}, "keep is 1.5; expected a share"),
        (0, {}, "keep is 0; expected 1 to 4"),
        (None, {"top_k": 3}, "top_k is 3; expected 1 to 2, the model's own"),
        (None, {"top_k": 0}, "top_k is 0; expected a whole number from 1"),
        (None, {"top_k": {1: 3}}, "top_k is 3; expected 1 to 2"),
        (None, {"top_k": {5: 1}}, r"top_k names layer 5; the layers with experts are \[1, 2\]"),
    ],
)
def test_impossible_sizes_are_refused(keep, options, message):
    with pytest.raises(InputError, match=message):
        plan(scores(), keep, **options)


@pytest.mark.typed
def test_plans_and_scores_are_read_as_they_were_written(tmp_path):
    from moe_lens.pruning.merging import grouped

    made = plan(scores(), 2)
    merged = grouped(made, torch.eye(4).expand(2, 4, 4).double() + 0.1, torch.arange(8.0).view(2, 4))
    for each in (made, merged):
        each.save(tmp_path / "plan")
        again = Plan.load(tmp_path / "plan")
        assert again.kept == each.kept and again.merged == each.merged and again.model == each.model
        assert again.top_k == each.top_k and again.method == each.method and torch.equal(again.values, each.values)
        assert (again.shares is None) == (each.shares is None)
        again.check(scores().model)
    scores().save(tmp_path / "scores")
    again = Scores.load(tmp_path / "scores")
    assert torch.equal(again.values, VALUES) and again.domains == ("a", "b") and again.texts == "f00"
    frame = again.to_frame()
    assert len(frame) == 16 and frame.query("domain == 'b' and layer == 1 and expert == 1").score.item() == 8
    with pytest.raises(InputError, match="holds Scores; expected a Plan"):
        Plan.load(tmp_path / "scores")
    with pytest.raises(InputError, match="the plan is for a model with name 'm'; this one has 'n'"):
        made.check({"name": "n"})


def test_protection_is_read_in_every_way_that_is_clear():
    values = VALUES.flip(-1)
    expected = plan(scores(values), 2, protect=[(2, 2)]).kept
    assert expected != plan(scores(values), 2).kept
    clear: list[Any] = [(2, 2), {2: [2]}, [[2, 2]], {(2, 2)}, Selection(experts={2: [2]}), {2: torch.arange(4) == 2}]
    for given in clear:
        assert plan(scores(values), 2, protect=given).kept == expected
    assert plan(scores(values), protect=Selection(layers=[2])).share_kept == 1
    nothing: list[Any] = [(), [], {}]
    assert all(plan(scores(values), 2, protect=one).kept == plan(scores(values), 2).kept for one in nothing)
    wrong: list[tuple[Any, str]] = [
        (3, "expected {layer: "), ([(2, 3, 4)], "expected {layer: "), (["a"], "expected {layer: "),
        ({2: 3}, "experts of layer 2: got 3"), ([(0, 1)], "protect names layer 0; the layers with experts are"),
        ({2: torch.ones(3).bool()}, "got a mask of 3"), (Selection(), "expected one of experts or layers"),
        (Selection(ranks=[0]), "expected one of experts or layers"),
        (Selection(experts={2: [3]}, where=[0]), "and of nothing else"),
    ]  # fmt: skip
    for given, message in wrong:
        with pytest.raises(InputError, match=re.escape(message)):
            plan(scores(values), 2, protect=given)


def test_a_budget_without_effect_is_refused():
    for keep in (None, "selected"):
        with pytest.raises(InputError, match="budget='layer' has no effect with keep="):
            plan(scores(), keep, budget="layer")
    assert plan(scores(), 2, budget="layer").kept == plan(scores(), 2).kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": ((0, 1, 1), (0, 1))}, "would keep (0, 1, 1); expected ids from 0 to 3, ascending, each once"),
        ({"kept": ((1, 0), (0, 1))}, "ascending, each once"),
        ({"layers": (1, 1)}, "layers are (1, 1); expected each once"),
        ({"fewer": {1: 3}}, "fewer is 3 in layer 1; expected 1 to 1, below top_k"),
        ({"fewer": {1: 2}}, "fewer is 2 in layer 1"),
        ({"fewer": {7: 1}}, "layer 7 has no experts"),
        ({"top_k": 5}, "top_k is 5; expected 1 to 4"),
        ({"merged": {(1, 2): 0}}, "merged is given without shares"),
    ],
)
def test_a_plan_that_no_model_could_have_is_refused(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        replace(plan(scores(), 2), **change)


def test_a_layer_that_a_plan_is_not_for_has_no_active_experts():
    assert plan(scores(), 2).active(1) == 2
    with pytest.raises(InputError, match="layer 99 has no experts; the plan is for layers"):
        plan(scores(), 2).active(99)


@pytest.mark.parametrize("change", [{"domains": ("a", "a")}, {"layers": (1, 1)}])
def test_scores_name_each_domain_and_layer_once(change):
    with pytest.raises(InputError, match="expected each once"):
        replace(scores(), **change)


@pytest.mark.typed
def test_as_many_of_each_group_are_enough_where_it_is_ranked_and_a_token_finds_its_experts():
    groups = Groups(number=4, chosen=2, least=2)
    assert groups.fit(8, 4) and groups.fit(9, 4), "two of each"
    assert not groups.fit(8, 5), "two groups have four"
    assert not groups.fit(4, 2), "a group is ranked by two"
    for family, name in (("deepseek_v3", "n_group"), ("kimi_linear", "num_expert_group")):
        assert Groups.of(FAMILIES[family], {name: 4, "topk_group": 2}) == groups
