"""Asking for hooks: by name, alias, list and predicate; slices, stops, cleaning up after every exit."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens import HookedMoE, names
from moe_lens.errors import HookError, InputError
from moe_lens.model.hooks.block_replay import Recording
from tests.families import CONFIGS, tokens
from tests.matrix.configs import build
from tests.wrapped import listening, untouched, wrapped

APART = (
    1e-3  # of a negative control: a hundred times what equal logits may differ by, so that rounding never passes for it
)
families = pytest.mark.parametrize("family", CONFIGS)


def watch(seen: list[str], name: str) -> Callable[[torch.Tensor, Any], None]:
    return lambda value, hook: seen.append(name)


# --- names ---


@families
def test_every_hook_of_the_table_answers_to_both_its_names(family: str) -> None:
    model, case = wrapped(family).model, wrapped(family)
    for hook in names.MLP_HOOKS:
        full = names.mlp(hook.name, case.last)
        if hook.name not in names.ALIASED or full not in model.hook_dict:
            continue
        short = names.block(hook.name, case.last)
        assert model.hook_dict[full] is model.hook_dict[short]
        assert model.get_hook_point(short) is model.get_hook_point(full)
        assert model.hook_dict[full].name == full
        with torch.no_grad():
            _, cache = model.run_with_cache(case.tokens, names_filter=short)
            both = model.run_with_cache(case.tokens, names_filter=[short, full])[1]
        assert list(cache.keys()) == [short], "it is kept under the name that was asked for"
        assert set(both.keys()) == {short, full}
        assert torch.equal(cache[hook.name.removeprefix("hook_"), case.last], both[full])
        seen: list[str] = []
        with untouched(model), torch.no_grad():
            model.add_hook(short, watch(seen, "short"))
            model.add_hook(full, watch(seen, "full"))
            model(case.tokens)
            model.reset_hooks()
            model(case.tokens)
        assert seen == ["short", "full"]


def test_a_filter_is_a_name_names_or_a_predicate() -> None:
    case = wrapped("deepseek")
    wanted = {"blocks.1.mlp.hook_expert_out", "blocks.2.hook_resid_post"}
    filters: list[Any] = [list(wanted), tuple(wanted), lambda name: name in wanted]
    for names_filter in filters:
        with untouched(case.model), torch.no_grad():
            assert set(case.model.run_with_cache(case.tokens, names_filter=names_filter)[1].keys()) == wanted
    with torch.no_grad():
        everything = case.model.run_with_cache(case.tokens)[1]
        nothing = case.model.run_with_cache(case.tokens, names_filter=[])[1]
    assert {name for name in everything.keys() if names.parse_expert(name) is None} == case.fire  # noqa: SIM118
    assert list(nothing.keys()) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blocks.0.mlp.hook_expert_out", "layer 0 has no experts; MoE layers are [1, 2]"),
        ("blocks.0.hook_router_logits", "layer 0 has no experts; MoE layers are [1, 2]"),
        ("blocks.0.mlp.experts.3.hook_out", "layer 0 has no experts; MoE layers are [1, 2]"),
        ("blocks.1.mlp.experts.8.hook_out", "expert 8 does not exist; expected 0 to 7"),
        ("blocks.9.mlp.hook_expert_out", "MoE layers are [1, 2]"),
        ("blocks.1.mlp.hook_expert_outs", "does not exist on this model"),
        ("blocks.1.mlp.gate.hook_out", "does not exist on this model"),
        ("blocks.1.mlp.experts.hook_out", "does not exist on this model"),
    ],
)
def test_names_that_do_not_exist_are_refused_wherever_they_are_asked_for(name: str, says: str) -> None:
    case = wrapped("deepseek")

    def zero(value: torch.Tensor, hook: Any) -> None: ...

    ways: list[Callable[[], Any]] = [
        lambda: case.model.run_with_hooks(case.tokens, fwd_hooks=[("blocks.1.hook_resid_mid", zero), (name, zero)]),
        lambda: case.model.run_with_hooks(case.tokens, bwd_hooks=[(name, zero)]),
        lambda: case.model.run_with_cache(case.tokens, names_filter=name),
        lambda: case.model.run_with_cache(case.tokens, names_filter=["blocks.1.hook_resid_mid", name]),
        lambda: case.model.add_hook(name, zero),
        lambda: case.model.hooks([(name, zero)]).__enter__(),
    ]
    for way in ways:
        with untouched(case.model), pytest.raises(HookError, match=re.escape(says)):
            way()


def test_hooks_that_lost_their_owner_are_not_ours_under_another_name() -> None:
    """TransformerLens's flat, unsorted or dead hooks of routers: ours win, theirs are gone."""
    theirs = ("mlp.gate.hook_out", "router.hook_out", "hook_expert_weights", "hook_router_scores")
    for family in CONFIGS:
        assert [name for name in wrapped(family).model.hook_dict if name.endswith(theirs)] == [], family


