"""A sweep's values are those of one full forward pass per variant, whatever the family, padding and stacking."""

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE, names
from moe_lens.errors import InputError
from moe_lens.interventions.attribution import expert_attribution
from moe_lens.interventions.metrics import KLDivergence, LogitDifference, Loss
from moe_lens.interventions.patching import patch
from moe_lens.interventions.sweep import CleanRun, Variant, sweep, token_sweep
from moe_lens.stats import observe
from tests.families import CONFIGS, build, tokens
from tests.matrix.configs import build as matrix_build
from tests.matrix.configs import tokens as matrix_tokens
from tests.wrapped import deviation, listening, untouched, wrapped

families = pytest.mark.parametrize("family", CONFIGS)

F64 = 1e-14  # relative to the largest logit: the same products in other batches

PADDED = {
    "none": None,
    "left": torch.tensor([[0] * 3 + [1] * 9, [1] * 12]),
    "right": torch.tensor([[1] * 12, [1] * 8 + [0] * 4]),
}


def naive(model: Any, run: CleanRun, hooks: list[Any], metric: Any, routing: str, first: int, **kwargs: Any) -> float:
    """The metric of one full forward pass with hooks."""
    frozen = []
    if routing == "frozen":
        for layer in model.moe_layers:
            if layer >= first:
                clean = run.indices(layer)
                frozen.append((names.mlp(names.EXPERT_INDICES, layer), lambda value, hook, clean=clean: clean))
    with torch.no_grad():
        logits = model.run_with_hooks(run.cache.tokens, fwd_hooks=frozen + hooks, **kwargs)
    return metric(logits).item()


def bent(at: Tensor) -> Callable[..., Tensor]:
    """A hook that changes an activation where `at` [batch, pos] is true, and not along itself: norms ignore scale."""

    def bend(value: Tensor, hook: Any) -> Tensor:
        where = at.view(*at.shape, *[1] * (value.ndim - 2))
        along = torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype)
        return torch.where(where, value * (1 + along) + 0.2 * along, value)

    return bend


def edits(model: Any) -> list[tuple[int, str]]:
    """(layer, hook) of edits in every layer, through every kind of hook."""
    found = []
    for layer in range(model.cfg.n_layers):
        found += [(layer, names.block(hook.name, layer)) for hook in names.RESIDUAL_HOOKS]
        if layer in model.moe_layers:
            some = (names.ROUTER_LOGITS, names.ROUTING_WEIGHTS, names.EXPERT_OUT, names.ROUTED_OUT, names.MLP_IN)
            found += [(layer, names.mlp(name, layer)) for name in some]
    return found


@families
@pytest.mark.parametrize(("padding", "routing"), [("none", "frozen"), ("left", "free"), ("right", "frozen")])
def test_a_variant_is_a_full_forward_pass_with_its_hooks(family: str, padding: str, routing: Any):
    case = wrapped(family, torch.float64)
    mask = PADDED[padding]
    kwargs = {} if mask is None else {"attention_mask": mask}
    run = CleanRun.of(case.model, case.tokens, **kwargs)
    at = torch.zeros(2, 12, dtype=torch.bool)
    at[0, 7] = at[1, 4:6] = True
    reads = at.clone()
    reads[0, 11] = True
    metric = LogitDifference(5, 6, reads)
    variants, expected = [], []
    for layer, name in edits(case.model):
        hooks = [(name, bent(at))]
        variants.append(Variant(layer, hooks=hooks, changed=at))
        expected.append(naive(case.model, run, hooks, metric, routing, layer, **kwargs))
    with untouched(case.model):
        found = sweep(case.model, run, variants, metric, routing=routing, batch_size=7)
    clean, scale = metric(run.logits).item(), run.logits.abs().max().item()
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() <= F64 * scale
    assert all(abs(value - clean) > 1e-6 for value in expected), "every edit counts"
    if mask is None:
        assert deviation(run.logits, case.logits) <= F64 * scale


