"""The study `checkpoints`: do two checkpoints (base and chat, before and after tuning) route the same texts alike?

And is it their routers that differ, or what these read? Each is also run with the routers of the other.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.checked import Natural, Positive
from moe_lens.data import Reading, TokenBatch
from moe_lens.errors import InputError
from moe_lens.interventions.router_swap import swapped_routers
from moe_lens.resampling import bootstrap_all
from moe_lens.routing import LayerRouting
from moe_lens.stats import Accumulator, Result
from moe_lens.stats.observation import routed, routing_hooks
from moe_lens.stats.sums import BySource
from moe_lens.studies.forward_passes import losses, predicted
from moe_lens.studies.frames import by_domain
from moe_lens.studies.model_facts import model_facts
from moe_lens.studies.study import Gathered, Study

RUNS = ("first", "first with the other's routers", "other", "other with the first's routers")
PAIRS = {"checkpoints": (0, 2), "routers": (0, 1), "all but routers": (1, 2)}
"""Which runs are set side by side: both as they are; the first, with its own routers and with the other's; and the two
with the other's routers. Later layers differ also because earlier ones did."""
_TEXT = "The 3 (quick) foxes said: « là-bas »\n"


@dataclass(frozen=True)
class Checkpoints(Study):
    """Overlap of the experts that two checkpoints choose, and what swapping their routers costs."""

    other: Any
    """A `HookedMoE` of the same shape as the one that is studied, with the same tokenizer."""
    other_name: str = "other"

    name: ClassVar[str] = "checkpoints"
    passes: ClassVar[tuple[str, ...]] = ("routing",)

    def settings(self) -> dict[str, Any]:
        """Facts of the other checkpoint."""
        return {"other": model_facts(self.other, self.other_name)}

    def check(self, model: Any) -> None:
        """Refuse models of different shapes, or that read texts differently."""
        shapes = [
            {"layers": of.moe_layers, "experts": of.n_experts, "top_k": of.top_k, "vocabulary": int(of.cfg.d_vocab)}
            for of in (model, self.other)
        ]
        if shapes[0] != shapes[1]:
            raise InputError(f"the checkpoints have {shapes[0]} and {shapes[1]}; expected two of one shape")
        if self.other.tokenizer is not None and model.own_ids(_TEXT) != self.other.own_ids(_TEXT):
            raise InputError("the tokenizers of the two checkpoints read texts differently; expected the same tokens")
        with swapped_routers(model, self.other):
            pass

    def read_as(self, reading: Reading) -> Reading:
        """Windows within the context of the other checkpoint, too."""
        return replace(reading, context=min(reading.context, int(self.other.cfg.n_ctx)))

    def begin(self, model: Any, name: str) -> Gathered:  # noqa: ARG002
        """Empty sums."""
        return {"overlap": OverlapStats(model.moe_layers, model.n_experts, model.top_k)}

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:  # noqa: ARG002
        """Run both, and both with the routers of the other."""
        chosen, nats = [], []
        for one, routers in ((model, None), (model, self.other), (self.other, None), (self.other, model)):
            layers: dict[int, LayerRouting] = {}
            with nullcontext() if routers is None else swapped_routers(one, routers):
                nats.append(losses(one, batch, routing_hooks(one, layers)))
            chosen.append(routed(one, batch, layers).routing.indices.cpu())
        into["overlap"].update(torch.stack(chosen), torch.stack(nats), batch.counted, predicted(batch), batch.sources)

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """Sums of overlaps and losses."""
        return {"overlap": earlier["routing"]["overlap"].result()}

    def tables(
        self,
        model: Mapping[str, Any],  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """`overlap` and `losses`: see `Overlap`."""
        found = {domain: of["overlap"] for domain, of in results.items()}
        kept = {domain: of for domain, of in found.items() if isinstance(of, Overlap)}
        return {
            "overlap": by_domain({domain: of.to_frame() for domain, of in kept.items()}),
            "losses": by_domain({domain: of.losses() for domain, of in kept.items()}),
        }


@dataclass(frozen=True, eq=False)
class Overlap(Result):
    """Sums over the tokens of each source."""

    layers: tuple[Natural, ...]
    top_k: Positive
    sources: tuple[str, ...]
    tokens: Int[Tensor, " source"]
    same: Int[Tensor, "source pair layer 2"]
    """Experts that both runs of a pair chose; and tokens of which both chose the same first."""
    loads: Int[Tensor, "source run layer n_experts"]
    """Tokens that chose each expert."""
    nats: Float[Tensor, "source run"]
    predicted: Int[Tensor, " source"]

    def to_frame(self) -> pd.DataFrame:
        """A row per pair of runs (`PAIRS`) and layer.

        Columns: overlap (share of the experts that a token chooses in one run which it chooses in the other, too), low,
        high (95 % over sources), top1 (share of tokens with the same first expert, with top1_low, top1_high), by_load
        (overlap of two routers that use experts as often as these and pay no heed to the token), uniform (top_k /
        experts), tokens, sources.
        """
        tokens, n = self.tokens.double(), self.loads.shape[-1]
        size = torch.tensor([self.top_k, 1.0], dtype=torch.float64)
        same = self.same.double() / size

        def share(times: Tensor) -> Tensor:
            return torch.tensordot(times, same, 1) / (times @ tokens)[:, None, None, None]

        value = share(torch.ones(1, len(tokens), dtype=torch.float64))[0]
        ends = bootstrap_all(share, self.tokens)
        ends = torch.full((2, *value.shape), torch.nan) if ends is None else ends
        loads = self.loads.sum(0).double() / tokens.sum()
        frames = []
        for number, (pair, (one, other)) in enumerate(PAIRS.items()):
            columns = {"overlap": value[number, :, 0], "low": ends[0, number, :, 0], "high": ends[1, number, :, 0]}
            columns |= {"top1": value[number, :, 1], "top1_low": ends[0, number, :, 1]}
            columns |= {"top1_high": ends[1, number, :, 1], "by_load": (loads[one] * loads[other]).sum(-1) / self.top_k}
            frame = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
            frame.insert(0, "layer", list(self.layers))
            frame.insert(0, "pair", pair)
            frames.append(frame)
        about = {"uniform": self.top_k / n, "tokens": int(self.tokens.sum()), "sources": len(self.sources)}
        return pd.concat(frames, ignore_index=True).assign(**about)

    def losses(self) -> pd.DataFrame:
        """A row per run (`RUNS`): loss (nats a token), added (beyond the model's own routers), low, high, tokens."""
        n = self.predicted.double()
        added = self.nats - self.nats[:, [0, 0, 2, 2]]

        def mean(times: Tensor) -> Tensor:
            return (times @ added) / (times @ n)[:, None]

        ends = bootstrap_all(mean, self.predicted)
        low, high = torch.full((2, len(RUNS)), torch.nan) if ends is None else ends
        columns = {"loss": self.nats.sum(0) / n.sum(), "added": added.sum(0) / n.sum(), "low": low, "high": high}
        frame = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        frame.insert(0, "run", list(RUNS))
        return frame.assign(tokens=int(self.predicted.sum()), sources=len(self.sources))


class OverlapStats(Accumulator[Overlap]):
    """Counts experts that runs share."""

    def __init__(self, layers: Sequence[int], n_experts: Positive, top_k: Positive):
        self.layers, self.n_experts, self.top_k = tuple(layers), n_experts, top_k
        self._sums = {name: BySource() for name in ("tokens", "same", "loads", "nats", "predicted")}
        super().__init__({"layers": self.layers, "n_experts": n_experts, "top_k": top_k}, self._sums)

    def update(
        self,
        chosen: Int[Tensor, "run layer batch pos top_k"],
        nats: Float[Tensor, "run batch pos"],
        counted: Bool[Tensor, "batch pos"],
        predicted: Bool[Tensor, "batch pos"],
        sources: Sequence[str],
    ) -> Self:
        """Count a batch.

        Args:
            chosen: Experts of each token, the first one first.
            nats: Loss of each token.
            counted: Tokens whose routing counts.
            predicted: Tokens whose loss counts.
            sources: Of each row.

        Raises:
            InputError: A loss is not finite.
        """
        nats = nats.double().masked_fill(~predicted, 0)
        if not nats.isfinite().all():
            raise InputError("a loss is not finite: the logits hold infinities where the true token is")
        hot = torch.zeros(*chosen.shape[:-1], self.n_experts, dtype=torch.bool).scatter_(-1, chosen, True)
        hot &= counted[..., None]
        same = []
        for one, other in PAIRS.values():
            first = (chosen[one, ..., 0] == chosen[other, ..., 0]) & counted
            same.append(torch.stack([(hot[one] & hot[other]).sum((-1, -2)), first.sum(-1)], -1))
        self._sums["tokens"].add(counted.sum(-1), sources)
        self._sums["same"].add(torch.stack(same).permute(2, 0, 1, 3), sources)
        self._sums["loads"].add(hot.sum(3).permute(2, 0, 1, 3), sources)
        self._sums["nats"].add(nats.sum(-1).T, sources)
        self._sums["predicted"].add(predicted.sum(-1), sources)
        return self

    def result(self) -> Overlap:
        """The sums so far."""
        of = {name: sums.stacked() for name, sums in self._sums.items() if sums.sources}
        if not of:
            raise InputError("no tokens were counted; is there any text?")
        return Overlap(self.layers, self.top_k, self._sums["tokens"].sources, **of)
