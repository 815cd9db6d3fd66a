"""A domain that is read as it comes: larger than memory, from files, the hub or a generator, through `datasets`."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moe_lens.checked import Natural, Positive, Seed
from moe_lens.data.files import files_in, read_passages
from moe_lens.data.in_memory import rows_of
from moe_lens.data.rows import Passage, read_row
from moe_lens.errors import InputError
from moe_lens.reprs import Summary

SHUFFLED = 10_000
"""Passages that are held at a time to be drawn from in a random order, where not all of a corpus is read."""


def check_rank(rank: int, world_size: int) -> None:
    """Nothing, where there is such a process.

    Raises:
        InputError: There are fewer.
    """
    if rank >= world_size:
        raise InputError(f"rank is {rank}; expected 0 to {world_size - 1}, as world_size is {world_size}")


@dataclass(frozen=True, eq=False)
class Corpus(Summary):
    """A named stream of passages, of which only a few are in memory at a time."""

    name: str
    rows: Callable[[], Any]
    """Makes a `datasets.IterableDataset` that starts from the beginning; a row has number, text, source and origin."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What it is read from, as plain values: two readings of one identity are taken for the same texts."""
    pin: Callable[[str | None], "Corpus"] | None = None
    """Of a dataset on the hub of which no commit was named: the same at a commit, or for None at the newest, which the
    hub is asked for. Studies pin what they read, so that their manifest says what that was."""

    def passages(
        self, *, rank: Natural = 0, world_size: Positive = 1, seed: Seed | None = None
    ) -> Iterator[tuple[int, Passage]]:
        """The passages with their numbers, from the beginning.

        Args:
            rank: Which of the processes is reading: it gets every `world_size`-th passage.
            world_size: How many processes there are.
            seed: Draw from a buffer of `SHUFFLED` passages at random, the same way for the same seed. None: in the
                order of the corpus, in which numbers count in any case.

        Raises:
            InputError: It cannot be read; the message says where. Or there is no such process.
        """
        check_rank(rank, world_size)
        from datasets.distributed import split_dataset_by_node

        rows = self.rows()
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLED)
        if world_size > 1:
            # Not by files, even where that would be quicker: which passages there are, and their numbers, must not
            # depend on how many processes read them.
            rows = split_dataset_by_node(rows, rank, world_size, strategy="examples")
        read = 0
        try:
            for row in rows:
                read += 1
                yield row["number"], Passage(row["text"], row["source"], row["origin"])
        except (OSError, ValueError) as error:  # of `datasets` and of what it reads through
            raise InputError(f"domain {self.name!r} cannot be read after passage {read}: {_line(error)}") from None


def from_generator(name: str, generate: Callable[[], Iterable[str | dict[str, Any]]]) -> Corpus:
    """A corpus from a function that generates texts, or rows with `text` and `source`, afresh at every call.

    Args:
        name: What the domain is called.
        generate: Must generate the same each time: an interrupted study reads it again from the start. Two functions of
            equal code that hold and read equal values are taken for the same texts. Lists, tables, tensors and other
            functions count, those of the module too; of objects of a library, their plain values alone.
    """
    from moe_lens.by_value import digest_of  # not before: it imports torch

    def rows() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows_of(name, generate()), start=1):
            given = row if isinstance(row, Mapping) else {"text": row}
            yield vars(read_row(given, f"{name}:{number}", name, empty=True))

    called = getattr(generate, "__qualname__", type(generate).__qualname__)
    identity = {"generator": called, "digest": digest_of(generate, pickled=False)}
    return Corpus(name, partial(_iterable, rows), identity)


def from_file(name: str, path: str | Path, *, text: str = "text", source: str | None = None) -> Corpus:
    """A corpus from a file or a folder, without loading it whole (but for a list in a .json file).

    Args:
        name: What the domain is called.
        path: As for `load_domain`.
        text: The column (or key) with the text, or several joined by +.
        source: As for `load_domain`.

    Raises:
        InputError: There is no such file.
    """
    path = Path(path)
    try:
        path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None

    def rows() -> Iterator[dict[str, Any]]:
        for passage in read_passages(path, text=text, source=source):
            yield vars(passage)

    return Corpus(name, partial(_iterable, rows), _told(file=path.name, digest=digest(path), text=text, source=source))


