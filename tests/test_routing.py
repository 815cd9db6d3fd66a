"""Routing without a model: checked at the door, sorted by weight, aligned to tokens."""

from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.routing import LayerRouting, Routing


def draw(
    layers: int = 2, batch: int = 2, pos: int = 5, top_k: int = 3, n_experts: int = 7, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Unsorted indices and weights [layers, batch, pos, top_k], and in `indices` every expert at most once."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(layers, batch, pos, n_experts, generator=generator).argsort(-1)[..., :top_k]
    return indices, torch.rand(layers, batch, pos, top_k, generator=generator) + 0.1


sizes = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(2, 4), st.integers(4, 9), st.integers(0, 99)
)


@given(sizes)
def test_from_arrays_sorts_slots_and_keeps_every_pair(size):
    *_, n_experts, seed = size
    indices, weights = draw(*size[:4], n_experts=n_experts, seed=seed)
    routing = Routing.from_arrays(indices, weights, n_experts)
    assert (routing.weights.diff(dim=-1) <= 0).all()
    for where in np.ndindex(*indices.shape[:-1]):
        pairs = dict(zip(indices[where].tolist(), weights[where].tolist(), strict=True))
        assert pairs == dict(zip(routing.indices[where].tolist(), routing.weights[where].tolist(), strict=True))
    dense = routing.dense_weights()
    assert torch.equal(dense.gather(-1, indices), weights)
    assert torch.equal((dense != 0).sum(-1), torch.full(indices.shape[:-1], indices.shape[-1]))


def test_ties_go_to_the_lowest_id():
    routing = Routing.from_arrays(torch.tensor([[[[5, 2, 4, 1]]]]), torch.tensor([[[[0.2, 0.3, 0.2, 0.3]]]]), 6)
    assert routing.indices.flatten().tolist() == [1, 2, 4, 5]


@given(sizes)
def test_flat_exports_are_one_sequence(size):
    layers, _, pos, top_k, n_experts, seed = size
    indices, weights = draw(layers, 1, pos, top_k, n_experts, seed)
    flat = Routing.from_arrays(
        indices[:, 0].transpose(0, 1).numpy().astype(np.int16), weights[:, 0].transpose(0, 1).numpy(), n_experts
    )
    whole = Routing.from_arrays(indices, weights, n_experts)
    assert flat.indices.dtype == torch.int64
    assert torch.equal(flat.indices, whole.indices) and torch.equal(flat.weights, whole.weights)


def with_(value: Tensor, where: tuple[int, ...], new: float) -> Tensor:
    value = value.clone()
    value[where] = new
    return value


INDICES, WEIGHTS = draw()


@pytest.mark.parametrize(
    ("indices", "weights", "options", "message"),
    [
        (with_(INDICES, (1, 0, 2, 1), 7), WEIGHTS, {}, "expected expert ids from 0 to 6"),
        (with_(INDICES, (1, 0, 2, 1), -1), WEIGHTS, {}, "indices go from -1"),
        (
            with_(INDICES, (1, 0, 2, 1), int(INDICES[1, 0, 2, 0])),
            WEIGHTS,
            {},
            "in layer 1 a token chose the same expert twice",
        ),
        (INDICES, with_(WEIGHTS, (1, 1, 0, 0), float("nan")), {}, "weights of layer 1 are not all finite"),
        (
            INDICES * torch.tensor([0, 1])[:, None, None, None],
            WEIGHTS,
            {"layers": [3, 4]},
            "layer 3 is zero throughout",
        ),
        (INDICES, WEIGHTS * torch.tensor([1, 0])[:, None, None, None], {}, "layer 1 is zero throughout"),
        (INDICES, WEIGHTS[..., :2], {}, "expected [tokens, layers, top_k] or [layers, batch, pos, top_k]"),
        (INDICES[0, 0], WEIGHTS[0, 0], {}, "expected [tokens, layers, top_k]"),
        (INDICES[:, :0], WEIGHTS[:, :0], {}, "no empty axis"),
        (INDICES.float(), WEIGHTS, {}, "expected whole numbers"),
        (INDICES, WEIGHTS, {"layers": [1]}, "expected 2 different ones"),
        (INDICES, WEIGHTS, {"layers": [1, 1]}, "expected 2 different ones"),
        (INDICES, WEIGHTS, {"mask": torch.ones(2, 4)}, "mask has shape (2, 4); expected (2, 5)"),
        (INDICES, WEIGHTS, {"mask": torch.ones(5)}, "mask has shape (5,); expected (2, 5)"),
    ],
)
def test_what_is_not_routing_is_refused(indices, weights, options, message: str):
    with pytest.raises(InputError) as error:
        Routing.from_arrays(indices, weights, 7, **options)
    assert message in str(error.value)


