"""A folder with an atlas in it, for a notebook: what was found, and any expert's card."""

from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path

from moe_lens.atlas.card import ExpertCard, expert_card
from moe_lens.atlas.pages import PAGE, of_atlas
from moe_lens.atlas.run_atlas import STUDY
from moe_lens.checked import Natural
from moe_lens.reprs import Summary
from moe_lens.studies import StudyResult


@dataclass(frozen=True)
class AtlasFolder(Summary):
    """An atlas that is written: the page to open, the tables, and the card of each expert.

    A notebook displays the main findings, and where the page is. `AtlasFolder("moe-lens-atlas")` takes up one that the
    command line made.
    """

    folder: str | Path
    """Of the pages; the study is in the folder `study` of it."""

    @property
    def page(self) -> Path:
        """What a browser opens."""
        return Path(self.folder) / PAGE

    @cached_property
    def result(self) -> StudyResult:
        """The tables of the study.

        Raises:
            InputError: There is none in the folder, or it was changed.
        """
        return of_atlas(Path(self.folder) / STUDY)

    def expert(self, layer: Natural, expert: Natural) -> ExpertCard:
        """The card of one expert, with its knock-out if that was asked for; see `expert_card`.

        Args:
            layer: A layer with experts.
            expert: The expert's id.

        Raises:
            HookError: The layer is dense.
            InputError: There is no such expert, or the folder holds no atlas.
        """
        return expert_card(Path(self.folder) / STUDY, layer, expert)

    def _repr_html_(self) -> str:
        lines = "".join(f"<li>{escape(line)}</li>" for line in self.result.findings().lines)
        how = f"Open <code>{escape(str(self.page))}</code> in a browser; <code>.expert(layer, expert)</code>"
        return f"<p>{how} shows the page of one expert here.</p><ul>{lines}</ul>"
