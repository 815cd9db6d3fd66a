"""Are the numbers of the embedded model in README.md, docs/paper.md and docs/localisation.md those of a report?

    python -m scripts.documented_numbers FOLDER

FOLDER is what `moe-lens report`, without options, has written. Every phrase below is computed from its tables and
verdicts, and has to stand in its page; those that do not are printed, and the exit status is 1.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.manifest import studies_in
from moe_lens.report.section import rows_where
from moe_lens.studies import StudyResult, judge
from moe_lens.studies.verdict_answers import FACTORS

ROOT = Path(__file__).parents[1]
PAPER, README, LOCALISATION = "docs/paper.md", "README.md", "docs/localisation.md"
NAMES = {"english": "English", "french": "French", "german": "German", "math": "mathematics", "code": "code"}
NUMBERS = ("no", "one", "two", "three", "four", "five")


def short(value: float, digits: int = 2) -> str:
    """`.72`: without the 0 before the point."""
    said = f"{value:.{digits}f}"
    return said[1:] if said.startswith("0.") else said


def span(values: Iterable[float], digits: int = 2) -> str:
    """The least to the greatest."""
    found = [float(value) for value in values]
    return f"{short(min(found), digits)} to {short(max(found), digits)}"


def percents(values: Iterable[float], sign: str = "", less: float = 0) -> str:
    """The same in per cent."""
    found = [100 * (float(value) - less) for value in values]
    return f"{min(found):{sign}.0f} to {max(found):{sign}.0f}"


class Bounds:
    """Values and answers of the verdicts' bounds, by claim and what is bounded."""

    def __init__(self, studies: dict[str, StudyResult]):
        self.found = judge(studies)
        self.frame: Any = self.found.per_domain()

    def rows(self, claim: str, number: int) -> pd.DataFrame:
        """The bound of a claim with this number, a row per domain."""
        of = rows_where(self.frame, claim=claim)
        return rows_where(of, what=of["what"].unique()[number])

    def values(self, claim: str, number: int) -> list[float]:
        """Its values."""
        return self.rows(claim, number)["value"].tolist()


def table(bounds: Bounds) -> Iterator[str]:
    """The rows of the table of verdicts."""
    rows = {row.key: row for row in bounds.found.rows}
    for key, row in rows.items():
        yield f"| {key} | {row.number()} | {row.inference()} |"
    share, less, random = (bounds.values("1a", at) for at in range(3))
    holding = [NAMES[d] for d in bounds.rows("1a", 2).query("answer == 'holds'")["domain"]]
    yield f"greatest share {span(share)}, which is {span(less)} above the share by the token alone"
    yield f"a random router's is {span(random)}, and its interval lies wholly below .50 only on {' and '.join(holding)}"
    half, fewer = bounds.values("1b", 0), bounds.values("1b", 1)
    yield f"{percents(half)} % of the experts receive half"
    yield f"fewer than with a random router, by {percents([-value for value in fewer])} points"
    yield f"At double the distance of † (E/4): {rows['1b'].number(FACTORS[2])}"
    agrees, left, matters, beyond = (bounds.values("2", at) for at in range(4))
    active = [one - other for one, other in zip(left, beyond, strict=True)]
    yield f"agreement {span(agrees)}, and {span(matters)} where u alone and the ensemble differ"
    yield f"KL ratio {span(left)}, against {span(active)} for a random active expert"
    cosine, gained, others = (bounds.values("3", at) for at in range(3))
    held = sum(of.inference(FACTORS[2]) == "holds" for of in rows["3"].domains)
    yield f"greatest layer's cosine {span(cosine, 3)}; but (cos − cos_u) / (1 − cos_u) is only {span(gained)}"
    yield f"(at double the distance of †, .80, it holds in {NUMBERS[held]} of five domains)"
    yield f"leave-one-out {span(others)}, above 0"
    ratio, below = bounds.values("4", 0), bounds.values("4", 1)
    yield f"k = 1 raises perplexity by {percents(ratio, less=1)} %"
    yield f"the ratio is greater by {min(-v for v in below):.0f} to {max(-v for v in below):.0f}"
    pruned: Any = bounds.rows("5", 0).set_index("domain")
    answers = pruned["answer"].value_counts()
    english = {name: 100 * (pruned.loc["english", name] - 1) for name in ("value", "low", "high")}
    yield f"without a quarter of the experts perplexity rises by {percents(pruned['value'], less=1)} %"
    yield (
        f"contradicted in {NUMBERS[answers['contradicted']]} domains, undecided in English ({english['value']:.0f} %, "
        f"interval {english['low']:.0f} to {english['high']:.0f})"
    )
    eighth, half = zip(*(bound.others for of in rows["5"].domains for bound in of.bounds if bound.others), strict=True)
    eighth, half = (percents([bound.value for bound in of], less=1) for of in (eighth, half))
    at = [rows["5"].number(factor) for factor in (FACTORS[0], FACTORS[2])]
    yield (
        f"Without an eighth perplexity rises by {eighth} % ({at[0]} at half the distance, ≤ 1.025), without a half by "
        f"{half} % ({at[1]} at double, ≤ 1.10)"
    )
    yield f"contrasts of {span(bounds.values('6', 0))} nats a token beyond the matched coalitions"


