"""Calls as people bring them from TransformerLens and transformers: done as they mean, or refused in a line."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from moe_lens import HookedMoE
from moe_lens.errors import HookError, InputError, MoELensError, TokenError, UnsupportedModelError
from moe_lens.model.loading.state_dict import StateError
from tests.families import build, tokens
from tests.matrix import configs
from tests.wrapped import deviation, wrapped

TEXT = "The old man looked at the sea."
PRE = "blocks.1.hook_resid_pre"
APART = (
    1e-3  # of negative controls: a hundred times what equal logits may differ by, so that rounding never passes for it
)


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32, check=False)


def zero(value: Tensor, hook: Any) -> Tensor:
    return value * 0


# --- tokens ---


@pytest.mark.typed
def test_tokens_are_named_alike_in_every_form(model: HookedMoE) -> None:
    ids = model.to_tokens(TEXT)
    names = model.to_str_tokens(TEXT)
    row = ids[0].tolist()
    for form in (ids, ids[0], ids[0].numpy(), row, model.tokenizer(TEXT, return_tensors="pt"), torch.stack([ids])):
        assert model.to_str_tokens(form) == names
    assert model.to_str_tokens(torch.cat([ids, ids])) == [names, names]
    assert model.to_str_tokens([row, row[:2]]) == [names, names[:2]] == model.to_str_tokens([TEXT, ids[0, :2]])
    assert model.to_str_tokens("", prepend_bos=False) == []
    assert model.to_str_tokens(torch.tensor(row[1])) == names[1:2] == [model.to_single_str_token(row[1])]
    assert model.to_string(ids) == ["".join(names)] and model.to_string(row) == "".join(names)
    assert model.to_string([row, row[:2]]) == ["".join(names), "".join(names[:2])]
    assert model.to_string(row[1]) == names[1] and model.to_string([]) == ""
    assert [model.get_token_position(name, row, mode="last") for name in names[2:]] == list(range(2, len(names)))
    assert model.get_token_position(" the", "the sea the sea the", mode="first") < model.get_token_position(
        " the", "the sea the sea the", mode="last"
    )


def test_directions_of_tokens_are_those_of_the_unembedding(model: HookedMoE) -> None:
    W_U: Any = model.W_U
    token = model.to_single_token(" the")
    for one in (token, " the", torch.tensor([token]), [token]):
        assert torch.equal(model.tokens_to_residual_directions(one), W_U[:, token])
    assert torch.equal(model.tokens_to_residual_directions([" the", 5]), W_U[:, [token, 5]].T)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert torch.equal(model.tokens_to_residual_directions(ids)[1, 2], W_U[:, 6])


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.to_single_token(" the old man"),
        lambda m: m.to_single_token(""),
        lambda m: m.get_token_position(" zebra", TEXT),
        lambda m: m.tokens_to_residual_directions(" the old man"),
    ],
)
def test_a_text_that_is_not_one_token_there_is_both_libraries_error(
    model: HookedMoE, call: Callable[[HookedMoE], Any]
) -> None:
    with pytest.raises(TokenError) as error:
        call(model)
    assert isinstance(error.value, AssertionError) and isinstance(error.value, InputError)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.to_string(10**6), "0 to 4095"),
        (lambda m: m.to_string([-1]), "from 0"),
        (lambda m: m.to_string(torch.tensor([1.5])), "1.5"),
        (lambda m: m.to_string(torch.zeros(1, 1, 1, dtype=torch.long)), "two axes"),
        (lambda m: m.to_single_token(5), "expected a text"),
        (lambda m: m.to_single_str_token(10**6), "0 to 4095"),
        (lambda m: m.tokens_to_residual_directions(-1), "from 0"),
        (lambda m: m.tokens_to_residual_directions(torch.tensor([5.0])), "5.0"),
        (lambda m: m.tokens_to_residual_directions([[1, 2], [3]]), "differ in length"),
        (lambda m: m.get_token_position(5, [TEXT, TEXT]), "2 texts"),
        (lambda m: m.get_token_position(5, TEXT, mode="lst"), "did you mean 'last'"),
        (lambda m: m("cut \ud83d emoji"), "half of a character"),
        (lambda m: m.to_tokens(["whole", "cut \ud83d emoji"]), "half of a character"),
        (lambda m: m.generate("cut \ud83d", max_new_tokens=1), "half of a character"),
    ],
)
def test_what_is_no_token_is_refused(model: HookedMoE, call: Callable[[HookedMoE], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        call(model)


def test_a_tokenizer_of_another_model_is_named(model: HookedMoE) -> None:
    other = wrapped("mixtral").model
    other.tokenizer = model.tokenizer
    try:
        with pytest.raises(InputError, match="is it this model's tokenizer"):
            other(TEXT)
    finally:
        other.tokenizer = None


# --- what a pass is asked for ---


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"stop_at_layer": 2.5}, "no layer 2.5"),
        ({"stop_at_layer": True}, "no layer True"),
        ({"start_at_layer": 1}, "needs a residual stream"),
        ({"stop_at_layer": 1, "return_type": "loss"}, "stops early"),
        ({"logits_to_keep": 1, "return_type": "loss"}, "at every token"),
        ({"labels": torch.zeros(1, 3, dtype=torch.long)}, "labels are of shape"),
        ({"labels": "a"}, "labels are a str"),
        ({"labels": torch.full((2, 12), 5000), "return_type": "loss"}, "from 5000 to 5000; expected ids from 0 to 100"),
        ({"labels": torch.full((2, 12), -5), "return_type": "loss"}, "or -100 where none is meant"),
        ({"labels": torch.ones(2, 12), "return_type": "loss"}, "labels are torch.float32"),
        ({"position_ids": torch.arange(12)}, r"position_ids are torch.int64 of shape \(12,\); expected \[batch, 12\]"),
        ({"position_ids": [[0, 1], [1]]}, "position_ids are no numbers in rows of one length"),
        ({"position_ids": "a"}, "position_ids are a str"),
        ({"position_ids": torch.ones(2, 12).bool()}, "position_ids are torch.bool"),
        ({"position_ids": torch.arange(5)[None]}, r"expected \[batch, 12\]"),
        ({"output_hidden_states": True}, "run_with_cache"),
        ({"return_dict": True}, "return_type"),
        ({"attention_mask": torch.ones(2, 40).long()}, "attention_mask has shape"),
    ],
)
def test_a_pass_that_cannot_give_what_is_asked_is_refused(words: dict[str, Any], says: str) -> None:
    case = wrapped("mixtral")
    with pytest.raises(InputError, match=says):
        case.model(case.tokens, **words)


def test_a_cache_that_another_model_or_a_shorter_pass_has_filled_is_refused() -> None:
    case, other = wrapped("mixtral"), wrapped("olmoe")
    whole, short, foreign = DynamicCache(), DynamicCache(), DynamicCache()
    with torch.no_grad():
        case.model(case.tokens, past_key_values=whole)
        assert case.model(case.tokens[:, :1], past_key_values=whole).isfinite().all(), "its own is read"
        case.model(case.tokens, past_key_values=short, stop_at_layer=1)
        with pytest.raises(InputError, match="holds 1 layers, and this model has 3"):
            case.model(case.tokens[:, :1], past_key_values=short)
        assert other.model.cfg.n_layers == len(case.model.blocks)
        for at in range(other.model.cfg.n_layers):
            foreign.update(torch.zeros(2, 1, 3, 5), torch.zeros(2, 1, 3, 5), at)
        with pytest.raises(InputError, match="was filled by another model"):
            case.model(case.tokens, past_key_values=foreign)


@pytest.mark.typed
def test_the_config_says_the_dtype_that_is_there() -> None:
    model = HookedMoE.from_hf(build("mixtral"), check=False)
    for change, dtype in (
        (lambda: model.half(), torch.float16),
        (lambda: model.bfloat16(), torch.bfloat16),
        (lambda: model.double(), torch.float64),
        (lambda: model.float(), torch.float32),
        (lambda: model.to(torch.float16, print_details=False), torch.float16),
        (lambda: model.to(torch.zeros(1, dtype=torch.float64), print_details=False), torch.float64),
        (lambda: model.type(torch.bfloat16), torch.bfloat16),
    ):
        change()
        assert model.cfg.dtype == dtype == model.W_E.dtype
    inner: Any = model.original_model
    for change, dtype in (
        (lambda: inner.half(), torch.float16),
        (lambda: inner.to(torch.bfloat16), torch.bfloat16),
        (lambda: inner.model.double(), torch.float64),
    ):
        change()
        assert model.cfg.dtype == dtype == model.W_E.dtype
    inner.float()
    copied = copy.deepcopy(model)
    copied.original_model.half()
    assert (copied.cfg.dtype, model.cfg.dtype) == (torch.float16, torch.float32)


@pytest.mark.typed
@pytest.mark.slow  # torch's compiler is imported
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by itself
def test_what_runs_modules_in_other_ways_is_refused_in_a_line() -> None:
    case = wrapped("mixtral")
    for call in (lambda: torch.compile(case.model), case.model.compile):
        with pytest.raises(UnsupportedModelError, match="a wrapped model is not compiled"):
            call()
    values = {name: value * 2 for name, value in case.model.named_parameters()}
    with pytest.raises(UnsupportedModelError, match="functional_call cannot run a wrapped model"):
        torch.func.functional_call(case.model, values, (case.tokens,))
    inner: Any = case.model.original_model
    by_name = dict(inner.named_parameters())
    for part in (inner, inner.base_model):
        for state in (
            inner.state_dict(),
            case.model.state_dict(),
            {name: value * 2 for name, value in by_name.items()},
        ):
            with pytest.raises(UnsupportedModelError, match="functional_call cannot run a wrapped model"):
                torch.func.functional_call(part, state, (case.tokens,))
    assert len(dict(inner.named_parameters(remove_duplicate=False))) > len(by_name), "transformers' own is untouched"
    with torch.no_grad():
        assert torch.equal(case.model(case.tokens), case.logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, while it is imported
def test_functional_call_on_a_part_runs_it_right_or_is_refused_and_changes_nothing() -> None:
    """Torch puts the wrong numbers back where a parameter has two places: shared experts have."""
    model = wrapped("qwen2_moe").model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refused = ran = failed = 0
    parts = {id(part): part for root in (model, model.original_model) for part in root.modules()}
    for part in parts.values():
        if not (values := {name: value * 2 for name, value in part.named_parameters()}):
            continue
        try:
            torch.func.functional_call(part, values, (torch.ones(1, 3, model.cfg.d_model),))
            ran += 1
        except UnsupportedModelError:
            refused += 1
        except (TypeError, RuntimeError):  # it takes other arguments, or another width
            failed += 1
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), type(part)
    assert refused > 3 and ran > 3 and failed < ran, "most parts are tried"


@pytest.mark.slow  # torch's compiler is imported
@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
def test_what_is_compiled_around_a_call_leaves_the_call_as_it_is() -> None:
    case = wrapped("mixtral")
    model, seen = case.model, []

    def see(value: Tensor, hook: Any) -> None:  # noqa: ARG001
        seen.append(1)

    def around(tokens: torch.Tensor) -> torch.Tensor:
        doubled = model(tokens) * 2
        watched = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", see)])
        cached = model.run_with_cache(tokens, names_filter="blocks.1.hook_router_logits")[0]
        weights = model.routing(tokens).weights
        longer = model.generate(tokens, max_new_tokens=1, do_sample=False, return_type="tokens", verbose=False)
        return doubled + watched + cached + weights.sum() + longer.sum()

    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(torch.compile(around, backend="eager")(case.tokens), around(case.tokens))
        assert len(seen) == 4
        inner: Any = model.original_model
        for part in (inner, inner.base_model, inner.base_model.layers[1]):
            with pytest.raises(Exception, match="^UnsupportedModelError: a wrapped model is not compiled: [^\n]*\n"):
                torch.compile(part, backend="eager")(case.tokens)
        assert torch.equal(model(case.tokens), case.logits)


def test_a_hook_outside_of_the_layers_has_no_number() -> None:
    case = wrapped("mixtral")
    seen = [case.model.hook_dict[name].layer() for name in ("blocks.1.hook_in", "blocks.1.mlp.hook_router_logits")]
    assert seen == [1, 1]
    with pytest.raises(HookError, match="outside of the layers"):
        case.model.hook_dict["hook_embed"].layer()


@pytest.mark.parametrize(
    ("x", "experts", "says"),
    [
        ((1, 3), [[0, 1]], "expected a tensor of whole numbers"),
        ((1, 3), torch.zeros(2, 2).long(), "with the same 'tokens'"),
        ((1, 3), torch.tensor([1, 2]), "with the same 'tokens'"),
        ((1, 3, 1), torch.zeros(1, 3, 2).long(), "with the same 'tokens'"),
    ],
)
def test_experts_at_tokens_have_the_tokens_axes(x: tuple[int, ...], experts: Any, says: str) -> None:
    model = wrapped("mixtral").model
    assert model.expert_outputs(0, torch.zeros(1, 3, model.cfg.d_model), torch.zeros(1, 3, 2).long()).shape[:3] == (
        1, 3, 2,
    )  # fmt: skip
    with pytest.raises(InputError, match=says):
        model.expert_outputs(0, torch.zeros(*x, model.cfg.d_model), experts)
    for none in ((0, 3), (1, 0)):
        out = model.expert_outputs(0, torch.zeros(*none, model.cfg.d_model), torch.zeros(*none, 2).long())
        assert out.shape == (*none, 2, model.cfg.d_model)
    with pytest.raises(InputError, match="no expert is asked for at"):
        model.expert_outputs(0, torch.zeros(1, 3, model.cfg.d_model), torch.zeros(1, 3, 0).long())
    with pytest.raises(InputError, match="is 5 wide"):
        model.expert_outputs(0, torch.zeros(1, 3, 5), torch.zeros(1, 3, 2).long())


def test_a_residual_stream_needs_labels_for_a_loss_and_runs_forwards() -> None:
    case = wrapped("mixtral")
    middle = case.model(case.tokens, stop_at_layer=1)
    with pytest.raises(InputError, match="labels="):
        case.model(middle, start_at_layer=1, return_type="loss")
    with pytest.raises(InputError, match="no block would run"):
        case.model(middle, start_at_layer=2, stop_at_layer=1)
    for kept in ({"past_key_values": DynamicCache()}, {"return_type": "logits_and_cache"}):
        with pytest.raises(InputError, match="start_at_layer with a key-value cache"):
            case.model(middle, start_at_layer=1, **kept)
    with pytest.raises(InputError, match=r"no layer 3 to start at; expected -3 to 2"):
        case.model(middle, start_at_layer=3)
    loss = case.model(middle, start_at_layer=1, return_type="loss", labels=case.tokens)
    assert torch.allclose(loss, case.model(case.tokens, return_type="loss"), atol=1e-6)


def test_positions_and_labels_are_read_from_lists_and_arrays() -> None:
    case = wrapped("mixtral")
    places = case.tokens.new_tensor(range(3, 15)).expand(2, -1)
    expected = case.model(case.tokens, position_ids=places)
    for given in (places.tolist(), places.numpy(), tuple(map(tuple, places.tolist()))):
        assert torch.equal(case.model(case.tokens, position_ids=given), expected)
    assert deviation(expected, case.logits) > 0
    ids = case.tokens.tolist()
    assert case.model(case.tokens, labels=ids, return_type="loss") == case.model(case.tokens, return_type="loss")


def test_routing_keeps_and_returns_what_it_does() -> None:
    case = wrapped("mixtral")
    said: list[dict[str, Any]] = [{"names_filter": []}, {"return_cache_object": False}, {"remove_batch_dim": True}]
    said += [{"return_type": "loss"}, {"incl_bwd": True}, {"keep_graph": True}, {"stop_at_layer": 1}]
    for words in said:
        with pytest.raises(InputError, match=f"routing has no argument {next(iter(words))}"):
            case.model.routing(case.tokens, **words)
    whole, last = case.model.routing(case.tokens), case.model.routing(case.tokens, pos_slice=-1)
    assert torch.equal(last.indices, whole.indices[:, :, -1:])


def test_what_is_said_of_a_loss_that_is_not_asked_for_is_refused() -> None:
    case = wrapped("mixtral")
    said: list[dict[str, Any]] = [{"loss_per_token": True}, {"labels": case.tokens}]
    for how in said:
        case.model(case.tokens, return_type="loss", **how)
        for run in (case.model, case.model.run_with_hooks, case.model.run_with_cache):
            with pytest.raises(InputError, match="has no effect on return_type='logits'"):
                run(case.tokens, **how)
    collated = {"input_ids": case.tokens, "labels": case.tokens.clone()}  # as transformers' collators make it
    collated["labels"][0, :6] = -100
    with pytest.raises(InputError, match="labels has no effect on return_type='logits'; expected return_type='loss'"):
        case.model(collated)
    assert torch.equal(
        case.model(case.tokens, labels=case.tokens.int(), return_type="loss"),
        case.model(case.tokens, labels=case.tokens, return_type="loss"),
    )
    theirs = case.hf(**collated).loss
    assert torch.allclose(case.model(collated, return_type="loss"), theirs, atol=1e-5)
    assert (case.model(case.tokens, return_type="loss") - theirs).abs() > APART, "negative control"
    assert torch.equal(case.model.routing(collated).indices, case.model.routing(case.tokens).indices)


@pytest.mark.untyped
def test_the_loss_of_logits_of_another_shape_is_refused() -> None:
    case = wrapped("mixtral")
    model, tokens = case.model, case.tokens
    right = model.loss_fn(case.logits, tokens)
    assert torch.allclose(right, model(tokens, return_type="loss"), atol=1e-6)
    for other in (tokens[:, :-2], tokens[:1]):  # negative control: torch's gather takes both
        assert case.logits.log_softmax(-1)[:, :-1].gather(-1, other[:, 1:, None]).numel() == other[:, 1:].numel()
        with pytest.raises(InputError, match="at every token"):
            model.loss_fn(case.logits, other)


@pytest.mark.parametrize("listened", [False, True])
def test_masks_of_queries_and_keys_mean_what_they_say(listened: bool) -> None:
    """Booleans as well as numbers to add, also where eager attention runs; 1 and 0 are neither."""
    case = wrapped("mixtral")
    batch, pos = case.tokens.shape
    reach = torch.ones(pos, pos, dtype=torch.bool).tril()[None, None].expand(batch, 1, -1, -1)
    names = ["blocks.0.attn.hook_pattern"] if listened else []

    def run(mask: Any) -> Tensor:
        return case.model.run_with_cache(case.tokens, attention_mask=mask, names_filter=names)[0]

    for mask in (reach, torch.zeros(reach.shape).masked_fill(~reach, torch.finfo(torch.float32).min)):
        assert torch.allclose(run(mask), case.logits, atol=1e-5)
    for mask in (reach.long(), reach.float()):
        with pytest.raises(InputError, match="added to the scores"):
            run(mask)
    everything = run(torch.ones_like(reach))
    assert not torch.allclose(everything, case.logits, atol=APART), "negative control: the mask is used"


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2_moe", "jamba"])
def test_masks_of_queries_and_keys_are_refused_where_they_do_not_reach_all_layers(model_type: str) -> None:
    plain, tokens = configs.build(model_type), configs.tokens(2, 10)
    model, real = HookedMoE.from_hf(plain, check=False), torch.ones_like(tokens, dtype=torch.bool)
    real[1, :3] = False
    reach = torch.ones(10, 10, dtype=torch.bool).tril()[None, None] & real[:, None, None]
    places = {"position_ids": (real.long().cumsum(-1) - 1).clamp(min=0)}
    with pytest.raises(InputError, match=f"^layers of {model_type} read .* expected attention_mask"):
        model(tokens, attention_mask=reach, **places)
    alone = model(tokens[1:, 3:])[0]
    rounded = 1e-4  # float32, logits up to 6: chunks of linear attention begin elsewhere, which makes up to 2e-5
    assert (model(tokens, attention_mask=real)[1, 3:] - alone).abs().max() <= rounded
    leaked = plain(tokens, attention_mask=reach, **places).logits[1, 3:]
    assert (leaked - alone).abs().max() > 1, "negative control: transformers itself lets padding in"


@pytest.mark.typed
def test_eager_attention_reads_booleans_as_a_mask() -> None:
    """transformers' own adds True as 1 to the scores there."""
    case = wrapped("mixtral")
    config: Any = case.model.original_model.config
    batch, pos = case.tokens.shape
    reach = torch.ones(pos, pos, dtype=torch.bool).tril()[None, None].expand(batch, 1, -1, -1)
    config._attn_implementation, before = "eager", config._attn_implementation
    try:
        found = case.model(case.tokens, attention_mask=reach)
        plain = case.model.original_model(case.tokens, attention_mask=reach).logits
    finally:
        config._attn_implementation = before
    assert torch.allclose(found, case.logits, atol=1e-5)
    assert not torch.allclose(plain, case.logits, atol=APART), "negative control"


