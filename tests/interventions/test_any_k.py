"""Any number of experts: rules that give each token its own, and what stands on the axis of slots.

That the experts of any number are chosen, weighed and summed by every family's own rule is a law of `tests/matrix`, and
`tests/model/test_hooks_edits.py` compares numbers of a token's own with the plain re-implementation.
"""

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE, Routing, names
from moe_lens.errors import HookError, InputError
from moe_lens.interventions import expert_attribution, patch, trace
from moe_lens.interventions.any_k import by_mass
from moe_lens.interventions.attribution import Method
from moe_lens.interventions.attribution_result import Unit
from moe_lens.interventions.coalitions import added_losses
from moe_lens.interventions.metrics import Logit, Loss
from moe_lens.interventions.patch_sites import SITES
from moe_lens.interventions.sweep import CleanRun, Variant, sweep
from moe_lens.stats import RoutedBatch
from tests.wrapped import Case, deviation, untouched, wrapped

OF_SLOTS = ("expert_out", "expert_weighted", "routing")
assert {site for site in SITES if names.EXPERT_INDICES in SITES[site].hooks} == set(OF_SLOTS)
F64 = 1e-13  # relative to what is compared: the same products in other batches


def shares_by_hand(case: Case, logits: Tensor) -> list[float]:
    """Softmax for one family of the test, sigmoid over its sum for the other."""
    values = [math.exp(x) if case.name == "olmoe" else 1 / (1 + math.exp(-x)) for x in logits.tolist()]
    return [value / sum(values) for value in values]


def mass(shares: list[float], order: list[int], value: float) -> int:
    total = 0.0
    for place, expert in enumerate(order):
        total += shares[expert]
        if total >= value:
            return place + 1
    return len(order)


def threshold(shares: list[float], order: list[int], value: float) -> int:
    return sum(share >= value for share in shares)


def entropy(shares: list[float], order: list[int], value: float) -> int:
    return round(value * math.exp(-sum(share * math.log(share) for share in shares)))


def test_no_multiple_of_the_entropy_is_too_large() -> None:
    case = wrapped("olmoe")
    with torch.no_grad():
        with case.model.use_experts(8):
            every = case.model(case.tokens)
        for times in (1e30, math.inf):
            with case.model.use_experts(entropy=times):
                assert deviation(case.model(case.tokens), every) == 0, times


@pytest.mark.typed
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
@pytest.mark.parametrize(("rule", "value"), [(mass, 0.6), (threshold, 0.13), (entropy, 0.5)])
def test_a_token_has_as_many_experts_as_its_router_says(family: str, rule: Callable[..., int], value: float) -> None:
    case = wrapped(family)
    model, layer = case.model, case.last
    scores: list[Tensor] = []

    def note(counts: Tensor, hook: Any) -> None:
        scores.append(model.selection_state(layer).scores)

    options: dict[str, Any] = {rule.__name__: value, "least": 2, "most": 4, "layers": [layer]}
    with untouched(model), torch.no_grad(), model.use_experts(**options):
        _, cache = model.run_with_cache(case.tokens, names_filter=lambda name: ".mlp.hook" in name)
        model.run_with_hooks(case.tokens, fwd_hooks=[(names.mlp(names.N_ACTIVE, layer), note)])
    found = cache["n_active", layer][..., 0]
    expected = torch.empty_like(found)
    for at in [(b, p) for b in range(found.shape[0]) for p in range(found.shape[1])]:
        logits = cache["router_logits", layer][at]
        order = sorted(range(len(logits)), key=lambda e: -float(scores[0][at][e]))
        expected[at] = min(max(rule(shares_by_hand(case, logits), order, value), 2), 4)
    assert torch.equal(found, expected)
    assert len(found.unique()) > 1, "or the test shows nothing"
    slots = torch.arange(cache["expert_indices", layer].shape[-1]) < found[..., None]
    assert torch.equal(cache["expert_indices", layer] >= 0, slots)
    assert torch.equal(cache["expert_kept", layer], slots)
    assert torch.equal(cache["routing_weights", layer] != 0, slots)
    routing = cache.routing(layer)
    assert torch.equal((routing.dense_weights() > 0).sum(-1), found)
    for at in [(0, 3), (1, 7)]:
        chosen = routing.indices[at][routing.indices[at] >= 0].tolist()
        out = [e for e in range(model.n_experts) if e not in chosen]
        logits = cache["router_logits", layer][at]
        assert routing.margin()[at] == logits[chosen].min() - logits[out].max()
    with pytest.raises(InputError, match="expert indices from -1"):
        RoutedBatch(routing=Routing.stack([routing]))
    with model.use_experts(**options):  # other layers have as many as ever
        whole = model.routing(case.tokens)
    assert torch.equal(whole.layer(layer).dense_weights(), routing.dense_weights())
    assert whole.to_frame().expert.min() >= 0