def test_one_expert_per_token_may_be_expert_0():
    routing = Routing.from_arrays(torch.zeros(1, 1, 4, 1, dtype=torch.int64), torch.ones(1, 1, 4, 1), 7)
    assert routing.top_k == 1


def test_padding_may_hold_anything_in_range():
    indices, weights = INDICES.clone(), WEIGHTS.clone()
    indices[:, 1, 3:], weights[:, 1, 3:] = 0, float("nan")
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    with pytest.raises(InputError):
        Routing.from_arrays(indices, weights, 7)
    routing = Routing.from_arrays(indices, weights, 7, mask=mask)
    frame = routing.to_frame()
    assert len(frame) == 2 * (5 + 3) * 3
    assert not frame.weight.isna().any()
    assert frame.query("batch == 1").pos.max() == 2


def test_frame_has_a_row_per_layer_token_and_rank():
    routing = Routing.from_arrays(INDICES, WEIGHTS, 7, layers=[1, 4])
    frame = routing.to_frame()
    assert list(frame.columns) == ["layer", "batch", "pos", "rank", "expert", "weight"]
    assert len(frame) == INDICES.numel()
    for row in frame.sample(20, random_state=0).to_dict("records"):
        where = (routing.layers.index(row["layer"]), row["batch"], row["pos"], row["rank"])
        assert routing.indices[where] == row["expert"]
        assert routing.weights[where].item() == row["weight"]


