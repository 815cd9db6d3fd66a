"""The commands that run a study: arguments → study → a saved folder; and the one that compares two."""

from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.cli import options
from moe_lens.cli.app import app
from moe_lens.cli.model_loading import load_model, quiet
from moe_lens.cli.study_command import Work, command
from moe_lens.data import EMBEDDED
from moe_lens.errors import InputError
from moe_lens.manifest import read_manifest

if TYPE_CHECKING:
    from moe_lens.studies import Study


OF_MODEL = {"--model", "--dtype", "--quantize", "--device", "--max-memory", "--trust-tokenizer-code", "--config"}
"""Options of studies that say how the model is loaded, not what it reads."""
MATCHED = 40
"""Coalitions that the picked experts are held against."""


class Together(StrEnum):
    """Where experts are left out."""

    together = "together"
    each = "each"
    both = "both"


class Treated(StrEnum):
    """What is done to experts that are not kept."""

    dropped = "dropped"
    renormalised = "renormalised"
    random = "random"
    replaced = "replaced"


class By(StrEnum):
    """What experts are picked by."""

    routing = "routing"
    attribution = "attribution"
    knockout = "knockout"


class Removal(StrEnum):
    """How experts are taken out."""

    reroute = "reroute"
    zero = "zero"


class Kind(StrEnum):
    """Kinds of shards."""

    safetensors = "safetensors"
    parquet = "parquet"


Parallel = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="Where domains hold the same documents (translations): the part in which names of such sources differ.",
    ),
]


@command("routing", "moe-lens-routing")
def routing(
    nulls: Annotated[
        bool,
        typer.Option(
            "--nulls", help="Also measure a random router, token-unigram and uniform routing: one more forward pass."
        ),
    ] = False,
    parallel: Parallel = None,
) -> "Study":
    """Which experts each domain's tokens are sent to, with intervals over sources and tests between domains.

    Tables: specialisation (share of tokens that have the expert among their active ones), most_specialised, layers
    (Gini, entropies, margin, experts for 50 and 80 %), pairs (co-activation, transitions), persistence, vocabulary; of
    two domains or more: domain_experts, domain_layers, domain_pairs, the tests that permute domains over sources, and
    given_token_layers, given_token_pairs, what the domain adds once the token is known; committee and
    committee_layers, the experts with most of the routing weight of every domain (with --nulls also a random router's).

    Example: moe-lens routing --domain prose=prose.jsonl --domain code=code.jsonl --tokens 100000 --out runs/routing

    With --parallel, two domains with parallel sources are compared on these alone, by swapping them; sources without a
    partner are left out of the pair, and counted (domain_pairs: sources, dropped).

    Several processes: torchrun --nproc-per-node 4 -m moe_lens routing …
    """
    from moe_lens.studies import RoutingStudy

    return RoutingStudy(nulls=nulls, parallel=parallel)


@command("single-expert", "moe-lens-single-expert")
def single_expert(
    layers: Annotated[
        Together, typer.Option(help="Leave experts out in all layers at once, in one at a time, or both.")
    ] = (Together.together),
    treatment: Annotated[
        list[Treated] | None,
        typer.Option(help="Treatment of the experts that are not kept; may be repeated. Without it: all four."),
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option("--k", min=0, help="Number of experts to keep; may be repeated.  [0 … top-k]"),
    ] = None,
) -> "Study":
    """One expert against all active ones: cosines with their controls, and the perplexity with fewer experts.

    Treatments of the experts that are not kept: dropped; renormalised (dropped, and the kept weights rescaled to the
    same sum); random (the kept ones are drawn at random); replaced (by their mean output, taken from other sources).

    Tables: perplexity (a row for each treatment, layer and k, token-weighted and as a geometric mean over windows, with
    ratios to the unedited model paired by source), similarity (cosine of u + rank 0 with u + all active experts, where
    u is the residual stream before them, and its controls).

    Every text is read twice, and once more for each variant: 2 + 22 times for 6 active experts and all treatments, and
    22 times more for each layer with --layers both.

    Example: moe-lens single-expert --k 1 --k 3 --treatment dropped --treatment random --out runs/single
    """
    from moe_lens.studies import TREATMENTS, SingleExpertStudy

    chosen = tuple(each.value for each in treatment) if treatment else tuple(TREATMENTS)
    return SingleExpertStudy(treatments=chosen, layers=layers.value, k=tuple(k) if k else None)