def test_a_mask_covers_the_cache_too() -> None:
    case = wrapped("mixtral")
    model, tokens = case.model, case.tokens
    config: Any = model.original_model.config
    past: Any = DynamicCache(config=config)
    model(tokens[:, :4], past_key_values=past, use_cache=True)
    for width in (tokens.shape[1] - 4, tokens.shape[1] - 1):
        with pytest.raises(InputError, match="in the key-value cache; expected"):
            model(tokens[:, 4:], attention_mask=torch.ones(len(tokens), width).long(), past_key_values=past)
    with pytest.raises(InputError, match="holds a batch of"):
        model(tokens[:1, 4:], past_key_values=past)
    whole = torch.ones_like(tokens)
    assert torch.allclose(
        model(tokens[:, 4:], attention_mask=whole, past_key_values=past), case.logits[:, 4:], atol=1e-5
    )


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"names_filter": 3}, "names_filter is an int, 3; expected a name, names, or a function"),
        ({"names_filter": {PRE: zero}}, "names_filter is a dict, "),
        ({"names_filter": [zero]}, "names_filter holds a function"),
        ({"pos_slice": 99}, "pos_slice is 99"),
        ({"pos_slice": "last"}, "pos_slice is 'last'"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"dtype": torch.int8}, "floating-point"),
        ({"dtype": "float16"}, "floating-point"),
    ],
)
def test_what_cannot_be_kept_is_refused(words: dict[str, Any], says: str) -> None:
    case = wrapped("mixtral")
    with pytest.raises(InputError, match=says):
        case.model.run_with_cache(case.tokens, **{"names_filter": PRE, **words})


