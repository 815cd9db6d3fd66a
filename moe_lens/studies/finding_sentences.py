"""What each study found, in at most five sentences: each number with its interval and the control it is held against.

One mechanism for Python and the command line: `StudyResult.findings()` is what a command says when it ends. Findings
are read off the saved tables, so that a saved study says the same as one that was run just now.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd

from moe_lens.stats.multiple_tests import smallest_holm
from moe_lens.studies.findings import (
    MARGINS,
    Findings,
    across,
    left_out,
    number,
    repeated_texts,
    told,
    too_few,
    too_short,
    value,
)
from moe_lens.studies.frames import where

MOST = 5
"""Sentences."""

Tables = Mapping[str, Any]
"""Data frames by name."""
Facts = Mapping[str, Any]
"""Of the model, from the manifest."""


def findings_of(manifest: Mapping[str, Any], tables: Tables) -> Findings:
    """The findings of a study from its manifest and tables; of a study without rules here, the names of its tables."""
    plan = manifest["plan"]
    study, model = str(plan["study"]), plan.get("model", {})
    say, then = _RULES.get(study, (_only_tables, ""))
    sources = {str(row["name"]): int(row["sources"]) for row in manifest.get("read", ())}
    pooled = {"all domains": sum(sources.values())} if study in _POOLED else sources
    warnings = () if study == "contrast" else too_few(pooled)  # of which the test's own finding says so, by units
    read = {str(row["name"]): int(row["tokens"]) for row in manifest.get("read", ())}
    warnings += repeated_texts({str(row["name"]): int(row.get("repeated", 0)) for row in manifest.get("read", ())})
    warnings += left_out(model.get("hooks", ()))
    if study not in _WHOLE:
        warnings += too_short(read, plan.get("reading", {}).get("tokens"))
    about = f"{study} of {model.get('name')} on {', '.join(str(one['name']) for one in plan['domains'])}"
    return Findings(tuple(say(tables, model))[:MOST], warnings, then, about)


def _where(frame: Any, **equal: Any) -> Any:
    return where(frame, **equal)


def _only_tables(tables: Tables, model: Facts) -> Iterator[str]:  # noqa: ARG001
    yield f"tables: {', '.join(tables)}"


def _routing(tables: Tables, model: Facts) -> Iterator[str]:
    best = tables["most_specialised"]
    own = _where(best, routing="model")
    top = own.loc[own["share"].idxmax()]
    layer, domain = top["layer"], top["domain"]
    null = f"uniform {model['top_k'] / model['experts']:.1%}"
    for name, said in (("random_router", "a random router"), ("token_unigram", "by the token alone")):
        rows = _where(best, routing=name, layer=layer, domain=domain)
        null += f", {said} {rows['share'].iloc[0]:.1%}" if len(rows) else ""
    again = "" if pd.isna(top["picked_apart"]) else f"; {top['picked_apart']:.1%} if cross-fitted"
    yield (
        f"most specialised: expert {top['expert']} of layer {layer} is chosen by {value(top, 'share', form='.1%')} of "
        f"{domain}'s tokens{again}; {null} (most_specialised)"
    )
    if "domain_layers" in tables:
        rows = _where(tables["domain_layers"], routing="model")
        most = rows.loc[rows["mi"].idxmax()]
        yield (
            f"{_different(rows)}; most in layer {most['layer']}: mutual information {value(most, 'mi')} nats, "
            f"{most['null']:.3g} with sources shuffled (domain_layers)"
        )
        if "domain_nearer" in tables:
            yield f"nearest by experts used, mean over layers: {_nearest(tables['domain_nearer'])} (domain_nearer)"
        rows = _where(tables["given_token_layers"], routing="model")
        found = rows["finding"].value_counts()
        said = ", ".join(f"{finding}: {n}" for finding, n in found.items())
        yield f"same token in different domains, of {len(rows)} layers: {said} (given_token_layers)"
    rows = _where(tables["layers"], routing="model", measure="experts_50")
    half = -(-int(model["experts"]) // 2)
    taken = across(rows, "value")
    yield f"half of a layer's assignments go to {taken} of {model['experts']} experts; uniform {half} (layers)"


def _different(rows: Any) -> str:
    if (smallest_holm(rows) or 0) > 0.05:
        return "whether domains are routed differently cannot be told from so few sources"
    return f"domains are routed differently in {(rows['p_holm'] <= 0.05).sum()} of {len(rows)} layers"


def _nearest(table: Any) -> str:
    """Each domain's nearest one, and by how many nats it is nearer than the next."""
    rows, said = _where(table[table["layer"].isna()], routing="model"), []
    for domain, of in rows.groupby("domain", sort=False):
        sides = [
            of[["one", "to_one"]].set_axis(["name", "far"], axis=1),
            of[["other", "to_other"]].set_axis(["name", "far"], axis=1),
        ]
        near, next_ = pd.concat(sides).drop_duplicates("name").sort_values("far", kind="stable")["name"].iloc[:2]
        row = of[of["one"].isin((near, next_)) & of["other"].isin((near, next_))].iloc[0]
        sign = 1 if row["one"] == near else -1
        ends = sorted((-sign * row["low"], -sign * row["high"]))
        by = value({"by": -sign * row["difference"], "low": ends[0], "high": ends[1]}, "by")
        said.append(f"{domain} to {near}, {by} nats nearer than {next_}")
    return "; ".join(said)