@command("experts-per-token", "moe-lens-experts-per-token")
def experts_per_token(
    k: Annotated[
        list[int] | None,
        typer.Option(
            "--k",
            min=1,
            help="Number of experts of every token; may be repeated. Without it: 1, 2, 4, … and all experts, and some "
            "numbers near the model's own. The model's own number is always run.",
        ),
    ] = None,
    mass: Annotated[
        list[float] | None,
        typer.Option(
            help="Give a token the fewest experts whose shares of affinity sum to at least this (top-p); may be "
            "repeated.  [0.15, 0.3, 0.5]"
        ),
    ] = None,
    threshold: Annotated[
        list[float] | None,
        typer.Option(help="Give a token the experts with at least this share of affinity; may be repeated."),
    ] = None,
    entropy: Annotated[
        list[float] | None,
        typer.Option(help="Give a token this number × exp(entropy of its affinities) experts; may be repeated."),
    ] = None,
) -> "Study":
    """Loss with fewer or more experts than the model was trained with: a fixed number, or one that the router decides.

    Tables: numbers (a row for each number and rule: mean number of experts, loss, perplexity, ratio to the model's own
    number, and the nats a token that a rule saves against a fixed number at the same mean; the control of each rule is
    the same numbers shuffled over tokens), layers (mean number of experts of each layer).

    Every text is read once for each number, and twice for each rule.

    Example: moe-lens experts-per-token --k 2 --k 12 --mass 0.3 --entropy 0.15 --out runs/numbers
    """
    from moe_lens.studies import ExpertsPerToken

    chosen: dict[str, Any] = {"threshold": tuple(threshold or ()), "entropy": tuple(entropy or ())}
    if mass is not None or threshold or entropy:
        chosen["mass"] = tuple(mass or ())
    return ExpertsPerToken(k=tuple(k) if k else None, **chosen)


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
) -> "Study":
    """From what can a token's choice of experts be predicted: the token, the one before it, position, domain?

    Predictions are made for held-out sources, by ridge regression, from each feature alone and from the token with the
    feature. The null is the same with the feature shuffled over tokens, which should add nothing.

    Tables: experts (recall, precision, AUC, R², gain over the token), layers (the same over all experts of a layer),
    chosen_for (a sentence for each expert, picked on half of the sources, and how well it predicts the expert's choices
    on the other half).

    Example: moe-lens explain --domain prose=prose.jsonl --domain code=code.jsonl --features sae.parquet --out runs/why
    """
    from moe_lens.studies import Explain, read_features

    return Explain(None if features is None else read_features(features))


@command("checkpoints", "moe-lens-checkpoints")
def checkpoints(
    other: Annotated[
        str, typer.Option(metavar="MODEL", help="The other checkpoint, of the same shape and with the same tokenizer.")
    ],
) -> Work:
    """Do two checkpoints route the same texts alike: base and chat, before and after tuning?

    Tables: overlap (share of a token's experts that both checkpoints choose, by layer, with intervals over sources; its
    null is the overlap that the loads alone give; for both as they are, for the first with the other's routers, and for
    both with the same routers), losses (nats a token that swapped routers add).

    Every text is read four times. Both models are held in memory.

    Example: moe-lens checkpoints --model base --other chat --domain prose=prose.jsonl --out runs/chat
    """
    from moe_lens.studies import Checkpoints, run

    def side_by_side(model: Any, domains: Any, **how: Any) -> Any:
        parameter = next(model.original_model.parameters())
        dtype, device = str(parameter.dtype).removeprefix("torch."), str(parameter.device)
        return run(Checkpoints(load_model(other, dtype, device), other), model, domains, **how)

    return side_by_side


@command("probe", "moe-lens-probes", tokens=2048)
def probe(
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=REGEX",
            help="Label the tokens of what a regular expression finds; may be repeated. Without it: number, bracket "
            "and capital (a word that begins with one).",
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
            "--k", min=1, help="Number of experts or neurons a probe sees; may be repeated.  [1, 2, 4, 8, 16]"
        ),
    ] = None,
) -> Work:
    """Do a few experts, or a few of their neurons, tell what a token is (a digit, a bracket, any label of your own)?

    They are picked and weighed on one half of the sources, and scored on the other, and the other way round.

    Tables: probes (balanced accuracy by layer, experts or neurons, label and k, with intervals over sources, beside
    probes of labels that were shuffled within each window), components (who was picked, and whether on both halves).

    Example: moe-lens probe --label year='[12][0-9]{3}' --k 1 --k 4 --domain prose=prose.jsonl --out runs/probe
    """
    from moe_lens.studies import Probe, by_pattern, label_tokens, read_spans, run
    from moe_lens.studies.token_labels import PATTERNS

    if spans is not None and label:
        raise InputError("--spans has labels of its own: leave --label out, or --spans")
    pairs = [each.partition("=") for each in label or ()]
    if wrong := ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]:
        raise InputError(f"--label {wrong[0]}: expected NAME=REGEX")
    find = by_pattern({name: pattern for name, _, pattern in pairs} or PATTERNS)
    own = None if spans is None else read_spans(spans)

    def run_probes(model: Any, domains: options.Opened, **how: Any) -> Any:
        if own is None:
            return run(Probe(label_tokens(model, domains, find), tuple(k or Probe.k)), model, domains, **how)
        if tuple(domain.name for domain in domains) != EMBEDDED:
            raise InputError("--spans has texts of its own: leave --domain out, or --spans")
        return run(Probe(label_tokens(model, own[:1], own[1]), tuple(k or Probe.k)), model, own[:1], **how)

    return run_probes


