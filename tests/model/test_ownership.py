"""Whose a model is: threads, tasks, streams and copies; and what interrupts at bad moments leave in it."""

import asyncio
import copy
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.errors import HookError, InUseError, MoELensError
from moe_lens.model.hooks import block_replay, checked_point, hook_scope, interrupts, ownership
from tests.families import CONFIGS, build
from tests.wrapped import untouched, wrapped

STREAM: dict[str, Any] = {
    "max_new_tokens": 4, "max_tokens_per_yield": 1, "do_sample": False, "stop_at_eos": False, "verbose": False,
    "return_type": "tokens",
}  # fmt: skip


def elsewhere(call: Callable[[], Any]) -> Any:
    """What a call gives, or raises, in another thread."""
    got: list[Any] = []

    def work() -> None:
        try:
            got.append(call())
        except Exception as error:
            got.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert got, "it waits"
    return got[0]


def doubled(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return value * 2


# --- shapes ---


@pytest.mark.parametrize("family", CONFIGS)
def test_every_hook_refuses_what_is_not_like_its_value(family: str) -> None:
    case = wrapped(family)
    edits: list[Callable[[torch.Tensor], Any]] = [
        lambda value: value[..., :1] if value.shape[-1] > 1 else value[..., :0],
        lambda value: value[None],
        lambda value: (value,),
        lambda value: value.numpy(),
        lambda value: value > 0 if value.dtype != torch.bool else value.float(),
        lambda value: value.to("meta"),
    ]
    seen: dict[str, Any] = {}
    hooks = [(name, lambda value, hook, name=name: seen.update({name: value})) for name in sorted(case.fire)]
    with untouched(case.model), torch.no_grad():
        case.model.run_with_hooks(case.tokens, fwd_hooks=hooks)
        tensors = [name for name in case.fire if isinstance(seen.get(name), torch.Tensor)]
        for number, name in enumerate(sorted(tensors)):
            edit = edits[number % len(edits)]
            wrong = [(name, lambda value, hook, edit=edit: edit(value.detach().clone()))]
            with pytest.raises(HookError, match=r"a hook on .* returned"):
                case.model.run_with_hooks(case.tokens, fwd_hooks=wrong)
    assert len(tensors) > 3 * len(edits)


def test_a_value_keeps_its_shape_in_place_too() -> None:
    case = wrapped("mixtral")
    with untouched(case.model), torch.no_grad(), pytest.raises(HookError, match="changed .* in place to"):
        case.model.run_with_hooks(case.tokens, fwd_hooks=[("blocks.0.hook_attn_out", lambda v, hook: v.unsqueeze_(0))])


@pytest.mark.parametrize(
    ("name", "later"),
    [
        ("hook_embed", "blocks.0.hook_resid_pre"),
        ("blocks.1.hook_attn_out", "blocks.1.hook_attn_out"),
        ("blocks.1.mlp.hook_router_logits", "blocks.1.mlp.hook_router_logits"),
        ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"),
    ],
)
def test_what_a_hook_returns_is_not_what_later_ones_change_in_place(name: str, later: str) -> None:
    """As in patching: a tensor of a cache is returned, and a hook behind changes what it is given."""
    case = wrapped("mixtral")

    def zero(value: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        value[:, 3] = 0
        return value

    with torch.no_grad():
        _, source = case.model.run_with_cache(case.tokens.flip(0))
        before = source[name].clone()
        case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, lambda value, hook: source[name]), (later, zero)])  # noqa: ARG005
    assert torch.equal(source[name], before)


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_in", "blocks.1.mlp.hook_in"]
)
def test_a_parameter_that_a_hook_returns_becomes_none_of_the_models(name: str) -> None:
    case = wrapped("mixtral")
    value = torch.nn.Parameter(torch.ones(*case.tokens.shape, case.model.cfg.d_model))
    before = list(case.model.parameters())
    with untouched(case.model):
        case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, lambda given, hook: value)]).sum().backward()  # noqa: ARG005
    assert value.grad is not None and value.grad.any()
    assert [id(each) for each in case.model.parameters()] == [id(each) for each in before]
    case.model.zero_grad()
    with torch.no_grad():
        assert torch.equal(case.model(case.tokens), case.logits)


