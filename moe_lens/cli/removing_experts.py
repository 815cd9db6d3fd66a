"""The commands that take experts out: those picked for domains or facts, named ones, those of one side of prompts."""

from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.cli import options
from moe_lens.cli.options import Parallel
from moe_lens.cli.study_command import Work, command
from moe_lens.data import EMBEDDED
from moe_lens.errors import InputError

if TYPE_CHECKING:
    from moe_lens.studies import Study


OF_MODEL = {"--model", "--dtype", "--quantize", "--device", "--max-memory", "--trust-tokenizer-code", "--config"}
"""Options of studies that say how the model is loaded, not what it reads."""
MATCHED = 40
"""Coalitions that the picked experts are held against."""


class By(StrEnum):
    """What experts are picked by."""

    routing = "routing"
    attribution = "attribution"
    knockout = "knockout"


class Removal(StrEnum):
    """How experts are taken out."""

    reroute = "reroute"
    zero = "zero"


@command("localise", "moe-lens-localisation", tokens=1024, window=48)
def localise(
    by: Annotated[
        By,
        typer.Option(
            help="Pick experts that a domain's tokens choose more often than other domains' tokens do (routing), or "
            "those that reduce its loss more than other domains' losses, estimated by gradient × activation "
            "(attribution) or measured by knocking out each expert (knockout)."
        ),
    ] = By.routing,
    experts: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of experts to pick for a domain in each layer.  [half the number of active experts]"
        ),
    ] = None,
    how: Annotated[
        list[Removal] | None,
        typer.Option(
            metavar="reroute|zero",
            help="Ablate experts by forbidding them, so that others are chosen (reroute), or by setting their "
            "contribution to zero (zero); may be repeated, and the first is the primary one. Without it: reroute, then "
            "zero.",
        ),
    ] = None,
    matched: Annotated[int, typer.Option(min=1, help="Number of coalitions matched on routing weight.")] = MATCHED,
    parallel: Parallel = None,
    facts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Trace facts instead of reading texts. The file has a JSON object on each line: prompt, subject (a "
            "part of the prompt), answer and foil (a token each), and optionally kind and source. small: the facts "
            "that ship with the package.",
        ),
    ] = None,
    changed: Sequence[str] = (),
) -> "Study | Work":
    """Does knowledge of a domain sit in experts of its own?

    A domain's experts are picked on half of its sources and ablated on the other half, and the other way round. The
    contrast is the increase of the domain's own loss minus the mean increase of the other domains' losses. Controls:
    matched coalitions (other experts of the same layers that carry as much of the domain's routing weight, within
    10 %), the same number of experts at random, and the experts that all domains use most.

    Tables: contrast (a row for each domain, way of ablating and control: picked minus control, in nats a token with its
    interval over all sources, and the share of controls that are beaten), effects (increase of each domain's loss for
    each kind of coalition), coalitions (the experts of each coalition), halves (the half that each source is in).

    Sources that are one document in several domains stay together; without --parallel these are sources whose names
    differ only in a language code between slashes.

    Every text is read about 2 × (matched + 5 + number of domains) times for each way of ablating.

    Example: moe-lens localise --domain code=code.jsonl --domain prose=prose.jsonl --tokens 4096 --out runs/localisation

    With --facts, experts are picked that restore the answer after the subject was corrupted (causal tracing), on half
    of the prompts. They are measured on the other half, and compared with the same number of random experts and with
    all experts. Tables: contrast, runs, experts.

    Example: moe-lens localise --facts small --out runs/facts
    """
    from moe_lens.studies import Localisation, localise_facts, read_facts

    if facts is not None:
        others = {"--by": by != By.routing, "--how": how, "--matched": matched != MATCHED, "--parallel": parallel}
        of_texts = [name for name in changed if name not in OF_MODEL]
        if wrong := [*(name for name, given in others.items() if given), *of_texts]:
            raise InputError(f"{wrong[0]} applies to texts, and --facts reads none: leave one of them out")
        known = read_facts(facts)

        def trace(model: Any, domains: options.Opened, **how: Any) -> Any:
            if tuple(domain.name for domain in domains) != EMBEDDED:  # those of a config
                raise InputError("--facts reads no texts: leave the domains out, or --facts")
            wanted = {name: how[name] for name in ("out", "name", "watch")}
            return localise_facts(model, known, experts=experts, **wanted)

        return trace
    chosen: dict[str, Any] = {} if parallel is None else {"parallel": parallel}
    if how:
        chosen["how"] = tuple(each.value for each in how)
    return Localisation(by=by.value, experts=experts, matched=matched, **chosen)


