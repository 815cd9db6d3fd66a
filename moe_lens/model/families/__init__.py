"""Model types: the table of those supported, those refused, and DeepSeekMoE, which transformers lacks."""

from moe_lens._moved import handed_on

__getattr__ = handed_on(__name__, "moe_lens.model.families.table")