def removals(run: CleanRun, layer: int, n_experts: int) -> list[Variant]:
    """Each expert's contribution taken out of what its layer gives."""
    parts, indices = run.cache["expert_weighted", layer], run.indices(layer)
    made = []
    for expert in range(n_experts):
        mask = indices == expert

        def delta(items: Tensor, mask: Tensor = mask) -> Tensor:
            return -(parts[items] * mask[items][..., None]).sum(2)

        made.append(run.adding(layer, names.EXPERT_WEIGHTED, delta, mask.any(-1)))
    return made


@pytest.mark.parametrize("family", ["deepseek", "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("kind", ["loss", "kl", "own"])
def test_metrics_of_every_kind_and_stackings_of_every_size(family: str, kind: str):
    """Contributions taken out behind their block are hooks on single experts in a full pass; so for every metric."""
    case = wrapped(family, torch.float64)
    layer = case.model.moe_layers[0]
    run = CleanRun.of(case.model, case.tokens, keep=[names.mlp(names.EXPERT_WEIGHTED, layer)])
    metric: Any = {
        "loss": Loss(case.tokens),
        "kl": KLDivergence(run.logits),
        "own": lambda logits: logits[0, 3:].square().mean() + logits[1, -1, 7],
    }[kind]
    expected = []
    for expert in range(8):
        hook = names.expert("hook_out", layer, expert), lambda value, hook: torch.zeros_like(value)
        expected.append(naive(case.model, run, [hook], metric, "free", layer))
    for batch_size in (None, 1, 3, 100):
        found = sweep(case.model, run, removals(run, layer, 8), metric, batch_size=batch_size)
        # gpt-oss and Qwen round to float32 in their norms
        bound = (1e-13 if family == "deepseek" else 1e-6) * run.logits.square().max()
        assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() <= bound
    assert len(set(expected)) > 4


@pytest.mark.typed
def test_single_experts_hooks_see_their_own_variant():
    case = wrapped("deepseek", torch.float64)
    run = CleanRun.of(case.model, case.tokens)
    metric = LogitDifference(5, 6)

    def muted(pos: int) -> Callable[..., Tensor]:
        def mute(rows: Tensor, hook: Any) -> Tensor:
            assert set(hook.ctx["batch"].tolist()) <= {0, 1}
            return torch.where((hook.ctx["pos"] == pos)[:, None] & (hook.ctx["batch"] == 1)[:, None], 0.0, rows)

        return mute

    cells = [(expert, pos) for expert in (0, 3, 5) for pos in range(12)]
    hooks = [[(names.expert("hook_out", 1, expert), muted(pos))] for expert, pos in cells]
    found = sweep(case.model, run, [Variant(1, hooks=own) for own in hooks], metric)
    expected = [naive(case.model, run, own, metric, "free", 1) for own in hooks]
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() <= F64 * run.logits.abs().max()
    assert len(set(expected)) > 4


def test_only_what_can_change_is_run():
    """Blocks before the first, items without a change and positions before it are not run."""
    case = wrapped("deepseek", torch.float64)
    run = CleanRun.of(case.model, case.tokens)
    changed = torch.zeros(2, 12, dtype=torch.bool)
    changed[1, 8] = True
    seen: dict[str, list[tuple[int, ...]]] = {}
    handles = []
    watched: dict[str, Any] = {"unembed": case.model.unembed}
    for layer, block in enumerate(case.model.blocks):
        watched |= {f"block {layer}": block, f"mlp {layer}": block.mlp.original_component}
    for name, module in watched.items():

        def note(module: Any, args: Any, name: str = name) -> None:
            seen.setdefault(name, []).append(tuple(args[0].shape))

        handles.append(module.register_forward_pre_hook(note))
    try:
        resid = Variant(1, resid=lambda items: run.stream(1, items) + 1, changed=changed)
        last = Variant(3, resid=lambda items: run.stream(3, items) + 1, changed=changed)
        values = sweep(case.model, run, [resid, last], LogitDifference(5, 6, torch.tensor([11, 11])))
    finally:
        for handle in handles:
            handle.remove()
    one_of_two = [(1, 12, 32)]
    assert seen == {
        "block 1": one_of_two, "mlp 1": [(1, 4, 32)], "block 2": one_of_two, "mlp 2": [(1, 1, 32)],
        "unembed": [(1, 1, 32)],
    }  # fmt: skip
    assert values[1] == LogitDifference(5, 6)(run.logits), "position 8 of the last stream is not read"


def test_a_short_memory_makes_smaller_batches():
    case = wrapped("deepseek", torch.float64)
    run = CleanRun.of(case.model, case.tokens, keep=[names.mlp(names.EXPERT_WEIGHTED, 1)])
    variants, metric = removals(run, 1, 8), LogitDifference(5, 6)
    expected = sweep(case.model, run, variants, metric)
    sizes = []

    def scarce(module: Any, args: Any) -> None:
        sizes.append(len(args[0]))
        if len(args[0]) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate too much")

    handle = case.model.blocks[2].register_forward_pre_hook(scarce)
    try:
        with untouched(case.model):
            found = sweep(case.model, run, variants, metric, batch_size=12)
    finally:
        handle.remove()
    assert max(sizes) > 4 >= min(sizes)
    assert (found - expected).abs().max() <= F64 * run.logits.abs().max()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_leaves_nothing_behind(error: type[BaseException]):
    case = wrapped("deepseek", torch.float64)

    def stop(value: Tensor, hook: Any) -> Tensor:
        raise error

    run = CleanRun.of(case.model, case.tokens)
    variants = [Variant(1, hooks=[(names.mlp(names.EXPERT_OUT, layer), stop)]) for layer in (1, 2)]
    with pytest.raises(error):
        sweep(case.model, run, variants, LogitDifference(5, 6), routing="frozen")
    with pytest.raises(error):
        CleanRun.of(case.model, case.tokens, fwd_hooks=[("hook_embed", stop)])
    assert listening(case.model) == []
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in case.model.blocks)
    with torch.no_grad():
        assert deviation(case.model(case.tokens), case.logits) <= F64 * case.logits.abs().max()


def test_interventions_around_a_sweep_are_in_force_inside():
    case = wrapped("deepseek", torch.float64)
    metric = LogitDifference(5, 6)
    half = [(names.mlp(names.ROUTED_OUT, 2), lambda value, hook: value / 2)]
    with case.model.hooks(fwd_hooks=half):
        run = CleanRun.of(case.model, case.tokens)
        variants = [Variant(layer, hooks=[(names.block(names.ATTN_OUT, layer), bent(run.mask))]) for layer in (0, 1)]
        found = sweep(case.model, run, variants, metric)
    for layer, value in enumerate(found):
        own = [(names.block(names.ATTN_OUT, layer), bent(run.mask))]
        expected = naive(case.model, run, half + own, metric, "free", layer)
        assert abs(value.item() - expected) <= F64 * run.logits.abs().max()


def test_values_position_by_position():
    case = wrapped("deepseek", torch.float64)
    run = CleanRun.of(case.model, case.tokens)
    changed = torch.zeros(2, 12, dtype=torch.bool)
    changed[1, 8] = True
    variant = Variant(3, resid=lambda items: run.stream(3, items) * 0 + 1, changed=changed)
    metric = Loss(case.tokens)
    found, whole = token_sweep(case.model, run, [variant], metric)[0], sweep(case.model, run, [variant], metric)[0]
    assert found.shape == (22,)
    assert found.mean() == whole
    batch, pos = metric.reads(2, 12).nonzero().unbind(-1)
    clean = metric.values(run.logits[batch, pos], batch, pos)
    assert ((found != clean).nonzero()[:, 0]).tolist() == [11 + 8]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("variant", "metric", "message"),
    [
        ({"layer": 4}, None, "variant 0 starts at layer 4; expected 0 to 3"),
        ({"layer": -1}, None, "layer is -1; expected a whole number from 0"),
        ({"layer": 1, "hooks": [("blocks.0.hook_mlp_out", None)]}, None, "has a hook on blocks.0.hook_mlp_out, which"),
        ({"layer": 1, "hooks": [("ln_final.hook_normalized", None)]}, None, "expected hooks of blocks.1 to blocks.2"),
        (
            {"layer": 1, "changed": torch.ones(2, 3, dtype=torch.bool)},
            None,
            r"changes of shape \(2, 3\); expected \(2, 12\)",
        ),
        ({"layer": 1}, lambda logits: logits.sum(0), "gave torch.float64 of shape"),
        ({"layer": 1}, lambda logits: 3.0, "gave float; expected a floating-point scalar tensor"),
        ({"layer": 3, "resid": lambda items: torch.full((2, 12, 32), torch.nan)}, None, "is nan in variant 0 at"),
    ],
)
def test_bad_input_is_named(variant: dict[str, Any], metric: Any, message: str):
    case = wrapped("deepseek", torch.float64)
    run = CleanRun.of(case.model, case.tokens)
    with untouched(case.model), pytest.raises(InputError, match=message):
        sweep(case.model, run, [Variant(**variant)], metric or LogitDifference(5, 6))


