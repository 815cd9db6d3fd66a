"""`ExpertMeans`: every expert's mean output over a reference, what "replaced by its mean" refers to."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.checked import Natural
from moe_lens.errors import InputError, not_files
from moe_lens.model.cache.moe_cache import MoECache
from moe_lens.protocols import Hooked, HookedModel, PaddedTokens, require_stream_width
from moe_lens.reprs import Summary
from moe_lens.selection import Selection
from moe_lens.storage import believed, load_tensors, save_tensors, whole_numbers

Batch = Mapping[str, Any] | PaddedTokens
"""Tokens and which of them are padding: what a tokenizer of transformers returns, or a `TokenBatch`."""


@dataclass(frozen=True, eq=False, repr=False)
class ExpertMeans(Summary):
    """Mean outputs E(x), not weighted, over the reference tokens that were routed to each expert."""

    layers: tuple[Natural, ...]
    """Layers of the model that the first axes stand for."""
    experts: Float[Tensor, "layer n_experts d_model"]
    """NaN for an expert that no token of the reference was routed to."""
    counts: Int[Tensor, "layer n_experts"]
    """How many tokens each mean is over."""
    shared: Float[Tensor, "layer d_model"] | None = None
    """Mean output of the shared experts over all tokens of the reference."""

    def __post_init__(self) -> None:
        if len(set(self.layers)) < len(self.layers) or len(self.layers) != len(self.experts):
            raise InputError(
                f"layers are {self.layers}, and there are means of {len(self.experts)}; expected each once"
            )

    def __repr__(self) -> str:
        unseen = int((self.counts == 0).sum())
        return f"ExpertMeans(layers {list(self.layers)}, {self.counts.shape[1]} experts each, {unseen} without tokens)"

    def of(self, layer: Natural) -> Float[Tensor, "n_experts d_model"]:
        """The means of one layer.

        Raises:
            InputError: the reference does not hold that layer.
        """
        return self.experts[self._row(layer)]

    def shared_of(self, layer: Natural) -> Float[Tensor, " d_model"]:
        """Mean output of a layer's shared experts.

        Raises:
            InputError: the reference does not hold that layer, or no shared experts.
        """
        if self.shared is None:
            raise InputError("the reference holds no outputs of shared experts")
        return self.shared[self._row(layer)]

    def require(self, layer: Natural, expert: Natural) -> None:
        """Raise unless an expert has a mean.

        Raises:
            InputError: no token of the reference was routed to it.
        """
        if bool(self.of(layer)[expert].isnan().any()):
            raise InputError(
                f"expert {expert} of layer {layer} has no mean: no token of the reference was routed to it. Take a "
                "larger reference, or reference.filled(), where such experts have their layer's mean"
            )

    def _row(self, layer: int) -> int:
        if layer not in self.layers:
            raise InputError(f"the reference has no means of layer {layer}; it has layers {list(self.layers)}")
        return self.layers.index(layer)

    def filled(self) -> "ExpertMeans":
        """Experts without tokens get the mean over all outputs of their layer."""
        weights = (self.counts / self.counts.sum(1, keepdim=True))[..., None].to(self.experts)
        layer_mean = (self.experts.nan_to_num() * weights).sum(1, keepdim=True)
        experts = torch.where(self.counts[..., None] == 0, layer_mean, self.experts)
        return ExpertMeans(self.layers, experts, self.counts, self.shared)

    @classmethod
    def of_sums(
        cls,
        layers: Iterable[int],
        sums: Float[Tensor, "layer n_experts d_model"],
        counts: Int[Tensor, "layer n_experts"],
        shared: Float[Tensor, "layer d_model"] | None = None,
    ) -> "ExpertMeans":
        """From the sum of each expert's outputs and the number of tokens that it is over."""
        return cls(tuple(layers), (sums / counts[..., None]).float(), counts, shared)

    @classmethod
    def of_cache(cls, cache: MoECache) -> "ExpertMeans":
        """From a cache's `hook_expert_out`, `hook_expert_indices` and `hook_shared_out`; padding is left out.

        So are experts that an intervention left out, as `hook_expert_kept` says, or zeros where it was not cached.

        Raises:
            InputError: it holds no layer's outputs and indices.
        """
        model: Any = cache.model
        require_stream_width(model, "means of their outputs")
        sums = ExpertSums(model.moe_layers, model.n_experts, model.cfg.d_model)
        for layer in model.moe_layers:
            wanted = [names.mlp(name, layer) for name in (names.EXPERT_INDICES, names.EXPERT_OUT)]
            if not all(name in cache for name in wanted):
                continue
            sums.count(cache, layer)
        if not sums.seen:
            wanted = [names.EXPERT_INDICES, names.EXPERT_OUT]
            raise InputError(f"the reference cache holds {' and '.join(wanted)} of no layer; cache them")
        return sums.result()

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        model: Hooked,
        input: str | Sequence[str | Tensor] | Tensor | Batch,
        *,
        layers: Iterable[int] | None = None,
    ) -> "ExpertMeans":
        """Run a model over reference texts or tokens, text by text, and keep the means alone.

        Args:
            model: A `HookedMoE`.
            input: A text, texts, tokens [batch, pos] or [pos] without padding, tokens of one text after another, or a
                batch with a mask: what a tokenizer returns, or a `TokenBatch`.
            layers: Which; all that have experts if not given.
        """
        require_stream_width(model, "means of their outputs")
        wanted = model.moe_layers if layers is None else tuple(layers)
        hooks = names.EXPERT_INDICES, names.EXPERT_OUT, names.EXPERT_KEPT
        kept = [names.mlp(name, at) for at in wanted for name in hooks]
        kept += [names.mlp(names.SHARED_OUT, at) for at in wanted if model.has_shared(at)]
        sums = ExpertSums(wanted, model.n_experts, model.cfg.d_model)
        alone = isinstance(input, str | Mapping | PaddedTokens) or (isinstance(input, Tensor) and input.ndim == 1)
        texts: Any = [input] if alone else input
        for text in texts:
            _, cache = model.run_with_cache(text, names_filter=kept)
            for layer in wanted:
                sums.count(cache, layer)
        return sums.result()

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        tensors = {"experts": self.experts, "counts": self.counts}
        if self.shared is not None:
            tensors["shared"] = self.shared
        save_tensors(path, "ExpertMeans", tensors, {"layers": self.layers})

    @classmethod
    def load(cls, path: str | Path) -> "ExpertMeans":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, broken or holds something else.
        """
        tensors, header = load_tensors(path, "ExpertMeans")
        if not {"experts", "counts"} <= tensors.keys():
            raise InputError(f"{path} holds {sorted(tensors)}; expected at least experts and counts")
        with believed(path, "ExpertMeans"):
            return cls(whole_numbers("layers", header["layers"], least=0), **tensors)


class ExpertSums:
    """Accumulates `ExpertMeans`; memory does not grow."""

    def __init__(self, layers: Sequence[int], n_experts: int, d_model: int):
        self.layers = tuple(layers)
        self._counts = torch.zeros(len(self.layers), n_experts, dtype=torch.long)
        self._sums = torch.zeros(len(self.layers), n_experts, d_model, dtype=torch.float64)
        self._tokens = torch.zeros(len(self.layers), dtype=torch.long)
        self._shared = torch.zeros(len(self.layers), d_model, dtype=torch.float64)

    @property
    def seen(self) -> tuple[int, ...]:
        """Layers that were updated."""
        return tuple(layer for layer, count in zip(self.layers, self._counts.sum(1).tolist(), strict=True) if count)

    def update(
        self,
        layer: int,
        indices: Int[Tensor, "*tokens top_k"],
        outputs: Float[Tensor, "*tokens top_k d_model"],
        counted: Bool[Tensor, "*tokens"],
        shared: Float[Tensor, "*tokens d_model"] | None = None,
        kept: Bool[Tensor, "*tokens top_k"] | None = None,
    ) -> "ExpertSums":
        """Count one layer of a batch.

        Args:
            layer: Which layer.
            indices: The experts of each token.
            outputs: Their E(x).
            counted: The tokens to count.
            shared: Output of the shared experts; for every batch or for none.
            kept: The slots whose expert was computed; all if not given.
        """
        row = self.layers.index(layer)
        counted = counted.to(indices.device)
        slots = counted[..., None].expand(indices.shape) if kept is None else kept & counted[..., None]
        chosen = indices[slots].long().cpu()
        self._counts[row] += torch.bincount(chosen, minlength=self._counts.shape[1])
        self._sums[row].index_add_(0, chosen, outputs[slots].double().cpu())
        if shared is not None:
            self._tokens[row] += int(counted.sum())
            self._shared[row] += shared[counted].double().cpu().sum(0)
        return self

    def count(self, cache: MoECache, layer: int) -> None:
        """Count one layer of a cache; padding, and experts that an intervention left out, are not counted."""
        indices, outputs = (cache[names.mlp(name, layer)] for name in (names.EXPERT_INDICES, names.EXPERT_OUT))
        kept = names.mlp(names.EXPERT_KEPT, layer)
        shared = [cache[name] for name in [names.mlp(names.SHARED_OUT, layer)] if name in cache]
        real = torch.ones(indices.shape[:-1], dtype=torch.bool) if cache.mask is None else cache.mask
        # What was left out is zero; it is the hook that tells it from an expert that gives zero.
        computed = cache[kept] if kept in cache else outputs.any(-1)
        self.update(layer, indices, outputs, real, *shared, kept=computed)

    def merge(self, other: "ExpertSums") -> "ExpertSums":
        """Add the sums of another accumulator of the same model."""
        self._counts += other._counts
        self._sums += other._sums
        self._tokens += other._tokens
        self._shared += other._shared
        return self

    def result(self) -> ExpertMeans:
        """The means so far, of the layers that were updated."""
        rows = [self.layers.index(layer) for layer in self.seen]
        tokens = self._tokens[rows]
        shared = (self._shared[rows] / tokens[:, None]).float() if len(rows) and bool(tokens.all()) else None
        return ExpertMeans.of_sums(self.seen, self._sums[rows], self._counts[rows], shared)


Reference = ExpertMeans | MoECache | Path | str | Sequence[str | Tensor] | Tensor | Batch
"""Means, a cache, the file of saved means, a text, texts, tokens, or a batch with a mask. A `str` is a file where there
is one of that name, or where it ends in `.safetensors`, and otherwise a text."""


def means_for(model: HookedModel, reference: Reference, selection: Selection) -> ExpertMeans:
    """The reference's means, checked for every expert that is named; raises `InputError` where one is missing."""
    if isinstance(reference, Path | str) and _is_file(reference):
        means = ExpertMeans.load(reference)
    elif isinstance(reference, MoECache):
        means = ExpertMeans.of_cache(reference)
    elif isinstance(reference, ExpertMeans):
        means = reference
    elif isinstance(reference, str | Sequence | Tensor | Mapping | PaddedTokens) and _holds_any(reference):
        if isinstance(reference, Sequence) and not isinstance(reference, str):
            not_files(reference, "the texts of the reference", "reference=path reads the means that were saved to one")
        means = ExpertMeans.measure(model, reference, layers=selection.layers_of(model))
    else:
        came = repr(reference) if isinstance(reference, Sequence) else type(reference).__name__
        raise InputError(f"the reference is {came}; expected ExpertMeans, their file, a cache, a text, texts or tokens")
    sizes = model.n_experts, model.cfg.d_model
    if tuple(means.experts.shape[1:]) != sizes:
        came = tuple(means.experts.shape[1:])
        raise InputError(f"the reference has means of {came} (n_experts, d_model); the model has {sizes}")
    for layer in selection.layers_of(model):
        if selection.shared and model.has_shared(layer):
            means.shared_of(layer)
        for expert in (selection.by_layer or {}).get(layer, ()):
            means.require(layer, expert)
        means.of(layer)
    return means


def _is_file(reference: Path | str) -> bool:
    """Whether a file is meant, and no text."""
    if isinstance(reference, Path) or reference.endswith(".safetensors"):
        return True
    try:
        there = Path(reference).exists()
    except (OSError, ValueError):  # too long for a name, or with characters that no name has
        return False
    if not there and _PATH.fullmatch(reference):
        raise InputError(
            f"reference: there is no file {reference}; if this is a text, put it in a list: [{reference!r}]"
        )
    return there


_PATH = re.compile(r"\S+\.[A-Za-z]\w{0,15}|\S*[/\\]\S*")
"""What is more likely the name of a file than a text: no space, and a suffix or folders."""


def _holds_any(reference: Any) -> bool:
    return isinstance(reference, PaddedTokens) or len(reference) > 0
