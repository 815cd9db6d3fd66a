"""Routers, experts and shared experts whose outputs somebody changes: hooks show what is computed with, or refuse."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, no_type_check

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import jaxtyped
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from moe_lens import HookedMoE
from moe_lens.errors import HookError, MoELensError, UnsupportedModelError
from tests.matrix.configs import build, tokens
from tests.wrapped import GATED, INNER

INSIDE = [  # how a family's own block calls its router is in `nonstandard_experts`
    ("mixtral", "mlp.gate"),
    ("deepseek_v3", "mlp.gate"),
    ("gpt_oss", "mlp.router"),
    ("gemma4_text", "router"),
    ("mixtral", "mlp.experts"),
    ("deepseek_v3", "mlp.shared_experts"),
    ("qwen2_moe", "mlp.shared_expert"),
]
OF_PRODUCTS = [("hunyuan_v1_moe", "gate.wg"), ("gemma4_text", "router.proj")]
READ = [("mixtral", "mlp.gate"), ("llama4_text", "router"), ("dbrx", "router.layer")]
OF_OWN_BLOCKS = [("llama4_text", "router"), ("jetmoe", "mlp.router"), ("dbrx", "ffn.router"), ("dbrx", "router.layer")]


def last(model: Any, name: str) -> Any:
    found = [module for path, module in model.named_modules() if path.endswith(f".{name}")]
    return found[-1]


def listened(model: Any, layer: int = -1) -> Any:
    layer = model.moe_layers[layer]
    return model.run_with_cache(tokens(), names_filter=lambda name: name.startswith(f"blocks.{layer}.mlp.hook_"))[1]


def rolled(module: nn.Module, args: Any, out: Any) -> Any:
    """Each token's values are another's."""
    return tuple(map(roll, out)) if isinstance(out, tuple) else roll(out)


def roll(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.flatten(0, -2).roll(1, 0).view_as(value) if value.dim() > 1 else value.roll(1)


def in_place(module: nn.Module, args: Any, out: Any) -> None:
    for value in out if isinstance(out, tuple) else (out,):
        if isinstance(value, Tensor):
            value.data.copy_(roll(value))  # past torch's count of changes


@pytest.mark.parametrize("hook", [rolled, in_place])
@pytest.mark.parametrize(("model_type", "part"), [*INSIDE, *OF_PRODUCTS, *OF_OWN_BLOCKS])
def test_a_hook_of_torch_that_changes_what_hooks_have_shown_is_refused(
    model_type: str, part: str, hook: Callable[..., Any]
) -> None:
    hf: Any = build(model_type)
    right = hf(tokens()).logits
    handle = last(hf, part).register_forward_hook(hook)
    with torch.inference_mode():
        changed = hf(tokens()).logits
        assert not torch.equal(changed, right), "it is heard"
        with pytest.raises(HookError, match=rf"^layer \d+: torch's hook {hook.__name__} changes [^\n]*wrapped model$"):
            HookedMoE.from_hf(hf)
        assert torch.equal(hf(tokens()).logits, changed), "the model is as it was"
        model: Any = HookedMoE.from_hf(hf, check=False)
        if (model_type, part) in OF_OWN_BLOCKS:
            with pytest.raises(HookError, match="torch's hook"):
                model(tokens())
        else:
            assert torch.equal(model(tokens()), changed), "nobody listens, and it computes as its owner wants"
        with pytest.raises(HookError, match="torch's hook"):
            listened(model)
        handle.remove()
        assert torch.equal(model(tokens()), right)
        listened(model)


@pytest.mark.typed
@pytest.mark.parametrize(("model_type", "part"), READ)
def test_a_hook_of_torch_that_reads_a_router_sees_what_hooks_show(model_type: str, part: str) -> None:
    hf: Any = build(model_type)
    seen: list[Any] = []
    last(hf, part).register_forward_hook(lambda module, args, out: seen.append(out) or out)
    model: Any = HookedMoE.from_hf(hf)
    seen.clear()
    cache = listened(model)
    out = {"mixtral": lambda: seen[-1][0], "llama4_text": lambda: seen[-1][1], "dbrx": lambda: seen[-1]}[model_type]()
    assert torch.equal(cache["router_logits", model.moe_layers[-1]].flatten(0, 1), out)
    if model_type == "mixtral":
        routing = cache.routing(model.moe_layers[-1])
        assert torch.equal(routing.indices.sort(-1).values.flatten(0, 1), seen[-1][2].sort(-1).values)


@pytest.mark.parametrize("what", ["ids", "weights"])
@pytest.mark.parametrize("in_place", [False, True])
def test_experts_compute_with_the_routing_that_is_shown(what: str, in_place: bool) -> None:
    model: Any = HookedMoE.from_hf(build("mixtral"))
    right, place = model(tokens()), ["ids", "weights"].index(what) + 1

    def between(module: nn.Module, args: Any) -> Any:
        changed = list(args)
        if in_place:
            args[place].copy_(roll(args[place]))
        else:
            changed[place] = roll(args[place])
        return tuple(changed)

    def copied(module: nn.Module, args: Any) -> Any:
        return tuple(value.clone() for value in args)

    experts = model.blocks[model.moe_layers[-1]].mlp.moe.experts
    with torch.no_grad():
        handle = experts.register_forward_pre_hook(between)
        assert not torch.equal(model(tokens()), right), "nobody listens, and it is heard"
        with pytest.raises(HookError, match=rf"^hooks of layer \d+ would not show [^\n]*: {what} of experts"):
            listened(model)
        handle.remove()
        handle = experts.register_forward_pre_hook(copied)
        listened(model)  # the same values in other tensors
        handle.remove()


class LowRank(MixtralTopKRouter):
    """As an adapter computes a router: transformers' own forward with an addition of low rank to its product."""

    @no_type_check
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden_states.reshape(-1, self.hidden_dim)
        logits = F.linear(x, self.weight) + F.linear(F.linear(x, self.A), self.B)
        weights, indices = torch.topk(F.softmax(logits.float(), -1), self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), indices