def test_a_tensor_of_another_layout_is_refused() -> None:
    case = wrapped("mixtral")
    with pytest.raises(HookError, match="returned a tensor of layout torch.sparse_coo; expected torch.strided"):
        case.model.run_with_hooks(case.tokens, fwd_hooks=[("hook_embed", lambda value, hook: value.to_sparse())])  # noqa: ARG005


def test_gradients_keep_their_shape() -> None:
    case = wrapped("mixtral")
    with untouched(case.model), case.model.hooks(bwd_hooks=[("blocks.1.hook_in", lambda grad, hook: grad[:, :1])]):
        loss = case.model(case.tokens, return_type="loss")
        with pytest.raises(HookError, match=r"a hook on blocks\.1\.hook_in returned shape"):
            loss.backward()
    case.model.zero_grad()


def test_a_wider_dtype_of_the_same_kind_is_rounded() -> None:
    case = wrapped("mixtral")
    with untouched(case.model), torch.no_grad():
        wide = case.model.run_with_hooks(case.tokens, fwd_hooks=[("hook_embed", lambda v, hook: v.double())])
    assert wide.dtype == case.logits.dtype and torch.equal(wide, case.logits)


# --- threads ---


def test_a_model_belongs_to_one_thread_from_its_first_context_to_its_last() -> None:
    case = wrapped("mixtral")
    model = case.model
    ablation = model.ablate({1: [0, 1, 2, 3]})
    calls: list[Callable[[], Any]] = [
        lambda: model(case.tokens),
        lambda: model.run_with_cache(case.tokens),
        lambda: model.generate(case.tokens, **{k: v for k, v in STREAM.items() if k != "max_tokens_per_yield"}),
        lambda: model.original_model(case.tokens),
        lambda: model.add_hook("hook_embed", doubled),
        lambda: model.hooks([("hook_embed", doubled)]).__enter__(),
        lambda: model.reset_hooks(),
    ]
    with untouched(model), torch.no_grad():
        with ablation:
            ablated = model(case.tokens)
            assert not torch.equal(ablated, case.logits)
            with ablation:
                pass
            for call in calls:
                assert isinstance(elsewhere(call), InUseError)
            assert torch.equal(model(case.tokens), ablated), "the refused calls have left nothing"
        assert torch.equal(elsewhere(lambda: model(case.tokens)), case.logits)
        assert model.current_tokens() is None


def test_hooks_that_outlive_contexts_are_shared() -> None:
    case = wrapped("mixtral")
    with torch.no_grad():
        case.model.add_perma_hook("hook_embed", doubled)
        try:
            here = case.model(case.tokens)
            assert torch.equal(elsewhere(lambda: case.model(case.tokens)), here)
            assert not torch.equal(here, case.logits)
        finally:
            case.model.reset_hooks(including_permanent=True)


def test_two_threads_at_once_get_right_results_or_an_error() -> None:
    case = wrapped("mixtral")
    inputs = [case.tokens[:1], case.tokens[1:, :5]]
    name = "blocks.1.mlp.hook_router_logits"
    with torch.no_grad():
        right = [case.model.run_with_cache(x, names_filter=name)[1][name] for x in inputs]
    wrong: list[int] = []
    done = [0, 0]

    def work(at: int) -> None:
        for _ in range(20):
            try:
                with torch.no_grad():
                    got = case.model.run_with_cache(inputs[at], names_filter=name)[1][name]
            except InUseError:
                continue
            done[at] += 1
            if not torch.equal(got, right[at]):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and sum(done)
    assert not case.model.list_hooks()


