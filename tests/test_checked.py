"""Arguments are held against their annotations at run time: everything that the package offers, and how."""

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import moe_lens
from moe_lens import studies
from moe_lens.argument_checks import Within, argument_checks
from moe_lens.checked import AnyModel, Natural, Positive, checked
from moe_lens.data import Reading, embedded_domains
from moe_lens.errors import InputError
from moe_lens.interventions import trace
from moe_lens.selection import Selection

pytestmark = pytest.mark.untyped


@checked
def example(
    word: Literal["layer", "global"],
    number: int | None = None,
    *,
    least: Positive = 1,
    share: Annotated[float, Within(0, 1)] = 0.5,
    words: list[Literal["a", "b"]] | None = None,
    either: int | Literal["all"] = 1,
    flag: bool = False,
    texts: Iterable[str] = (),
    where: int | Iterable[int] | slice | None = None,
    by_layer: Mapping[int, Positive] | None = None,
    real: float | Literal["auto"] = "auto",
    selection: Selection | None = None,
    selections: Sequence[Selection] = (),
    model: AnyModel = None,
    path: str | Path | None = None,
    several: Iterable[str | Path] = (),
) -> str:
    return f"{word} {number} {least} {share} {words} {either} {flag} {texts} {where} {by_layer} {real}"


class Model:
    moe_layers = (1,)


def test_what_an_annotation_allows_passes() -> None:
    three: Any = torch.tensor(3)
    assert example("layer", 2, least=4, share=0, words=["a"], either="all").startswith("layer 2 4 0 ['a'] all")
    assert example("global", None, share=1.0)
    assert example("global", three, real=three)
    assert example("layer", flag=np.bool_(True), texts=["a"], where=range(3), by_layer={3: 2}, real=1)  # pyright: ignore[reportArgumentType]
    assert example("layer", selection=Selection(), selections=(Selection(),), model=Model())
    assert example("layer", path=None) and example("layer", path=f"a/{'b' * 255}") and example("layer", path=Path())
    assert example("layer", path="Bücher/\udce9 ", several=["a", Path("b")]), "not UTF-8, as some names are"
    assert example("layer", texts=iter(["a"]), where=[-1], real=np.float32(0.5))  # pyright: ignore[reportArgumentType]


@checked
def numbers(
    number: int,
    *more: Any,
    share: float = 0.5,
    several: tuple[Natural, ...] = (),
    either: Int[Tensor, " n"] | Int[Tensor, ""] | int = 0,
    anything: Any = None,
) -> tuple[Any, ...]:
    return number, *more, share, several, either, anything


def test_numbers_of_numpy_and_torch_are_handed_on_as_pythons() -> None:
    scalar, odd, slope = torch.tensor(3), np.int64(5), torch.tensor(0.5, requires_grad=True)
    several: Any = (np.int32(1), 2)
    found: Any = numbers(np.int64(4), odd, share=np.float32(0.5), several=several, either=scalar, anything=odd)  # pyright: ignore[reportArgumentType]
    assert [type(value) for value in found[:3]] == [int, np.int64, float], "where nothing is annotated, it is as it was"
    assert found[3] == (1, 2) and all(type(value) is int for value in found[3])
    assert found[4] is scalar and found[5] is odd, "a tensor is meant there, and anything here"
    again: Any = numbers(number=scalar, share=slope)  # pyright: ignore[reportArgumentType]
    assert type(again[0]) is int and again[1] is slope, "a gradient goes on through it"
    same = [1, 2]
    assert numbers(1, share=1, several=tuple(same))[1] == 1