# --- what is kept ---


@families
@settings(max_examples=4)
@given(data=st.data())
def test_a_slice_of_positions_is_that_slice_of_everything(family: str, data: st.DataObject) -> None:
    case = wrapped(family)
    table = [names.mlp(hook.name, case.last) for hook in names.MLP_HOOKS]
    table += [names.block(hook.name, case.last) for hook in names.RESIDUAL_HOOKS]
    table = [name for name in table if name in case.model.hook_dict]
    cut = data.draw(st.sampled_from([-1, 0, 3, [1, 4, 7], (2, 6), (None, -2), (1, 9, 3)]))
    with torch.no_grad():
        _, whole = case.model.run_with_cache(case.tokens, names_filter=table)
        _, part = case.model.run_with_cache(case.tokens, names_filter=table, pos_slice=cut)
    for name in table:
        full = whole[name]
        if isinstance(cut, int):
            expected = full[:, cut]
            assert torch.equal(part[name].reshape(expected.shape), expected), name
        else:
            positions = list(range(12))[slice(*cut)] if isinstance(cut, tuple) else cut
            assert torch.equal(part[name], full[:, positions]), name


def test_attention_patterns_are_cut_at_their_queries() -> None:
    case = wrapped("deepseek")
    name = "blocks.1.attn.hook_pattern"
    with torch.no_grad():
        _, whole = case.model.run_with_cache(case.tokens, names_filter=name)
        _, part = case.model.run_with_cache(case.tokens, names_filter=name, pos_slice=(2, 5))
    assert torch.equal(part[name], whole[name][:, :, 2:5])


@families
def test_stopping_before_a_layer_gives_the_stream_there(family: str) -> None:
    case = wrapped(family)
    with untouched(case.model), torch.no_grad():
        _, whole = case.model.run_with_cache(case.tokens, names_filter=lambda name: name in case.exact)
        for stop in (0, 1, 2, -1):
            stream, cache = case.model.run_with_cache(
                case.tokens, stop_at_layer=stop, names_filter=lambda name: name in case.exact
            )
            layer = stop % 3
            assert torch.equal(stream, whole[names.block(names.RESID_PRE, layer)])
            kept = [name for name in whole.keys() if name.startswith("blocks.") and int(name.split(".")[1]) < layer]  # noqa: SIM118
            assert {name for name in cache.keys() if name.startswith("blocks.")} == set(kept)  # noqa: SIM118
            assert all(torch.equal(cache[name], whole[name]) for name in kept)
            by_hooks = case.model.run_with_hooks(case.tokens, stop_at_layer=stop)
            assert torch.equal(by_hooks, stream)
        assert torch.equal(case.model(case.tokens), case.logits), "and the next run goes to the end"


@families
def test_what_nobody_asks_for_is_not_unembedded(family: str) -> None:
    case = wrapped(family)
    last = names.block(names.RESID_POST, 2)
    called: list[str] = []
    heads: Any = {"norm": case.model.ln_final.original_component, "head": case.model.unembed.original_component}
    plain = {name: module.forward for name, module in heads.items()}

    def counted(name: str) -> Any:
        return lambda *args, **kwargs: (called.append(name), plain[name](*args, **kwargs))[1]

    def read(value: torch.Tensor, hook: Any) -> None:
        case.model.unembed(case.model.ln_final(value))

    with untouched(case.model), torch.no_grad():
        _, whole = case.model.run_with_cache(case.tokens, names_filter=last)
        try:
            for name, module in heads.items():
                module.forward = counted(name)
            stream = case.model(case.tokens, stop_at_layer=3)
            assert torch.equal(stream, whole[last])
            by_hooks = case.model.run_with_hooks(
                case.tokens, stop_at_layer=3, fwd_hooks=[(last, lambda value, hook: value * 2)]
            )
            assert torch.equal(by_hooks, whole[last] * 2), "an edit of what the last block gives is in it"
            nothing, cache = case.model.run_with_cache(case.tokens, names_filter=last, return_type=None)
            assert nothing is None and torch.equal(cache[last], whole[last])
            assert called == []
            # A lens inside a hook function is no end of the pass.
            reached: list[str] = []
            lens: Any = [(names.block(names.RESID_POST, 0), read), (last, watch(reached, "last"))]
            assert case.model.run_with_hooks(case.tokens, fwd_hooks=lens, return_type=None) is None
            assert called == ["norm", "head"] and reached == ["last"]
            called.clear()
            # Who listens to the head gets it.
            seen: list[Any] = []
            hear: Any = [("unembed.hook_out", lambda value, hook: seen.append(value))]
            assert case.model.run_with_hooks(case.tokens, fwd_hooks=hear, return_type=None) is None
            assert called == ["norm", "head"] and seen[0].shape == case.logits.shape
        finally:
            for module in heads.values():
                del module.forward
        assert torch.equal(case.model(case.tokens), case.logits), "and the next run goes to the end"


