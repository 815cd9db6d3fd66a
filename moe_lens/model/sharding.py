"""Refusing models that are split within their layers: there a hook would see one process's shard."""

from collections.abc import Mapping
from typing import Any

from torch.distributed.tensor import DTensor

from moe_lens.errors import UnsupportedModelError

_INSTEAD = (
    "Load the model whole on every process (torchrun -m moe_lens … shares out the texts), or spread its layers over "
    'devices with device_map="auto"'
)


def refuse_plan(arguments: Mapping[str, Any]) -> None:
    """Refuse to load with tensor or expert parallelism, or fully sharded.

    Raises:
        UnsupportedModelError: the arguments of `from_pretrained` ask for it.
    """
    asked = [name for name in ("tp_plan", "tp_size", "distributed_config") if arguments.get(name) is not None]
    if asked:
        raise UnsupportedModelError(
            f"{asked[0]} splits layers and experts over processes, and a hook would see one process's shard of them. "
            f"{_INSTEAD}"
        )


def refuse_shards(model: Any) -> None:
    """Refuse a model that was loaded in that way.

    Raises:
        UnsupportedModelError: its parameters are shards.
    """
    split = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    size = getattr(model, "_tp_size", None) or 1
    if split or size > 1:
        what = f"{split[0]} is a shard" if split else f"it is split over {size} processes"
        raise UnsupportedModelError(
            f"this model was loaded with tensor or expert parallelism, or fully sharded ({what}), and a hook would see "
            f"one process's part of what it names. {_INSTEAD}"
        )
