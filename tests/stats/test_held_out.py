"""Held-out prediction: against ridge regression written out, and routing in which features say something or nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.stats import Categories, Numbers, TokenSampleResult, chosen_for, explain_choices
from moe_lens.stats.held_out import Held, placements

F32 = 1e-4  # a few sums and one eigendecomposition of some hundred numbers near 1 in float32


def ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)


@pytest.mark.typed
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


@pytest.mark.typed
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


@pytest.mark.typed
def test_the_domain_gains_where_it_matters_and_nothing_gains_where_sources_differ_alone():
    for seed in range(4):
        true: Any = explain_choices(drawn(seed, 0.3, 0.8)).per_layer().set_index("feature")
        assert true["gain_low"]["domain"] > 0 >= true["gain_shuffled"]["domain"], seed
        null: Any = explain_choices(drawn(seed, 0.8)).per_layer().set_index("feature")
        assert (null["gain_low"].iloc[1:] < 0).all(), seed
        assert null["explained_low"]["token"] > 0 > null["gain"]["previous"]


@pytest.mark.typed
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
