"""Modules that are exchanged after a model was wrapped: followed everywhere, or refused in a line."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_lens.errors import UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.lenses.logit_lens import LogitLens
from tests.families import build, tokens
from tests.model.test_families import ParamWrapper

Change = Callable[[Any], None]


class Tuned(nn.Linear):
    """A linear layer of somebody's own."""


def wrapped_and_plain(family: str) -> tuple[HookedMoE, Any]:
    return HookedMoE.from_hf(build(family), check=False), build(family)


def linear(path: str) -> Change:
    """Another linear layer, of a class of its own, in the last layer."""

    def change(model: Any) -> None:
        owner, _, name = f"layers.{len(model.model.layers) - 1}.{path}".rpartition(".")
        holder = model.model.get_submodule(owner)
        rows, columns = getattr(holder, name).weight.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            setattr(holder, name, Tuned(columns, rows, bias=False))

    return change


def scaled_head(model: Any) -> None:
    head = nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
    model.lm_head = head


def swapped_norms(model: Any) -> None:
    first, last = model.model.layers[0], model.model.layers[2]
    with torch.no_grad():
        first.input_layernorm.weight.mul_(2)
    first.input_layernorm, last.input_layernorm = last.input_layernorm, first.input_layernorm


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mixtral", linear("self_attn.o_proj")),
        ("mixtral", linear("self_attn.q_proj")),
        ("qwen2_moe", linear("mlp.shared_expert.down_proj")),
        ("mixtral", scaled_head),
        ("mixtral", swapped_norms),
    ],
)
def test_what_is_exchanged_has_the_hooks_and_the_names_of_its_place(
    family: str, change: Change, tmp_path: Path
) -> None:
    model, plain = wrapped_and_plain(family)
    every = set(model.run_with_cache(tokens())[1])
    for of in (model.original_model, plain):
        change(of)
    with torch.no_grad():
        expected = plain(tokens()).logits
    inside = "attn.hook_pattern", "ln1.hook_normalized", "attn.o.hook_out", "hook_mlp_out"
    logits, cache = model.run_with_cache(tokens())
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert set(cache) == every, "each hook fires"
    assert all(f"blocks.2.{name}" in cache for name in inside)
    assert torch.equal(model(tokens()), expected)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert torch.equal(model.W_U, plain.lm_head.weight.T)
    rows = plain.model.layers[2].self_attn.o_proj.weight.T
    assert torch.equal(model.W_O[2].reshape(rows.shape), rows)
    assert {id(value) for value in model.parameters()} == {id(value) for value in model._own().values()}
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(tokens()), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(HookedMoE.from_pretrained(tmp_path, check=False)(tokens()), expected)


def test_the_parameters_of_what_is_exchanged_are_those_of_its_place_before_the_next_pass() -> None:
    model, _ = wrapped_and_plain("mixtral")
    layers: Any = model.original_model.model.layers  # pyright: ignore[reportAttributeAccessIssue]
    linear("self_attn.o_proj")(model.original_model)
    weight = layers[2].self_attn.o_proj.weight
    assert torch.equal(model.W_O[2].reshape(weight.T.shape), weight.T)
    layers[2].input_layernorm = nn.Identity()
    assert (model.run_with_cache(tokens())[1]["blocks.2.ln1.hook_scale"] == 1).all()
    model.original_model.model.norm = nn.Identity()
    logits, cache = model.run_with_cache(tokens())
    parts, _ = cache.get_full_resid_decomposition(-1, return_labels=True)
    summed = cache.logit_attrs(parts, 3).sum(0)
    assert torch.allclose(summed, logits[..., 3], atol=1e-5, rtol=0)  # float32, sums of parts of about 3
    stack = cache["resid_post", -1][None]
    for again in (False, True):
        assert torch.equal(cache.apply_ln_to_stack(stack, recompute_ln=again), stack)


