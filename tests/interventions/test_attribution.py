"""Attributions against definitions: full forward passes with plain hooks, finite differences, what they must sum to."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.interventions import ExpertAttribution, KLDivergence, Logit, LogitDifference, Loss, expert_attribution
from moe_lens.interventions.expert_means import ExpertMeans
from moe_lens.selection import Selection
from tests.families import CONFIGS, build
from tests.families import tokens as some_tokens
from tests.matrix import configs as matrix
from tests.test_docs import DOCS, code_of
from tests.wrapped import Case, untouched, wrapped

families = pytest.mark.parametrize("family", CONFIGS)
METHODS = ("direct", "gradient", "integrated", "knockout", "direct_knockout")
F64 = 1e-13
"""Of the largest value: some thousand roundings in float64."""


def tolerance(family: str) -> float:
    """Relative: the norms of most families go through float32, in double precision, too."""
    return F64 if family.startswith("deepseek,") or family == "deepseek" else 2e-6


def near(one: Tensor, other: Tensor, relative: float, scale: float | None = None) -> bool:
    assert one.shape == other.shape
    return bool((one - other).abs().max() <= relative * (other.abs().max() if scale is None else scale))


def at_slots(case: Case, layer: int, change: Any) -> Any:
    """A hook that multiplies a layer's weighted outputs by a mask made of its experts."""
    indices = case.model.routing(case.tokens).layer(layer).indices

    def edit(weighted: Tensor, hook: Any) -> Tensor:
        return weighted * change(indices)[..., None]

    return names.mlp(names.EXPERT_WEIGHTED, layer), edit


def frozen_behind(case: Case, layer: int) -> list[Any]:
    routing = case.model.routing(case.tokens)
    return [
        (names.mlp(names.EXPERT_INDICES, at), lambda value, hook, at=at: routing.layer(at).indices)
        for at in case.model.moe_layers
        if at > layer
    ]


# --- knock-out ---


@families
@pytest.mark.parametrize("routing", ["free", "frozen"])
def test_a_knockout_is_a_full_forward_pass_without_the_expert(family: str, routing: Any) -> None:
    case = wrapped(family, torch.float64)
    metric = Loss(case.tokens)
    with untouched(case.model):
        found = expert_attribution(case.model, case.tokens, metric, method="knockout", routing=routing)
    clean = metric(case.logits)  # of transformers' own model, before wrapping
    assert abs(found.clean - clean) <= tolerance(family)
    assert found.values.shape == (len(case.model.moe_layers), case.model.n_experts)
    for row, layer in enumerate(case.model.moe_layers):
        behind = frozen_behind(case, layer) if routing == "frozen" else []
        expected = []
        for expert in range(case.model.n_experts):
            hook = at_slots(case, layer, lambda indices, expert=expert: indices != expert)
            with torch.no_grad():
                expected.append(clean - metric(case.model.run_with_hooks(case.tokens, fwd_hooks=[hook, *behind])))
        assert near(found.values[row], torch.stack(expected), 1.0, scale=tolerance(family) * clean.item())
        indices = case.model.routing(case.tokens).layer(layer).indices
        assert torch.equal(found.count[row], torch.bincount(indices.flatten(), minlength=case.model.n_experts))


def test_free_and_frozen_differ_in_what_is_behind_alone() -> None:
    """Negative control for both: re-routing has an effect, but none behind the last layer."""
    case = wrapped("olmoe", torch.float64)
    free, frozen = (
        expert_attribution(case.model, case.tokens, Loss(case.tokens), method="knockout", routing=routing)
        for routing in ("free", "frozen")
    )
    effect = free.rerouting(frozen)
    assert effect.routing == "free − frozen"
    assert effect.values[0].abs().max() > 0.01 * free.values[0].abs().max()
    assert effect.values[-1].abs().max() <= 2e-6
    assert torch.equal(effect.values, free.values - frozen.values)


