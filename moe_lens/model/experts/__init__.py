"""Parameters of experts, whatever their layout: one view for the kernel, for `model.W_*` and for counts."""

from moe_lens._moved import handed_on

__getattr__ = handed_on(__name__, "moe_lens.model.hooks.expert_kernel")
