"""Exact knock-outs of experts that someone asks for: a study of each, in a folder of its own beside the atlas's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_lens.errors import InputError
from moe_lens.selection import Experts, Selection
from moe_lens.studies import AblationStudy, StudyResult
from moe_lens.studies.atlas_knockouts import HOW, MATCHED

FOLDER = "knockouts"
"""In that of the atlas; in it a study for each expert."""
Expert = tuple[int, int]


def one_by_one(model: Any, experts: Experts | None) -> dict[str, AblationStudy]:
    """A study of each expert, by the name of its folder.

    Args:
        model: A `HookedMoE`.
        experts: Which; each is taken out by itself.

    Raises:
        HookError: A layer has no experts.
        InputError: There is no such expert.
    """
    if experts is None:
        return {}
    asked = Selection(experts=experts)
    asked.check(model)
    return {
        f"layer-{layer}-expert-{expert}": AblationStudy({layer: [expert]}, how=(HOW,), matched=MATCHED)
        for layer, ids in sorted((asked.by_layer or {}).items())
        for expert in ids
    }


def load_asked(folder: str | Path, atlas: StudyResult) -> dict[Expert, StudyResult]:
    """The studies of single experts that are complete, in the folder of an atlas.

    Raises:
        InputError: One is of another model, of other texts, or of several experts.
    """
    return dict(_found(Path(folder), atlas))


def _found(folder: Path, atlas: StudyResult) -> Iterator[tuple[Expert, StudyResult]]:
    for path in sorted((folder / FOLDER).glob("layer-*-expert-*")):
        if path.name.endswith(".unfinished"):
            continue
        result = StudyResult.load(path)
        plan, other = result.manifest["plan"], atlas.manifest["plan"]
        by_layer: dict[str, list[int]] = plan["settings"].get("experts", {})
        experts = [(int(layer), expert) for layer, ids in by_layer.items() for expert in ids]
        differ = [key for key in ("model", "domains", "reading") if plan[key] != other[key]]
        if result.study != AblationStudy.name or len(experts) != 1 or differ:
            what = f"{' and '.join(differ)} differ from the atlas's" if differ else "this is no study of one expert"
            raise InputError(f"{path}: {what}; move it elsewhere")
        if "effects" not in result.tables or "over_most" not in result.tables["ablation"]:
            raise InputError(
                f"{path}: made by an earlier version, without what this one shows; remove it and ask again"
            )
        yield experts[0], result
