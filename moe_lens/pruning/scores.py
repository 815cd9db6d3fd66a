"""Scores: how much each expert matters to a set of texts, by one of several definitions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import Natural, Positive
from moe_lens.errors import InputError
from moe_lens.reprs import Summary
from moe_lens.storage import believed, load_tensors, save_tensors, whole_numbers

Method = Literal[
    "frequency", "summed_weight", "ean", "weighted_ean", "reap", "naee", "gradient", "knockout", "random", "selected"
]

METHODS: dict[str, str] = {
    "frequency": "share of tokens whose selected set contains the expert",
    "summed_weight": "sum of its routing weights over tokens, divided by their number",
    "ean": "sum over its tokens of ‖E(x)‖, divided by the number of all: expert activation norm",
    "weighted_ean": "sum over its tokens of g ‖E(x)‖, divided by the number of all",
    "reap": "mean over its tokens of g ‖E(x)‖ (REAP, arXiv 2510.13999)",
    "naee": "mean over tokens of ‖F(x) − F₋ₑ(x)‖², F the layer, F₋ₑ without the expert (NAEE, arXiv 2402.14800)",
    "gradient": "loss that removing its contribution would add, by first order: −Σ ∂L/∂(gE) · gE, nats a token",
    "knockout": "loss that removing its contribution adds, measured: one run for each expert, nats a token",
    "random": "uniform in [0, 1), the control",
    "selected": "1 if any token chose it, else 0",
}
"""What each method measures; experts with larger scores are kept."""
assert set(METHODS) == set(get_args(Method))


@dataclass(frozen=True, eq=False)
class Scores(Summary):
    """Scores of every expert, by domain."""

    method: str
    model: Mapping[str, Any]
    """The model's identity: its name, its sizes, and what its routers are like."""
    layers: tuple[Natural, ...]
    """The layers that have experts."""
    top_k: Positive
    """Active experts of a token."""
    domains: tuple[str, ...]
    tokens: tuple[Natural, ...]
    """Calibration tokens of each domain."""
    texts: str
    """Fingerprint of the calibration data: SHA-256 of its tokens."""
    values: Float[Tensor, "domain layer n_experts"]

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        for name in ("domains", "layers"):
            if len(set(given := getattr(self, name))) < len(given):
                raise InputError(f"{name} are {given}; expected each once")
        if len(shape) != 3 or shape[:2] != (len(self.domains), len(self.layers)):
            raise InputError(
                f"values have shape {shape}; expected {len(self.domains)} domains × {len(self.layers)} layers × experts"
            )
        if len(self.tokens) != len(self.domains):
            raise InputError(f"tokens are {self.tokens} for the domains {self.domains}; expected a number for each")
        check_sizes(self.model, self.layers, shape[-1])
        if not 1 <= self.top_k <= shape[-1]:
            raise InputError(f"top_k is {self.top_k}; expected 1 to {shape[-1]}, the number of experts")
        if not self.values.isfinite().all():
            raise InputError("values hold NaN or infinity, and experts cannot be ranked by it")

    def of(self, domain: str | None = None) -> Float[Tensor, "layer n_experts"]:
        """Scores in one domain, or the mean over domains, each counting the same.

        Raises:
            InputError: there is no such domain.
        """
        if domain is None:
            return self.values.mean(0)
        if domain not in self.domains:
            raise InputError(f"there are no scores for domain {domain!r}; there are some for {', '.join(self.domains)}")
        return self.values[self.domains.index(domain)]

    def to_frame(self) -> pd.DataFrame:
        """One row per domain, layer and expert: score, tokens."""
        index = pd.MultiIndex.from_product(
            [self.domains, self.layers, range(self.values.shape[-1])], names=["domain", "layer", "expert"]
        )
        frame = pd.DataFrame({"score": self.values.flatten().numpy()}, index=index).reset_index()
        tokens = dict(zip(self.domains, self.tokens, strict=True))
        frame["tokens"] = [tokens[domain] for domain in frame["domain"]]
        return frame.assign(method=self.method)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        header = {name: getattr(self, name) for name in ("method", "layers", "top_k", "domains", "tokens", "texts")} | {
            "model": dict(self.model)
        }
        save_tensors(path, "Scores", {"values": self.values}, header)

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, broken or holds something else.
        """
        tensors, header = load_tensors(path, "Scores")
        with believed(path, "Scores"):
            fields = {name: header[name] for name in ("method", "model", "texts")}
            fields["layers"] = whole_numbers("layers", header["layers"], least=0)
            fields["tokens"] = whole_numbers("tokens", header["tokens"], least=0)
            (fields["top_k"],) = whole_numbers("top_k", [header["top_k"]], least=1)
            return cls(**fields, domains=tuple(header["domains"]), values=tensors["values"])


def check_sizes(model: Any, layers: tuple[int, ...], n_experts: int) -> None:
    """Make sure that scores of these layers and so many experts can be of a model.

    Args:
        model: Its identity.
        layers: Those with experts, in any order, as the scores have them.
        n_experts: Of a layer, as the scores have it.

    Raises:
        InputError: It is no identity, or that of a model with other layers or another number.
    """
    if not isinstance(model, Mapping):
        raise InputError(f"model is {model!r:.60}; expected its name and sizes")
    if model.get("n_experts", n_experts) != n_experts:
        raise InputError(f"there are scores of {n_experts} experts a layer; the model has {model['n_experts']!r}")
    there = model.get("moe_layers", layers)
    if not isinstance(there, list | tuple) or set(there) != set(layers):
        raise InputError(f"there are scores of the layers {list(layers)}; the model has experts in {there!r:.200}")
