"""Wrapping is a transaction: all of it, or the model as it was."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

_Contents = list[tuple[Any, Any]]


@contextmanager
def undone_on_error(model: nn.Module) -> Generator[None]:
    """Whatever is raised inside, Ctrl-C included, leaves every module of the model as it was, and its configs.

    Classes, attributes, forwards, hooks, modes, parameters and buffers by identity; what is in a tensor is not copied.
    """
    objects = [*model.modules(), *_configs(model)]
    before = [(each, type(each), dict(vars(each)), _contents(vars(each).values())) for each in objects]
    try:
        yield
    except BaseException:
        while True:
            try:
                _restore(before)
                break
            except KeyboardInterrupt:  # a second one: restoring can be begun again
                continue
        raise


@contextmanager
def modes_kept(model: nn.Module) -> Generator[None]:
    """Leave every module in training or in evaluation mode, as it was: TransformerLens sets all to that of the model.

    What wraps a module has its mode.
    """
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module in model.modules():
            inner: Any = getattr(module, "original_component", None)
            module.training = before.get(module if module in before else inner, module.training)


def _restore(before: list[tuple[Any, type, dict[str, Any], _Contents]]) -> None:
    for each, kind, attributes, contents in before:
        if type(each) is not kind:
            object.__setattr__(each, "__class__", kind)
        for container, content in contents:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        vars(each).clear()
        vars(each).update(attributes)


def _contents(values: Iterable[Any]) -> _Contents:
    """The containers among the attributes, `_modules` and `_parameters` for example, with a copy of what they hold."""
    return [(value, value.copy()) for value in values if isinstance(value, dict | list | set)]


def _configs(model: nn.Module) -> list[Any]:
    """Every config that a module holds, and every one inside of those."""
    found: dict[int, Any] = {}
    waiting = [value for module in model.modules() for value in vars(module).values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, PreTrainedConfig | GenerationConfig) and id(value) not in found:
            found[id(value)] = value
            waiting += vars(value).values()
    return list(found.values())