def test_all_the_mass_is_all_the_experts() -> None:
    shares = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]], dtype=torch.float64)
    assert by_mass(shares, shares, 1.0).item() == 4
    assert by_mass(shares, shares, 0.875).item() == 3
    assert by_mass(shares, shares.flip(-1), 0.5).item() == 3, "in the order in which they are chosen"


def test_sums_and_parts_of_a_run_with_more_experts_know_how_many_there_were() -> None:
    case = wrapped("deepseek")
    model, layer = case.model, case.last
    with torch.no_grad(), model.use_experts(5):
        _, cache = model.run_with_cache(case.tokens)
    weighted = cache["expert_weighted", layer]
    assert weighted.shape[2] == 5
    routed = cache.partial_sum(layer, ranks=range(5), residual="none").values
    two = cache.partial_sum(layer, ranks=range(model.top_k), residual="none").values
    assert deviation(routed, cache["routed_out", layer]) == 0
    assert deviation(two, weighted[:, :, : model.top_k].sum(2)) <= 1e-6
    assert deviation(two, routed) > 1e-2, "not the whole"
    assert cache.partial_sum(layer, ranks=[4], residual="none").values.equal(weighted[:, :, 4])
    for by in ("rank", "expert"):
        stack, _ = cache.decompose_experts(by=by)
        last = cache["resid_post", model.cfg.n_layers - 1]
        assert deviation(stack.sum(0), last) <= 1e-5 * last.abs().max().item()
    assert f"{layer}_rank_4" in cache.decompose_experts(by="rank")[1]
    with pytest.raises(InputError, match="there is no rank 5"):
        cache.partial_sum(layer, ranks=[5])


def test_parts_of_a_run_with_a_number_for_each_token() -> None:
    case = wrapped("deepseek")
    model = case.model
    with torch.no_grad(), model.use_experts(mass=0.5):
        logits, cache = model.run_with_cache(case.tokens)
    last = cache["resid_post", model.cfg.n_layers - 1]
    for by in ("rank", "expert"):
        assert deviation(cache.decompose_experts(by=by)[0].sum(0), last) <= 1e-5 * last.abs().max().item()
    with pytest.raises(InputError, match="different numbers of experts"):
        cache.partial_sum(case.last, drawn="active")
    with torch.no_grad(), model.use_experts(mass=0.5), model.ablate({case.last: [2]}, how="reroute"):
        _, without = model.run_with_cache(case.tokens)
    before, after = cache["expert_indices", case.last], without["expert_indices", case.last]
    assert (before == 2).any() and not (after == 2).any()
    assert torch.equal((before >= 0).sum(-1), (after >= 0).sum(-1)), "another expert in its place"
    assert deviation(logits, without["resid_post", 0].new_zeros(logits.shape)) > 0


@pytest.mark.typed
def test_generation_pickling_and_nesting() -> None:
    case = wrapped("mixtral")
    model, prompt = case.model, case.tokens[:1, :6]
    options: Any = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    options["output_logits"] = True
    one = model.use_experts(1)
    with untouched(model):
        inside = model.generate(prompt, interventions=[one], **options)
        with one:
            same = model.generate(prompt, **options)
        assert all(map(torch.equal, inside.logits, same.logits))
        anew = pickle.loads(pickle.dumps(one)).bind(model)
        with torch.no_grad(), model.use_experts(5), anew:
            inner = model(case.tokens)
        with torch.no_grad(), copy.deepcopy(one):
            assert torch.equal(model(case.tokens), inner), "the inner number is in force"
    assert deviation(inner, case.logits) > 1e-3
    assert repr(model.use_experts(mass=0.5, most=4, layers=[0])).startswith("Intervention(use_experts mass 0.5, 1 to 4")