@pytest.mark.typed
@pytest.mark.parametrize("way", ["run_with_hooks", "run_with_cache", "stop_at_layer", "generate", "hf_generate"])
def test_a_pass_within_a_pass_is_refused(way: str) -> None:
    """Its activations would go into the other's cache, and the layer at which one stops be forgotten."""
    model, ids = wrapped("deepseek").model, tokens(2, 8)
    came: list[str] = []

    def look_up(value: torch.Tensor, hook: Any) -> None:
        with pytest.raises(HookError, match="a hook function runs the model while a forward pass of it is running"):
            model(ids[:1])
        if "generate" in way:
            with pytest.raises(HookError, match="Run it before, .* or let it run a copy"):
                model.hf_generate(ids[:1], max_new_tokens=1)
        came.append(hook.name)

    def outcome() -> torch.Tensor:
        if "generate" in way:
            return getattr(model, way)(ids, max_new_tokens=2, do_sample=False)
        if way == "run_with_cache":
            return model.run_with_cache(ids)[1]["expert_indices", 2]
        return model.run_with_hooks(ids, stop_at_layer=2 if way == "stop_at_layer" else None)

    with untouched(model), torch.no_grad():
        expected = outcome()
        with model.hooks([("blocks.0.hook_resid_pre", look_up), ("blocks.1.mlp.hook_in", look_up)]):
            assert torch.equal(outcome(), expected), "the pass goes on"
        assert came[:2] == ["blocks.0.hook_in", "blocks.1.mlp.hook_in"]
        assert torch.equal(outcome(), expected)


@pytest.mark.parametrize("at", [names.MLP_IN, names.ROUTER_LOGITS, names.EXPERT_INDICES, names.EXPERT_OUT])
@pytest.mark.parametrize("family", ["deepseek", "gemma4_text"])
def test_a_hook_function_may_run_a_part_of_the_model(family: str, at: str) -> None:
    """The layer that runs it, too, for other tokens: it goes on with its own."""
    case = wrapped(family) if family in CONFIGS else None
    model = case.model if case else HookedMoE.from_hf(build(family), check=False)
    layer, ids, busy = model.moe_layers[-1], tokens(2, 8), []
    later = names.mlp(names.EXPERT_WEIGHTED, layer)

    def run_it(value: torch.Tensor, hook: Any) -> None:
        if not busy:
            busy.append(hook)
            model.blocks[layer](*inner, **words)

    with torch.no_grad():
        with Recording(model) as recorded:
            model(ids[:1, :5])
        (inner, words), stream = recorded.replay.arguments[layer], torch.randn(1, 5, model.cfg.d_model)
        inner = (stream, *inner)
        _, expected = model.run_with_cache(ids, names_filter=later)
        with model.hooks([(names.mlp(at, layer), run_it)]):
            logits, cache = model.run_with_cache(ids, names_filter=later)
    assert busy and torch.equal(logits, model(ids)) and torch.equal(cache[later], expected[later])


def test_stopping_behind_the_end_is_refused() -> None:
    case = wrapped("deepseek")
    for run in (case.model, case.model.run_with_hooks):
        with pytest.raises(InputError, match="there is no layer 4 to start or stop at; expected -3 to 3"):
            run(case.tokens, stop_at_layer=4)


