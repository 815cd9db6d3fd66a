"""What objects show of themselves: a line, and a table in which everything is text."""

from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pytest
import torch

from moe_lens import HookedMoE, LogitLens, TunedLens
from moe_lens.data import Domain, embedded_domain, tokenize
from moe_lens.reprs import ROWS, WIDTH, Summary, short
from moe_lens.stats import RoutedBatch, RoutingStats


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return HookedMoE.from_pretrained("tiny-deepseekmoe")


class Cells(HTMLParser):
    """The text of a page's cells, and the elements that it has."""

    def __init__(self, page: str):
        super().__init__()
        self.cells: list[str] = []
        self.kinds: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.kinds.add(tag)

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


@dataclass(frozen=True)
class Found(Summary):
    name: str
    values: torch.Tensor


@dataclass(frozen=True)
class Named(Found):
    def __repr__(self) -> str:
        return "Named by hand"


@dataclass(frozen=True)
class Below(Named):
    more: int = 0


def test_a_dataclass_shows_sizes_and_keeps_a_repr_of_its_own():
    assert repr(Found("a", torch.zeros(2, 3))) == "Found(name=a, values=float32 [2, 3])"
    assert repr(Named("a", torch.zeros(1))) == repr(Below("a", torch.zeros(1))) == "Named by hand"


def test_what_is_hostile_is_text():
    page = Cells(Found("<img src=x onerror=alert(1)>\n</table>", torch.zeros(1))._repr_html_())
    assert page.kinds == {"table", "caption", "tr", "th", "td"}
    assert "<img src=x onerror=alert(1)> </table>" in page.cells


def test_values_are_short():
    assert short(torch.zeros(2, dtype=torch.int8)) == "int8 [2]"
    assert short(pd.DataFrame({"a": [1, 2]})) == "2 rows × 1 columns"
    assert short([1, 2]) == "[1, 2]" and short(range(1, 28)) == "1 … 27 (27)" and short([torch.zeros(1)]) == "1 entries"
    assert short({"a": 1}) == "{'a': 1}" and short({"a": torch.zeros(1)}) == "1: a"
    assert len(short("long " * 100)) == WIDTH and short("a\nb") == "a b"


@pytest.mark.typed
def test_tables_end():
    class Many(Summary):
        def _facts(self) -> dict[str, Any]:
            return dict.fromkeys(map(str, range(ROWS + 5)), 0)

    assert Cells(Many()._repr_html_()).cells[-1] == "5 more"


@pytest.mark.typed
def test_the_objects_that_people_look_at_are_short(model: HookedMoE):
    domain = embedded_domain("english")
    tokens = tokenize(domain, model, n_tokens=200, context=64)
    _, cache = model.run_with_cache("The sea")
    stats = RoutingStats(model.moe_layers, model.n_experts, model.top_k)
    stats.update(RoutedBatch(routing=model.routing("The sea"), sources=["a"]))
    shown = [model, cache, LogitLens(model), TunedLens(model), domain, Domain.of("a", ["b"]), tokens, stats.result()]
    for one in (*shown, *tokens):
        assert len(repr(one)) < 400 and "\n" not in repr(one), type(one).__name__
        assert repr(one).startswith(type(one).__name__ + "(")
        page = Cells(one._repr_html_())
        assert page.kinds <= {"table", "caption", "tr", "th", "td"} and type(one).__name__ in page.cells
    assert "9,7" in repr(model) and "64, 6 active a token, and shared ones" in repr(model)
    assert "blocks.0.mlp.hook_in" in Cells(cache._repr_html_()).cells
    layers = list(model.moe_layers)
    assert repr(model.W_in) == f"W_in{layers}"
    one = cache.routing(layers[1])
    assert repr(one).startswith(f"LayerRouting(layer {layers[1]}, ") and len(repr(one)) < 100
