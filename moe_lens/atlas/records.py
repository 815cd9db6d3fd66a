"""From the tables of the study to what the pages show: plain values, by expert, by token and by text."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, cast

from moe_lens.atlas import knocked_out
from moe_lens.atlas.rows import Expert, by_expert, grid, rows
from moe_lens.studies import StudyResult

PROFILE = ("assigned", "share", "low", "high", "token_alone", "difference", "p_value", "first")
PROFILE += ("saved", "saved_low", "saved_high")
"""Of a domain, in the order that the card reads them."""
OVERALL = ("assigned", "top1", "share", "weight", "entropy", "relative_norm", "max_activation", "saved")
BY_DOMAIN = ("assigned", "share", "low", "high", "token_alone", "difference", "p_value", "first", "saved")
"""Measures of the map that each domain has of its own."""


def experts(result: StudyResult, asked: Mapping[Expert, StudyResult]) -> dict[int, dict[str, Any]]:
    """By layer, what the cards of its experts show.

    Args:
        result: Of the study `atlas`.
        asked: Knock-outs of single experts that were asked for.
    """
    tables: dict[str, Any] = dict(result.tables)
    overall = by_expert(tables["experts"], [*OVERALL, "super_expert", "rare"])
    domains = by_expert(tables["domains"], PROFILE)
    tokens = by_expert(tables["tokens"], ["token", "assigned", "occurred", "lift"])
    writing = tables["writing"]
    of = {name: writing[writing["of"] == name] for name in ("mean", "router", "neuron")}
    told = {
        effect: by_expert(of["mean"][of["mean"]["effect"] == effect], ["token", "value", "recurs"])
        for effect in ("promoted", "suppressed")
    }
    router = by_expert(of["router"], ["token", "value"])
    neurons, lines = by_expert(tables["neurons"], _NEURON), by_expert(of["neuron"], ["number", "effect", "token"])
    partners = {
        kind: by_expert(table, ["other_layer", "other", "tokens", "lift"])
        for kind, table in tables["partners"].groupby("kind")
    }
    nearest = {
        by: by_expert(table, ["other", "value", "cosine", "null"]) for by, table in tables["nearest"].groupby("by")
    }
    knocked, compared = knocked_out.alone(result), knocked_out.compared(result)
    alone = {key: knocked_out.asked(of) for key, of in asked.items()}
    contexts, sources = _contexts(result)
    explained, said = _explained(result)
    layers: dict[int, dict[str, Any]] = {}
    for key, (values,) in overall.items():
        record: dict[str, Any] = dict(zip([*OVERALL, "super", "rare"], values, strict=True))
        record |= {"domains": domains[key], "tokens": tokens[key], "router": router[key]}
        record |= {effect: lists[key] for effect, lists in told.items()}
        record["neurons"] = [
            [*neuron, *([t for n, e, t in lines[key] if (n, e) == (neuron[0], effect)] for effect in told)]
            for neuron in neurons[key]
        ]
        record["partners"] = {kind: found[key] for kind, found in partners.items()}
        record["nearest"] = {by: found[key] for by, found in nearest.items()}
        record["knockouts"], record["compared"], record["contexts"] = knocked[key], compared[key], contexts[key]
        record["asked"] = alone.get(key, [])
        record["explained"], record["said"] = explained[key], (said[key] or [None])[0]
        layer = layers.setdefault(key[0], {"experts": [], "sources": sources})
        layer["experts"].append(record)
    for layer in layers.values():
        _own_sources(layer)
    return layers


_NEURON = ("neuron", "norm", "activation", "size")


EXPLAINED = ("feature", "recall", "precision", "auc", "explained", "explained_low", "explained_high")
EXPLAINED += ("gain", "gain_low", "gain_high", "gain_shuffled")
"""Of a feature that choices are predicted from, in the order that the card reads them."""
SAID = ("sentence", "precision", "low", "high", "recall", "share", "held")


def _explained(result: StudyResult) -> tuple[dict[Expert, list[list[Any]]], dict[Expert, list[list[Any]]]]:
    """What choices can be predicted from, and the sentences; nothing where none was predicted."""
    if "chosen_for" not in result.tables:
        return defaultdict(list), defaultdict(list)
    return by_expert(result.tables["explained"], EXPLAINED), by_expert(result.tables["chosen_for"], SAID)


def _contexts(result: StudyResult) -> tuple[dict[Expert, dict[str, list[Any]]], list[str]]:
    """Pieces of text, by kind; places counted from 0 where the window's own text begins; and the names of sources.

    Where the piece is in a text that is shown, the line ends with the text's number, and the place in it.
    """
    found: dict[Expert, dict[str, list[Any]]] = defaultdict(dict)
    if "contexts" not in result.tables:
        return found, []
    table: Any = result.tables["contexts"]
    order = {domain: number for number, domain in enumerate(result.domains)}
    names = list(dict.fromkeys(table["source"]))
    number = {name: i for i, name in enumerate(names)}
    opening, shown = len(result.manifest["plan"]["model"]["texts_open_with"]), _shown(result)
    columns = ["layer", "expert", "kind", "domain", "source", "position", "at", "score", "tokens", "weights"]
    for layer, expert, kind, domain, source, position, at, score, tokens, weights in rows(table, columns):
        ids, place = [int(token) for token in tokens], int(position) - opening
        line = [order[domain], number[source], place, at, score, ids, [round(float(w), 4) for w in weights]]
        for text, whole in shown[domain, source]:
            inside = [(token, place - at + i) for i, token in enumerate(ids) if 0 <= place - at + i < len(whole)]
            if 0 <= place < len(whole) and all(whole[i] == token for token, i in inside):
                line.append([text, place])
                break
        found[layer, expert].setdefault(kind, []).append(line)
    return found, names


def _shown(result: StudyResult) -> dict[tuple[str, str], list[tuple[int, list[int]]]]:
    """Texts that are shown, by domain and source: number and tokens."""
    found: dict[tuple[str, str], list[tuple[int, list[int]]]] = defaultdict(list)
    if "text_tokens" in result.tables:
        texts: Any = result.tables["text_tokens"]
        for number, of in texts.groupby("text"):
            found[of["domain"].iloc[0], of["source"].iloc[0]].append((number, of["token"].tolist()))
    return found


def _own_sources(layer: dict[str, Any]) -> None:
    """Leave a layer the names of sources that its contexts are from."""
    lines = [line for expert in layer["experts"] for some in expert["contexts"].values() for line in some]
    used = list(dict.fromkeys(line[1] for line in lines))
    layer["sources"], number = [layer["sources"][old] for old in used], {old: new for new, old in enumerate(used)}
    for line in lines:
        line[1] = number[line[1]]


def measures(result: StudyResult) -> dict[str, Any]:
    """Layers × experts of every measure of the map: over all domains, and of each."""
    table, domains = (cast(Any, result.tables[name]) for name in ("experts", "domains"))
    names = [
        "assigned",
        "share",
        "weight",
        "entropy",
        "relative_norm",
        "max_activation",
        "saved",
        "super_expert",
        "rare",
    ]
    of = {domain: domains[domains["domain"] == domain] for domain in result.domains}
    pairs: dict[int, list[Any]] = {}
    for layer, *values in rows(result.tables["pairs"], ["layer", "expert", "other", "tokens", "lift"]):
        pairs.setdefault(layer, []).append(values)
    return {
        "all": {name: grid(table, name) for name in names},
        "domains": [
            {name: grid(of[domain], name) for name in BY_DOMAIN} | knocked_out.by_domain(result, domain)
            for domain in result.domains
        ],
        "compared": knocked_out.differences(result),
        "pairs": pairs,
    }


def tokens(result: StudyResult) -> dict[int, dict[str, Any]]:
    """By token: how often it occurred, the experts that it was sent to in each layer, and those that write it."""
    found: dict[int, dict[str, Any]] = {}
    columns = ["token", "layer", "expert", "assigned", "occurred"]
    for token, layer, expert, assigned, occurred in rows(result.tables["sent"], columns):
        entry = found.setdefault(token, {"n": occurred, "sent": []})
        entry["sent"].append([layer, expert, assigned])
    writing: Any = result.tables["writing"]
    mean = writing[writing["of"] == "mean"]
    for token, layer, expert, effect, value, recurs in rows(
        mean, ["token", "layer", "expert", "effect", "value", "recurs"]
    ):
        entry = found.setdefault(token, {"n": 0, "sent": []})
        entry.setdefault(effect, []).append([layer, expert, value, recurs])
    return dict(sorted(found.items()))


def texts(result: StudyResult) -> list[dict[str, Any]]:
    """Texts token by token; slots as [layer][position][rank] of expert, weight, token and probability."""
    if "text_tokens" not in result.tables:
        return []
    found = []
    slots, tokens_of = (cast(Any, result.tables[name]).groupby("text") for name in ("text_slots", "text_tokens"))
    for number, table in tokens_of:
        first = table.iloc[0]
        ordered = slots.get_group(number).sort_values(["layer", "pos", "rank"])
        layers: dict[int, list[list[Any]]] = {}
        for layer, pos, *values in rows(ordered, ["layer", "pos", "expert", "weight", "token", "prob"]):
            places = layers.setdefault(layer, [])
            if pos == len(places):
                places.append([])
            places[pos].append(values)
        found.append(
            {
                "domain": first["domain"],
                "source": first["source"],
                "tokens": table["token"].tolist(),
                "predicted": table["predicted"].tolist(),
                "layers": layers,
            }
        )
    return found


def words(result: StudyResult) -> dict[str, Any]:
    """Ids of tokens, ascending, and their texts."""
    table = result.tables["words"]
    return {"ids": table["token"].tolist(), "texts": table["text"].tolist()}
