"""Held-out prediction: against ridge regression written out, and routing in which features say something or nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.resampling import folds, units
from moe_lens.stats import Categories, Numbers, TokenSampleResult, chosen_for, explain_choices
from moe_lens.stats.explained_choices import ALL, MEASURES, SHUFFLED, TOKEN, ChoiceExplanation
from moe_lens.stats.held_out import Held, placements
from moe_lens.stats.parallel_sources import parallel_key, too_few_sources

F32 = 1e-4  # a few sums and one eigendecomposition of some hundred numbers near 1 in float32


def ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)


def test_a_feature_is_ridge_regression_written_out():
    generator = torch.Generator().manual_seed(0)
    n = 120
    codes, y = torch.randint(7, (n,), generator=generator), torch.randn(n, 3, generator=generator)
    columns = torch.randn(n, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 1.0]) + 3
    rows = torch.arange(40, n)
    one_hot = torch.nn.functional.one_hot(codes, 7).float()
    standard = (columns - columns[rows].mean(0)) / columns[rows].std(0, correction=0)
    for feature, x in ((Categories.of(codes), one_hot), (Numbers(columns), standard)):
        solver = feature.at(rows)
        penalty = torch.tensor([1.0, 10.0, torch.inf])
        weights = solver.solution(solver.moments(y[rows]), penalty)
        found = solver.predict(torch.arange(40), weights)
        for column in range(2):
            by_hand = x[:40] @ ridge(x[rows], y[rows, column : column + 1], float(penalty[column]))
            assert (found[:, column] - by_hand[:, 0]).abs().max() < F32
        assert not found[:, 2].any(), "an infinite penalty leaves the feature out"


def test_what_features_share_is_not_counted_twice_and_nothing_of_the_fold_is_seen():
    generator = torch.Generator().manual_seed(1)
    n = 3000
    a = torch.randint(4, (n,), generator=generator)
    b = torch.where(torch.rand(n, generator=generator) < 0.7, a, torch.randint(4, (n,), generator=generator))
    truth = torch.tensor([0.0, 0.2, 0.4, 0.8])[a] + torch.tensor([0.1, 0.0, 0.1, 0.0])[b]
    y = (torch.rand(n, generator=generator) < truth).float()[:, None]
    fold = torch.arange(n) % 5
    features = {"a": Categories.of(a), "b": Categories.of(b)}
    held = Held(features, fold, 2)
    mean, (both,) = held.predictions(y, [("a", "b")])
    assert (mean - y[fold != 2].mean(0)).abs().max() < F32
    error = (both[:, 0] - truth[held.rows]).abs().mean()
    assert error < 0.03, "within the sampling error of 2,400 rows"
    changed = y.clone()
    changed[held.rows] = 1 - changed[held.rows]
    assert torch.equal(held.predictions(changed, [("a", "b")])[1][0], both)


def test_placements_give_the_area_under_the_curve():
    generator = torch.Generator().manual_seed(2)
    chosen = (torch.rand(60, 2, generator=generator) < 0.3).float()
    scores = torch.randint(5, (60, 2), generator=generator) / 4 + 0.1 * chosen
    placed = placements(scores, chosen)
    for column in range(2):
        yes, no = scores[chosen[:, column] > 0, column], scores[chosen[:, column] == 0, column]
        wins = (yes[:, None] > no).double() + 0.5 * (yes[:, None] == no).double()
        for of in (chosen, 1 - chosen):
            area = (placed * of)[:, column].sum() / of[:, column].sum()
            assert abs(area - wins.mean()) < F32


def drawn(seed: int, of_source: float, of_domain: float = 0.0) -> dict[str, TokenSampleResult]:
    """Two domains of twelve sources; logits are the token's, the source's and the domain's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    token, found = normal(30, 6), {}
    for domain in ("a", "b"):
        shift = of_domain * normal(6)
        tokens = (torch.rand(12, 50, generator=generator) ** 2 * 30).long()
        noise = -(-torch.rand(12, 50, 6, generator=generator).clamp(min=1e-9).log()).log()
        logits = token[tokens] + of_source * normal(12, 1, 6) + shift + noise
        previous = torch.cat([torch.full((12, 1), -1), tokens[:, :-1]], 1)
        place, document = torch.arange(50).expand(12, 50), torch.arange(12)[:, None].expand(12, 50)
        about = torch.stack([tokens, previous, document, place, place], -1).flatten(0, 1)
        source = tuple(f"s{i}" for i in range(12) for _ in range(50))
        found[domain] = TokenSampleResult((0,), 6, source, about, logits.topk(2).indices.flatten(0, 1)[:, None])
    return found


