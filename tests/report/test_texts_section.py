"""The section on what was read says of each reading which domains have no intervals in it."""

import re
from types import SimpleNamespace
from typing import Any

from moe_lens.report import sections


def study(tokens: int, context: int, **sources: int) -> Any:
    read = [{"name": n, "tokens": tokens, "windows": 9, "sources": of, "left_out": 0} for n, of in sources.items()]
    return SimpleNamespace(manifest={"read": read, "plan": {"reading": {"context": context}}}, tables={})


def test_domains_without_intervals_are_named_for_the_studies_that_lack_them() -> None:
    page = sections.texts({"routing": study(400, 64, a=12, b=13, c=3), "pruning": study(100, 16, a=7, b=10, c=3)}).body
    said = re.findall(r"No intervals in (\w+) for ([\w, ]+): with fewer than 10 sources", page)
    assert said == [("routing", "c"), ("pruning", "a, c")]
    plenty = sections.texts({"routing": study(400, 64, a=12)}).body
    assert "No intervals" not in plenty and "documents that texts are from" in plenty
