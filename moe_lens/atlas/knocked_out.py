"""From the tables of knock-outs to what the pages show."""

from collections import defaultdict
from typing import Any

from moe_lens.atlas.rows import Expert, by_expert, grid, rows
from moe_lens.studies import StudyResult
from moe_lens.studies.matched_coalitions import MATCHED, PICKED

KNOCKED = ("added", "low", "high", "first_order", "tokens", "sources", "at_first")
OVER = ("over_most", "over_most_low", "over_most_high", "all_low", "all_high", "starred")
CONTROL = ("experts", "mass", "added", "low", "high")
COMPARED = ("by", "mass", "added", "low", "high", "tokens", "sources", "controls", "control_added", "control_least")
COMPARED += ("control_most", "control_mass", *OVER)
"""Of an expert that was taken out, of one of its controls, and of it held against all of them."""


def alone(result: StudyResult) -> dict[Expert, list[list[Any]]]:
    """What every domain loses without an expert: number of the domain, `KNOCKED`."""
    order = {domain: number for number, domain in enumerate(result.domains)}
    found = by_expert(result.tables["knockouts"], ["read", *KNOCKED])
    return defaultdict(list, {key: [[order[name], *of] for name, *of in lines] for key, lines in found.items()})


def compared(result: StudyResult) -> dict[Expert, list[dict[str, Any]]]:
    """For each domain on which an expert is held against controls: it, and each of these."""
    order = {domain: number for number, domain in enumerate(result.domains)}
    each: dict[Any, list[list[Any]]] = defaultdict(list)
    for domain, layer, expert, *control in rows(result.tables["controls"], ["domain", "layer", "expert", *CONTROL]):
        each[domain, layer, expert].append([list(map(int, control[0])), *control[1:]])
    found: dict[Expert, list[dict[str, Any]]] = defaultdict(list)
    for layer, expert, domain, *values in rows(result.tables["compared"], ["layer", "expert", "domain", *COMPARED]):
        record = dict(zip(COMPARED, values, strict=True)) | {"domain": order[domain]}
        found[layer, expert].append(record | {"each": each[domain, layer, expert]})
    return found


def asked(result: StudyResult) -> list[dict[str, Any]]:
    """For each domain, in their order, what it loses without an expert that was asked for, and without its controls."""
    kinds: Any = result.tables["ablation"].set_index("coalition")
    members: Any = result.tables["coalitions"].query("coalition == @MATCHED", local_dict={"MATCHED": MATCHED})
    experts = members.groupby(["domain", "number"], sort=False)["expert"].agg(list)
    each: dict[Any, list[list[Any]]] = defaultdict(list)
    for domain, kind, number, *effect in rows(
        result.tables["effects"], ["domain", "coalition", "number", *CONTROL[1:]]
    ):
        if kind == MATCHED:
            each[domain].append([list(map(int, experts[domain, number])), *effect])
    own = ("domain", "mass", "added", "low", "high", "tokens", "sources")
    held = ("coalitions", "added", "control_least", "control_most", "mass", *OVER)
    found = []
    for number, (mine, others) in enumerate(
        zip(rows(kinds.loc[[PICKED]], own), rows(kinds.loc[[MATCHED]], held), strict=True)
    ):
        record = dict(zip(COMPARED, ["asked", *mine[1:], *others], strict=True)) | {"domain": number}
        found.append(record | {"each": each[mine[0]]})
    return found


def differences(result: StudyResult) -> list[list[Any]]:
    """Of each expert that was held against controls: layer, expert, number of the domain, and what it costs more."""
    order = {domain: number for number, domain in enumerate(result.domains)}
    columns = ["layer", "expert", "domain", *OVER[:3], "starred", "control_least", "control_most"]
    found = rows(result.tables["compared"], columns)
    return [[layer, expert, order[domain], *values] for layer, expert, domain, *values in found]


def by_domain(result: StudyResult, domain: str) -> dict[str, list[list[Any]]]:
    """Layers × experts of what a domain loses without an expert; None where none was taken out.

    And its ends, the linear estimate for the same tokens, and the part at the first four tokens of windows.
    """
    every, knocked = result.tables["experts"][["layer", "expert"]], result.tables["knockouts"]
    whole = every.merge(knocked[knocked["read"] == domain], on=["layer", "expert"], how="left")
    names = {"exact": "added", "exact_low": "low", "exact_high": "high", "estimate": "first_order"}
    return {name: grid(whole, column) for name, column in {**names, "at_first": "at_first"}.items()}
