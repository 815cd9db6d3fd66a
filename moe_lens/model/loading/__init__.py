"""Checkpoints in and out: found, checked, read tensor by tensor, and written under their original names."""

from moe_lens._moved import handed_on

__getattr__ = handed_on(__name__, "moe_lens.model.loading.pretrained")
