"""The commands that predict on held-out texts: choices of experts, and labels from experts."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.cli import options
from moe_lens.cli.options import Parallel
from moe_lens.cli.study_command import Work, command
from moe_lens.data import EMBEDDED
from moe_lens.errors import InputError

if TYPE_CHECKING:
    from moe_lens.studies import Study


@command("explain", "moe-lens-explained-choices")
def explain(
    features: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Features of your own, such as SAE activations or labels: a table (.parquet, .csv) with a row per "
            "token, its document and position as `collect` has them (and domain), and a column for each feature.",
        ),
    ] = None,
    parallel: Parallel = None,
) -> "Study":
    """What predicts a token's choice of experts.

    The features are the token, the one before it, its position, its domain, and features of your own. Predictions are
    made for held-out sources, by ridge regression, from each feature alone and from the token together with the
    feature. The null is the same with the feature shuffled over tokens, which should add nothing.

    Tables: experts (recall, precision, AUC, R², gain over the token), layers (the same over all experts of a layer),
    chosen_for (a sentence for each expert, picked on half of the sources, and how well it predicts the expert's choices
    on the other half).

    Sources that are one document in several domains are held out together; without --parallel these are sources whose
    names differ only in a language code between slashes.

    Example: moe-lens explain --domain prose=prose.jsonl --domain code=code.jsonl --features sae.parquet --out runs/why
    """
    from moe_lens.studies import Explain, read_features

    return Explain(
        None if features is None else read_features(features),
        parallel=Explain.parallel if parallel is None else parallel,
    )


@command("probe", "moe-lens-probes", tokens=2048)
def probe(
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=REGEX",
            help="Label the tokens of what a regular expression finds; may be repeated. Without it: number, bracket "
            "and capital (a word that begins with one), those that are found.",
        ),
    ] = None,
    spans: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Labelled spans instead: a line for each text with text, spans ([start, end, label], in characters) "
            "and source, as JSON. These texts are then all that is read.",
        ),
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option(
            "--k",
            min=1,
            metavar="NUMBER",
            help="Number of experts or neurons a probe sees; may be repeated.  [those of 1, 2, 4, 8, 16 "
            "for which a layer has experts]",
        ),
    ] = None,
    parallel: Parallel = None,
) -> Work:
    """Can a token's label be read from a few experts?

    The label is number, bracket, capital, or one of your own. For each layer and label, the k experts (or neurons of
    experts) that differ most between tokens with and without the label are picked on one half of the sources, and a
    linear probe is fitted there; it is scored on the other half. Then the halves change places.

    Tables: probes (balanced accuracy by layer, experts or neurons, label and k, with intervals over sources, beside
    probes of labels that were shuffled within each window), components (which were picked, and whether on both halves).

    Sources that are one document in several domains are in one half; without --parallel these are sources whose names
    differ only in a language code between slashes.

    Example: moe-lens probe --label year='[12][0-9]{3}' --k 1 --k 4 --domain prose=prose.jsonl --out runs/probe
    """
    from moe_lens.studies import Probe, by_pattern, label_tokens, read_spans, run
    from moe_lens.studies.token_labels import PATTERNS

    if spans is not None and label:
        raise InputError("--spans has labels of its own: leave --label out, or --spans")
    pairs = [each.partition("=") for each in label or ()]
    if wrong := ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]:
        raise InputError(f"--label {wrong[0]}: expected NAME=REGEX")
    names = [name for name, _, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--label {twice[0]} is given {names.count(twice[0])} times; expected each label once")
    find = by_pattern({name: pattern for name, _, pattern in pairs} or PATTERNS)
    own = None if spans is None else read_spans(spans)
    settings: dict[str, Any] = {
        "k": tuple(k) if k else None,
        "parallel": Probe.parallel if parallel is None else parallel,
    }

    def run_probes(model: Any, domains: options.Opened, **how: Any) -> Any:
        if own is None:
            labels = label_tokens(model, domains, find)
            labels = labels.drop(columns=[] if label else [name for name in PATTERNS if True not in set(labels[name])])
            return run(Probe(labels, **settings), model, domains, **how)
        if tuple(domain.name for domain in domains) != EMBEDDED:
            raise InputError("--spans has texts of its own: leave --domain out, or --spans")
        return run(Probe(label_tokens(model, own[:1], own[1]), **settings), model, own[:1], **how)

    return run_probes
