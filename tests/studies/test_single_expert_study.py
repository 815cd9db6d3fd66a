"""Every variant of the single-expert study against the model edited by hand, text by text."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from moe_lens import HookedMoE, names
from moe_lens.data import Reading, batch_windows, shards
from moe_lens.errors import InputError
from moe_lens.report.findings_section import findings
from moe_lens.report.sections import ensemble
from moe_lens.stats import halves
from moe_lens.studies import SingleExpertStudy, run
from moe_lens.studies.single_expert_study import random_places
from tests.studies.tiny import domain, tiny_model

READING = Reading(tokens=None, context=24, shard_tokens=10**6)


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return tiny_model()


@pytest.fixture(scope="module")
def windows(model):
    (shard,) = shards(domain("d", n=10, sources=10), model, READING)
    return shard.windows


@pytest.fixture(scope="module")
def result(model):
    study = SingleExpertStudy(layers="both", k=(0, 1, 2))
    return run(study, model, [domain("d", n=10, sources=10)], reading=READING, batch_tokens=150).results["d"]["losses"]


def nats(model, windows, hooks) -> torch.Tensor:
    """Sum of losses of each window, read alone; `hooks` may depend on the window."""
    found = []
    for window in windows:
        ids = torch.tensor([window.ids])
        logits = model.run_with_hooks(ids, fwd_hooks=hooks(window))
        found.append(cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
    return torch.stack(found).double()


def expected(model, windows, hooks) -> tuple[float, float]:
    """Perplexity, token-weighted and as a geometric mean over windows."""
    sums = nats(model, windows, hooks)
    tokens = torch.tensor([len(window.ids) - 1 for window in windows])
    return float((sums.sum() / tokens.sum()).exp()), float((sums / tokens).mean().exp())


def at(layers, name, function):
    return [(names.mlp(name, layer), function) for layer in layers]


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("k", [0, 1])
def test_dropped_and_renormalised_are_edits_of_what_experts_add(model, windows, result, k, layer):
    layers = model.moe_layers if layer is None else [layer]

    def drop(weighted, hook):
        return torch.cat([weighted[:, :, :k], torch.zeros_like(weighted[:, :, k:])], 2)

    one = result.of("dropped", k, layer)
    perplexity, geometric = expected(model, windows, lambda window: at(layers, names.EXPERT_WEIGHTED, drop))
    assert one.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert one.geometric_perplexity == pytest.approx(geometric, rel=1e-5)
    if k:

        def rescale(weights, hook):
            kept = weights[..., :k] * weights.sum(-1, keepdim=True) / weights[..., :k].sum(-1, keepdim=True)
            return torch.cat([kept, torch.zeros_like(weights[..., k:])], -1)

        perplexity, _ = expected(model, windows, lambda window: at(layers, names.ROUTING_WEIGHTS, rescale))
        assert result.of("renormalised", k, layer).perplexity == pytest.approx(perplexity, rel=1e-5)


def test_replaced_puts_the_means_of_the_other_half_of_the_sources(model, windows, result):
    half = halves({window.source for window in windows})
    sums = torch.zeros(2, len(model.moe_layers), model.n_experts, model.cfg.d_model)
    counts = torch.zeros(2, len(model.moe_layers), model.n_experts)
    wanted = [names.mlp(n, layer) for layer in model.moe_layers for n in (names.EXPERT_INDICES, names.EXPERT_OUT)]
    for window in windows:
        _, cache = model.run_with_cache(torch.tensor([window.ids]), names_filter=wanted)
        for row, layer in enumerate(model.moe_layers):
            chosen, outputs = cache["expert_indices", layer][0, 1:], cache["expert_out", layer][0, 1:]
            for expert, output in zip(chosen.flatten().tolist(), outputs.flatten(0, 1), strict=True):
                sums[half[window.source], row, expert] += output
                counts[half[window.source], row, expert] += 1
    layer_mean = sums.sum(2) / counts.sum(2)[..., None]
    means = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], layer_mean[:, :, None])
    assert sum(half.values()) == 5  # as many sources in either half, of ten

    def hooks(window):
        made = []
        for row, layer in enumerate(model.moe_layers):
            table, seen = means[1 - half[window.source], row], {}

            def note(indices, hook, seen=seen):
                seen["at"] = indices

            def replace(outputs, hook, seen=seen, table=table):
                return torch.cat([outputs[:, :, :1], table[seen["at"][:, :, 1:]]], 2)

            made += [(names.mlp(names.EXPERT_INDICES, layer), note), (names.mlp(names.EXPERT_OUT, layer), replace)]
        return made

    perplexity, _ = expected(model, windows, hooks)
    assert result.of("replaced", 1).perplexity == pytest.approx(perplexity, rel=1e-5)
    assert result.of("replaced", 1).perplexity != pytest.approx(result.of("dropped", 1).perplexity, rel=1e-4)


def test_halves_follow_the_seed_and_a_single_source_is_given_its_own_means(model):
    def replaced(n: int, seed: int = 0) -> float:
        study = SingleExpertStudy(treatments=("replaced",), k=(0,), seed=seed)
        found = run(study, model, [domain("d", n=n, sources=n)], reading=READING, batch_tokens=10**6)
        return float(found.tables["perplexity"].query("k == 0")["perplexity"].iloc[0])

    assert replaced(4) == replaced(4) != replaced(4, seed=1)
    assert replaced(1) > 0


def test_random_experts_are_drawn_for_each_token_and_do_not_depend_on_the_batch(model, windows, result):
    (batch,) = batch_windows(windows, model, batch_tokens=10**6)
    places = random_places(model, batch, seed=0)
    drawn = torch.stack(list(places.values()))[:, batch.mask]
    assert (drawn.sort(-1).values == torch.arange(model.top_k)).all()
    first = torch.stack([(drawn == 0)[..., rank].float().mean() for rank in range(model.top_k)])
    assert (first - 1 / model.top_k).abs().max() < 0.08
    row = {(window.document, window.start): number for number, window in enumerate(batch.windows)}

    def hooks(window):
        made = []
        for layer in model.moe_layers:
            kept = places[layer][row[window.document, window.start], : len(window.ids)] < 2
            keep = lambda weighted, hook, kept=kept: weighted * kept[None, :, :, None]  # noqa: E731
            made += at([layer], names.EXPERT_WEIGHTED, keep)
        return made

    perplexity, _ = expected(model, windows, hooks)
    assert result.of("random", 2).perplexity == pytest.approx(perplexity, rel=1e-5)


def test_ratios_are_paired_and_have_intervals_from_ten_sources_on(model, result):
    frame = result.to_frame()
    whole = frame.iloc[0]
    assert (whole["treatment"], whole["ratio"], whole["ratio_low"], whole["ratio_high"]) == ("whole", 1, 1, 1)
    for row in frame.to_dict("records"):
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    few = run(SingleExpertStudy(k=(1,), treatments=("dropped",)), model, [domain("d", n=9, sources=9)], reading=READING)
    assert all(value != value for value in few.tables["perplexity"]["ratio_low"])


def test_settings_that_cannot_be_are_refused(model):
    texts = [domain("d")]
    with pytest.raises(InputError, match="k is 3; the model has 3 active experts: 0 to 2"):
        run(SingleExpertStudy(k=(3,)), model, texts)
    with pytest.raises(
        InputError, match="treatment 'shouted'; expected some of dropped, renormalised, random, replaced"
    ):
        run(SingleExpertStudy(treatments=("shouted",)), model, texts)


def test_a_page_of_one_active_expert_says_nothing_of_others():
    texts = [domain("d", n=4, sources=4)]
    found = {k: run(SingleExpertStudy(), tiny_model(num_experts_per_tok=k), texts, reading=READING) for k in (1, 2)}
    for k, study in found.items():
        said, table = (str(of({"single_expert": study})) for of in (findings, ensemble))
        assert ("with the sum of the others" in said) == (k > 1) and "rest_top" in table
