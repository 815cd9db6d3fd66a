"""What stands for the model in a cache that was pickled: a cache goes by value, without the model that made it."""

from types import SimpleNamespace
from typing import Any

from moe_lens.errors import InputError


class NoModelError(InputError, AttributeError):
    """A cache without a model was asked for what its model knows."""


class AbsentModel:
    """The sizes of a model that is not here.

    Args:
        sizes: What `identity` says of the model.
    """

    hook_dict = None

    def __init__(self, sizes: dict[str, Any]):
        self.sizes = sizes
        self.cfg = SimpleNamespace(
            model_name=sizes["name"], n_layers=sizes["n_layers"], d_model=sizes["d_model"], d_vocab=sizes["d_vocab"]
        )
        self.moe_layers = tuple(sizes["moe_layers"])
        self.n_experts, self.top_k = sizes["n_experts"], sizes["top_k"]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise NoModelError(
            f"this cache was unpickled and has no model, whose {name} is needed: use cache.bind(model), which has one"
        )
