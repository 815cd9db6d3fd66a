"""The study of attributions: its numbers against full forward passes, its statistics against their definitions."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from moe_lens import HookedMoE, names
from moe_lens.data import Reading, TokenBatch, embedded_domains
from moe_lens.errors import InputError
from moe_lens.stats import Result
from moe_lens.studies.attribution_effects import (
    MEASURES,
    METHODS,
    EffectResult,
    EffectStats,
    correlation,
    overlap,
    pooled,
    ranked,
)
from moe_lens.studies.attribution_fidelity import AttributionFidelity, effects
from moe_lens.studies.run_study import run
from tests.families import build
from tests.families import tokens as some_tokens

F64 = 1e-11
"""Nats, summed over a text: some thousand roundings in float64."""


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    hf = build("deepseek", torch.float64)
    return HookedMoE.from_hf(hf, check=False)


def batch() -> TokenBatch:
    lengths = torch.tensor([12, 7, 9])
    mask = torch.arange(12) < lengths[:, None]
    counted = mask.clone()
    counted[:, 0] = counted[0, 4] = False  # a special token within a text is read, and not counted
    return TokenBatch(some_tokens(3) * mask, mask, counted, ("a", "b", "a"))


def nats(model: HookedMoE, hooks: list[Any]) -> Tensor:
    """Loss of each text of the batch, summed over its tokens."""
    of = batch()
    with torch.no_grad():
        logits = model.run_with_hooks(of.tokens, fwd_hooks=hooks, attention_mask=of.mask.long())
    found = -log_softmax(logits[:, :-1], -1).gather(-1, of.tokens[:, 1:, None])[..., 0]
    return (found * of.counted[:, 1:]).sum(1)


def test_effects_are_those_of_full_forward_passes_by_text(model: HookedMoE) -> None:
    of = batch()
    found, counts, tokens = effects(model, of, steps=16)
    assert found.shape == (3, len(MEASURES), 2, 8)
    assert tokens.tolist() == [10, 6, 8]
    routing = model.routing(of.tokens, attention_mask=of.mask.long())
    clean = nats(model, [])
    last = names.block(names.RESID_POST, 2)
    _, cache = model.run_with_cache(
        of.tokens, attention_mask=of.mask.long(), names_filter=lambda name: "expert" in name
    )
    for row, layer in enumerate(model.moe_layers):
        indices = routing.layer(layer).indices
        behind: list[Any] = [
            (names.mlp(names.EXPERT_INDICES, at), lambda value, hook, at=at: routing.layer(at).indices)
            for at in model.moe_layers
            if at > layer
        ]
        for expert in (0, 3, 6):
            chosen = (indices == expert) & of.mask[..., None]
            assert counts[:, row, expert].tolist() == chosen.sum((1, 2)).tolist()
            part = cache.expert_out(layer, expert=expert, weighted=True).values

            def out(weighted: Tensor, hook: Any, chosen: Tensor = chosen) -> Tensor:
                return weighted * ~chosen[..., None]

            knocked: list[Any] = [(names.mlp(names.EXPERT_WEIGHTED, layer), out)]
            expected = {
                "knockout": nats(model, knocked) - clean,
                "knockout_frozen": nats(model, [*knocked, *behind]) - clean,
                "direct_knockout": nats(model, [(last, lambda resid, hook, part=part: resid - part)]) - clean,
                "norm": part.norm(dim=-1).sum(-1),
                "frequency": chosen.sum((1, 2)).double(),
            }
            for name, value in expected.items():
                assert (found[:, MEASURES.index(name), row, expert] - value).abs().max() <= F64, name
    # A gradient is the slope of the loss of all texts along one contribution.
    step, layer = 1e-5, model.moe_layers[0]
    chosen = (routing.layer(layer).indices == 3) & of.mask[..., None]

    def along(scale: float) -> Tensor:
        hook: Any = (
            names.mlp(names.EXPERT_WEIGHTED, layer),
            lambda w, hook: w * (1 + scale * chosen.double()[..., None]),
        )
        return nats(model, [hook])

    slope = -(along(step) - along(-step)) / (2 * step)
    assert (found[:, MEASURES.index("gradient"), 0, 3] - slope).abs().max() <= 1e-7
    assert slope.abs().max() > 1e-3
    # Integrated gradients of a layer sum to what the layer's experts save together.
    for row, layer in enumerate(model.moe_layers):
        gone: Any = (names.mlp(names.ROUTED_OUT, layer), lambda value, hook: value * 0)
        behind = [
            (names.mlp(names.EXPERT_INDICES, at), lambda value, hook, at=at: routing.layer(at).indices)
            for at in model.moe_layers
            if at > layer
        ]
        together = nats(model, [gone, *behind]) - clean
        assert abs(found[:, MEASURES.index("integrated"), row].sum() - together.sum()) <= 1e-9


def test_sums_are_kept_by_source(model: HookedMoE) -> None:
    of = batch()
    stats = EffectStats(model.moe_layers, model.n_experts)
    found = effects(model, of, steps=4)
    result = stats.update(*found, of.sources).result()
    assert result.sources == ("a", "b") and result.tokens.tolist() == [18, 6]
    assert torch.equal(result.effects[0], found[0][0] + found[0][2])
    assert torch.equal(result.counts[1], found[1][1])
    other = EffectStats(model.moe_layers, model.n_experts).load_state_dict(stats.state_dict()).merge(stats).result()
    assert torch.equal(other.effects, 2 * result.effects)
    frame: Any = result.to_frame()
    assert len(frame) == int(result.active.sum())
    first = frame.iloc[0]
    expected = float(result.total("knockout")[0, int(first["expert"])]) / 24
    assert first["knockout"] == pytest.approx(expected, rel=1e-12)


def made(n_sources: int = 12, seed: int = 0) -> EffectResult:
    """Two layers of twenty experts; the gradient is the knock-out with noise, the norm is unrelated."""
    generator = torch.Generator().manual_seed(seed)
    effects = torch.randn(n_sources, len(MEASURES), 2, 20, dtype=torch.float64, generator=generator)
    truth = torch.randn(2, 20, dtype=torch.float64, generator=generator) * 3
    for name, noise in (("knockout", 0.1), ("knockout_frozen", 0.1), ("gradient", 1.0), ("integrated", 0.2)):
        at = MEASURES.index(name)
        effects[:, at] = truth + noise * effects[:, at]
    counts = torch.randint(0, 3, (n_sources, 2, 20), generator=generator)
    counts[:, 1, 5:] = 0
    effects[(counts == 0)[:, None].expand_as(effects)] = 0
    return EffectResult(tuple(f"s{i}" for i in range(n_sources)), (1, 4), torch.full((n_sources,), 50), counts, effects)


def test_agreement_is_what_pandas_and_sets_say() -> None:
    result = made()
    frame: Any = result.fidelity(resamples=50)
    assert len(frame) == 3 * (2 * len(METHODS) + 1)
    for layer, at in ((None, slice(None)), (1, slice(0, 1)), (4, slice(1, 2))):
        active = result.active[at].flatten()
        of = frame[frame["layer"].isna() if layer is None else frame["layer"] == layer]
        assert set(of["pairs"]) == {int(active.sum())} and set(of["sources"]) == {12}
        for _, row in of.iterrows():
            x, y = (pd.Series(result.total(row[c])[at].flatten()[active].numpy()) for c in ("method", "reference"))
            # Spearman by definition: Pearson of mean ranks.
            assert row["spearman"] == pytest.approx(np.corrcoef(x.rank(), y.rank())[0, 1], abs=1e-12)
            assert row["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
            best = [set(v.nlargest(10).index) for v in (x, y)]
            assert row["top10"] == len(best[0] & best[1]) / min(10, len(x))
            for name in ("spearman", "pearson", "top10"):
                assert row[f"{name}_low"] <= row[f"{name}_high"]
    whole = frame[frame["layer"].isna()].set_index(["method", "reference"])["spearman"]
    assert whole["integrated", "knockout"] > whole["gradient", "knockout"] > whole["norm", "knockout"]
    assert whole["integrated", "knockout"] > 0.9 and abs(whole["norm", "knockout"]) < 0.5


def test_intervals_resample_sources_and_need_ten_of_them() -> None:
    """A wild source widens the interval; more sources of the same kind make it narrower; nine have none."""
    column = ["spearman_low", "spearman_high"]

    def width(result: EffectResult) -> float:
        frame: Any = result.fidelity(resamples=200).set_index(["layer", "method", "reference"])
        low, high = frame.loc[(pd.NA, "gradient", "knockout"), column].astype(float)
        return high - low

    assert 0 < width(made(80)) < width(made(12))
    few: Any = made(9).fidelity(resamples=20)
    assert few[column].isna().all().all()


def test_ranks_share_ties_and_leave_out_what_is_not_active() -> None:
    values = torch.tensor([[3.0, 1.0, 3.0, 9.0], [1.0, 2.0, 3.0, 4.0]]).double()
    active = torch.tensor([[True, True, True, False], [True] * 4])
    assert ranked(values, active).tolist() == [[2.5, 1.0, 2.5, 0.0], [1.0, 2.0, 3.0, 4.0]]
    other = torch.tensor([[1.0, 0.0, 1.0, -50.0], [4.0, 3.0, 2.0, 1.0]]).double()
    assert torch.allclose(correlation(values, other, active), torch.tensor([1.0, -1.0]).double(), atol=1e-12)
    assert correlation(values, torch.ones_like(values), active).isnan().all()
    many = torch.arange(40.0).double().view(2, 20)
    assert overlap(many, -many, torch.ones(2, 20, dtype=torch.bool)).tolist() == [0, 0]
    assert overlap(many, many.roll(1, 1), torch.ones(2, 20, dtype=torch.bool)).tolist() == [0.9, 0.9]


def test_re_routing_is_free_minus_frozen() -> None:
    result = made()
    frame: Any = result.rerouting()
    free, frozen = result.total("knockout")[0], result.total("knockout_frozen")[0]
    of = result.active[0]
    assert frame["difference"][0] == pytest.approx(float((free - frozen)[of].abs().mean()) / 600)
    assert frame["share"][0] == pytest.approx(frame["difference"][0] / frame["free"][0])
    assert list(frame["layer"]) == [1, 4]


def test_domains_are_pooled_source_by_source(tmp_path: Path) -> None:
    one, two = made(seed=1), made(seed=2)
    both = pooled([one, two])
    assert len(both.sources) == len(set(both.sources)) == 24
    assert torch.allclose(both.total("knockout"), one.total("knockout") + two.total("knockout"))
    with pytest.raises(InputError, match="cannot be pooled"):
        pooled([one, EffectResult(two.sources, (1, 2), two.tokens, two.counts, two.effects)])
    both.save(tmp_path / "effects.safetensors")
    again = EffectResult.load(tmp_path / "effects.safetensors")
    assert again.sources == both.sources and again.layers == both.layers
    assert torch.equal(again.effects, both.effects)


@pytest.mark.typed
def test_the_study_reads_texts_and_keeps_its_result(tmp_path: Path) -> None:
    model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
    domains = embedded_domains()[:2]
    out = tmp_path / "found"
    arguments: dict[str, Any] = {"reading": Reading(tokens=24, context=12), "out": out, "command": "test"}
    result = run(AttributionFidelity(steps=2), model, domains, **arguments)
    assert set(result.tables) == {"experts", "fidelity", "rerouting"}
    assert set(result.tables["fidelity"]["domain"]) == {"english", "french", "all"}
    kept: Result = result.results["english"]["effects"]
    assert isinstance(kept, EffectResult)
    assert kept.active.any() and kept.effects.isfinite().all()
    again = run(AttributionFidelity(steps=2), model, domains, **arguments)
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)
    with pytest.raises(InputError, match="steps is 0"):
        run(AttributionFidelity(steps=0), model, domains)