# --- hooks ---


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("hooks", "says"),
    [
        ([PRE], "expected pairs"),
        ({PRE: zero}, "hooks are a dict"),
        ((PRE, zero), "expected pairs"),
        ([([PRE], zero)], "named by a list"),
        ([(PRE, None)], "a hook function is None"),
        ([(PRE, lambda value: value)], "the hook point is passed by that name"),
        ([(PRE, lambda value, point: value)], "the hook point is passed by that name"),
        ([(PRE, lambda hook, value: value)], "the hook point is passed by that name"),
        (
            [(PRE, lambda value, hook, head: value)],
            r"takes \(value, hook, head\).*functools.partial gives a function the",
        ),
        ([(PRE, partial(lambda value, hook, head, by: value, head=0))], r"takes \(value, hook, \*, head=0, by\)"),
        ([(lambda name: name.endswith("hook_expert_weights"), zero)], "chose no hook point"),
    ],
)
def test_hooks_that_would_do_nothing_are_refused(hooks: Any, says: str) -> None:
    case = wrapped("mixtral")
    with pytest.raises(HookError, match=says):
        case.model.run_with_hooks(case.tokens, fwd_hooks=hooks)
    with pytest.raises(HookError, match=says), case.model.hooks(hooks):
        pass


def test_a_predicate_may_choose_blocks_that_do_not_run() -> None:
    case = wrapped("mixtral")
    hooks = [(lambda name: name == "blocks.1.hook_resid_pre", zero), ("blocks.1.hook_resid_post", zero)]
    found = case.model.run_with_hooks(case.tokens, fwd_hooks=hooks, stop_at_layer=1)
    assert torch.equal(found, case.model(case.tokens, stop_at_layer=1))


