"""Layers that a checkpoint has behind those that are loaded: cut off, or such as predict several tokens ahead.

transformers leaves both out. How many there can be is what config.json itself says, whatever was asked for.
"""

import copy
import re
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from moe_lens.errors import CheckpointError

PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers")
"""Names that configs have for the number of layers that predict several tokens ahead, behind the last layer."""


KINDS = ("layer_types", "mlp_layer_types", "num_attention_heads_per_layer", "kv_source_layers")
"""Names that configs have for lists of what each layer is, of which transformers wants as many as there are layers."""


class Depth(NamedTuple):
    """Numbers of layers."""

    loaded: int
    own: int
    """Of the model that config.json describes."""
    ahead: int
    """Behind those, predicting several tokens ahead."""

    @property
    def problems(self) -> list[str]:
        """What is wrong, as a line for an error: a layer that predicts ahead must not be taken for one of the model."""
        if 0 <= self.loaded <= self.own:
            return []
        return [f"num_hidden_layers is {self.loaded}, but config.json's model has {self.own} layers"]

    @property
    def predicting(self) -> range:
        """Numbers of the layers that predict ahead and are not loaded."""
        return range(self.own, self.own + self.ahead)

    @property
    def left_out(self) -> range:
        """Numbers of all layers behind those that are loaded."""
        return range(self.loaded, self.own + self.ahead)


def read_depth(config: PreTrainedConfig, own: PreTrainedConfig) -> Depth:
    """How many layers there are of a model of `config`, in a checkpoint whose config.json says what `own` holds."""
    loaded, text = blocks_of(config.get_text_config()), own.get_text_config()
    ahead = max(0, *(getattr(text, name, None) or 0 for name in PREDICTING))
    return Depth(loaded, blocks_of(text) if hasattr(text, "num_hidden_layers") else loaded, ahead)


def blocks_of(text: PreTrainedConfig) -> int:
    """The number of blocks. LongCat's `num_hidden_layers` counts two for each, one for each of its attentions."""
    blocks = getattr(text, "num_layers", None)
    return blocks if isinstance(blocks, int) else text.num_hidden_layers


def first_layers(raw: dict[str, Any], layers: int) -> dict[str, int] | None:
    """The word that has transformers load the first layers; None where only a config that is passed says it.

    Args:
        raw: What config.json holds.
        layers: Their number.
    """
    if isinstance(raw.get("text_config"), dict) or counts_its_list(raw):
        return None
    return {"num_layers" if "num_layers" in raw else "num_hidden_layers": layers}  # see blocks_of


def counts_its_list(raw: dict[str, Any]) -> bool:
    """Whether a config takes no number of layers, but counts the list of what each is (Nemotron-H)."""
    known = raw["model_type"] in CONFIG_MAPPING and "num_layers" not in raw
    return known and isinstance(getattr(CONFIG_MAPPING[raw["model_type"]], "num_hidden_layers", None), property)


def keep_first(config: PreTrainedConfig, layers: int) -> None:
    """Say in a config that only the first layers are loaded: of a multimodal model, those of the language model.

    Lists of what each layer is stay whole, as where transformers is told the number alone: see `cut_layer_types`.

    Raises:
        CheckpointError: it has fewer.
    """
    text: Any = config.get_text_config()
    own = blocks_of(text)
    if not 0 <= layers <= own:
        raise CheckpointError(f"first_n_layers is {layers}, but config.json's model has {own} layers")
    text.num_hidden_layers = layers
    if blocks_of(text) != layers:  # see counts_its_list
        text.layer_types = text.layer_types[:layers]


def cut_layer_types(config: PreTrainedConfig) -> None:
    """Take layers that were not loaded out of lists of what each layer is; transformers refuses to save longer ones.

    Not where the config would read them as something else: in a Gemma 4 the last layer is what it makes of it.
    """
    text = config.get_text_config()
    n_layers, held = blocks_of(text), vars(text)
    long = {name: held[name] for name in KINDS if len(held.get(name) or ()) > n_layers}
    if not long:
        return
    fewer = {name: kinds[:n_layers] for name, kinds in long.items()}
    try:
        again = type(text).from_dict(copy.deepcopy({**text.to_dict(), **fewer}))  # it may write into the lists it gets
    except (ValueError, StrictDataclassError):
        return
    if all(getattr(again, name) == kinds for name, kinds in fewer.items()):
        for name, kinds in fewer.items():
            setattr(text, name, kinds)


def layer_of(name: str, blocks: str) -> int:
    """The number of the layer that a tensor belongs to, in the list that is called `blocks`; -1 for none."""
    found = re.match(rf"{re.escape(blocks)}\.(\d+)\.", name)
    return int(found[1]) if found else -1


def list_of_layers(model: PreTrainedModel) -> str | None:
    """The name of a language model's list of layers, beside which a vision tower may have one of its own."""
    decoder = model.get_decoder()
    n_layers = blocks_of(model.config.get_text_config())
    lists = [part for part in decoder.modules() if isinstance(part, nn.ModuleList) and len(part) == n_layers]
    return next((name for name, module in model.named_modules() if any(module is part for part in lists)), None)
