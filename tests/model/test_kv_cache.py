"""A key-value cache goes on in any mix of runs that listen inside of attention and runs that do not."""

import copy
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, StaticCache

from moe_lens import HookedMoE
from moe_lens.errors import HookError, InputError
from moe_lens.model.hf_compat import cache_of, cache_word
from moe_lens.model.hooks import key_value_padding
from moe_lens.model.hooks.cache_names import Driver
from tests.families import CONFIGS
from tests.matrix import configs
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


def with_room(case: Case) -> Any:
    return StaticCache(config=case.hf.config, max_cache_len=case.tokens.shape[1] + 5)


@pytest.mark.parametrize("make", [new_cache, with_room])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_cache_goes_on_whoever_filled_it(family: str, make: Callable[[Case], Any]) -> None:
    case = wrapped(family)
    bound = FP32 * case.logits.abs().max().item()
    for mix in itertools.product([[], HEARD], repeat=3):
        past = make(case)
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
    assert [shape[1] for name, shape in seen if name.endswith(("hook_k", "hook_v"))] == [7, 7, 1, 1, 4, 4]
    assert [shape[1] for name, shape in seen if "kv_b_proj" in name] == [7, 1, 4]
    assert [shape[-1] for name, shape in seen if "pattern" in name] == [7, 8, 12]


@pytest.mark.parametrize("family", LATENT)
@pytest.mark.parametrize("names_", [("hook_k", "hook_v"), ("hook_rot_k",), ("hook_kv_latent",)])
def test_keys_have_gradients_while_a_cache_is_filled(family: str, names_: tuple[str, ...]) -> None:
    case, found = wrapped(family), []
    for use_cache in (True, False):
        grads: dict[str, Tensor] = {}
        hooks = [
            (f"blocks.1.attn.{name}", lambda grad, hook, grads=grads: grads.update({hook.name: grad}))
            for name in names_
        ]
        with case.model.hooks(bwd_hooks=hooks):
            case.model(case.tokens, return_type="loss", use_cache=use_cache).backward()
        case.model.zero_grad()
        assert len(grads) == len(names_) and all(grad.abs().max() > 0 for grad in grads.values())
        found.append(grads)
    for name, grad in found[0].items():
        assert deviation(grad, found[1][name]) <= FP32 * grad.abs().max().item()


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


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_config_that_asks_for_the_balance_loss_generates_the_same(family: str) -> None:
    """transformers computes that loss in every pass, and cannot with one token behind a cache and a mask of all."""
    model: Any = wrapped(family).model
    ids, config = wrapped(family).tokens, model.original_model.config
    generate = partial(model.generate, ids, max_new_tokens=3, do_sample=False, verbose=False)
    right = generate()
    config.output_router_logits = True
    try:
        assert torch.equal(generate(), right)
    finally:
        config.output_router_logits = False


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
        config = PreTrainedConfig()

        def forward(self, ids: Tensor, cache: Any = None) -> Any:
            return SimpleNamespace(logits=ids, cache=cache)

    class Former(torch.nn.Module):
        config = PreTrainedConfig()

        def forward(self, ids: Tensor, past_key_values: Any = None) -> Any:
            return SimpleNamespace(logits=ids, past_key_values=past_key_values)

    adapter, past = SimpleNamespace(cfg=None), DynamicCache()
    for model in (Model(), Former()):
        result = Driver(model, adapter, None).forward(torch.ones(1, 2), past_key_values=past)
        assert result.raw_output.past_key_values is past


# --- padding in a cache ---

ROWS = [[5, 9, 33, 7, 60, 12, 44], [71, 50, 40, 85]]
NEW = torch.tensor([[8, 14, 90], [27, 31, 6]])


def filled(model: HookedMoE, config: Any, side: str) -> Any:
    past = DynamicCache(config=config)
    model(ROWS, padding_side=side, past_key_values=past)
    return past


def mask_of(side: str) -> Tensor:
    short = [0] * 3 + [1] * 4 if side == "left" else [1] * 4 + [0] * 3
    return torch.tensor([[1] * 7, short])