@command("lens", "moe-lens-logit-lens")
def lens(
    lens: Annotated[
        str,
        typer.Option(
            help="Lens to read with: logit, or a tuned lens (its folder, or tiny-deepseekmoe, the embedded one)."
        ),
    ] = "logit",
) -> "Study":
    """What the model would predict if it ended in a layer after one expert, all of them, or none: Figure 2, in numbers.

    Table: lens (by domain, layer and partial sum: cross-entropy, entropy, KL to the model's own prediction and to the
    ensemble of all active experts, agreement), with controls: u, the residual stream before the experts; u + a random
    active expert; u + an expert that was not selected.

    Example: moe-lens lens --domain code=code.jsonl --tokens 20000 --out runs/lens
    """
    if options.leads_nowhere(lens):
        raise InputError(f"--lens {lens}: there is no such folder; expected logit, or the folder of a tuned lens")

    from moe_lens.studies import LensStudy

    return LensStudy(lens=lens)


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
            help="Ablate experts by forbidding them, so that others are chosen (reroute), or by setting their "
            "contribution to zero (zero); may be repeated, and the first is the primary one. Without it: reroute, then "
            "zero."
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
    each kind of coalition), coalitions (the experts that were picked), halves.

    Parallel sources stay together; without --parallel they are those whose names differ in a language code between
    slashes.

    Every text is read about 2 × (matched + 10) times for each domain and way of ablating.

    Example: moe-lens localise --domain code=code.jsonl --domain prose=prose.jsonl --tokens 4096 --out runs/localisation

    With --facts, the picked experts are those that restore the answer where the subject is corrupted (causal tracing),
    on half of the prompts; they are measured on the other half, with the same number of random experts and all experts
    for comparison. Tables: contrast, runs, experts.

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
            help="Ablate experts by forbidding them, so that others are chosen (reroute), or by setting their "
            "contribution to zero (zero); may be repeated. Without it: reroute, then zero."
        ),
    ] = None,
    matched: Annotated[int, typer.Option(min=1, help="Number of coalitions matched on routing weight.")] = 20,
) -> "Study":
    """How much the loss on each domain grows without some experts, with other experts of the same layers as controls.

    Controls: matched (drawn from the same layers until they carry as much of the domain's routing weight, within 10 %),
    random (the same number of each layer), busiest (the same number, those that all domains use most).

    Tables: ablation (a row for each domain, way of ablating and kind of coalition: nats a token with their interval
    over sources, and the excess over the control), coalitions (the experts of each coalition).

    Every text is read about matched + 7 times for each way of ablating.

    Example: moe-lens ablate --experts 3:17,4 --experts 5:8 --domain code=code.jsonl --out runs/ablation
    """
    from moe_lens.studies import AblationStudy

    chosen: dict[str, Any] = {"how": tuple(each.value for each in how)} if how else {}
    return AblationStudy(options.experts_by_layer(experts), matched=matched, **chosen)


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
    push: Annotated[float, typer.Option(help="Number that is added to the router logits of pushed experts.")] = 2.0,
    matched: Annotated[int, typer.Option(min=1, help="Number of coalitions matched on routing weight.")] = 20,
) -> Work:
    """Which experts do two kinds of prompts use differently, and does the answer depend on them?

    Units are templates, or pairs that have none. The test flips the sign of whole units at random and compares with the
    greatest statistic of all experts. Then experts of A, picked on half of the units, are forbidden in A's prompts of
    the other half, and pushed in B's. Controls: coalitions of the same routing weight, and steering with the opposite
    sign. --domain gives neutral texts.

    Tables: experts (difference of shares, t, p-value, and the same at tokens that both prompts have), test (how many
    experts are found, and how often any when A and B are swapped at random), steering (answer − foil in nats, with
    intervals over units), neutral (increase of the loss on neutral texts, in nats a token).

    Example: moe-lens contrast --pairs refusals.jsonl --domain neutral=prose.jsonl --out runs/refusal
    """
    from moe_lens.studies import contrast_prompts, read_pairs

    return partial(_contrast, read_pairs(pairs), contrast_prompts, experts=experts, push=push, matched=matched)


