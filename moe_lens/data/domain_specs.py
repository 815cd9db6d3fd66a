"""Where the texts of a domain come from, as a user says it: a file, a dataset on the hub, or a known name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moe_lens.data.corpus import Corpus, from_file, from_hub
from moe_lens.data.domains import EMBEDDED, Domain, check_name, embedded_domain, load_domain
from moe_lens.data.paper_presets import PRESETS
from moe_lens.errors import InputError, near_miss

HUB = "hub:"


@dataclass(frozen=True, kw_only=True)
class DomainSpec:
    """A domain that is still to be opened."""

    name: str
    path: str | Path | None = None
    """A file or a folder; see `load_domain`."""
    hub: str | None = None
    """A dataset on the hub, streamed."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text: str = "text"
    """The column with the text."""
    source: str | None = None
    """The column that says which document a text was taken from. If not given: `source`, in files that have it; on
    the hub each row is then a source of its own, since `source` mostly names a corpus there."""
    streaming: bool = False
    """Read a file as it comes, instead of holding it in memory, where sources can take turns."""

    def open(self) -> Domain | Corpus:
        """The texts.

        Raises:
            InputError: There are none, or they cannot be read. A dataset on the hub is looked for when it is read.
        """
        check_name(self.name)
        if self.path is not None and self.hub is not None:
            raise InputError(f"domain {self.name!r} has a path and a name on the hub; give one of them")
        place = "path" if self.path is not None else "hub" if self.hub is not None else None
        if place is not None and (wrong := sorted(self._chosen() - _USED[place])):
            what = "a file" if place == "path" else "a dataset on the hub"
            raise InputError(f"domain {self.name!r} is {what}, of which {wrong[0]} cannot be chosen")
        if self.path is not None:
            columns = {"text": self.text, "source": self.source}
            read = from_file if self.streaming else load_domain
            return read(self.name, Path(self.path), **columns)
        if self.hub is not None:
            how = {key: getattr(self, key) for key in ("config", "split", "revision", "text", "source")}
            return from_hub(self.name, self.hub, **how)
        if self.name in (*PRESETS, *EMBEDDED):
            allowed = {"revision"} if self.name in PRESETS else set[str]()
            if wrong := sorted(self._chosen() - allowed):
                but = "; revision alone can be given" if allowed else ""
                raise InputError(f"domain {self.name!r} is a known one, of which {wrong[0]} cannot be chosen{but}")
            return PRESETS[self.name].open(self.revision) if self.name in PRESETS else embedded_domain(self.name)
        raise InputError(
            f"domain {self.name!r}: expected NAME=FILE, for example code=code.jsonl, NAME=hub:OWNER/DATASET, or one of "
            f"{', '.join([*EMBEDDED, *PRESETS])}{near_miss(self.name, [*EMBEDDED, *PRESETS])}"
        )

    def _chosen(self) -> set[str]:
        """What was not left as it is."""
        return {key for key, value in _DEFAULTS.items() if getattr(self, key) != value}


_USED = {"path": {"text", "source", "streaming"}, "hub": {"text", "source", "streaming", "config", "split", "revision"}}
"""What can be chosen of a file, and of a dataset on the hub (which is always read as it comes)."""
_DEFAULTS = {field.name: field.default for field in fields(DomainSpec) if field.name not in ("name", "path", "hub")}


def parse_domains(arguments: Iterable[str], **shared: Any) -> list[DomainSpec]:
    """Domains as a command line has them: `NAME=FILE`, `NAME=hub:OWNER/DATASET`, or the name of a known one.

    A dataset on the hub and a preset may be followed by `@` and a revision.

    Args:
        arguments: One for each domain.
        shared: Fields of `DomainSpec` that hold for all that have them.

    Raises:
        InputError: One is not as described, or has a name that another has; or none has what was chosen for all.
    """
    found: list[DomainSpec] = []
    chosen = {key: value for key, value in shared.items() if value != _DEFAULTS[key]}
    used: set[str] = set()
    for argument in arguments:
        name, equals, where = argument.partition("=")
        known, _, revision = name.partition("@")
        if not equals and (known in PRESETS or name in EMBEDDED):
            found.append(DomainSpec(name=known, revision=revision or None))
            continue
        if not (equals and name.strip() and where):
            raise InputError(
                f"--domain {argument!r}: expected NAME=FILE, for example --domain code=code.jsonl, "
                f"NAME=hub:OWNER/DATASET, or one of {', '.join([*EMBEDDED, *PRESETS])}"
                f"{near_miss(known, [*EMBEDDED, *PRESETS])}"
            )
        spec = DomainSpec(name=name, path=where)
        if where.startswith(HUB):
            repository, _, revision = where.removeprefix(HUB).partition("@")
            spec = DomainSpec(name=name, hub=repository, revision=revision or None)
        here = chosen.keys() & _USED["path" if spec.hub is None else "hub"]
        used |= here
        found.append(replace(spec, **{key: chosen[key] for key in here}))
    for name in (names := [spec.name for spec in found]):
        if names.count(name) > 1:
            raise InputError(f"--domain {name!r} is given twice; give each domain a name of its own")
    if unused := sorted(chosen.keys() - used):
        raise InputError(f"{unused[0]} = {chosen[unused[0]]!r} is chosen, and none of the domains has that to choose")
    return found


def domains_from_table(table: Mapping[str, Any]) -> list[DomainSpec]:
    """Domains as a TOML file has them: a table for each, with the fields of `DomainSpec`.

    Raises:
        InputError: An unknown key, or a value of the wrong kind.
    """
    known = {field.name: field.type for field in fields(DomainSpec) if field.name != "name"}
    found = []
    for name, given in table.items():
        if not isinstance(given, Mapping):
            raise InputError(f'[domains.{name}] must be a table, for example with path = "code.jsonl"')
        for key, value in given.items():
            if key not in known:
                raise InputError(f"[domains.{name}] has no key {key!r}; known: {', '.join(known)}")
            expected = bool if key == "streaming" else str
            if not isinstance(value, expected):
                wanted = "true or false" if expected is bool else "a text"
                raise InputError(f"[domains.{name}] {key} is {value!r}; expected {wanted}")
        found.append(DomainSpec(name=name, **given))
    return found
