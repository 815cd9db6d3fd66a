"""Writing the folder: the page as it ships, and the data of a study as scripts."""

import re
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import moe_lens
from moe_lens.atlas import records
from moe_lens.atlas.asked_knockouts import Expert, load_asked
from moe_lens.atlas.script_files import script, sharded
from moe_lens.data import EMBEDDED, embedded_domain
from moe_lens.errors import InputError, a_kind
from moe_lens.scratch import folder_made, scratch_folder
from moe_lens.stats import MIN_SOURCES
from moe_lens.studies import Atlas, StudyResult
from moe_lens.studies.atlas_choice import AT_LEAST, RARE, RESAMPLES
from moe_lens.studies.atlas_contexts import TEXT_TOKENS
from moe_lens.studies.atlas_knockouts import COSTLIEST, MATCHED
from moe_lens.studies.atlas_reading import SEEN_AGAIN

PAGE = "index.html"
CARD = ("atlas.css", "base.js", "terms.js", "text.js", "verdict.js", "effects.js", "card.js")
"""What the page of one expert takes."""
SHIPPED = (PAGE, *CARD, "map.js", "list.js", "search.js", "start.js")
DATA = "data"
SHARD = 450_000
"""Greatest number of bytes of a part of the search index, and of what it holds beside."""


def write_atlas(result: StudyResult | str | Path, out: str | Path) -> Path:
    """Write `index.html` and what it shows; the path of the page. The same result gives the same files.

    The folder opens from the disk, and nothing in it asks for anything from elsewhere. A page of an expert is
    `index.html#layer=3&expert=17`. Files of the folder that have other names are left as they are. Knock-outs that were
    asked for, in the folder `knockouts` of it, are shown.

    Args:
        result: Of the study `atlas`, or the folder that it was saved in.
        out: The folder; made if it does not exist.

    Raises:
        InputError: It is the result of another study, or the folder cannot be written, or holds others' files of the
            same names.
    """
    result, out = of_atlas(result), Path(out)
    check_place(out)
    files = files_of(result, load_asked(out, result))
    try:
        with folder_made(out), scratch_folder(out, ".unfinished-") as scratch:
            (scratch / DATA).mkdir()
            for name, content in files.items():
                (scratch / name).write_text(content, encoding="utf-8", newline="\n")
            # The data is exchanged whole, and the page last: what is there always fits together.
            if (out / DATA).exists():
                (out / DATA).rename(scratch / "before")
            (scratch / DATA).rename(out / DATA)
            for name in reversed(SHIPPED):
                (scratch / name).replace(out / name)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from None
    return out / PAGE


def check_place(out: str | Path) -> None:
    """Nothing, where an atlas can be written: all that it would replace is of an atlas.

    Raises:
        InputError: Files of other origin have names that the atlas needs.
    """
    out = Path(out)
    page, data = out / PAGE, out / DATA
    try:
        foreign = [page] if _there(page) and _TITLE not in _beginning(page) else []
        if data.is_dir():
            foreign += [path for path in sorted(data.iterdir()) if not _beginning(path).startswith(_CALL)]
        elif _there(data):
            foreign.append(data)
        if not _there(page) and not _there(data):
            foreign += [out / name for name in SHIPPED if _there(out / name)]
    except OSError as error:
        raise InputError(f"{out}: cannot be looked into ({error.strerror or error}); choose another --out") from None
    if foreign:
        raise InputError(f"{foreign[0]}: is there, is not of an atlas, and would be replaced; choose another --out")


_TITLE, _CALL = b"<title>Atlas of experts</title>", b"atlas.put("


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _beginning(path: Path) -> bytes:
    """Some bytes of a file; none of a folder, a pipe or a device."""
    if not path.is_file():
        return b""
    with path.open("rb") as content:
        return content.read(4096)


def of_atlas(result: StudyResult | str | Path) -> StudyResult:
    """The result of the study `atlas`, loaded if need be.

    Raises:
        InputError: It is the result of another study.
    """
    result = StudyResult.load(result) if isinstance(result, str | Path) else result
    if not isinstance(result, StudyResult):
        raise InputError(f"the result is {a_kind(result)}; expected a StudyResult, or the folder of one")
    if result.study != Atlas.name:
        raise InputError(f"this is the result of the study {result.study!r}; expected {Atlas.name!r}")
    if lacking := {"compared", "pairs", "quality"} - set(result.tables):
        raise InputError(
            f"the study was made by an earlier version, without the tables {', '.join(sorted(lacking))}; "
            "make the atlas anew, in another folder"
        )
    if lacking := [name for name, columns in _NEEDED.items() if not columns <= set(result.tables[name].columns)]:
        raise InputError(
            f"the study was made by an earlier version, with fewer columns of the tables {', '.join(lacking)}; "
            "make the atlas anew, in another folder"
        )
    return result


_NEEDED = {"compared": {"by", "over_most"}, "knockouts": {"at_first"}}