def alone(model: HookedMoE) -> Tensor:
    """What follows each row where nothing is padded."""
    rows = [torch.tensor([row + new]) for row, new in zip(ROWS, NEW.tolist(), strict=True)]
    return torch.stack([model(row)[0, -3:] for row in rows])


def returned(model: HookedMoE, config: Any, side: str) -> Any:  # noqa: ARG001
    return model(ROWS, padding_side=side, return_type="logits_and_cache")[1]


def in_an_encoding(model: HookedMoE, config: Any, side: str) -> Any:
    short = [0] * 3 + ROWS[1] if side == "left" else ROWS[1] + [0] * 3
    past = DynamicCache(config=config)
    encoding = {"input_ids": torch.tensor([ROWS[0], short]), "attention_mask": mask_of(side)}
    model(encoding, past_key_values=past)
    return past


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "deepseek"])
@torch.no_grad()
def test_a_cache_knows_its_padding(family: str, side: str) -> None:
    case = wrapped(family)
    model, config = case.model, case.hf.config
    right = alone(model)
    bound = FP32 * right.abs().max().item()
    for fill in (filled, returned, in_an_encoding):
        for kept in (copy.deepcopy, lambda past: pickle.loads(pickle.dumps(past)), lambda past: past):
            assert deviation(model(NEW, past_key_values=kept(fill(model, config, side))), right) <= bound
    past = filled(model, config, side)
    steps = [model(NEW[:, :1], past_key_values=past), model(NEW[:, 1:], past_key_values=past)]
    assert deviation(torch.cat(steps, 1), right) <= bound
    whole = torch.cat([mask_of(side), torch.ones_like(NEW)], 1)
    assert deviation(model(NEW, past_key_values=filled(model, config, side), attention_mask=whole), right) <= bound
    forgetful = filled(model, config, side)
    del forgetful.__dict__[key_value_padding._NOTE]
    assert deviation(model(NEW, past_key_values=forgetful), right) > 0.1, "negative control: padding is read"


@pytest.mark.parametrize("returned", [False, pytest.param(True, marks=pytest.mark.typed)])
@torch.no_grad()
def test_a_cache_that_transformers_generation_filled_knows_the_padding_of_its_prompts(returned: bool) -> None:
    model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
    prompts = ["Der alte Mann sah auf das Meer und dachte", "The sea"]
    hf: Any = model.original_model
    passed = None if returned else DynamicCache(config=hf.config)
    words: dict[str, Any] = {"return_dict_in_generate": True, "stop_at_eos": False, "num_return_sequences": 2}
    torch.manual_seed(0)
    out = model.hf_generate(prompts, max_new_tokens=3, return_type="tokens", past_key_values=passed, **words)
    past, forgetful = cache_of(out), copy.deepcopy(cache_of(out))
    assert passed is None or past is passed
    new = out.sequences[:, past.get_seq_length() :]
    found = model(new, past_key_values=past)
    del forgetful.__dict__[key_value_padding._NOTE]
    wrong = model(new, past_key_values=forgetful)
    for row, text in enumerate([prompts[0]] * 2 + [prompts[1]] * 2):
        alone = model(out.sequences[row : row + 1, -(model.to_tokens(text).shape[1] + 3) :])
        assert deviation(found[row, -1], alone[0, -1]) <= FP32 * alone.abs().max().item()
    assert deviation(wrong, found) > 0.1, "negative control: padding is read"


@pytest.mark.typed
def test_the_tokens_of_a_pass_have_their_earlier_name_too() -> None:
    model = wrapped("mixtral").model
    with pytest.warns(DeprecationWarning, match=r"model.step\(\) is now model.current_tokens\(\)"):
        assert model.step() is None, "no pass is under way"


