"""`Intervention`: a change of a model's forward pass, as an object."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from moe_lens.errors import InputError, a_kind
from moe_lens.model.hooks.hook_scope import OpensScope, TakesBatch
from moe_lens.protocols import Hooked, HookedModel
from moe_lens.selection import Selection, Step

Hook = tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]
"""The name of a hook point and a function for it, as `run_with_hooks` takes them."""


class Recipe(NamedTuple):
    """How an intervention is made on any model: by a function of this package, and values."""

    make: Callable[..., "Intervention"]
    arguments: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Intervention(OpensScope):
    """A change of a model's forward pass, active inside `with`, in `generate(…, interventions=[…])`, or as hooks.

    Interventions nest. At one hook point the outer one acts first, and the inner one sees its result; hook points act
    in the order in which the model computes: router logits, selection, routing weights, slots left out, outputs.
    Nothing outlives the `with`, however it is left. An intervention can be entered again, also inside itself: it then
    acts twice. It is pickled by value, without its model; `bind` makes it anew on a model.
    """

    model: HookedModel | None
    """None after unpickling, until `bind`."""
    label: str
    """What it does, readable."""
    hooks: tuple[Hook, ...]
    recipe: Recipe | None = None
    """How it is made; None where it cannot be said by value."""

    def __post_init__(self) -> None:
        super().__init__()

    def bind(self, model: Hooked) -> "Intervention":
        """The same intervention on a model: this one, a copy, or another with the same layers and experts.

        Raises:
            InputError: the model lacks what the intervention names, or it cannot be made anew.
        """
        return self._recipe().make(model, **self._recipe().arguments)

    def _recipe(self) -> Recipe:
        if self.recipe is None:
            raise InputError(f"{self} exists on its own model only: it can be neither bound to another nor pickled")
        return self.recipe

    def __reduce__(self) -> tuple[Any, ...]:
        """By value."""
        return Intervention, (None, self.label, (), self._recipe())

    def __copy__(self) -> "Intervention":
        return self  # a value

    def __deepcopy__(self, memo: dict[int, Any]) -> "Intervention":
        return self

    @property
    def fwd_hooks(self) -> list[tuple[str | Callable[..., Any], Callable[..., Any]]]:
        """For `run_with_hooks` and `hooks`.

        Raises:
            InputError: it was unpickled and not bound to a model yet.
        """
        self._model()
        return [(name, TakesBatch(function)) for name, function in self.hooks]

    def scope(self) -> Any:
        """Its hooks, in place."""
        context: Any = self._model().hooks(fwd_hooks=self.fwd_hooks)
        scope = context.scope()
        scope.recipe = self.recipe
        return scope

    def _model(self) -> HookedModel:
        if self.model is None:
            raise InputError(f"{self} was unpickled and has no model yet: use intervention.bind(model)")
        return self.model

    def __repr__(self) -> str:
        return f"Intervention({self.label})"


def check_interventions(model: HookedModel, interventions: Iterable[Any]) -> list[Intervention]:
    """The interventions, if they are interventions on this model.

    Raises:
        InputError: one is something else, or was made for another model.
    """
    if isinstance(interventions, Intervention):
        raise InputError(f"interventions is one {interventions}; expected a list of them")
    given = list(interventions)
    for one in given:
        if not isinstance(one, Intervention):
            raise InputError(f"interventions holds {a_kind(one)}; expected what model.ablate(…) and so on return")
        if one.model is not model:
            raise InputError(f"{one} was made for another model; intervention.bind(model) makes it on this one")
    return given


def positions(model: HookedModel, selection: Selection, like: Tensor) -> Bool[Tensor, "batch pos"] | None:
    """Which tokens of the pass now running are meant; None for all of them.

    Args:
        model: The model that is running.
        selection: Its `where`.
        like: An activation [batch, pos, …] of the pass.

    Raises:
        InputError: the selection names positions, and the model was not told which tokens pass.
    """
    step = _step(model, like) if selection.where is None else this_pass(model, like, "where=")
    if step is None or (selection.where is None and step.real is None):
        return None
    return selection.positions(step).to(like.device)


def real_tokens(model: HookedModel, like: Tensor) -> Bool[Tensor, "batch pos"]:
    """Tokens of the pass now running that are not padding; `like` is an activation [batch, pos, …]."""
    step = _step(model, like)
    if step is None or step.real is None:
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    return step.real.to(like.device)


def this_pass(model: HookedModel, like: Tensor, what: str) -> Step:
    """The pass now running, for what depends on all of its tokens; `like` is an activation [batch, pos, …].

    Raises:
        InputError: the model was not told which tokens pass, as in the stacked runs of a sweep.
    """
    step = _step(model, like)
    if step is None:
        raise InputError(
            f"{what} needs the tokens of the forward pass, which forward, run_with_hooks, run_with_cache and "
            f"generation tell; this one has activations of {tuple(like.shape[:2])} [batch, pos] from somewhere else"
        )
    return step


def _step(model: HookedModel, like: Tensor) -> Step | None:
    step: Step | None = model.current_tokens()
    return step if step is not None and (step.batch, step.pos) == tuple(like.shape[:2]) else None


def computed(model: HookedModel, layer: int, selection: Selection) -> tuple[Tensor, Bool[Tensor, "batch pos top_k"]]:
    """The experts in a layer's slots, −1 where left out, and which slots are meant, left-out ones not among them."""
    experts: Int[Tensor, "batch pos top_k"] = model.experts_in_slots(layer)
    return experts, selection.slots(layer, experts, positions(model, selection, experts)) & (experts >= 0)


def first_token(which: Bool[Tensor, "batch pos"]) -> str:
    """The first true place, for a message."""
    batch, position = torch.nonzero(which)[0].tolist()
    return f"(batch {batch}, position {position})"
