"""Between two passes, parameters that are kept elsewhere can be read as any others, and not be written to."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_lens import HookedMoE, LogitLens, PartialSum
from moe_lens.errors import InputError
from moe_lens.lenses import router_attrs, router_geometry
from moe_lens.model.loading import through_transformers
from moe_lens.model.loading.checksum import checksum
from moe_lens.model.loading.parameters_digest import parameters_digest
from moe_lens.model.loading.streamed_weights import streamed_weights
from tests.families import build, tokens

ALL = {"model": "disk", "lm_head": "disk"}


@pytest.fixture(scope="module", params=["deepseek", "mixtral", "gpt_oss, converted"])
def pair(request, tmp_path_factory) -> tuple[HookedMoE, HookedMoE]:
    """A model in memory, and the same one on disk: read from its checkpoint, or what transformers wrote of it."""
    path: Path = tmp_path_factory.mktemp("stored")
    family, _, converted = request.param.partition(", ")
    build(family).save_pretrained(path / "model")
    whole = HookedMoE.from_pretrained(path / "model").requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        if converted:  # as families are of which transformers computes more than it stacks
            patch.setattr(through_transformers, "_readable", lambda *_: None)
        away = HookedMoE.from_pretrained(path / "model", device_map=ALL, offload_folder=str(path / "off"))
    assert all(p.is_meta for p in away.requires_grad_(False).original_model.parameters())
    assert (streamed_weights(away.original_model) is None) == bool(converted)
    return whole, away


@pytest.mark.typed
def test_every_matrix_is_the_plain_model_s(pair):
    whole, away = pair
    layer, names = whole.moe_layers[-1], ["W_router", "W_gate", "W_in", "W_out"]
    for name in names:
        mine, theirs = getattr(away, name), getattr(whole, name)
        assert mine.shape == theirs.shape
        assert torch.equal(mine[layer], theirs[layer])
        assert torch.equal(mine[layer, [6, 1]], theirs[layer, [6, 1]])
        for experts in (5, slice(2, 4)):
            assert torch.equal(mine[layer, experts], theirs[layer, experts])
            with pytest.raises(InputError, match="writes to a copy, which leaves the model as it is"):
                mine[layer, experts].mul_(2)
    for name in ("W_U", "W_E", "W_Q", "W_O"):
        assert torch.equal(getattr(away, name), getattr(whole, name)), name
    parts = [(f"blocks[1].attn.{name}", model.blocks[1].attn) for model in pair for name in ("W_Q", "W_O", "b_Q")]
    parts += [("unembed.W_U", model.unembed) for model in pair] + [("embed.W_E", model.embed) for model in pair]
    read: dict[str, list[Any]] = {}
    for path, part in parts:
        read.setdefault(path, []).append(getattr(part, path.rpartition(".")[2]))
    assert all(mine is theirs is None or torch.equal(mine, theirs) for mine, theirs in read.values())
    for written in (away.W_U, away.blocks[1].attn.W_Q):
        with pytest.raises(InputError, match="kept elsewhere and read when they are needed"):
            written[0] = 1
    assert all(p.is_meta for p in away.original_model.parameters()), "nothing stays"
    assert away._experts(layer).sizes()[1] == whole._experts(layer).sizes()[1]


@pytest.mark.typed
@pytest.mark.parametrize(
    "pair", ["deepseek", "mixtral"], indirect=True
)  # transformers' own copies are read a parameter at a time
def test_one_expert_is_read_alone(pair):
    _, away = pair
    weights = streamed_weights(away.original_model)
    assert weights is not None
    read = weights.settled()
    found = away.W_out[away.moe_layers[0], 3]
    assert weights.settled() - read == found.numel() * found.element_size()


def test_what_is_read_on_disk_is_in_the_dtype_that_passes_compute_in(tmp_path):
    build("deepseek").save_pretrained(tmp_path)
    ids, read = tokens(2, 9), list[list[Any]]()
    ways: tuple[dict[str, Any], ...] = ({}, {"device_map": ALL})
    for where in ways:
        model: Any = HookedMoE.from_pretrained(tmp_path, **where).to(torch.bfloat16)
        layer, (_, cache) = model.moe_layers[-1], model.run_with_cache(ids)
        views = [model.W_router[layer], model.W_in[layer, 3], model.W_out[layer, [5, 1]], model.ln_final.w]
        views += [model.W_Q, model.blocks[1].attn.W_O, model.W_U, model.embed.W_E, model.blocks[0].mlp.W_in]
        read.append([*views, cache.logit_attrs(cache.decompose_resid(), 3)])
    for mine, theirs in zip(*read, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert read[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize("flag", ["attn_result", "split_qkv_input", "attn_in"])
def test_heads_are_computed_by_weights_that_are_on_disk(pair, flag):
    found: list[Any] = []
    for model in pair:
        getattr(model, f"set_use_{flag}")(True)
        found.append(model.run_with_cache(tokens(2, 9))[1])
        getattr(model, f"set_use_{flag}")(False)
    whole, away = found
    assert all(torch.equal(away[name], whole[name]) for name in whole)
    assert all(p.is_meta for p in pair[1].original_model.parameters()), "nothing stays"


def test_lenses_attribution_and_single_experts_compute_as_in_memory(pair):
    whole, away = pair
    ids, layer = tokens(2, 9), whole.moe_layers[-1]
    found: list[Any] = []
    for model in pair:
        _, cache = model.run_with_cache(ids)
        geometry = router_geometry(model, layer)
        sums = [PartialSum(ranks=[0]), PartialSum()]
        stack, _ = cache.decompose_resid(return_labels=True)
        found.append(
            (
                *vars(LogitLens(model).decode(cache, sums)).values(),
                cache.logit_attrs(stack, 7),
                model.expert_outputs(layer, cache[f"blocks.{layer}.mlp.hook_in"], torch.ones(8, dtype=torch.bool)),
                *(geometry.tokens, geometry.attraction, router_attrs(cache, layer).values),
            )
        )
    for mine, theirs in zip(*found, strict=True):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    assert LogitLens(away).unembedding_digest() == LogitLens(whole).unembedding_digest()


@pytest.mark.typed
def test_a_model_is_known_wherever_it_is_kept(pair):
    whole, away = pair
    known = parameters_digest(whole.original_model)
    assert parameters_digest(away.original_model) == known
    with torch.no_grad():
        before = whole.W_out[whole.moe_layers[0], 0][5, 7].clone()
        whole.W_out[whole.moe_layers[0], 0][5, 7] += 1
        assert parameters_digest(whole.original_model) != known
        whole.W_out[whole.moe_layers[0], 0][5, 7] = before


@pytest.mark.typed
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8, torch.bool])
def test_any_change_of_a_parameter_changes_its_checksum(dtype):
    """Negative control: another layout of the same numbers does not."""
    values = torch.randint(
        0, 2 if dtype == torch.bool else 200, (3, 700, 31), generator=torch.Generator().manual_seed(0)
    ).to(dtype)
    found = [checksum(values)]
    assert checksum(values.mT.contiguous().mT) == checksum(torch.cat([values, values])[3:]) == found[0]
    for at in (0, 1, 4095, 4096, 33333, values.numel() - 1):
        changed = values.clone()
        changed.view(-1)[at] = 0 if changed.view(-1)[at] else 1
        found.append(checksum(changed))
    found += [
        checksum(values[[0, 2, 1]]),
        checksum(values[:, torch.arange(700) ^ 1]),
        checksum(values[..., [1, 0, *range(2, 31)]]),
    ]
    assert len(set(found)) == len(found)
    assert checksum(values[:0]) == checksum(torch.zeros(0)) and checksum(values[0, 0, 0]) != checksum(values[0, 0, 1])


def test_a_change_of_any_expert_is_seen_however_many_there_are():
    model: Any = torch.nn.Module()
    model.config = SimpleNamespace(to_dict=dict)
    model.experts = torch.nn.Parameter(torch.zeros(200, 3, 50))
    model.other = torch.nn.Parameter(torch.zeros(3, 1))
    model.nothing = torch.nn.Parameter(torch.zeros(4, 0, 3))
    found = [parameters_digest(model)]
    for expert in range(200):
        with torch.no_grad():
            model.experts[expert] = 1
        found.append(parameters_digest(model))
    assert len(set(found)) == 201


def test_a_selection_bias_is_part_of_what_a_model_is_known_by():
    """A buffer that is saved; inverse frequencies are none."""
    model: Any = build("deepseek_v3")
    known, gate = parameters_digest(model), model.model.layers[1].mlp.gate
    before = gate.e_score_correction_bias.clone()
    gate.e_score_correction_bias[2] += 1
    assert parameters_digest(model) != known
    gate.e_score_correction_bias.copy_(before)
    model.model.rotary_emb.inv_freq.mul_(2)
    assert parameters_digest(model) == known


def test_heads_neurons_and_parameters_by_name_are_those_in_memory(pair):
    """TransformerLens leaves out of `get_params` what it cannot read."""
    found: list[dict[str, Any]] = []
    for model in pair:
        _, cache = model.run_with_cache(tokens(2, 9))
        resid = cache.get_full_resid_decomposition(expand_neurons=model.family.model_type != "gpt_oss")
        found.append(
            {
                **model.get_params(),
                "heads": cache.stack_head_results(layer=3),
                "neurons": cache.stack_neuron_results(3),
                "resid": resid,
                "bias": model.accumulated_bias(3),
            }
        )
        assert model.cfg.device == "cpu", "where tokens go"
    mine, theirs = found[1], found[0]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert all(p.is_meta for p in pair[1].original_model.parameters()), "nothing stays"
    with pytest.raises(InputError, match="writes to a copy"):
        mine["ln_final.w"].mul_(2)


WRITES = {
    "experts.down_proj": lambda model: model.original_model.model.layers[2].mlp.experts.down_proj[:].zero_(),
    "model.norm.w": lambda model: model.ln_final.weight.mul_(2),
    "layers.0.mlp": lambda model: model.original_model.model.layers[0].mlp.up_proj.weight.mul_(2),
    "q_proj.weight": lambda model: model.blocks[2].attn.q.weight.mul_(2),
    "1.input_layernorm.weight": lambda model: setattr(
        model.original_model.model.layers[1].input_layernorm, "weight", torch.nn.Parameter(torch.full((32,), 3.0))
    ),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("ran", [False, True], ids=["before a pass", "after one"])
def test_what_is_written_to_a_parameter_on_disk_is_not_lost_in_silence(name, ran, tmp_path):
    build("deepseek").save_pretrained(tmp_path / "model")
    whole = HookedMoE.from_pretrained(tmp_path / "model", check=False)
    away = HookedMoE.from_pretrained(tmp_path / "model", check=False, device_map=ALL)
    ids = tokens(1, 5)
    with torch.no_grad():
        before = whole(ids)
        assert not ran or torch.equal(away(ids), before)
        for model in (whole, away):
            WRITES[name](model)
        assert not torch.equal(whole(ids), before)
        for refused in (lambda: away(ids), lambda: away.generate(ids, max_new_tokens=1), away.save_pretrained):
            with pytest.raises(InputError, match=rf"{name}[.\w]* was written to and is kept elsewhere"):
                refused(*([tmp_path / "new"] if refused == away.save_pretrained else []))


def test_a_model_on_disk_is_saved_whole(pair, tmp_path):
    whole, away = pair
    away.save_pretrained(tmp_path / "saved")
    again = HookedMoE.from_pretrained(tmp_path / "saved").requires_grad_(False)
    assert torch.equal(again(tokens(2, 9)), whole(tokens(2, 9)))
    assert all(p.is_meta for p in away.original_model.parameters())
