"""`LensResult`: the predictions of a lens, as tensors, tables and a file."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checked import Natural
from moe_lens.errors import InputError
from moe_lens.partial_sum import PartialSum
from moe_lens.reprs import Drawn
from moe_lens.storage import believed, load_tensors, save_tensors

AGREEMENTS = ("agrees_final", "agrees_ensemble", "agrees_layer")
QUANTITIES = ("entropy", "cross_entropy", "target_rank", "kl_final", "kl_ensemble", *AGREEMENTS)
"""Numbers that a result has for every cell."""


@dataclass(frozen=True, eq=False, repr=False)
class LensResult(Drawn):
    """What a lens reads at some layers, sums and positions, all in nats. Tensors are on the CPU.

    "Final" is the model's own prediction, "ensemble" the lens on `u + routed` of that layer, and "layer" the lens on
    the layer's whole output. Cells that cannot be read hold token −1, rank −1 and NaN: padding, sums that name experts
    or ranks in a dense layer, and sums of experts none of which the token selected.
    """

    layers: tuple[Natural, ...]
    sums: tuple[PartialSum, ...]
    positions: tuple[Natural, ...]
    """Along the position axis of the cache."""
    dense: tuple[Natural, ...]
    """The layers without experts; sums over all experts are u plus the whole MLP there."""
    never_selected: tuple[tuple[Natural, Natural], ...]
    """(layer, expert) of experts that a sum names and no token of the text selected."""
    texts: Mapping[int, str]
    """The text of each token in the result; empty if the model has no tokenizer."""
    targets: Int[Tensor, "batch pos"]
    """The tokens that `cross_entropy` and `target_rank` refer to: by default the next ones of the text; −1 if none."""
    top_tokens: Int[Tensor, "layer sum batch pos top"]
    """The most likely tokens, best first."""
    top_logits: Float[Tensor, "layer sum batch pos top"]
    top_probs: Float[Tensor, "layer sum batch pos top"]
    """Softmax over the whole vocabulary, in [0, 1]."""
    entropy: Float[Tensor, "layer sum batch pos"]
    """−Σ p log p, in [0, log d_vocab]."""
    cross_entropy: Float[Tensor, "layer sum batch pos"]
    """−log p(target); NaN where there is no target."""
    target_rank: Int[Tensor, "layer sum batch pos"]
    """How many tokens have a greater logit than the target: 0 is the best; −1 where there is no target."""
    kl_final: Float[Tensor, "layer sum batch pos"]
    """KL(final ‖ lens): how far the lens is from the model's own prediction."""
    kl_ensemble: Float[Tensor, "layer sum batch pos"]
    """KL(ensemble ‖ lens): how far this sum's prediction is from that of all routed experts."""
    agrees_final: Float[Tensor, "layer sum batch pos"]
    """1 where the lens and the final prediction have the same most likely token, else 0."""
    agrees_ensemble: Float[Tensor, "layer sum batch pos"]
    """1 where the lens and the ensemble have the same most likely token, else 0."""
    agrees_layer: Float[Tensor, "layer sum batch pos"]
    """1 where the sum and the whole layer have the same most likely token, else 0."""
    expert: Int[Tensor, "layer sum batch pos"]
    """The only routed expert of the sum at that token; −1 where it has none or several."""
    weight: Float[Tensor, "layer sum batch pos"]
    """What that expert's output is multiplied by; NaN where `expert` is −1."""

    def __post_init__(self) -> None:
        cells, shape = (len(self.layers), len(self.sums), len(self.positions)), self.top_tokens.shape
        if cells != (shape[0], shape[1], shape[3]):
            raise InputError(
                f"tensors are of {shape[0]} layers × {shape[1]} sums × {shape[3]} positions; expected {cells[0]} × "
                f"{cells[1]} × {cells[2]}, as layers, sums and positions have it"
            )

    def __repr__(self) -> str:
        _, _, batch, pos, _ = self.top_tokens.shape
        return f"LensResult({len(self.layers)} layers × {len(self.sums)} sums × {batch} × {pos} tokens)"

    def text(self, token: Natural) -> str:
        """The text of a token; `#17` if it is not known."""
        return self.texts.get(token, f"#{token}")

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, sum, batch and position: the most likely token, and all numbers of the cell.

        Cells that cannot be read are left out.
        """
        index = pd.MultiIndex.from_product(self._axes(), names=["layer", "sum", "batch", "pos"])
        best = {"token": self.top_tokens, "logit": self.top_logits, "prob": self.top_probs}
        columns = {name: value[..., 0].flatten().numpy() for name, value in best.items()}
        columns |= {name: getattr(self, name).flatten().numpy() for name in (*QUANTITIES, "expert", "weight")}
        return self._readable(pd.DataFrame(columns, index=index))

    def top_frame(self) -> pd.DataFrame:
        """One row per layer, sum, batch, position and place (0 the most likely token): token, logit, prob and text."""
        places = range(self.top_tokens.shape[-1])
        index = pd.MultiIndex.from_product([*self._axes(), places], names=["layer", "sum", "batch", "pos", "place"])
        values = {"token": self.top_tokens, "logit": self.top_logits, "prob": self.top_probs}
        return self._readable(
            pd.DataFrame({name: value.flatten().numpy() for name, value in values.items()}, index=index)
        )

    def _axes(self) -> list[Any]:
        return [self.layers, [which.label for which in self.sums], range(self.top_tokens.shape[2]), self.positions]

    def _readable(self, frame: pd.DataFrame) -> pd.DataFrame:
        kept = frame[frame["token"] >= 0].reset_index()
        kept["text"] = [self.text(token) for token in kept["token"].tolist()]
        return kept

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file.

        Raises:
            InputError: it cannot be written there.
        """
        save_tensors(path, type(self).__name__, *self.parts())

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it as tensors and as plain values that JSON can hold."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        header = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        header["sums"] = [vars(which) for which in self.sums]
        header["texts"] = {str(token): text for token, text in self.texts.items()}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}, header

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, broken or holds something else.
        """
        tensors, header = load_tensors(path, cls.__name__)
        lacking = {field.name for field in fields(cls)} - tensors.keys() - header.keys()
        if lacking:
            raise InputError(f"{path} is not whole: it lacks {', '.join(sorted(lacking))}")
        with believed(path, cls.__name__):
            return cls.of_parts(tensors, header)

    @classmethod
    def of_parts(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Self:
        """The inverse of `parts`."""
        values: dict[str, Any] = {**tensors, **{f.name: header[f.name] for f in fields(cls) if f.name in header}}
        values |= {name: tuple(header[name]) for name in ("layers", "positions", "dense")}
        values["sums"] = tuple(PartialSum(**which) for which in header["sums"])
        values["never_selected"] = tuple((layer, expert) for layer, expert in header["never_selected"])
        values["texts"] = {int(token): text for token, text in header["texts"].items()}
        return cls(**values)


def blank(n_layers: int, n_sums: int, batch: int, pos: int, top: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a result in which nothing has been read yet."""
    cells = n_layers, n_sums, batch, pos
    whole = {name: torch.full(cells, -1) for name in ("target_rank", "expert")}
    whole["top_tokens"] = torch.full((*cells, top), -1)
    for name in ("top_logits", "top_probs"):
        whole[name] = torch.full((*cells, top), torch.nan, dtype=dtype)
    for name in (*QUANTITIES, "weight"):
        whole.setdefault(name, torch.full(cells, torch.nan, dtype=dtype))
    return whole
