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
        free = zip(self.hook.__code__.co_freevars, self.hook.__closure__, strict=True)
        return _made_of, ({name: cell.cell_contents for name, cell in free if name in _WORDS},)


def capture_once(model: Any) -> None:
    """Install the hooks before a model is wrapped: through the wrapper every module would be found twice."""
    maybe_install_capturing_hooks(model)
    for module in model.modules():
        for number, hook in module._forward_hooks.items():
            if getattr(hook, "__qualname__", "").startswith(install_output_capuring_hook.__name__):
                module._forward_hooks[number] = OutputCapture(hook)


def _made_of(words: dict[str, Any]) -> OutputCapture:
    holder = nn.Module()
    install_output_capuring_hook(holder, **words)
    (hook,) = holder._forward_hooks.values()
    return OutputCapture(hook)
