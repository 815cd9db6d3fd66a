"""Methods of TransformerLens's, transformers' and torch's models that a wrapped model refuses, each with what to do."""

from functools import partial
from typing import Any, NoReturn

from transformers import PreTrainedModel

from moe_lens.errors import UnsupportedModelError
from moe_lens.model.hooks.arguments import refuse_unknown
from moe_lens.model.loading.state_dict import WholeState
from moe_lens.model.loading.transformer_lens_words import PROCESSING, refuse_processing
from moe_lens.model.torch_transforms import not_compiled

_EMBEDDINGS = (
    "a wrapped model's embeddings are hook points, and stay: call {0} on the transformers model, and wrap it then"
)
_ADAPTERS = (
    "adapters of PEFT do not go onto a wrapped model: put them on the transformers model, merge them "
    "(merge_and_unload), and wrap what that returns"
)
_OF_TRANSFORMERS = {
    "save_pretrained": "this model is wrapped, and transformers would write the wrapped modules' names: call "
    "save_pretrained of the HookedMoE, which writes the family's own format (a Trainer's checkpoints: "
    "save_strategy='no', and that afterwards)",
    "push_to_hub": "push_to_hub is not for a wrapped model: save_pretrained(folder, push_to_hub=True) of the HookedMoE",
    "resize_token_embeddings": _EMBEDDINGS.format("resize_token_embeddings"),
    "set_input_embeddings": _EMBEDDINGS.format("set_input_embeddings"),
    "set_output_embeddings": _EMBEDDINGS.format("set_output_embeddings"),
    "add_adapter": _ADAPTERS,
    "load_adapter": _ADAPTERS,
}
"""Methods of the transformers model inside that would break, or write, what wrapping made of it."""


def _refused(message: str, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG001
    raise UnsupportedModelError(message)


def refuse_methods(model: PreTrainedModel) -> None:
    """Refuse, on a model that is wrapped, transformers' methods that take it for one that is not."""
    for name, message in _OF_TRANSFORMERS.items():
        model.__dict__[name] = partial(_refused, message)


class RefusedMethods(WholeState):
    """A TransformerBridge whose weights and modules stay as they are: what would change them is refused."""

    def enable_compatibility_mode(  # pyright: ignore[reportIncompatibleMethodOverride]  # processing is by name
        self,
        disable_warnings: bool = False,  # noqa: ARG002
        no_processing: bool = False,
        **processing: bool,
    ) -> None:
        """Nothing is done where nothing is asked for; processing is refused.

        TransformerLens's names of hooks are there without this mode. Its processing folds and centres weights, which is
        wrong for packed experts, whose norm other parts read too.

        Args:
            disable_warnings: as in TransformerLens; there are none.
            no_processing: leave all weights as they are.
            processing: `fold_ln`, `center_writing_weights`, `center_unembed`, `fold_value_biases` (on unless they are
                turned off) and `refactor_factored_attn_matrices`.

        Raises:
            UnsupportedModelError: some processing is asked for.
            InputError: a word that TransformerLens does not have.
        """
        refuse_unknown("enable_compatibility_mode", processing, PROCESSING)
        if not no_processing:
            refuse_processing({**PROCESSING, **processing})

    def compile(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Not supported: hook functions are Python, which no compiled graph holds.

        Raises:
            UnsupportedModelError: always; says what to do instead.
        """
        raise not_compiled()

    @property
    def _initialize_hook(self) -> Any:
        """What `torch.compile(model)` asks a module for, and nothing else does: refused as `compile` is."""
        return self.compile()

    @property
    def peft_config(self) -> Any:
        """What PEFT asks a model for before it puts an adapter into it, and nothing else does: refused."""
        raise UnsupportedModelError(_ADAPTERS)

    def __dir__(self) -> list[str]:
        """Without what is asked for only to be refused: `inspect.getmembers` and scans read whatever is listed."""
        return [name for name in super().__dir__() if name not in ("_initialize_hook", "peft_config")]

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Not supported: transformers' own would write the wrapped modules' names.

        Raises:
            UnsupportedModelError: always; says what to do instead.
        """
        raise UnsupportedModelError("push_to_hub is not for a wrapped model: save_pretrained(folder, push_to_hub=True)")

    def process_weights(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, verbose: bool = False, **processing: bool
    ) -> None:
        """Nothing where all is turned off, and refused otherwise; see `enable_compatibility_mode`.

        Args:
            verbose: as in TransformerLens; there is nothing to tell.
            processing: what to do, by name.

        Raises:
            UnsupportedModelError: some processing is asked for.
            InputError: a word that TransformerLens does not have.
        """
        self.enable_compatibility_mode(verbose, False, **processing)