@pytest.mark.untyped
def test_hooks_from_a_generator_are_there_in_every_with() -> None:
    case = wrapped("mixtral")
    pairs: Any = ((name, zero) for name in [PRE])
    context = case.model.hooks(pairs)
    for _ in range(2):
        with context:
            assert not torch.allclose(case.model(case.tokens), case.logits, atol=APART)
    assert torch.equal(case.model(case.tokens), case.logits)


def test_directions_of_hooks_are_checked() -> None:
    model = wrapped("mixtral").model
    for call in (
        lambda: model.add_hook(PRE, zero, dir="backward"),  # pyright: ignore[reportArgumentType]
        lambda: model.reset_hooks(direction="sideways"),  # pyright: ignore[reportArgumentType]
        lambda: model.add_hook(lambda name: False, zero),
        lambda: model.add_hook(PRE, lambda value: value),
    ):
        with pytest.raises(MoELensError):
            call()


# --- caches ---


@pytest.fixture(scope="module")
def cache() -> Any:
    case = wrapped("mixtral")
    return case.model.run_with_cache(case.tokens)[1]


@pytest.mark.typed
def test_layers_of_stacks_count_from_the_end_too(cache: Any) -> None:
    """-1 is TransformerLens's word for behind the last layer; others mean what they mean in a list."""
    n = cache.model.cfg.n_layers
    for stack in (
        cache.decompose_resid,
        cache.accumulated_resid,
        cache.stack_head_results,
        cache.get_full_resid_decomposition,
        cache.decompose_experts,
        cache.stack_neuron_results,
    ):
        behind, before = stack(layer=n, return_labels=True), stack(layer=n - 2, return_labels=True)
        assert (
            behind[1] == stack(layer=-1, return_labels=True)[1] != before[1] == stack(layer=-2, return_labels=True)[1]
        )
        assert torch.equal(stack(layer=-2, return_labels=True)[0], before[0])
        for layer in (n + 1, -n - 1, 1.5, True, "1"):
            with pytest.raises((HookError, InputError), match="there is no layer|layer is"):
                stack(layer=layer)
    assert torch.equal(cache.decompose_resid(layer=-2).sum(0), cache["resid_pre", n - 2])
    assert torch.equal(cache.stack_activation("resid_pre", -2), cache.stack_activation("resid_pre", n - 2))


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda c: c.decompose_resid(mode="mlps"), InputError),
        (lambda c: c.logit_attrs(c.decompose_resid(), tokens=5.0), InputError),
        (lambda c: c.stack_activation("resid_pre", layer=0), HookError),
        (lambda c: c[3], HookError),
        (lambda c: c[:3], HookError),
        (lambda c: c.routing("1"), InputError),
    ],
)
def test_what_a_cache_cannot_tell_is_refused(cache: Any, call: Callable[[Any], Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        call(cache)


# --- generation ---


@pytest.mark.parametrize(
    "words",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"temperature": -1},
        *({word: value} for word in ("do_sample", "stop_at_eos", "use_past_kv_cache") for value in ("no", 0.5, None)),
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_p": 5.0},
        {"repetition_penalty": 0.0},
        {"freq_penalty": float("inf")},
        {"eos_token_id": 10**7},
        {"eos_token_id": "x"},
    ],
)
def test_sampling_that_means_nothing_is_refused(words: dict[str, Any]) -> None:
    case = wrapped("mixtral")
    for run in (case.model.generate, case.model.generate_stream):
        with pytest.raises(InputError, match=next(iter(words))):
            run(case.tokens, **{"max_new_tokens": 1, "verbose": False, **words})
    with pytest.raises(InputError, match="max_tokens_per_yield is 0"):
        case.model.generate_stream(case.tokens, max_tokens_per_yield=0)


