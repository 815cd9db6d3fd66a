"""What wrapping and every pass ask of all hook points has the answer that TransformerLens would give."""

from itertools import product
from types import FunctionType
from typing import Any

import pytest
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from moe_lens.errors import HookError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.hooks.checked_point import CheckedPoint
from moe_lens.model.hooks.hook_pairs import as_pairs
from moe_lens.model.hooks.hook_table import HookTable
from tests.families import build
from tests.wrapped import wrapped

Scan = Any


def scanned(model: Any, scan: Scan) -> tuple[dict[str, int], dict[int, str | None]]:
    """The registry and the points' own names that a scan makes, of a model as it is; nothing of it stays."""
    points = {id(p): p for m in model.modules() for p in (m, *vars(m).values()) if isinstance(p, HookPoint)}
    names, before = {key: point.name for key, point in points.items()}, dict(model._hook_registry)
    scan(model, model, "")
    found = {name: id(point) for name, point in model._hook_registry.items()}
    called = {key: point.name for key, point in points.items()}
    model._hook_registry.clear()
    model._hook_registry.update(before)
    for key, point in points.items():
        point.name = names[key]
    return found, called


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_the_scan_finds_what_transformer_lens_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both times: before and after its aliases are there."""
    own: Scan = HookTable._scan_existing_hooks
    seen: list[int] = []

    def both(self: Any, module: Any, prefix: str = "") -> None:
        ours, theirs = (scanned(self, scan) for scan in (own, TransformerBridge._scan_existing_hooks))
        assert ours == theirs and list(ours[0]) == list(theirs[0])
        own(self, module, prefix)
        seen.append(len(ours[0]))

    monkeypatch.setattr(HookTable, "_scan_existing_hooks", both)
    HookedMoE.from_hf(build(name), check=False)
    assert len(seen) == 2 and 100 < seen[0] < seen[1], "aliases come with the second"


def test_the_comparison_of_scans_notices_a_point_and_a_name() -> None:
    model: Any = wrapped("olmoe").model
    assert scanned(model, TransformerBridge._scan_existing_hooks) != scanned(model, lambda *_: None)


@pytest.mark.typed
def test_whether_there_are_hooks_is_what_transformer_lens_says() -> None:
    hooks = [
        lambda point: point.add_hook(print),
        lambda point: point.add_hook(print, dir="bwd", level=1),
        lambda point: point.add_hook(print, is_permanent=True),
    ]
    answers = set()
    for chosen in product((False, True), repeat=len(hooks)):
        point = CheckedPoint()
        for add, wanted in zip(hooks, chosen, strict=True):
            if wanted:
                add(point)
        for asked in product(("fwd", "bwd", "both"), (False, True), (None, 0, 1)):
            answer = point.has_hooks(*asked)
            assert answer == HookPoint.has_hooks(point, *asked), (chosen, asked)
            answers.add((asked, answer))
    assert {answer for asked, answer in answers if asked == ("both", True, None)} == {False, True}
    assert len(answers) == 28, "ten of the questions have both answers"
    with pytest.raises(ValueError, match="Invalid direction"):
        CheckedPoint().has_hooks("forward")


def test_a_function_that_fits_lets_no_other_pass() -> None:
    """What fits is looked at once; the same code with fewer defaults, or called in another way, does not fit."""

    def fits(value: Any, hook: Any, times: float = 2.0) -> Any:
        return value * times

    class Callable:
        def __call__(self, value: Any, hook: Any) -> None: ...

    fewer = FunctionType(fits.__code__, {}, argdefs=())
    for _ in range(2):
        as_pairs([("a", fits), ("b", Callable()), ("c", lambda value, hook: None)])
        for other, said in ((fewer, r"takes \(value"), (Callable.__call__, r"takes \(self")):
            with pytest.raises(HookError, match=said):
                as_pairs([("a", other)])