def test_layers_whose_router_stands_beside_the_experts_are_swept_too() -> None:
    """Gemma 4: experts are given flat tokens, of which none can be left out by position."""
    model = HookedMoE.from_hf(matrix_build("gemma4_text").double(), check=False)
    text, other = matrix_tokens(pos=8), matrix_tokens(pos=8, seed=5)
    metric = LogitDifference(3, 5)
    run = CleanRun.of(model, text)
    with torch.no_grad():
        donor = model.run_with_cache(other, names_filter="blocks.1.hook_resid_pre")[1]["blocks.1.hook_resid_pre"]
    where = torch.zeros(text.shape, dtype=torch.bool)
    where[:, 4] = True
    mixed = torch.where(where[..., None], donor, run.stream(1, torch.arange(len(text))))
    variant = Variant(1, lambda items: mixed[items], changed=where)
    for routing in ("free", "frozen"):
        hooks = [("blocks.1.hook_resid_pre", lambda value, hook: mixed)]
        expected = naive(model, run, hooks, metric, routing, 1)
        assert abs(float(sweep(model, run, [variant], metric, routing=routing)[0]) - expected) <= 1e-12
        assert abs(expected - float(metric(run.logits))) > 1e-6, "negative control: something changed"


@pytest.mark.typed
@pytest.mark.parametrize("noise", ["attention_dropout", "router_jitter_noise"])
def test_runs_that_differ_by_chance_are_not_compared(noise: str) -> None:
    """In training, dropout and jitter would be measured as effects; training without them is as good as evaluation."""
    ids = tokens(2, 6)
    metric = Loss(ids)
    batch: Any = SimpleNamespace(tokens=ids, mask=ids > 0, counted=ids > 0, sources=("a", "b"))
    for amount in (0.3, 0.0):
        changes: dict[str, Any] = {noise: amount}
        model = HookedMoE.from_hf(build("mixtral", **changes))
        expected = expert_attribution(model, ids, metric, method="knockout").values
        model.train()
        for run in (
            lambda model: expert_attribution(model, ids, metric, method="knockout").values,
            lambda model: expert_attribution(model, ids, metric, method="gradient").values,
            lambda model: patch(model, ids, ids.flip(0), "resid_pre", metric).values,
            lambda model: observe(model, batch).routing.weights,
        ):
            if not amount:
                assert run(model).isfinite().all()
                continue
            with pytest.raises(
                InputError, match=r"the model is in training, where dropout or jitter .* model.eval\(\)"
            ):
                run(model)
        if not amount:
            assert torch.equal(expert_attribution(model, ids, metric, method="knockout").values, expected)


