"""What transformers hangs on modules to record router logits and the like, in a form that can be pickled."""

from typing import Any

from torch import nn

from moe_lens.model.hf_compat import install_output_capuring_hook, maybe_install_capturing_hooks

_WORDS = ("key", "index", "capture_initial_hidden_state")


class OutputCapture:
    """One of transformers' recording hooks; a copy is made anew from what it was made of."""

    def __init__(self, hook: Any):
        self.hook = hook

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Record, where somebody asked for it."""
        return self.hook(module, args, output)

    def __reduce__(self) -> Any:
        return _made_of, (_words(self.hook),)


def capture_once(model: Any) -> None:
    """Install the hooks before a model is wrapped: through the wrapper every module would be found twice.

    A model that ran has some of them. Transformers installs them a second time in a part of what it installs them in.
    """
    there = {module: set(_recorders(module)) for module in model.modules()}
    maybe_install_capturing_hooks(model)
    for module, before in there.items():
        known = [_words(module._forward_hooks[number]) for number in before]
        for number in _recorders(module):
            if number not in before and _words(module._forward_hooks[number]) in known:
                del module._forward_hooks[number]
            else:
                module._forward_hooks[number] = OutputCapture(module._forward_hooks[number])


def _recorders(module: nn.Module) -> list[int]:
    """The numbers of transformers' recording hooks of a module."""
    name, hooks = install_output_capuring_hook.__name__, module._forward_hooks
    return [number for number, hook in hooks.items() if getattr(hook, "__qualname__", "").startswith(name)]


def _words(hook: Any) -> dict[str, Any]:
    """What a recording hook was made of."""
    free = zip(hook.__code__.co_freevars, hook.__closure__, strict=True)
    return {name: cell.cell_contents for name, cell in free if name in _WORDS}


def _made_of(words: dict[str, Any]) -> OutputCapture:
    holder = nn.Module()
    install_output_capuring_hook(holder, **words)
    (hook,) = holder._forward_hooks.values()
    return OutputCapture(hook)