@pytest.mark.parametrize("unit", ["expert", "rank"])
def test_a_knockout_at_one_position_takes_one_slot_out(unit: Any) -> None:
    case = wrapped("deepseek", torch.float64)
    metric = Loss(case.tokens)
    found = expert_attribution(case.model, case.tokens, metric, method="knockout", unit=unit, per_position=True)
    n = case.model.n_experts if unit == "expert" else case.model.top_k
    assert found.values.shape == found.count.shape == (2, n, *case.tokens.shape)
    layer = case.model.moe_layers[0]
    indices = case.model.routing(case.tokens).layer(layer).indices
    for batch, pos, rank in [(0, 0, 0), (1, 11, 2), (1, 4, 1)]:

        def keep(indices: Tensor, at: tuple[int, ...] = (batch, pos, rank)) -> Tensor:
            mask = torch.ones_like(indices)
            mask[at] = 0
            return mask

        with torch.no_grad():
            without = metric(case.model.run_with_hooks(case.tokens, fwd_hooks=[at_slots(case, layer, keep)]))
        place = int(indices[batch, pos, rank]) if unit == "expert" else rank
        assert abs(found.values[0, place, batch, pos] - (found.clean - without)) <= F64
    assert (found.count <= 1).all() and (found.values[found.count == 0] == 0).all()
    assert int(found.count[0].sum()) == indices.numel()


def test_a_direct_knockout_removes_the_contribution_from_the_last_stream() -> None:
    case = wrapped("deepseek", torch.float64)
    metric = Loss(case.tokens)
    found = expert_attribution(case.model, case.tokens, metric, method="direct_knockout")
    last = names.block(names.RESID_POST, case.model.cfg.n_layers - 1)
    for row, layer in enumerate(case.model.moe_layers):
        _, cache = case.model.run_with_cache(case.tokens, names_filter=lambda name: "expert" in name)
        for expert in (0, 5):
            part = cache.expert_out(layer, expert=expert, weighted=True).values
            with torch.no_grad():
                without = metric(
                    case.model.run_with_hooks(
                        case.tokens, fwd_hooks=[(last, lambda resid, hook, part=part: resid - part)]
                    )
                )
            assert abs(found.values[row, expert] - (found.clean - without)) <= F64


# --- direct ---


@families
def test_direct_attributions_of_everything_are_the_logit(family: str) -> None:
    """Of all experts, attention, shared experts, dense MLPs and the embedding: the logit before wrapping."""
    case = wrapped(family, torch.float64)
    token, pos = 7, 9
    found = expert_attribution(case.model, case.tokens[:1], Logit(token, pos), method="direct", unit="rank")
    with torch.no_grad():
        _, cache = case.model.run_with_cache(case.tokens[:1], names_filter=lambda name: ".attn." not in name)
    stack, labels = cache.decompose_experts()
    whole = cache.logit_attrs(stack, token)[:, 0, pos]
    for row, layer in enumerate(found.layers):
        ranks = [labels.index(f"{layer}_rank_{rank}") for rank in range(case.model.top_k)]
        assert near(found.values[row, :, 0, pos], whole[ranks], tolerance(family), scale=whole.abs().max().item())
    rest = sum(whole[i] for i, label in enumerate(labels) if "_rank_" not in label)
    logit = case.logits[0, pos, token]
    assert abs(found.total().sum() + rest - logit) <= 10 * tolerance(family) * whole.abs().max()
    assert abs(found.total().sum() - logit) > 0.01, "the experts alone are not the logit"
    others = found.values.clone()
    others[..., pos] = 0
    assert not others.any(), "at other positions nothing is read directly"


