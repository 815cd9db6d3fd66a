"""Domains as users give them: one, several, or a dictionary of texts by name."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Annotated, Any

from moe_lens.argument_checks import ReadByItself
from moe_lens.data.corpus import Corpus
from moe_lens.data.domains import Domain, check_name
from moe_lens.errors import InputError, a_kind

Domains = Annotated[Domain | Corpus | Sequence[Domain | Corpus] | Mapping[str, Any], ReadByItself()]
"""A domain or several; or a dictionary of texts by the domain's name, each as `Domain.of` takes them."""


def as_domains(given: Domains) -> list[Domain | Corpus]:
    """Several domains, each with a name of its own.

    Raises:
        InputError: There is none, two have one name, or one is something else.
    """
    if isinstance(given, Domain | Corpus):
        found: list[Domain | Corpus] = [given]
    elif isinstance(given, Mapping):
        found = [_named(name, texts) for name, texts in given.items()]
    elif isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"domains are {a_kind(given)}; {_EXPECTED}")
    elif isinstance(given, Set):
        raise InputError(f"domains are a set, whose order is another in every process; {_EXPECTED}")
    else:
        found = []
        for number, one in enumerate(given):
            if not isinstance(one, Domain | Corpus):
                raise InputError(f"domain {number} is {a_kind(one)}; {_EXPECTED}")
            found.append(one)
    names = [domain.name for domain in found]
    if not names:
        raise InputError("there is no domain; give at least one")
    for name in names:
        check_name(name)
        if names.count(name) > 1:
            raise InputError(f"two domains are called {name!r}; give each a name of its own")
    return found


def in_memory(given: Domains) -> list[Domain]:
    """The same for work that reads its texts several times over, in several orders.

    Raises:
        InputError: One of them is a stream.
    """
    found = as_domains(given)
    if streams := [domain.name for domain in found if isinstance(domain, Corpus)]:
        raise InputError(
            f"domain {streams[0]!r} is a stream, and this reads its texts several times over; give a file (without "
            "--streaming) or texts in memory. The studies (moe-lens routing, single-expert, lens) read streams"
        )
    return [domain for domain in found if isinstance(domain, Domain)]


_EXPECTED = "expected Domain.of(name, texts), a list of such, or a dictionary {name: texts}"


def _named(name: str, texts: Any) -> Domain | Corpus:
    return replace(texts, name=name) if isinstance(texts, Domain | Corpus) else Domain.of(name, texts)
