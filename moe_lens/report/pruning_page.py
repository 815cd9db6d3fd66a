"""The page of a smaller model."""

from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from moe_lens import viz
from moe_lens.pruning import METHODS
from moe_lens.pruning.frontier import ALL
from moe_lens.pruning.prune_job import Pruned
from moe_lens.report.rendering import as_html, rendered
from moe_lens.report.report_files import PAGE, SMALLER, OutputFolder, check_place
from moe_lens.report.report_page import framed


def write_pruning(made: Pruned, size: pd.DataFrame, speed: pd.DataFrame, folder: OutputFolder) -> Path:
    """Write `report.html`, the frontier, sizes and speeds as parquet, and scores and plan; the path of the page.

    Args:
        made: What was done and measured.
        size: As `compare` gives it.
        speed: The same; empty where it was not measured.
        folder: Where to, entered.
    """
    check_place(folder.path, SMALLER)

    def everything(into: Path) -> None:
        made.frontier.to_frame().to_parquet(into / "frontier.parquet", index=False)
        size.to_parquet(into / "size.parquet", index=False)
        speed.to_parquet(into / "speed.parquet", index=False)
        made.frontier.save(into / "frontier.safetensors")
        made.scores.save(into / "scores.safetensors")
        made.plan.save(into / "plan.safetensors")
        (into / PAGE).write_text(_page(made, size, speed), encoding="utf-8")

    folder.fill(everything)
    return folder.path / PAGE


def _page(made: Pruned, size: pd.DataFrame, speed: pd.DataFrame) -> str:
    kept = len(made.plan.kept[0])
    specialised = {point[3] for point in made.frontier.points if point[1] != ALL}
    figures: dict[str, Any] = {"frontier": as_html(viz.frontier(made.frontier)), "specialists": None}
    if kept in specialised:
        figures["specialists"] = as_html(
            viz.specialists(made.frontier, kept, treatment="merged" if made.settings.merged else "dropped")
        )
    body = rendered(
        "pruning.html.jinja",
        settings=made.settings,
        plan=made.plan,
        scores=made.scores,
        meaning=METHODS[made.settings.method],
        kept=kept,
        experts=made.plan.n_experts,
        rows=made.frontier.to_frame().to_dict("records"),
        size=size.to_dict("records"),
        speed=speed.to_dict("records"),
        figures=figures,
    )
    return framed(f"{SMALLER}{made.settings.model}", Markup(body))  # noqa: S704