def test_parts_are_of_the_logit_before_a_bound_and_direct_attributions_go_through_its_slope() -> None:
    hf: Any = matrix.build("mistral_large4")
    ids = matrix.tokens(1, 8)
    cap = hf.config.get_text_config().final_logit_softcapping
    with torch.no_grad():
        hf.lm_head.weight.mul_(6)  # logits of the size that trained models have
        model = HookedMoE.from_hf(hf, check=False)
        logits, cache = model.run_with_cache(ids)
    token = int(logits[0, -1].argmax())
    stack, labels = cache.decompose_experts()
    parts, bounded = cache.logit_attrs(stack, token)[:, 0, -1], logits[0, -1, token]
    assert torch.allclose(cap * torch.tanh(parts.sum() / cap), bounded, rtol=1e-5)
    assert parts.sum() > 1.1 * bounded, "negative control: the bound is felt"
    direct = expert_attribution(model, ids, Logit(token), method="direct", unit="rank").values[..., 0, -1].sum()
    ranks = sum(part for part, label in zip(parts, labels, strict=True) if "_rank_" in label)
    assert torch.allclose(direct.float(), ranks * (1 - (bounded / cap) ** 2), rtol=1e-4)


def test_direct_attributions_of_a_logit_difference_are_differences() -> None:
    case = wrapped("deepseek", torch.float64)
    first, second = (
        expert_attribution(case.model, case.tokens, Logit(token), method="direct").values for token in (3, 8)
    )
    both = expert_attribution(case.model, case.tokens, LogitDifference(3, 8), method="direct").values
    assert near(both, first - second, F64)
    assert both.abs().max() > 0.01


# --- gradient ---


@pytest.mark.parametrize("family", ["deepseek", "deepseek, normalised"])
def test_a_gradient_is_the_slope_along_each_contribution(family: str) -> None:
    """Central finite differences in float64, slot by slot."""
    case = wrapped(family, torch.float64)
    metric, step = Loss(case.tokens), 1e-5
    with untouched(case.model):
        found = expert_attribution(case.model, case.tokens, metric, unit="rank")
    for row, layer in enumerate(case.model.moe_layers):
        for batch, pos, rank in [(0, 3, 0), (1, 0, 2), (0, 10, 1)]:

            def at(scale: float, layer: int = layer, slot: tuple[int, ...] = (batch, pos, rank)) -> Tensor:
                def stretch(weighted: Tensor, hook: Any) -> Tensor:
                    weighted[slot] *= 1 + scale
                    return weighted

                with torch.no_grad():
                    hooks: list[Any] = [(names.mlp(names.EXPERT_WEIGHTED, layer), stretch)]
                    return metric(case.model.run_with_hooks(case.tokens, fwd_hooks=hooks))

            slope = (at(step) - at(-step)) / (2 * step)
            assert abs(found.values[row, rank, batch, pos] - slope) <= 1e-8
    assert found.values.abs().max() > 1e-3


@families
def test_a_gradient_is_the_weight_times_its_derivative(family: str) -> None:
    """Another way to the same number: g ∂metric/∂g, by autograd at the routing weights."""
    case = wrapped(family, torch.float64)
    metric = Loss(case.tokens)
    found = expert_attribution(case.model, case.tokens, metric, unit="rank")
    weights: dict[int, Tensor] = {}

    def hold(layer: int) -> Any:
        def hook(value: Tensor, hook: Any) -> Tensor:
            weights[layer] = value
            return value * 1

        return hook

    hooks: list[Any] = [(names.mlp(names.ROUTING_WEIGHTS, layer), hold(layer)) for layer in found.layers]
    slopes = torch.autograd.grad(
        metric(case.model.run_with_hooks(case.tokens, fwd_hooks=hooks)), [weights[layer] for layer in found.layers]
    )
    expected = torch.stack(
        [(weights[at] * slope).movedim(-1, 0) for at, slope in zip(found.layers, slopes, strict=True)]
    )
    assert near(found.values, expected.detach(), tolerance(family))
    by_expert = expert_attribution(case.model, case.tokens, metric)
    indices = torch.stack([case.model.routing(case.tokens).layer(at).indices for at in found.layers])
    gathered = by_expert.values.movedim(1, -1).gather(-1, indices).movedim(-1, 1)
    assert torch.equal(gathered, found.values)
    assert near(by_expert.total().sum(1), found.total().sum(1), F64)


