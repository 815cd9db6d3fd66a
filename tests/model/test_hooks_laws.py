"""The three laws of the hook table, on tiny random models of every family."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens import names
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.hooks.expert_kernel import experts_forward
from moe_lens.model.hooks.layer_hooks import LayerHooks
from tests.families import CONFIGS, build, tokens
from tests.wrapped import as_hook, deviation, listening, untouched, wrapped

FP32 = 1e-5  # relative to the largest value: what float32 sums in another order differ by

families = pytest.mark.parametrize("family", CONFIGS)


def close(ours: Tensor, theirs: Tensor, bound: float = FP32) -> None:
    assert deviation(ours, theirs) <= bound * theirs.abs().max().item()


# --- parity ---


@families
def test_logits_are_those_of_transformers_before_wrapping_to_the_bit(family: str) -> None:
    case = wrapped(family)
    with torch.no_grad():
        assert torch.equal(case.model(case.tokens), case.logits)
        case.hf.set_experts_implementation("eager")
        try:
            eager = case.hf(case.tokens).logits
        finally:
            case.hf.set_experts_implementation("grouped_mm")
    assert deviation(case.logits, eager) <= 1e-5
    assert not torch.equal(case.logits, eager), "the two implementations are expected to round differently"


@pytest.mark.parametrize("threads", [1, 2])
@families
def test_logits_are_transformers_own_with_one_thread_and_with_two(family: str, threads: int) -> None:
    case, longer = wrapped(family), tokens(pos=47, seed=3)
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            assert torch.equal(case.model(longer), case.hf(longer).logits)
    finally:
        torch.set_num_threads(1)


def rows_and_outputs(monkeypatch: pytest.MonkeyPatch, compute: Callable[[], Tensor]) -> tuple[list[Tensor], Tensor]:
    """What the grouped products of a computation are given, in order, and what it returns."""
    given: list[Tensor] = []
    product = torch.nn.functional.grouped_mm

    def note(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given.append(x.detach()[: int(kwargs["offs"][-1])].clone())  # behind them are slots of no expert
        return product(x, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "grouped_mm", note)
        return given, compute()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("left_out", [False, True])
@families
def test_rows_come_in_transformers_own_order(
    family: str, left_out: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which its sort decides, and which decides the last bits where a product is divided among threads.

    A slot that is left out is what transformers gives an expert that is on another device: the id behind the last.
    """
    case, x = wrapped(family), tokens(pos=47, seed=3)
    plain: Any = case.hf.model.layers[case.last].mlp.experts
    hidden = torch.randn(x.numel(), case.model.cfg.d_model)
    slots = (x.numel(), case.model.top_k)
    chosen = torch.rand(x.numel(), case.model.n_experts).argsort(-1)[:, : case.model.top_k]
    weights = torch.rand(slots)
    kept = torch.rand(slots) < 0.6 if left_out else torch.ones(slots, dtype=torch.bool)
    sent = chosen.masked_fill(~kept, case.model.n_experts)
    monkeypatch.setattr(plain, "_is_expert_parallel", left_out)
    hooks = LayerHooks(case.last, linear_branch=True, shared=False)
    hooks.start(*x.shape)
    hooks.routed(chosen, weights)
    hooks.points["hook_expert_kept"].add_hook(lambda tensor, hook: by_rank(kept, hooks).view(tensor.shape))
    torch.set_num_threads(threads)
    try:
        ours = rows_and_outputs(
            monkeypatch,
            lambda: experts_forward(case.model._experts(case.last), hooks, hidden, chosen, weights),
        )
        theirs = rows_and_outputs(monkeypatch, lambda: plain(hidden, sent, weights))
    finally:
        torch.set_num_threads(1)
    assert len(ours[0]) == len(theirs[0]) == 2
    assert torch.equal(ours[0][0], theirs[0][0])
    if left_out and family == "gpt_oss":  # a sigmoid may round the last numbers of a tensor otherwise than those within
        close(ours[1], theirs[1], 1e-6)
    else:
        assert torch.equal(ours[0][1], theirs[0][1])
        assert torch.equal(ours[1], theirs[1])


def by_rank(slots: Tensor, hooks: LayerHooks) -> Tensor:
    return slots.flatten()[hooks.slots]