class LowRankLinear(nn.Linear):
    """The same for a linear layer inside a router."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + super().forward(input.flip(-1))


def low_rank(router: Any) -> None:
    router.A, router.B = nn.Parameter(torch.randn(4, 40)), nn.Parameter(torch.randn(8, 4))
    router.__class__ = LowRank


def scaled(router: Any) -> None:
    forward = router.forward
    router.forward = lambda x: (out := forward(x)) and (out[0] / 2, *out[1:])


def other_layer(router: Any) -> None:
    router.__class__ = type(router)
    router.layer.__class__ = LowRankLinear


CHANGES: dict[str, tuple[str, str, Callable[[Any], None], str]] = {
    "class": ("mixtral", "mlp.gate", low_rank, r"LowRank\.forward is not transformers'"),
    "method": ("mixtral", "mlp.gate", scaled, r"MixtralTopKRouter\.forward was replaced by scaled"),
    "layer": ("dbrx", "ffn.router", other_layer, r"LowRankLinear\.forward is not transformers'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_router_that_is_not_transformers_own_is_refused(change: str) -> None:
    model_type, part, make, said = CHANGES[change]
    hf: Any = build(model_type)
    make(last(hf, part))
    right = hf(tokens()).logits
    with pytest.raises(UnsupportedModelError, match=f"^{said}[^\n]*Wrap the model as transformers builds it"):
        HookedMoE.from_hf(hf, check=False)
    assert torch.equal(hf(tokens()).logits, right), "the model is as it was"
    if make is low_rank:  # a class is read when the model is wrapped
        return
    model: Any = HookedMoE.from_hf(build(model_type))
    make(getattr(model.blocks[-1].mlp.moe, model.family.router))
    with pytest.raises(MoELensError, match=rf"{said}|something else was put in the place of its router"):
        listened(model)


@pytest.mark.typed
def test_a_check_of_shapes_around_a_forward_is_looked_through() -> None:
    for inner, said in ((MixtralTopKRouter.forward, None), (LowRank.forward, "MixtralTopKRouter.forward was replaced")):
        hf: Any = build("mixtral")
        router = last(hf, "mlp.gate")
        router.forward = jaxtyped(typechecker=None)(inner).__get__(router)
        with pytest.raises(UnsupportedModelError, match=said) if said else nullcontext():
            HookedMoE.from_hf(hf, check=False)


class Added(nn.Module):
    """A weight with an addition of low rank."""

    def __init__(self, rows: int, columns: int, rank: int):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(rank, columns)), nn.Parameter(torch.randn(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def test_logits_of_a_parametrised_router_are_those_that_it_chooses_by() -> None:
    hf: Any = build("mixtral")
    router = last(hf, "mlp.gate")
    own = router.weight.detach().clone()
    added = Added(*own.shape, rank=len(own))  # as many columns as there are experts
    parametrize.register_parametrization(router, "weight", added)
    model: Any = HookedMoE.from_hf(hf)
    layer = model.moe_layers[-1]
    cache = listened(model)
    x, shown = cache[f"blocks.{layer}.mlp.hook_in"], cache["router_logits", layer]
    right = x @ (own + added.B @ added.A).T
    assert torch.allclose(shown, right, atol=5e-5, rtol=0)  # float32, of logits of about 100
    assert (right - x @ own.T).abs().max() > 10, "a control"
    assert torch.equal(cache["expert_indices", layer], shown.topk(model.top_k).indices)


@pytest.mark.typed
@pytest.mark.parametrize(("model_type", "part"), [("mixtral", "experts"), ("qwen2_moe", "shared_expert_gate")])
def test_a_forward_that_is_put_around_one_with_hooks_inside_is_refused(model_type: str, part: str) -> None:
    model: Any = HookedMoE.from_hf(build(model_type))
    module: Any = getattr(model.blocks[model.moe_layers[-1]].mlp.moe, part)
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)
    with pytest.raises(HookError, match=r"something else was put in the place of its (experts|shared gate)"):
        listened(model)
    module.forward = forward
    listened(model)


@pytest.mark.parametrize(("model_type", "part"), [("mixtral", "gate"), ("mixtral", "experts"), ("llama4_text", "")])
def test_a_class_that_gets_another_forward_after_wrapping_is_refused(
    model_type: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = HookedMoE.from_hf(build(model_type))
    before = model(tokens())
    module: Any = model.blocks[model.moe_layers[-1]].mlp.moe.get_submodule(part)

    class Twice(type(module)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    kind = type(module)
    module.__class__ = Twice
    with pytest.raises(UnsupportedModelError, match=r"Twice\.forward would not be called"):
        model(tokens())
    module.__class__ = kind
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", Twice.forward)
        with pytest.raises(UnsupportedModelError, match=r"Twice\.forward would not be called"):
            model(tokens())
    module.__class__ = type(kind.__name__, (kind,), {})  # as torch's parametrize makes one: the same forward
    assert torch.equal(model(tokens()), before)


WRAPPED = {  # the second adapter is ours
    "mixtral": ("model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp", "model.norm", "lm_head"),
    "glm4_moe": ("model.layers.1",),
}
SHOWN = {
    "model.layers.1": "blocks.1.hook_resid_post",
    "model.layers.1.self_attn": "blocks.1.attn.hook_out",
    "model.layers.1.mlp": "blocks.1.mlp.hook_out",
    "model.norm": "ln_final.hook_out",
    "lm_head": "unembed.hook_out",
}


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "part"), [(kind, part) for kind, parts in WRAPPED.items() for part in parts])
def test_a_hook_of_torch_acts_before_hook_points_whenever_it_was_put_on(model_type: str, part: str) -> None:
    plain, before, after = build(model_type), build(model_type), build(model_type)
    for hf in (plain, before):
        hf.get_submodule(part).register_forward_hook(rolled)
    seen: list[Any] = []
    plain.get_submodule(part).register_forward_hook(lambda module, args, out: seen.append(out))
    logits = plain(tokens()).logits
    early, late = HookedMoE.from_hf(before, check=False), HookedMoE.from_hf(after, check=False)
    late.original_model.get_submodule(part).register_forward_hook(rolled)
    late = pickle.loads(pickle.dumps(copy.deepcopy(late)))
    fires = [name for name in late.hook_dict if not INNER.search(name) and not name.endswith(GATED)]
    (_, of_early), (own, of_late) = (model.run_with_cache(tokens(), names_filter=fires) for model in (early, late))
    assert torch.equal(own, logits)
    assert all(torch.equal(of_late[name], of_early[name]) for name in of_early)
    assert torch.equal(of_late[SHOWN[part]], seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1])


@pytest.mark.parametrize(
    ("family", "word"), [("granitemoe", "residual_multiplier"), ("step3p7", "routed_scaling_factor")]
)
def test_hooks_show_the_product_with_the_factor_that_the_model_has_now(family, word):
    """What MLPs add is in the stream, whatever was set after wrapping."""
    hooked = HookedMoE.from_hf(build(family), check=False)
    layer, before = hooked.moe_layers[-1], {}
    wanted = [f"blocks.{layer}.{name}" for name in ("hook_resid_mid", "hook_mlp_out", "hook_resid_post")]
    parts = [f"blocks.{layer}.mlp.{name}" for name in ("hook_routed_out", "hook_shared_out", "hook_out")]
    parts = [name for name in parts if name in hooked.hook_dict]
    for factor in (None, 0.25):
        if factor is not None:
            for module in hooked.original_model.modules():
                if word in vars(module):
                    setattr(module, word, factor)
            if word == "residual_multiplier":
                assert hooked.blocks[layer].mlp.multiplier == factor  # neurons of dense layers are read with it
        _, cache = hooked.run_with_cache(tokens(2, 9), names_filter=wanted + parts)
        mid, out, post = (cache[name] for name in wanted)
        assert (mid + out - post).abs().max() <= 1e-6 * post.abs().max()
        *added, whole = (cache[name] for name in parts)
        assert (sum(added) - whole).abs().max() <= 1e-5 * whole.abs().max()
        expert = cache[f"blocks.{layer}.mlp.hook_routed_out"]
        before.setdefault("routed", expert)
    assert (before["routed"] - expert).abs().max() > 0.1 * expert.abs().max()  # the factor acts
