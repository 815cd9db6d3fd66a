"""`model.W_*`: parameters in TransformerLens's orientation, wherever they are kept."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor, nn

from moe_lens.model.experts.layer_parameters import LayerParameters
from moe_lens.model.experts.offloaded_experts import is_elsewhere, numbers_of
from moe_lens.model.experts.packed import Matrices, ReadOnly
from moe_lens.model.hooks.hook_table import HookTable


class ParameterViews(HookTable):
    """Views of parameters that are in memory, and read-only copies of those that are not."""

    @property
    def W_router(self) -> LayerParameters:
        """Router rows, `W_router[layer]` [n_experts, d_model]."""
        path = f"{self.family.router}.{self.family.router_weight}"
        rows = self.n_experts  # behind them are those of shared experts, in families that weigh them too
        return self._views("W_router", lambda at: _parameter(self._moe(at), path)[:rows])

    @property
    def W_gate(self) -> LayerParameters:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Activated branch of the experts, `W_gate[layer, expert]` [d_model, d_expert]."""
        return self._first("W_gate", 0)

    @property
    def W_in(self) -> LayerParameters:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Linear branch of the experts, `W_in[layer, expert]` [d_model, d_expert]."""
        return self._first("W_in", 1)

    @property
    def W_out(self) -> LayerParameters:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Output matrix of the experts, `W_out[layer, expert]` [d_expert, d_model]."""
        return self._views("W_out", lambda at: self._experts(at).second()[0])

    def _first(self, name: str, branch: int) -> LayerParameters:
        return self._views(name, lambda at: self._experts(at).branch(branch))

    def _views(self, name: str, view: Callable[[int], Tensor | Matrices]) -> LayerParameters:
        def of(layer: int) -> Tensor | Matrices:
            self._check_places()
            found = view(layer)
            return _own(found, self._moe(layer)) if isinstance(found, Tensor) else found

        return LayerParameters(name, {layer: partial(of, layer) for layer in self.moe_layers})

    @property
    def W_U(self) -> Tensor:
        """The unembedding, [d_model, d_vocab]."""
        self._check_places()
        with _at_hand(self.unembed) as away:
            found = super().W_U
        return found.as_subclass(ReadOnly) if away else _own(found, self.unembed)

    @property
    def W_E(self) -> Tensor:
        """The embedding, [d_vocab, d_model]."""
        self._check_places()
        with _at_hand(self.embed) as away:
            found = super().W_E
        return found.as_subclass(ReadOnly) if away else _own(found, self.embed)

    def _stack_block_params(self, attr_path: str, reshape_fn: Any = None) -> Tensor:
        """TransformerLens's, for W_Q and its like: a copy of what all layers have."""
        self._check_places()
        blocks: Any = self.blocks
        with _at_hand(*(getattr(block, attr_path.partition(".")[0], None) for block in blocks)):
            return super()._stack_block_params(attr_path, reshape_fn)


def _own(found: Tensor, module: Any) -> Tensor:
    """A view of a module's parameters; what is computed of them, as by torch's `prune`, refuses to be written to."""
    at = found.untyped_storage().data_ptr()
    own = found.is_meta or any(at == part.untyped_storage().data_ptr() for part in module.parameters())
    return found if own else found.as_subclass(ReadOnly)


def _parameter(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return numbers_of(module.get_submodule(owner), name)


class _at_hand(ExitStack):  # noqa: N801  # used as a function is
    """While parameters of some modules that are kept elsewhere are in memory; what is entered are those modules."""

    def __init__(self, *modules: Any):
        super().__init__()
        inside = (part for module in modules if isinstance(module, nn.Module) for part in module.modules())
        self.away = [m for m in inside if any(is_elsewhere(m, name) for name, _ in m.named_parameters(recurse=False))]

    def __enter__(self) -> Any:
        for module in self.away:
            self.enter_context(align_module_device(module))
        return self.away
