"""What an expert writes, in tokens: its mean output, its output where it is strongest, and its neurons."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lens import names
from moe_lens.checked import AnyModel, Natural, Positive
from moe_lens.errors import HookError, InputError
from moe_lens.lenses.logit_lens import LogitLens
from moe_lens.lenses.token_rows import Rows, row_batches, rows
from moe_lens.model.loading.dispatch import input_device, output_place
from moe_lens.model.loading.tokenizer import special_ids
from moe_lens.protocols import require_stream_width
from moe_lens.reprs import Summary
from moe_lens.routing import output_factors

_CHUNK = 2**24
"""Greatest number of logits held at a time: 64 MB in float32."""


@dataclass(frozen=True)
class Writing:
    """What a direction does to the next-token distribution if it is all that the final norm reads.

    Logits are FinalNorm(v) W_U minus their mean over the vocabulary, since a shift of all changes nothing. The norm
    takes the length of v away: they say which tokens, and how sharply, not how large v is beside the rest of the
    stream.
    """

    promoted: tuple[str, ...]
    promoted_tokens: tuple[Natural, ...]
    promoted_logits: tuple[float, ...]
    """Largest first."""
    suppressed: tuple[str, ...]
    suppressed_tokens: tuple[Natural, ...]
    suppressed_logits: tuple[float, ...]
    """Smallest first."""


@dataclass(frozen=True)
class StrongInput:
    """A token of the corpus at which the expert adds much to the residual stream."""

    before: str
    """The text that stands before the token."""
    text: str
    token: Natural
    after: str
    weight: float
    """Routing weight."""
    norm: float
    """‖g E(x)‖, what it adds to the stream; the inputs are chosen by it."""
    writing: Writing
    """What the expert's output at the token writes."""


@dataclass(frozen=True)
class Neuron:
    """A hidden unit of the expert, and the column of the down projection that it writes with."""

    index: Natural
    norm: float
    """Of the column."""
    activation: float | None
    """Mean activation over the tokens that chose the expert, None without a corpus. Its sign decides: a neuron that is
    negative on average suppresses what its column promotes."""
    size: float | None
    """Mean absolute activation."""
    writing: Writing
    """Of the column, which a positive activation adds."""


@dataclass(frozen=True, eq=False)
class ExpertVocabulary(Summary):
    """What one expert writes. Without a corpus there are neurons alone."""

    layer: Natural
    expert: Natural
    tokens: Natural
    """Tokens of the corpus, padding and special tokens left out."""
    routed: Natural
    """How many of these tokens chose the expert."""
    mean_out: Float[Tensor, " d_model"] | None
    """Mean of E(x) over them, not weighted."""
    mean: Writing | None
    """What that mean writes."""
    inputs: tuple[StrongInput, ...]
    """The strongest first."""
    neurons: tuple[Neuron, ...]
    """The most used first: by mean absolute activation × norm of the column, or by the norm alone without a corpus."""

    def to_frame(self) -> pd.DataFrame:
        """One row per token: of (`mean`, `input`, `neuron`), number, effect, place, token, text, logit."""
        parts = [("mean", 0, self.mean)] if self.mean else []
        parts += [("input", number, found.writing) for number, found in enumerate(self.inputs)]
        parts += [("neuron", neuron.index, neuron.writing) for neuron in self.neurons]
        lines = []
        for of, number, writing in parts:
            for effect in ("promoted", "suppressed"):
                found = (getattr(writing, f"{effect}{part}") for part in ("_tokens", "", "_logits"))
                lines += [(of, number, effect, place, *values) for place, values in enumerate(zip(*found, strict=True))]
        return pd.DataFrame(lines, columns=["of", "number", "effect", "place", "token", "text", "logit"])


