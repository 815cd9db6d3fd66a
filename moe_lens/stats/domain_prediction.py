"""How well routing tells the domain, beside how well the tokens alone do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lens.checked import Natural, Positive, Seed
from moe_lens.errors import InputError
from moe_lens.resampling import Interval, bootstrap, folds, units
from moe_lens.stats.accumulator import Accumulator, Result
from moe_lens.stats.parallel_sources import too_few_sources
from moe_lens.stats.routed_batch import RoutedBatch
from moe_lens.stats.routing_stats import check_sizes
from moe_lens.stats.top_rows import TopRows, row_keys

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Strengths of the L2 penalty that are tried, on sources apart."""


@dataclass(frozen=True, eq=False)
class PassageResult(Result):
    """A random sample of passages of equal length."""

    layers: tuple[Natural, ...]
    n_experts: Positive
    source: tuple[str, ...]
    tokens: Int[Tensor, "passage length"]
    assigned: Int[Tensor, "passage layer n_experts"]
    """How many of its tokens chose each expert."""

    def to_frame(self) -> pd.DataFrame:
        """A row per passage: source, tokens (list of ids)."""
        return pd.DataFrame({"source": list(self.source), "tokens": self.tokens.tolist()})


class PassageSample(Accumulator[PassageResult]):
    """Keeps a random sample of passages: runs of `length` counted tokens, so that BOS and padding are in none.

    Which ones are kept is decided by their content: it is random, and the same whatever the order they come in.

    Args:
        layers: The model's layers with experts.
        n_experts: Routed experts of a layer.
        top_k: Experts active per token.
        length: Tokens of a passage; what is left at the end of a row is not used.
        n: How many passages to keep.
    """

    def __init__(
        self,
        layers: Sequence[int],
        n_experts: Positive,
        top_k: Positive,
        *,
        length: Positive = 32,
        n: Positive = 1000,
    ):
        self.layers, self.n_experts, self.top_k = tuple(layers), n_experts, top_k
        self.length, self.n = length, n
        self._best = TopRows(n, length + len(self.layers) * n_experts)
        about = {"layers": self.layers, "n_experts": n_experts, "top_k": top_k, "length": length, "n": n}
        super().__init__(about, {"best": self._best})

    def update(self, batch: RoutedBatch) -> Self:
        """Look at a batch.

        Raises:
            InputError: the batch does not know its tokens, or is of another model.
        """
        check_sizes(batch, self.layers, self.n_experts, self.top_k)
        all_tokens = batch.require_tokens()
        tokens, assigned, sources = [], [], []
        for row, source in enumerate(batch.sources):
            at = batch.mask[row].nonzero()[:, 0]
            passages = at[: len(at) // self.length * self.length].view(-1, self.length)
            tokens.append(all_tokens[row, passages])
            assigned.append(batch.chosen[:, row, passages].sum(2).long().transpose(0, 1))
            sources += [source] * len(passages)
        if sources:
            content = torch.cat([torch.cat(tokens), torch.cat(assigned).flatten(1)], 1).cpu()
            random = row_keys(content[:, : self.length]).double()
            self._best.add(torch.zeros(len(content), dtype=torch.long), random, content, sources)
        return self

    def result(self) -> PassageResult:
        """The sample so far."""
        best = self._best
        if not len(best.target):
            raise InputError(
                f"no tokens were counted that fill a row of {self.length}; update with longer texts, or ask for a "
                "smaller length"
            )
        tokens, assigned = best.content[:, : self.length], best.content[:, self.length :]
        shape = (-1, len(self.layers), self.n_experts)
        return PassageResult(self.layers, self.n_experts, best.names(), tokens, assigned.reshape(shape))


@dataclass(frozen=True, eq=False)
class DomainPrediction(Result):
    """Which passages' domains were predicted right, from routing and from tokens, in sources not trained on."""

    domains: tuple[str, ...]
    length: Positive
    """Tokens of a passage."""
    source: tuple[str, ...]
    """Of each passage; a name means another source in another domain."""
    unit: Int[Tensor, " passage"]
    """Number of what was held out, and is resampled, together: a source, or parallel ones of several domains."""
    domain: Int[Tensor, " passage"]
    routing: Int[Tensor, " passage"]
    """Domain predicted from how many of the passage's tokens chose each expert of each layer."""
    unigram: Int[Tensor, " passage"]
    """Domain predicted from how often each token of the vocabulary occurs in it."""

    @property
    def chance(self) -> float:
        """Share that would be right without looking: passages are as many of each domain."""
        return 1 / len(self.domains)

    def accuracy(self, name: str) -> float:
        """Share of passages whose domain "routing" or "unigram" predicts right, in [0, 1]."""
        return float((getattr(self, name) == self.domain).double().mean())

    def interval(self, *names: str) -> Interval | None:
        """95 % interval over sources of the accuracy of one name, or of the first's minus the second's, paired.

        Of these trained classifiers: what other training texts would change is not in it, and it is too narrow.
        """
        correct = torch.stack([(getattr(self, name) == self.domain).double() for name in names])
        value = correct[0] if len(names) == 1 else correct[0] - correct[1]
        counts = torch.bincount(self.unit).double()
        sums = torch.zeros_like(counts).index_add_(0, self.unit, value)
        return bootstrap(lambda times: (times @ sums) / (times @ counts), counts)

    def to_frame(self) -> pd.DataFrame:
        """A row for "routing", "unigram" and "routing − unigram": accuracy, low, high, chance, passages, sources.

        Parallel sources are one.
        """
        rows = []
        for label, names in (
            ("routing", ["routing"]),
            ("unigram", ["unigram"]),
            ("routing − unigram", ["routing", "unigram"]),
        ):
            interval = self.interval(*names)
            rows.append(
                {
                    "from": label,
                    "accuracy": self.accuracy(names[0]) - (self.accuracy(names[1]) if len(names) > 1 else 0),
                    "low": interval.low if interval else None,
                    "high": interval.high if interval else None,
                    "chance": self.chance if len(names) == 1 else 0.0,
                    "passages": len(self.source),
                    "sources": len(self.unit.unique()),
                }
            )
        return pd.DataFrame(rows)


def predict_domain(
    samples: Mapping[str, PassageResult],
    *,
    n_folds: Positive = 5,
    seed: Seed = 0,
    parallel: Callable[[str], str] | None = None,
) -> DomainPrediction:
    """Train two classifiers to tell a passage's domain, each the same multinomial logistic regression with L2 penalty.

    One sees how often each expert was chosen, the other how often each token occurs, both as square roots of shares.
    Sources are divided into folds; each fold is predicted by classifiers that were trained, and whose penalty was
    chosen, on other sources. Each domain gives as many passages.

    Args:
        samples: Of each domain, taken with the same model and length.
        n_folds: How many folds; fewer where a domain has fewer sources.
        seed: Of the folds.
        parallel: From the name of a source to what it has in common with those of other domains that are the same
            document, as `parallel_key` gives it: they are held out together, and resampled together. If not given,
            sources of different domains are different documents.

    Raises:
        InputError: Fewer than two domains, samples that do not fit one another, or a domain of fewer than three sources
            in as many passages as the smallest sample has: its classifiers could not be trained, chosen and tried on
            different ones.
    """
    if len(samples) < 2:
        raise InputError(f"got the domains {list(samples)}; expected at least two to tell apart")
    shapes = {(s.layers, s.n_experts, s.tokens.shape[1]) for s in samples.values()}
    if len(shapes) > 1:
        raise InputError(f"the samples differ in layers, experts or length: {sorted(shapes)}")
    each = min(len(s.source) for s in samples.values())
    if few := too_few_sources({name: s.source[:each] for name, s in samples.items()}, parallel):
        raise InputError(
            f"domains with too few sources (three are needed to keep them apart) in the {each} passages that the "
            f"smallest sample has: {few}"
        )
    domain = torch.arange(len(samples)).repeat_interleave(each)
    source = tuple(one for s in samples.values() for one in s.source[:each])
    assigned = torch.cat([s.assigned[:each] for s in samples.values()]).flatten(1)
    tokens = torch.cat([s.tokens[:each] for s in samples.values()])
    types, place = tokens.unique(return_inverse=True)
    occurring = torch.zeros(len(tokens), len(types)).scatter_add_(1, place, torch.ones(place.shape))
    domains = [list(samples)[d] for d in domain.tolist()]
    of = units(source, domains, parallel)
    fold = folds(of, domains, n_folds, seed)
    places = {name: place for place, name in enumerate(sorted(set(of)))}
    unit = torch.tensor([places[name] for name in of])
    found = {}
    for name, counts in (("routing", assigned.float()), ("unigram", occurring)):
        features = (counts / tokens.shape[1]).sqrt()
        predicted = torch.full_like(domain, -1)
        for held in fold.unique().tolist():
            train = fold != held
            validate = train & (fold == (held + 1) % (int(fold.max()) + 1))
            fit = train & ~validate
            models = [fit_logistic(features[fit], domain[fit], penalty, len(samples)) for penalty in PENALTIES]
            losses = [float(cross_entropy(model(features[validate]), domain[validate])) for model in models]
            penalty = PENALTIES[losses.index(min(losses))]
            best = fit_logistic(features[train], domain[train], penalty, len(samples))
            predicted[fold == held] = best(features[fold == held]).argmax(-1)
        found[name] = predicted
    return DomainPrediction(tuple(samples), tokens.shape[1], source, unit, domain, found["routing"], found["unigram"])


class Logistic:
    """Multinomial logistic regression on standardised features."""

    def __init__(self, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor):
        self.mean, self.scale, self.weight, self.bias = mean, scale, weight, bias

    def __call__(self, features: Float[Tensor, "row feature"]) -> Float[Tensor, "row domain"]:
        """Log-odds of the domains, up to a constant."""
        return (features - self.mean) / self.scale @ self.weight + self.bias


def fit_logistic(
    features: Float[Tensor, "row feature"], labels: Int[Tensor, " row"], penalty: float, n_classes: int
) -> Logistic:
    """Minimise mean cross-entropy + penalty · ‖weights‖² by L-BFGS; features are centred and scaled by one number."""
    mean = features.mean(0)
    centred = features - mean
    scale = centred.square().mean().sqrt().clamp(min=1e-12)
    x = centred / scale
    weight = torch.zeros(x.shape[1], n_classes, requires_grad=True)
    bias = torch.zeros(n_classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = cross_entropy(x @ weight + bias, labels) + penalty * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return Logistic(mean, scale, weight.detach(), bias.detach())
