"""`state_dict` holds the whole model, each parameter once and by transformers' names, and is loaded whole or not."""

import copy
import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from moe_lens.errors import MoELensError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.loading.state_dict import StateError, WholeState
from tests.matrix.configs import build, tokens

FAMILIES = ["deepseek", "gpt_oss", "qwen3_next", "granitemoehybrid"]
"""By TransformerLens's adapters and by ours, with buffers and shared experts of several kinds."""
families = pytest.mark.parametrize("model_type", FAMILIES)


def wrapped(model_type: str, seed: int = 0, **changes: Any) -> HookedMoE:
    return HookedMoE.from_hf(build(model_type, seed=seed, **changes), check=False).requires_grad_(False)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens())


def copied(state: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.typed
@families
def test_it_is_transformers_own_and_loads_into_both(model_type: str) -> None:
    plain: Any = build(model_type)
    expected, state = plain.state_dict(), wrapped(model_type).state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    theirs: Any = build(model_type, seed=1)
    theirs.load_state_dict(state, strict=True)
    assert all(torch.equal(value, expected[name]) for name, value in theirs.state_dict().items())
    other = wrapped(model_type, seed=1)
    right = logits(wrapped(model_type))
    assert not torch.equal(logits(other), right)
    assert other.load_state_dict(state) == ([], [])
    assert torch.equal(logits(other), right)
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in plain.named_parameters()]


@families
@pytest.mark.parametrize("assign", [False, True])
def test_names_of_transformer_lens_and_of_the_bridge_are_read(model_type: str, assign: bool) -> None:
    model, other = wrapped(model_type), wrapped(model_type, seed=1)
    own = {id(value): name for name, value in model.state_dict(keep_vars=True).items()}
    theirs: dict[str, Tensor] = TransformerBridge.state_dict(model, keep_vars=True)  # its names, where it has one
    assert len(theirs) > 8 and not theirs.keys() <= set(own.values())
    seen = {own[id(value)]: (name, value) for name, value in theirs.items()}
    mixed = copied(dict(seen.get(name, (name, value)) for name, value in model.state_dict(keep_vars=True).items()))
    other.load_state_dict(mixed, assign=assign)
    assert torch.equal(logits(other), logits(model))
    raw = copied(model.original_model.state_dict())
    assert any("_original_component" in name for name in raw)
    again = wrapped(model_type, seed=1)
    again.load_state_dict(raw, assign=assign)
    assert torch.equal(logits(again), logits(model))


def test_what_transformer_lens_keeps_is_a_part_and_not_enough() -> None:
    model = wrapped("mixtral")
    with pytest.raises(StateError, match=r"(?s)mlp\.experts\.gate_up_proj is missing"):
        model.load_state_dict(TransformerBridge.state_dict(model))