@torch.no_grad()
def expert_vocabulary(
    model: AnyModel,
    layer: Natural,
    expert: Natural,
    texts: Iterable[Any] | None = None,
    *,
    top: Positive = 10,
    inputs: Natural = 10,
    neurons: Natural = 10,
    window: Positive = 8,
    batch: Positive = 8,
) -> ExpertVocabulary:
    """Read an expert through the model's final norm and unembedding.

    A corpus is streamed: what is kept are sums and the strongest inputs, whatever its length. The model runs up to the
    expert's layer only.

    Args:
        model: A `HookedMoE`.
        layer: A layer with experts.
        expert: Its id.
        texts: Texts, token ids [pos] or [batch, pos], or batches with `tokens` and `mask`; None for the neurons alone.
        top: How many promoted and suppressed tokens to keep.
        inputs: How many of the strongest inputs.
        neurons: How many neurons.
        window: Tokens shown before and after a strong input.
        batch: Rows of text at a time.

    Raises:
        HookError: A dense layer, or no such expert.
        InputError: None of the corpus's tokens chose the expert, the corpus holds something else than text, or experts
            compute in a narrower space than the residual stream.
    """
    if layer not in model.moe_layers:
        raise HookError(f"layer {layer} has no experts; MoE layers are {list(model.moe_layers)}")
    require_stream_width(model, "what an expert writes")
    model.expert_hooks(layer, expert)
    sums = _Sums(model, layer, expert, inputs)
    if texts is not None:
        for part in row_batches(rows(model, texts), batch):
            sums.update(part)
        if not sums.routed:
            raise InputError(
                f"expert {expert} of layer {layer} was chosen by none of the {sums.tokens} tokens; give it texts that "
                "it is chosen for (model.routing says which experts a text uses), or none to read its neurons alone"
            )
    columns = model.W_out[layer, expert].detach()
    norms = columns.float().norm(dim=-1).cpu()
    used = norms * sums.size if sums.routed else norms
    chosen = used.argsort(descending=True)[:neurons].tolist()
    strong = sums.strongest()
    directions = [sums.mean_out] if sums.routed else []
    directions += [found.output for found in strong] + [columns[index].float().cpu() for index in chosen]
    writings = writes(model, torch.stack(directions), top)
    return ExpertVocabulary(
        layer=layer,
        expert=expert,
        tokens=sums.tokens,
        routed=sums.routed,
        mean_out=sums.mean_out if sums.routed else None,
        mean=next(writings) if sums.routed else None,
        inputs=tuple(found.named(model, window, next(writings)) for found in strong),
        neurons=tuple(
            Neuron(
                index,
                float(norms[index]),
                float(sums.activation[index]) if sums.routed else None,
                float(sums.size[index]) if sums.routed else None,
                next(writings),
            )
            for index in chosen
        ),
    )


