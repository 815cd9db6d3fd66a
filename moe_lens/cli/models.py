"""`moe-lens models` and `moe-lens info`: which families there are, and what a model is."""

from typing import TYPE_CHECKING, Annotated

import typer

from moe_lens.cli import options
from moe_lens.cli.app import app

if TYPE_CHECKING:
    from moe_lens.model.loading.model_info import ModelInfo


@app.command("models")
def models() -> None:
    """List the supported and the refused model types.

    The supported ones with their routing rules, the refused ones with the reasons.
    """
    print(families_text())


@app.command("info")
def info(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME_OR_PATH",
            callback=options.model_name,
            help="The model: a name on the hub, a folder, a config.json, or the embedded one.",
        ),
    ],
) -> None:
    """Describe a model from its config alone.

    Layers, experts, router, parameters, and how it fits this machine.
    """
    print(info_text(model))


def families_text() -> str:
    """The supported families, one a line, and those that are refused."""
    from moe_lens.model.families.refusals import REFUSED
    from moe_lens.model.families.table import FAMILIES

    wide = max(map(len, FAMILIES))
    lines = [f"{len(FAMILIES)} supported model types, and how their routers select and weight experts:"]
    for name, family in sorted(FAMILIES.items()):
        lines.append("  ".join(filter(None, (f"  {name:<{wide}}", family.rule(), family.releases()))))
    lines += ["", f"{len(REFUSED)} refused:"]
    lines += [f"  {name:<{wide}}  {why}" for name, why in sorted(REFUSED.items())]
    return "\n".join(lines)


def info_text(name_or_path: str) -> str:
    """What a model is, from its config alone."""
    from moe_lens.model.loading.dispatch import offload_root
    from moe_lens.model.loading.machine import Machine
    from moe_lens.model.loading.model_info import here, model_info

    info = model_info(name_or_path)
    found = [*rows(info), *here(info, Machine.here(offload_root()))]
    return "\n".join(f"{label:<12}{value}" for label, value in found)


def rows(info: "ModelInfo") -> list[tuple[str, str]]:
    """Labels and values to show."""
    from moe_lens.model.loading.model_info import DTYPES

    memory = (f"{size(info.memory(dtype))} in {str(dtype).removeprefix('torch.')}" for dtype in DTYPES)
    shared = ", and shared experts" if info.has_shared else ""
    without = f" ({info.n_identities} of them the identity)" if info.n_identities else ""
    found = [
        ("model type", info.model_type),
        ("layers", f"{info.n_layers}, of which {len(info.moe_layers)} have experts: {spans(info.moe_layers)}"),
        ("experts", f"{info.n_experts} of width {info.d_expert}{without}, {info.top_k} for each token{shared}"),
        ("width", f"{info.d_model}"),
        ("router", info.rule),
        ("parameters", f"{info.parameters:,} ({info.active:,} active for each token)"),
        ("memory", ", ".join(memory) + ", for the parameters alone"),
    ]
    return [*found, ("note", info.note)] if info.note else found


def size(count: int) -> str:
    """Bytes in GiB, or in MiB where they are fewer."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def spans(layers: tuple[int, ...]) -> str:
    """`(1, 2, 3, 7)` → `1–3, 7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