@families
def test_as_part_of_another_module(model_type: str) -> None:
    held, other = (nn.ModuleDict({"lm": wrapped(model_type, seed), "probe": nn.Linear(2, 2)}) for seed in (0, 1))
    state = held.state_dict()
    own = wrapped(model_type).state_dict()
    assert list(state) == [f"lm.{name}" for name in own] + ["probe.weight", "probe.bias"]
    other.load_state_dict(state, strict=True)
    assert torch.equal(logits(other["lm"]), logits(held["lm"]))
    assert torch.equal(state["probe.weight"], other.state_dict()["probe.weight"])
    filled: dict[str, Tensor] = OrderedDict(before=torch.zeros(1))
    assert other["lm"].state_dict(destination=filled, prefix="a.b.") is filled
    assert list(filled) == ["before", *(f"a.b.{name}" for name in own)]
    first = next(iter(own))
    del state[f"lm.{first}"]
    with pytest.raises(RuntimeError, match=f'Missing key.*"lm.{first}"') as raised:
        other.load_state_dict(state, strict=True)
    assert "_original_component" not in str(raised.value)
    assert first in other["lm"].load_state_dict({}, strict=False).missing_keys


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.popitem(), "lm_head.weight is missing"),
        (lambda state: state.update(extra=torch.ones(1)), "extra is unexpected"),
        (lambda state: state.update({"lm_head.weight": torch.ones(3)}), r"lm_head.weight has shape \(3,\), expected"),
        (lambda state: state.update({"lm_head.weight": 3}), "lm_head.weight is an int, expected a tensor"),
        (lambda state: state.update({"lm_head.weight": state["lm_head.weight"].to("meta")}), "holds no numbers"),
        (lambda state: state.update({"unembed.weight": state["lm_head.weight"] + 1}), "differs from another tensor"),
        (lambda state: state.clear(), r"model.embed_tokens.weight is missing(?s:.*)more"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_any_other_dictionary_is_refused_and_nothing_of_it_loaded(change: Any, said: str, assign: bool) -> None:
    model = wrapped("mixtral")
    before = logits(model)
    state = copied(wrapped("mixtral", seed=1).state_dict())
    change(state)
    with pytest.raises(MoELensError, match=said) as raised:
        model.load_state_dict(state, assign=assign)
    assert isinstance(raised.value, RuntimeError), "what torch raises"
    assert torch.equal(logits(model), before)


def test_of_another_model_every_name_is_told() -> None:
    with pytest.raises(StateError, match=r"(?s)is missing"):
        wrapped("mixtral").load_state_dict(wrapped("qwen3_moe").state_dict())


def test_not_strict_is_torch_s_own_and_says_what_was_left() -> None:
    model = wrapped("mixtral")
    found = model.load_state_dict({"lm_head.weight": torch.zeros(101, 40), "extra": torch.ones(1)}, strict=False)
    assert "lm_head.weight" not in found.missing_keys and found.unexpected_keys == ["extra"]
    assert not logits(model).any()
    with pytest.raises(StateError, match="has shape"):
        model.load_state_dict({"lm_head.weight": torch.zeros(1)}, strict=False)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("model_type", ["deepseek", "mixtral"])
def test_a_tied_parameter_is_held_once(model_type: str, assign: bool) -> None:
    model, other = (wrapped(model_type, seed, tie_word_embeddings=True) for seed in (0, 1))
    state = copied(model.state_dict())
    assert "lm_head.weight" not in state and "model.embed_tokens.weight" in state
    pointers = [value.data_ptr() for value in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers) == len(list(model.parameters()))
    other.load_state_dict(state, assign=assign)
    assert torch.equal(logits(other), logits(model))
    assert other.unembed.weight is other.embed.weight
    other.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})  # as transformers lists it
    with pytest.raises(StateError, match="differs from another"):
        other.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1})


