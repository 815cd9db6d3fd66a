"""Patching against its definition by plain hooks, its identities, and what it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.interventions import expert_attribution, patching
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.metrics import Logit, LogitDifference, Loss
from moe_lens.interventions.patch_result import PatchResult
from moe_lens.interventions.patch_sites import SITES
from moe_lens.interventions.patching import patch
from moe_lens.selection import Selection
from tests.families import CONFIGS
from tests.matrix import configs
from tests.wrapped import untouched, wrapped

F64 = 1e-13  # relative to the largest logit
ROUNDS = 1e-6  # where a family rounds to float32 inside (in its norms or router): a last bit there may go either way
METRIC = LogitDifference(5, 6)
EXACT = ["deepseek", "mixtral", "qwen2_moe"]


def bound(family: str) -> float:
    return F64 if family in ("deepseek", "deepseek, normalised") else ROUNDS


def pair(family: str) -> tuple[Any, Tensor, Tensor]:
    """A model, a batch of two, and another that differs from its third token on."""
    case = wrapped(family, torch.float64)
    corrupted = case.tokens.clone()
    corrupted[:, 3:5] = (corrupted[:, 3:5] + 31) % 98 + 3
    return case.model, case.tokens, corrupted


class Naive:
    """Full forward passes with plain hooks, and tables of experts' contributions by id."""

    def __init__(self, model: Any, base: Tensor, source: Tensor):
        self.model, self.base = model, base
        with torch.no_grad():
            _, self.there = model.run_with_cache(source, names_filter=lambda name: ".attn." not in name)
            logits, self.here = model.run_with_cache(base, names_filter=lambda name: ".attn." not in name)
        self.value, self.scale = METRIC(logits).item(), logits.abs().max().item()

    def run(self, hooks: list[Any], frozen_from: int | None = None) -> float:
        frozen = []
        for layer in self.model.moe_layers if frozen_from is not None else ():
            if layer >= (frozen_from or 0):
                indices = self.here[names.mlp(names.EXPERT_INDICES, layer)]
                frozen.append((names.mlp(names.EXPERT_INDICES, layer), lambda v, hook, indices=indices: indices))
        with torch.no_grad():
            return METRIC(self.model.run_with_hooks(self.base, fwd_hooks=frozen + hooks)).item()

    def put(self, name: str, pos: int | None) -> tuple[str, Any]:
        """The source's activation at a position."""

        def put(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            at = slice(None) if pos is None else pos
            value[:, at] = self.there[name][:, at]
            return value

        return name, put

    def table(self, which: str, run: Any, layer: int) -> tuple[Tensor, Tensor]:
        """A value per expert [batch, pos, n_experts, d_model], zero where it was not chosen; and who was."""
        indices, value = run[names.mlp(names.EXPERT_INDICES, layer)], run[names.mlp(which, layer)]
        dense = value.new_zeros(*indices.shape[:2], self.model.n_experts, value.shape[-1])
        chosen = torch.zeros(*indices.shape[:2], self.model.n_experts, dtype=torch.bool)
        for slot in range(indices.shape[-1]):
            for b in range(indices.shape[0]):
                for p in range(indices.shape[1]):
                    dense[b, p, indices[b, p, slot]] = value[b, p, slot]
                    chosen[b, p, indices[b, p, slot]] = True
        return dense, chosen

    def add(self, layer: int, delta: Tensor) -> float:
        return self.run([(names.mlp(names.ROUTED_OUT, layer), lambda value, hook: value + delta)])


STREAMS = {
    "resid_pre": names.RESID_PRE,
    "resid_mid": names.RESID_MID,
    "resid_post": names.RESID_POST,
    "attn_out": names.ATTN_OUT,
    "mlp_out": names.BLOCK_MLP_OUT,
}
PARTS = {
    "routed_out": names.ROUTED_OUT,
    "shared_out": names.SHARED_OUT,
    "expert_weighted": names.EXPERT_WEIGHTED,
    "expert_out": names.EXPERT_OUT,
    "router_logits": names.ROUTER_LOGITS,
}


@pytest.mark.parametrize(
    ("family", "site"),
    [("deepseek", site) for site in SITES]
    + [(family, site) for family in CONFIGS for site in ("resid_mid", "shared_out", "expert_out", "routing")][4:],
)
def test_a_patch_over_layers_and_positions_is_a_hook_in_a_full_pass(family: str, site: str):
    model, clean, corrupted = pair(family)
    if site == "shared_out" and not model.has_shared(model.moe_layers[0]):
        with pytest.raises(InputError, match="this model has no shared_out; the layers that have it are none"):
            patch(model, clean, corrupted, site, METRIC)
        return
    with untouched(model):
        result = patch(model, clean, corrupted, site, METRIC)
    naive = Naive(model, corrupted, clean)
    assert result.corrupted == naive.value
    assert result.axes["layer"] == (tuple(range(3)) if site in STREAMS else model.moe_layers)
    for layer, row in zip(result.axes["layer"], result.values, strict=True):
        for pos in (2, 4, 11) if family == "deepseek" else (4,):
            if site == "routing":
                sites = [names.mlp(n, layer) for n in (names.EXPERT_INDICES, names.ROUTING_WEIGHTS)]
            else:
                sites = [names.block(STREAMS[site], layer) if site in STREAMS else names.mlp(PARTS[site], layer)]
            expected = naive.run([naive.put(name, pos) for name in sites])
            assert abs(row[pos].item() - expected) <= bound(family) * naive.scale, (layer, pos)
    assert (result.values[:, :3] - result.corrupted).abs().max() <= bound(family) * naive.scale, "same tokens"


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_the_same_expert_is_the_one_with_the_same_id(family: str, direction: Any):
    model, clean, corrupted = pair(family)
    base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    naive = Naive(model, base, source)
    weighted = patch(model, clean, corrupted, "expert_weighted", METRIC, over=("layer", "expert"), direction=direction)
    single = patch(
        model, clean, corrupted, "expert_weighted", METRIC, over=("layer", "expert", "pos"), direction=direction
    )
    output = patch(model, clean, corrupted, "expert_out", METRIC, over=("layer", "expert"), direction=direction)
    gained = lost = 0
    for row, layer in enumerate(model.moe_layers):
        there, chosen_there = naive.table(names.EXPERT_WEIGHTED, naive.there, layer)
        here, chosen_here = naive.table(names.EXPERT_WEIGHTED, naive.here, layer)
        gained += int((chosen_there & ~chosen_here).sum())
        lost += int((chosen_here & ~chosen_there).sum())
        outputs_there, _ = naive.table(names.EXPERT_OUT, naive.there, layer)
        outputs_here, _ = naive.table(names.EXPERT_OUT, naive.here, layer)
        routing = naive.here
        slots = routing[names.mlp(names.ROUTING_WEIGHTS, layer)][..., None].expand(-1, -1, -1, 1)
        weights = naive.table(names.ROUTING_WEIGHTS, _with(routing, layer, slots), layer)[0]
        for expert in range(model.n_experts):
            delta = (there - here)[:, :, expert]
            expected = naive.add(layer, delta)
            assert abs(weighted.values[row, expert].item() - expected) <= bound(family) * naive.scale
            both = (chosen_there & chosen_here)[:, :, expert, None]
            delta = torch.where(both, weights[:, :, expert] * (outputs_there - outputs_here)[:, :, expert], 0)
            assert abs(output.values[row, expert].item() - naive.add(layer, delta)) <= bound(family) * naive.scale
        expert = int(chosen_there[0, 4].nonzero()[0])
        delta = torch.zeros_like(there[:, :, 0])
        delta[:, 4] = (there - here)[:, 4, expert]
        assert abs(single.values[row, expert, 4].item() - naive.add(layer, delta)) <= bound(family) * naive.scale
    assert gained, "the two inputs route differently, or nothing is shown"
    assert lost


def _with(cache: Any, layer: int, weights: Tensor) -> dict[str, Tensor]:
    at = {n: cache[names.mlp(n, layer)] for n in (names.EXPERT_INDICES,)}
    return {names.mlp(n, layer): v for n, v in (at | {names.ROUTING_WEIGHTS: weights}).items()}


@pytest.mark.parametrize("family", EXACT)
def test_a_rank_is_a_slot_whatever_its_expert(family: str):
    model, clean, corrupted = pair(family)
    naive = Naive(model, corrupted, clean)
    for site in ("expert_weighted", "expert_out"):
        result = patch(model, clean, corrupted, site, METRIC, over=("layer", "rank"))
        for row, layer in enumerate(model.moe_layers):
            name = names.mlp(PARTS[site], layer)
            for rank in range(model.top_k):

                def one(value: Tensor, hook: Any, rank: int = rank) -> Tensor:
                    value = value.clone()
                    value[:, :, rank] = naive.there[hook.name][:, :, rank]
                    return value

                assert abs(result.values[row, rank].item() - naive.run([(name, one)])) <= bound(family) * naive.scale
    together = patch(model, clean, corrupted, "expert_weighted", METRIC, over=("layer",))
    routed = patch(model, clean, corrupted, "routed_out", METRIC, over=("layer",))
    assert (together.values - routed.values).abs().max() <= bound(family) * naive.scale
    chosen = patch(
        model, clean, corrupted, "expert_weighted", METRIC, over=("layer",), selection=Selection(ranks=[0, 1])
    )
    assert not torch.equal(chosen.values, together.values)


@pytest.mark.typed
def test_single_router_logits_are_patched_and_the_router_chooses_again():
    model, clean, corrupted = pair("deepseek")
    naive = Naive(model, corrupted, clean)
    result = patch(model, clean, corrupted, "router_logits", METRIC, over=("layer", "expert"))
    for row, layer in enumerate(model.moe_layers):
        name = names.mlp(names.ROUTER_LOGITS, layer)
        for expert in range(model.n_experts):

            def one(value: Tensor, hook: Any, expert: int = expert) -> Tensor:
                value = value.clone()
                value[..., expert] = naive.there[hook.name][..., expert]
                return value

            assert abs(result.values[row, expert].item() - naive.run([(name, one)])) <= F64 * naive.scale


@pytest.mark.parametrize("family", ["deepseek", "deepseek_v3", "gpt_oss"])
def test_frozen_routing_keeps_the_experts_of_the_base(family: str):
    model, clean, corrupted = pair(family)
    naive = Naive(model, corrupted, clean)
    frozen = patch(model, clean, corrupted, "resid_mid", METRIC, routing="frozen")
    free = patch(model, clean, corrupted, "resid_mid", METRIC)
    for layer in range(3):
        for pos in (3, 4):
            expected = naive.run([naive.put(names.block(names.RESID_MID, layer), pos)], frozen_from=layer)
            assert abs(frozen.values[layer, pos].item() - expected) <= bound(family) * naive.scale
    assert (frozen.values - free.values).abs().max() > 1e-4, "routing changes on the way, or nothing is shown"


@pytest.mark.parametrize(
    ("family", "direction"), [(f, ("denoising", "noising")[i % 2]) for i, f in enumerate([*CONFIGS, "deepseek"], 1)]
)
def test_the_whole_stream_carries_everything(family: str, direction: Any):
    model, clean, corrupted = pair(family)
    whole = patch(model, clean, corrupted, "resid_post", METRIC, over=("layer",), direction=direction)
    end = whole.clean if direction == "denoising" else whole.corrupted
    scale = abs(whole.clean) + abs(whole.corrupted)
    assert abs(whole.clean - whole.corrupted) > 1e-3
    assert (whole.values - end).abs().max() <= bound(family) * scale
    assert (whole.effect - 1).abs().max() <= bound(family) * scale / abs(whole.clean - whole.corrupted)
    last = patch(model, clean, corrupted, "resid_post", METRIC, direction=direction).values[-1]
    assert abs(last[-1].item() - end) <= bound(family) * scale, "the metric reads the last position"
    other = whole.corrupted if direction == "denoising" else whole.clean
    assert (last[:-1] - other).abs().max() <= bound(family) * scale, "and no other, after the last block"


@pytest.mark.typed
@pytest.mark.parametrize("model_type", ["nemotron_h", "cohere2_moe"])
def test_layers_that_lack_a_site_are_left_out_and_the_others_patched(model_type: str):
    """Layers of `nemotron_h` mix positions or are MLPs; `cohere2_moe` has no stream between attention and experts."""
    model = HookedMoE.from_hf(configs.build(model_type, torch.float64), check=False)
    clean, corrupted = configs.tokens(1, 8), configs.tokens(1, 8).clone()
    corrupted[:, 3] = 50
    naive = Naive(model, corrupted, clean)
    for site in ("resid_post", "mlp_out"):
        found = patch(model, clean, corrupted, site, METRIC, over=("layer",))
        for layer, value in zip(found.axes["layer"], found.values, strict=True):
            expected = naive.run([naive.put(SITES[site].names(layer)[0], None)])
            assert abs(value.item() - expected) <= ROUNDS * naive.scale
        assert not torch.equal(found.values, torch.full_like(found.values, naive.value))
    layer = model.moe_layers[-1]
    knocked = expert_attribution(model, corrupted, METRIC, method="knockout", selection=Selection(layers=[layer]))
    delta, _ = naive.table(names.EXPERT_WEIGHTED, naive.here, layer)
    for expert in knocked.used()[0].nonzero()[:, 0].tolist():
        without = naive.add(layer, -delta[:, :, expert])
        assert abs(knocked.values[0, expert].item() - (naive.value - without)) <= ROUNDS * naive.scale
    lacking = ("attn_out", model.moe_layers[0]) if model_type == "nemotron_h" else ("resid_mid", 0)
    with pytest.raises(InputError, match=f"layer {lacking[1]} has no {lacking[0]}; the layers that have it are"):
        patch(model, clean, corrupted, lacking[0], METRIC, over=("layer",), selection=Selection(layers=[lacking[1]]))


def test_a_run_patched_with_itself_is_itself(monkeypatch: pytest.MonkeyPatch):
    model, clean, _ = pair("deepseek")
    seen: list[int] = []
    original = patching.sweep
    monkeypatch.setattr(patching, "sweep", lambda *a, **k: (seen.append(len(a[2])), original(*a, **k))[1])
    for site in SITES:
        result = patch(model, clean, clean, site, METRIC, over=("layer",))
        assert torch.equal(result.values, torch.full_like(result.values, result.clean))
        assert result.effect.isnan().all()
    assert seen == [0] * len(SITES), "nothing had to run"


def test_layers_that_do_not_add_their_mlp_as_it_is_give_the_same(monkeypatch: pytest.MonkeyPatch):
    """Families with a norm or a factor behind the MLP cannot start behind the block; the block is then run."""
    model, clean, corrupted = pair("deepseek")
    sites = ("expert_weighted", "expert_out", "mlp_out", "shared_out")
    quick = [patch(model, clean, corrupted, site, METRIC, over=("layer",)).values for site in sites]
    of = CleanRun.of
    assert of(model, clean).direct == {0, 1, 2}
    monkeypatch.setattr(CleanRun, "of", lambda *a, **k: replace(of(*a, **k), direct=frozenset()))
    slow = [patch(model, clean, corrupted, site, METRIC, over=("layer",)).values for site in sites]
    for one, other in zip(quick, slow, strict=True):
        assert (one - other).abs().max() <= F64 * 10
        assert one.std() > 1e-4


def test_selections_restrict_what_is_patched():
    model, clean, corrupted = pair("deepseek")
    whole = patch(model, clean, corrupted, "expert_weighted", METRIC, over=("layer", "expert", "pos"))
    some = patch(
        model, clean, corrupted, "expert_weighted", METRIC, over=("layer", "expert", "pos"),
        selection=Selection(experts={2: [1, 5]}, where=slice(3, 7)),
    )  # fmt: skip
    assert some.axes == {"layer": (2,), "expert": (1, 5), "pos": (3, 4, 5, 6)}
    assert torch.equal(some.values, whole.values[1:2, [1, 5]][:, :, 3:7])
    joint = patch(
        model, clean, corrupted, "expert_weighted", METRIC, over=("layer",), selection=Selection(experts={2: range(8)})
    )
    routed = patch(model, clean, corrupted, "routed_out", METRIC, over=("layer",), selection=Selection(layers=[2]))
    assert (joint.values - routed.values).abs().max() <= F64 * 10


def test_padding_is_never_patched():
    model, clean, corrupted = pair("deepseek")
    mask = torch.tensor([[0] * 4 + [1] * 8, [1] * 12])
    result = patch(model, clean, corrupted, "resid_post", Loss(clean, mask), over=("layer",), attention_mask=mask)
    assert (result.values - result.clean).abs().max() <= F64 * 10, "what differs in padding alone is not read"
    one = patch(model, clean[:1], corrupted[:1], "resid_pre", METRIC, attention_mask=mask[:1])
    assert one.axes["pos"] == tuple(range(4, 12))
    right, short = mask.flip(-1), clean[:1, :8]
    padded = patch(model, clean[:1], corrupted[:1], "resid_mid", Logit(3), over=("layer",), attention_mask=right[:1])
    alone = patch(model, short, corrupted[:1, :8], "resid_mid", Logit(3), over=("layer",))
    assert (padded.values - alone.values).abs().max() <= F64 * 10, "the last token is a real one"


@pytest.mark.typed
def test_results_go_to_frames_and_files(tmp_path: Path):
    model, clean, corrupted = pair("deepseek")
    result = patch(model, clean, corrupted, "expert_weighted", METRIC, over=("layer", "expert"))
    frame = result.to_frame()
    assert list(frame.columns) == ["layer", "expert", "value", "effect"]
    row = frame[(frame["layer"] == 2) & (frame["expert"] == 5)].iloc[0]
    assert row["value"] == result.values[1, 5].item()
    assert row["effect"] == pytest.approx((row["value"] - result.corrupted) / (result.clean - result.corrupted))
    result.save(tmp_path / "patch.safetensors")
    loaded = PatchResult.load(tmp_path / "patch.safetensors")
    assert torch.equal(loaded.values, result.values)
    assert {**vars(loaded), "values": 0} == {**vars(result), "values": 0}
    assert repr(loaded) == "PatchResult(expert_weighted, denoising, LogitDifference: 2 layer × 8 expert, n = 2)"
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        PatchResult.load(tmp_path / "other")


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": "residual"}, r"there is no site 'residual'; expected one of resid_pre, .*routing"),
        ({"over": ("layer", "expert")}, r"resid_post cannot be swept over \('layer', 'expert'\); expected one of"),
        ({"over": ("pos",)}, "cannot be swept over"),
        ({"direction": "sideways"}, r"direction is 'sideways'; expected one of \('denoising', 'noising'\)"),
        ({"routing": "loose"}, r"routing is 'loose'; expected one of \('free', 'frozen'\)"),
        ({"selection": Selection(layers=[9])}, "there is no layer 9; the model has layers 0 to 2"),
        ({"selection": Selection(experts={2: [1]})}, "the selection names experts, and resid_post has none"),
        ({"selection": Selection(shared=True)}, "shared_out"),
        ({"site": "expert_out", "selection": Selection(layers=[0])}, "layer 0 is dense"),
        (
            {"site": "expert_out", "over": ["layer", "rank"], "selection": Selection(experts={1: [0]})},
            "the selection names experts, and the sweep goes over ranks",
        ),
        ({"metric": lambda logits: logits.sum(-1)}, "expected a floating-point scalar"),
        ({"metric": lambda logits: logits.sum() * torch.nan}, "expected a finite number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"corrupted": torch.full((2, 11), 5)}, r"clean has 2 × 12 tokens and corrupted 2 × 11"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str):
    model, clean, corrupted = pair("deepseek")
    call: dict[str, Any] = {"corrupted": corrupted, "site": "resid_post", "metric": METRIC, **changes}
    with untouched(model), pytest.raises(InputError, match=message):
        patch(model, clean, **call)


EDITED = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "mlp.hook_routed_out", "mlp.hook_out", "hook_resid_post")
ADDED = ("routed_out", "mlp_out")
"""Sites from which a sweep adds to what the layer adds."""


@pytest.mark.parametrize("edited", [*EDITED, "next"])
@pytest.mark.parametrize("site", ["resid_pre", "attn_out", *ADDED, "resid_post"])
def test_edits_that_are_in_place_act_once_and_on_what_is_patched(edited: str, site: str) -> None:
    """A steering vector at one position, and a factor at all: neither may act twice, nor be bypassed."""
    model, clean, corrupted = pair("deepseek")
    layer, pos = model.moe_layers[0], 4
    edit = names.block(names.RESID_PRE, layer + 1) if edited == "next" else f"blocks.{layer}.{edited}"

    def steer(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        value = 1.5 * value
        value[:, pos] = -value[:, pos]
        return value

    with untouched(model), model.hooks(fwd_hooks=[(edit, steer)]), torch.no_grad():
        if site == "routed_out" and edited == "mlp.hook_out":
            with pytest.raises(InputError, match="hook at blocks.1.mlp.hook_out, and .* at hook_routed_out"):
                patch(model, clean, corrupted, site, METRIC)
            return
        found = patch(model, clean, corrupted, site, METRIC)
        naive = Naive(model, corrupted, clean)
        right = naive.run([naive.put(SITES[site].names(layer)[0], pos)])
    value = found.values[found.axes["layer"].index(layer), found.axes["pos"].index(pos)].item()
    assert abs(value - right) <= F64 * naive.scale
    unpatched = naive.value
    with torch.no_grad():
        plain = METRIC(model(corrupted)).item()
    assert abs(plain - unpatched) > 1e-6  # the edit acts


def test_what_an_edit_takes_away_an_expert_cannot_give() -> None:
    model, clean, _ = pair("deepseek")
    layer = model.moe_layers[0]
    only = Selection(layers=[layer])

    def gone(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        value = value.clone()
        value[:, 2] = 0
        return value

    with model.hooks(fwd_hooks=[(names.block(names.RESID_POST, layer), gone)]):
        found = expert_attribution(model, clean, METRIC, method="knockout", per_position=True, selection=only)
        with pytest.raises(InputError, match="a sweep adds to its output what changes at hook_expert_weighted"), \
             model.hooks(fwd_hooks=[(names.mlp(names.ROUTED_OUT, layer), gone)]):  # fmt: skip
            expert_attribution(model, clean, METRIC, method="knockout", selection=only)
    values = found.values.flatten(0, 1)
    assert values[..., 1].any() and values[..., 2].abs().max() <= F64