def test_gradients_need_none_of_the_parameters() -> None:
    model = HookedMoE.from_hf(build("deepseek"), check=False)
    tokens = some_tokens()
    expected = expert_attribution(model, tokens, Loss(tokens)).values
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(False)
    with torch.no_grad():
        found = expert_attribution(model, tokens, Loss(tokens)).values
    assert torch.equal(found, expected)


# --- integrated ---


@families
def test_integrated_gradients_of_a_layer_sum_to_the_difference_if_frozen(family: str) -> None:
    case = wrapped(family, torch.float64)
    metric = Loss(case.tokens)
    found = expert_attribution(case.model, case.tokens, metric, method="integrated", routing="frozen", steps=64)
    assert found.difference is not None
    expected = []
    for layer in found.layers:
        hook = at_slots(case, layer, torch.zeros_like)
        with torch.no_grad():
            without = metric(case.model.run_with_hooks(case.tokens, fwd_hooks=[hook, *frozen_behind(case, layer)]))
        expected.append(found.clean - without)
    assert near(found.difference, torch.stack(expected), 1.0, scale=tolerance(family) * found.clean)
    gap = (found.total().sum(1) - found.difference).abs()
    # gpt-oss clamps its neurons: quadrature converges slowly across a kink.
    assert gap.max() <= {"gpt_oss": 1e-4}.get(family, 10 * tolerance(family) * found.clean)
    with warnings.catch_warnings(action="ignore"):
        coarse = expert_attribution(case.model, case.tokens, metric, method="integrated", routing="frozen", steps=1)
    assert (coarse.total().sum(1) - found.difference).abs().max() > 100 * gap.max(), "one step does not get there"


@pytest.mark.parametrize("routing", ["free", "frozen"])
def test_integrated_gradients_that_do_not_reach_the_difference_are_told(routing: Any) -> None:
    """A norm follows the experts' sum; elsewhere nothing is said of free routing, which may miss it."""
    how: dict[str, Any] = {"method": "integrated", "routing": routing}
    normed, tokens = HookedMoE.from_hf(matrix.build("flex_olmo")), matrix.tokens()
    with pytest.warns(UserWarning, match=r"of layers \[0, 1, 2, 3\] sum to .* changes by .*method=\"knockout\" does"):
        expert_attribution(normed, tokens, Loss(tokens), **how)
    case = wrapped("olmoe")
    found = expert_attribution(case.model, case.tokens, Loss(case.tokens), **how)
    assert found.difference is not None


def test_integrated_gradients_converge_in_steps() -> None:
    case = wrapped("deepseek", torch.float64)
    gaps = []
    for steps in (1, 2, 4, 8, 16):
        found = expert_attribution(
            case.model, case.tokens, Loss(case.tokens), method="integrated", routing="frozen", steps=steps
        )
        assert found.difference is not None
        gaps.append((found.total().sum(1) - found.difference).abs().max().item())
    for before, after in zip(gaps, gaps[1:], strict=False):
        assert after < 0.1 * before or after < F64
    assert gaps[0] > 1e-4 and gaps[-1] < F64


def test_free_integrated_gradients_miss_what_re_routing_does() -> None:
    case = wrapped("olmoe", torch.float64)
    gaps = []
    for steps in (16, 64):
        found = expert_attribution(case.model, case.tokens, Loss(case.tokens), method="integrated", steps=steps)
        assert found.difference is not None
        gaps.append((found.total().sum(1) - found.difference).abs().max())
    assert min(gaps) > 1e-3, "however many steps"


