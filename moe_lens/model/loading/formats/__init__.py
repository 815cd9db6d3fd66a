"""Checkpoints whose matrices are stored packed: each format as a view of plain numbers."""