def test_a_run_that_is_not_whole_is_refused() -> None:
    case = wrapped("olmoe")
    model, ids = case.model, case.tokens
    words: dict[str, Any] = {"pos_slice": -1, "stop_at_layer": 1, "names_filter": [], "remove_batch_dim": True}

    def attributed(model: HookedMoE, ids: Tensor, **how: Any) -> Any:
        return expert_attribution(model, ids, Loss(ids), **how)

    runs: tuple[Any, ...] = (CleanRun.of, attributed)
    for word, value in words.items():
        for run in runs:
            with pytest.raises(InputError, match=f"got {word}; the whole input runs through the whole model"):
                run(model, ids, **{word: value})
    places = torch.arange(ids.shape[1]).expand_as(ids)
    moved = CleanRun.of(model, ids, position_ids=places + 3)
    assert deviation(moved.logits, model(ids, position_ids=places + 3)) == 0
    with pytest.raises(InputError, match="position_ids jump: without a cache"):
        CleanRun.of(model, ids, position_ids=places % 5)


@pytest.mark.typed
def test_a_user_s_hook_may_look_at_several_items(monkeypatch):
    """It sees the batch that it would see in a pass of its own, though a variant changes one item of it."""
    case = wrapped("deepseek", torch.float64)
    model, layer = case.model, case.model.moe_layers[0]
    centre = [(names.block(names.ATTN_OUT, layer + 1), lambda value, hook: value - value.mean(0, keepdim=True))]
    metric = LogitDifference(5, 6)
    at = torch.zeros(2, 12, dtype=torch.bool)
    at[1, 3:] = True
    expert, mlp_out = names.expert("hook_out", layer, 1), names.mlp(names.MLP_OUT, layer)

    def of_item(rows: Tensor, hook: Any, item: int) -> Tensor:
        return torch.where((hook.ctx["batch"] == item)[:, None], 3 * rows, rows)

    with model.hooks(centre):
        run = CleanRun.of(model, case.tokens, keep=[mlp_out])
        hooks = [(mlp_out, bent(at)), (expert, partial(of_item, item=1)), (mlp_out, bent(at))]
        expected = [naive(model, run, [hook], metric, "free", layer) for hook in hooks]

        def behind(items: Tensor) -> Tensor:
            after = run.resid[layer + 1][items]
            mid = after - run.cache[mlp_out][items]
            return mid + bent(at[items])(run.cache[mlp_out][items], None)

        variants = [
            Variant(layer, hooks=[(mlp_out, bent(at[1:]))], changed=at),
            Variant(layer, hooks=[(expert, partial(of_item, item=0))], changed=at),  # of the one that it changes
            Variant(layer + 1, behind, changed=at),
        ]
        found = sweep(model, run, variants, metric)
        monkeypatch.setattr(sys.modules[sweep.__module__], "hooked_by_hand", lambda model: False)
        stacked = sweep(model, run, variants, metric)
    assert found.tolist() == pytest.approx(expected, rel=F64)
    assert ((stacked - found).abs() > 1e-3).all()  # the control: stacked, the hook sees other items


@pytest.mark.parametrize("family", ["inkling_text", "gemma4_text"])
def test_what_follows_an_mlp_may_read_earlier_tokens(family: str):
    """A convolution does in Inkling; a norm does not in Gemma 4."""
    model = HookedMoE.from_hf(matrix_build(family, dtype=torch.float64))
    ids, layer = matrix_tokens(1, 12), model.moe_layers[0]
    at = torch.zeros(1, 12, dtype=torch.bool)
    at[0, 8:] = True
    run, metric = CleanRun.of(model, ids), LogitDifference(5, 6)
    unchanged = Variant(0, hooks=[(names.block(names.RESID_PRE, 0), lambda value, hook: value)], changed=at)
    hook = names.block(names.RESID_MID, layer), bent(at)
    found = sweep(model, run, [unchanged, Variant(layer, hooks=[hook], changed=at)], metric)
    expected = [metric(run.logits).item(), naive(model, run, [hook], metric, "free", layer)]
    assert found.tolist() == pytest.approx(expected, rel=F64)
    assert abs(expected[0] - expected[1]) > 0.1  # the control: the change is one
