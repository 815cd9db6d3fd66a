"""`moe-lens atlas`: a page for every expert."""

from functools import partial
from typing import Annotated

import typer

from moe_lens.cli import options
from moe_lens.cli.study_command import Work, command


@command("atlas", "moe-lens-atlas", tokens=4096, window=128)
def atlas(
    contexts: Annotated[
        bool,
        typer.Option("--contexts/--no-contexts", help="Whether pages show pieces of the texts, or only single tokens."),
    ] = True,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A text of your own to show token by token; may be repeated."),
    ] = None,
    knockout_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Number of tokens of each domain to measure knock-outs on, from the beginnings of all windows."
        ),
    ] = 512,
    knock_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER:EXPERT,…",
            help="Experts to knock out exactly, each by itself, on all texts: 3:17,4; may be repeated for other "
            "layers. The same command with this option adds them to a complete atlas.",
        ),
    ] = None,
) -> Work:
    """A page for every expert of a model.

    Which tokens choose it, what it reads and writes, and how the loss changes without it. The result is a folder with
    index.html, which a browser opens without a server, and which loads nothing from elsewhere: a map of all experts, a
    page for each (index.html#layer=3&expert=17), texts token by token, and a search for tokens. Its subfolder `study`
    holds the tables: experts, domains, tokens, sent, partners, pairs, writing, neurons, nearest, knockouts, compared,
    controls, quality, explained, chosen_for, contexts, text_tokens, text_slots, words.

    Texts are read four times, one of them with gradients. The beginnings of their windows are read once more for each
    expert that is knocked out (all, if there are at most 512; else the two most specialised of each layer and domain),
    and for each control.

    Example: moe-lens atlas --domain prose=prose.jsonl --domain code=code.jsonl --out atlas
    """
    from moe_lens.atlas import run
    from moe_lens.studies import Atlas

    study = Atlas(contexts=contexts, texts=tuple(text or ()), knockout_tokens=knockout_tokens)
    return partial(run, study=study, knock_out=options.experts_by_layer(knock_out or (), "--knock-out") or None)