def test_where_what_follows_is_linear_all_gradients_agree() -> None:
    """Behind the last layer only norm and unembedding follow; with a constant scale they are linear."""
    case = wrapped("deepseek", torch.float64)
    only = Selection(layers=[2])
    with case.model.hooks(fwd_hooks=[(names.FINAL_SCALE, lambda scale, hook: torch.full_like(scale, 2.0))]):
        direct, gradient, integrated, knockout = (
            expert_attribution(case.model, case.tokens, Logit(5), method=method, selection=only).total()
            for method in ("direct", "gradient", "integrated", "knockout")
        )
    for other in (gradient, integrated, knockout):
        assert near(other, direct, F64)
    with_norm = expert_attribution(case.model, case.tokens, Logit(5), method="knockout", selection=only).total()
    assert not near(with_norm, direct, 0.01)


# --- what all methods share ---


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_is_a_baseline_too(method: Any) -> None:
    case = wrapped("deepseek", torch.float64)
    means = ExpertMeans.measure(case.model, some_tokens(8, 30, seed=5))
    metric = Loss(case.tokens)
    arguments: dict[str, Any] = {"method": method, "routing": "frozen", "per_position": False}
    found = expert_attribution(case.model, case.tokens, metric, baseline="mean", reference=means, **arguments)
    zero = expert_attribution(case.model, case.tokens, metric, **arguments)
    assert not near(found.values, zero.values, 0.1)
    layer = found.layers[-1]
    if method == "knockout":
        for expert in (1, 6):
            with torch.no_grad(), case.model.ablate({layer: [expert]}, how="mean", reference=means):
                without = metric(case.model(case.tokens))
            assert abs(found.values[-1, expert] - (found.clean - without)) <= F64
    if method == "integrated":
        assert found.difference is not None
        with torch.no_grad(), case.model.ablate(layers=[layer], how="mean", reference=means):
            without = metric(case.model(case.tokens))
        assert abs(found.difference[-1] - (found.clean - without)) <= F64
        assert near(found.values.sum(1), found.difference, F64, scale=1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_is_attributed_nothing(method: Any, side: str) -> None:
    case = wrapped("deepseek", torch.float64)
    alone, pad = case.tokens[:1, :8], torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat([alone, pad] if side == "right" else [pad, alone], 1)
    mask = torch.cat([torch.ones(1, 8), torch.zeros(1, 4)], 1)
    mask = (mask if side == "right" else mask.flip(-1)).long()
    expected = expert_attribution(case.model, alone, Loss(alone), method=method, per_position=True)
    found = expert_attribution(
        case.model, padded, Loss(padded, mask), method=method, per_position=True, attention_mask=mask
    )
    real = mask[0].bool()
    assert near(found.values[..., real], expected.values, 1e-10)
    assert torch.equal(found.count[..., real], expected.count)
    assert not found.values[..., ~real].any() and not found.count[..., ~real].any()
    shown: list[tuple[Tensor, dict[str, Any]]] = [(alone, {}), (padded, {"attention_mask": mask})]
    of_last = [expert_attribution(case.model, tokens, Logit(5), method=method, **about) for tokens, about in shown]
    assert near(of_last[1].values.sum(-1), of_last[0].values.sum(-1), 1e-10), "the last token is a real one"


@pytest.mark.parametrize("method", METHODS)
def test_a_selection_restricts_what_is_attributed(method: Any) -> None:
    case = wrapped("deepseek", torch.float64)
    metric = Loss(case.tokens)
    whole = expert_attribution(case.model, case.tokens, metric, method=method, per_position=True, routing="frozen")
    chosen = Selection(experts={2: [1, 4]}, where=range(3, 9))
    part = expert_attribution(
        case.model, case.tokens, metric, method=method, per_position=True, routing="frozen", selection=chosen
    )
    assert part.layers == (2,)
    inside = torch.zeros_like(part.values, dtype=torch.bool)
    inside[0, [1, 4], :, 3:9] = True
    assert not part.values[~inside].any() and not part.count[~inside].any()
    assert torch.equal(part.count[inside], whole.count[-1:][inside])
    if method != "integrated":  # whose way starts elsewhere
        assert near(part.values[inside], whole.values[-1:][inside], F64)
    rank = expert_attribution(
        case.model, case.tokens, metric, method=method, unit="rank", selection=Selection(ranks=[1])
    )
    assert rank.used()[:, 1].tolist() == [24, 24] and rank.used()[:, [0, 2]].sum() == 0


@pytest.mark.parametrize("method", METHODS)
def test_any_callable_is_a_metric(method: Any) -> None:
    """The same loss, once as a token metric whose rows are unembedded alone, once as a function of all logits."""
    case = wrapped("deepseek", torch.float64)

    def loss(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), case.tokens[:, 1:].flatten())

    own = expert_attribution(case.model, case.tokens, loss, method=method)
    built_in = expert_attribution(case.model, case.tokens, Loss(case.tokens), method=method)
    assert own.metric == "loss" and built_in.metric == "Loss"
    assert near(own.values, built_in.values, 1e-11)


