"""What the models that are our own, made of transformers' parts, have to tell transformers."""

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

_Base = PreTrainedModel if TYPE_CHECKING else object


class OwnModel(_Base):
    """To stand before a transformers model among the bases of a class: how its experts compute."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in the source of this very module, but it stands elsewhere

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Transformers' choice, but for float64, which its default `grouped_mm` cannot compute."""
        if requested_experts is None and torch.get_default_dtype() == torch.float64:
            requested_experts = "eager"
        return super().get_correct_experts_implementation(requested_experts)
