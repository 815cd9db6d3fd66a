"""Groups of experts, the best of which a router chooses from, and whether those that some experts leave will do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.checked import Positive
from moe_lens.errors import UnfitError
from moe_lens.model.families.family import Family


@dataclass(frozen=True)
class Groups:
    """How a router chooses from groups of consecutive experts."""

    number: Positive
    chosen: Positive
    """How many of them a token's experts are from."""
    least: Positive
    """Of how many of its experts the rank of a group is made."""

    @classmethod
    def of(cls, family: Family, config: Mapping[str, Any]) -> "Groups | None":
        """Those of a model; None where its router has none.

        Args:
            family: Of the model.
            config: Fields of the part that reads text.
        """
        if not family.groups or config.get("topk_method") == "greedy":
            return None  # greedy has no groups, whatever is said of them
        number = config.get("n_group") or config.get("num_expert_group") or 1  # as Kimi Linear calls it
        return cls(number, min(config.get("topk_group") or number, number), family.groups)

    @classmethod
    def of_model(cls, model: Any) -> "Groups | None":
        """Those of a `HookedMoE`; None where its router has none."""
        return cls.of(model.family, vars(model.original_model.config.get_text_config()))

    def within(self, n_experts: Positive) -> int:
        """Among how many of a layer's experts a token may choose."""
        return n_experts // self.number * self.chosen

    def fit(self, count: int, top_k: int) -> bool:
        """Whether so many experts, as many in each group, are enough for every token."""
        each = max(1, round(count / self.number))
        return each >= self.least and each * self.chosen >= top_k

    def lacking(self, kept: Bool[Tensor, "*some n_experts"], top_k: Int[Tensor, "*some"]) -> Bool[Tensor, "*some"]:
        """Whether of these experts some could not be chosen, or a token could have too few.

        A group whose experts are all gone is never chosen. One with too few to be ranked by would not be either, and
        what is left of it would be lost unsaid.
        """
        counts = kept.unflatten(-1, (self.number, -1)).sum(-1)
        there = counts.masked_fill(counts == 0, kept.shape[-1]).sort(-1).values  # those that are gone come last
        unranked = ((counts > 0) & (counts < self.least)).any(-1)
        few = (counts > 0).sum(-1) < self.chosen
        return unranked | few | (there[..., : self.chosen].sum(-1) < top_k)


def check_groups(model: Any, kept: Bool[Tensor, "*some layer n_experts"], top_k: Int[Tensor, " layer"]) -> None:
    """Refuse experts of which a router that chooses from groups would not find enough, or could never choose some.

    Args:
        model: A `HookedMoE`.
        kept: Experts of its MoE layers that are left. A layer that keeps all is as the model has it.
        top_k: Experts of a token.

    Raises:
        UnfitError: names the first layer.
    """
    groups = Groups.of_model(model)
    if groups is None:
        return
    wrong = groups.lacking(kept, top_k.expand(kept.shape[:-1])) & ~kept.all(-1)
    if wrong.any():
        at = wrong.nonzero()[0]
        counts = kept[tuple(at)].view(groups.number, -1).sum(-1).tolist()
        raise UnfitError(
            f"layer {model.moe_layers[at[-1]]} would keep {counts} experts in the {groups.number} groups that its "
            f"router chooses from, {groups.chosen} for a token. Keep {groups.chosen} groups or more, of each "
            f"{groups.least} experts or more, or none, and {int(top_k[at[-1]])} in any {groups.chosen}"
        )