@torch.no_grad()
def writes(model: Any, directions: Float[Tensor, "direction d_model"], top: int) -> Iterator[Writing]:
    """What each direction promotes and suppresses."""
    lens, (device, dtype) = LogitLens(model), output_place(model.original_model)
    zero = torch.zeros_like(directions[:1]).to(device, dtype)
    try:
        nothing = lens.unembed(zero).float()  # the biases of norm and unembedding, where a family has them
    except (ValueError, RuntimeError) as error:
        raise InputError(f"this family's final norm does not read one stream of width d_model: {error}") from error
    for part in directions.split(max(1, _CHUNK // model.cfg.d_vocab)):
        # Of root mean square 1, so that the norm's epsilon does not count for more where a direction is short.
        unit = part / part.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        logits = lens.unembed(unit.to(device, dtype)).float() - nothing
        logits = logits - logits.mean(-1, keepdim=True)
        for best, worst in zip(_rows(logits.topk(top)), _rows(logits.topk(top, largest=False)), strict=True):
            yield Writing(_texts(model, best[0]), *best, _texts(model, worst[0]), *worst)


def _rows(found: Any) -> Iterator[tuple[tuple[int, ...], tuple[float, ...]]]:
    for tokens, logits in zip(found.indices.tolist(), found.values.tolist(), strict=True):
        yield tuple(tokens), tuple(logits)


def _texts(model: Any, tokens: Sequence[int]) -> tuple[str, ...]:
    if model.tokenizer is None:
        return tuple(f"<{token}>" for token in tokens)
    return tuple(model.tokenizer.decode([token]) for token in tokens)


def _joined(model: Any, tokens: Sequence[int]) -> str:
    return "".join(_texts(model, tokens)) if model.tokenizer is None else str(model.tokenizer.decode(list(tokens)))


@dataclass(frozen=True, eq=False)
class _Strong:
    norm: float
    weight: float
    row: list[int]
    pos: int
    output: Tensor

    def named(self, model: Any, window: int, writing: Writing) -> StrongInput:
        start, token = max(0, self.pos - window), self.row[self.pos]
        return StrongInput(
            before=_joined(model, self.row[start : self.pos]),
            text=_texts(model, [token])[0],
            token=token,
            after=_joined(model, self.row[self.pos + 1 : self.pos + 1 + window]),
            weight=self.weight,
            norm=self.norm,
            writing=writing,
        )


class _Sums:
    """What is kept of a corpus."""

    def __init__(self, model: Any, layer: int, expert: int, inputs: int):
        self.model, self.layer, self._inputs = model, layer, inputs
        self._out, self._post = names.expert("hook_out", layer, expert), names.expert("hook_post", layer, expert)
        d_expert = model.W_out[layer, expert].shape[0]
        self._sum_out = torch.zeros(model.cfg.d_model, dtype=torch.float64)
        self._sum_post, self._sum_size = torch.zeros(2, d_expert, dtype=torch.float64)
        self.tokens = self.routed = 0
        self._seen = 0
        self._heap: list[tuple[float, int, _Strong]] = []
        special = set[int]() if model.tokenizer is None else special_ids(model.tokenizer)
        self._special = torch.tensor(sorted(special), dtype=torch.long)

    @property
    def mean_out(self) -> Tensor:
        return (self._sum_out / self.routed).float()

    @property
    def activation(self) -> Tensor:
        return (self._sum_post / self.routed).float()

    @property
    def size(self) -> Tensor:
        return (self._sum_size / self.routed).float()

    def strongest(self) -> list[_Strong]:
        return [found for _, _, found in sorted(self._heap, reverse=True)]

    def update(self, part: Rows) -> None:
        counted = part.mask & ~torch.isin(part.tokens, self._special)
        self.tokens += int(counted.sum())
        held: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            held[hook.name] = value.detach().float().cpu()
            held.update({name: hook.ctx[name].cpu() for name in ("batch", "pos", "rank")})

        def keep_weights(value: Tensor, hook: Any) -> None:  # noqa: ARG001
            held["weights"] = value.detach().float().cpu()

        place = input_device(self.model.original_model)
        hooks = [(self._out, keep), (self._post, keep), (names.mlp(names.ROUTING_WEIGHTS, self.layer), keep_weights)]
        with self.model.hooks(fwd_hooks=hooks):
            mask = part.mask.long().to(place)
            self.model(part.tokens.to(place), attention_mask=mask, stop_at_layer=self.layer + 1)
        if self._out in held:
            self._add(part, counted, held)

    def _add(self, part: Rows, counted: Bool[Tensor, "batch pos"], held: dict[str, Tensor]) -> None:
        here = counted[held["batch"], held["pos"]]
        batch, pos, rank = (held[name][here] for name in ("batch", "pos", "rank"))
        out, post = held[self._out][here], held[self._post][here]
        self.routed += len(out)
        self._sum_out += out.double().sum(0)
        self._sum_post += post.double().sum(0)
        self._sum_size += post.double().abs().sum(0)
        weights = held["weights"][batch, pos, rank]
        strengths = out.norm(dim=-1) * output_factors(weights, self.model.family)
        for i in strengths.argsort(descending=True)[: self._inputs].tolist():
            row = part.tokens[batch[i]][part.mask[batch[i]]].tolist()
            found = _Strong(float(strengths[i]), float(weights[i]), row, int(pos[i]), out[i].clone())
            self._seen += 1  # among equals, the earlier stays
            entry = found.norm, -self._seen, found
            if len(self._heap) < self._inputs:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heappushpop(self._heap, entry)