def test_studies_and_generators_take_numbers_of_numpy(tmp_path: Path) -> None:
    """JSON and random generators do not."""
    model = moe_lens.HookedMoE.from_pretrained("tiny-deepseekmoe", check=False)
    five: Any = np.int64(5)
    traced = trace(model, "The old man looked", "old", five, draws=np.int64(1), seed=np.int64(0))  # pyright: ignore[reportArgumentType]
    assert torch.equal(traced.corrupted, trace(model, "The old man looked", "old", 5, draws=1, seed=0).corrupted)
    reading = Reading(tokens=np.int64(64), context=np.int64(32), seed=np.int64(0))  # pyright: ignore[reportArgumentType]
    studies.run(studies.RoutingStudy(), model, embedded_domains()[:1], reading=reading, out=tmp_path / "study")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"word": "globl"}, "word is 'globl'; expected one of ('layer', 'global'); did you mean 'global'?"),
        ({"number": 1.5}, "number is 1.5; expected a whole number, or None"),
        ({"number": True}, "number is True; expected a whole number"),
        ({"least": 0}, "least is 0; expected a whole number from 1"),
        ({"least": 1.5}, "least is 1.5; expected a whole number from 1"),
        ({"share": 1.5}, "share is 1.5; expected a number from 0 to 1"),
        ({"share": float("nan")}, "share is nan"),
        ({"share": "0.5"}, "share is '0.5'; expected a number from 0 to 1"),
        ({"words": ["a", "c"]}, "expected one of ('a', 'b') in it, not 'c'"),
        ({"words": "ab"}, "words is 'ab'; expected several: put a single one in a list, or None"),
        ({"either": "al"}, "either is 'al'; expected a whole number, or 'all'"),
        ({"flag": "no"}, "flag is 'no'; expected True or False"),
        ({"flag": 1}, "flag is 1; expected True or False"),
        ({"texts": "one text"}, "texts is 'one text'; expected several: put a single one in a list"),
        ({"texts": 3}, "texts is 3; expected several, in a list"),
        ({"where": 1.5}, "where is 1.5; expected a whole number, or several, in a list, or a slice, or None"),
        ({"by_layer": {3: 0}}, "expected a whole number from 1 at 3, not 0, or None"),
        ({"path": ""}, "path is ''; expected a path that is not empty"),
        ({"path": Path("a\0b")}, r"path is 'a\x00b'; expected a path without a NUL character"),
        ({"path": "\ud83d"}, "expected a path without half of a character (a lone surrogate)"),
        ({"path": f"a/{'b' * 256}"}, "expected a path of names of at most 255 bytes"),
        ({"path": 3}, "path is 3; expected a path"),
        ({"several": ["a", ""]}, "expected a path that is not empty in it, not ''"),
        ({"texts": {"a": "b"}}, "expected several, in a list and no dictionary"),
        ({"selection": {"layers": [3]}}, "selection is {'layers': [3]}; expected a Selection, or None"),
        ({"selections": ["x"]}, "selections is ['x']; expected a Selection in it, not 'x'"),
        ({"selections": Selection()}, "expected several: put a single one in a list"),
        ({"selections": [Selection]}, "expected a Selection: an instance, Selection(…) in it"),
        ({"model": "tiny"}, "model is 'tiny'; expected a HookedMoE, as HookedMoE.from_pretrained(name) and"),
        ({"model": torch.nn.Sequential(torch.nn.Linear(1, 1))}, "model is a Sequential; expected a HookedMoE"),
        ({"model": Model}, "expected a HookedMoE"),
        ({"real": "atuo"}, "real is 'atuo'; expected a number, or 'auto'"),
    ],
)
def test_all_else_is_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(InputError) as error:
        example(**{"word": "layer", **arguments})
    assert says in str(error.value)


def shaped(
    tokens: Int[Tensor, "batch pos"],
    *,
    mask: Bool[Tensor, "batch pos"] | None = None,
    values: Float[Tensor, "*tokens width"] | None = None,
    metric: Callable[[Tensor], Tensor] | None = None,
    path: str | Path | None = None,
) -> str:
    return f"{tokens.shape} {mask is None} {values is None} {metric} {path}"


