"""What instruments and caches need of a model, so that they need not import it."""

from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class RouterFamily(Protocol):
    """How a family of models scores its experts."""

    @property
    def score(self) -> Literal["softmax", "sigmoid"]:
        """Affinity of all experts as a function of the router logits."""
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

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token."""
        ...
