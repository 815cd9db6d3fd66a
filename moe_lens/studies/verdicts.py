"""What a model's studies say about each claim of the paper (arXiv 2603.05806): rules that stand before the run.

Two questions are asked of each claim: is its number reproduced, and is the inference from it supported, which takes a
control. An answer is made of bounds: quantities with a simultaneous 95 % interval over sources (Bonferroni over the
row's domains), and the side of a threshold that the claim puts them on.

- *holds*: all bounds lie wholly on the claim's side, those of the control too;
- *contradicted*: one of them lies wholly on the other side;
- *undecided*: all else, fewer than ten sources and what was not run included.

Of all domains together a claim holds, or is contradicted, only where it is in each; otherwise it is mixed, with the
number of domains on either side. A verdict is about the model and the texts that were read, and no others. Thresholds
marked † are ours, not the paper's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.errors import InputError, near_miss
from moe_lens.manifest import model_of, seal
from moe_lens.reprs import Summary
from moe_lens.storage import written_whole
from moe_lens.studies.frames import where
from moe_lens.studies.matched_coalitions import PICKED
from moe_lens.studies.paper_claims import RULES
from moe_lens.studies.study_result import StudyResult
from moe_lens.studies.verdict_answers import FACTORS, HOLDS, THRESHOLDS, Threshold, Verdict

FORMAT = 3
"""Of `verdicts.json`; grows when a key changes its meaning or goes away. From 2 on there is a seal; from 3 on a mixed
verdict says how many domains contradict it, and `at_half` and `at_double` say where there is no †."""


@dataclass(frozen=True, eq=False)
class Verdicts(Summary):
    """All claims, of one model and its texts."""

    model: str
    texts: tuple[str, ...]
    rows: tuple[Verdict, ...]
    thresholds: Mapping[str, Threshold]
    about: Mapping[str, Any] = field(default_factory=dict)
    """Model, domains with their digests, versions, settings with their seeds, of each study; and `other_domains`, what
    a plan that was made for one domain costs the others (row 5)."""

    def sentence(self, row: Verdict) -> str:
        """A verdict in words, which name model and texts."""
        where = f"of {self.model} on {', '.join(self.texts)}"
        if row.missing:
            return f"{row.key}, {where}: undecided: {row.missing}."
        number = f"the number {_said(row.number())}, " if row.has_number else ""
        return f"{row.key}, {where}: {number}the inference {_said(row.inference())}."

    def changed(self) -> tuple[str, ...]:
        """Names of thresholds that are not the usual ones."""
        return tuple(name for name, at in self.thresholds.items() if at != THRESHOLDS[name])

    def to_frame(self) -> pd.DataFrame:
        """A row per claim: claim, estimate, number, inference, at_half and at_double the distance of † thresholds.

        The last two are "number / inference", or "no †" where no threshold is ours.
        """
        rows = []
        for row in self.rows:
            others = {
                name: row.elsewhere(factor) for name, factor in (("at_half", FACTORS[0]), ("at_double", FACTORS[2]))
            }
            rows.append(
                {
                    "claim": f"{row.key} {row.claim}",
                    "estimate": row.estimate,
                    "number": row.number(),
                    "inference": row.inference() if not row.missing else f"undecided: {row.missing}",
                    **others,
                }
            )
        return pd.DataFrame(rows)

    def per_domain(self) -> pd.DataFrame:
        """A row per claim, domain and bound.

        Columns: claim, domain, what, value, low, high (simultaneous interval), side (of the threshold, that the claim
        says), threshold, ours (†), control (whether it belongs to the inference alone), answer, sources.
        """
        rows = [
            {
                "claim": row.key,
                "domain": of.domain,
                "what": bound.what,
                "value": bound.value,
                "low": bound.low,
                "high": bound.high,
                "side": "above" if bound.above else "below",
                "threshold": bound.threshold.value,
                "ours": bound.threshold.ours,
                "control": bound.control,
                "answer": bound.answer(),
                "sources": of.sources,
            }
            for row in self.rows
            for of in row.domains
            for bound in of.bounds
        ]
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values, with a seal by which it is known whether they are still these."""
        table, bounds, changed = self.to_frame(), self.per_domain(), self.changed()
        found = {
            "format": FORMAT,
            "model": self.model,
            "texts": list(self.texts),
            "verdicts": [
                {"key": row.key, **_plain(of), "sentence": self.sentence(row)}
                for row, of in zip(self.rows, table.to_dict("records"), strict=True)
            ],
            "bounds": [_plain(of) for of in bounds.to_dict("records")],
            "thresholds": {
                name: {"value": at.value, "ours": at.ours, "usual": THRESHOLDS[name].value, "changed": name in changed}
                for name, at in self.thresholds.items()
            },
            **self.about,
        }
        return {**found, "seal": seal(found)}

    def save(self, path: str | Path) -> None:
        """Write `verdicts.json`, whole or not at all.

        Raises:
            InputError: It cannot be written there.
        """
        with written_whole(Path(path)) as temporary:
            said = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
            temporary.write_text(said, encoding="utf-8")


