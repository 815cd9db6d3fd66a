"""The commands that compare: two saved studies or domains, and two checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.cli import options
from moe_lens.cli.app import app
from moe_lens.cli.model_loading import quiet
from moe_lens.cli.show import visible
from moe_lens.cli.study_command import Arguments, Work, command
from moe_lens.errors import InputError
from moe_lens.manifest import read_manifest

if TYPE_CHECKING:
    pass


@command("checkpoints", "moe-lens-checkpoints")
def checkpoints(
    other: Annotated[
        str, typer.Option(metavar="MODEL", help="The other checkpoint, of the same shape and with the same tokenizer.")
    ],
    arguments: Arguments,
) -> Work:
    """Do two checkpoints route the same texts alike?

    For example base and chat, or before and after fine-tuning.

    Tables: overlap (share of a token's experts that both checkpoints choose, by layer, with intervals over sources; its
    null is the overlap that the loads alone give; three pairs are compared: both checkpoints as they are, the first
    with its own and with the other's routers, and the first with the other's routers and the other), losses (increase
    of the loss with swapped routers, in nats a token).

    Every text is read four times. Both models are held in memory, loaded as the options say.

    Example: moe-lens checkpoints --model base --other chat --domain prose=prose.jsonl --out runs/chat
    """
    from moe_lens.studies import Checkpoints, run

    def side_by_side(model: Any, domains: Any, **how: Any) -> Any:
        first = next(model.original_model.parameters())
        elsewhere = arguments.max_memory is not None or first.device.type == "meta"  # divided, or on disk
        like = replace(
            arguments,
            dtype=options.Dtype(str(first.dtype).removeprefix("torch.")),
            device=arguments.device if elsewhere else str(first.device),
        )
        return run(Checkpoints(like.load(other), other), model, domains, **how)

    return side_by_side


@app.command("compare")
def compare_studies(
    first: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a saved study.")],
    second: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="Folder of another result of the same study.  [the first one]"),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE", callback=options.at_home, help="Parquet file for the table.")
    ] = Path("moe-lens-compare.parquet"),
    domains: Annotated[
        list[str] | None,
        typer.Option(
            "--domain", metavar="NAME", help="Compare two domains: give the option twice, the second minus the first."
        ),
    ] = None,
    parallel: options.Parallel = None,
    show: Annotated[int, typer.Option(min=0, help="Number of largest differences to print.")] = 10,
) -> None:
    """Compare two saved studies, or two domains.

    Subtracts the first from the second, with 95 % intervals over sources. Two models on the same texts (base and chat,
    before and after pruning) are paired by source. Experts are compared by id, which makes sense only where one model
    was made from the other; where one has fewer, single experts are left out.

    Example: moe-lens compare runs/base runs/chat --out difference.parquet

    Two domains of one study: moe-lens compare runs/routing --domain english --domain german

    With --parallel, two domains that hold the same documents are paired by document.
    """
    if domains is not None and len(domains) != 2:
        raise InputError(f"got --domain {len(domains)} times; expected two domains to compare, or none")
    if parallel is not None and domains is None:
        raise InputError("--parallel is about two domains: give --domain twice, or leave it out")
    if second is None and domains is None:
        raise InputError("got one folder; give another one, or two of its domains: --domain NAME --domain NAME")
    for folder in (first, second or first):
        read_manifest(folder)
    if any(folder.resolve() in out.resolve().parents for folder in (first, second or first)):
        raise InputError(f"--out {out} is inside of a study that is compared; give a file elsewhere")
    if out.suffix not in ("", ".parquet"):
        raise InputError(f"--out {out} is not named as what is written there; expected a .parquet file")

    from moe_lens.storage import written_whole
    from moe_lens.studies import StudyResult, compare

    quiet()
    studies = StudyResult.load(first), None if second is None else StudyResult.load(second)
    two = None if domains is None else (domains[0], domains[1])
    names = None if second is None else _apart(first, second)
    with written_whole(out) as temporary:
        temporary.touch()  # what cannot be written is said before the work, not after
        found = compare(*studies, domains=two, parallel=parallel, names=names)
        found.table.to_parquet(temporary, index=False)
    print(visible(found.found()))
    for quantity, rows in found.table.groupby("quantity", sort=False):
        order = (-abs(rows["difference"].to_numpy())).argsort()
        largest = rows.iloc[order[:show]]
        print(f"\n{quantity}, the largest differences:")
        print(visible(largest.drop(columns=["quantity", "paired", "sources", "dropped"]).to_string(index=False)))
    print(f"\n{out.resolve()}")


def _apart(first: Path, second: Path) -> tuple[str, str] | None:
    """The ends of two paths, as long as it takes to tell them apart; None if nothing does."""
    one, other = first.resolve().parts, second.resolve().parts
    for n in range(1, max(len(one), len(other)) + 1):
        if one[-n:] != other[-n:]:
            return "/".join(one[-n:]), "/".join(other[-n:])
    return None
