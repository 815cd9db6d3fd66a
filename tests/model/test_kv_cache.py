"""A key-value cache goes on in any mix of runs that listen inside of attention and runs that do not."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from moe_lens.errors import HookError, InputError
from moe_lens.model.hf_compat import cache_word
from moe_lens.model.hooks.key_value_cache import Driver
from tests.families import CONFIGS
from tests.wrapped import Case, as_hook, deviation, wrapped

FP32 = 1e-5  # relative to the largest value; TransformerLens's eager attention sums in another order
LATENT = ["deepseek_v2", "deepseek_v2, groups", "deepseek_v3"]
PARTS = (slice(0, 7), slice(7, 8), slice(8, None))
HEARD = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]


def new_cache(case: Case) -> Any:
    return DynamicCache(config=case.hf.config)


def run(case: Case, part: slice, past: Any, hooks: Any = ()) -> Tensor:
    with torch.no_grad():
        return case.model.run_with_hooks(
            case.tokens[:, part], fwd_hooks=list(hooks), past_key_values=past, use_cache=True
        )


def read(value: Tensor) -> None:
    assert value.dim() == 4


@pytest.mark.parametrize("family", CONFIGS)
def test_a_cache_goes_on_whoever_filled_it(family: str) -> None:
    case = wrapped(family)
    bound = FP32 * case.logits.abs().max().item()
    for mix in itertools.product([[], HEARD], repeat=3):
        past = new_cache(case)
        logits = [
            run(case, part, past, [(name, as_hook(read)) for name in heard])
            for part, heard in zip(PARTS, mix, strict=True)
        ]
        assert deviation(torch.cat(logits, 1), case.logits) <= bound, mix


@pytest.mark.parametrize("family", LATENT)
def test_what_is_stored_is_what_transformers_stores(family: str) -> None:
    case = wrapped(family)
    plain, heard, word = new_cache(case), new_cache(case), cache_word(type(case.hf).forward)
    with torch.no_grad():
        case.hf(case.tokens, **{word: plain}, use_cache=True)
    run(case, slice(None), heard, [(name, as_hook(read)) for name in HEARD])
    for a, b in zip(plain.layers, heard.layers, strict=True):
        assert a.keys.shape == b.keys.shape and a.values.shape == b.values.shape
        assert deviation(a.keys, b.keys) <= FP32 * a.keys.abs().max().item()
        assert deviation(a.values, b.values) <= FP32 * a.values.abs().max().item()
    with torch.no_grad():  # plain transformers goes on with it
        more = case.hf(case.tokens[:, :1], **{word: heard}, use_cache=True).logits
        right = case.hf(case.tokens[:, :1], **{word: plain}, use_cache=True).logits
    assert deviation(more, right) <= FP32 * right.abs().max().item()


def halve(value: Tensor) -> Tensor:
    return value * 0.5


@pytest.mark.typed
@pytest.mark.parametrize("family", LATENT)
@pytest.mark.parametrize("name", ["hook_kv_latent", "hook_rot_k"])
def test_edits_of_what_is_stored_stay_in_the_cache(family: str, name: str) -> None:
    case = wrapped(family)
    edits: Any = [(f"blocks.{layer}.attn.{name}", as_hook(halve)) for layer in range(3)]
    with torch.no_grad():
        right = case.model.run_with_hooks(case.tokens, fwd_hooks=edits)
    assert deviation(right, case.logits) > 1e-2
    past = new_cache(case)
    logits = [run(case, part, past, edits) for part in PARTS]
    assert deviation(torch.cat(logits, 1), right) <= FP32 * right.abs().max().item()


@pytest.mark.parametrize("family", LATENT)
@pytest.mark.parametrize("name", ["hook_k", "hook_v", "kv_b_proj.hook_out"])
@pytest.mark.parametrize("change", [halve, lambda value: value.mul_(0.5)])
def test_edits_of_keys_and_values_are_not_stored_so_the_cache_does_not_go_on(
    family: str, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    case = wrapped(family)
    hooks: Any = [(f"blocks.1.attn.{name}", as_hook(change)), (HEARD[1], as_hook(read))]
    with torch.no_grad():
        right = case.model.run_with_hooks(case.tokens, fwd_hooks=hooks)
    past = new_cache(case)
    assert deviation(run(case, slice(None), past, hooks), right) == 0  # the run itself has them
    assert deviation(right, case.logits) > 1e-3
    for again in ([], hooks):
        with pytest.raises(HookError, match="edited keys or values of layer 1 .*use_cache=False"):
            run(case, slice(0, 1), past, again)


@pytest.mark.parametrize("family", LATENT)
def test_hooks_on_keys_that_only_read_see_new_tokens_and_let_the_cache_go_on(family: str) -> None:
    case = wrapped(family)
    past, seen = new_cache(case), []
    points = ("attn.hook_k", "attn.hook_v", "attn.kv_b_proj.hook_in", "attn.hook_pattern")
    hooks = [(f"blocks.1.{name}", lambda value, hook: seen.append((hook.name, value.shape))) for name in points]
    logits = [run(case, part, past, hooks) for part in PARTS]
    assert deviation(torch.cat(logits, 1), case.logits) <= FP32 * case.logits.abs().max().item()
    assert [shape[-2] for name, shape in seen if name.endswith(("hook_k", "hook_v"))] == [7, 7, 1, 1, 4, 4]
    assert [shape[1] for name, shape in seen if "kv_b_proj" in name] == [7, 1, 4]
    assert [shape[-1] for name, shape in seen if "pattern" in name] == [7, 8, 12]


@pytest.mark.parametrize("family", LATENT)
def test_keys_have_gradients_while_a_cache_is_filled(family: str) -> None:
    case, found = wrapped(family), {}
    hooks = [
        (f"blocks.1.attn.{name}", lambda grad, hook: found.update({hook.name: grad})) for name in ("hook_k", "hook_v")
    ]
    with case.model.hooks(bwd_hooks=hooks):
        case.model(case.tokens, return_type="loss", use_cache=True).backward()
    case.model.zero_grad()
    assert len(found) == 2 and all(grad.abs().max() > 0 for grad in found.values())


@pytest.mark.typed
@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
@pytest.mark.parametrize("word", ["past_key_values", "cache"])
def test_the_cache_has_the_names_of_both_libraries(family: str, word: str) -> None:
    case, seen = wrapped(family), []
    with torch.no_grad():
        _, past = case.model(case.tokens[:, :7], return_type="logits_and_cache", use_cache=True)
        with case.model.hooks([(HEARD[0], lambda value, hook: seen.append(case.model.current_tokens()))]):
            rest = case.model(case.tokens[:, 7:], **{word: past})
    assert [step.offset for step in seen if step is not None] == [7]
    assert deviation(rest, case.logits[:, 7:]) <= FP32 * case.logits.abs().max().item()


def test_what_is_no_cache_and_two_caches_are_refused() -> None:
    case = wrapped("mixtral")
    past = new_cache(case)
    with pytest.raises(InputError, match="two names of one thing"):
        case.model(case.tokens, past_key_values=past, cache=past)
    with pytest.raises(InputError, match="past_key_values is a dict; expected a cache of transformers"):
        case.model(case.tokens, cache={})


def test_the_driver_speaks_of_the_cache_as_the_model_does() -> None:
    """Before transformers 5.24 and from then on, without the other name's warning."""

    class Model(torch.nn.Module):
        def forward(self, ids: Tensor, cache: Any = None) -> Any:
            return SimpleNamespace(logits=ids, cache=cache)

    class Former(torch.nn.Module):
        def forward(self, ids: Tensor, past_key_values: Any = None) -> Any:
            return SimpleNamespace(logits=ids, past_key_values=past_key_values)

    adapter, past = SimpleNamespace(cfg=None), DynamicCache()
    for model in (Model(), Former()):
        result = Driver(model, adapter, None).forward(torch.ones(1, 2), past_key_values=past)
        assert result.raw_output.past_key_values is past