def _single_expert(tables: Tables, model: Facts) -> Iterator[str]:
    losses = tables["perplexity"]
    rest = losses[losses["treatment"] != "whole"]
    together = rest["layer"].isna()
    layers = "all layers at once" if together.any() else "one layer at a time"
    rest = rest[together] if together.any() else rest
    positive = rest[rest["k"] > 0]
    if len(positive):
        k = int(positive["k"].min())
        for treatment in positive["treatment"].unique():
            rows = _where(positive, k=k, treatment=treatment)
            if len(rows):
                yield (
                    f"{k} of {model['top_k']} experts, the others {_TREATED[treatment]}, {layers}: perplexity × "
                    f"{across(rows, 'ratio', ('ratio_low', 'ratio_high'))} (perplexity)"
                )
    alike = tables["similarity"]
    said = (f"{label} {across(_where(alike, measure=name), 'mean')}" for name, label in _ALIKE.items())
    yield f"cosine with u + all experts, over layers: {'; '.join(said)} (similarity)"


_TREATED = {
    "dropped": "dropped",
    "renormalised": "dropped and the kept weights rescaled",
    "random": "dropped, and the kept ones drawn at random",
    "replaced": "replaced by their mean outputs",
}
_ALIKE = {"top": "u + rank 0", "none": "u alone", "random": "u + a random active expert"}


def _experts_per_token(tables: Tables, model: Facts) -> Iterator[str]:  # noqa: ARG001
    rows = tables["numbers"]
    ends, gains = ("ratio_low", "ratio_high"), ("gain_low", "gain_high")
    static = rows[(rows["rule"] == "k") & ~rows["own"]]
    numbers = sorted(static["value"].unique())
    for k in dict.fromkeys([*numbers[:1], *numbers[-1:]]):
        yield f"{k:g} experts for every token: perplexity × {across(_where(static, value=k), 'ratio', ends)} (numbers)"
    for (rule, at), own in rows[(rows["rule"] != "k") & ~rows["shuffled"]].groupby(["rule", "value"], sort=False):
        shuffled = _where(rows, rule=rule, value=at, shuffled=True)
        yield (
            f"{rule} {at:g}, {own['experts'].mean():.1f} experts a token: perplexity × {across(own, 'ratio', ends)}; "
            f"the same numbers shuffled over tokens: × {across(shuffled, 'ratio', ends)}; nats a token gained "
            f"over as many for all {across(own, 'gain', gains)}{told(own, 'gain', MARGINS['nats'], gains)} (numbers)"
        )


def _lens(tables: Tables, model: Facts) -> Iterator[str]:
    frame = _where(tables["lens"], quantity="kl_final", layer=max(model["moe_layers"]))
    yield f"KL(final ‖ lens) in nats, last layer with experts ({max(model['moe_layers'])}), and its controls (lens):"
    for which in ("u + routed", "u + rank 0", "u + random active expert", "u"):
        yield f"  {which}: {across(_where(frame, sum=which), 'mean')}"


def _localisation(tables: Tables, model: Facts) -> Iterator[str]:  # noqa: ARG001
    table = tables["contrast"]
    for how in table["how"].unique():
        rows = _where(table, how=how, control="matched")
        yield (
            f"{_REMOVED.get(how, how)}: contrast (growth of the own loss − of other domains') of the picked experts − "
            f"of matched coalitions {across(rows, 'estimate')} nats a token; {_both(rows)} (contrast)"
        )
        least = rows.loc[rows["beaten"].idxmin()] if rows["beaten"].notna().any() else None
        if least is not None:
            yield (
                f"  of matched coalitions they beat at least {least['beaten']:.0%} ({least['domain']}, "
                f"{least['controls']} matched)"
            )


def _both(rows: Any) -> str:
    """In how many domains the picked have a contrast, and a greater one than their controls (see `held_against`)."""
    known = int(rows["low"].notna().sum())
    if "beyond_low" not in rows:  # saved by an earlier version
        return f"above 0 in {int((rows['low'] > 0).sum())} of {known} intervals"
    starred = int(rows["starred"].fillna(False).sum())
    return f"both shown above 0, corrected for all, and the contrast above each of theirs, in {starred} of {known}"


