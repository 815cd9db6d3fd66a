"""What an expert reads and writes, and which are like it: tables that take the model itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.lenses import LogitLens
from moe_lens.lenses.expert_writing import Writing, writes
from moe_lens.lenses.router_directions import router_geometry
from moe_lens.partial_sum import PartialSum
from moe_lens.stats import Means, NeuronResult, OutputSimilarityResult, Result, TopExamplesResult, weight_similarity
from moe_lens.studies.atlas_choice import RARE, of_kind
from moe_lens.studies.forward_passes import input_device

SHOWN, SEEN_AGAIN = 10, 25
"""Tokens of a direction that are told; and how many of the greatest of each half of the sources are held against one
another: a token recurs if it is among both."""
NEURONS, NEURON_TOKENS, NEAREST = 3, 5, 3


def tables(model: Any, results: Mapping[str, Mapping[str, Result]]) -> dict[str, pd.DataFrame]:
    """`writing`, `neurons` and `nearest`."""
    halves = [_pooled([m for of in results.values() if isinstance(m := of.get(f"means{h}"), Means)]) for h in (0, 1)]
    neurons = list(of_kind(results, "neurons", NeuronResult).values())
    alike = of_kind(results, "alike", OutputSimilarityResult)
    writing, used, near = [], [], []
    for row, layer in enumerate(model.moe_layers):
        writing.append(_mean_writing(model, row, layer, halves))
        routed = torch.stack([of.routed[row] for of in neurons]).sum(0)
        sums, sizes = (torch.stack([getattr(of, name)[row] for of in neurons]).sum(0) for name in ("sums", "sizes"))
        table, words = _neurons(model, layer, routed, sums, sizes)
        used.append(table)
        writing += [words, _router(model, layer)]
        near += [_nearest_weights(model, layer), _nearest_outputs(alike, row, layer)]
    return {
        "writing": pd.concat(writing, ignore_index=True),
        "neurons": pd.concat(used, ignore_index=True),
        "nearest": pd.concat(near, ignore_index=True),
    }


def _pooled(means: Sequence[Means]) -> tuple[Float[Tensor, "layer n_experts d_model"], Int[Tensor, "layer n_experts"]]:
    """Sums of outputs, and how many, over domains; of none: no token at all."""
    if not means:
        return torch.zeros(1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.long)
    sums = torch.stack([of.experts.double() * of.counts[..., None] for of in means]).sum(0)
    return sums, torch.stack([of.counts for of in means]).sum(0)


def _mean_writing(model: Any, row: int, layer: int, halves: Sequence[tuple[Tensor, Tensor]]) -> pd.DataFrame:
    """What the mean output of each expert, less that of the layer's experts, promotes and suppresses.

    Columns: of ("mean"), layer, expert, number, effect, place, token, value (logit), recurs: whether the token is among
    the first `SEEN_AGAIN` of both halves of the sources; missing where the expert is rare in one.
    """
    present = [half for half in halves if bool(half[1].any())]
    sums = torch.stack([half[0][row] for half in present]).sum(0)
    counts = torch.stack([half[1][row] for half in present]).sum(0)
    directions = _apart(sums, counts)
    told = ((counts >= RARE) & directions.nan_to_num().any(-1)).nonzero()[:, 0]
    if not len(told):
        return pd.DataFrame(columns=_COLUMNS)
    found = list(writes(model, directions[told].float(), min(SHOWN, model.cfg.d_vocab)))
    again: list[dict[int, Writing]] = []
    for half in present if len(present) == 2 else ():
        some = (half[1][row] >= RARE).nonzero()[:, 0]
        directions = _apart(half[0][row], half[1][row])[some].float()
        top = min(SEEN_AGAIN, model.cfg.d_vocab)
        written = list(writes(model, directions, top)) if len(some) else []
        again.append(dict(zip(some.tolist(), written, strict=True)))
    lines = []
    for expert, writing in zip(told.tolist(), found, strict=True):
        both = [half[expert] for half in again if expert in half]
        for effect in ("promoted", "suppressed"):
            seen = [set(getattr(half, f"{effect}_tokens")) for half in both]
            recurring = set.intersection(*seen) if len(seen) == 2 else None
            for line in _lines(("mean", layer, expert, 0), effect, writing):
                lines.append((*line, None if recurring is None else line[6] in recurring))
    return pd.DataFrame(lines, columns=_COLUMNS)


_COLUMNS = ["of", "layer", "expert", "number", "effect", "place", "token", "value", "recurs"]


def _apart(
    sums: Float[Tensor, "n_experts d_model"], counts: Int[Tensor, " n_experts"]
) -> Float[Tensor, "n_experts d_model"]:
    """Means of experts' outputs less the mean over all tokens and the experts that they chose."""
    return sums / counts[:, None] - sums.sum(0) / counts.sum()


