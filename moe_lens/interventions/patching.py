"""Activation patching: one run with activations of another, one place at a time."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from moe_lens import names
from moe_lens.checked import AnyModel, Positive
from moe_lens.errors import InputError, several
from moe_lens.interventions.clean_run import CleanRun, Variant, check_even_slots
from moe_lens.interventions.metrics import Metric, among, describe, evaluate
from moe_lens.interventions.patch_result import PatchResult
from moe_lens.interventions.patch_sites import SITES, Parts, Units, differing, logits_variant, stream_variant
from moe_lens.interventions.sweep import RoutingMode, sweep
from moe_lens.model.loading.dispatch import output_place
from moe_lens.selection import Selection

Direction = Literal["denoising", "noising"]


def patch(
    model: AnyModel,
    clean: Any,
    corrupted: Any,
    site: str,
    metric: Metric,
    *,
    over: Sequence[str] = ("layer", "pos"),
    direction: Direction = "denoising",
    routing: RoutingMode = "free",
    selection: Selection | None = None,
    batch_size: Positive | None = None,
    **kwargs: Any,
) -> PatchResult:
    """Patch activations of one run into another, one place at a time, and measure the effect.

    The *base* is the run that is edited, the *source* the one that activations are taken from. *The same expert* is the
    one with the same id. `expert_weighted`: the base's contribution g E(x) of expert e at a position is replaced by the
    source's; it is 0 where the source did not select e, and is added where the base did not. `expert_out`: the output
    E(x) is replaced and the base's weight g stays; where either run did not select e, nothing changes. With the axis
    "rank", or without either axis, slot r gets the source's activation at slot r, whichever expert it is: the same
    rank, not the same expert. `router_logits` over experts replaces single logits, and the router selects again.
    `routing` replaces indices and weights together.

    Args:
        model: A `HookedMoE`.
        clean: What `forward` takes: a text, texts, tokens, …
        corrupted: An input with the same number of tokens.
        site: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, `routed_out`, `shared_out`, `expert_out`,
            `expert_weighted`, `router_logits` or `routing`.
        metric: From logits [batch, pos, d_vocab] to a scalar.
        over: Axes of the sweep: "layer", then "expert" or "rank" where the site has them, then "pos", of which only
            "layer" is required; along other axes everything is patched at once.
        direction: "denoising" edits the corrupted run with the clean one's activations, "noising" the other way round.
        routing: "free": layers from the patched one on select experts again. "frozen": they keep the base's experts,
            and only weights follow the router logits; the site `routing` still sets its own layer.
        selection: Layers, experts or ranks, and positions to patch; everything if not given. Padding is never patched.
        batch_size: Items to run at a time; found automatically if not given.
        kwargs: Of `forward`, for both runs: `attention_mask`, `prepend_bos`, `padding_side`.

    Raises:
        InputError: inputs of different lengths, an unknown site or axis, a selection that does not fit, a metric that
            is not a finite scalar, or experts' outputs or routing where tokens have different numbers of experts.
    """
    over = tuple(several(over, "axes"))
    chosen = _check(model, site, over, direction, selection or Selection())
    layers = _layers(model, site, chosen)
    keep = [name for layer in layers for name in SITES[site].names(layer)]
    runs = {"clean": CleanRun.of(model, clean, keep=keep, **kwargs)}
    runs["corrupted"] = CleanRun.of(model, corrupted, keep=keep, **kwargs)
    _same_shape(runs["clean"], runs["corrupted"])
    for layer in layers if names.EXPERT_INDICES in SITES[site].hooks else ():
        check_even_slots([run.indices(layer) for run in runs.values()], f"patching {site}")
    metric = among(metric, runs["clean"].cache.mask)
    base, source = (runs[name] for name in (("corrupted", "clean") if direction == "denoising" else runs))
    axes = _axes(model, over, chosen, layers, base)
    made = list(_variants(model, site, base, source, chosen, axes))
    ends = {name: evaluate(metric, run.logits).item() for name, run in runs.items()}
    unpatched = ends["corrupted" if direction == "denoising" else "clean"]
    values = torch.full([len(coordinates) for coordinates in axes.values()], unpatched, dtype=torch.float64)
    found = sweep(model, base, [variant for _, variant in made], metric, routing=routing, batch_size=batch_size)
    for (cell, _), value in zip(made, found, strict=True):
        values[cell] = value
    tokens = base.cache.tokens
    return PatchResult(
        values=values,
        axes={name: tuple(coordinates) for name, coordinates in axes.items()},
        site=site,
        metric=describe(metric),
        direction=direction,
        routing=routing,
        clean=ends["clean"],
        corrupted=ends["corrupted"],
        n=base.batch,
        tokens=_labels(model, tokens),
    )


def _variants(
    model: Any, site: str, base: CleanRun, source: CleanRun, chosen: Selection, axes: dict[str, list[int]]
) -> Iterator[tuple[tuple[int, ...], Variant]]:
    """A variant for each cell in which anything changes."""
    everywhere = chosen.positions(base.step).to(base.logits.device)
    unit = next((axis for axis in ("expert", "rank") if axis in axes), None)
    others = [name for name in axes if name != "layer"]
    for row, layer in enumerate(axes["layer"]):
        by_expert = unit == "expert" or (unit is None and chosen.by_layer is not None)
        here = everywhere & differing(site, base, source, layer)
        parts = Parts.of(site, base, source, layer, by_expert) if "rank" in SITES[site].units else None
        for cell in itertools.product(*(range(len(axes[name])) for name in others)):
            at = {name: axes[name][i] for name, i in zip(others, cell, strict=True)}
            places = here if "pos" not in at else here & _column(here, at["pos"])
            if parts is not None:
                slots = parts.chosen(_units(chosen, layer, unit, at), places)
                variant = parts.variant(base, layer, slots)
            elif site == "router_logits":
                variant = logits_variant(base, source, layer, places, _experts(model, chosen, layer, at))
            else:
                variant = stream_variant(site, base, source, layer, places)
            if variant.changed is None or variant.changed.any():
                yield (row, *cell), variant


def _units(chosen: Selection, layer: int, unit: str | None, at: dict[str, int]) -> Units:
    """Which slots are meant: those of the selection, and of one expert or rank where that is an axis."""

    def meant(experts: Tensor, ranks: Tensor) -> Tensor:
        if chosen.by_layer is not None:
            mine = torch.isin(experts, torch.tensor(chosen.by_layer[layer], device=experts.device))
        elif chosen.ranks is not None:
            mine = torch.isin(ranks, torch.tensor(tuple(chosen.ranks), device=ranks.device))
        else:
            mine = torch.ones_like(experts, dtype=torch.bool)
        return mine if unit is None else mine & ((experts if unit == "expert" else ranks) == at[unit])

    return meant


def _experts(model: Any, chosen: Selection, layer: int, at: dict[str, int]) -> Bool[Tensor, " n_experts"]:
    wanted = torch.zeros(model.n_experts, dtype=torch.bool, device=output_place(model.original_model)[0])
    wanted[list((chosen.by_layer or {}).get(layer, range(model.n_experts)))] = True
    return wanted if "expert" not in at else wanted & (torch.arange(len(wanted), device=wanted.device) == at["expert"])


def _column(like: Tensor, pos: int) -> Tensor:
    return torch.arange(like.shape[1], device=like.device)[None] == pos


def _axes(
    model: Any, over: Sequence[str], chosen: Selection, layers: Sequence[int], base: CleanRun
) -> dict[str, list[int]]:
    """Coordinates along each axis."""
    axes = {"layer": list(layers)}
    if "expert" in over:
        wanted = sorted({expert for experts in (chosen.by_layer or {}).values() for expert in experts})
        axes["expert"] = wanted or list(range(model.n_experts))
    if "rank" in over:
        axes["rank"] = list(range(_most_slots(base, layers)) if chosen.ranks is None else chosen.ranks)
    if "pos" in over:
        axes["pos"] = chosen.positions(base.step).any(0).nonzero()[:, 0].tolist()
    return axes


def _most_slots(run: CleanRun, layers: Sequence[int]) -> int:
    """Ranks of the layer that has most of them: as many as `top_k`, but for what `use_experts` gives."""
    return max(run.indices(layer).shape[-1] for layer in layers)


def _layers(model: Any, site: str, chosen: Selection) -> tuple[int, ...]:
    having = SITES[site].layers(model)
    layers = having if chosen.layers is None and chosen.by_layer is None else chosen.layers_of(model)
    lacking = sorted(set(layers) - set(having))
    if lacking or not layers:
        who = f"layer {lacking[0]}" if lacking else "this model"
        raise InputError(f"{who} has no {site}; the layers that have it are {', '.join(map(str, having)) or 'none'}")
    return layers


def _check(model: Any, site: str, over: tuple[str, ...], direction: str, chosen: Selection) -> Selection:
    """The selection, if everything fits together.

    Raises:
        InputError: it does not.
    """
    if site not in SITES:
        raise InputError(f"there is no site {site!r}; expected one of {', '.join(SITES)}")
    units = SITES[site].units
    valid = [("layer", *unit, *pos) for unit in ((), *((u,) for u in units)) for pos in ((), ("pos",))]
    if over not in valid:
        raise InputError(f"{site} cannot be swept over {over}; expected one of {', '.join(map(str, valid))}")
    if direction not in get_args(Direction):
        raise InputError(f'direction is {direction!r}; expected "denoising" or "noising"')
    if chosen.shared:
        raise InputError('a selection of the shared experts is the site "shared_out"')
    for named, unit in ((chosen.experts, "expert"), (chosen.ranks, "rank")):
        if named is not None and unit not in units:
            raise InputError(f"the selection names {unit}s, and {site} has none; it can name layers and positions")
        if named is not None and len(units) > 1 and over[1:2] == (("rank" if unit == "expert" else "expert"),):
            raise InputError(f"the selection names {unit}s, and the sweep goes over {over[1]}s; expected the same")
    return chosen.check(model, dense=not SITES[site].sparse)


def _same_shape(clean: CleanRun, corrupted: CleanRun) -> None:
    one, other = (clean.batch, clean.pos), (corrupted.batch, corrupted.pos)
    if one != other:
        raise InputError(
            f"clean has {one[0]} × {one[1]} tokens and corrupted {other[0]} × {other[1]} (batch × pos); patching goes "
            "position by position: expected the same shape. model.to_str_tokens shows where they part"
        )
    if not torch.equal(clean.mask, corrupted.mask):
        raise InputError("clean and corrupted are padded at different positions; expected equal lengths, text by text")


def _labels(model: Any, tokens: Tensor | None) -> tuple[str, ...]:
    """The tokens as text, where there is a tokenizer and one input."""
    if tokens is None or len(tokens) > 1 or model.tokenizer is None:
        return ()
    return tuple(map(str, model.to_str_tokens(tokens[0])))
