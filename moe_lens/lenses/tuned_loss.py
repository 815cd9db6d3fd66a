"""KL(final ‖ lens) wherever a TunedLens has a translator, of a batch at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.lenses.lens import Lens
from moe_lens.lenses.token_rows import Rows
from moe_lens.model.loading.dispatch import input_device, output_place

CHUNK = 256
"""Tokens whose logits are held at a time: few enough to stay in a CPU's cache with a small vocabulary (twice as fast as
thousands), and 100 MB a tensor with one of 102,400."""


class TranslatedLens(Lens):
    """A lens with an affine translator a layer, as what trains and evaluates one needs it."""

    weights: list[Float[Tensor, "d_model d_model"]]
    biases: list[Float[Tensor, " d_model"]]
    mid: "TranslatedLens | None"


@dataclass(frozen=True)
class Site:
    """Where a translator reads: `resid_post` or `resid_mid` of a layer."""

    lens: TranslatedLens
    layer: int
    hook: str

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        """The translator."""
        return self.lens.weights[self.layer], self.lens.biases[self.layer]


def sites(lens: TranslatedLens) -> list[Site]:
    """All translators that can differ from the identity: the stream that leaves the last layer needs none."""
    n_layers = lens.model.cfg.n_layers
    post = [Site(lens, layer, names.block(names.RESID_POST, layer)) for layer in range(n_layers - 1)]
    if lens.mid is None:
        return post
    return post + [Site(lens.mid, layer, names.block(names.RESID_MID, layer)) for layer in range(n_layers)]


class Streams:
    """The residual stream of a batch at every site, real tokens only, and what the model made of it."""

    @torch.no_grad()
    def __init__(self, lens: TranslatedLens, batch: Rows):
        model = lens.model
        n_layers, (device, _) = model.cfg.n_layers, output_place(model.original_model)
        self.last = names.block(names.RESID_POST, n_layers - 1)
        wanted = [*(site.hook for site in sites(lens)), self.last]
        place = input_device(model.original_model)
        _, cache = model.run_with_cache(
            batch.tokens.to(place),
            names_filter=wanted,
            stop_at_layer=n_layers,
            attention_mask=batch.mask.long().to(place),
        )
        self.values = {name: cache[name][batch.mask.to(cache[name].device)].to(device) for name in wanted}
        self.tokens = int(batch.mask.sum())
        self._lens = lens

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which tokens, the model's own probabilities for them, and Σ p log p in nats."""
        for start in range(0, self.tokens, CHUNK):
            at = slice(start, start + CHUNK)
            with torch.no_grad():
                final = self._lens.unembed(self.values[self.last][at]).float().log_softmax(-1)
                probs = final.exp()
                negentropy = torch.linalg.vecdot(probs, final)
            yield at, probs, negentropy  # outside: a generator would leave gradients switched off for who reads it

    def divergence(self, site: Site, at: slice, probs: Tensor, negentropy: Tensor) -> Float[Tensor, " tokens"]:
        """KL(final ‖ lens) of each token: Σ p log p + logsumexp(z) − Σ p z, with the lens's logits z."""
        logits = site.lens.logits(self.values[site.hook][at], site.layer).float()
        return negentropy + logits.logsumexp(-1) - torch.linalg.vecdot(probs, logits)


@torch.no_grad()
def divergences(
    lens: TranslatedLens, batches: Iterable[Rows]
) -> tuple[Float[Tensor, " site"], Float[Tensor, " site"], int]:
    """Means over all tokens of the batches, at each of `sites(lens)`.

    Returns:
        KL(final ‖ lens), nats a token; the root mean square of an entry of the stream; how many tokens there were.
    """
    every = sites(lens)
    sums, squares = torch.zeros(2, len(every), dtype=torch.float64)
    tokens = 0
    for batch in batches:
        streams = Streams(lens, batch)
        tokens += streams.tokens
        for i, site in enumerate(every):
            squares[i] += streams.values[site.hook].double().square().mean(-1).sum().cpu()
        for part in streams.chunks():
            for i, site in enumerate(every):
                sums[i] += streams.divergence(site, *part).double().sum().cpu()
    if not tokens:
        raise InputError("there are no held-out tokens to evaluate on")
    return sums / tokens, (squares / tokens).sqrt(), tokens