def _contrast(pairs: Any, work: Work, model: Any, domains: Any, **how: Any) -> Any:
    return work(model, pairs, domains, **how)


@command("collect", "moe-lens-collected")
def collect_activations(
    hook: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Hook point to save, or a pattern: 'blocks.*.hook_resid_mid'; may be repeated."
        ),
    ] = None,
    store: Annotated[
        options.StoredDtype, typer.Option(help="Precision of activations and weights on disk.")
    ] = options.StoredDtype.float32,
    kind: Annotated[Kind, typer.Option("--format", help="File format of the shards.")] = Kind.safetensors,
) -> Work:
    """Save activations and routing of every token, in shards, to train probes, SAEs and transcoders on.

    Every shard has, for each token: token, document, position, counted, the active experts (indices) and their weights
    in every MoE layer, and the activations that --hook names. documents.parquet says which source a document is from.
    In Python: moe_lens.studies.Collected.load(FOLDER).shards(), or .dataset() for `datasets`.

    Example: moe-lens collect --hook 'blocks.*.hook_resid_mid' --store float16 --tokens 1000000 --out runs/activations
    """
    import torch

    from moe_lens.studies import collect

    def save(model: Any, domains: options.Opened, *, say: Any, **how: Any) -> Any:  # noqa: ARG001  # one pass
        return collect(model, domains, hooks=hook or (), dtype=getattr(torch, store.value), kind=kind.value, **how)

    return save


@app.command("compare")
def compare_studies(
    first: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a saved study.")],
    second: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="Folder of another result of the same study.  [the first one]"),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE", callback=options.at_home, help="Parquet file for the table.")
    ] = Path("moe-lens-compare.parquet"),
    domains: Annotated[
        list[str] | None,
        typer.Option(
            "--domain", metavar="NAME", help="Compare two domains: give the option twice, the second minus the first."
        ),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Number of largest differences to print.")] = 10,
) -> None:
    """Compare two saved studies, or two domains: second minus first, with 95 % intervals over sources.

    Two models on the same texts (base and chat, before and after pruning) are paired by source. Experts are compared by
    id, which makes sense only where one model was made from the other.

    Example: moe-lens compare runs/base runs/chat --out difference.parquet

    Two domains of one study: moe-lens compare runs/routing --domain english --domain german
    """
    if domains is not None and len(domains) != 2:
        raise InputError(f"got --domain {len(domains)} times; expected two domains to compare, or none")
    if second is None and domains is None:
        raise InputError("got one folder; give another one, or two of its domains: --domain NAME --domain NAME")
    for folder in (first, second or first):
        read_manifest(folder)
    if any(folder.resolve() in out.resolve().parents for folder in (first, second or first)):
        raise InputError(f"--out {out} is inside of a study that is compared; give a file elsewhere")

    from moe_lens.storage import written_whole
    from moe_lens.studies import StudyResult, compare

    quiet()
    studies = StudyResult.load(first), None if second is None else StudyResult.load(second)
    two = None if domains is None else (domains[0], domains[1])
    names = None if second is None else _apart(first, second)
    with written_whole(out) as temporary:
        temporary.touch()  # what cannot be written is said before the work, not after
        found = compare(*studies, domains=two, names=names)
        found.table.to_parquet(temporary, index=False)
    print(found.found())
    for quantity, rows in found.table.groupby("quantity", sort=False):
        order = (-abs(rows["difference"].to_numpy())).argsort()
        largest = rows.iloc[order[:show]]
        print(f"\n{quantity}, the largest differences:")
        print(largest.drop(columns=["quantity", "paired", "sources"]).to_string(index=False))
    print(f"\n{out.resolve()}")


def _apart(first: Path, second: Path) -> tuple[str, str] | None:
    """The ends of two paths, as long as it takes to tell them apart; None if nothing does."""
    one, other = first.resolve().parts, second.resolve().parts
    for n in range(1, max(len(one), len(other)) + 1):
        if one[-n:] != other[-n:]:
            return "/".join(one[-n:]), "/".join(other[-n:])
    return None