def test_the_domain_gains_where_it_matters_and_nothing_gains_where_sources_differ_alone():
    for seed in range(4):
        true: Any = explain_choices(drawn(seed, 0.3, 0.8)).per_layer().set_index("feature")
        assert true["gain_low"]["domain"] > 0 >= true["gain_shuffled"]["domain"], seed
        null: Any = explain_choices(drawn(seed, 0.8)).per_layer().set_index("feature")
        assert (null["gain_low"].iloc[1:] < 0).all(), seed
        assert null["explained_low"]["token"] > 0 > null["gain"]["previous"]


def test_features_of_ones_own_are_found_and_named():
    samples = drawn(0, 0.0)
    chosen = torch.cat([of.hot(slice(0, 1)) for of in samples.values()])[:, 3]
    generator = torch.Generator().manual_seed(0)
    known = torch.where(torch.rand(len(chosen), generator=generator) < 0.8, chosen, torch.rand(len(chosen)).round())
    noise = torch.rand(len(chosen), 2, generator=generator)
    more = {"sae": Numbers(torch.cat([known[:, None], noise], 1)), "label": Categories.of(known.long())}
    found: Any = explain_choices(samples, more).to_frame().set_index(["expert", "feature"])
    for name in more:
        best = found.xs(name, level="feature")
        assert best["auc"].idxmax() == 3 and best["auc_low"][3] > 0.8 and best["gain_low"][3] > 0.2
        assert best["gain_shuffled"][3] < 0.01
    names = {"sae": ["one", "two", "three"], "label": ["no", "yes"]}
    said: Any = chosen_for(samples, str, more, names).set_index("expert")
    assert "label yes" in said["sentence"][3] or "one > 0" in said["sentence"][3]
    assert said["low"][3] > said["share"][3] and said["recall"][3] > 0.6
    with pytest.raises(InputError, match="got the feature 'domain' of 1200 tokens; expected one of all 1200 tokens"):
        explain_choices(samples, {"domain": more["label"]})
    few = {"a": TokenSampleResult((0,), 6, ("x",) * 600, samples["a"].about, samples["a"].chosen)}
    with pytest.raises(InputError, match="too few sources"):
        explain_choices(few)


def chapters(generator: torch.Generator, *, n: int = 15, tokens: int = 30) -> dict[str, TokenSampleResult]:
    """A book in two languages: a token is a name that only its chapter has, and says what experts it chooses."""
    experts = torch.rand(n, 8, generator=generator).argsort(-1)[:, None, :2]  # of each chapter
    found = {}
    for language in ("de", "fr"):
        chapter = torch.arange(n).repeat_interleave(tokens)
        about = torch.zeros(len(chapter), 5, dtype=torch.long)
        about[:, 0] = chapter
        names = tuple(f"book/{language}/{one}" for one in chapter.tolist())
        found[language] = TokenSampleResult((1,), 8, names, about, experts[chapter])
    return found


@pytest.mark.typed
def test_parallel_sources_are_held_out_together_and_their_names_explain_nothing():
    samples = chapters(torch.Generator().manual_seed(3))
    frame = samples["de"].to_frame()
    assert frame["source"].tolist() == [f"book/de/{chapter}" for chapter in frame["token"]]
    together = explain_choices(samples, parallel=parallel_key())
    assert together.sources == tuple(sorted(f"book/*/{one}" for one in range(15)))
    found: Any = together.per_layer().set_index("feature")
    recall, explained = (float(found.at["token", name]) for name in ("recall", "explained"))
    assert recall < 0.5 and abs(explained) < 0.1
    said: Any = chosen_for(samples, str, parallel=parallel_key())
    assert said["sentence"].str.startswith("chosen for").any() and not said["held"].any()
    # The control: apart, the other language has the same names, and they say everything.
    apart: Any = explain_choices(samples).per_layer().set_index("feature")
    assert float(apart.at["token", "recall"]) > 0.8 and float(apart.at["token", "explained"]) > 0.7
    said = chosen_for(samples, str)
    assert said["held"].any()
    few = {name: TokenSampleResult((1,), 8, *_some(of, 60)) for name, of in samples.items()}  # two chapters
    assert set(too_few_sources({name: of.source for name, of in few.items()}, parallel_key())) == {"de", "fr"}
    with pytest.raises(InputError, match="too few sources"):
        explain_choices(few, parallel=parallel_key())


def _some(of: TokenSampleResult, n: int) -> tuple[Any, ...]:
    return of.source[:n], of.about[:n], of.chosen[:n]


