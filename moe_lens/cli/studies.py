"""The commands that read texts and measure: arguments → study → a saved folder."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.cli import options
from moe_lens.cli.options import Parallel
from moe_lens.cli.study_command import Work, command
from moe_lens.errors import InputError

if TYPE_CHECKING:
    from moe_lens.studies import Study


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


class Kind(StrEnum):
    """Kinds of shards."""

    safetensors = "safetensors"
    parquet = "parquet"


@command("routing", "moe-lens-routing")
def routing(
    nulls: Annotated[
        bool,
        typer.Option(
            "--nulls",
            help="Also measure the nulls: a random router, routing by the token alone (token_unigram), and uniform "
            "routing. The texts are read once more.",
        ),
    ] = False,
    parallel: Parallel = None,
) -> "Study":
    """Which experts each domain's tokens are sent to.

    Shares have intervals over sources, and differences between domains are tested.

    Tables: specialisation (share of tokens that have the expert among their active ones), most_specialised, layers
    (Gini, entropies, margin, experts for 50 and 80 % of the assignments), pairs (co-activation, transitions),
    persistence, vocabulary. With two domains or more also domain_experts, domain_layers, domain_pairs (tests that
    permute domain labels over sources), given_token_layers, given_token_pairs (whether the same token is routed
    differently in different domains), committee and committee_layers (the experts with most of the routing weight of
    every domain; with --nulls also those of a random router). With three domains or more also domain_nearer (is a
    domain nearer to one domain than to another: difference of two divergences).

    Example: moe-lens routing --domain prose=prose.jsonl --domain code=code.jsonl --tokens 100000 --out runs/routing

    With --parallel, two domains that contain the same documents are compared on these documents alone, by swapping the
    two versions of each; sources without a partner are left out of the pair, and counted (columns `sources` and
    `dropped` of domain_pairs).

    Several processes: torchrun --nproc-per-node 4 -m moe_lens routing …
    """
    from moe_lens.studies import RoutingStudy

    return RoutingStudy(nulls=nulls, parallel=parallel)


@command("single-expert", "moe-lens-single-expert")
def single_expert(
    layers: Annotated[
        Together,
        typer.Option(
            help="Leave experts out in all layers at once (together), in one layer at a time (each), or do both."
        ),
    ] = (Together.together),
    treatment: Annotated[
        list[Treated] | None,
        typer.Option(
            metavar="|".join(Treated),
            help="Treatment of the experts that are not kept; may be repeated. Without it: all four.",
        ),
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option(
            "--k", min=0, metavar="NUMBER", help="Number of experts to keep; may be repeated.  [0 to top-k − 1]"
        ),
    ] = None,
) -> "Study":
    """One expert against all active ones.

    Cosines of the two sums, with controls, and the perplexity with fewer experts.

    Treatments of the experts that are not kept: dropped; renormalised (dropped, and the kept weights rescaled to the
    same sum); random (the kept ones are drawn at random); replaced (by their mean output, taken from other sources).

    Tables: perplexity (a row for each treatment, layer and k, token-weighted and as a geometric mean over windows, with
    ratios to the unedited model paired by source), similarity (cosine of u + rank 0 with u + all active experts, where
    u is the residual stream before them, and its controls).

    Every text is read twice, and once more for each variant (treatment and k): 2 + 22 times with 6 active experts and
    all treatments, and with --layers both a further 22 times for each layer.

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
            metavar="NUMBER",
            help="Number of experts of every token; may be repeated. Without it: 1, 2, 4, … and all experts, and half, "
            "one and a half times and twice the model's own number, which is always run.",
        ),
    ] = None,
    mass: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE",
            help="Give a token the fewest experts whose shares of affinity sum to at least this (top-p); may be "
            "repeated.  [0.15, 0.3, 0.5]",
        ),
    ] = None,
    threshold: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE", help="Give a token the experts with at least this share of affinity; may be repeated."
        ),
    ] = None,
    entropy: Annotated[
        list[float] | None,
        typer.Option(
            metavar="NUMBER",
            help="Give a token this number × exp(entropy of its affinities) experts; may be repeated.",
        ),
    ] = None,
) -> "Study":
    """Loss with fewer or more experts for each token.

    The number is fixed, or depends on the router's affinities for the token.

    Tables: numbers (a row for each number and rule: mean number of experts, loss, perplexity, its ratio to that with
    the model's own number, and how much lower, in nats a token, the loss is than with a fixed number that has the same
    mean; the control of each rule is the same numbers shuffled over tokens), layers (mean number of experts in each
    layer).

    Every text is read once for each fixed number, and twice for each rule.

    Example: moe-lens experts-per-token --k 2 --k 12 --mass 0.3 --entropy 0.15 --out runs/numbers
    """
    from moe_lens.studies import ExpertsPerToken

    chosen: dict[str, Any] = {"threshold": tuple(threshold or ()), "entropy": tuple(entropy or ())}
    if mass is not None or threshold or entropy:
        chosen["mass"] = tuple(mass or ())
    return ExpertsPerToken(k=tuple(k) if k else None, **chosen)


@command("lens", "moe-lens-logit-lens")
def lens(
    lens: Annotated[
        str,
        typer.Option(
            help="Lens to read with: logit, or a tuned lens (its folder, or tiny-deepseekmoe, the embedded one)."
        ),
    ] = "logit",
) -> "Study":
    """What a lens reads after one expert, all, or none.

    What the model would predict if it ended in a layer, from u (the residual stream before the experts) plus one, all
    or none of the active experts: Figure 2 of the paper, measured over whole texts.

    Tables: lens (by domain, layer and partial sum: cross-entropy, entropy, KL to the model's own prediction and to the
    ensemble of all active experts, agreement), with the controls u alone, u + a random active expert, and u + an expert
    that was not selected; examples (what the lens reads from one prompt of each domain).

    Example: moe-lens lens --domain code=code.jsonl --tokens 20000 --out runs/lens
    """
    if options.leads_nowhere(lens):
        raise InputError(f"--lens {lens}: there is no such folder; expected logit, or the folder of a tuned lens")

    from moe_lens.studies import LensStudy

    return LensStudy(lens=lens)


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
    """Save activations and routing of every token.

    They are saved in shards, for training probes, SAEs and transcoders. For each token a shard has: token, document,
    position, counted (false at special tokens), the active experts (indices) and their weights in every MoE layer, and
    the activations that --hook names. documents.parquet says which source a document is from. In Python:
    moe_lens.studies.Collected.load(FOLDER).shards(), or .dataset() for `datasets`.

    Example: moe-lens collect --hook 'blocks.*.hook_resid_mid' --store float16 --tokens 1000000 --out runs/activations
    """
    import torch

    from moe_lens.studies import collect

    def save(model: Any, domains: options.Opened, *, say: Any, **how: Any) -> Any:  # noqa: ARG001  # one pass
        return collect(model, domains, hooks=hook or (), dtype=getattr(torch, store.value), kind=kind.value, **how)

    return save
