"""Families whose layers wire experts in ways of their own: what hooks show is what the layer goes on with."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import names
from moe_lens.errors import HookError, InputError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.interventions.expert_means import ExpertMeans
from moe_lens.interventions.patching import patch
from moe_lens.lenses.expert_writing import expert_vocabulary
from moe_lens.lenses.router_directions import router_geometry
from moe_lens.model.families.table import family_of
from moe_lens.stats.importance_scores import ImportanceStats
from moe_lens.stats.null_routing import random_router
from tests.matrix.configs import build, config, tokens
from tests.matrix.laws import LAWS, Case
from tests.stats.test_live import text

LAYER = 2


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.fixture(scope="module")
def gemma() -> HookedMoE:
    return HookedMoE.from_hf(build("gemma4_text"))


def test_gemma4_adds_the_normed_experts_to_the_normed_dense_mlp_and_rescales(gemma: HookedMoE) -> None:
    def norm(x: Tensor, name: str) -> Tensor:
        gain = layer.get_submodule(name)._original_component.weight
        return gain * x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()

    model: Any = gemma.original_model
    layer = model.model.layers[LAYER]._original_component
    with torch.no_grad():
        _, cache = gemma.run_with_cache(tokens())
        mid, post = (cache[names.block(name, LAYER)] for name in (names.RESID_MID, names.RESID_POST))
        routed = norm(cache["routed_out", LAYER], "post_feedforward_layernorm_2")
        dense = norm(cache[f"blocks.{LAYER}.dense_mlp.hook_out"], "post_feedforward_layernorm_1")
        close(routed, cache[f"blocks.{LAYER}.ln_experts.hook_out"])
        close(dense, cache[f"blocks.{LAYER}.ln_dense.hook_out"])
        whole = norm(routed + dense, "post_feedforward_layernorm")
        close((mid + whole) * layer.layer_scalar, post)
        assert layer.layer_scalar.item() == pytest.approx(0.8), "or the factor would not be seen"
        read = cache[names.mlp(names.MLP_IN, LAYER)]
        gain = layer.pre_feedforward_layernorm_2.weight
        close(gain * mid / (mid.square().mean(-1, keepdim=True) + 1e-6).sqrt(), read)
        out = gemma.expert_outputs(LAYER, read, cache["expert_indices", LAYER])
    close(out, cache["expert_out", LAYER])


@pytest.mark.typed
@torch.no_grad()
def test_gemma4_inside_has_transformers_names_and_a_block_those_of_hooks(gemma: HookedMoE) -> None:
    plain: Any = build("gemma4_text")
    model: Any = copy.deepcopy(gemma)
    inside, blocks = model.original_model, model.blocks
    layers, theirs = inside.model.layers, plain.model.layers
    for name, parameter in plain.named_parameters():
        assert torch.equal(inside.get_parameter(name), parameter), name
    assert blocks[LAYER].mlp.hooks is not None and blocks[LAYER].mlp is layers[LAYER].experts
    assert blocks[LAYER].dense_mlp is layers[LAYER].mlp, "a control: by the block's names this is another"
    assert isinstance(layers[LAYER], torch.nn.Module) and layers[LAYER] == layers[-2] == blocks[LAYER]
    assert list(layers[1:]) == list(blocks[1:]) and copy.deepcopy(layers[LAYER]).mlp is not layers[LAYER].mlp

    def agree(change: str, with_hooks: bool = True) -> None:
        logits = plain(tokens(), use_cache=False).logits
        assert torch.equal(model(tokens()), logits), change
        assert not with_hooks or torch.equal(model.run_with_cache(tokens())[0], logits), change

    called: list[Any] = []
    for one in (layers, theirs):
        one[1].mlp.register_forward_hook(lambda *at: called.append(at[2]))
        one[1].register_forward_hook(lambda *at: called.append(at[2]))
    agree("torch's hooks", with_hooks=False)
    mlp, layer = called[:2], called[2:]
    assert all(torch.equal(one, other) for one, other in zip(mlp, layer, strict=True)), "are called on the same parts"
    wider = torch.nn.Linear(model.cfg.d_model, theirs[LAYER].mlp.gate_proj.out_features, bias=False)
    for one in (layers, theirs):
        one[LAYER].mlp.gate_proj = wider
        for parameter in one[1].mlp.parameters():
            parameter.mul_(0.5)
    agree("a dense layer replaced, another scaled")
    for one in (layers, theirs):
        one[LAYER].mlp = copy.deepcopy(one[0].mlp)
    agree("a dense MLP replaced")
    layers[0], layers[1] = layers[1], layers[0]
    assert list(layers) == list(blocks), "there is one list of them"
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.[01]: another"):
        model(tokens())
    layers.insert(0, layers[1])
    del layers[2]
    agree("layers swapped, and put back")
    assert torch.equal(pickle.loads(pickle.dumps(gemma))(tokens()), gemma(tokens()))


@pytest.mark.typed
def test_gemma4_s_layers_inside_are_the_blocks_in_all_but_names(gemma: HookedMoE) -> None:
    model: Any = copy.deepcopy(gemma)
    layers, block = model.original_model.model.layers, model.blocks[LAYER]
    layer = layers[LAYER]
    assert (repr(layer), hash(layer), dir(layer)) == (repr(block), hash(block), dir(block))
    assert copy.copy(layer).experts is block.mlp
    kind, parts = layer.__reduce_ex__(4)
    assert kind(*parts) == layer
    layer.note = 1
    assert block.note == 1
    del layer.note
    assert not hasattr(block, "note")
    assert not any(part.training for part in model.original_model.modules())
    assert layers.train() is layers and model.blocks.training and block.training and not model.original_model.training
    layers.add_module("0", layers[1])
    assert model.blocks[0] is model.blocks[1]


@pytest.mark.typed
def test_gemma4_lacks_the_hooks_that_could_not_be_true(gemma: HookedMoE) -> None:
    for name in (names.block(names.BLOCK_MLP_OUT, LAYER), names.mlp(names.SHARED_OUT, LAYER)):
        assert name not in gemma.hook_dict
        with pytest.raises(HookError, match="does not exist"):
            gemma.run_with_cache(tokens(), names_filter=name)
    with pytest.raises(HookError, match="no hook_mlp_out.*no term of a sum"):
        gemma.run_with_cache(tokens())[1].partial_sum(LAYER, ranks=[0])


@pytest.mark.typed
def test_what_sets_router_rows_beside_the_experts_input_is_refused_where_routers_read_another(
    gemma: HookedMoE,
) -> None:
    with pytest.raises(InputError, match="routers of gemma4_text do not read what its experts read"):
        router_geometry(gemma, LAYER)
    with pytest.raises(InputError, match="routers of gemma4_text do not read what its experts read"):
        random_router(gemma, text(tokens()))


# --- experts in a narrower space ---

LATENT = 32


@pytest.fixture(scope="module")
def latent() -> Case:
    return Case("nemotron_h", {"moe_latent_size": LATENT})


@pytest.mark.parametrize("law", LAWS)
def test_nemotron_h_obeys_every_law_with_experts_in_a_narrower_space(latent: Case, law: str) -> None:
    LAWS[law](latent)


def test_nemotron_h_adds_what_its_experts_give_only_where_they_have_no_space_of_their_own(latent: Case) -> None:
    assert latent.at(names.EXPERT_OUT).shape[-1] == LATENT != latent.model.cfg.d_model
    assert not latent.family.adds_as_computed
    assert family_of(config("nemotron_h")).adds_as_computed


def test_an_expert_without_a_second_branch_says_so(latent: Case) -> None:
    one = names.expert("hook_pre_linear", latent.layer, 2)
    with pytest.raises(HookError, match=r"have a single branch\. There is .*hook_pre, .*hook_post, .*hook_out$"):
        latent.model.run_with_cache(latent.tokens, names_filter=one)


def test_what_needs_outputs_as_wide_as_the_stream_is_refused_where_they_are_not(latent: Case) -> None:
    model, layer = latent.model, latent.layer
    narrower = "experts of this nemotron_h compute in a narrower space"
    every = torch.ones_like(latent.tokens, dtype=torch.bool)
    needs: list[Any] = [
        lambda: ExpertMeans.measure(model, latent.tokens),
        lambda: ExpertMeans.of_cache(latent.cache),
        lambda: expert_vocabulary(model, layer, 0),
        lambda: ImportanceStats(model.moe_layers, model.n_experts).hooks(model, every),
    ]
    for need in needs:
        with pytest.raises(InputError, match=narrower):
            need()
    for site in ("routed_out", "expert_weighted"):
        with pytest.raises(InputError, match=f"experts of this model give {LATENT} numbers a token"):
            patch(model, latent.tokens[:1], latent.tokens[1:], site, lambda logits: logits[:, -1, 5])
    with pytest.raises(InputError, match="routers of nemotron_h do not read what its experts read"):
        router_geometry(model, layer)


# --- experts for text, and others for images ---


def test_hooks_on_text_experts_refuse_input_with_images_and_the_model_itself_does_not() -> None:
    hf: Any = build("ernie4_5_vl_moe")
    images = torch.zeros_like(tokens(), dtype=torch.int32)
    images[0, 3:7] = 1
    with torch.no_grad():
        plain = hf(tokens(), moe_mm_token_type_ids=images).logits
        model = HookedMoE.from_hf(hf)
        layer = model.moe_layers[0]
        assert not torch.equal(plain, model(tokens())), "images have experts of their own"
        assert torch.equal(hf(tokens(), moe_mm_token_type_ids=images).logits, plain)
        hooks = [(names.mlp(names.ROUTER_LOGITS, layer), lambda value, hook: value)]
        with (
            model.hooks(hooks),
            pytest.raises(HookError, match=f"20 of 24 tokens come to the experts of layer {layer}.*text alone"),
        ):
            hf(tokens(), moe_mm_token_type_ids=images)