_REMOVED = {"reroute": "forbidden, so that others are chosen", "zero": "set to zero"}


def _ablation(tables: Tables, model: Facts) -> Iterator[str]:  # noqa: ARG001
    table = tables["ablation"]
    for how in table["how"].unique():
        own = _where(table, how=how, coalition="picked")
        yield f"{_REMOVED.get(how, how)}: the loss grows by {across(own, 'added')} nats a token (ablation)"
        control = _where(table, how=how, coalition="matched")
        kind = "coalitions of the same layers and routing weight"
        if not control["coalitions"].all():
            control, kind = _where(table, how=how, coalition="random"), "the same number of each layer at random"
        yield (
            f"  beyond {kind}: {across(control, 'beyond', _BEYOND)}; {_exceed(control, 'domains')}; at least "
            f"{control['beaten'].min():.0%} of them cost less"
        )


def _exceed(held: Any, of: str) -> str:
    """How many are shown to cost more than their controls: one wording of one rule (see `held_against`)."""
    known = int(held["starred"].notna().sum())
    starred = int(held["starred"].fillna(False).sum())
    return f"shown to cost more than nothing and than each of these, corrected for all, in {starred} of {known} {of}"


def _facts(tables: Tables, model: Facts) -> Iterator[str]:  # noqa: ARG001
    rows = _where(tables["contrast"], measure="difference")
    for _, row in rows.iterrows():
        yield (
            f"{row['domain']}: picked experts restore {row['picked']:.3g} of the {row['all']:.3g} logits that all "
            f"experts restore; {value(row, 'estimate')} more than the same number at random"
            f"{told(row.to_frame().T, 'estimate', MARGINS['logits'])} (contrast)"
        )


def _contrast(tables: Tables, model: Facts) -> Iterator[str]:
    test = _where(tables["test"], tokens="all").iloc[0]
    every = len(model["moe_layers"]) * int(model["experts"])
    if pd.isna(test["experts_found"]):
        yield f"{test['finding']} (test)"
    else:
        yield (
            f"{test['finding']}: {test['experts_found']} of {every} experts, over {test['units']} units; any is found "
            f"in {test['shuffled']:.0%} of draws that swap A and B at random (test, experts)"
        )
    steering: Any = tables.get("steering", pd.DataFrame())
    for way in steering["way"].unique() if len(steering) else ():
        row = _where(steering, way=way, kind="picked").iloc[0]
        beyond = value(row, "beyond", _BEYOND)
        yield (
            f"{_STEERED.get(way, way)}: answer − foil moves by {value(row, 'effect')} nats, {beyond} beyond "
            "matched coalitions (steering)"
        )
        if "neutral" in tables and len(neutral := _where(tables["neutral"], way=way, kind="picked")):
            yield f"  loss on neutral texts grows by {across(neutral, 'added')} nats a token (neutral)"


_BEYOND = "beyond_low", "beyond_high"
_OVER_MOST = "over_most_low", "over_most_high"
_STEERED = {"forbid": "A's experts forbidden in A's prompts", "push": "A's experts pushed in B's prompts"}


def _pruning(tables: Tables, model: Facts) -> Iterator[str]:  # noqa: ARG001
    table = tables["pruning"]
    own = table[(table["kind"] == "picked") & (table["plan"] == table["domain"])]
    others = table[(table["kind"] == "picked") & (table["plan"] != table["domain"])]
    yield f"without the experts that a domain uses least: perplexity × {across(own, 'ratio')} (pruning)"
    if len(others):
        yield f"without those that another domain uses least: × {across(others, 'ratio')}"
    yield f"without the same number at random: × {across(_where(table, kind='random'), 'ratio')}"
    for kind in ("half", "double"):
        if len(rows := _where(table, kind=kind)):
            yield f"with {kind} as many gone ({rows['gone'].iloc[0]} of each layer): × {across(rows, 'ratio')}"


def _atlas(tables: Tables, model: Facts) -> Iterator[str]:
    experts, cost, compared = (tables[name] for name in ("experts", "knockouts", "compared"))
    rare, layers = experts["rare"].sum(), len(model["moe_layers"])
    yield f"{len(experts)} experts in {layers} layers, {rare} too rare to tell (experts)"
    if len(cost):
        row = cost.loc[cost["added"].idxmax()]
        measured = len(cost[["layer", "expert"]].drop_duplicates())
        yield (
            f"costliest knock-out of {measured} experts: expert {row['expert']} of layer {row['layer']}, "
            f"{value(row, 'added')} nats a token of {row['read']} (knockouts)"
        )
    own = compared[compared["over_most"].notna()]
    if len(own):
        row = own.loc[own["added"].idxmax()]
        yield (
            f"held against others of as much routing weight: expert {row['expert']} of layer {row['layer']} costs "
            f"{row['domain']} {value(row, 'added')} nats a token, "
            f"{value(row, 'over_most', _OVER_MOST)} more than the costliest of its controls; "
            f"{_exceed(own, 'comparisons')} (compared)"
        )