def side_by_side(reports: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The verdicts of several models: a row for each claim, and a column for each model.

    A cell has the verdict on the number and that on the inference. Each is about its own model and texts, and the
    difference between two columns has no interval; `compare` gives those, study by study.

    Args:
        reports: What `Verdicts.to_json` gives.
    """
    columns: dict[str, dict[str, str]] = {}
    for number, found in enumerate(reports, start=1):
        name = f"{found['model']} on {', '.join(found['texts'])}"
        columns[f"{name} ({number})" if name in columns else name] = {
            row["claim"]: " / ".join(str(row[part]) for part in ("number", "inference") if row[part] is not None)
            for row in found["verdicts"]
        }
    claims = list(dict.fromkeys(claim for column in columns.values() for claim in column))
    cells = {name: [column.get(claim, "") for claim in claims] for name, column in columns.items()}
    return pd.DataFrame({"claim": claims, **cells})


def _said(answer: str) -> str:
    return answer if answer == HOLDS else f"is {answer}"


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """With null for what is missing: JSON has no NaN."""
    return {str(key): None if value != value else value for key, value in row.items()}


def judge(studies: Mapping[str, StudyResult], thresholds: Mapping[str, float] | None = None) -> Verdicts:
    """Judge the paper's claims by a model's studies.

    Args:
        studies: Of one model and the same texts, by the name of the study.
        thresholds: Other values than those of `THRESHOLDS`, by name; the result says that they were changed.

    Raises:
        InputError: No study, studies of different models or texts, or an unknown threshold.
    """
    unknown = sorted(set(thresholds or ()) - set(THRESHOLDS))
    if unknown:
        raise InputError(
            f"there is no threshold {unknown[0]!r}; there are {', '.join(THRESHOLDS)}"
            f"{near_miss(unknown[0], THRESHOLDS)}"
        )
    plans = [study.manifest["plan"] for study in studies.values()]
    if not plans:
        raise InputError("got no study; expected a model's studies by name, such as {'routing': StudyResult.load(…)}")
    read = [(model_of(study.manifest), study.manifest["plan"]["domains"]) for study in studies.values()]
    if any(each != read[0] for each in read):
        raise InputError("the studies are of different models or texts; verdicts are about one model and its texts")
    used = {name: replace(at, value=(thresholds or {}).get(name, at.value)) for name, at in THRESHOLDS.items()}
    about: dict[str, Any] = {
        "domains": list(plans[0]["domains"]),
        "model_facts": plans[0]["model"],
        "studies": {
            name: {
                "settings": study.manifest["plan"]["settings"],
                "reading": study.manifest["plan"]["reading"],
                "versions": study.manifest["versions"],
                "read": study.manifest["read"],
            }
            for name, study in studies.items()
        },
    }
    if "pruning" in studies and "pruning" in studies["pruning"].tables:
        other = where(studies["pruning"].tables["pruning"], kind=PICKED).query("plan != domain")
        columns = ("plan", "domain", "ratio", "low", "high", "sources")
        about["other_domains"] = [_plain({name: of[name] for name in columns}) for of in other.to_dict("records")]
    rows = tuple(rule(studies, used) for rule in RULES)
    texts = tuple(next(iter(studies.values())).domains)
    return Verdicts(str(plans[0]["model"].get("name")), texts, rows, used, about)
