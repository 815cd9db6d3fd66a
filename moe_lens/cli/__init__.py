"""The command `moe-lens`."""

from moe_lens.cli.main import main as main