def test_it_goes_through_a_file_and_holds_what_an_optimiser_changed(tmp_path: Path) -> None:
    model = wrapped("deepseek").requires_grad_(True)
    before = logits(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(tokens(), return_type="loss").backward()
    optimiser.step()
    after = logits(model)
    assert not torch.equal(after, before)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = wrapped("deepseek", seed=1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(logits(other), after)


REORDERED = ["deepseek_v4", "qwen3_vl_moe"]
"""Whose components are in another order than transformers' parameters."""


@pytest.mark.typed
@pytest.mark.parametrize("model_type", ["deepseek", *REORDERED])
def test_a_module_around_the_model_has_its_parameters_in_the_same_order(model_type: str) -> None:
    model = wrapped(model_type)
    own, around = ([id(p) for p in each.parameters()] for each in (model, nn.ModuleList([model])))
    assert around == own
    walked = [id(p) for _, m in super(WholeState, model).named_modules() for p in m.parameters(recurse=False)]
    assert (walked == own) == (model_type not in REORDERED)  # negative control


@pytest.mark.parametrize("model_type", ["deepseek", "deepseek_v4"])
def test_averages_of_weights_are_models_of_their_own(model_type: str) -> None:
    model, other = wrapped(model_type), wrapped(model_type, seed=1)
    before = logits(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for each in (model, other):
        average.update_parameters(each)
    assert torch.equal(logits(model), before), "the copy shares nothing with it"
    states = [dict(each.named_parameters()).values() for each in (model, other, average.module)]
    assert all(torch.allclose(c, (a + b) / 2, atol=1e-6, rtol=0) for a, b, c in zip(*states, strict=True))  # float32
    third = wrapped(model_type, seed=2)
    third.load_state_dict(average.module.state_dict())
    assert torch.equal(logits(third), logits(average))
    again = AveragedModel(wrapped(model_type, seed=3))
    again.load_state_dict(average.state_dict())
    assert torch.equal(logits(again), logits(third))
    copied_model: Any = again.module
    _, cache = copied_model.run_with_cache(tokens())
    assert cache["expert_out", 2].shape[:2] == tokens().shape, "its hooks are its own"


@pytest.mark.typed
@pytest.mark.parametrize("model_type", ["deepseek", "granitemoehybrid", "qwen2_moe", "llama4_text"])
def test_a_model_is_pickled_whole(model_type: str) -> None:
    model = wrapped(model_type)
    before = logits(model)  # a pass hangs hooks of its own on blocks
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(logits(again), before) and torch.equal(logits(model), before)
    with torch.no_grad():
        _, cache = again.run_with_cache(tokens())
        _, expected = model.run_with_cache(tokens())
    assert cache.keys() == expected.keys()
    assert all(torch.equal(cache[name], expected[name]) for name in expected)
    assert copy.deepcopy(again).state_dict().keys() == model.state_dict().keys()


def test_a_model_on_disk_is_copied_and_not_pickled(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    model = HookedMoE.from_pretrained(tmp_path, device_map={"": "cpu", "model.layers.1": "disk"})
    before = logits(model)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(UnsupportedModelError, match=r"^a model that fetches weights .* save_pretrained"):
            pickle.dumps(model, protocol)
    with pytest.raises(UnsupportedModelError, match="is not pickled"):
        torch.save({"model": model}, io.BytesIO())
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), before) and torch.equal(logits(model), before)
    with pytest.raises(UnsupportedModelError, match="is not pickled"):
        pickle.dumps(again)


def test_what_holds_no_numbers_is_refused(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "stored")
    last = {"model.layers.3": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", **{f"model.layers.{i}": "cpu" for i in range(3)}}
    hf = AutoModelForCausalLM.from_pretrained(
        tmp_path / "stored", device_map={**places, **last}, offload_folder=tmp_path / "offload"
    )
    model = HookedMoE.from_hf(hf)
    state = wrapped("mixtral").state_dict()
    for call in (
        model.state_dict,
        lambda: model.load_state_dict(state),
        lambda: model.load_state_dict(state, assign=True),
    ):
        with pytest.raises(UnsupportedModelError, match=r"layers\.3.* is not in memory.*offloaded"):
            call()


def test_a_model_on_the_meta_device_can_be_given_its_numbers() -> None:
    with torch.device("meta"):
        hf = type(build("mixtral"))._from_config(build("mixtral").config)
    model = HookedMoE.from_hf(hf).requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        model.state_dict()
    state = wrapped("mixtral").state_dict()
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        model.load_state_dict(state)
    model.load_state_dict(state, assign=True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_quantised_parameters_are_refused() -> None:
    model = wrapped("mixtral")
    norm: Any = model.original_model.model.norm
    norm.original_component.weight = nn.Parameter(torch.ones(40, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"quantised \(model\.norm\.weight is torch\.int8\)"):
        model.state_dict()


def test_offloaded_weights_change_the_dtype_and_stay_where_they_are(tmp_path: Path) -> None:
    hf = build("olmoe")
    hf.save_pretrained(tmp_path / "model")
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    layers = {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(hf.config.num_hidden_layers)}
    places: Any = {**dict.fromkeys(parts, "cpu"), **layers}
    model = HookedMoE.from_pretrained(tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "off"))
    with pytest.raises(UnsupportedModelError, match="weights are offloaded, and cannot be moved"):
        model.to("cpu", torch.bfloat16)
    assert model.cfg.dtype == torch.float32
    assert torch.equal(logits(model.to(torch.bfloat16)), logits(HookedMoE.from_hf(hf.bfloat16())))