def test_a_paused_stream_owns_the_model_until_it_is_forgotten() -> None:
    case = wrapped("mixtral")
    with untouched(case.model), torch.no_grad():
        stream = case.model.generate_stream(case.tokens, **STREAM)
        assert isinstance(elsewhere(lambda: case.model(case.tokens)), torch.Tensor), "it has not begun"
        next(stream)
        assert isinstance(elsewhere(lambda: case.model(case.tokens)), InUseError)
        assert torch.equal(case.model(case.tokens), case.logits), "its own thread goes on"
        del stream
        assert torch.equal(elsewhere(lambda: case.model(case.tokens)), case.logits)


@pytest.mark.typed
def test_a_context_of_a_thread_that_has_ended_is_closed() -> None:
    case = wrapped("mixtral")
    context = case.model.hooks([("hook_embed", doubled)])
    with torch.no_grad():
        elsewhere(context.__enter__)
        assert torch.equal(case.model(case.tokens), case.logits)
        assert not case.model.list_hooks()


def test_tasks_of_one_event_loop_do_not_mix() -> None:
    case = wrapped("mixtral")
    ablation = case.model.ablate({1: [0, 1, 2, 3]})

    async def first() -> torch.Tensor:
        with ablation:
            await asyncio.sleep(0.05)
            return case.model(case.tokens)

    async def second() -> Any:
        await asyncio.sleep(0.01)
        try:
            return case.model(case.tokens)
        except InUseError as error:
            return error

    async def both() -> Any:
        return await asyncio.gather(first(), second())

    with torch.no_grad(), ablation:
        ablated = case.model(case.tokens)
    with torch.no_grad():
        here, there = asyncio.run(both())
    assert torch.equal(here, ablated) and "another asyncio task" in str(there)


def test_a_copy_made_inside_belongs_to_nobody() -> None:
    model = HookedMoE.from_hf(build("mixtral"), check=False)
    tokens = wrapped("mixtral").tokens
    seen: list[Any] = []
    model.add_perma_hook("hook_embed", lambda value, hook: seen.append(hook))
    copies: list[Any] = []
    with torch.no_grad():
        plain = model(tokens)
        hook = ("blocks.0.hook_in", lambda value, hook: copies.append(copy.deepcopy(model)))
        with model.ablate({1: [0, 1, 2, 3]}):
            model.run_with_hooks(tokens, fwd_hooks=[hook])
            assert copies[0].current_tokens() is None
            assert torch.equal(copies[0](tokens), plain)
            assert torch.equal(elsewhere(lambda: copies[0](tokens)), plain)
    assert seen[-1] is copies[0].hook_dict["hook_embed"], "a permanent hook sees the copy's own point"


# --- interrupts ---


class Struck(BaseException):
    pass


