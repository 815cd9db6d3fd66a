"""Options that several commands have, and what is made of them."""

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_lens.cli.config_file import config_domains
from moe_lens.data import Corpus, Domain, embedded_domains, parse_domains
from moe_lens.errors import CheckpointError, InputError


class Dtype(StrEnum):
    """Floating-point types that a model can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


def leads_nowhere(name: str) -> bool:
    """Whether this is the path of something, not a name on the hub, and there is no such thing."""
    is_path = name.startswith((".", "~")) or name.count("/") > 1 or Path(name).is_absolute()
    return is_path and not Path(name).exists()


def model_name(name: str) -> str:
    """Refuse a path that leads nowhere as soon as it is read, before anything is loaded for it."""
    if leads_nowhere(name):
        expected = "a folder with config.json and safetensors, or a name on the hub"
        raise CheckpointError(f"{name}: there is no such folder. Expected {expected}.")
    return name


def _device(name: str) -> str:
    if not re.fullmatch("[a-z]+(:[0-9]+)?", name):
        raise InputError(f"--device {name!r}: expected cpu, cuda, cuda:1, … or auto")
    return name


Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A TOML file with the same options (tokens = 100000), and a table for each domain: [domains.code] with "
        "path or hub, and text, source, split, config, revision, streaming. Options of the command line win.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        metavar="NAME_OR_PATH", help="The model: a name on the hub, a folder, or the embedded one.", callback=model_name
    ),
]
Domains = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=WHERE",
        help="Texts to read; once for each domain. WHERE is a file, a folder or hub:OWNER/DATASET[@COMMIT]. "
        "FILE.jsonl: one object per line with `text`, and `source` to say which texts are from one document. "
        "FILE.json: a list of them. FILE.csv, .tsv, .parquet, or a folder that `datasets` saved: columns as keys "
        "of jsonl. FILE.txt: passages separated by blank lines, one source. All but parquet may be .gz, .zst or "
        ".bz2. Another folder: all such files in it. A name alone is an embedded domain (english, …) or one of the "
        "paper's (paper/gsm8k[@COMMIT], …). Without --domain: the five embedded domains.",
    ),
]
TextColumn = Annotated[
    str, typer.Option(metavar="COLUMN", help="Column or key that holds the text; a+b joins two, a.b is b inside a.")
]
SourceColumn = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Column or key that says which document a text is from.  [source]")
]
Split = Annotated[str, typer.Option(help="Split to read of a dataset on the hub.")]
Streaming = Annotated[
    bool, typer.Option("--streaming", help="Read files piece by piece, for those that are larger than memory.")
]
Tokens = Annotated[int, typer.Option(min=0, help="Tokens of text to read in each domain; 0 reads everything.")]
Window = Annotated[int, typer.Option(min=3, help="Greatest length of a window of text, in tokens.")]
Packed = Annotated[
    bool,
    typer.Option(
        "--packed", help="Lay windows one after another instead of padding them. None attends to another either way."
    ),
]
BatchTokens = Annotated[
    int, typer.Option(min=1, help="Tokens in one forward pass; halved automatically when memory runs out.")
]
ShardTokens = Annotated[int, typer.Option(min=1, help="Save progress each time that this many tokens were read.")]
Seed = Annotated[int, typer.Option(help="Random seed for sampling texts.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision that the model is loaded and run in.")]
Device = Annotated[
    str,
    typer.Option(
        callback=_device, help="Device to run on: cpu, cuda, cuda:1, …; auto spreads a large model over several."
    ),
]


Opened = Sequence[Domain | Corpus]


def open_domains(arguments: Sequence[str] | None, config: Path | None, **shared: Any) -> Opened:
    """The domains of the command line, or else of its --config, or else the embedded ones.

    Args:
        arguments: Of --domain.
        config: Of --config.
        shared: Fields of `DomainSpec` that the command line gave for all of its domains.
    """
    specs = parse_domains(arguments, **shared) if arguments else config_domains(config) if config else []
    return [spec.open() for spec in specs] if specs else embedded_domains()