def test_what_cannot_be_is_refused() -> None:
    model = wrapped("deepseek_v3").model
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "got nothing; expected one of k, mass, threshold and entropy"),
        ({"k": 2, "mass": 0.5}, "got k, mass; expected one"),
        ({"k": 0}, "k is 0; expected a whole number from 1"),
        ({"k": True}, "k is True"),
        ({"k": 9}, "k is 9"),
        ({"k": 2, "least": 2}, "leave them out with k"),
        ({"mass": 1.5}, "mass is 1.5; expected a number above 0 and at most 1"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"entropy": -1.0}, "entropy is -1.0; expected a number above 0"),
        ({"mass": 0.5, "least": 5, "most": 3}, "least is 5 and most is 3"),
        ({"k": 2, "layers": [99]}, "99"),
    ]
    for options, says in wrong:
        with pytest.raises(InputError, match=says):
            model.use_experts(**options)
    x = wrapped("deepseek_v3").tokens
    too_many = "5 experts are wanted for a token, which may choose among 4 of 8"
    with torch.no_grad(), model.use_experts(5), pytest.raises(HookError, match=too_many):
        model(x)
    third = model.ablate(ranks=[2])
    with torch.no_grad(), model.use_experts(2), third, pytest.raises(InputError, match="there is no rank 2 in layer"):
        model(x)


@pytest.mark.parametrize("by", ["weight", "last", "random"])
def test_top_experts_are_kept_of_those_that_a_token_has(by: Any) -> None:
    """Not of empty slots; and as many as the model has active may be kept where there are more."""
    case = wrapped("olmoe", torch.float64)
    model, layer = case.model, case.last
    kept: list[Tensor] = []

    def note(weighted: Tensor, hook: Any) -> None:  # noqa: ARG001
        kept.append(model.experts_in_slots(layer) >= 0)

    watch = [(names.mlp(names.EXPERT_WEIGHTED, layer), note)]
    with torch.no_grad(), model.use_experts(mass=0.6):
        model.run_with_hooks(case.tokens, fwd_hooks=watch)
        with model.keep_top(1, by=by, layers=[layer]):  # what is before it stays as it was
            model.run_with_hooks(case.tokens, fwd_hooks=watch)
    had, left = kept
    assert had.sum(-1).unique().numel() > 1, "or the test shows nothing"
    assert (left.sum(-1) == 1).all() and (had | ~left).all()
    if by != "random":
        at = left.int().argmax(-1)
        assert torch.equal(at, torch.zeros_like(at) if by == "weight" else had.sum(-1) - 1)
    with torch.no_grad(), model.use_experts(model.top_k + 2), model.keep_top(model.top_k, by=by):
        model.run_with_hooks(case.tokens, fwd_hooks=watch)
    assert (kept[-1].sum(-1) == model.top_k).all() and kept[-1].shape[-1] == model.top_k + 2


@pytest.mark.parametrize("k", [2, 5])
def test_ranks_are_those_that_tokens_have(k: int) -> None:
    case = wrapped("olmoe", torch.float64)
    model, metric = case.model, Logit(5)
    other = case.tokens.flip(0)
    with untouched(model), torch.no_grad(), model.use_experts(k):
        patched = patch(model, case.tokens, other, "expert_weighted", metric, over=("layer", "rank"))
        alone = expert_attribution(model, case.tokens, metric, method="knockout", unit="rank", routing="free")
        clean = metric(model(case.tokens)).item()
        assert patched.axes["rank"] == tuple(range(k)) and alone.values.shape == (len(model.moe_layers), k)
        for row, layer in enumerate(model.moe_layers):
            for rank in range(k):
                without = replaced(layer, rank)
                expected = clean - metric(model.run_with_hooks(case.tokens, fwd_hooks=[without])).item()
                assert abs(alone.values[row, rank].item() - expected) <= F64 * case.logits.abs().max()