def test_a_layer_is_a_view_and_stacking_gives_it_back():
    logits = torch.randn(2, 2, 5, 7)
    mask = torch.ones(2, 5, dtype=torch.bool)
    whole = Routing(
        layers=(1, 4), n_experts=7, indices=INDICES, weights=WEIGHTS, logits=logits, probs=logits.softmax(-1), mask=mask
    )
    layer = whole.layer(4)
    assert layer.layer == 4 and layer.weights.data_ptr() == WEIGHTS[1].data_ptr()
    again = Routing.stack([whole.layer(1), layer])
    assert again.layers == (1, 4) and again.mask is mask
    for name in ("indices", "weights", "logits", "probs"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    with pytest.raises(InputError, match=r"no routing of layer 2; this one holds layers \[1, 4\]"):
        whole.layer(2)


def test_layers_without_batch_axis_stack_to_a_batch_of_one():
    parts = [
        LayerRouting(layer=at, n_experts=7, indices=INDICES[at, 0], weights=WEIGHTS[at, 0], mask=torch.ones(5).bool())
        for at in (0, 1)
    ]
    whole = Routing.stack(parts)
    assert torch.equal(whole.indices, INDICES[:, :1])
    assert whole.mask is not None and whole.mask.shape == (1, 5)


def test_layers_with_fewer_experts_are_stacked_with_empty_slots(tmp_path: Path):
    fewer = LayerRouting(layer=1, n_experts=7, indices=INDICES[1, ..., :1], weights=WEIGHTS[1, ..., :1])
    whole = Routing.stack([LayerRouting(layer=0, n_experts=7, indices=INDICES[0], weights=WEIGHTS[0]), fewer])
    assert torch.equal(whole.indices[0], INDICES[0]) and torch.equal(whole.indices[1, ..., :1], fewer.indices)
    assert (whole.indices[1, ..., 1:] == -1).all() and (whole.weights[1, ..., 1:] == 0).all()
    assert torch.equal(whole.dense_weights()[1], fewer.dense_weights())
    frame = whole.to_frame()
    assert frame.expert.min() == 0 and len(frame) == INDICES[0].numel() + fewer.indices.numel()
    whole.save(tmp_path / "r")
    assert torch.equal(Routing.load(tmp_path / "r").indices, whole.indices)
    used = Routing(layers=(0, 1), n_experts=7, indices=whole.indices, weights=whole.weights + 1)
    used.save(tmp_path / "r")
    with pytest.raises(InputError, match="indices go from -1"):  # a slot with a weight has an expert
        Routing.load(tmp_path / "r")


@pytest.mark.untyped
@pytest.mark.parametrize("number", [np.int64, np.uint8, np.int32])
def test_layers_in_numbers_of_numpy_are_saved(number: type, tmp_path: Path):
    layers: Any = np.arange(2).astype(number)
    routing = Routing.from_arrays(INDICES.numpy(), WEIGHTS.numpy(), n_experts=number(7), layers=layers)
    routing.save(tmp_path / "r")
    again = Routing.load(tmp_path / "r")
    assert (again.layers, again.n_experts) == ((0, 1), 7) and all(type(layer) is int for layer in routing.layers)


def test_stacking_refuses_what_does_not_fit():
    one = LayerRouting(layer=0, n_experts=7, indices=INDICES[0], weights=WEIGHTS[0])
    other = LayerRouting(layer=1, n_experts=7, indices=INDICES[0, :, :4], weights=WEIGHTS[0, :, :4])
    with pytest.raises(InputError, match="layers differ in shape"):
        Routing.stack([one, other])
    with pytest.raises(InputError, match="no layer to stack"):
        Routing.stack([])
    with pytest.raises(InputError, match="expected 2 different ones"):
        Routing.stack([one, one])


@given(st.integers(0, 50))
def test_margin_is_how_far_the_last_chosen_is_ahead(seed: int):
    logits = torch.randn(2, 1, 4, 7, generator=torch.Generator().manual_seed(seed))
    sorted_logits, indices = logits.sort(dim=-1, descending=True)
    weights = sorted_logits.softmax(-1)
    for top_k in (1, 3, 6):
        routing = Routing(
            layers=(0, 1), n_experts=7, indices=indices[..., :top_k], weights=weights[..., :top_k], logits=logits
        )
        assert torch.equal(routing.margin(), sorted_logits[..., top_k - 1] - sorted_logits[..., top_k])
    forced = Routing(layers=(0, 1), n_experts=7, indices=indices[..., 1:3], weights=weights[..., 1:3], logits=logits)
    assert (forced.margin() < 0).all()


def test_margin_needs_logits_and_others():
    with pytest.raises(InputError, match="needs router logits"):
        Routing.from_arrays(INDICES, WEIGHTS, 7).margin()
    logits = torch.randn(1, 1, 2, 3)
    everyone = Routing(layers=(0,), n_experts=3, indices=logits.argsort(-1), weights=logits.softmax(-1), logits=logits)
    assert (everyone.margin() == torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_saved_routing_comes_back(tmp_path: Path, dtype: torch.dtype):
    logits = torch.randn(2, 2, 5, 7, dtype=dtype)
    mask = torch.rand(2, 5) > 0.2
    routing = Routing(layers=(1, 4), n_experts=7, indices=INDICES, weights=WEIGHTS.to(dtype), logits=logits, mask=mask)
    routing.save(tmp_path / "routing.safetensors")
    loaded = Routing.load(tmp_path / "routing.safetensors")
    assert loaded.layers == (1, 4) and loaded.n_experts == 7 and loaded.probs is None
    for name in ("indices", "weights", "logits", "mask"):
        assert getattr(loaded, name).dtype == getattr(routing, name).dtype
        assert torch.equal(getattr(loaded, name), getattr(routing, name))


def test_shapes_that_contradict_one_another_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no run-time checker of annotations
    with pytest.raises(InputError, match=r"logits has shape \(2, 2, 5, 6\); expected \(2, 2, 5, 7\)"):
        Routing(layers=(0, 1), n_experts=7, indices=INDICES, weights=WEIGHTS, logits=torch.zeros(2, 2, 5, 6))
    with pytest.raises(InputError, match="weights has shape"):
        LayerRouting(layer=0, n_experts=7, indices=INDICES[0], weights=WEIGHTS[0, :, :3])
    with pytest.raises(InputError, match=r"expected \[layer, batch, pos, top_k\]"):
        Routing(layers=(0, 1), n_experts=7, indices=INDICES[:, 0], weights=WEIGHTS[:, 0])


@pytest.mark.typed
def test_repr_is_short():
    assert (
        repr(Routing.from_arrays(INDICES, WEIGHTS, 7, layers=[1, 4]))
        == "Routing(layers [1, 4], 2 × 5 tokens, 3 of 7 experts)"
    )


@pytest.mark.parametrize(
    ("indices", "weights", "message"),
    [
        ([[[0, 1]], [[1]]], [[[0.5, 0.5]], [[1.0]]], "indices cannot be read"),
        ([[["a"]]], [[[1.0]]], "indices cannot be read"),
        (INDICES, WEIGHTS.numpy().astype(object), "weights cannot be read"),
        (INDICES, WEIGHTS * 1j, "weights are torch.complex"),
        (INDICES, WEIGHTS > 0, "weights are torch.bool"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(indices, weights, message):
    with pytest.raises(InputError, match=message):
        Routing.from_arrays(indices, weights, 7)
