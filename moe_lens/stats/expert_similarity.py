"""How alike experts are: their outputs on the same tokens, whichever were chosen, and their parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from moe_lens import names
from moe_lens.checked import AnyModel, Natural, Positive
from moe_lens.errors import InputError
from moe_lens.stats.accumulator import Accumulator, Result
from moe_lens.stats.observation import Hooks, each_layer
from moe_lens.stats.sums import Total

CHUNK = 2**24
"""Numbers of the rows of all experts' AAᵀ that are held at a time."""


@dataclass(frozen=True, eq=False)
class OutputSimilarityResult(Result):
    """Pairs of experts on the same tokens."""

    layers: tuple[Natural, ...]
    n_tokens: Int[Tensor, " layer"]
    """Sampled tokens, on each of which every expert was computed."""
    cosine: Float[Tensor, "layer n_experts n_experts"]
    """Mean over tokens of cos(E_i(x), E_j(x))."""
    correlation: Float[Tensor, "layer n_experts n_experts"]
    """⟨Ē_i, Ē_j⟩ / (‖Ē_i‖ ‖Ē_j‖) over tokens and dimensions, Ē the output minus the expert's mean over tokens.

    A direction that all experts add to every token makes cosines large and says nothing about what they do; here it is
    taken out.
    """
    null: Float[Tensor, "layer n_experts n_experts"]
    """Mean of cos(E_i(x), E_j(x′)), x′ another token: what the experts' mean directions alone give."""

    def to_frame(self) -> pd.DataFrame:
        """A row per layer and pair of experts, the lower first: cosine, null, correlation, tokens."""
        at, first, second = torch.triu(torch.ones_like(self.cosine, dtype=torch.bool), 1).nonzero().T
        columns = {name: getattr(self, name)[at, first, second].numpy() for name in ("cosine", "null", "correlation")}
        layers = torch.tensor(self.layers)[at].numpy()
        frame = pd.DataFrame({"layer": layers, "expert": first.numpy(), "other": second.numpy(), **columns})
        return frame.assign(tokens=self.n_tokens[at].numpy())


class OutputSimilarityStats(Accumulator[OutputSimilarityResult]):
    """Computes all experts on a sample of tokens, and sums how alike their outputs are.

    ```python
    alike = OutputSimilarityStats(model.moe_layers, model.n_experts)
    model.run_with_hooks(tokens, fwd_hooks=alike.hooks(model, sample))
    ```
    """

    def __init__(self, layers: Sequence[int], n_experts: Positive):
        self.layers, self.n_experts = tuple(layers), n_experts
        kinds = ("tokens", "cosine", "crossed", "gram", "sums")
        self._totals = {name: [Total() for _ in self.layers] for name in kinds}
        parts = {
            f"{name}.{layer}": part
            for name, of in self._totals.items()
            for layer, part in zip(self.layers, of, strict=True)
        }
        super().__init__({"layers": self.layers, "n_experts": n_experts}, parts)

    def update(self, layer: Natural, outputs: Float[Tensor, "tokens n_experts d_model"]) -> Self:
        """Count a sample of tokens in one layer.

        Args:
            layer: Which layer.
            outputs: E(x) of all experts, as `model.expert_outputs` computes it.

        Raises:
            InputError: another number of experts, or outputs that are not finite.
        """
        if outputs.shape[1] != self.n_experts:
            raise InputError(f"outputs of {outputs.shape[1]} experts; expected all {self.n_experts}")
        if not bool(outputs.isfinite().all()):
            raise InputError(f"layer {layer}: activations are not finite")
        if not len(outputs):
            return self
        i, out = self.layers.index(layer), outputs.double()
        unit = normalize(out, dim=-1)
        totals = {
            "tokens": torch.tensor(len(out)),
            "cosine": torch.einsum("tid,tjd->ij", unit, unit),
            "gram": torch.einsum("tid,tjd->ij", out, out),
            "sums": out.sum(0),
            "crossed": unit.sum(0),
        }
        for name, value in totals.items():
            self._totals[name][i].add(value)
        return self

    def hooks(self, model: AnyModel, sample: Bool[Tensor, "batch pos"], *, chunk: Positive = 64) -> Hooks:
        """Hooks for one forward pass that compute all experts at some of its tokens.

        Args:
            model: A `HookedMoE`.
            sample: The tokens; each costs as much as n_experts / top_k others.
            chunk: Tokens at a time: n_experts · d_model numbers each.
        """

        def consume(layer: int, of: dict[str, Tensor]) -> None:
            x = of[names.MLP_IN][sample.to(of[names.MLP_IN].device)]
            for part in x.split(chunk):
                every = torch.arange(self.n_experts, device=x.device).expand(len(part), -1)
                self.update(layer, model.expert_outputs(layer, part, every).detach())

        return each_layer(model, [names.MLP_IN], consume)

    def result(self) -> OutputSimilarityResult:
        """The sums so far."""
        if not all(part.seen for part in self._totals["tokens"]):
            raise InputError("no tokens were counted; update every layer with a batch that holds text first")
        total = {name: torch.stack([part.value for part in of]) for name, of in self._totals.items()}
        n = total["tokens"].double()[:, None, None]
        centred = total["gram"] - total["sums"] @ total["sums"].mT / n
        size = centred.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        # all pairs of tokens, less those of a token with itself
        crossed = (total["crossed"] @ total["crossed"].mT - total["cosine"]) / (n * (n - 1))
        return OutputSimilarityResult(
            layers=self.layers,
            n_tokens=total["tokens"],
            cosine=total["cosine"] / n,
            correlation=centred / (size[..., None] * size[..., None, :]),
            null=crossed,
        )