def _lines(key: tuple[Any, ...], effect: str, writing: Writing) -> list[tuple[Any, ...]]:
    tokens, values = getattr(writing, f"{effect}_tokens"), getattr(writing, f"{effect}_logits")
    return [(*key, effect, place, *pair) for place, pair in enumerate(zip(tokens, values, strict=True))]


def _neurons(
    model: Any,
    layer: int,
    routed: Int[Tensor, " n_experts"],
    sums: Float[Tensor, "n_experts d_expert"],
    sizes: Float[Tensor, "n_experts d_expert"],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The neurons that each expert uses most, by mean absolute activation × norm of the column, and what they write."""
    columns = model.W_out[layer].detach()[: len(routed)]
    norms = columns.float().norm(dim=-1).cpu().double()
    n = routed.double()[:, None]
    at = torch.arange(len(norms))[(routed >= RARE)[: len(norms)] & norms.any(-1)]
    if not len(at):
        none = pd.DataFrame(columns=["layer", "expert", "place", "neuron", "norm", "activation", "size"])
        return none, pd.DataFrame(columns=_COLUMNS)
    used = (sizes / n)[at] * norms[at]
    best = used.topk(min(NEURONS, used.shape[1]), dim=1).indices
    expert, place = torch.ones_like(best, dtype=torch.bool).nonzero().unbind(-1)
    neuron, expert = best[expert, place], at[expert]
    table = {
        "layer": layer,
        "expert": expert.numpy(),
        "place": place.numpy(),
        "neuron": neuron.numpy(),
        "norm": norms[expert, neuron].numpy(),
        "activation": (sums / n)[expert, neuron].numpy(),
        "size": (sizes / n)[expert, neuron].numpy(),
    }
    directions = columns[expert.to(columns.device), neuron.to(columns.device)].float()
    found = writes(model, directions, min(NEURON_TOKENS, model.cfg.d_vocab))
    lines = [
        (*line, None)
        for one, index, writing in zip(expert.tolist(), neuron.tolist(), found, strict=True)
        for effect in ("promoted", "suppressed")
        for line in _lines(("neuron", layer, one, index), effect, writing)
    ]
    return pd.DataFrame(table), pd.DataFrame(lines, columns=_COLUMNS)


def _router(model: Any, layer: int) -> pd.DataFrame:
    """The tokens that each router row attracts most; none in families whose routers cannot be read so."""
    try:
        found = router_geometry(model, layer, top=min(SHOWN, model.cfg.d_vocab))
    except InputError:
        return pd.DataFrame(columns=_COLUMNS)
    lines = [
        ("router", layer, expert, 0, "promoted", place, token, value, None)
        for expert, row in enumerate(zip(found.tokens.tolist(), found.attraction.tolist(), strict=True))
        for place, (token, value) in enumerate(zip(*row, strict=True))
    ]
    return pd.DataFrame(lines, columns=_COLUMNS)


def _nearest_weights(model: Any, layer: int) -> pd.DataFrame:
    """By the mean of `subspace` over the matrices of an expert."""
    pairs: Any = (
        weight_similarity(model, layer).groupby(["expert", "other"], as_index=False)[["subspace", "null"]].mean()
    )
    both = torch.full((model.n_experts, model.n_experts), torch.nan, dtype=torch.float64)
    first, second = (torch.tensor(pairs[name].to_numpy()) for name in ("expert", "other"))
    both[first, second] = both[second, first] = torch.tensor(pairs["subspace"].to_numpy()).double()
    null = float(pairs["null"].mean()) if len(pairs) else float("nan")
    return _nearest("weights", layer, both, torch.full_like(both, null), None)


def _nearest_outputs(alike: Mapping[str, OutputSimilarityResult], row: int, layer: int) -> pd.DataFrame:
    """By the correlation of outputs on the same tokens; cosine there, and on different tokens. Means over domains."""
    correlation, cosine, null = (
        torch.stack([getattr(of, name)[row] for of in alike.values()]).mean(0)
        for name in ("correlation", "cosine", "null")
    )
    n = sum(int(of.n_tokens[row]) for of in alike.values())
    return _nearest("outputs", layer, correlation, null, n, cosine)


def _nearest(
    by: str,
    layer: int,
    values: Float[Tensor, "n_experts n_experts"],
    null: Float[Tensor, "n_experts n_experts"],
    tokens: int | None,
    cosine: Float[Tensor, "n_experts n_experts"] | None = None,
) -> pd.DataFrame:
    known: Bool[Tensor, "n_experts n_experts"] = values.isfinite() & ~torch.eye(len(values), dtype=torch.bool)
    best, other = values.masked_fill(~known, -torch.inf).topk(min(NEAREST, len(values)), dim=1)
    expert, place = best.isfinite().nonzero().unbind(-1)
    others = other[expert, place]
    columns = {
        "by": by,
        "layer": layer,
        "expert": expert.numpy(),
        "place": place.numpy(),
        "other": others.numpy(),
        "value": values[expert, others].numpy(),
        "cosine": torch.nan if cosine is None else cosine[expert, others].numpy(),
        "null": null[expert, others].numpy(),
    }
    return pd.DataFrame(columns).assign(tokens=pd.array([tokens] * len(expert), dtype="Int64"))


def shown_texts(model: Any, samples: Mapping[str, Result], own: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Texts token by token: `text_tokens` (text, domain, source, pos, token, predicted) and `text_slots`.

    `text_slots` has a row per text, position, layer and rank: expert, weight, and what a logit lens reads of the stream
    before the experts plus this one alone: token and probability.
    """
    texts: list[tuple[str, str, list[int]]] = []
    for domain, found in samples.items():
        assert isinstance(found, TopExamplesResult)
        for tokens, source in zip(found.tokens.tolist(), found.source, strict=True):
            texts.append((domain, source, [token for token in tokens if token >= 0]))
    texts += [("", f"text {number}", model.own_ids(text)[1]) for number, text in enumerate(own, start=1)]
    opening = [] if model.tokenizer is None else model.own_ids("")[0]
    lens, sums = LogitLens(model), PartialSum.each_rank(model.top_k)
    rows, slots = [], []
    for number, (domain, source, ids) in enumerate(texts):
        with torch.no_grad():
            tokens = torch.tensor([[*opening, *ids]], device=input_device(model))
            logits, cache = model.run_with_cache(tokens, names_filter=lens.hooks(model.moe_layers, sums))
            places = range(len(opening), tokens.shape[1])
            read = lens.decode(cache, sums, layers=model.moe_layers, positions=places, top=1)
            predicted = logits[0, len(opening) :].argmax(-1).tolist()
        for pos, pair in enumerate(zip(ids, predicted, strict=True)):
            rows.append((number, domain, source, pos, *pair))
        shape = len(model.moe_layers), len(sums), len(ids)
        layer, rank, pos = torch.ones(shape).nonzero().unbind(-1)
        columns = {
            "text": number,
            "pos": pos.numpy(),
            "layer": torch.tensor(model.moe_layers)[layer].numpy(),
            "rank": rank.numpy(),
            "expert": read.expert[layer, rank, 0, pos].numpy(),
            "weight": read.weight[layer, rank, 0, pos].float().numpy(),
            "token": read.top_tokens[layer, rank, 0, pos, 0].numpy(),
            "prob": read.top_probs[layer, rank, 0, pos, 0].float().numpy(),
        }
        slots.append(pd.DataFrame(columns))
    if not rows:
        return {}
    about = pd.DataFrame(rows, columns=["text", "domain", "source", "pos", "token", "predicted"])
    return {"text_tokens": about, "text_slots": pd.concat(slots, ignore_index=True)}


def words(model: Any, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The text of every token in some tables; its number where the model has no tokenizer."""
    found: set[int] = set()
    for table in tables.values():
        for column in {"token", "predicted"} & set(table.columns):
            if table[column].dtype.kind == "i":
                found |= set(table[column].unique().tolist())
        if "tokens" in table and table["tokens"].dtype == object:
            found |= {int(token) for piece in table["tokens"] for token in piece}
    known = sorted(token for token in found if token >= 0)
    if model.tokenizer is None:
        return pd.DataFrame({"token": known, "text": [f"<{token}>" for token in known]})
    texts = model.tokenizer.batch_decode([[token] for token in known])
    parts = {token: text for token, text in zip(known, texts, strict=True) if "\ufffd" in text}
    raw = dict(zip(parts, model.tokenizer.convert_ids_to_tokens(list(parts)), strict=True))
    texts = [_spelt(raw[token], text) if token in raw else text for token, text in zip(known, texts, strict=True)]
    return pd.DataFrame({"token": known, "text": texts})


_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PRINTED}
_BYTES |= {chr(256 + at): byte for at, byte in enumerate(sorted(set(range(256)) - set(_PRINTED)))}
"""How byte-level tokenizers write each byte as a character (Radford et al. 2019)."""


def _spelt(raw: str, text: str) -> str:
    """A token that is part of a character: its bytes in hexadecimal, if its tokenizer writes bytes."""
    if not set(raw) <= _BYTES.keys():
        return text
    return bytes(_BYTES[one] for one in raw).decode("utf-8", "backslashreplace")