def _explain(tables: Tables, model: Facts) -> Iterator[str]:  # noqa: ARG001
    layers = tables["layers"].assign(domain="layer " + tables["layers"]["layer"].astype(str))
    token = _where(layers, feature="token")
    ends = "explained_low", "explained_high"
    yield f"share of a choice that the token explains on held-out texts: {across(token, 'explained', ends)} (layers)"
    for feature in ("previous", "position", "domain"):
        rows, ends = _where(layers, feature=feature), ("gain_low", "gain_high")
        if not len(rows):
            continue  # of one domain, the domain is no feature
        shuffled = rows["gain_shuffled"]
        yield (
            f"  {feature} adds to that {across(rows, 'gain', ends)}{told(rows, 'gain', MARGINS['explained'], ends)}; "
            f"shuffled, {shuffled.min():.2g} to {shuffled.max():.2g}"
        )


def _checkpoints(tables: Tables, model: Facts) -> Iterator[str]:  # noqa: ARG001
    overlap, losses = tables["overlap"], tables["losses"]
    for pair, words in _PAIRS.items():
        rows = _where(overlap, pair=pair)
        rows, null = rows.assign(domain=rows["domain"] + ", layer " + rows["layer"].astype(str)), rows["by_load"]
        yield (
            f"{words}, share of experts in common: {across(rows, 'overlap')}; by load alone {null.min():.3g} to "
            f"{null.max():.3g} (overlap)"
        )
    for run in ("first with the other's routers", "other with the first's routers"):
        yield f"the {run} loses {across(_where(losses, run=run), 'added')} nats a token (losses)"


_PAIRS = {
    "checkpoints": "both as they are",
    "routers": "the first's routers and the other's, in the first",
    "all but routers": "both with the same routers",
}


def _attribution_fidelity(tables: Tables, model: Facts) -> Iterator[str]:  # noqa: ARG001
    fidelity = tables["fidelity"]
    every = fidelity[fidelity["layer"].isna() & (fidelity["reference"] == "knockout")]
    of = "all" if "all" in set(every["domain"]) else every["domain"].iloc[0]
    rows = _where(every, domain=of)
    for method in ("direct", "gradient", "integrated"):
        row = _where(rows, method=method).iloc[0]
        agreement = value(row, "spearman", ("spearman_low", "spearman_high"))
        yield f"{method} attribution and knock-outs: Spearman {agreement} over {row['pairs']} experts (fidelity)"
    cheap = [f"{name} {number(_where(rows, method=name)['spearman'].iloc[0])}" for name in ("frequency", "norm")]
    yield f"  an expert's {' and '.join(cheap)}, which ask for no attribution at all"
    share = tables["rerouting"]["share"]
    least, most = (number(of, ".0%") for of in (share.min(), share.max()))
    yield (
        f"later layers that choose again make {least} to {most} of the size of a knock-out's effect, over layers "
        "(rerouting)"
    )


_POOLED = ("explain", "probe")
"""Studies whose intervals are over the sources of all domains together."""
_WHOLE = ("contrast",)
"""Studies that read all of what they are given, and no more: pairs of prompts."""
_RULES: dict[str, tuple[Callable[[Tables, Facts], Iterator[str]], str]] = {
    "routing": (_routing, "moe-lens localise, whether a domain's experts matter to its loss"),
    "single_expert": (_single_expert, "moe-lens lens, what each expert alone would predict"),
    "experts_per_token": (_experts_per_token, "moe-lens prune, a smaller model that keeps fewer experts"),
    "lens": (_lens, "moe-lens single-expert, what one expert alone costs in perplexity"),
    "localisation": (_localisation, "moe-lens ablate --experts …, any experts by hand; tables coalitions, effects"),
    "ablation": (_ablation, "moe-lens atlas, what these experts read and write"),
    "facts": (_facts, "moe-lens ablate --experts …, what the picked experts (table experts) do on texts"),
    "contrast": (_contrast, "moe-lens ablate --experts …, what these experts (table experts) do on texts"),
    "explain": (_explain, "moe-lens atlas, what each expert reads and writes"),
    "checkpoints": (_checkpoints, "moe-lens compare, what a study of either found, side by side"),
    "attribution-fidelity": (
        _attribution_fidelity,
        "moe-lens localise --by attribution, experts picked by it",
    ),
    "pruning": (_pruning, "moe-lens prune, the smaller model itself"),
    "atlas": (_atlas, "open index.html in a browser"),
}
"""By study: how its tables are read, and what to run next."""
