"""A section of the page: a title and what stands under it, from a model's studies."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from moe_lens.report.rendering import rendered
from moe_lens.studies import StudyResult
from moe_lens.studies.frames import where

Studies = Mapping[str, StudyResult]
"""Results of one model by the name of the study: "routing", "single_expert", "lens", …"""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    body: Markup

    def numbered(self, model: int) -> "Section":
        """With an anchor that no section of another model has, and links to this model's sections."""
        if model == 1:
            return self
        linked = re.sub(r'href="#(\w+)"', rf'href="#\1-{model}"', self.body)
        return replace(self, anchor=f"{self.anchor}-{model}", body=Markup(linked))  # noqa: S704  # escaped as it was


def section(anchor: str, title: str, **values: Any) -> Section:
    """A section from the template of its anchor's name in `sections/`."""
    return Section(anchor, title, Markup(rendered(f"sections/{anchor}.html.jinja", **values)))  # noqa: S704


def rows_where(frame: Any, **equal: Any) -> Any:
    """The rows that hold these values, by column; untyped, as what is taken of them would have to be cast each time."""
    return where(frame, **equal)


def facts(result: StudyResult) -> dict[str, Any]:
    """Of the model."""
    return result.manifest["plan"]["model"]