@pytest.mark.parametrize("between", [False, True])
def test_what_is_exchanged_after_a_pass_is_what_its_cache_is_read_with(between: bool) -> None:
    model, plain = wrapped_and_plain("mixtral")
    logits, cache = model.run_with_cache(tokens())
    resid, lens = cache["resid_post", -1], LogitLens(model)
    digest = lens.unembedding_digest()
    assert torch.allclose(lens.unembed(resid), logits, atol=1e-5)
    smaller = type(plain.model.norm)(model.cfg.d_model, eps=plain.config.rms_norm_eps)
    smaller.weight = nn.Parameter(plain.model.norm.weight.detach() / 3)
    both: tuple[Any, ...] = (model.original_model, plain)
    for of in both:
        scaled_head(of)
        of.model.norm = smaller
    if between:
        model(tokens())  # negative control: the next pass has always followed
    right = plain.lm_head(plain.model.norm(resid))
    assert (right - logits).abs().max() > 1, "a control"
    assert torch.allclose(lens.unembed(resid), right, atol=5e-6, rtol=0)  # float32, of logits of about 1
    assert torch.allclose(model.unembed(model.ln_final(resid)), right, atol=1e-5)
    assert lens.unembedding_digest() != digest
    stack, _ = cache.get_full_resid_decomposition(-1, return_labels=True)
    token = int(tokens()[0, 1])
    parts = cache.logit_attrs(stack, token)
    assert torch.allclose(parts.sum(0), right[..., token], atol=1e-5, rtol=0)  # float32, sums of parts of about 3


def swapped(name: str) -> Change:
    def change(model: Any) -> None:
        owners = [model.model.layers[layer].get_submodule(name.rpartition(".")[0]) for layer in (1, 2)]
        own, others = (getattr(owner, name.rpartition(".")[2]) for owner in owners)
        for owner, module in zip(owners, (others, own), strict=True):
            setattr(owner, name.rpartition(".")[2], module)

    return change


def copied_block(model: Any) -> None:
    model.model.layers[2].mlp = copy.deepcopy(model.model.layers[1].mlp)


def deleted(model: Any) -> None:
    del model.model.layers[2]


def swapped_layers(model: Any) -> None:
    layers = model.model.layers
    layers[1], layers[2] = layers[2], layers[1]


def one_more(model: Any) -> None:
    model.model.layers.append(copy.deepcopy(build(model.config.model_type).model.layers[0]))
    model.config.num_hidden_layers += 1


def shared_norm(model: Any) -> None:
    model.model.layers[2].input_layernorm = model.model.layers[1].input_layernorm


def other_norm(model: Any) -> None:
    model.model.norm = nn.LayerNorm(model.config.hidden_size)