def test_another_kernel_than_that_whose_bits_are_computed_is_warned_of() -> None:
    hf = build("mixtral")
    hf.set_experts_implementation("eager")
    with pytest.warns(UserWarning, match="experts_implementation='eager' is not used.*'grouped_mm'"):
        model = HookedMoE.from_hf(hf, check=False)
    with torch.no_grad():
        assert torch.equal(model(tokens()), wrapped("mixtral").logits)
    with pytest.warns(UserWarning, match="'batched_mm' is not used"):
        HookedMoE.from_pretrained("tiny-deepseekmoe", experts_implementation="batched_mm")
    HookedMoE.from_pretrained("tiny-deepseekmoe", experts_implementation="grouped_mm")  # which is what it computes


def test_another_kernel_is_warned_of_when_it_is_asked_for_after_wrapping() -> None:
    model: Any = HookedMoE.from_hf(build("mixtral"), check=False)
    logits = model(tokens())
    model.set_experts_implementation("eager")
    with pytest.warns(UserWarning, match="experts_implementation='eager' is not used.*'grouped_mm'"):
        assert torch.equal(model(tokens()), logits)
    model(tokens())  # once
    model.original_model.config._experts_implementation = "batched_mm"
    with pytest.warns(UserWarning, match="'batched_mm' is not used"):
        model(tokens())
    model.set_experts_implementation("grouped_mm")
    model(tokens())


@families
def test_negative_control_one_perturbed_matrix_of_one_expert_is_seen(family: str) -> None:
    case = wrapped(family)
    hf = build(family)
    experts: Any = hf.model.layers[case.last].mlp.experts
    used = case.model.routing(case.tokens)
    with torch.no_grad():
        experts.down_proj[int(used.indices[-1, 0, 0, 0])] *= 1.01
        assert deviation(HookedMoE.from_hf(hf, check=False)(case.tokens), case.logits) > 1e-3


# --- law 1: observing changes nothing ---

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": torch.enable_grad,
}


@families
@settings(max_examples=6)
@given(data=st.data())
def test_observing_changes_nothing(family: str, data: st.DataObject) -> None:
    case = wrapped(family)
    offered = sorted(case.exact)
    chosen = data.draw(st.lists(st.sampled_from(offered), unique=True, max_size=12))
    mode = data.draw(st.sampled_from(sorted(MODES)))
    cached = data.draw(st.booleans())
    seen: list[str] = []
    with untouched(case.model), MODES[mode]():
        if cached:
            logits, cache = case.model.run_with_cache(case.tokens, names_filter=chosen)
            seen = list(cache.keys())
        else:
            watch: list[Any] = [(name, lambda value, hook, name=name: seen.append(name)) for name in chosen]
            logits = case.model.run_with_hooks(case.tokens, fwd_hooks=watch)
    assert torch.equal(logits, case.logits)
    assert set(seen) == set(chosen)


@families
def test_everything_but_attention_s_insides_at_once_changes_nothing(family: str) -> None:
    case = wrapped(family)
    with torch.no_grad():
        logits, cache = case.model.run_with_cache(case.tokens, names_filter=lambda name: name in case.exact)
    assert torch.equal(logits, case.logits)
    assert set(cache.keys()) == case.exact


@families
def test_attention_s_insides_select_eager_attention_which_rounds_differently(family: str) -> None:
    case = wrapped(family)
    with torch.no_grad():
        logits, cache = case.model.run_with_cache(case.tokens)
    close(logits, case.logits)
    assert {name for name in cache.keys() if names.parse_expert(name) is None} == case.fire, "every hook fires"  # noqa: SIM118


@families
def test_a_hook_sees_the_same_axes_whatever_else_is_heard(family: str) -> None:
    """And an edit is the same one, alone or beside a cache of everything."""
    case = wrapped(family)
    with torch.no_grad():
        _, every = case.model.run_with_cache(case.tokens)
        names_ = [name for name in every if name.startswith("blocks.1.attn.") and every[name].is_floating_point()]
        for name in names_:
            alone = case.model.run_with_cache(case.tokens, names_filter=name)[1][name]
            assert alone.shape == every[name].shape, name
            close(alone, every[name])
        mute = as_hook(lambda value: value.index_fill(2, torch.tensor([1]), 0))
        for name in (name for name in names_ if name.endswith(("q_norm.hook_out", "kv_b_proj.hook_out"))):
            with case.model.hooks([(name, mute)]):
                edited = case.model(case.tokens)
                close(case.model.run_with_cache(case.tokens)[0], edited)
            assert deviation(edited, case.logits) > 1e-3, name