def localisation(study: StudyResult) -> Iterator[str]:
    """The cautions about verdict 6."""
    contrast = rows_where(study.tables["contrast"], how="reroute")
    matched = rows_where(contrast, control="matched").set_index("domain")
    sizes = matched["control_experts"]
    picked = matched["experts"].max()
    yield f"A matched coalition has {sizes.min():.0f} to {sizes.max():.0f} experts against {picked:.0f} picked"
    yield f"({span(matched['control_others'])} nats a token)"
    pairs = {name: f"{short(row['own'])} and {short(row['control_own'])}" for name, row in matched.iterrows()}
    yield f"in French and German ({pairs['french']}, {pairs['german']}), more in English ({pairs['english']})"
    yield f"less in code ({pairs['code']}) and mathematics ({pairs['math']})"
    yield f"others lose {span(matched['others'])}"
    busiest = rows_where(contrast, control="busiest").set_index("domain")
    unclear = busiest[busiest["low"] <= 0]
    assert list(unclear.index) == ["english"], "the sentence about the busiest experts names English alone"
    row = unclear.loc["english"]
    yield f"English has a contrast of {short(row['estimate'])} (interval −{short(-row['low'])} to {short(row['high'])})"


def localised(study: StudyResult) -> Iterator[str]:
    """What docs/localisation.md says of the same: what it costs each domain, and what is beyond the controls."""
    matched = rows_where(study.tables["contrast"], how="reroute", control="matched").set_index("domain")
    costs = {name: f"{short(row['own'])} and {short(row['others'])}" for name, row in matched.iterrows()}
    german = costs["german"].replace("and", "nats a token and on the other domains by")
    yield f"forbidding the {matched['experts'].max():.0f} picked experts raises the loss on German by {german}"
    others = (f"{NAMES[name]} {costs[name]}" for name in ("math", "code", "english"))
    yield f"for French it is {costs['french']}, {', '.join(others)}"
    beyond = matched["estimate"]
    ends = (f"{short(beyond[at])} ({NAMES[at]})" for at in (beyond.idxmin(), beyond.idxmax()))
    yield f"this leaves {' to '.join(ends)}, with all intervals above 0"
    assert (matched["low"] > 0).all(), "the sentence says that all intervals are above 0"


def random_plans(study: StudyResult) -> Iterator[str]:
    """What as many experts at random cost, in docs/paper.md."""
    random = rows_where(study.tables["pruning"], kind="random")
    plans = len(random) // len(study.domains)
    yield f"better than all {plans} random ones ({percents(random['ratio'], less=1)} % more)"


