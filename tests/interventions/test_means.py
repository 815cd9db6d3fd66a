"""Mean outputs of experts: the definition, and every way to them."""

import re
from pathlib import Path

import pytest
import torch

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.interventions.expert_means import ExpertMeans, ExpertSums
from moe_lens.lenses.token_rows import rows
from tests.families import tokens
from tests.wrapped import wrapped

TEXTS = tokens(5, 9, seed=4)


def test_the_mean_of_an_expert_is_over_its_own_tokens() -> None:
    case = wrapped("deepseek")
    means = ExpertMeans.measure(case.model, TEXTS)
    with torch.no_grad():
        _, cache = case.model.run_with_cache(TEXTS, names_filter=lambda name: ".mlp.hook_" in name)
    assert means.layers == (1, 2)
    for layer in means.layers:
        for expert in range(8):
            rows = cache["expert_out", layer][cache["expert_indices", layer] == expert]
            row = means.layers.index(layer)
            assert int(means.counts[row, expert]) == len(rows)
            if len(rows):
                assert torch.allclose(means.of(layer)[expert], rows.double().mean(0).float(), atol=1e-6)
            else:
                assert means.of(layer)[expert].isnan().all()
        assert torch.allclose(means.shared_of(layer), cache["shared_out", layer].flatten(0, 1).mean(0), atol=1e-6)
    of_cache = ExpertMeans.of_cache(cache)
    assert torch.equal(of_cache.counts, means.counts)
    assert torch.allclose(of_cache.experts, means.experts, atol=1e-6, equal_nan=True)


def test_padding_is_not_counted() -> None:
    case = wrapped("deepseek")
    padded = torch.cat([TEXTS[:2], torch.zeros(2, 3, dtype=torch.long)], 1)
    mask = torch.tensor([[1] * 9 + [0] * 3] * 2)
    with torch.no_grad():
        _, cache = case.model.run_with_cache(padded, attention_mask=mask, names_filter=lambda name: "mlp.hook_" in name)
    found, expected = ExpertMeans.of_cache(cache), ExpertMeans.measure(case.model, TEXTS[:2])
    assert torch.equal(found.counts, expected.counts)
    assert torch.allclose(found.experts, expected.experts, atol=1e-5, equal_nan=True)


@pytest.mark.typed
@pytest.mark.parametrize("kept", [True, False])
def test_what_an_intervention_leaves_out_is_no_output(kept: bool) -> None:
    """An expert that `keep_top` or `use_experts` left out at a token gave nothing there, not zero."""
    case = wrapped("deepseek")
    hooks = ["expert_out", "expert_indices", "shared_out"] + ["expert_kept"] * kept
    hooks = [f"blocks.{layer}.mlp.hook_{name}" for layer in (1, 2) for name in hooks]
    for made in (case.model.keep_top(2), case.model.use_experts(mass=0.6), case.model.ablate({1: [3]})):
        with torch.no_grad(), made:
            _, cache = case.model.run_with_cache(TEXTS)
            _, few = case.model.run_with_cache(TEXTS, names_filter=hooks)
            measured = ExpertMeans.measure(case.model, TEXTS)
        found, dropped = ExpertMeans.of_cache(few), 0
        for row, layer in enumerate(found.layers):
            weights = cache["routing_weights", layer]
            for expert in range(8):
                chosen = cache["expert_indices", layer] == expert
                used = chosen & (weights != 0)
                dropped += int((chosen & ~used).sum())
                assert int(found.counts[row, expert]) == int(measured.counts[row, expert]) == int(used.sum())
                if used.any():
                    expected = cache["expert_out", layer][used].double().mean(0).float()
                    for means in (found, measured):
                        assert torch.allclose(means.of(layer)[expert], expected, atol=1e-5)
        assert torch.allclose(found.shared_of(1), cache["shared_out", 1].flatten(0, 1).mean(0), atol=1e-5)
        assert dropped or "mass" in repr(made)