# --- law 2: the parts make the whole ---


@families
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 3), pos=st.integers(1, 9))
def test_the_parts_make_the_whole(family: str, seed: int, batch: int, pos: int) -> None:
    case = wrapped(family)
    model = case.model
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens(batch, pos, seed), names_filter=lambda name: name in case.exact)
    for layer in range(model.cfg.n_layers):
        mid, post = cache[names.block(names.RESID_MID, layer)], cache[names.block(names.RESID_POST, layer)]
        out = cache[names.block(names.BLOCK_MLP_OUT, layer)]
        assert torch.equal(mid + out, post)
        close(cache[names.block(names.RESID_PRE, layer)] + cache[names.block(names.ATTN_OUT, layer)], mid)
        if layer not in model.moe_layers:
            continue
        here = {hook.name: names.mlp(hook.name, layer) for hook in names.MLP_HOOKS}
        at = {hook: cache[name] for hook, name in here.items() if name in cache}
        close(at[names.EXPERT_OUT] * at[names.ROUTING_WEIGHTS][..., None], at[names.EXPERT_WEIGHTED])
        close(at[names.EXPERT_WEIGHTED].sum(2), at[names.ROUTED_OUT])
        whole = at[names.ROUTED_OUT] + at[names.SHARED_OUT] if model.has_shared(layer) else at[names.ROUTED_OUT]
        close(whole, at[names.MLP_OUT])
        assert torch.equal(at[names.MLP_OUT], out)
        chosen = at[names.EXPERT_INDICES]
        assert chosen.dtype == torch.int64
        assert all(len(set(row.tolist())) == model.top_k for row in chosen.flatten(0, 1))
        weights = at[names.ROUTING_WEIGHTS]
        assert (weights[..., :-1] >= weights[..., 1:]).all(), "rank 0 is the largest weight"


# --- law 3: an edit is an intervention ---


@families
@pytest.mark.parametrize("own", [lambda value, hook: value, lambda value, hook: value.clone()], ids=["same", "clone"])
def test_a_part_set_to_its_own_value_changes_nothing(family: str, own: Any) -> None:
    case = wrapped(family)
    every = [name for name in case.some() if name in case.exact]
    with untouched(case.model), torch.no_grad():
        for name in every:
            assert torch.equal(case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, own)]), case.logits), name
        assert torch.equal(case.model.run_with_hooks(case.tokens, fwd_hooks=[(n, own) for n in every]), case.logits)


@families
def test_no_hook_is_dead(family: str) -> None:
    """Editing any hook changes the logits, but for those that have nothing behind them to change."""
    case = wrapped(family)
    generator = torch.Generator().manual_seed(0)

    def disturb(value: Any, hook: Any) -> Any:
        if isinstance(value, tuple):
            return (disturb(value[0], hook), *value[1:])
        if value.dtype == torch.bool:
            return ~value
        if hook.name.endswith(names.N_ACTIVE):
            return value - 1
        if not value.is_floating_point():  # other experts, other tokens
            return (value + 1) % case.model.n_experts if "indices" in hook.name else value.flip(1)
        return value * 1.5 + 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)

    dead = []
    with untouched(case.model), torch.no_grad():
        for name in case.some():
            logits = case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, disturb)])
            if not deviation(logits, case.logits) > 1e-3:
                dead.append(name)
    assert dead == []


def test_a_fresh_model_has_no_hooks_and_no_single_expert() -> None:
    model = HookedMoE.from_hf(build("deepseek"), check=False)
    assert listening(model) == []
    assert not [name for name in model.hook_dict if ".experts." in name and "shared" not in name]


@families
def test_outputs_beside_the_logits_are_transformers_own(family: str) -> None:
    ran, x = build(family), tokens()
    asked = {"output_hidden_states": True, "output_router_logits": True, "output_attentions": True}
    with torch.no_grad():
        plain = ran(x, **asked)  # transformers hangs its recording hooks on a model in the first pass that needs them
        each = [HookedMoE.from_hf(hf, check=False).original_model(x, **asked) for hf in (build(family), ran)]
    for found, name in itertools.product(each, ("hidden_states", "router_logits", "attentions")):
        theirs, ours = getattr(plain, name, None), getattr(found, name, None)
        assert (ours is None) == (theirs is None)
        if theirs is not None and ours is not None:
            assert len(ours) == len(theirs), name
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), name