def routing(study: StudyResult) -> Iterator[str]:
    """Specialisation, concentration, and what is left given the token."""
    most = study.tables["most_specialised"]
    over = {name: rows.query("share > 0.5") for name, rows in most.groupby("routing")}
    wholly = {name: len(rows.query("low > 0.5")) for name, rows in over.items()}
    pairs = len(rows_where(most, routing="model"))
    yield f"in {len(over['model'])} of {pairs} pairs of layer and domain"
    yield f"in {wholly['model']} of them the whole interval lies above half"
    inside = wholly["random_router"] or "none"
    yield f"A random router gives {len(over['random_router'])} such pairs (in {inside} the whole interval)"
    yield f"routing by the token alone {len(over['token_unigram'])} (in {wholly['token_unigram']} the whole interval)"
    half: Any = rows_where(study.tables["layers"], measure="experts_50")
    mean = half.pivot_table(index="domain", columns="routing", values="value")
    own = mean["model"]
    low, high = (f"{own[name]:.1f} ({NAMES[name]})" for name in (own.idxmin(), own.idxmax()))
    yield f"The busiest {low} to {high} experts of 64 receive half of the assignments"
    yield f"with a random router {span(mean['random_router'], 1)}, by the token alone {span(mean['token_unigram'], 1)}"
    yield second_layer(half)
    given = study.tables["given_token_layers"].pivot(index="layer", columns="routing", values="excess")
    tenths = [round(10 * value) for value in (given["random_router"] / given["model"])]
    least, most_of_it = NUMBERS[min(tenths)], NUMBERS[max(tenths)]
    yield f"A random router, which also reads the context, shows {least} to {most_of_it} tenths"
    tested = (
        rows_where(study.tables["given_token_pairs"], routing="model").groupby(["domain", "other"])["finding"].first()
    )
    yield f"in all {(tested != 'cannot be told').sum()} of {len(tested)} pairs of domains where this can be tested"


def perplexity(study: StudyResult) -> Iterator[str]:
    """Fewer experts, and cosines."""
    frame = rows_where(study.tables["perplexity"], layer=None)

    def ratios(treatment: str, k: int) -> Any:
        return rows_where(frame, treatment=treatment, k=k).set_index("domain")["ratio"]

    top = ratios("dropped", 1)
    yield f"Top expert only: {', '.join(f'{NAMES[d]} {100 * (value - 1):+.0f} %' for d, value in top.items())}"
    random, none = ratios("random", 1), ratios("dropped", 0)
    yield f"at random: {random.min():.0f} to {random.max():.0f} times the perplexity"
    yield f"Three: {percents(ratios('dropped', 3), '+', 1)} %"
    yield f"No routed expert at all: {none.min():.0f} to {none.max():.0f} times"
    yield f"(k = 1: {percents(ratios('replaced', 1), '+', 1)} %)"
    mean = study.tables["similarity"].pivot_table(index="domain", columns="measure", values="mean")
    yield f"`top` is {span(mean['top'], 3)}, `random` (a random active expert) {span(mean['random'], 3)}"
    yield f"and `none` {span(mean['none'], 3)}"
    yield f"`rest_top`, is {span(mean['rest_top'])} (for a random active expert {span(mean['rest_random'])})"
    yield f"leaves {percents(mean['unexplained'])} % of the variance"


def lens(study: StudyResult) -> Iterator[str]:
    """Agreement with the whole layer."""
    frame = rows_where(study.tables["lens"], quantity="agrees_layer").query("layer > 0")
    mean = frame.pivot_table(index="domain", columns="sum", values="mean")
    top, random, none = (percents(mean[name]) for name in ("u + rank 0", "u + random active expert", "u"))
    yield f"for {top} % of the tokens (mean over layers), on u + a random active expert for {random} %"
    yield f"on u alone for {none} %"


