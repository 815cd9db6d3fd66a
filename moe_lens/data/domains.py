"""Domains: named collections of passages, each with the source that it was taken from."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from moe_lens.data.files import read_passages
from moe_lens.data.in_memory import read_given
from moe_lens.data.rows import Passage
from moe_lens.errors import InputError, not_files
from moe_lens.reprs import Summary

EMBEDDED = ("english", "french", "german", "math", "code")
"""The domains that ship with the package; `assets/domains/ATTRIBUTION.md` says where they come from."""


def check_name(name: Any) -> None:
    """Refuse what cannot be the name of a domain, which stands in tables and in the terminal.

    Raises:
        InputError: It is no text, or empty, or has control characters or ends of lines in it.
    """
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"a domain is called {name!r}; its name must be a text that is not empty")
    if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029]", name):
        raise InputError(f"a domain is called {name!r}; its name must be one line without control characters")


@dataclass(frozen=True)
class Domain(Summary):
    """A named collection of passages."""

    name: str
    passages: tuple[Passage, ...]

    @classmethod
    def of(cls, name: str, texts: Any, *, text: str = "text", sources: str | Iterable[Any] | None = None) -> "Domain":
        """A domain from texts as they are at hand, all of them held in memory.

        Args:
            name: What the domain is called in tables and figures.
            texts: A list or any other iterable of texts, a pandas Series or DataFrame, a dataset of `datasets`, or an
                iterable of rows (dictionaries). A generator is read to its end.
            text: Of a frame, a dataset or rows: the column with the text, or several joined by +. Columns inside
                columns are named with dots: `meta.body`.
            sources: Which document each text was taken from: the name of a column, or one value for each text (such as
                `range(len(texts))`, where every text is a document of its own). Not given: the column `source` where
                there is one. Texts without a source count as one: nothing shows that they are independent, and so they
                have no intervals.

        Raises:
            InputError: One is no text, is empty or holds half of a character; there is no such column; there are
                more or fewer sources than texts; or all texts are names of files. The message says which.
        """
        check_name(name)
        passages = tuple(read_given(name, texts, text=text, sources=sources))
        if not passages:
            raise InputError(f"domain {name!r} holds no text")
        not_files((passage.text for passage in passages), f"the texts of domain {name!r}", "load_domain(name, path)")
        return cls(name, passages)

    def _facts(self) -> dict[str, Any]:
        characters = sum(len(passage.text) for passage in self.passages)
        sizes = {"passages": len(self.passages), "sources": self.n_sources, "characters": characters}
        return {"name": self.name, **sizes}

    @property
    def n_sources(self) -> int:
        """How many different documents the passages come from."""
        return len({passage.source for passage in self.passages})

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these texts from others, as plain values."""
        found = hashlib.sha256()
        for passage in self.passages:
            found.update(json.dumps([passage.text, passage.source]).encode())
        return {"passages": len(self.passages), "digest": found.hexdigest()[:16]}


def embedded_domains() -> list[Domain]:
    """The five held-out domains that ship with the package."""
    return [embedded_domain(name) for name in EMBEDDED]


def embedded_domain(name: str) -> Domain:
    """One of the five held-out domains: english, french, german, math or code."""
    folder = resources.files("moe_lens") / "assets" / "domains"
    return load_domain(name, Path(str(folder / f"{name}.jsonl")))


def load_domain(name: str, path: str | Path, *, text: str = "text", source: str | None = None) -> Domain:
    """Read a domain from a file or a folder.

    Args:
        name: What the domain is called in tables and figures.
        path: `.jsonl`: an object a line with `text` and, if known, `source`. `.json`: a list of such objects, or of
            texts. `.csv`, `.tsv`: a first line that names the columns. `.txt`: passages separated by blank lines.
            `.parquet`, or a folder that `datasets` saved: a row a passage. All but parquet may be compressed: `.gz`,
            `.zst`, `.bz2`. Any other folder: all files of these kinds in it. Passages without a source, and those of a
            `.txt` file, have their file as their source: nothing shows that they are independent.
        text: The column (or key) with the text, or several joined by +. Keys inside keys are named with dots.
        source: The column that says which document a text was taken from. Not given: `source`, where there is one.

    Raises:
        InputError: The file cannot be read, is not UTF-8, holds no text or no such column, or has a line that is not as
            described; the message names file and line.
    """
    passages = tuple(read_passages(path, text=text, source=source))
    if not passages:
        raise InputError(f"{path}: domain {name!r} holds no text")
    return Domain(name, passages)
