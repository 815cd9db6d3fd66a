"""The README of a pruned checkpoint: what was done to it, and what was measured."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import pandas as pd

from moe_lens.pruning.plans import Plan


def model_card(
    plan: Plan, config: Mapping[str, Any], measurements: Mapping[str, Any], left_out: Sequence[str] = ()
) -> str:
    """Markdown.

    Args:
        plan: What was done.
        config: The original's config.json.
        measurements: Tables (`pandas.DataFrame`) or texts, by title.
        left_out: Layers of the original that predict several tokens ahead, by their names in the checkpoint.
    """
    kept = sorted({len(experts) for experts in plan.kept})
    name = plan.model.get("name", "a model")
    treatment = "averaged into those that stayed, their neurons aligned first" if plan.merged else "dropped"
    before = config.get("num_experts_per_tok", plan.top_k)
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {name}",
        "tags: [mixture-of-experts, pruned]",
        "---",
        "",
        f"# {name}, {kept[0]} of {plan.n_experts} experts",
        "",
        f"Made by [moe_lens](https://pypi.org/project/moe-lens/) {version('moe-lens')} from `{name}`: in each of "
        f"{len(plan.layers)} layers {kept[0]} of {plan.n_experts} routed experts stay, chosen by *{plan.method}*; the "
        f"others are {treatment}. {plan.top_k} experts are active for a token"
        + (f" instead of {before}." if before != plan.top_k else ", as before."),
        "",
        "The router chooses among the experts that are left: their rows are those of the original."
        " Nothing was trained afterwards.",
        "",
        *_loading(config["model_type"]),
    ]
    if left_out:
        lines += [
            "",
            f"Layers of the original that predict several tokens ahead ({', '.join(left_out)}) were left out.",
        ]
    for title, content in measurements.items():
        text = _table(content) if isinstance(content, pd.DataFrame) else str(content)
        lines += ["", f"## {title}", "", text]
    lines += ["", "## Experts that stayed", "", "| layer | experts of the original, in their new order |", "|---|---|"]
    lines += [f"| {layer} | {', '.join(map(str, of))} |" for layer, of in zip(plan.layers, plan.kept, strict=True)]
    return "\n".join(lines) + "\n"


def _loading(model_type: str) -> list[str]:
    needs = (
        'from moe_lens import HookedMoE  # tells transformers of model_type "deepseek"\n'
        if model_type == "deepseek"
        else ""
    )
    return [
        f"```python\n{needs}from transformers import AutoModelForCausalLM\n",
        'AutoModelForCausalLM.from_pretrained("…")',
        "```",
    ]


def _table(frame: pd.DataFrame) -> str:
    def cell(value: Any) -> str:
        missing = value is None or value != value
        text = "–" if missing else f"{value:.4g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    rows = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    rows += [[cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