def headlines(studies: dict[str, StudyResult], bounds: Bounds) -> Iterator[str]:
    """What README says of the same."""
    most = studies["routing"].tables["most_specialised"]
    over = {name: len(rows.query("share > 0.5")) for name, rows in most.groupby("routing")}
    wholly = len(rows_where(most, routing="model").query("low > 0.5"))
    yield f"In {over['model']} of {len(rows_where(most, routing='model'))} pairs of layer and domain"
    yield f"in {wholly} of them the whole interval lies above half"
    yield f"A random router gives {over['random_router']} such pairs"
    yield f"routing by the token alone {over['token_unigram']}"
    frame = rows_where(studies["single_expert"].tables["perplexity"], layer=None)
    top, three, random = (
        rows_where(frame, treatment=treatment, k=k)["ratio"]
        for treatment, k in (("dropped", 1), ("dropped", 3), ("random", 1))
    )
    yield f"Keeping only the top expert of six raises perplexity by {percents(top, less=1)} %"
    yield f"keeping one of the six at random multiplies it by {random.min():.0f} to {random.max():.0f}"
    drawn = rows_where(frame, treatment="random", k=3)["ratio"]
    yield f"keeping three of six raises it by {percents(three, less=1)} %"
    yield f"(three at random multiply it by {drawn.min():.1f} to {drawn.max():.1f})"
    table = studies["pruning"].tables["pruning"]
    yield f"a domain's perplexity rises by {percents(bounds.values('5', 0), less=1)} %"
    yield f"(without a random quarter by {percents(rows_where(table, kind='random')['ratio'], less=1)} %)"
    german = rows_where(studies["localisation"].tables["contrast"], how="reroute", control="matched", domain="german")
    row = german.to_dict("records")[0]
    yield f"raises the loss on German by {short(row['own'])} nats a token"
    yield f"and on the other domains by {short(row['others'])}; other experts that carry as much"
    costs = f"{short(row['control_own'])} and {short(row['control_others'])}"
    yield f"({row['control_experts']:.0f} of them, on average) raise these losses by {costs}"


def concentration(study: StudyResult) -> Iterator[str]:
    """The busiest experts beside their nulls, in README."""
    half: Any = rows_where(study.tables["layers"], measure="experts_50")
    n = study.manifest["plan"]["model"]["experts"]
    mean = half.pivot_table(index="domain", columns="routing", values="value") / n
    random, token, uniform = (percents(mean[null]) for null in ("random_router", "token_unigram", "uniform"))
    uniform = uniform.split(" to ")[-1]
    yield f"The busiest {percents(mean['model'])} % of a layer's experts receive half"
    yield f"(with a random router {random} %, by the token alone {token} %, with uniform routing {uniform} %)"
    yield second_layer(half)


def second_layer(half: Any) -> str:
    """Where a random router is more concentrated."""
    second = rows_where(half, layer=2).groupby("routing")["value"].mean()
    return f"{second['random_router']:.1f} experts for half against {second['model']:.1f}, means over domains"


def missing(folder: str | Path) -> list[str]:
    """Phrases of a report that its pages lack, each after the name of the page."""
    results = [StudyResult.load(each) for each in studies_in(folder)]
    studies = {result.study: result for result in results}
    bounds = Bounds(studies)
    of_paper = (
        *table(bounds),
        *random_plans(studies["pruning"]),
        *localisation(studies["localisation"]),
        *routing(studies["routing"]),
        *perplexity(studies["single_expert"]),
        *lens(studies["lens"]),
    )
    phrases = {
        PAPER: of_paper,
        README: (*headlines(studies, bounds), *concentration(studies["routing"])),
        LOCALISATION: tuple(localised(studies["localisation"])),
    }
    said = {page: " ".join((ROOT / page).read_text(encoding="utf-8").split()) for page in phrases}
    return [f"{page}: {phrase}" for page, of in phrases.items() for phrase in of if phrase not in said[page]]


def main(arguments: list[str]) -> int:
    """Print what is missing."""
    found = missing(arguments[0])
    print("\n".join(found) or "every number is there")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
