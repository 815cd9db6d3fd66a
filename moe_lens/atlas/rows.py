"""Rows of tables as plain values."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

Expert = tuple[int, int]


def rows(table: Any, columns: Sequence[str]) -> list[list[Any]]:
    """Some columns, row by row, as plain values: None where one is missing."""
    chosen = table[list(columns)].astype(object)
    return chosen.where(chosen.notna(), None).to_numpy().tolist()


def by_expert(table: Any, columns: Sequence[str]) -> dict[Expert, list[list[Any]]]:
    """The same for each (layer, expert)."""
    found: dict[Expert, list[list[Any]]] = defaultdict(list)
    for layer, expert, *values in rows(table, ["layer", "expert", *columns]):
        found[layer, expert].append(values)
    return found


def grid(table: Any, column: str) -> list[list[Any]]:
    """One column of a row per layer and expert, as a list for each layer."""
    grid: dict[int, list[Any]] = {}
    for layer, value in rows(table, ["layer", column]):
        grid.setdefault(layer, []).append(value)
    return list(grid.values())
