"""What instruments and caches need of a model, so that they need not import it."""

from contextlib import AbstractContextManager
from typing import Annotated, Any, Protocol, runtime_checkable

from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.argument_checks import ModelWith
from moe_lens.errors import InputError


@runtime_checkable
class RouterFamily(Protocol):
    """How a family of models scores its experts."""

    @property
    def score(self) -> str:
        """Affinity of all experts as a function of the router logits, such as "softmax"."""
        ...


@runtime_checkable
class PaddedTokens(Protocol):
    """Rows of ids with what is padding in them, as `moe_lens.data.TokenBatch` has them."""

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """The ids."""
        ...

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True at real tokens."""
        ...


@runtime_checkable
class HookedModel(Protocol):
    """A model with hooked routers and experts, as `HookedMoE` is.

    It also has TransformerLens's modules `blocks` and `ln_final`; a check at run time does not see modules.
    """

    @property
    def cfg(self) -> Any:
        """TransformerLens's config: `n_layers`, `d_model`, `d_vocab`, `model_name`."""
        ...

    @property
    def family(self) -> RouterFamily:
        """What is particular to this kind of model."""
        ...

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have routed experts, ascending."""
        ...

    @property
    def n_experts(self) -> int:
        """Routed experts of a layer."""
        ...

    @property
    def n_shared_experts(self) -> int:
        """Shared experts of a layer, 0 in a model that has none."""
        ...

    @property
    def top_k(self) -> int:
        """Routed experts active per token."""
        ...

    @property
    def W_U(self) -> Tensor:
        """The unembedding, [d_model, d_vocab]."""
        ...

    def has_shared(self, layer: int) -> bool:
        """Whether a layer has shared experts."""
        ...

    def hooks(self, fwd_hooks: Any = ..., bwd_hooks: Any = ...) -> AbstractContextManager[Any]:
        """Hooks that are in place inside a `with`."""
        ...

    def run_with_cache(self, input: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Run the model and keep activations."""
        ...

    def current_tokens(self) -> Any:
        """The tokens of the forward pass that is running, a `Step`; None where the model was not told."""
        ...

    def experts_in_slots(self, layer: int) -> Int[Tensor, "batch pos top_k"]:
        """Experts that the forward pass now running computes in a layer, by rank; −1 in slots that are left out."""
        ...

    def selection_state(self, layer: int) -> Any:
        """What the forward pass now running selects a layer's experts from, a `SelectionState`."""
        ...

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token."""
        ...


Hooked = Annotated[HookedModel, ModelWith("moe_layers")]
"""A model that is held against this at the call, where what is offered takes one."""


def require_stream_width(model: Any, what: str) -> None:
    """Nothing, where experts give tensors as wide as the residual stream.

    Args:
        model: A `HookedModel`.
        what: What needs them to be so, for the message.

    Raises:
        InputError: they compute in a narrower space.
    """
    if getattr(model.family, "widens", None) is not None:
        raise InputError(
            f"experts of this {model.family.model_type} compute in a narrower space than the residual stream: "
            f"{what} cannot be had. Their hooks can be read and edited all the same, and hook_out of the MoE block is "
            "as wide as the stream"
        )
