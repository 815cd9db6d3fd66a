"""Cosines and their controls, against plain numpy; means; the controls do their work on vectors with a known answer."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.errors import InputError
from moe_lens.stats import MEASURES, ActivationMeans, Means, SimilarityStats
from moe_lens.stats.ensemble_similarity import measure

D, K = 16, 3


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def plain(u, a, mean_u, mean_a) -> dict[str, Any]:
    """The definitions of the docstring, for one token."""
    s = sum(a)
    centre = mean_u + sum(mean_a)
    return {
        "top": cosine(u + a[0], u + s),
        "none": cosine(u, u + s),
        "random": np.mean([cosine(u + part, u + s) for part in a]),
        "last": cosine(u + a[-1], u + s),
        "independent": np.sqrt((u @ u + a[0] @ a[0]) / (u @ u + sum(part @ part for part in a))),
        "sum_top": cosine(a[0], s),
        "sum_random": np.mean([cosine(part, s) for part in a]),
        "sum_last": cosine(a[-1], s),
        "sum_independent": np.linalg.norm(a[0]) / np.sqrt(sum(part @ part for part in a)),
        "rest_top": cosine(a[0], s - a[0]),
        "rest_random": np.mean([cosine(part, s - part) for part in a]),
        "rest_last": cosine(a[-1], s - a[-1]),
        "centred_top": cosine(u + a[0] - mean_u - mean_a[0], u + s - centre),
        "centred_none": cosine(u - mean_u, u + s - centre),
        "centred_sum_top": cosine(a[0] - mean_a[0], s - sum(mean_a)),
        "size": np.linalg.norm(s) / np.linalg.norm(u),
        "error_top": np.linalg.norm(u + a[0] - u - s) / np.linalg.norm(u + s),
        "error_none": np.linalg.norm(u - u - s) / np.linalg.norm(u + s),
        "error_random": np.mean([np.linalg.norm(part - s) for part in a]) / np.linalg.norm(u + s),
        "error_last": np.linalg.norm(a[-1] - s) / np.linalg.norm(u + s),
        "error_independent": np.sqrt(sum(p @ p for p in a[1:]) / (u @ u + sum(p @ p for p in a))),
    }


def centre(layers=(0,)) -> Means:
    n = len(layers)
    return Means(
        tuple(layers), torch.randn(n, D), torch.randn(n, K, D), torch.randn(n, 5, D), torch.ones(n, 5).long(), 1
    )


def test_against_numpy_in_double_precision():
    u, a, means = torch.randn(7, D).double(), torch.randn(7, K, D).double(), centre()
    mean_u, mean_a = means.resid[0].double(), means.weighted[0].double()
    values = measure(u, a, mean_u, mean_a)
    for t in range(7):
        expected = plain(u[t].numpy(), a[t].numpy(), mean_u.numpy(), mean_a.numpy())
        assert values[t].tolist() == pytest.approx([expected[name] for name in MEASURES], abs=1e-12)


def test_all_zero_is_not_a_number_that_is_missing():
    assert measure(torch.zeros(2, D), torch.zeros(2, K, D), torch.zeros(D), torch.zeros(K, D)).isfinite().all()


def test_one_active_expert_has_no_others():
    def of(top_k: int, resid: torch.Tensor) -> Any:
        stats, parts = SimilarityStats([0]), torch.randn(1, 5, top_k, D)
        means = Means(
            (0,), torch.zeros(1, D), torch.zeros(1, top_k, D), torch.zeros(1, 5, D), torch.ones(1, 5).long(), 1
        )
        stats.update(0, resid, parts, torch.ones(1, 5).bool(), ["s"], [means])
        return stats.result().to_frame().set_index("measure")["mean"]

    one, two = (of(top_k, torch.randn(1, 5, D)) for top_k in (1, 2))
    rest = [name for name in MEASURES if name.startswith("rest_")]
    assert one[rest].isna().all() and one.drop(rest).notna().all() and two.notna().all()  # control: 2
    with pytest.raises(InputError, match="not finite"):
        of(1, torch.full((1, 5, D), torch.nan))


def test_a_dominant_residual_makes_any_expert_look_like_the_ensemble():
    """The trap itself: unrelated vectors beside a large u, and only the controls tell."""
    u, a = 30 * torch.randn(200, 256), torch.randn(200, K, 256)
    values = measure(u, a, torch.zeros(256), torch.zeros(K, 256)).mean(0)
    by_name = dict(zip(MEASURES, values.tolist(), strict=True))
    assert by_name["top"] > 0.99
    assert abs(by_name["top"] - by_name["none"]) < 0.01
    assert abs(by_name["rest_top"]) < 0.02
    assert by_name["sum_top"] > 0.5  # part against whole, though all are independent ...
    assert by_name["sum_top"] == pytest.approx(by_name["sum_independent"], abs=0.01)  # ... as its null says
    assert by_name["error_top"] == pytest.approx(by_name["error_independent"], rel=0.02)
    assert by_name["error_top"] == pytest.approx(by_name["error_last"], rel=0.02)  # the top expert is no better


def test_null_of_independent_directions_is_what_random_directions_give():
    sizes = torch.tensor([1.0, 0.6, 0.3])
    directions = torch.nn.functional.normalize(torch.randn(20_000, K, 128), dim=-1)
    u = 2 * torch.nn.functional.normalize(torch.randn(20_000, 128), dim=-1)
    values = measure(u, directions * sizes[:, None], torch.zeros(128), torch.zeros(K, 128)).mean(0)
    by_name = dict(zip(MEASURES, values.tolist(), strict=True))
    # The formula is the limit of many dimensions; at 128 it is short by about 1/(2 · 128).
    assert by_name["sum_top"] == pytest.approx(by_name["sum_independent"], abs=0.005)
    assert by_name["top"] == pytest.approx(by_name["independent"], abs=0.005)


def updated(stats: SimilarityStats, u, a, counted, sources, means) -> SimilarityStats:
    for i, layer in enumerate(stats.layers):
        stats.update(layer, u[i], a[i], counted, sources, [means] * len(sources))
    return stats


@given(st.integers(0, 10**6), st.integers(0, 3))
def test_merging_parts_in_any_order_equals_the_whole(seed, cut):
    generator = torch.Generator().manual_seed(seed)
    means = centre((1, 2))
    whole, left, right = (SimilarityStats((1, 2)) for _ in range(3))
    for i in range(3):
        u, a = torch.randn(2, 3, 4, D, generator=generator), torch.randn(2, 3, 4, K, D, generator=generator)
        counted = torch.rand(3, 4, generator=generator) < 0.6
        counted[:, :2] = True
        part = u, a, counted, [f"s{j}" for j in torch.randint(3, (3,), generator=generator).tolist()], means
        updated(whole, *part)
        updated(left if i < cut else right, *part)
    if cut in (0, 3):
        return  # one side is empty, and an empty one merged is covered by the other cuts
    merged, expected = right.merge(left).result(), whole.result()
    assert merged.sources == expected.sources
    assert torch.equal(merged.tokens, expected.tokens)
    assert torch.allclose(merged.sums, expected.sums, rtol=0, atol=1e-10)
    assert torch.allclose(merged.unexplained, expected.unexplained, rtol=1e-10)


def test_padding_is_not_counted():
    u, a, counted = torch.randn(1, 2, 5, D), torch.randn(1, 2, 5, K, D), torch.ones(2, 5).bool()
    counted[1, 3:] = False
    means = centre()
    clean = updated(SimilarityStats([0]), u, a, counted, ["a", "b"], means).result()
    u[0, 1, 3:] = torch.nan
    a[0, 1, 3:] = 1e6
    dirty = updated(SimilarityStats([0]), u, a, counted, ["a", "b"], means).result()
    assert torch.equal(clean.sums, dirty.sums) and torch.equal(clean.unexplained, dirty.unexplained)
    assert clean.tokens.tolist() == [[5], [3]]
    u[0, 1, 0] = torch.nan
    with pytest.raises(InputError, match="layer 0: activations are not finite"):
        updated(SimilarityStats([0]), u, a, counted, ["a", "b"], means)


def test_unexplained_variance_is_that_of_numpy_and_has_its_ends():
    u, a, counted = torch.randn(1, 4, 8, D), torch.randn(1, 4, 8, K, D), torch.ones(4, 8).bool()
    a[:, :, :, 0] *= 2
    result = updated(SimilarityStats([0]), u, a, counted, list("abcd"), centre()).result()
    parts = a[0].flatten(0, 1).double().numpy()
    total = parts.sum(1)
    expected = (total - parts[:, 0]).var(0).sum() / total.var(0).sum()
    assert float(result.unexplained[0]) == pytest.approx(expected, rel=1e-9)
    a[:, :, :, 1:] = 7.0  # a constant is no variance
    assert float(updated(SimilarityStats([0]), u, a, counted, list("abcd"), centre()).result().unexplained[0]) < 1e-12
    a[:, :, :, 0], a[:, :, :, 1] = 0, torch.randn(1, 4, 8, D)
    silent = updated(SimilarityStats([0]), u, a, counted, list("abcd"), centre()).result()
    assert float(silent.unexplained[0]) == pytest.approx(1)


@pytest.mark.typed
def test_frame_gives_intervals_over_sources():
    stats = SimilarityStats([4])
    for i in range(12):
        u, a = torch.randn(1, 1, 5, D), torch.randn(1, 1, 5, K, D)
        updated(stats, u, a, torch.ones(1, 5).bool(), [f"s{i}"], centre((4,)))
    result = stats.result()
    frame = result.to_frame()
    assert len(frame) == len(MEASURES) + 1
    top = frame[frame["measure"] == "top"].iloc[0]
    assert top["low"] < top["mean"] < top["high"]
    assert top["mean"] == pytest.approx(float(result.mean("top")[0]), abs=1e-12)
    assert (top["tokens"], top["sources"], top["layer"]) == (60, 12, 4)


@pytest.mark.typed
def test_means_are_those_of_numpy_and_unseen_experts_get_the_layer_mean():
    stats, other = ActivationMeans([3], 5, K, D), ActivationMeans([3], 5, K, D)
    u, out, weights = torch.randn(2, 4, D), torch.randn(2, 4, K, D), torch.rand(2, 4, K)
    indices = torch.rand(2, 4, 4).topk(K).indices  # expert 4 is never chosen
    counted = torch.tensor([[True] * 4, [True, True, False, False]])
    stats.update(3, u[:1], out[:1], weights[:1], indices[:1], counted[:1])
    other.update(3, u[1:], out[1:], weights[1:], indices[1:], counted[1:])
    means = stats.merge(other).result()
    assert torch.allclose(means.resid[0], u[counted].mean(0), atol=1e-6)
    assert torch.allclose(means.weighted[0], (out * weights[..., None])[counted].mean(0), atol=1e-6)
    for expert in range(4):
        assert torch.allclose(means.experts[0, expert], out[counted][indices[counted] == expert].mean(0), atol=1e-6)
    assert torch.allclose(means.experts[0, 4], out[counted].flatten(0, 1).mean(0), atol=1e-6)
    assert (means.n_tokens, means.unseen) == (6, 1)
    assert means.per_expert.layers == (3,) and torch.equal(means.per_expert.experts, means.experts)
    with pytest.raises(InputError, match="no tokens"):
        ActivationMeans([3], 5, K, D).result()