@torch.no_grad()
def test_positions_of_hooks_do_not_count_the_padding_of_a_cache() -> None:
    case = wrapped("mixtral")
    places: list[Tensor] = []

    def note(value: Tensor, hook: Any) -> None:  # noqa: ARG001
        step = case.model.current_tokens()
        assert step is not None
        places.append(step.places())

    past = filled(case.model, case.hf.config, "left")
    case.model.run_with_hooks(NEW, fwd_hooks=[("blocks.1.mlp.hook_in", note)], past_key_values=past)
    assert places[0].tolist() == [[7, 8, 9], [4, 5, 6]]


@torch.no_grad()
def test_padding_of_a_cache_that_cannot_be_told_is_refused() -> None:
    case = wrapped("mixtral")
    model, config = case.model, case.hf.config
    whole = torch.cat([mask_of("left"), torch.ones_like(NEW)], 1)
    past = filled(model, config, "left")
    with pytest.raises(InputError, match="attention_mask is not 0 at padding that past_key_values holds"):
        model(NEW, past_key_values=past, attention_mask=torch.ones_like(whole))
    past.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(InputError, match=r"was changed since; pass attention_mask of shape \(2, 10\)"):
        model(NEW.flip(0), past_key_values=past)
    found = model(NEW.flip(0), past_key_values=past, attention_mask=whole.flip(0))
    right = alone(model)
    assert deviation(found.flip(0), right) <= FP32 * right.abs().max().item()
    past.reset()  # a cache that was emptied holds no padding
    fresh = model(torch.tensor(ROWS[:1] * 2), past_key_values=DynamicCache(config=config))
    past = filled(model, config, "left")
    past.crop(0)
    for layer in past.layers:
        layer.keys, layer.values, layer.is_initialized = None, None, False
    assert torch.equal(model(torch.tensor(ROWS[:1] * 2), past_key_values=past), fresh)


@pytest.mark.parametrize(("model_type", "why"), [("qwen3_next", "into a state"), ("gpt_oss", "attention window of 8")])
@torch.no_grad()
def test_padding_inside_a_text_is_refused_where_no_mask_hides_it(model_type: str, why: str) -> None:
    hf: Any = configs.build(model_type)
    model = HookedMoE.from_hf(hf, check=False)
    right = alone(model)
    left = filled(model, hf.config, "left")
    assert deviation(model(NEW, past_key_values=left), right) <= 1e-4
    whole = torch.cat([mask_of("right"), torch.ones_like(NEW)], 1)
    for mask in (None, whole):
        with pytest.raises(InputError, match=f"{why}.*padding_side='left'"):
            model(NEW, past_key_values=filled(model, hf.config, "right"), attention_mask=mask)
    forgetful = filled(model, hf.config, "right")
    del forgetful.__dict__[key_value_padding._NOTE]
    found = model(NEW, past_key_values=forgetful, attention_mask=whole)
    assert deviation(found, right) > 0.1, "negative control: the mask alone is not enough"


# --- caches that are not this model's ---


@torch.no_grad()
def test_caches_of_hybrids_are_held_against_the_model() -> None:
    hf: Any = configs.build("qwen3_next")
    model, other = HookedMoE.from_hf(hf, check=False), wrapped("mixtral")
    token = NEW[:, :1]

    def full() -> Any:
        past = DynamicCache(config=hf.config)
        model(NEW, past_key_values=past)
        return past

    assert model(token, past_key_values=full()).isfinite().all(), "its own is read"
    with pytest.raises(InputError, match="holds a batch of 2, and the input is one of 1"):
        model(token[:1], past_key_values=full())
    foreign, short = DynamicCache(), DynamicCache(config=hf.config)
    other.model(NEW, past_key_values=foreign)
    with pytest.raises(InputError, match="without what this model keeps of layer 0"):
        model(token, past_key_values=foreign)
    with pytest.raises(InputError, match=r"DynamicCache\(config="):
        model(token, past_key_values=DynamicCache())
    model(NEW, past_key_values=short, stop_at_layer=1)
    with pytest.raises(InputError, match="tokens for some of its layers only"):
        model(token, past_key_values=short)
    hf_wide: Any = configs.build("qwen3_next", linear_num_value_heads=8)
    wide = DynamicCache(config=hf_wide.config)
    HookedMoE.from_hf(hf_wide, check=False)(NEW, past_key_values=wide)
    with pytest.raises(InputError, match="was filled by another model"):
        model(token, past_key_values=wide)


