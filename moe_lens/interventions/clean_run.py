"""A forward pass that can be started again at any block, and the variants that depart from it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from moe_lens import names
from moe_lens.checked import AnyModel, Natural
from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.model.cache.moe_cache import MoECache
from moe_lens.model.hooks.block_replay import Recording, Replay
from moe_lens.model.random_numbers import nothing_drawn
from moe_lens.selection import Step

HookFunction = Callable[[Tensor, HookPoint], Tensor | None]
Hooks = Sequence[tuple[str, HookFunction]]


PARTIAL = frozenset(
    ("cache", "clear_contexts", "device", "dtype", "incl_bwd", "keep_graph", "labels", "loss_per_token", "names_filter")
    + ("past_key_values", "pos_slice", "remove_batch_dim", "reset_hooks_end", "return_cache_object", "return_type")
    + ("start_at_layer", "stop_at_layer", "use_cache")
)
"""Arguments of `run_with_cache` with which a run is no run of the whole input through the whole model."""


def check_whole_runs(words: Mapping[str, Any]) -> None:
    """Refuse what interventions would pass to `run_with_cache` and not get the whole run with.

    Raises:
        InputError: names the argument.
    """
    if wrong := sorted(PARTIAL & words.keys()):
        raise InputError(f"got {', '.join(wrong)}; the whole input runs through the whole model here: leave it out")
    positions = words.get("position_ids")
    if positions is not None and words.get("attention_mask") is None and (positions.diff(dim=-1) != 1).any():
        raise InputError(
            "position_ids jump: without a cache, as here, transformers reads that as several texts in a row; pass one "
            "text a row, or an attention_mask"
        )


def check_even_slots(indices: Iterable[Int[Tensor, "batch pos _"]], what: str) -> None:
    """Nothing, where every token has the same number of slots in some layers and runs.

    Args:
        indices: The experts of the slots, −1 in those that a token does not use.
        what: What goes from slot to slot, for the message.

    Raises:
        InputError: Not all tokens have the same number.
    """
    counts = set()
    for of_layer in indices:
        counts.update((of_layer >= 0).sum(-1).unique().tolist())
    if len(counts) > 1:
        raise InputError(
            f"tokens have different numbers of experts, as inside use_experts(mass=…), and {what} goes from slot to "
            "slot; use_experts(k) gives the same number to all of them, in all layers"
        )


@dataclass(frozen=True, eq=False)
class CleanRun:
    """One forward pass, and what is needed to start again at any block of it."""

    replay: Replay
    cache: MoECache
    """Routing, and whatever else was asked for; its `tokens` and `mask` are those of the run."""
    resid: tuple[Float[Tensor, "batch pos d_model"], ...]
    """The residual stream entering each block, before hooks at `hook_resid_pre`, and the one leaving the last."""
    logits: Float[Tensor, "batch pos d_vocab"]
    direct: frozenset[Natural]
    """Layers whose MLP's output is added to the residual stream as it is, by no further norm or factor."""

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: AnyModel,
        input: Any,
        *,
        keep: Sequence[str] = (),
        fwd_hooks: Hooks = (),
        **kwargs: Any,
    ) -> "CleanRun":
        """Run a model.

        Args:
            model: A `HookedMoE`.
            input: What `forward` takes: a text, texts, tokens, …
            keep: Full names of further hooks to cache.
            fwd_hooks: Hooks in place during the run, if the run that variants depart from is itself an edited one.
            kwargs: Of `forward`: `attention_mask`, `prepend_bos`, `padding_side`.

        Raises:
            InputError: an argument with which it would not be the whole run of the input, or dropout or jitter in it.
            UnsupportedModelError: the model's logits are not its final norm and unembedding alone.
        """
        check_whole_runs(kwargs)
        n_layers = model.cfg.n_layers
        end = names.block(names.RESID_POST, n_layers - 1)
        wanted = [end]
        wanted += [names.mlp(n, at) for at in model.moe_layers for n in (names.EXPERT_INDICES, names.ROUTING_WEIGHTS)]
        filtered = list(dict.fromkeys([*wanted, *keep]))
        pairs = {at: (names.block(names.RESID_MID, at), names.mlp(names.MLP_OUT, at)) for at in range(n_layers)}
        known = model.hook_dict  # where experts stand beside attention, for example, there is no stream between them
        pairs = {at: pair for at, pair in pairs.items() if all(name in known for name in pair)}
        whole: dict[int, Tensor] = {}
        direct = set(model.moe_layers) if getattr(model.family, "adds_last", False) else set[int]()

        def hold(value: Tensor, hook: Any, layer: int) -> None:  # noqa: ARG001
            whole[layer] = value.clone()

        def add(value: Tensor, hook: Any, layer: int) -> None:  # noqa: ARG001
            whole[layer] = whole[layer] + value

        def compare(value: Tensor, hook: Any, layer: int) -> None:  # noqa: ARG001
            if layer in whole and torch.equal(whole.pop(layer), value):
                direct.add(layer)

        watch = [
            (name, partial(of, layer=layer))
            for layer, (mid, out) in pairs.items()
            for name, of in ((mid, hold), (out, add), (names.block(names.RESID_POST, layer), compare))
        ]
        with nothing_drawn(model), Recording(model) as recorded, model.hooks([*fwd_hooks, *watch]):
            logits, cache = model.run_with_cache(input, names_filter=filtered, use_cache=False, **kwargs)
        entering = (recorded.entering[layer] for layer in range(n_layers))
        run = cls(recorded.replay, cache, (*entering, cache[end]), logits, frozenset(direct))
        again = run.replay.logits(run.resid[-1][:, -1].to(logits.device)).to(logits.device)
        if (again - logits[:, -1]).abs().max() > 0.02 * logits[:, -1].abs().max():
            raise UnsupportedModelError(
                f"{model.cfg.model_name} does more to its logits than a norm and an unembedding; sweeps cannot follow"
            )
        return run

    @property
    def batch(self) -> int:
        """Items."""
        return self.logits.shape[0]

    @property
    def pos(self) -> int:
        """Positions, padding included."""
        return self.logits.shape[1]

    def stream(self, layer: Natural, items: Int[Tensor, " rows"]) -> Float[Tensor, "rows pos d_model"]:
        """`resid[layer]` of some items."""
        return self.resid[layer].index_select(0, items.to(self.resid[layer].device))

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True at real tokens."""
        mask = self.cache.mask
        device = self.logits.device
        if mask is None:
            return torch.ones(self.batch, self.pos, dtype=torch.bool, device=device)
        return mask.to(device)

    @property
    def step(self) -> Step:
        """The tokens of the run, for a `Selection`."""
        return Step(self.batch, self.pos, self.cache.tokens, self.cache.mask)

    def adding(
        self,
        layer: Natural,
        site: str,
        delta: Callable[[Int[Tensor, " items"]], Float[Tensor, "items pos d_model"]],
        changed: Bool[Tensor, "batch pos"],
    ) -> "Variant":
        """The variant in which the MLP of a layer adds something else too: the block itself need not run.

        Args:
            layer: The layer.
            site: The hook of what changes: an expert's weighted output, a part of the MLP's sum, or the sum.
            delta: From items to what is added to the MLP's output there.
            changed: Where that is not zero.

        Raises:
            InputError: there are hooks between the two, which would not run on what changes.
        """
        points = self.cache.model.hook_dict
        for behind in (names.mlp(name, layer) for name in _BEHIND[site]):
            if behind in points and points[behind].fwd_hooks:
                raise InputError(
                    f"there is a hook at {behind}, and a sweep adds to its output what changes at {site}, without "
                    f"running it: take it out, or patch by a hook of your own in run_with_hooks"
                )
        if layer in self.direct:
            return Variant(layer + 1, lambda items: _sum(self.stream(layer + 1, items), delta(items)), changed=changed)
        items = changed.any(1).nonzero()[:, 0]
        hook = names.mlp(names.MLP_OUT, layer), lambda value, hook: _sum(value, delta(items))  # noqa: ARG005
        return Variant(layer, hooks=[hook], changed=changed)

    def indices(self, layer: Natural) -> Int[Tensor, "batch pos top_k"]:
        """Experts chosen in a layer, by rank."""
        return self.cache[names.mlp(names.EXPERT_INDICES, layer)]

    def weights(self, layer: Natural) -> Float[Tensor, "batch pos top_k"]:
        """Their routing weights."""
        return self.cache[names.mlp(names.ROUTING_WEIGHTS, layer)]


@dataclass(frozen=True, eq=False)
class Variant:
    """A run that departs from the clean one at some block."""

    layer: Natural
    """The first block that is run; `n_layers` for none, when only the stream leaving the last block differs."""
    resid: Callable[[Int[Tensor, " items"]], Float[Tensor, "items pos d_model"]] | None = None
    """A function from numbers of items to the stream that enters that block for them; the clean one if not given."""
    hooks: Hooks = ()
    """Hooks in that block or later ones. Each sees this variant's own part of the batch: the items that it changes."""
    changed: Bool[Tensor, "batch pos"] | None = None
    """Where the stream entering the block, or a hook's edit, may differ from the clean run; everywhere if not given.

    Later positions of the same item may change behind the first block. Items without any keep their clean result.
    """


_BEHIND = {
    names.EXPERT_WEIGHTED: (names.ROUTED_OUT, names.MLP_OUT),
    names.ROUTED_OUT: (names.MLP_OUT,),
    names.SHARED_OUT: (names.MLP_OUT,),
    names.MLP_OUT: (),
}
"""What an MLP's parts go through on their way into its output."""


def _sum(value: Tensor, delta: Tensor) -> Tensor:
    """In float32 at least, rounded once.

    Raises:
        InputError: what is added is narrower than the residual stream.
    """
    if delta.shape[-1] != value.shape[-1]:
        raise InputError(
            f"experts of this model give {delta.shape[-1]} numbers a token, and the residual stream has "
            f"{value.shape[-1]}: what they give cannot be exchanged there. Hook {names.EXPERT_WEIGHTED} or "
            f"{names.ROUTED_OUT} instead"
        )
    wide = torch.promote_types(value.dtype, torch.float32)
    return (value.to(wide) + delta.to(value.device, wide)).to(value.dtype)