REFUSED: dict[str, tuple[str, Change, str]] = {
    "blocks": ("mixtral", swapped("mlp"), "model.layers.1.mlp: another MixtralSparseMoeBlock was put in the place of"),
    "a copy": ("deepseek", copied_block, "model.layers.2.mlp: another DeepseekMoE was put in the place of"),
    "experts": ("mixtral", swapped("mlp.experts"), "model.layers.1.mlp.experts: another MixtralExperts was put in"),
    "routers": ("mixtral", swapped("mlp.gate"), "model.layers.1.mlp.gate: another MixtralTopKRouter was put in"),
    "a gate": ("qwen2_moe", linear("mlp.shared_expert_gate"), "mlp.shared_expert_gate: another Tuned was put in"),
    "attention": ("mixtral", swapped("self_attn"), "model.layers.1.self_attn: another MixtralAttention was put in"),
    "layers": ("mixtral", swapped_layers, "model.layers.1: another MixtralDecoderLayer was put in the place of"),
    "a layer less": ("mixtral", deleted, "model.layers.2: nothing is in the place of the MixtralDecoderLayer"),
    "a layer more": ("mixtral", one_more, "model.layers has 4 modules, and had 3 when the model was wrapped"),
    "a norm twice": ("mixtral", shared_norm, "model.layers.2.input_layernorm: the MixtralRMSNorm there is used in"),
    "a norm": ("mixtral", other_norm, "model.norm: another LayerNorm was put in the place of the MixtralRMSNorm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_wherever_the_old_would_be_used(case: str, tmp_path: Path) -> None:
    family, change, words = REFUSED[case]
    model, _ = wrapped_and_plain(family)
    change(model.original_model)
    uses: list[Callable[[], Any]] = [
        lambda: model(tokens()),
        lambda: model.generate(tokens(), max_new_tokens=1, verbose=False),
        model.state_dict,
        lambda: model.load_state_dict({}),
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: model.W_in[1],
        lambda: model.W_router[1],
        lambda: (model.W_U, model.W_O),
        lambda: model.expert_outputs(1, torch.zeros(1, model.cfg.d_model), torch.tensor([[0]])),
    ]
    for use in uses:
        with pytest.raises(UnsupportedModelError, match=re.escape(words)) as error:
            use()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "saved").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_head_that_torch_has_packed_is_one_line(family: str, inside: bool) -> None:
    model, _ = wrapped_and_plain(family)
    before = model(tokens())
    quantize: Any = vars(torch.ao.quantization)["quantize_dynamic"]
    if inside:
        packed = model
        quantize(model.original_model, inplace=True)
    else:
        packed = quantize(model)
        assert torch.equal(model(tokens()), before), "only the copy is packed"
    uses = (lambda: packed(tokens()), packed.state_dict, lambda: packed.W_U, lambda: packed.unembed)
    for use in uses:
        with pytest.raises(UnsupportedModelError, match="^lm_head was packed by torch's quantisation[^\n]*quantize="):
            use()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_layer_that_is_put_behind_the_blocks_is_refused_until_it_is_taken_out(family: str) -> None:
    model, plain = wrapped_and_plain(family)
    blocks: Any = model.blocks
    blocks.append(plain.model.layers[0])
    for use in (model.state_dict, lambda: model(tokens()), lambda: model.hf_generate(tokens(), max_new_tokens=1)):
        with pytest.raises(UnsupportedModelError, match=r"model\.layers has 4 modules, and had 3"):
            use()
    del blocks[-1]
    with torch.no_grad():
        assert torch.equal(model(tokens()), plain(tokens()).logits)


def test_a_block_that_is_put_back_is_taken_up_again() -> None:
    model, plain = wrapped_and_plain("mixtral")
    swapped("mlp")(model.original_model)
    with pytest.raises(UnsupportedModelError, match="put that back"):
        model(tokens())
    blocks: Any = model.blocks
    for block in blocks:
        block.original_component.mlp = block.mlp
    with torch.no_grad():
        assert torch.equal(model(tokens()), plain(tokens()).logits)


def test_parameters_that_are_gone_are_named() -> None:
    model, _ = wrapped_and_plain("mixtral")
    inside: Any = model.original_model
    inside.model.layers[2].input_layernorm = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.input_layernorm\.weight is gone since"):
        model.state_dict()
    experts = model._moe(1)
    experts.experts = ParamWrapper(experts.experts)
    inside.peft_config = {}
    with pytest.raises(UnsupportedModelError, match=r"PEFT lies on model\.layers\.1\.mlp\.experts"):
        model.state_dict()


class Around(nn.Module):
    """A linear layer with an addition, around the one at whose place it is put."""

    def __init__(self, base: Any):
        super().__init__()
        self.base, self.more = base, nn.Linear(*reversed(base.weight.shape), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.more(x)


@pytest.mark.parametrize("place", ["layers.1.self_attn.q_proj", "lm_head"])
def test_what_is_put_around_a_wrapped_module_is_refused_until_that_is_put_back(place: str) -> None:
    model: Any = HookedMoE.from_hf(build("mixtral"), check=False)
    inside = model.original_model
    right = model(tokens())
    owner = inside if place == "lm_head" else inside.model.get_submodule(place.rpartition(".")[0])
    name = place.rpartition(".")[2]
    old = getattr(owner, name)
    setattr(owner, name, Around(old))
    for ask in (lambda: model(tokens()), model.state_dict, lambda: model(tokens())):
        with pytest.raises(UnsupportedModelError, match=rf"^[a-z.1_]*{name}: another Around was put in the place"):
            ask()
    setattr(owner, name, old)
    assert torch.equal(model(tokens()), right)