TOKENS = torch.arange(6).view(2, 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tokens": "text"}, "tokens is 'text'; expected a tensor of whole numbers [batch, pos]"),
        ({"tokens": TOKENS.float()}, "tokens is a Tensor of float32 of shape (2, 3); expected a tensor of whole"),
        ({"tokens": TOKENS[0]}, "tokens is a Tensor of int64 of shape (3,)"),
        ({"tokens": TOKENS.numpy()}, "tokens is a numpy array of int64 of shape (2, 3); expected a tensor"),
        ({"tokens": TOKENS > 1}, "tokens is a Tensor of bool"),
        ({"mask": TOKENS}, "expected a tensor of True and False [batch, pos], or None"),
        ({"mask": TOKENS[:1] > 1}, "mask has shape (1, 3), and tokens has 2 as its 'batch'; expected"),
        ({"values": TOKENS}, "expected a tensor of floating-point numbers [*tokens, width], or None"),
        ({"metric": 3}, "metric is 3; expected a function, or None"),
        ({"path": 3}, "path is 3; expected a path"),
        ({"path": ["a"]}, "path is ['a']; expected a path"),
    ],
)
def test_tensors_have_their_kind_and_axes_and_share_their_sizes(arguments: dict[str, Any], says: str) -> None:
    call = checked(shaped)
    assert call(TOKENS.int(), mask=TOKENS > 1, values=torch.zeros(4, 5, 6), metric=len, path=Path("a"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError) as error:
        call(**{"tokens": TOKENS, **arguments})
    assert says in str(error.value)


def test_bases_are_checked_with_a_class_and_once() -> None:
    class Base:
        def of_base(self, n: Natural) -> int:
            return n

    class Derived(Base):
        @classmethod
        def made(cls, n: Natural) -> int:
            return n

    Base.__module__ = "moe_lens.somewhere"
    Derived.__module__ = "moe_lens.somewhere"
    once = checked(Derived).__dict__["made"].__func__
    assert checked(Derived).__dict__["made"].__func__ is once
    assert (Derived().of_base(1), Derived.made(n=2)) == (1, 2)
    for call in (Derived().of_base, Derived.made):
        with pytest.raises(InputError, match="n is -1; expected a whole number from 0"):
            call(-1)


# --- everything that the package offers ---

INSIDE = {
    "cli": "typer checks what is typed",
    "ids": "what reads numbers, itself",
    "model.families.family": "rows of the table of families",
    "model.hooks.checked_point": "TransformerLens's own class, made by the package",
    "model.hooks.hook_scope": "behind model.hooks",
    "model.hooks.model_input": "what forward makes of its input",
    "model.hooks.ownership": "behind every pass",
}
"""Modules whose classes and functions users do not call, though something offered returns one of them."""

UNBOUNDED = {
    "at": "negative positions count from the end",
    "pos_slice": "negative positions count from the end, as in TransformerLens",
    "batch_slice": "negative items count from the end, as in TransformerLens",
    "keep": "a share of the experts, or their number: `plan` says which can be",
    "neuron_slice": "negative neurons count from the end, as in TransformerLens",
    "position": "negative positions count from the end",
    "positions": "negative positions count from the end",
    "start_at_layer": "negative layers count from the end, as in TransformerLens",
    "stop_at_layer": "negative layers count from the end, as in TransformerLens",
    "subject": "negative positions count from the end",
    "where": "negative positions count from the end",
}
"""Arguments that may be any whole number at the call, by name."""

READ_ELSEWHERE = {"experts": "a dictionary or pairs, which `moe_lens.ids` reads"}
"""Arguments in which one kind of value can hold another's, by name."""


def inside(module: str) -> bool:
    return any(f"{module}.".startswith(f"moe_lens.{name}.") for name in INSIDE)


def hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:  # of what only type checkers import: a figure
        found = dict(function.__annotations__)
        hidden = [str(each) for name, each in found.items() if isinstance(each, str) and name != "return"]
        assert not any(word in each for each in hidden for word in ("Literal", "int", "bool", "[")), hidden
        return found


def of_ours(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and annotation.__module__.startswith("moe_lens."):
        yield annotation
    for part in get_args(annotation):
        yield from of_ours(part)


def offered() -> Iterator[tuple[str, Any]]:
    """Every function that a package offers, method of a class that one offers, and method of what these return."""
    packages = [moe_lens.__name__]
    packages += [each.name for each in pkgutil.walk_packages(moe_lens.__path__, "moe_lens.") if each.ispkg]
    modules = [importlib.import_module(name) for name in packages]
    waiting = [getattr(module, name) for module in modules for name in dir(module) if not name.startswith("_")]
    seen: set[Any] = set()
    while waiting:
        value = waiting.pop()
        home = str(getattr(value, "__module__", ""))
        if not home.startswith("moe_lens.") or inside(home) or value in seen:
            continue
        seen.add(value)
        if inspect.isfunction(value):
            waiting += of_ours(hints(value).get("return"))
            yield f"{home}.{value.__qualname__}", value
        elif isinstance(value, type) and not getattr(value, "_is_protocol", False):
            for base in value.__mro__:
                for name, member in vars(base).items() if base.__module__.startswith("moe_lens.") else ():
                    function = getattr(member, "fget", None) or getattr(member, "__func__", member)
                    if inspect.isfunction(function) and (name == "__init__" or not name.startswith("_")):
                        waiting.append(function)


OFFERED = dict(offered())


def leaves(
    annotation: Any, wrap: Callable[[Any], Any] = lambda leaf: leaf
) -> Iterator[tuple[Any, Callable[[Any], Any]]]:
    """What an annotation allows in the end, and how a value is put where that is allowed."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (typing.Union, types.UnionType):  # noqa: TID251
        for each in inner:
            yield from leaves(each, wrap)
    elif origin in (list, tuple, set, frozenset, Sequence, Iterable, Collection):
        concrete = origin.__module__ == "builtins"
        if not concrete and inner[0] in (int, tuple[int, int]):
            return  # `moe_lens.ids` reads these, arrays and masks too
        yield Sequence, wrap
        if len(set(inner) - {Ellipsis}) == 1:
            kind: Any = origin if concrete else list
            yield from leaves(inner[0], lambda leaf: wrap(kind([leaf])))
    elif origin is Mapping:
        yield from leaves(inner[1], lambda leaf: wrap({0: leaf}))
    else:
        yield annotation, wrap


def wrong_for(annotation: Any, name: str) -> Iterator[Any]:
    """What must be refused of an argument with this annotation."""
    if get_origin(annotation) is Mapping:
        yield "one text"
    found = list(leaves(annotation))
    kinds = [leaf for leaf, _ in found]
    text = str in kinds or any(get_origin(leaf) is Literal for leaf in kinds)
    if Any in kinds or any(isinstance(leaf, typing.TypeVar) for leaf in kinds):
        found = [(leaf, wrap) for leaf, wrap in found if leaf is Sequence and len(kinds) == 2]
    for leaf, wrap in found:
        base, within = leaf, None
        if get_origin(leaf) is Annotated:
            base, within = get_args(leaf)[:2]
        if leaf is Sequence and str not in kinds and not text:
            yield "one text"
        elif leaf is Path and str in kinds and torch.Tensor not in kinds:  # where texts and tokens are none
            yield from (wrap(path) for path in ("", "a\0b", "b" * 256, Path("a\0b")))
        elif get_origin(leaf) is Literal and str not in kinds:
            yield wrap(f"{get_args(leaf)[0]}_")
        elif base is bool:
            yield wrap("no")
        elif base in (int, float):
            yield wrap(True)
            yield from [wrap(1.5)] if base is int and float not in kinds else []
            yield from [wrap(within.least - 1)] if within is not None else []
            assert within is not None or base is float or name in UNBOUNDED, f"{name} is {annotation}: no range"


@pytest.mark.parametrize("name", sorted(OFFERED))
def test_what_is_offered_refuses_what_its_annotations_do_not_allow(name: str) -> None:
    function, refused = OFFERED[name], 0
    annotations = hints(function)
    for argument, parameter in inspect.signature(function).parameters.items():
        if argument not in annotations or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        for wrong in wrong_for(annotations[argument], argument) if argument not in READ_ELSEWHERE else ():
            with pytest.raises(InputError, match=f"^{argument} is "):
                function(**{argument: wrong})
            refused += 1
    assert bool(refused) <= bool(argument_checks(function))


OTHER_MODELS = {
    "HookTable.__init__": "a model of transformers, by from_hf",
    "HookedMoE.from_hf": "a model of transformers, which it checks itself",
    "Intervention.__init__": "made by what changes a model; None after unpickling",
    "Plan.__init__": "what is known of a model",
    "Plan.check": "what is known of a model",
    "Scores.__init__": "what is known of a model",
    "Verdicts.__init__": "the name of a model",
}
"""What has an argument `model` that is no `HookedMoE`, and what that is."""


def is_of_a_study(function: Any) -> bool:
    """Whether it is what `studies.run`, which checks the model, calls."""
    return function.__module__.startswith("moe_lens.studies.") and "self" in inspect.signature(function).parameters


A_MODEL = {
    name: function
    for name, function in OFFERED.items()
    if "model" in hints(function) and function.__qualname__ not in OTHER_MODELS and not is_of_a_study(function)
}


@pytest.mark.parametrize("name", sorted(A_MODEL))
def test_what_takes_a_model_refuses_all_else_in_a_line(name: str) -> None:
    function = A_MODEL[name]
    plain = torch.nn.Sequential(torch.nn.Linear(1, 1))
    for wrong in (3, plain, moe_lens.HookedMoE):
        with pytest.raises(InputError, match=r"^model is [^\n]*; expected a HookedMoE, as HookedMoE\.from_[^\n]*$"):
            function(**{"model": wrong})


def test_the_law_walks_what_users_call() -> None:
    assert len(OFFERED) > 500
    for name in ("resampling.bootstrap", "interventions.sweep.sweep", "hooked_moe.HookedMoE.from_pretrained",
                 "lenses.lens.Lens.decode", "model.cache.moe_cache.MoECache.routing", "routing.LayerRouting.__init__",
                 "model.hooks.hook_table.HookTable.expert_hooks", "data.token_batches.tokenize"):  # fmt: skip
        assert f"moe_lens.{name}" in OFFERED
    assert list(wrong_for(Literal["a"] | None, "x")) == ["a_"]
    assert list(wrong_for(tuple[Positive, ...] | None, "x")) == ["one text", (True,), (1.5,), (0,)]
    assert list(wrong_for(str | Sequence[str], "x")) == []
    assert list(wrong_for(Mapping[str, Any], "x")) == ["one text"]
    assert list(wrong_for(str | Path | None, "x"))[:2] == ["", "a\0b"]
    with pytest.raises(AssertionError, match="n is <class 'int'>: no range"):
        list(wrong_for(int, "n"))
