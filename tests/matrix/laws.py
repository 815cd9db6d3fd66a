"""What must hold for every family, each law a function of one wrapped tiny model that raises AssertionError."""

import re
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_lens import names
from moe_lens.errors import HookError, InputError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.families.table import FAMILIES, Family
from moe_lens.model.loading.streamed_weights import streamed_weights
from moe_lens.routing import affinity
from tests.matrix.configs import build, tokens
from tests.wrapped import GATED, deviation

FP32 = 2e-5
"""Relative to the largest value: what float32 sums in another order differ by, through four layers."""
SCALE = 1.5


def compute_experts(hf: Any, how: str) -> None:
    """Have transformers compute experts in one of its ways; a wrapper may leave the choice to its text part."""
    parts = (part for part in hf.modules() if isinstance(part, PreTrainedModel))
    next(part for part in parts if part._can_set_experts_implementation()).set_experts_implementation(how)


@contextmanager
def two_threads() -> Generator[None]:
    """Products are divided among two threads, in which the order of rows may decide the last bits."""
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(1)


@dataclass(eq=False)
class Case:
    """One model type: logits of plain transformers, taken before wrapping, and the wrapped model."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the config that differ from the matrix's own."""

    def __post_init__(self) -> None:
        self.tokens: Tensor = tokens()
        self.longer: Tensor = tokens(pos=47, seed=3)
        self.hf: Any = build(self.model_type, **self.changes)
        self.hf.requires_grad_(True)
        packed = FAMILIES[self.model_type].experts == "packed"  # others know no implementation but their own
        with torch.no_grad():
            if packed:
                compute_experts(self.hf, "eager")
            self.eager = self.hf(self.tokens).logits
            if packed:
                compute_experts(self.hf, "grouped_mm")
            self.logits = self.hf(self.tokens).logits
            with two_threads():
                self.longer_logits = self.hf(self.longer).logits
        self.gradients = self.backward(self.hf)
        self.hf.generation_config.eos_token_id = None
        self.generated = self.hf.generate(self.tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
        self.model = HookedMoE.from_hf(self.hf, check=False)
        self.layer = self.model.moe_layers[-2]

    def backward(self, hf: Any) -> dict[str, Tensor]:
        """Gradients of a loss, by parameter."""
        hf.zero_grad()
        logits = hf(self.tokens).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten()).backward()
        found = {
            name.replace("_original_component.", ""): parameter.grad.clone()
            for name, parameter in hf.named_parameters()
            if parameter.grad is not None
        }
        hf.zero_grad()
        return found

    @property
    def family(self) -> Family:
        return self.model.family

    @cached_property
    def every(self) -> list[str]:
        """Every hook but TransformerLens's optional ones and the inside of attention that it reconstructs."""
        names_ = [name for name in self.model.hook_dict if not name.endswith(GATED)]
        own = self.family.layout is not None
        return [name for name in names_ if own or ".attn." not in name]

    def edited(self, name: str, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits with one hook edited."""
        return self.run([(name, lambda value, hook: change(value))])

    def run(self, hooks: Any) -> Tensor:
        with torch.no_grad():
            return self.model.run_with_hooks(self.tokens, fwd_hooks=hooks)

    @cached_property
    def cache(self) -> Any:
        with torch.no_grad():
            logits, cache = self.model.run_with_cache(self.tokens, names_filter=self.every)
        assert torch.equal(logits, self.logits), "observing changed the logits"
        return cache

    def at(self, name: str, layer: int | None = None) -> Tensor:
        return self.cache[names.mlp(name, self.layer if layer is None else layer)]


def close(ours: Tensor, theirs: Tensor, bound: float = FP32, what: str = "") -> None:
    assert deviation(ours, theirs) <= bound * theirs.abs().max().item(), f"{what} {deviation(ours, theirs):.1e}"


# --- the laws ---


def parity(case: Case) -> None:
    """Logits equal those of transformers' grouped_mm before wrapping, bit for bit, with one thread and with two; and
    those of its eager experts up to rounding.
    """
    with torch.no_grad():
        assert torch.equal(case.model(case.tokens), case.logits)
        with two_threads():
            assert torch.equal(case.model(case.longer), case.longer_logits), "two threads"
        last = case.model(case.tokens, logits_to_keep=1)  # statistics of routing leave out the others
    close(last, case.logits[:, -1:])
    close(case.logits, case.eager)


def observing(case: Case) -> None:
    """Reading all hooks at once, except those inside attention, changes no bit, and every hook fires."""
    fired = set(case.cache.keys())
    assert fired == set(case.every), sorted(set(case.every) - fired)[:5]


def parts(case: Case) -> None:
    """The parts sum to the whole."""
    model, family = case.model, case.family
    for layer in range(model.cfg.n_layers):
        at = {
            name: case.cache[full]
            for name in (names.RESID_PRE, names.ATTN_OUT, names.RESID_MID, names.BLOCK_MLP_OUT, names.RESID_POST)
            if (full := names.block(name, layer)) in case.cache
        }
        stream = family.layout.stream if family.layout else "sequential"
        if stream == "sequential" and layer in model.moe_layers:
            assert torch.equal(at[names.RESID_MID] + at[names.BLOCK_MLP_OUT], at[names.RESID_POST]) or close(
                at[names.RESID_MID] + at[names.BLOCK_MLP_OUT], at[names.RESID_POST]
            )
            close(at[names.RESID_PRE] + at.get(names.ATTN_OUT, 0), at[names.RESID_MID])
        if stream == "rescaled":
            close(at[names.RESID_PRE] + at[names.ATTN_OUT], at[names.RESID_MID])
            assert names.BLOCK_MLP_OUT not in at
        if stream == "parallel":
            close(at[names.RESID_PRE] + at[names.ATTN_OUT] + at[names.BLOCK_MLP_OUT], at[names.RESID_POST])
        if family.layout and stream == "shortcut":
            added = [case.cache[names.block(f"{part}.hook_out", layer)] for part in ("attn", *family.layout.added)]
            close(sum(added, at[names.RESID_PRE]) + case.at(names.MLP_OUT, layer), at[names.RESID_POST])
        if stream in ("shortcut", "other"):
            assert not {names.ATTN_OUT, names.RESID_MID, names.BLOCK_MLP_OUT} & at.keys()
    for layer in model.moe_layers:
        weights, out = case.at(names.ROUTING_WEIGHTS, layer), case.at(names.EXPERT_OUT, layer)
        weighted, routed = case.at(names.EXPERT_WEIGHTED, layer), case.at(names.ROUTED_OUT, layer)
        close(out if family.weighs_input else out * weights[..., None], weighted)
        close(weighted.sum(2), routed)
        with torch.no_grad():
            whole = model.to_model_width(layer, routed)
        whole = whole + case.at(names.SHARED_OUT, layer) if model.has_shared(layer) else whole
        close(whole, case.at(names.MLP_OUT, layer))
        chosen = case.at(names.EXPERT_INDICES, layer)
        assert all(len(set(row.tolist())) == model.top_k for row in chosen.flatten(0, 1))
        assert (weights[..., :-1] >= weights[..., 1:]).all()
        x, expert = case.at(names.MLP_IN, layer), chosen[..., 0]
        if family.logits_factor is None and not family.reads_own and family.model_type != "gpt_oss":  # which has a bias
            rows = torch.einsum("bpd,ed->bpe", x, model.W_router[layer].float())
            close(rows, case.at(names.ROUTER_LOGITS, layer))
        with torch.no_grad():
            for narrower in family.narrows:
                x = model._moe(layer).get_submodule(narrower)(x)
        if family.model_type != "gpt_oss":
            first = model.W_gate[layer] if model._experts(layer).has_gate else model.W_in[layer]
            given = x * weights[..., 0, None] if family.weighs_input else x
            identical = expert >= len(first)
            assert len(first) == model.n_experts - model.n_identity_experts
            assert bool(identical.any()) == bool(model.n_identity_experts)
            assert torch.equal(out[:, :, 0][identical], given[identical]), "an identity gives what it reads"
            expert, given = expert[~identical], given[~identical]
            pre, post = (case.at(name, layer)[:, :, 0] for name in (names.EXPERT_PRE, names.EXPERT_POST))
            assert not pre[identical].any() and not post[identical].any(), "an identity has no neurons"
            close(torch.einsum("nd,ndm->nm", given, first[expert]), pre[~identical])
            given = torch.einsum("nm,nmd->nd", post[~identical], model.W_out[layer][expert])
            with torch.no_grad():
                close(model._experts(layer).finish(given), out[:, :, 0][~identical])
    if not family.adds_as_computed:
        for whole in (lambda: case.cache.partial_sum(case.layer, ranks=[0]), case.cache.decompose_experts):
            with pytest.raises(HookError, match="no term of a sum"):
                whole()
    else:
        last = case.cache[names.block(names.RESID_POST, model.cfg.n_layers - 1)]
        stack, _ = case.cache.decompose_experts()
        close(stack.sum(0), last)
        if not has_bias(model):
            with torch.no_grad():  # before a family bounds them
                logits = model.unembed(model.ln_final(last)) * getattr(model.adapter, "logits_factor", 1.0)
            token = int(case.tokens[0, 0])
            close(case.cache.logit_attrs(stack, token).sum(0), logits[..., token], 1e-4)
    if not (family.layout and family.layout.streams):
        last = case.cache[names.block(names.RESID_POST, model.cfg.n_layers - 1)]
        with torch.no_grad():
            read = model.adapter.apply_output_logits_transform(model.unembed(model.ln_final(last)))
        close(read, case.logits)


def has_bias(model: HookedMoE) -> bool:
    """Whether the final norm or the unembedding adds a constant, which is no component's."""
    parts: Any = model.ln_final.original_component, model.unembed.original_component
    return any(getattr(part, "bias", None) is not None for part in parts)


def rule(case: Case) -> None:
    """Routing weights follow from the affinities by the rule in the table, for selected and for forced experts."""
    family, layer = case.family, case.layer
    name = names.mlp(names.EXPERT_INDICES, layer)
    forced = (case.at(names.EXPERT_INDICES) + torch.arange(1, 2)) % case.model.n_experts

    seen: dict[str, Tensor] = {}
    scores: list[Tensor] = []

    def force(value: Tensor, hook: Any) -> Tensor:
        if family.select != "token":
            scores.append(case.model.selection_state(layer).scores)
        return forced

    def note(value: Tensor, hook: Any) -> None:
        seen["weights"] = value

    case.run([(name, force), (names.mlp(names.ROUTING_WEIGHTS, layer), note)])
    logits, own = case.at(names.ROUTER_LOGITS), case.at(names.EXPERT_INDICES)
    probs = case.model.routing(case.tokens).probs
    assert probs is not None
    close(probs[case.model.moe_layers.index(layer)], affinity(logits, family.score))
    close(case.at(names.ROUTING_WEIGHTS), weigh(case, logits, own), what="own choice")
    close(seen["weights"], weigh(case, logits, forced), what="forced choice")
    if family.select == "topk":
        best = scores[0].topk(case.model.top_k, dim=-1).indices.sort(-1).values
        assert torch.equal(best, own.sort(-1).values), "the largest scores are chosen"


def weigh(case: Case, logits: Tensor, chosen: Tensor) -> Tensor:
    """Weights of chosen experts by the table alone, in ranks."""
    family = case.family
    block: Any = case.model.blocks[case.layer]
    moe: Any = case.model._moe(case.layer)
    router = getattr(moe, family.router)
    logits = logits.double()
    if family.select == "sparsemixer":
        weights = []
        # Slots are in the order of choice, ranks in that of weights.
        own = case.at(names.EXPERT_INDICES)
        order = logits.gather(-1, own).argsort(-1, descending=True)
        chosen = chosen.gather(-1, order)
        left = logits.clone()
        for slot in range(chosen.shape[-1]):
            index = chosen[..., slot, None]
            top = left.max(-1, keepdim=True).values
            far = (top - logits) / torch.maximum(logits.abs(), top) > 2 * router.router_jitter_noise
            far = far.scatter(-1, index, False)
            given = left.scatter(-1, index, logits.gather(-1, index))
            weights.append(given.masked_fill(far, -torch.inf).softmax(-1).gather(-1, index))
            left = left.scatter(-1, index, -torch.inf)
        return torch.cat(weights, -1).float().scatter(-1, order, torch.cat(weights, -1).float())
    weights = affinity(logits, family.score).gather(-1, chosen)
    if family.normalised == "always" or (family.normalised == "config" and router_normalises(moe, router)):
        total = weights.sum(-1, keepdim=True)
        if family.shared_logits:  # the shared experts' columns are behind the hook's
            x = case.at(names.MLP_IN).double()
            total = total + (x @ router.weight.double().T)[..., case.model.n_experts :].sigmoid().sum(-1, keepdim=True)
        weights = weights / total
    if family.scaled is not None:
        owner = moe if hasattr(moe, family.scaled) else router
        scale = getattr(owner, family.scaled)
        weights = weights * (scale.double()[chosen] if isinstance(scale, Tensor) else float(scale))
    if family.shared_logits:
        weights = weights * router.global_scale.double()
    if family.averaged and getattr(moe, family.averaged) == "average":
        weights = weights / 2
    if family.layout and family.layout.multiplier:
        weights = weights * float(getattr(block.original_component, family.layout.multiplier))
    return weights.float()


def router_normalises(moe: Any, router: Any) -> bool:
    return bool(router.norm_topk_prob if hasattr(router, "norm_topk_prob") else moe.config.norm_topk_prob)


def own_values(case: Case) -> None:
    """Setting a part to its own value changes no bit; forcing the experts that were selected, in another order, changes
    nothing.
    """
    for name in [names.mlp(hook.name, case.layer) for hook in names.MLP_HOOKS]:
        if name not in case.every:
            continue
        assert torch.equal(case.edited(name, torch.clone), case.logits), name
    together = case.run([(name, lambda value, hook: value.clone()) for name in case.every])
    assert torch.equal(together, case.logits)
    if case.family.select != "sparsemixer":  # there, the order of choice is part of the rule
        name = names.mlp(names.EXPERT_INDICES, case.layer)
        close(case.edited(name, lambda value: value.flip(-1)), case.logits)


def edits(case: Case) -> None:
    """An edit of any hook changes the logits; scaling a part scales the part that is computed from it."""
    generator = torch.Generator().manual_seed(0)

    def disturb(value: Any) -> Any:
        if isinstance(value, tuple):
            return (disturb(value[0]), *value[1:])
        if value.dtype == torch.bool:
            return torch.zeros_like(value)
        if not value.is_floating_point():
            return torch.where(value < 0, -1, (value + 1) % case.model.n_experts) if value.dim() == 3 else value.flip(1)
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        return value * 1.5 + 0.5 * noise * max(value.std().item(), 0.3)

    some = {case.layer, *[at for at in range(case.model.cfg.n_layers) if at not in case.model.moe_layers][:2]}
    kept = [name for name in case.every if not name.startswith("blocks.") or int(name.split(".")[1]) in some]
    least = 1e-3 * case.logits.abs().max().item()
    alone = [name for at in range(0, len(kept), ROWS) for name in unchanged(case, kept[at : at + ROWS], disturb, least)]
    dead = [name for name in alone if not deviation(case.edited(name, disturb), case.logits) > least]
    # Attention that norms its queries and values does not care for the scale of what it reads; the norm's output does.
    scales = [name for name in dead if name.endswith("hook_scale")]
    for name in scales:
        out = name.replace("hook_scale", "hook_out")
        with torch.no_grad(), case.model.hooks(fwd_hooks=[(name, lambda value, hook: value * 2)]):
            _, cache = case.model.run_with_cache(case.tokens, names_filter=out)
        close(cache[out] * 2, case.cache[out], 1e-4)
    dead = sorted(set(dead) - set(scales))
    assert dead == [], dead

    same = [names.EXPERT_OUT, names.EXPERT_WEIGHTED, names.ROUTED_OUT]
    if case.family.weighs_input:
        scales_what_experts_read(case)
    else:
        same.append(names.ROUTING_WEIGHTS)
    if not case.model.has_shared(case.layer):
        same.append(names.MLP_OUT)
    scaled = [case.edited(names.mlp(name, case.layer), lambda value: value * SCALE) for name in same]
    for name, logits in zip(same, scaled, strict=True):
        close(logits, scaled[0], what=name)
    without = case.edited(names.mlp(names.ROUTED_OUT, case.layer), torch.zeros_like)
    close(case.edited(names.mlp(names.EXPERT_KEPT, case.layer), torch.zeros_like), without)
    if case.model.has_shared(case.layer):
        routed = case.at(names.MLP_OUT) - case.at(names.SHARED_OUT)
        close(case.edited(names.mlp(names.MLP_OUT, case.layer), lambda value: value - routed), without)
    stream = names.block(names.RESID_MID, case.layer)
    if stream in case.cache:
        moved = case.edited(stream, lambda value: value + 1)
        close(case.edited(names.block(names.ATTN_OUT, case.layer), lambda value: value + 1), moved) if (
            names.block(names.ATTN_OUT, case.layer) in case.cache
        ) else close(case.edited(names.block(names.RESID_PRE, case.layer), lambda value: value + 1), moved)


ROWS = 22
"""Hooks that are edited in one run, each in a row of its own; with one row more, 23, as no other axis has."""


def unchanged(case: Case, some: list[str], disturb: Callable[[Any], Any], least: float) -> list[str]:
    """Of some hooks those whose edit in one row changes the logits of this row by less, or whose rows are no texts."""
    others: set[str] = set()

    def edit(value: Any, hook: Any, name: str, row: int) -> Any:
        first = value[0] if isinstance(value, tuple) else value
        if first.dim() < 2 or first.shape[0] != ROWS + 1:
            others.add(name)
            return None
        edited = first.clone()
        edited[row : row + 1] = disturb(first[row : row + 1])
        return (edited, *value[1:]) if isinstance(value, tuple) else edited

    hooks = [(name, partial(edit, name=name, row=row)) for row, name in enumerate(some)]
    with torch.no_grad():
        logits = case.model.run_with_hooks(case.tokens[:1].repeat(ROWS + 1, 1), fwd_hooks=hooks)
    close(logits[-1], case.logits[0], what="no text is another's business")
    moved = (logits - logits[-1]).flatten(1).abs().amax(1)
    return [name for row, name in enumerate(some) if name in others or not moved[row] > least]


def scales_what_experts_read(case: Case) -> None:
    """Where weights come first: with other weights each chosen expert gives E(g x), computed from its matrices."""
    model, layer = case.model, case.layer
    x, weights, chosen = (case.at(name) for name in (names.MLP_IN, names.ROUTING_WEIGHTS, names.EXPERT_INDICES))
    given = x[:, :, None] * weights[..., None] * SCALE
    with torch.no_grad():
        out = model.expert_outputs(layer, given.flatten(0, 2), chosen.flatten()[:, None]).view_as(given)
        expected = case.edited(names.mlp(names.EXPERT_OUT, layer), lambda value: out)
    close(case.edited(names.mlp(names.ROUTING_WEIGHTS, layer), lambda value: value * SCALE), expected)


def gradients(case: Case) -> None:
    """Gradients of all parameters are those of transformers, and they reach the hooks of the routing."""
    ours = case.backward(case.hf)
    assert ours.keys() == case.gradients.keys()
    for name, gradient in ours.items():
        assert deviation(gradient, case.gradients[name]) <= 1e-4 * max(case.gradients[name].abs().max().item(), 1e-3), (
            name
        )
    reached: dict[str, float] = {}
    wanted = [
        names.mlp(name, case.layer)
        for name in (names.ROUTER_LOGITS, names.ROUTING_WEIGHTS, names.EXPERT_POST, names.EXPERT_WEIGHTED)
    ]

    def note(gradient: Tensor, hook: Any) -> None:
        reached[hook.name] = gradient.abs().max().item()

    with case.model.hooks(bwd_hooks=[(name, note) for name in wanted]):
        case.model(case.tokens, return_type="loss").backward()
    case.hf.zero_grad()
    assert set(reached) == set(wanted)
    assert all(value > 0 for value in reached.values()), reached


def generation(case: Case) -> None:
    """Greedy generation with a key-value cache gives transformers' tokens; hooks see one new position at each step."""
    seen: list[tuple[int, ...]] = []
    name = names.mlp(names.EXPERT_INDICES, case.layer)
    with case.model.hooks(fwd_hooks=[(name, lambda value, hook: seen.append(tuple(value.shape)))]):
        out = case.model.generate(
            case.tokens, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
        )
    assert torch.equal(out, case.generated)
    assert seen == [(2, 12, case.model.top_k)] + [(2, 1, case.model.top_k)] * 3


def packing(case: Case) -> None:
    """Texts that are packed into one row are read as each by itself, or the family is one for which `--packed` is
    refused, because transformers mixes them.
    """
    first, second = case.longer[:1, :20], case.longer[1:, :27]
    row, starts = torch.cat([first, second], 1), torch.cat([torch.arange(20), torch.arange(27)])[None]
    with torch.no_grad():
        packed = case.model(row, position_ids=starts, use_cache=False)
        alone = torch.cat([case.model(each, use_cache=False) for each in (first, second)], 1)
    off = deviation(packed, alone) / alone.abs().max().item()
    assert (off > FP32) == case.model.family.mixes_packed, f"off by {off:.1e}"


def bfloat16(case: Case) -> None:
    """In bfloat16, too, logits equal those of transformers bit for bit, both without hooks and with all hooks read as
    above.
    """
    hf = build(case.model_type, torch.bfloat16, **case.changes)
    with torch.no_grad():
        plain = hf(case.tokens).logits
        model = HookedMoE.from_hf(hf)
        assert torch.equal(model(case.tokens), plain)
        logits, _ = model.run_with_cache(case.tokens, names_filter=case.every)
    assert torch.equal(logits, plain)


def saving(case: Case) -> None:
    """A saved model loads again with every parameter, and computes the same bits; with weights left on disk too."""
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        again = HookedMoE.from_pretrained(folder, dtype=torch.float32)
        for parameter in again.parameters():  # one that is mapped from a file may lie where products round otherwise
            parameter.data = parameter.data.clone()
        with torch.no_grad():
            assert torch.equal(again(case.tokens), case.logits)
        saved, loaded = case.model.state_dict(), again.state_dict()  # what logits do not depend on, too
        assert saved.keys() == loaded.keys()
        assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []
        on_disk = HookedMoE.from_pretrained(folder, dtype=torch.float32, device_map={"": "disk"}, check=False)
        with torch.no_grad():
            logits = on_disk(case.tokens)
        assert streamed_weights(on_disk.original_model) is not None
        assert torch.equal(logits, case.logits)


def any_k(case: Case) -> None:
    """With one expert, or as many as a token may choose from, experts are selected and weighted by the rule in the
    table, and their outputs summed; with the model's own number no bit changes; if the number differs between tokens,
    each token gets the result that it has when all tokens have its number.
    """
    model, layer, family = case.model, case.layer, case.family
    n_active = names.mlp(names.N_ACTIVE, layer)
    if family.select == "sparsemixer" or family.shared_logits:
        with pytest.raises(InputError, match=rf"this {family.model_type} .* keep_top"):
            model.use_experts(1)
        return
    able = [at for at in model.moe_layers if names.mlp(names.N_ACTIVE, at) in model.hook_dict]
    if able != list(model.moe_layers):
        assert family.select == "token"
        with pytest.raises(InputError, match=rf"by the token's id.*layers={re.escape(str(able))}"):
            model.use_experts(1)
    with torch.no_grad(), model.use_experts(model.top_k, layers=able):
        assert torch.equal(model(case.tokens), case.logits), "its own number"
    text: Any = case.hf.config.get_text_config()
    most = model.n_experts
    if family.groups and getattr(text, "topk_method", "group_limited_greedy") != "greedy":
        most = model.n_experts // text.n_group * text.topk_group
        if most < model.n_experts:
            with pytest.raises(HookError, match=f"may choose among {most} of {model.n_experts}"):
                case.run(model.use_experts(most + 1, layers=[layer]).fwd_hooks)
    scores: list[Tensor] = []

    def note(value: Tensor, hook: Any) -> None:
        scores.append(model.selection_state(layer).scores)

    parts = (names.EXPERT_INDICES, names.ROUTING_WEIGHTS, names.EXPERT_OUT, names.ROUTED_OUT, names.MLP_IN)
    wanted = [names.mlp(name, layer) for name in parts]

    def with_experts(hooks: Any) -> list[Tensor]:
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            _, cache = model.run_with_cache(case.tokens, names_filter=wanted)
        return [cache[name] for name in wanted]

    found = {}
    for k in (1, most):
        found[k] = with_experts(
            [*model.use_experts(k, layers=[layer]).fwd_hooks, (names.mlp(names.EXPERT_INDICES, layer), note)]
        )
        indices, weights, outputs, routed, x = found[k]
        best = scores[-1].topk(k, dim=-1).indices.sort(-1).values
        assert torch.equal(indices.sort(-1).values, best), f"the {k} largest scores are chosen"
        close(weights, weigh(case, case.at(names.ROUTER_LOGITS), indices), what=f"weights of {k}")
        if not family.weighs_input:
            close(outputs, model.expert_outputs(layer, x, indices), what=f"outputs of {k}")
            close((outputs * weights[..., None]).sum(-2), routed, what=f"sum of {k}")

    some = torch.arange(case.tokens.numel()).view_as(case.tokens) % 2 == 0
    mixed = with_experts([(n_active, lambda value, hook: torch.where(some[..., None], 1, most))])
    routed = torch.where(some[..., None], found[1][3], found[most][3])
    close(mixed[3], routed, what="each token its own number")
    assert not mixed[1][some][:, 1:].any() and not mixed[2][some][:, 1:].any(), "nothing in slots behind"
    close(mixed[1][some][:, :1], found[1][1][some])
    close(mixed[1][~some], found[most][1][~some])


LAWS: dict[str, Callable[[Case], None]] = {
    "logits": parity,
    "observing": observing,
    "parts": parts,
    "rule": rule,
    "own values": own_values,
    "edits": edits,
    "gradients": gradients,
    "generation": generation,
    "packing": packing,
    "bfloat16": bfloat16,
    "saving": saving,
    "any k": any_k,
}
WORDS = {name: " ".join((law.__doc__ or "").split()) for name, law in LAWS.items()}
"""What each law says."""