def test_texts_are_an_input_like_tokens() -> None:
    model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
    text = "The old man looked at the sea"
    tokens = model.to_tokens(text)
    expected = expert_attribution(model, tokens, Loss(tokens)).values
    assert torch.equal(expert_attribution(model, text, Loss(tokens)).values, expected)


def test_a_divergence_has_no_slope_at_its_own_run() -> None:
    case = wrapped("deepseek", torch.float64)
    metric = KLDivergence(case.logits)
    for method in ("direct", "gradient"):
        with pytest.raises(InputError, match="no slope there"):
            expert_attribution(case.model, case.tokens, metric, method=method)
    knocked = expert_attribution(case.model, case.tokens, metric, method="knockout")
    assert (knocked.values[knocked.count > 0] < 0).all(), "every expert keeps the run what it is"
    found = expert_attribution(case.model, case.tokens, metric, method="integrated", routing="frozen", steps=32)
    assert found.difference is not None
    assert near(found.total().sum(1), found.difference, 1e-9)


@pytest.mark.typed
def test_results_are_tables_and_files(tmp_path: Path) -> None:
    case = wrapped("deepseek")
    for method in ("integrated", "knockout"):
        found = expert_attribution(case.model, case.tokens, Loss(case.tokens), method=method)
        frame = found.to_frame()
        assert len(frame) == int((found.count > 0).sum())
        assert list(frame.columns) == [
            "layer",
            "expert",
            *(["batch", "pos"] if method == "integrated" else []),
            "value",
            "count",
        ]
        one = frame.iloc[7]
        place = [found.layers.index(int(one["layer"])), *one[list(frame.columns[1:-2])].astype(int)]
        assert found.values[tuple(place)] == one["value"]
        assert found.count[tuple(place)] == one["count"]
        found.save(tmp_path / "found.safetensors")
        again = ExpertAttribution.load(tmp_path / "found.safetensors")
        assert repr(again) == repr(found) and again.clean == found.clean
        assert torch.equal(again.values, found.values) and torch.equal(again.count, found.count)
        assert (again.difference is None) == (found.difference is None)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "lrp"}, r"method is 'lrp'; expected one of \('direct', 'gradient'"),
        ({"routing": "fixed"}, r"routing is 'fixed'; expected one of \('free', 'frozen'"),
        ({"unit": "slot"}, r"unit is 'slot'; expected one of \('expert', 'rank'"),
        ({"steps": 0, "method": "integrated"}, "steps is 0; expected a whole number from 1"),
        ({"baseline": "mean"}, "baseline is 'mean' and reference NoneType"),
        ({"reference": "text"}, "baseline is 'zero' and reference str"),
        ({"selection": Selection(layers=[0])}, "layer 0 is dense; the layers with experts are 1, 2"),
        ({"selection": Selection(experts={1: [8]})}, "no expert 8 in layer 1; it has experts 0 to 7"),
        ({"selection": Selection(layers=[7])}, "no layer 7"),
        ({"selection": Selection(shared=True)}, "the selection means shared experts"),
        ({"steps": 8}, "steps=8 with method='gradient'"),
        ({"metric": lambda logits: logits}, "expected a floating-point scalar tensor"),
        ({"metric": lambda logits: logits.sum() * float("nan")}, "is nan; expected a finite number"),
        ({"metric": lambda logits: logits.argmax().double()}, "has no gradient"),
        ({"metric": lambda logits: logits.argmax().double(), "method": "direct"}, "has no gradient"),
        ({"metric": Loss(some_tokens(3))}, r"tokens of shape \(3, 12\); expected \(2, 12\)"),
    ],
)
def test_what_cannot_be_attributed_is_refused(arguments: dict[str, Any], says: str) -> None:
    case = wrapped("deepseek")
    with untouched(case.model), pytest.raises(InputError, match=says):
        expert_attribution(case.model, case.tokens, **{"metric": Loss(case.tokens), **arguments})