@command("ablate", "moe-lens-ablation", tokens=1024, window=128)
def ablate(
    experts: Annotated[
        list[str],
        typer.Option(
            metavar="LAYER:EXPERT,…", help="Experts to ablate, all together: 3:17,4; may be repeated for other layers."
        ),
    ],
    how: Annotated[
        list[Removal] | None,
        typer.Option(
            metavar="reroute|zero",
            help="Ablate experts by forbidding them, so that others are chosen (reroute), or by setting their "
            "contribution to zero (zero); may be repeated. Without it: reroute, then zero.",
        ),
    ] = None,
    matched: Annotated[int, typer.Option(min=1, help="Number of coalitions matched on routing weight.")] = 20,
) -> "Study":
    """Loss on each domain without the experts that you name.

    Other experts of the same layers are the controls: matched (drawn at random until they carry as much of the domain's
    routing weight, within 10 %), random (the same number of each layer), busiest (the same number, those that all
    domains use most).

    Tables: ablation (a row for each domain, way of ablating and kind of coalition, which are the named experts and the
    controls: increase of the loss in nats a token with its interval over sources, and how far the increase for the
    named experts exceeds that for the control), effects (the increase for each coalition), coalitions (the experts of
    each coalition).

    Every text is read about matched + 7 times for each way of ablating.

    Example: moe-lens ablate --experts 3:17,4 --experts 5:8 --domain code=code.jsonl --out runs/ablation
    """
    from moe_lens.studies import AblationStudy

    chosen: dict[str, Any] = {"how": tuple(each.value for each in how)} if how else {}
    return AblationStudy(options.experts_by_layer(experts, "--experts"), matched=matched, **chosen)


@command("contrast", "moe-lens-contrast", tokens=2048, window=128)
def contrast(
    pairs: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Paired prompts, a JSON object on each line: a and b, the prompts; optionally span_a and span_b, the "
            "parts whose tokens are counted; answer and foil, the tokens that are expected after a and after b; "
            "template, a name that dependent pairs share. german-english: the pairs that ship with the package.",
        ),
    ] = "german-english",
    experts: Annotated[
        int | None,
        typer.Option(min=1, help="Number of experts to steer in each layer.  [half the number of active experts]"),
    ] = None,
    push: Annotated[
        float, typer.Option(help="Number that is added to the router logits of experts that are pushed.")
    ] = 2.0,
    matched: Annotated[int, typer.Option(min=1, help="Number of coalitions matched on routing weight.")] = 20,
) -> Work:
    """Which experts two kinds of prompts use differently.

    The study also tests whether the answer depends on these experts. The unit is the template, or the pair where pairs
    have no template. The test of differences multiplies all differences of a unit by one random sign, and compares with
    the maximum statistic over all experts. Then the experts that prompts A prefer, picked on half of the units, are
    forbidden in the A prompts of the other half, and pushed (their router logits raised) in its B prompts. Controls:
    coalitions of the same routing weight, and steering with the opposite sign. --domain gives neutral texts, on which
    the cost of steering is measured.

    Tables: experts (difference of shares, t, p-value, and the same at tokens that both prompts have), test (how many
    experts differ, and how often any is found when A and B are swapped at random), steering (answer − foil in nats,
    with intervals over units), neutral (increase of the loss on neutral texts, in nats a token).

    Example: moe-lens contrast --pairs refusals.jsonl --domain neutral=prose.jsonl --out runs/refusal
    """
    from moe_lens.studies import contrast_prompts, read_pairs

    return partial(_contrast, read_pairs(pairs), contrast_prompts, experts=experts, push=push, matched=matched)


def _contrast(pairs: Any, work: Work, model: Any, domains: Any, **how: Any) -> Any:
    return work(model, pairs, domains, **how)
