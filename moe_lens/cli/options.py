"""Options that several commands share, and how they are read."""

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_lens.cli.config_file import config_domains
from moe_lens.data import Corpus, Domain, DomainSpec, embedded_domains, parse_domains
from moe_lens.errors import CheckpointError, InputError
from moe_lens.model.loading.config_json import believed_config


class StoredDtype(StrEnum):
    """Floating-point types that activations can be saved in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Quantize(StrEnum):
    """How large matrices can be packed."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"
    stored = "stored"


class Dtype(StrEnum):
    """Floating-point types that a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


def leads_nowhere(name: str) -> bool:
    """Whether this is a path, not a name on the hub, and does not exist."""
    is_path = name.startswith((".", "~")) or name.count("/") > 1 or Path(name).is_absolute()
    return is_path and not Path(name).exists()


def model_name(name: str) -> str:
    """Refuse a path that does not exist, or a config that no model can have, at once: before torch is imported."""
    if leads_nowhere(name):
        expected = "a folder with config.json and safetensors, or a name on the hub"
        raise CheckpointError(f"{name}: there is no such folder. Expected {expected}.")
    for config in (Path(name), Path(name, "config.json")):
        if config.name == "config.json" and config.is_file():
            believed_config(config)
    return name


def at_home(path: Path) -> Path:
    """The path with `~` expanded, which a shell leaves as it is in --out=~/result."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise InputError(f"{path}: there is no user of this name; write the folder in full") from None


def _device(name: str) -> str:
    if not re.fullmatch("[a-z]+(:[0-9]+)?", name):
        raise InputError(f"--device {name!r}: expected cpu, cuda, cuda:1, … or auto")
    return name


def max_memory(given: Sequence[str] | None, device: str) -> dict[int | str, int | str] | None:
    """Sizes by place, of --max-memory.

    Raises:
        InputError: Something else, or a device that was chosen already.
    """
    if not given:
        return None
    if device != "auto":
        raise InputError(f"--max-memory is for --device auto, and --device is {device}; leave one of them out")
    found: dict[int | str, int | str] = {}
    for text in given:
        matched = re.fullmatch(r"(cpu|[0-9]+)=([0-9]+(?:[KMG]i?B)?)", text)
        if matched is None:
            raise InputError(f"--max-memory {text!r}: expected PLACE=SIZE, such as cpu=9GiB or 0=20GiB")
        place, most = matched.groups()
        found[int(place) if place != "cpu" else place] = int(most) if most.isdigit() else most
    return found