@pytest.mark.typed
def test_batch_of_one_device_and_dtype() -> None:
    case = wrapped("deepseek")
    one = case.tokens[:1]
    wanted = ["blocks.1.hook_expert_out", "blocks.1.hook_expert_indices", "blocks.1.hook_resid_mid"]
    with torch.no_grad():
        _, whole = case.model.run_with_cache(one, names_filter=wanted)
        _, bare = case.model.run_with_cache(one, names_filter=wanted, remove_batch_dim=True)
        _, small = case.model.run_with_cache(one, names_filter=wanted, dtype=torch.bfloat16, device="cpu")
    for name in wanted:
        assert torch.equal(bare[name], whole[name][0])
    assert small["expert_indices", 1].dtype == torch.int64, "ids stay ids"
    assert torch.equal(small["expert_out", 1], whole["expert_out", 1].bfloat16())
    seen: list[torch.Size] = []
    with torch.no_grad():
        watching: list[Any] = [("blocks.1.hook_expert_out", lambda value, hook: seen.append(value.shape))]
        case.model.run_with_hooks(one, fwd_hooks=watching, remove_batch_dim=True)
    assert seen == [whole["expert_out", 1].shape[1:]]


def test_the_rows_of_an_expert_have_no_batch_axis_to_drop() -> None:
    case = wrapped("deepseek")
    one, seen = case.tokens[:1, :1], dict[str, torch.Size]()

    def keep(value: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = value.shape

    with torch.no_grad():
        expert = int(case.model.routing(one).layer(1).indices[0, 0, 0])
        row, out = f"blocks.1.mlp.experts.{expert}.hook_out", "blocks.1.mlp.hook_out"
        case.model.run_with_hooks(one, fwd_hooks=[(row, keep), (out, keep)], remove_batch_dim=True)
    d_model = case.model.cfg.d_model
    assert seen == {row: (1, d_model), out: (1, d_model)}, "one row, and one position of a batch of one"


def test_a_plain_dictionary_on_request() -> None:
    case = wrapped("deepseek")
    with torch.no_grad():
        _, kept = case.model.run_with_cache(
            case.tokens, names_filter="blocks.1.hook_routed_out", return_cache_object=False
        )
    assert type(kept) is dict
    assert list(kept) == ["blocks.1.hook_routed_out"]


# --- cleaning up ---


class Halt(Exception):
    """Raised by hooks below."""


@families
@settings(max_examples=5)
@given(data=st.data())
def test_hooks_are_gone_after_every_exit(family: str, data: st.DataObject) -> None:
    case = wrapped(family)
    name = data.draw(st.sampled_from(sorted(case.fire)))
    others = data.draw(st.lists(st.sampled_from(sorted(case.fire)), max_size=4))
    error = data.draw(st.sampled_from([Halt, KeyboardInterrupt, torch.cuda.OutOfMemoryError]))
    how = data.draw(st.sampled_from(["run_with_hooks", "hooks", "run_with_cache", "predicate"]))

    def halt(value: Any, hook: Any) -> None:
        raise error("now")

    hooks: list[Any] = [(other, lambda value, hook: None) for other in others] + [(name, halt)]
    with untouched(case.model), torch.no_grad():
        with pytest.raises(error):
            if how == "run_with_hooks":
                case.model.run_with_hooks(case.tokens, fwd_hooks=hooks)
            elif how == "predicate":
                case.model.run_with_hooks(case.tokens, fwd_hooks=[(lambda n: n == name, halt)])
            else:
                with case.model.hooks(hooks):
                    case.model.run_with_cache(case.tokens) if how == "run_with_cache" else case.model(case.tokens)
        assert torch.equal(case.model(case.tokens), case.logits)
        assert all(hooks._routing is None and hooks._slots is None for _, hooks in case.model._layer_hooks())


@pytest.mark.parametrize(("family", "served"), [("qwen3_moe", [2, 3]), ("deepseek_v2", [1]), ("deepseek_v3", [1])])
def test_heads_stand_behind_positions_in_queries_keys_and_values(family: str, served: list[int]) -> None:
    """Without queries, or without keys, a head attends evenly; without values, nothing of it is added.

    Args:
        family: With queries and keys of several widths, and with fewer heads of keys than of queries.
        served: Heads of queries that are served by head 1 of keys.
    """
    case = wrapped(family)
    pos = case.tokens.shape[1]

    def silencing(*heads: int) -> Any:
        return lambda value, hook: value.index_fill(2, torch.tensor(heads), 0)  # noqa: ARG005

    def patterns(hooks: Any) -> torch.Tensor:
        with case.model.hooks(hooks), torch.no_grad():
            _, cache = case.model.run_with_cache(case.tokens, names_filter="blocks.1.attn.hook_pattern")
        return cache["pattern", 1]

    plain, even = patterns([]), torch.ones(pos, pos).tril() / torch.arange(1, pos + 1)[:, None]
    for name, heads in (("hook_q", [1]), ("hook_k", served)):
        found = patterns([(f"blocks.1.attn.{name}", silencing(1))])
        others = [head for head in range(4) if head not in heads]
        assert torch.allclose(found[:, heads], even.expand_as(found[:, heads]), atol=1e-6), name
        assert torch.equal(found[:, others], plain[:, others])
    edits = [("blocks.1.attn.hook_v", silencing(1)), ("blocks.1.attn.hook_z", silencing(*served))]
    by_values, by_means = (case.model.run_with_hooks(case.tokens, fwd_hooks=[edit]) for edit in edits)
    assert torch.allclose(by_values, by_means, atol=1e-5)


@pytest.mark.typed
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3"])
def test_what_a_hook_does_to_one_head_is_done_to_its_columns(family: str) -> None:
    """Also where values, and so what the output projection reads, are wider than `cfg.d_head`."""
    case = wrapped(family)

    def silence(z: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        return z.index_fill(2, torch.tensor([1]), 0)

    def columns(_: Any, given: tuple[torch.Tensor]) -> torch.Tensor:
        return given[0].unflatten(-1, (case.model.cfg.n_heads, -1)).index_fill(2, torch.tensor([1]), 0).flatten(2)

    plain: Any = case.hf
    handle = plain.model.layers[1].self_attn.o_proj.register_forward_pre_hook(columns)
    try:
        with torch.no_grad():
            expected = plain(case.tokens).logits
            found = case.model.run_with_hooks(case.tokens, fwd_hooks=[("blocks.1.attn.hook_z", silence)])
    finally:
        handle.remove()
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, case.logits, atol=APART), "negative control: the head does something"


@pytest.mark.typed
def test_hooks_of_the_caller_stay_and_reset_hooks_takes_them() -> None:
    case = wrapped("deepseek")
    seen: list[str] = []
    with untouched(case.model), torch.no_grad():
        case.model.add_hook("blocks.1.hook_expert_out", watch(seen, "mine"))
        case.model.add_hook("blocks.2.mlp.experts.3.hook_out", watch(seen, "expert"))
        case.model.add_hook(lambda name: name == "blocks.2.hook_expert_out", watch(seen, "predicate"))
        with pytest.raises(HookError):
            case.model.run_with_hooks(case.tokens, fwd_hooks=[("nowhere", watch(seen, "never"))])
        case.model.run_with_cache(case.tokens, names_filter="blocks.1.hook_resid_mid")
        assert seen == ["mine", "expert", "predicate"]
        case.model.reset_hooks()
        assert listening(case.model) == []
        case.model.add_perma_hook("blocks.1.hook_expert_out", watch(seen, "permanent"))
        case.model.reset_hooks()
        case.model(case.tokens)
        assert seen[-1] == "permanent"
        case.model.reset_hooks(including_permanent=True)


def test_a_context_within_a_context() -> None:
    case = wrapped("deepseek")
    name = "blocks.2.hook_routing_weights"
    with untouched(case.model), torch.no_grad():
        both = case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, lambda value, hook: value * 6)])
        with case.model.hooks([(name, lambda value, hook: value * 2)]):
            once = case.model(case.tokens)
            with case.model.hooks([(name, lambda value, hook: value * 3)]):
                twice = case.model(case.tokens)
            assert torch.equal(case.model(case.tokens), once)
        assert torch.equal(case.model(case.tokens), case.logits)
    assert torch.allclose(twice, both, rtol=0, atol=1e-5)
    assert not torch.allclose(once, both, atol=1e-3)  # control: 100 times the tolerance above


def test_runs_of_different_sizes_follow_one_another() -> None:
    case = wrapped("deepseek")
    with torch.no_grad():
        for batch, pos in ((1, 1), (3, 7), (1, 20), (2, 12)):
            _, cache = case.model.run_with_cache(tokens(batch, pos), names_filter="blocks.1.hook_expert_out")
            assert cache["expert_out", 1].shape == (batch, pos, 3, 32)