@torch.no_grad()
def test_a_cache_with_the_models_layers_that_a_shorter_pass_has_filled_is_refused() -> None:
    case = wrapped("mixtral")
    past = new_cache(case)
    case.model(case.tokens, past_key_values=past, stop_at_layer=1)
    assert len(past.layers) == 3
    with pytest.raises(InputError, match="tokens for some of its layers only"):
        case.model(case.tokens[:, :1], past_key_values=past)


@torch.no_grad()
def test_what_transformers_computes_otherwise_behind_a_cache_or_padding_is_refused() -> None:
    jamba: Any = configs.build("jamba")
    whole = jamba(torch.cat([NEW, NEW], 1)).logits
    past = DynamicCache(config=jamba.config)
    word = cache_word(type(jamba).forward)
    jamba(NEW, **{word: past}, use_cache=True)
    control = jamba(NEW, **{word: past}, use_cache=True).logits
    assert deviation(control, whole[:, 3:]) > 0.1, "transformers can do it by now: take the refusal away"
    model, past = HookedMoE.from_hf(jamba, check=False), DynamicCache(config=jamba.config)
    model(NEW, past_key_values=past)
    with pytest.raises(InputError, match="one token at a time"):
        model(NEW, past_key_values=past)
    steps = [model(part, past_key_values=past) for part in NEW.split(1, 1)]
    assert deviation(torch.cat(steps, 1), whole[:, 3:]) <= 1e-4

    hf: Any = configs.build("deepseek_v4")
    front, mask = torch.tensor([[0] * 3 + ROWS[1]]), mask_of("left")[1:]
    right = hf(front[:, 3:]).logits
    places = (mask.cumsum(1) - 1).clamp(min=0)
    control = hf(front, attention_mask=mask, position_ids=places).logits[:, 3:]
    assert deviation(control, right) > 1e-2, "transformers can do it by now: take the refusal away"
    model = HookedMoE.from_hf(hf, check=False)
    for call in (
        lambda: model(ROWS, padding_side="left"),
        lambda: model(front, attention_mask=mask),
        lambda: model.hf_generate(front, 2, attention_mask=mask),
    ):
        with pytest.raises(InputError, match="padding in front of a text.*padding_side='right'"):
            call()
    assert deviation(model(ROWS, padding_side="right")[1:, :4], right) <= 1e-4


@pytest.mark.parametrize("family", ["deepseek", "inkling_text"])
def test_a_cache_that_is_asked_for_comes_whatever_the_config_says(family: str) -> None:
    """A config after fine-tuning says that there is to be none, and Inkling's says nothing."""
    model = HookedMoE.from_hf(configs.build(family, dtype=torch.float64))
    ids = configs.tokens(1, 9)
    config: Any = model.original_model.config
    config.use_cache = False
    with torch.no_grad():
        whole = model(ids)
        _, past = model(ids[:, :5], return_type="logits_and_cache")
        assert (model(ids[:, 5:], past_key_values=past) - whole[:, 5:]).abs().max() <= 1e-12 * whole.abs().max()
        assert (model(ids[:, 5:]) - whole[:, 5:]).abs().max() > 1e-3, "the control: without what came before"
    with pytest.raises(InputError, match="use_cache=False: there would be no cache"):
        model(ids, return_type="logits_and_cache", use_cache=False)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # oldest has no other
def test_where_transformers_stores_no_cache_it_is_an_error() -> None:
    hf = configs.build("mixtral").train()
    hf.gradient_checkpointing_enable()
    model = HookedMoE.from_hf(hf)
    with pytest.raises(InputError, match=r"keeps no key-value cache .*model\.eval"):
        model(configs.tokens(), return_type="logits_and_cache")
