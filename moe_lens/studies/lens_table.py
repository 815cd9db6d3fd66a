"""The extended LogitLens at one position of an example text (arXiv 2603.05806, Figure 2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_lens.checked import checked
from moe_lens.data import Domain, Domains, in_memory
from moe_lens.lenses import LensResult, LogitLens
from moe_lens.partial_sum import PartialSum
from moe_lens.studies.forward_passes import input_device

EXAMPLE_TOKENS = 24


@dataclass(frozen=True, eq=False)
class LensExample:
    """What the lens reads at the last token of a prompt."""

    domain: str
    origin: str
    """File and line of the passage."""
    prompt: tuple[int, ...]
    """Token ids, BOS among them."""
    target: int
    """The token that follows the prompt in the text."""
    predicted: int
    """The token that the model holds most likely."""
    result: LensResult
    """Of one position, the last of the prompt."""
    texts: Mapping[int, str]
    """What the tokens of the prompt, the target and the predicted one read as."""


@checked
def lens_table(model: Any, domains: Domains, *, top: int = 5) -> list[LensExample]:
    """Figure 2 for one example of each domain, chosen by a fixed rule and not by how it looks.

    The rule: the first passage in the file that has more than `EXAMPLE_TOKENS` tokens (the longest if none has), and in
    it the position of token number `EXAMPLE_TOKENS`, or of the last but one.

    Args:
        model: A `HookedMoE`.
        domains: The texts.
        top: How many of the most likely tokens to keep for each cell.
    """
    lens, sums = LogitLens(model), PartialSum.figure2(model.top_k)
    examples = []
    for domain in in_memory(domains):
        prompt, target, origin = _example(model, domain)
        with torch.no_grad():
            logits, cache = model.run_with_cache(
                torch.tensor([prompt], device=input_device(model)), names_filter=lens.hooks(sums=sums)
            )
            result = lens.decode(cache, sums, positions=[len(prompt) - 1], targets=torch.tensor([[target]]), top=top)
            predicted = int(logits[0, -1].argmax())
        texts = {token: model.tokenizer.decode([token]) for token in sorted({*prompt, target, predicted})}
        examples.append(LensExample(domain.name, origin, tuple(prompt), target, predicted, result, texts))
    return examples


def _example(model: Any, domain: Domain) -> tuple[list[int], int, str]:
    longest: tuple[list[int], list[int], str] = ([], [], "")
    for passage in domain.passages:
        opening, text = model.own_ids(passage.text)
        if len(text) > len(longest[1]):
            longest = opening, text, passage.origin
        if len(text) > EXAMPLE_TOKENS:
            break
    opening, text, origin = longest
    end = min(EXAMPLE_TOKENS, len(text) - 1)
    return [*opening, *text[:end]], text[end], origin
