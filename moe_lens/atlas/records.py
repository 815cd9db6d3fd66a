"""From the tables of the study to what the pages show: plain values, by expert, by token and by text."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

from moe_lens.studies import StudyResult
from moe_lens.studies.matched_coalitions import MATCHED, PICKED

PROFILE = ("assigned", "share", "low", "high", "token_alone", "difference", "p_value", "first")
PROFILE += ("saved", "saved_low", "saved_high")
"""Of a domain, in the order that the card reads them."""
OVERALL = ("assigned", "top1", "share", "weight", "entropy", "relative_norm", "max_activation", "saved")
BY_DOMAIN = ("share", "token_alone", "difference", "p_value", "first", "saved")
"""Measures of the map that each domain has of its own."""

Expert = tuple[int, int]


def rows(table: Any, columns: Sequence[str]) -> list[list[Any]]:
    """Some columns, row by row, as plain values: None where one is missing."""
    chosen = table[list(columns)].astype(object)
    return chosen.where(chosen.notna(), None).to_numpy().tolist()


def by_expert(table: Any, columns: Sequence[str]) -> dict[Expert, list[list[Any]]]:
    """The same for each (layer, expert)."""
    found: dict[Expert, list[list[Any]]] = defaultdict(list)
    for layer, expert, *values in rows(table, ["layer", "expert", *columns]):
        found[layer, expert].append(values)
    return found


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
    nearest = {by: by_expert(table, ["other", "value", "null"]) for by, table in tables["nearest"].groupby("by")}
    knocked = _knockouts(result)
    alone = {key: _asked(of) for key, of in asked.items()}
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
        record["knockouts"], record["contexts"] = knocked[key], contexts[key]
        record["asked"] = alone.get(key, [])
        record["explained"], record["said"] = explained[key], (said[key] or [None])[0]
        layer = layers.setdefault(key[0], {"experts": [], "sources": sources})
        layer["experts"].append(record)
    for layer in layers.values():
        _own_sources(layer)
    return layers


_NEURON = ("neuron", "norm", "activation", "size")


def _knockouts(result: StudyResult) -> dict[Expert, list[dict[str, Any]]]:
    """For each domain that an expert is foremost in: its controls, and what every domain loses without it."""
    order = {domain: number for number, domain in enumerate(result.domains)}
    found: dict[Expert, list[dict[str, Any]]] = defaultdict(list)
    held = ["mass", "controls", "control_added", "control_mass", "beyond", "beyond_low", "beyond_high", "starred"]
    every: Any = result.tables["knockouts"]
    for (domain, layer, expert), table in every.groupby(["domain", "layer", "expert"], sort=False):
        own = table[table["read"] == domain]
        record = dict(zip(held, rows(own, held)[0], strict=True))
        record |= {"domain": order[domain], "place": int(own["place"].iloc[0])}
        read = rows(table, ["read", "added", "low", "high", "tokens", "sources"])
        record["read"] = [[order[name], *values] for name, *values in read]
        found[int(layer), int(expert)].append(record)
    return found


ASKED = ("added", "low", "high", "tokens", "sources", "mass")
CONTROL = ("coalitions", "mass", "added")
BEYOND = ("beyond", "beyond_low", "beyond_high")
"""Of a domain that is read without an expert: the expert, its controls, what it costs more than these."""


def _asked(result: StudyResult) -> list[list[Any]]:
    """For each domain, in their order, what it loses without the expert, and without its controls."""
    kinds = result.tables["ablation"].set_index("coalition")
    picked, control = kinds.loc[[PICKED]], kinds.loc[[MATCHED]]
    parts = zip(rows(picked, ASKED), rows(control, CONTROL), rows(control, BEYOND), strict=True)
    return [[number, *own, *held, *beyond] for number, (own, held, beyond) in enumerate(parts)]


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
    found: dict[Expert, dict[str, list[Any]]] = defaultdict(dict)
    if "contexts" not in result.tables:
        return found, []
    table: Any = result.tables["contexts"]
    order = {domain: number for number, domain in enumerate(result.domains)}
    names = list(dict.fromkeys(table["source"]))
    number = {name: i for i, name in enumerate(names)}
    columns = ["layer", "expert", "kind", "domain", "source", "position", "at", "score", "tokens", "weights"]
    for layer, expert, kind, domain, source, position, at, score, tokens, weights in rows(table, columns):
        line = [order[domain], number[source], position, at, score, [int(token) for token in tokens]]
        found[layer, expert].setdefault(kind, []).append([*line, [round(float(w), 4) for w in weights]])
    return found, names


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
    return {
        "all": {name: _grid(table, name) for name in names},
        "domains": [{name: _grid(of[domain], name) for name in BY_DOMAIN} for domain in result.domains],
    }


def _grid(table: Any, column: str) -> list[list[Any]]:
    grid: dict[int, list[Any]] = {}
    for layer, value in rows(table, ["layer", column]):
        grid.setdefault(layer, []).append(value)
    return list(grid.values())


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