def strike(at: int, call: Callable[[], Any]) -> bool:
    """Raise at one line of the modules that put hooks in and take them out; whether there was such a line."""
    modules = {module.__file__ for module in (block_replay, checked_point, hook_scope, interrupts, ownership)}
    modules |= {sys.modules[name].__file__ for name in ("transformer_lens.hook_points", "contextlib")}
    lines = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in modules:
            return None
        lines += 1
        if lines == at:
            sys.settrace(None)
            raise Struck
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Struck:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("way", ["with", "run", "stack", "replay", "hand"])
def test_what_an_exception_at_any_line_leaves_is_gone_or_refused_at_the_next_entry(way: str) -> None:
    case = wrapped("mixtral")
    ablation = case.model.ablate({1: [0, 1, 2, 3]})
    last = case.model.hooks([("hook_embed", doubled)])
    mlp = case.model.blocks[1].mlp
    own = len(mlp._forward_pre_hooks) + len(mlp._forward_hooks)

    def call() -> None:
        if way == "with":
            with ablation, last:
                pass
        elif way == "stack":
            with ExitStack() as stack:
                stack.enter_context(ablation)
                stack.enter_context(last)
        elif way == "hand":
            last.__enter__()
            last.__exit__(None, None, None)
        elif way == "replay":
            with block_replay.Recording(case.model), block_replay._Only(case.model, mlp, torch.zeros(2, 7).bool()):
                pass
        else:
            case.model.run_with_hooks(case.tokens[:1, :2], fwd_hooks=[("hook_embed", doubled)], stop_at_layer=0)

    struck = still_open = 0
    with torch.no_grad():
        while strike(struck + 1, call):
            struck += 1
            try:
                equal = torch.equal(case.model(case.tokens), case.logits)
            except MoELensError:
                case.model.reset_hooks()
                case.model(case.tokens)
                continue
            assert equal or way == "hand", f"line {struck}"
            if not equal:
                last.__exit__(None, None, None)
                still_open += 1
                assert torch.equal(case.model(case.tokens), case.logits)
    assert struck > 40
    # As if it had struck behind `__enter__`, or before `__exit__` (its call and first line): nobody can tell.
    assert still_open == (3 if way == "hand" else 0)
    assert not case.model.list_hooks() and not case.model.owner.claimed
    assert len(mlp._forward_pre_hooks) + len(mlp._forward_hooks) == own


def test_an_exit_that_was_looked_up_by_hand_and_never_ran_is_refused() -> None:
    case = wrapped("mixtral")
    context = case.model.hooks([("hook_embed", doubled)])
    with torch.no_grad(), untouched(case.model):
        for close in (lambda: context.__exit__(None, None, None), case.model.reset_hooks):
            context.__enter__()
            with context:
                pass  # looked up for a `with`, which is another thing
            leave = context.__exit__
            assert not torch.equal(case.model(case.tokens), case.logits), "somebody holds it and may call it"
            del leave
            with pytest.raises(InUseError, match="call its __exit__ again, or model.reset_hooks()"):
                case.model(case.tokens)
            close()
            assert torch.equal(case.model(case.tokens), case.logits)


@pytest.fixture
def sigint() -> Iterator[None]:
    """Python's own handler: a process that tests run in may ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(times: int, enough: int = 10**9) -> tuple[int, int]:
    """SIGINTs at random times: how many came, and how often hooks were left, until that was often enough."""
    case = wrapped("mixtral")
    ablation = case.model.ablate({1: [0, 1, 2, 3]})

    def call() -> None:
        with ablation, case.model.hooks([("hook_embed", doubled)]):
            pass

    start = time.perf_counter()
    for _ in range(20):
        call()
    span = (time.perf_counter() - start) / 20
    draw, go = random.Random(0), threading.Semaphore(0)

    def send() -> None:
        while go.acquire() and going:
            time.sleep(draw.random() * 1.5 * span)
            os.kill(os.getpid(), signal.SIGINT)

    going = True
    sender = threading.Thread(target=send)
    sender.start()
    came = left = 0
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # or the signal waits for the end of the call
    gc.collect()
    gc.disable()  # an interrupt in a callback of the collector, such as hypothesis has, is swallowed by Python
    try:
        for _ in range(times):
            try:
                go.release()
                for _ in range(100_000):  # until it comes: the sender may take longer to wake than a call takes
                    call()
            except KeyboardInterrupt:
                came += 1
            left += bool(case.model.list_hooks()) or case.model.owner.claimed
            if left == enough:
                break
    finally:
        gc.enable()
        sys.setswitchinterval(switch)
        going = False
        go.release()
        sender.join()
    return came, left


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is sent otherwise")
def test_real_interrupts_leave_no_hook(sigint: None) -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert interrupted(300) == (300, 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is sent otherwise")
def test_the_guard_is_what_keeps_interrupts_away(sigint: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_must_wait", lambda frame: False)
    came, left = interrupted(5000, enough=1)
    assert left == 1, f"none in {came}"
    wrapped("mixtral").model.reset_hooks()