@pytest.mark.parametrize("method", ["direct", "gradient", "integrated"])
def test_gradients_cannot_be_had_in_inference_mode(method: Any) -> None:
    case = wrapped("deepseek")
    with pytest.raises(InputError, match="torch.inference_mode"), torch.inference_mode():
        expert_attribution(case.model, case.tokens, Loss(case.tokens), method=method)


def test_an_expert_without_a_mean_is_named() -> None:
    case = wrapped("deepseek")
    means = ExpertMeans.measure(case.model, case.tokens[:1, :2])
    with pytest.raises(InputError, match=r"expert \d of layer 1 has no mean"):
        expert_attribution(case.model, case.tokens, Loss(case.tokens), baseline="mean", reference=means)
    assert (
        expert_attribution(case.model, case.tokens, Loss(case.tokens), baseline="mean", reference=means.filled())
        .values.isfinite()
        .all()
    )


@pytest.mark.typed
def test_re_routing_needs_a_pair() -> None:
    case = wrapped("deepseek")
    free, frozen = (
        expert_attribution(case.model, case.tokens, Loss(case.tokens), routing=routing)
        for routing in ("free", "frozen")
    )
    assert not free.rerouting(frozen).values.any(), "an infinitesimal change re-routes nothing"
    with pytest.raises(InputError, match="expected 'free' and 'frozen'"):
        frozen.rerouting(free)
    direct = expert_attribution(case.model, case.tokens, Loss(case.tokens), method="direct", routing="frozen")
    with pytest.raises(InputError, match="method is 'gradient' here and 'direct' there"):
        free.rerouting(direct)
    other = expert_attribution(case.model, case.tokens.flip(1), Loss(case.tokens), routing="frozen")
    with pytest.raises(InputError, match="the two are of other inputs or selections"):
        free.rerouting(other)


@pytest.mark.slow
def test_the_guide_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / "attribution.md"), "attribution.md", "exec"), values)
    assert "torch.Size([5, 64, 1, 10])" in capsys.readouterr().out
    assert values["exact"].clean == pytest.approx(values["found"].clean)


@pytest.mark.typed
@pytest.mark.parametrize("method", ["gradient", "direct", "knockout"])
def test_experts_that_an_intervention_left_out_do_not_count(method: Any) -> None:
    case = wrapped("deepseek")
    model, tokens = case.model, case.tokens
    last = model.moe_layers[-1]
    before = expert_attribution(model, tokens, Logit(5), method=method).used()[-1]
    with model.ablate({last: [0, 1]}):
        found = expert_attribution(model, tokens, Logit(5), method=method)
    assert bool(before[:2].all()) and found.used()[-1].tolist() == [0, 0, *before[2:].tolist()]
    frame = found.to_frame()
    assert set(frame[frame.layer == last].expert) == set(before[2:].nonzero()[:, 0].add(2).tolist())
    with model.keep_top(1):
        of_ranks = expert_attribution(model, tokens, Logit(5), method=method, unit="rank").used()
    assert of_ranks.tolist() == [[tokens.numel(), 0, 0]] * len(model.moe_layers)