@pytest.mark.typed
def test_experts_without_tokens_get_the_layer_s_mean_when_asked() -> None:
    case = wrapped("deepseek")
    means = ExpertMeans.measure(case.model, TEXTS[:1, :2])
    with torch.no_grad():
        _, cache = case.model.run_with_cache(TEXTS[:1, :2], names_filter=lambda name: ".mlp.hook_" in name)
    unseen = means.counts == 0
    assert unseen.any()
    filled = means.filled()
    for row, layer in enumerate(means.layers):
        mean = cache["expert_out", layer].flatten(0, 2).mean(0)
        assert torch.allclose(filled.of(layer)[unseen[row]], mean.expand_as(filled.of(layer)[unseen[row]]), atol=1e-6)
        assert torch.equal(filled.of(layer)[~unseen[row]], means.of(layer)[~unseen[row]])
    assert not filled.experts.isnan().any()
    assert "without tokens" in repr(means)


@pytest.mark.typed
def test_sums_merge_and_are_saved_as_they_are(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [ExpertSums([3, 5], 4, 6) for _ in range(3)]
    for number, part in enumerate(parts[:2]):
        for layer in (3, 5):
            indices = torch.rand(2, 3, 4, generator=generator).topk(2).indices
            outputs, shared = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 2, 6), (2, 3, 6)))
            counted = torch.rand(2, 3, generator=generator) < 0.7
            for accumulator in (part, parts[2]):
                accumulator.update(layer, indices, outputs, counted, shared)
        assert number < 2
    merged, whole = parts[0].merge(parts[1]).result(), parts[2].result()
    assert torch.equal(merged.counts, whole.counts)
    assert torch.allclose(merged.experts, whole.experts, atol=1e-6, equal_nan=True)
    merged.save(tmp_path / "means")
    loaded = ExpertMeans.load(tmp_path / "means")
    assert loaded.layers == (3, 5)
    assert torch.equal(loaded.counts, merged.counts)
    assert merged.shared is not None and loaded.shared is not None
    assert torch.equal(loaded.shared, merged.shared)
    assert torch.equal(loaded.experts.nan_to_num(7), merged.experts.nan_to_num(7))


def test_names_of_files_in_a_list_are_not_taken_for_texts(tmp_path: Path) -> None:
    model = wrapped("deepseek").model
    (tmp_path / "texts.jsonl").write_text('{"text": "a b"}')
    with pytest.raises(InputError, match="the texts of the reference are names of files"):
        model.ablate({1: [0]}, how="mean", reference=[str(tmp_path / "texts.jsonl")])
    with pytest.raises(InputError, match="the texts are names of files"):
        next(rows(model, [str(tmp_path / "texts.jsonl")]))


@pytest.mark.typed
def test_a_cache_without_outputs_and_another_file_are_refused(tmp_path: Path) -> None:
    case = wrapped("deepseek")
    with torch.no_grad():
        _, cache = case.model.run_with_cache(TEXTS, names_filter=names.mlp(names.EXPERT_OUT, 1))
    with pytest.raises(InputError, match="hook_expert_indices and hook_expert_out of no layer"):
        ExpertMeans.of_cache(cache)
    case.model.routing(TEXTS).save(tmp_path / "routing")
    with pytest.raises(InputError, match="holds Routing; expected a ExpertMeans"):
        ExpertMeans.load(tmp_path / "routing")
    means = ExpertMeans.measure(wrapped("mixtral").model, TEXTS)
    with pytest.raises(InputError, match="no outputs of shared experts"):
        means.shared_of(1)
    with pytest.raises(InputError, match=re.escape("(4, 32) (n_experts, d_model); the model has (8, 32)")):
        wrapped("deepseek").model.ablate(
            how="mean", reference=ExpertMeans((1, 2), torch.zeros(2, 4, 32), torch.ones(2, 4).long())
        )