def replaced(layer: int, rank: int) -> Any:
    def zero(weighted: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        weighted = weighted.clone()
        weighted[:, :, rank] = 0
        return weighted

    return names.mlp(names.EXPERT_WEIGHTED, layer), zero


def test_what_goes_from_slot_to_slot_is_refused_where_tokens_have_numbers_of_their_own() -> None:
    """An empty slot is −1, which is the last expert to an index; widths differ between layers and texts."""
    case = wrapped("mixtral")
    model, metric, other = case.model, Logit(5), case.tokens.flip(0)
    says = "tokens have different numbers of experts, as inside use_experts"
    with untouched(model), torch.no_grad(), model.use_experts(mass=0.7):
        run = CleanRun.of(model, case.tokens)
        assert any((run.indices(layer) < 0).any() for layer in model.moe_layers), "or the test shows nothing"
        for call in (
            *(
                partial(expert_attribution, model, case.tokens, metric, method=method, unit=unit)
                for method in get_args(Method)
                for unit in get_args(Unit)
            ),
            *(partial(patch, model, case.tokens, other, site, metric, over=("layer",)) for site in OF_SLOTS),
            partial(sweep, model, run, [Variant(0)], metric, routing="frozen"),
        ):
            with pytest.raises(InputError, match=says):
                call()
        assert sweep(model, run, [Variant(0)], metric).isfinite().all()
    passes: list[int] = []

    def one_more_in_every_pass(counts: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        passes.append(1)
        return torch.full_like(counts, len(passes))

    differ = model.hooks([(names.mlp(names.N_ACTIVE, case.last), one_more_in_every_pass)])
    with differ, pytest.raises(InputError, match=says):  # each run is even by itself
        patch(model, case.tokens, other, "expert_weighted", metric, over=("layer",))


def test_tracing_takes_an_empty_slot_for_no_expert() -> None:
    model: Any = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32, check=False)
    last = model.n_experts - 1
    with (
        torch.no_grad(),
        model.use_experts(mass=0.5),
        model.ablate([(at, last) for at in model.moe_layers], how="reroute"),
    ):
        found = trace(model, "The old man looked at the sea and", " man", " the", draws=2)
    assert not found.sites["expert"].values[..., last].any()
    assert found.sites["expert"].values.any()


@pytest.mark.parametrize("how", ["reroute", "zero"])
def test_coalitions_are_taken_out_of_tokens_with_numbers_of_their_own(how: Any) -> None:
    case = wrapped("olmoe", torch.float64)
    model, metric = case.model, Loss(case.tokens)
    coalitions = torch.rand(3, len(model.moe_layers), model.n_experts) < 0.25
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(len(case.tokens)))

    def nats(*hooks: Any) -> Tensor:
        losses = model.run_with_hooks(case.tokens, return_type="loss", loss_per_token=True, fwd_hooks=hooks)
        return losses.sum(-1)

    with untouched(model), torch.no_grad(), model.use_experts(mass=0.6):
        run, whole = CleanRun.of(model, case.tokens), nats()
        assert any((run.indices(layer) < 0).any() for layer in model.moe_layers), "or the test shows nothing"
        added = added_losses(model, run, metric, coalitions, pairs, how).view(3, -1)
        for members, ours in zip(coalitions, added, strict=True):
            out = [(model.moe_layers[row], expert) for row, expert in members.nonzero().tolist()]
            theirs = nats(*model.ablate(out, how=how).fwd_hooks) - whole
            assert (ours - theirs).abs().max() <= F64 * whole.abs().max()
            assert theirs.any()


@pytest.mark.parametrize("name", [names.ROUTING_WEIGHTS, names.EXPERT_OUT, names.ROUTED_OUT])
def test_a_sweep_reads_tokens_with_numbers_of_their_own(name: str) -> None:
    case = wrapped("olmoe", torch.float64)
    model, layer = case.model, case.last
    metric = Loss(case.tokens)
    hook = (names.mlp(name, layer), lambda value, hook: value * torch.linspace(-1, 2, value.shape[-1]).to(value))
    with untouched(model), torch.no_grad(), model.use_experts(mass=0.6):
        run = CleanRun.of(model, case.tokens)
        assert (run.indices(layer) < 0).any(), "or the test shows nothing"
        found = sweep(model, run, [Variant(layer, hooks=[hook])], metric)
        expected = metric(model.run_with_hooks(case.tokens, fwd_hooks=[hook]))
        assert (found - expected).abs().max() <= F64 * case.logits.abs().max()
        assert (found - metric(run.logits)).abs().max() > 1e-4