def test_folds_deal_parallel_sources_into_one_and_every_domain_evenly():
    sources = [f"b/{language}/{n}" for language in ("de", "fr") for n in range(12)] + [f"c/{n}" for n in range(9)]
    domains = ["de"] * 12 + ["fr"] * 12 + ["code"] * 9
    key = parallel_key()
    dealt = folds(units(sources, domains, key), domains, 4, seed=1)
    assert torch.equal(dealt[:12], dealt[12:24])
    for part, n in ((dealt[:12], 3), (dealt[24:], 2)):
        counts = torch.bincount(part, minlength=4)
        assert int(counts.min()) >= n and int(counts.max() - counts.min()) <= 1
    apart = folds(units(sources, domains), domains, 4, seed=1)
    assert not torch.equal(apart[:12], apart[12:24]), "the control: by name alone they are dealt apart"


@pytest.mark.parametrize("held", [4, 5])
def test_the_interval_of_an_area_holds_it_where_hardly_any_token_chose_the_expert(held):
    """Folds in which none did have no area."""
    samples = {}
    for name, of in drawn(0, 0.0).items():
        chosen = of.chosen.clone()
        first = chosen[..., 0]
        free = torch.where((chosen == 0).any(-1), torch.where((chosen == 1).any(-1), 2, 1), 0)
        chosen = torch.where(chosen == 5, free[..., None], chosen)
        some = {f"s{i}" for i in range(5 if name == "a" else held)}
        rare = torch.tensor([source in some for source in of.source]) & (torch.arange(len(first)) % 25 == 0)
        chosen[rare, :, 0] = 5
        samples[name] = TokenSampleResult(of.layers, of.n_experts, of.source, of.about, chosen)
    frame: Any = explain_choices(samples).to_frame().dropna(subset=["auc"])
    rare = frame[frame["expert"] == 5]
    assert len(rare) and rare["share"].max() < 0.02
    if held < 5:  # five sources in one domain and four in the other: fewer than ten
        assert rare[["auc_low", "auc_high"]].isna().all(axis=None) and rare["auc"].notna().all()
        frame = frame.drop(rare.index)
    assert ((frame["auc_low"] <= frame["auc"]) & (frame["auc"] <= frame["auc_high"])).all()


def test_intervals_of_areas_stay_within_what_an_area_can_be():
    placed = torch.tensor([[1.0, 0.0, 0.5], [0.6, 0.4, 0.5]]).repeat(6, 1)  # of each source, three experts
    values = {"chosen": 5.0, "above": 5 * placed, "below": 95 * placed}
    sums = torch.ones(3, 12, len(MEASURES), 1, 3, dtype=torch.float64)
    for measure, value in values.items():
        sums[:, :, MEASURES.index(measure), 0] = value
    sources, tokens = tuple(map(str, range(12))), torch.full((12,), 100)
    found = ChoiceExplanation((0,), 1, (TOKEN,), (TOKEN, ALL, ALL + SHUFFLED), sources, tokens, sums)
    ends: Any = found.to_frame().query("feature == 'all'")[["auc_low", "auc", "auc_high"]].to_numpy()
    assert ends[0, 0] < ends[0, 1] < ends[0, 2] == 1 and 0 == ends[1, 0] < ends[1, 1] < ends[1, 2]
    assert ends[2].tolist() == [0.5] * 3, "sources agree"


def test_folds_that_all_or_none_chose_have_no_area_and_leave_that_of_the_others_as_it_is():
    n, generator = 1200, torch.Generator().manual_seed(0)
    names = tuple(f"s{number // 60}" for number in range(n))
    fold = folds(units(names, ["a"] * n), ["a"] * n, 5)
    miss = (fold < 3) & (torch.rand(n, generator=generator) < 0.1)
    about = torch.zeros(n, 5, dtype=torch.long)
    about[:, 3] = about[:, 4] = torch.arange(n) % 60
    for few in (miss, torch.zeros_like(miss)):
        chosen = torch.stack([torch.where(few, 4, 0), torch.randint(1, 4, (n,), generator=generator)], 1)[:, None]
        sample = {"a": TokenSampleResult((0,), 6, names, about, chosen)}
        known = {"known": Categories.of(few), "noise": Categories.of(few[torch.randperm(n, generator=generator)])}
        found: Any = (
            explain_choices(sample, known).to_frame().set_index(["feature", "expert"])[["share", "auc", "auc_low"]]
        )
        assert found.loc["known", 5].isna().tolist() == [False, True, True], "nobody chose it"
        if few.any():
            assert 0.9 < found.loc["known", 0]["share"] < 1
            for expert in (0, 4):
                assert (found.loc["known", expert][["auc", "auc_low"]] > 1 - F32).all()
                assert 0.3 < found.loc["noise", expert]["auc"] < 0.7, "the control"
        else:
            assert found.loc["known", 0].isna().tolist() == [False, True, True], "all chose it"