def experts_by_layer(given: Sequence[str], option: str) -> dict[int, list[int]]:
    """Experts by layer, of an option.

    Raises:
        InputError: Something else.
    """
    found: dict[int, list[int]] = {}
    for text in given:
        matched = re.fullmatch(r"([0-9]+):([0-9]+(?:,[0-9]+)*)", text.replace(" ", ""), re.ASCII)
        if matched is None:
            raise InputError(f"{option} {text!r}: expected LAYER:EXPERT,EXPERT,…, such as 3:17,4")
        layer, experts = matched.groups()
        found.setdefault(int(layer), []).extend(int(expert) for expert in experts.split(","))
    return found


Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A TOML file with the same options (tokens = 100000), and a table for each domain: [domains.code] with "
        "path or hub, and text, source, split, config, revision, streaming. The command line takes precedence.",
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
        help="Texts to read. Give it once for each domain. WHERE is a file, a folder or hub:OWNER/DATASET[@COMMIT]. "
        "FILE.jsonl: one object per line with `text`, and `source`, the document that the text is from. "
        "FILE.json: a list of such objects. FILE.csv, .tsv, .parquet, or a folder that `datasets` saved: columns "
        "named as the keys of jsonl. FILE.txt: passages separated by blank lines, one source. All but parquet may "
        "be .gz, .zst or .bz2. Another folder: all such files in it. Only a name: an embedded domain (english, …) or "
        "one of the paper's (paper/gsm8k[@COMMIT], …). Without --domain, the five embedded domains are read.",
    ),
]
TextColumn = Annotated[
    str,
    typer.Option(
        metavar="COLUMN", help="Column or key with the text. a+b joins two columns; a.b is the key b inside a."
    ),
]
SourceColumn = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN", help="Column or key with the document that a text is from.  [source, in files that have one]"
    ),
]
Split = Annotated[str, typer.Option(help="Split of a dataset on the hub.")]
Streaming = Annotated[
    bool,
    typer.Option(
        "--streaming", help="Read files piece by piece instead of loading them. For files larger than memory."
    ),
]
Tokens = Annotated[int, typer.Option(min=0, help="Number of tokens to read in each domain; 0 reads everything.")]
Window = Annotated[int, typer.Option(min=3, help="Maximum length of a window of text, in tokens.")]
Packed = Annotated[
    bool,
    typer.Option(
        "--packed",
        help="Put several windows into one row instead of padding them. Windows never attend to one another.",
    ),
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of tokens in one forward pass; halved automatically when memory runs out.  [depends on the model]",
    ),
]
ShardTokens = Annotated[int, typer.Option(min=1, help="Save progress each time that this many tokens were read.")]
Seed = Annotated[int, typer.Option(help="Random seed for sampling texts.")]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="Precision that the model is loaded and run in; auto: the checkpoint's, float32 for the embedded model."
    ),
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(
        help="Pack experts and linear layers in 4 or 8 bits while loading, with bitsandbytes; stored: keep the bits of "
        "a checkpoint that is packed."
    ),
]
TrustTokenizer = Annotated[
    bool,
    typer.Option(
        "--trust-tokenizer-code", help="Run code that comes with the model's tokenizer. No other code is run."
    ),
]
Device = Annotated[
    str,
    typer.Option(
        callback=_device,
        help="Device to run on: cpu, cuda, cuda:1, …; auto: one GPU if the model fits, otherwise several GPUs, main "
        "memory and the disk as needed.",
    ),
]
MaxMemory = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PLACE=SIZE",
        help="With --device auto, the memory limit of a place: cpu=9GiB, 0=20GiB for the first GPU; may be repeated. "
        "Places that are not named are not used; weights that fit nowhere are read from disk in every pass.  [90 % of "
        "the free memory]",
    ),
]


Opened = Sequence[Domain | Corpus]
OF_DOMAINS = {"text": "text-column", "source": "source-column", "split": "split", "streaming": "streaming"}
"""Fields of `DomainSpec` and the options that choose them for all domains."""


def open_domains(arguments: Sequence[str] | None, config: Path | None, out: Path, **shared: Any) -> Opened:
    """The domains of the command line, or else of its --config, or else the embedded ones.

    Args:
        arguments: Of --domain.
        config: Of --config.
        out: Of --out, which must not be in a folder of texts: what is written there would be read as texts.
        shared: Fields of `DomainSpec` that the command line gave for all of its domains.

    Raises:
        InputError: They cannot be opened, or something was chosen for domains that are not there.
    """
    if arguments:
        specs = parse_domains(arguments, **shared)
    else:
        specs = config_domains(config) if config else []
        if wrong := [key for key, value in shared.items() if value != getattr(DomainSpec(name=""), key)]:
            instead = f"write {wrong[0]} = … into its table" if specs else "give your texts by --domain NAME=FILE"
            raise InputError(f"--{OF_DOMAINS[wrong[0]]} is about --domain, and there is none: {instead}")
    for spec in specs:
        texts = Path(spec.path or "").resolve()
        if spec.path is not None and texts.is_dir() and texts in (out.resolve(), *out.resolve().parents):
            raise InputError(f"--out {out} is in the folder of the texts of domain {spec.name!r}; choose another")
    return [spec.open() for spec in specs] if specs else embedded_domains()


Parallel = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="Where domains hold the same documents (translations): a regular expression for the part in which the "
        "names of such sources differ.",
    ),
]