def files_of(result: StudyResult, asked: Mapping[Expert, StudyResult]) -> dict[str, str]:
    """The content of every file of the folder, by its path there.

    Args:
        result: Of the study `atlas`.
        asked: Knock-outs of single experts that were asked for.
    """
    shipped = resources.files("moe_lens.atlas")
    files = {name: (shipped / name).read_text(encoding="utf-8") for name in SHIPPED}
    layers, texts = records.experts(result, asked), records.texts(result)
    shards = list(sharded(records.tokens(result), SHARD))
    about = about_of(result)
    about |= {"shards": [min(shard) for shard in shards]}
    about |= {"texts": [{name: text[name] for name in ("domain", "source")} for text in texts]}
    named: dict[str, Any] = {"about": about}
    named |= {"map": records.measures(result), "words": records.words(result)}
    named |= {f"layer-{layer}": of for layer, of in layers.items()}
    named |= {f"search-{number}": shard for number, shard in enumerate(shards)}
    named |= {f"text-{number}": text for number, text in enumerate(texts)}
    return files | {f"{DATA}/{name}.js": script(name, value) for name, value in named.items()}


def about_of(result: StudyResult) -> dict[str, Any]:
    """What was measured of which model on which texts, and the limits below which nothing is told."""
    plan, read = result.manifest["plan"], result.manifest["read"]
    quality: Any = result.tables["quality"].set_index("domain")
    loss = [dict(zip(_LOSS, line, strict=True)) for line in records.rows(quality.loc[list(result.domains)], _LOSS)]
    knocked = result.tables["knockouts"]
    without: Any = knocked.groupby("read")["tokens"].max()
    first = [-(-plan["settings"]["knockout_tokens"] // of["windows"]) for of in read]
    return {
        "version": moe_lens.__version__,
        "model": {**plan["model"], "name": _model_name(plan["model"]["name"])},
        "layers": plan["model"]["moe_layers"],
        "experts": plan["model"]["experts"],
        "top_k": plan["model"]["top_k"],
        "domains": [
            {**of, **own, "first": n, "without": int(without.get(of["name"], 0))}
            for of, own, n in zip(read, loss, first, strict=True)
        ],
        "knocked": len(knocked[["layer", "expert"]].drop_duplicates()),
        "reading": plan["reading"],
        "settings": plan["settings"],
        "command": without_folders(result.manifest["command"]),
        "versions": result.manifest["versions"],
        "contexts": "contexts" in result.tables,
        "limits": {
            "rare": RARE,
            "at_least": AT_LEAST,
            "sources": MIN_SOURCES,
            "resamples": RESAMPLES,
            "seen_again": SEEN_AGAIN,
            "controls": MATCHED,
            "costliest": COSTLIEST,
            "text_tokens": TEXT_TOKENS,
        },
        "attribution": _attribution(plan["domains"]),
    }


def _model_name(name: str | None) -> str | None:
    return name if name is None or _HUB.fullmatch(name) else _FOLDERS.sub("", name.rstrip("/\\"))


_LOSS = ("loss", "low", "high", "uniform")


def without_folders(command: str) -> str:
    """A command that tells of no folder: of every path the last part alone, whichever system it is of.

    Names on the Hub, two words with a slash between them, stay whole after `--model`; so do data sets, `hub:…` and
    `paper/…`, after `--domain`, texts after `--text`, and columns.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    found = []
    for before, word in zip(["", *words], words, strict=False):
        option, _, value = word.partition("=") if word.startswith("--") else (before, "", word)
        named = option in _NO_FOLDERS and _NO_FOLDERS[option].fullmatch(value)
        found.append(word if named else _FOLDERS.sub(r"\1", word))
    return shlex.join(found)


_HUB = re.compile(r"[\w-]+/[\w.-]+")
_ANY = re.compile(r".*", re.DOTALL)
_NO_FOLDERS = {
    "--model": _HUB,
    "--domain": re.compile(r"([^/\\]+=)?hub:.*|paper/[\w@.-]+"),
    "--text": _ANY,
    "--text-column": _ANY,
    "--source-column": _ANY,
}
"""What stays whole after an option."""
_FOLDERS = re.compile(r"(^|=)[^=]*[/\\]")


def plain_text(markdown: str) -> str:
    """A text without the marks of headings, emphasis, code, tables and links, whose addresses follow in brackets."""
    text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r"\1 (\2)", markdown)
    text = re.sub(r"^#+ +", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\|[-:| ]+\|\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\| *(.*?) *\|$", lambda row: "– " + row[1].replace(" | ", "; "), text, flags=re.MULTILINE)
    return re.sub(r"(\*\*?|`)([^*`\n]+)\1", r"\2", text)


def _attribution(domains: list[dict[str, Any]]) -> str | None:
    """Where texts that ship with the package come from, and their licences, if any of them was read."""
    for given in domains:
        if given["name"] in EMBEDDED:
            own = {"name": given["name"], **embedded_domain(given["name"]).identity}
            if own == given:
                path = resources.files("moe_lens") / "assets" / "domains" / "ATTRIBUTION.md"
                return plain_text(path.read_text(encoding="utf-8"))
    return None