def from_hub(
    name: str,
    repository: str,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    text: str = "text",
    source: str | None = None,
    hint: str = "",
) -> Corpus:
    """A corpus from a dataset on the hub, streamed.

    Args:
        name: What the domain is called.
        repository: Its name on the hub.
        config: Of the dataset, where it has several.
        split: Which split.
        revision: Commit, tag or branch; the newest if not given. Anything but a whole commit is still to be pinned.
        text: The column with the text, or several joined by +.
        source: The column that says which document a text was taken from; without one every row is its own source,
            since rows of a dataset are documents more often than not.
        hint: What else the message says when the dataset cannot be had.
    """
    wanted = f"{repository}{f' ({config})' if config else ''}, split {split}"
    how = {"config": config, "split": split, "text": text, "source": source, "hint": hint}

    def unreachable(error: Exception) -> InputError:
        return InputError(
            f"domain {name!r}: {wanted}: cannot be had from the hub ({_line(error)}). Is this machine online, and "
            "HF_HUB_OFFLINE not set? Offline, download the texts elsewhere and give a .jsonl, .txt or .parquet "
            f"file{'; ' + hint if hint else ''}"
        )

    def stream() -> Any:
        import datasets

        try:
            rows: Any = datasets.load_dataset(repository, config, split=split, revision=revision, streaming=True)
        except Exception as error:  # datasets and huggingface_hub raise errors of many kinds
            raise unreachable(error) from None

        def read() -> Iterator[dict[str, Any]]:
            for number, row in enumerate(rows, start=1):
                if number == 1 and source is None and "source" in row and not hint:
                    warnings.warn(
                        f'domain {name!r}: {repository} has a column "source", which on the hub mostly names a corpus: '
                        'each row counts as a source of its own. If it names documents, say so: source = "source" '
                        "(--source-column source)",
                        stacklevel=2,
                    )
                origin = f"{repository}:{number}"
                found = read_row(row, origin, origin, text=text, source=source, implied=False, empty=True)
                yield vars(found)

        return _iterable(read)

    def pin(commit: str | None) -> Corpus:
        if commit is None:
            from huggingface_hub import HfApi

            try:
                commit = str(HfApi().dataset_info(repository, revision=revision).sha)
            except Exception as error:
                raise unreachable(error) from None
        return from_hub(name, repository, revision=commit, **how)

    at = {"hub": repository, "config": config, "split": split, "revision": revision}
    identity = {**at, **_told(text=text, source=source)}
    return Corpus(name, stream, identity, None if re.fullmatch("[0-9a-f]{40}", revision or "") else pin)


def _told(*, source: str | None, **identity: Any) -> dict[str, Any]:
    """What a corpus is read from, with the column of the sources where one is named: other sources, other intervals."""
    return identity if source is None else {**identity, "source": source}


WHOLE = 2**30
"""Bytes up to which a file is read whole for its digest: a second of work."""


def digest(path: Path) -> str:
    """A fingerprint of a file, or of every file of a folder.

    Of more than `WHOLE` bytes, of the file's size, the time of its last change, and its beginning and end.
    """
    found = hashlib.sha256()
    for file in files_in(path) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        about = file.stat()
        size, time = about.st_size, about.st_mtime_ns
        name = file.name if file == path else file.relative_to(path).as_posix()  # sources are called so
        found.update(json.dumps([name, size] if size <= WHOLE else [name, size, time]).encode())
        with file.open("rb") as content:
            if size <= WHOLE:
                found.update(hashlib.file_digest(content, "sha256").digest())
                continue
            found.update(content.read(2**20))
            content.seek(size - 2**20)
            found.update(content.read())
    return found.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class _Generator:
    """A function that generates rows, pickled as a mere number.

    `datasets` pickles what it is to call, for a fingerprint that a stream has no use for. Of a closure that is all that
    it reaches: modules and classes, 20 s of work.
    """

    generate: Callable[[], Iterator[dict[str, Any]]]

    def __call__(self) -> Iterator[dict[str, Any]]:
        return self.generate()

    def __reduce__(self) -> tuple[Callable[[int], Any], tuple[int]]:
        return _elsewhere, (id(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Generator":
        return self


def _elsewhere(number: int) -> Any:
    raise TypeError(f"rows {number} are of another process; a corpus cannot be sent, only opened there again")


def _iterable(generate: Callable[[], Iterator[dict[str, Any]]]) -> Any:
    import datasets

    def numbered() -> Iterator[dict[str, Any]]:  # before they are shuffled
        for number, row in enumerate(generate()):
            yield {**row, "number": number}

    return datasets.IterableDataset.from_generator(_Generator(numbered))


def _line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__
