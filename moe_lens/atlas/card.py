"""One expert's card by itself, for a notebook."""

import html
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from moe_lens.atlas import records
from moe_lens.atlas.asked_knockouts import load_asked
from moe_lens.atlas.pages import CARD, about_of, of_atlas
from moe_lens.atlas.script_files import script
from moe_lens.checked import Natural
from moe_lens.errors import HookError, InputError
from moe_lens.reprs import TRUST
from moe_lens.storage import written_whole
from moe_lens.studies import StudyResult

HEIGHT = 720
"""Pixels of the frame; what does not fit scrolls."""
UNTRUSTED = f"A page is shown here, and this notebook is not trusted to show it: {TRUST}."
"""Stands in the frame, and is seen where there may be none."""


@dataclass(frozen=True)
class ExpertCard:
    """The atlas's page of one expert; a notebook displays it, and `save` writes it to a file."""

    layer: Natural
    expert: Natural
    page: str
    """The whole document; it loads nothing from elsewhere."""

    def __repr__(self) -> str:
        return f"ExpertCard(layer {self.layer}, expert {self.expert}: {len(self.page):,} characters)"

    def _repr_html_(self) -> str:
        """In a frame of its own, so that neither its look nor its scripts meet those of the notebook."""
        title = f"Layer {self.layer}, expert {self.expert}"
        frame = f'sandbox="allow-scripts" title="{title}" style="width: 100%; height: {HEIGHT}px; border: 0"'
        return f'<iframe {frame} srcdoc="{html.escape(self.page)}">{title}. {UNTRUSTED}</iframe>'

    def save(self, path: str | Path) -> None:
        """Write the page, whole or not at all.

        Raises:
            InputError: It cannot be written there.
        """
        with written_whole(path) as temporary:
            temporary.write_text(self.page, encoding="utf-8")


def expert_card(result: StudyResult | str | Path, layer: Natural, expert: Natural) -> ExpertCard:
    """The card of one expert.

    Args:
        result: A result of the study `atlas`, or the folder that it was saved in; knock-outs that were asked for are
            found beside that folder.
        layer: A layer with experts.
        expert: The expert's id.

    Raises:
        HookError: The layer is dense.
        InputError: There is no such expert, or the result is of another study.
    """
    folder = Path(result).parent if isinstance(result, str | Path) else None
    result = of_atlas(result)
    asked = {} if folder is None else load_asked(folder, result)
    about = about_of(result)
    if layer not in about["layers"]:
        raise HookError(f"layer {layer} has no experts; MoE layers are {about['layers']}")
    if not 0 <= expert < about["experts"]:
        raise InputError(f"expert {expert}; the layer has 0 to {about['experts'] - 1}")
    record = records.experts(result, asked)[layer]
    others = [None] * about["experts"]
    known = ("difference", "share", "p_value")
    differences = [{name: of[name] for name in known} for of in records.measures(result)["domains"]]
    words = _words(result, record, expert)
    data: dict[str, Any] = {"about": about, "map": {"domains": differences}, "words": words}
    data[f"layer-{layer}"] = {**record, "experts": [*others[:expert], record["experts"][expert], *others[expert + 1 :]]}
    shipped = resources.files("moe_lens.atlas")
    look, *scripts = ((shipped / name).read_text(encoding="utf-8") for name in CARD)
    scripts[1:1] = [script(name, value) for name, value in data.items()]
    scripts.append(f"atlas.begin(); atlas.alone = true; atlas.drawAlone({layer}, {expert});")
    parts = "\n".join(f"<script>{part}</script>" for part in scripts)
    head = f'<meta charset="utf-8">\n<title>Layer {layer}, expert {expert}</title>\n<style>{look}</style>'
    return ExpertCard(layer, expert, f'<!doctype html>\n{head}\n<main id="view"></main>\n{parts}\n')


def _words(result: StudyResult, record: dict[str, Any], expert: int) -> dict[str, Any]:
    """Texts of the tokens that a card shows."""
    of = record["experts"][expert]
    shown = {entry[0] for name in ("tokens", "router", "promoted", "suppressed") for entry in of[name]}
    shown |= {token for neuron in of["neurons"] for tokens in neuron[4:] for token in tokens}
    shown |= {token for lines in of["contexts"].values() for line in lines for token in line[5]}
    words = records.words(result)
    pairs = [pair for pair in zip(words["ids"], words["texts"], strict=True) if pair[0] in shown]
    return {"ids": [token for token, _ in pairs], "texts": [text for _, text in pairs]}
