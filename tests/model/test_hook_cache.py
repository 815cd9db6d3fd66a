"""Holding activations: found by any of their names, moved, and kept on disk bit for bit."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_lens import names
from moe_lens.errors import HookError, InputError
from moe_lens.model.cache.moe_cache import MoECache
from moe_lens.protocols import HookedModel
from moe_lens.routing import Routing
from tests.model.caches import fresh, full
from tests.wrapped import wrapped

MLP_NAMES = [names.mlp(hook.name, 1) for hook in names.MLP_HOOKS if hook.name in names.ALIASED]


@pytest.mark.parametrize("stored", MLP_NAMES)
def test_either_name_finds_what_is_stored_under_one(stored: str):
    other = names.alias(stored)
    assert other is not None
    short = stored.rpartition(".hook_")[2]
    for name in (stored, other):
        kept = fresh("deepseek", names_filter=name)
        assert len(kept) == 1
        for key in (stored, other, (short, 1), (short, -2)):
            assert key in kept and kept[key] is kept.cache_dict[name]
        assert (short, 2) not in kept
        assert (short, 3) not in kept and (short, None) not in kept and 5 not in kept


def test_what_hooks_filed_under_their_own_names_is_found():
    """As the demo of attribution patching fills a dictionary: `cache[hook.name] = activation`."""
    case, filed = wrapped("mixtral"), dict[str, torch.Tensor]()
    ends = ("hook_embed", "hook_resid_pre", "hook_resid_post", "hook_z", "hook_q", "hook_attn_out", "hook_mlp_out")
    wanted: Any = lambda name: name.endswith(ends)  # noqa: E731
    with torch.no_grad(), case.model.hooks([(wanted, lambda value, hook: filed.update({hook.name: value}))]):
        case.model(case.tokens)
    kept, (_, right) = MoECache(filed, case.model), case.model.run_with_cache(case.tokens, names_filter=wanted)
    names_ = [("resid_pre", 2), ("z", 2), ("q", 1), ("attn_out", 2), "hook_embed", "blocks.0.hook_resid_post"]
    assert "blocks.2.hook_resid_pre" not in filed and "blocks.2.hook_in" in filed  # control: the other name
    assert all(key in kept and torch.equal(kept[key], right[key]) for key in names_)
    assert torch.equal(kept.decompose_resid(), right.decompose_resid())
    del filed["blocks.2.hook_in"]
    assert ("resid_pre", 2) not in kept


def test_gradients_go_by_either_name():
    case = wrapped("deepseek", torch.float64)
    stored = names.mlp(names.EXPERT_OUT, 1)
    _, kept = case.model.run_with_cache(case.tokens, names_filter=stored, incl_bwd=True, return_type="loss")
    case.model.zero_grad()
    assert kept[stored + "_grad"].shape == kept[stored].shape
    assert kept["blocks.1.hook_expert_out_grad"] is kept[stored + "_grad"]
    with pytest.raises(HookError, match=r"names_filter=\['blocks.1.hook_resid_mid'\], incl_bwd=True\) caches it"):
        kept["blocks.1.hook_resid_mid_grad"]


def test_what_is_missing_is_explained():
    kept = fresh("deepseek", names_filter="hook_embed")
    with pytest.raises(
        HookError, match=r"does not hold blocks.2.hook_router_logits.*names_filter=\['blocks.2.hook_router_logits'\]"
    ):
        kept["router_logits", 2]
    fresh("deepseek", names_filter=["blocks.2.hook_router_logits"])["router_logits", 2]
    for layer in (3, -4, 100):
        with pytest.raises(HookError, match=f"there is no layer {layer}; the model has layers 0 to 2"):
            kept["router_logits", layer]
    with pytest.raises(HookError, match="layer 0 is dense and has no blocks.0.hook_expert_out"):
        kept["expert_out", 0]
    assert kept["embed"] is kept["hook_embed"]
    assert list(kept) == ["hook_embed"] == list(kept.keys())
    assert repr(kept) == "MoECache(1 activations, 0.0 MiB: hook_embed)"


def test_a_copy_that_loses_its_batch_axis_leaves_the_cache_alone():
    kept = fresh("deepseek", tokens=wrapped("deepseek").tokens[:1])
    bare = copy.copy(kept).remove_batch_dim()
    assert not bare.has_batch_dim and kept.has_batch_dim
    for name, value in bare.items():
        assert kept[name].shape[0] == 1 and torch.equal(kept[name][0], value)
    assert torch.equal(kept.decompose_experts()[0][:, 0], bare.decompose_experts()[0])


def test_moving_keeps_integers_and_flags():
    kept = MoECache(
        dict(fresh("deepseek").items()),
        wrapped("deepseek", torch.float64).model,
        mask=torch.ones(2, 12, dtype=torch.bool),
    )
    assert kept.to("cpu", torch.bfloat16) is kept
    assert kept["expert_out", 1].dtype == torch.bfloat16
    assert kept["expert_indices", 1].dtype == torch.int64
    assert kept.mask is not None and kept.mask.dtype == torch.bool
    assert kept["expert_out", 1].nbytes * 4 == full("deepseek")[2]["expert_out", 1].nbytes


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"pos_slice": [1, 4]}])
def test_a_cache_on_disk_comes_back(tmp_path: Path, options: dict[str, Any]):
    case = wrapped("deepseek", torch.float64)
    rows = names.expert("hook_out", 1, int(case.model.routing(case.tokens).layer(1).indices[0, 1, 0]))
    wanted = [*full("deepseek")[2], rows]
    kept = fresh("deepseek", names_filter=wanted, **options)
    assert kept.tokens is not None and kept.following is not None
    kept.mask = torch.rand(kept.tokens.shape) > 0.5
    kept.to_disk(tmp_path / "cache.safetensors")
    again = MoECache.from_disk(tmp_path / "cache.safetensors", case.model)
    assert list(again) == list(kept) and rows in again
    for name in kept:
        assert again[name].dtype == kept[name].dtype and torch.equal(again[name], kept[name])
    assert again.has_batch_dim and again.tokens is not None and torch.equal(again.tokens, kept.tokens)
    assert again.following is not None and torch.equal(again.following, kept.following)
    assert again.mask is not None and torch.equal(again.mask, kept.mask)
    assert torch.equal(again.decompose_experts()[0], kept.decompose_experts()[0])
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors"]


@pytest.mark.typed
def test_two_names_of_one_tensor_are_written_once(tmp_path: Path):
    case = wrapped("deepseek", torch.float64)
    value = torch.randn(2, 12, 3, 32, dtype=torch.float64)
    both = {names.mlp(names.EXPERT_OUT, 1): value, names.block(names.EXPERT_OUT, 1): value}
    views = {
        "whole item": value[:1],
        "a": value[:, :5],
        "b": value[:, 3:],
        "c": value.transpose(1, 2),
        "d": torch.zeros(0, 4),
        "e": torch.zeros(0, 4),
    }
    kept = MoECache(both | views, case.model, has_batch_dim=False)
    kept.to_disk(tmp_path / "cache")
    again = MoECache.from_disk(tmp_path / "cache", case.model)
    assert not again.has_batch_dim
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    one, other = both
    assert again[one] is again[other]
    size = sum(view.nbytes for view in (value, *views.values()))
    assert size < (tmp_path / "cache").stat().st_size < size + 4096


@pytest.mark.typed
def test_a_cache_pickles_by_value_and_is_bound_to_a_model():
    case, _, made = full("deepseek")
    data = pickle.dumps(made)
    assert b"HookedMoE" not in data, "no model in it"
    came = pickle.loads(data)
    assert type(came) is MoECache and list(came) == list(made)
    assert all(torch.equal(came[name], made[name]) for name in made)
    assert torch.equal(came["expert_out", -1], made["expert_out", -1]), "names need no model"
    with pytest.raises(InputError, match=r"was unpickled and has no model, whose \w+ is needed: use cache.bind\("):
        came.partial_sum(2, ranks=[0])
    bound = came.bind(case.model)
    assert torch.equal(bound.partial_sum(2, ranks=[0]).values, made.partial_sum(2, ranks=[0]).values)
    for copied in (copy.copy(made), copy.deepcopy(made)):
        assert copied.model is made.model
        assert torch.equal(copied["hook_embed"], made["hook_embed"])
    copy.deepcopy(made)["hook_embed"].zero_()
    assert made["hook_embed"].any(), "a deep copy has tensors of its own"
    with pytest.raises(InputError, match=r"the cache was made by a model with moe_layers \[1, 2\]"):
        came.bind(wrapped("olmoe").model)


def test_a_cache_is_read_by_the_same_model_under_another_name_and_by_no_other(tmp_path: Path, monkeypatch):
    case = wrapped("deepseek", torch.float64)
    fresh("deepseek", names_filter="hook_embed").to_disk(tmp_path / "cache")
    monkeypatch.setattr(case.model.cfg, "model_name", "another")
    with pytest.warns(UserWarning, match="is used with 'another': sizes and routers are alike"):
        assert len(MoECache.from_disk(tmp_path / "cache", case.model)) == 1
    routers = case.model.W_router
    with torch.no_grad():
        kept = routers[2].clone()
        routers[2].mul_(1.1)
        try:
            with pytest.raises(InputError, match="was made by a model with other router weights"):
                MoECache.from_disk(tmp_path / "cache", case.model)
        finally:
            routers[2].copy_(kept)


def test_another_models_cache_is_refused(tmp_path: Path):
    case = wrapped("deepseek", torch.float64)
    fresh("deepseek", names_filter="hook_embed").to_disk(tmp_path / "cache")
    with pytest.raises(InputError, match=r"was made by a model with moe_layers \[1, 2\]; this one has \[0, 1, 2\]"):
        MoECache.from_disk(tmp_path / "cache", wrapped("mixtral", torch.float64).model)

    def like(**changes: Any) -> Any:
        """The same model, but for some attributes."""
        names = [name for name in dir(HookedModel) if not name.startswith("_") and name != "cfg"]
        found = SimpleNamespace(cfg=copy.copy(case.model.cfg))
        for name in names:
            setattr(found, name, changes.pop(name, getattr(case.model, name)))
        for name, value in changes.items():
            setattr(found.cfg, name, value)
        return found

    for changes in (
        {"d_model": 16},
        {"n_layers": 4},
        {"d_vocab": 7},
        {"n_experts": 9},
        {"top_k": 2},
        {"moe_layers": (0, 1)},
    ):
        what = next(iter(changes))
        with pytest.raises(InputError, match=f"was made by a model with {what} "):
            MoECache.from_disk(tmp_path / "cache", like(**changes))
    assert len(MoECache.from_disk(tmp_path / "cache", like())) == 1
    elsewhere = like(model_name=f"some/other/place/{case.model.cfg.model_name}")
    assert len(MoECache.from_disk(tmp_path / "cache", elsewhere)) == 1


@pytest.mark.typed
def test_a_file_that_is_no_cache_is_refused(tmp_path: Path):
    case = wrapped("deepseek", torch.float64)
    case.model.routing(case.tokens).save(tmp_path / "routing")
    with pytest.raises(InputError, match="holds Routing; expected a MoECache"):
        MoECache.from_disk(tmp_path / "routing", case.model)
    assert Routing.load(tmp_path / "routing").layers == (1, 2)
    with pytest.raises(InputError, match="there is no file"):
        MoECache.from_disk(tmp_path / "absent", case.model)


@pytest.mark.typed
def test_what_follows_is_known_whatever_is_kept_of_a_cache():
    case = wrapped("deepseek", torch.float64)
    tokens, mask = case.tokens.clone(), torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3] = mask[1, 10:] = False  # padding on either side
    name = names.block(names.RESID_MID, 1)
    kept = fresh("deepseek", tokens, names_filter=[name], attention_mask=mask.long())
    expected = torch.full((2, 12), -1)
    expected[0, 3:11], expected[1, :9] = tokens[0, 4:], tokens[1, 1:10]
    assert kept.following is not None and torch.equal(kept.following, expected)
    some = fresh("deepseek", tokens, names_filter=[name], attention_mask=mask.long(), pos_slice=[1, 4, 9])
    assert some.following is not None and torch.equal(some.following, expected[:, [1, 4, 9]])
    row = kept.apply_slice_to_batch_dim([1])
    assert row.following is not None and torch.equal(row.following, expected[[1]])
    assert row.remove_batch_dim().following is not None and torch.equal(row.following, expected[1])
    assert kept.to("cpu", torch.bfloat16).following is not None and torch.equal(kept.following, expected)
    with torch.no_grad():
        hf: Any = case.model.original_model
        embedded = hf.get_input_embeddings()(tokens)
        assert (
            case.model.run_with_cache(embedded, names_filter=[name])[1].following is None
        )  # no tokens, so none follow