# --- loading and weights ---


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"state_dict": {}}, "load_state_dict"),
        ({"output_loading_info": True}, "error here"),
        ({"first_n_layers": 2, "num_hidden_layers": 3}, "expected one of them"),
        *(({"first_n_layers": layers}, "first_n_layers is .*; expected a whole") for layers in (0, -1, 2.0, "2", True)),
        ({"device_map": "atuo"}, "device_map is 'atuo'"),
        ({"attn_implementation": "eagre"}, "eagre"),
        ({"tokenizer": False, "num_hidden_layers": 2, "check": False}, "expected a tokenizer"),
    ],
)
def test_words_of_loading_that_would_be_passed_over_are_refused(words: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        HookedMoE.from_pretrained("tiny-deepseekmoe", **words)


def test_layers_are_those_of_the_config() -> None:
    fewer: Any = build("mixtral", torch.float32)
    fewer.model.layers = fewer.model.layers[:1]
    with pytest.raises(UnsupportedModelError, match="num_hidden_layers"):
        HookedMoE.from_hf(fewer)
    fewer.config.num_hidden_layers = 1
    assert HookedMoE.from_hf(fewer).cfg.n_layers == 1
    twice: Any = build("mixtral", torch.float32)
    twice.model.layers[1] = twice.model.layers[0]
    with pytest.raises(UnsupportedModelError, match="used twice"):
        HookedMoE.from_hf(twice)


@pytest.mark.untyped
def test_weights_that_are_none_are_refused(tmp_path: Path) -> None:
    model = wrapped("mixtral").model
    state: Any = model.state_dict()
    whole = {name: value.mul(100).to(torch.int8) for name, value in state.items()}
    others: list[Any] = [whole, {1: torch.zeros(1)}]
    for other in others:
        with pytest.raises(StateError):
            model.load_state_dict(other)
    none: list[Any] = [list(state.items()), None, "x.pt"]
    for other in none:
        with pytest.raises(InputError, match="state_dict is .*; expected a dictionary"):
            model.load_state_dict(other)
    for words in ({"nonsense": True}, {"state_dict": state}, {"safe_serialization": False}):
        with pytest.raises(InputError, match=next(iter(words))):
            model.save_pretrained(tmp_path, **words)
    assert not any(tmp_path.iterdir())


@pytest.mark.typed
def test_what_a_wrapped_model_does_not_do_is_refused() -> None:
    model = wrapped("mixtral").model
    with pytest.raises(UnsupportedModelError, match="call resize_token_embeddings on the transformers model"):
        model.resize_token_embeddings(99)
    with pytest.raises(UnsupportedModelError, match=r"save_pretrained\(folder, push_to_hub=True\)"):
        model.push_to_hub("a")


def test_the_transformers_model_inside_is_not_saved_or_changed_as_if_it_were_not_wrapped(tmp_path: Path) -> None:
    model = HookedMoE.from_hf(build("olmoe"), check=False)
    inside: Any = model.original_model
    before = model(tokens())
    copies: list[Any] = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for inner in (inside, *(each.original_model for each in copies)):
        with pytest.raises(UnsupportedModelError, match="save_pretrained of the HookedMoE"):
            inner.save_pretrained(tmp_path / "out")
        with pytest.raises(UnsupportedModelError, match="push_to_hub=True"):
            inner.push_to_hub("a")
    assert not any(tmp_path.iterdir())
    for owner in (inside, model):
        for change in ("set_input_embeddings", "set_output_embeddings"):
            with pytest.raises(UnsupportedModelError, match=f"call {change} on the transformers model"):
                getattr(owner, change)(torch.nn.Embedding(101, 32))
    assert torch.equal(model(tokens()), before)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens()).logits, before)


def test_a_divisor_for_the_loss_of_transformers_is_not_ignored() -> None:
    model = wrapped("olmoe").model
    with pytest.raises(InputError, match="num_items_in_batch.*loss_per_token"):
        model(tokens(), return_type="loss", num_items_in_batch=7)


def test_generation_of_several_prompts_keeps_no_cache() -> None:
    case = wrapped("mixtral")
    how: dict[str, Any] = {"max_new_tokens": 1, "return_cache": True, "verbose": False}
    with pytest.raises(UnsupportedModelError, match="no cache of 2 prompts, which end at different tokens: leave"):
        case.model.generate(case.tokens, **how)
    with pytest.raises(UnsupportedModelError, match="no cache of embeddings: leave return_cache=True out"):
        case.model.generate(case.model.embed(case.tokens[:1]), **how)
    pictures: Any = HookedMoE.from_hf(configs.build("qwen3_vl_moe"), check=False)
    with pytest.raises(UnsupportedModelError, match="no cache of a prompt with pixel_values: leave"):
        pictures.generate(tokens()[:1], pixel_values=torch.zeros(1), **how)
    out, cache = case.model.generate(case.tokens[:1], **how)
    assert cache["resid_pre", 0].shape[:2] == out.shape