def _overlaps(a: Float[Tensor, "expert d_model d_expert"]) -> Float[Tensor, "expert expert"]:
    """‖AᵀB‖² of all pairs, as the inner product of AAᵀ and BBᵀ: some rows of all of these at a time."""
    n, d = a.shape[:2]
    found = a.new_zeros(n, n)
    for rows in a.split(max(1, CHUNK // (n * d)), dim=1):
        grams = (rows @ a.mT).flatten(1)
        found += grams @ grams.mT
    return found


def weight_similarity(model: AnyModel, layer: Natural) -> pd.DataFrame:
    """How alike the parameters of a layer's experts are.

    Args:
        model: A `HookedMoE`.
        layer: A layer with experts.

    Returns:
        A row per matrix (W_gate, W_in, W_out; W_gate only where experts have one) and pair of experts, lower first:
        `cosine` of the matrices as they are, neuron by neuron, and `subspace`, which does not depend on the order of
        the neurons: ‖AᵀB‖² / (‖AᵀA‖ ‖BᵀB‖) for matrices [d_model, d_expert], in [0, 1] (the cosine of AAᵀ and BBᵀ;
        linear CKA without centring, arXiv 1905.00414). `null` is what `subspace` is between independent Gaussian
        matrices of these sizes: compare with it and not with 0.
    """
    frames = []
    for name in ("W_gate", "W_in", "W_out"):
        matrices = getattr(model, name)[layer].detach()
        if name == "W_gate" and matrices.data_ptr() == model.W_in[layer].data_ptr():
            continue  # experts without a gated branch: there is one matrix, under both names
        a = (matrices if name != "W_out" else matrices.mT).float()  # [expert, d_model, d_expert]
        flat = normalize(a.flatten(1), dim=-1)
        cosine = (flat @ flat.mT).cpu()
        overlap = _overlaps(a).cpu()
        size = overlap.diagonal().sqrt()
        first, second = torch.triu_indices(len(a), len(a), 1)
        d, m = a.shape[1:]
        frames.append(
            pd.DataFrame(
                {
                    "matrix": name,
                    "expert": first.numpy(),
                    "other": second.numpy(),
                    "cosine": cosine[first, second].numpy(),
                    "subspace": (overlap / (size[:, None] * size))[first, second].numpy(),
                    # E‖AᵀB‖² = m² d and E‖AᵀA‖² = m d (m + d + 1) for standard normal entries
                    "null": m / (m + d + 1),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)
