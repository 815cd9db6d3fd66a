"""How a lens goes over a cache: chunk by chunk of tokens, and in each over layers and sums."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lens import names
from moe_lens.errors import HookError, InputError, a_kind
from moe_lens.ids import in_order
from moe_lens.lenses.lens_result import LensResult, blank
from moe_lens.lenses.metrics import Distribution, read
from moe_lens.model.loading.dispatch import output_place
from moe_lens.partial_sum import PartialSum

CHUNK = 2**24
"""Greatest number of logits of one kind held at a time: 64 MB in float32. At most five kinds are: the final
prediction, the ensemble, the layer, the sum that is being read, and a copy of it in another precision."""

ENSEMBLE, LAYER = PartialSum(), PartialSum(shared=True)


class Decoding:
    """One reading of a cache: its axes, checked."""

    def __init__(
        self,
        lens: Any,
        cache: Any,
        sums: Sequence[PartialSum],
        layers: Sequence[int] | None,
        positions: Sequence[int] | None,
    ):
        model = lens.model
        if not hasattr(cache, "require"):
            raise InputError(f"cache is {a_kind(cache)}; expected the MoECache that run_with_cache returns")
        if cache.model is not model:
            raise InputError(
                f"the cache was made by another model ({cache.model.cfg.model_name}); this lens reads that of "
                f"{model.cfg.model_name} which it was given. Make both of the same HookedMoE"
            )
        if not sums:
            raise InputError("a lens needs at least one sum to read")
        self.lens, self.model, self.cache, self.sums = lens, model, cache, tuple(sums)
        count = model.cfg.n_layers
        self.layers = in_order("layers", range(count) if layers is None else layers, count)
        self.dense = tuple(layer for layer in self.layers if layer not in model.moe_layers)
        for which in self.sums:
            if not any(self._has(layer, which) for layer in self.layers):
                raise HookError(
                    f"{which.label!r} cannot be read: layers {list(self.layers)} are dense; the layers with experts "
                    f"are {list(model.moe_layers)}"
                )
        cache.require(lens.hooks(self.layers, self.sums))
        shape = cache[names.block(names.RESID_MID, self.layers[0])].shape
        self.batch, length = shape[0] if cache.has_batch_dim else 1, shape[-2]
        self.positions = in_order("positions", range(length) if positions is None else positions, length)

    def run(self, targets: Int[Tensor, "batch pos"] | None, top: int) -> LensResult:
        """Read everything."""
        d_vocab = self.model.cfg.d_vocab
        if not 1 <= top <= d_vocab:
            raise InputError(f"top is {top}; expected 1 to {d_vocab}")
        to_find = self._following() if targets is None else targets.cpu()
        if to_find.shape != (self.batch, len(self.positions)) or ((to_find >= d_vocab) | (to_find < -1)).any():
            ends = f"from {int(to_find.min())} to {int(to_find.max())}" if to_find.numel() else "none"
            raise InputError(
                f"targets are {tuple(to_find.shape)}, {ends}; expected ids below {d_vocab}, or −1 for none, in the "
                f"shape {(self.batch, len(self.positions))} of batch and positions"
            )
        _, kept = output_place(self.model.original_model)
        cells = blank(
            len(self.layers),
            len(self.sums),
            self.batch,
            len(self.positions),
            top,
            torch.promote_types(kept, torch.float32),
        )
        flat = {name: value.flatten(2, 3) for name, value in cells.items()}  # views: what is written shows in `cells`
        for chunk in self._real().split(max(1, CHUNK // d_vocab)):
            if len(chunk):  # nothing but padding gives one empty chunk
                self._read(chunk, flat, to_find.flatten()[chunk], top)
        return LensResult(
            layers=self.layers,
            sums=self.sums,
            positions=self.positions,
            dense=self.dense,
            never_selected=self._never_selected(),
            texts=self._texts(cells["top_tokens"], to_find),
            targets=to_find,
            **cells,
        )

    def _read(self, chunk: Tensor, flat: dict[str, Tensor], targets: Tensor, top: int) -> None:
        """Read some tokens, numbered through batch and positions, in all layers and sums."""
        pos = torch.tensor(self.positions)[chunk % len(self.positions)]
        at = (chunk // len(self.positions), pos) if self.cache.has_batch_dim else (pos,)
        last = names.block(names.RESID_POST, self.model.cfg.n_layers - 1)
        final = Distribution.of(self._wide(self.lens.unembed(self.cache[last][at])))
        for i, layer in enumerate(self.layers):
            cells = {name: value[i] for name, value in flat.items()}
            self._read_layer(layer, chunk, at, final, cells, targets, top)

    def _read_layer(
        self,
        layer: int,
        chunk: Tensor,
        at: tuple[Tensor, ...],
        final: Distribution,
        cells: dict[str, Tensor],
        targets: Tensor,
        top: int,
    ) -> None:
        """Read the sums of one layer. On return its logits are gone, before those of the next are made."""
        whole = {ENSEMBLE: self._logits(layer, ENSEMBLE, at)}
        alone = layer in self.dense or not self.model.has_shared(layer)
        whole[LAYER] = whole[ENSEMBLE] if alone else self._logits(layer, LAYER, at)
        ensemble, layer_best = Distribution.of(whole[ENSEMBLE]), whole[LAYER].argmax(-1)
        for j, which in enumerate(self.sums):
            if not self._has(layer, which):
                continue
            rows = torch.arange(len(chunk))
            if layer not in self.dense:
                picked = self.cache.selected_expert(layer, which, at=at)
                rows = picked.present.cpu().nonzero().squeeze(-1)
                cells["expert"][j, chunk] = picked.expert.cpu()
                cells["weight"][j, chunk] = picked.weight.cpu().to(cells["weight"])
            if not len(rows):
                continue
            there = rows.to(layer_best.device)
            found = read(
                whole[which] if which in whole else self._logits(layer, which, tuple(axis[rows] for axis in at)),
                final=final.of_rows(there),
                ensemble=ensemble.of_rows(there),
                layer_best=layer_best[there],
                targets=targets[rows].to(there.device),
                top=top,
            )
            for name, value in found.items():
                cells[name][j, chunk[rows]] = value.to(cells[name])

    def _logits(self, layer: int, which: PartialSum, at: tuple[Tensor, ...]) -> Tensor:
        resid = self.cache.partial_sum(layer, which, at=at).values
        return self._wide(self.lens.logits(resid, layer))

    @staticmethod
    def _wide(logits: Tensor) -> Tensor:
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _has(self, layer: int, which: PartialSum) -> bool:
        """Whether the layer has the sum: a dense one has no experts to pick, and no shared ones to read alone."""
        return layer not in self.dense or not (which.picks or (which.restricted and which.residual == "none"))

    def _real(self) -> Int[Tensor, " real"]:
        """The tokens that are no padding, numbered through batch and positions."""
        everything = torch.ones(self.batch, len(self.positions), dtype=torch.bool)
        mask = self.cache.mask
        if mask is not None:
            everything = mask.cpu().view(self.batch, -1)[:, list(self.positions)]
        return everything.flatten().nonzero().squeeze(-1)

    def _following(self) -> Int[Tensor, "batch pos"]:
        following = self.cache.following
        if following is None:
            return torch.full((self.batch, len(self.positions)), -1)
        return following.cpu().view(self.batch, -1)[:, list(self.positions)]

    def _never_selected(self) -> tuple[tuple[int, int], ...]:
        named = sorted({expert for which in self.sums for expert in which.experts or ()})
        missing = []
        for layer in sorted(set(self.layers) - set(self.dense)) if named else ():
            indices = self.cache[names.mlp(names.EXPERT_INDICES, layer)]
            mask = self.cache.mask
            used = set((indices if mask is None else indices[mask.to(indices.device)]).unique().tolist())
            missing += [(layer, expert) for expert in named if expert not in used]
        return tuple(missing)

    def _texts(self, *tokens: Tensor) -> dict[int, str]:
        if self.model.tokenizer is None:
            return {}
        occurring = sorted(set(torch.cat([some.unique() for some in tokens]).tolist()) - {-1})
        return dict(zip(occurring, self.model.tokenizer.batch_decode([[token] for token in occurring]), strict=True))
