"""`model.W_*`: parameters in TransformerLens's orientation, wherever they are kept."""

from contextlib import ExitStack
from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor, nn

from moe_lens.model.experts.layer_parameters import LayerParameters
from moe_lens.model.experts.offloaded_experts import is_elsewhere, numbers_of
from moe_lens.model.experts.packed import ReadOnly
from moe_lens.model.hooks.hook_table import HookTable


class ParameterViews(HookTable):
    """Views of parameters that are in memory, and read-only copies of those that are not."""

    @property
    def W_router(self) -> LayerParameters:
        """Router rows, `W_router[layer]` [n_experts, d_model]."""
        path = f"{self.family.router}.{self.family.router_weight}"
        rows = self.n_experts  # behind them are those of shared experts, in families that weigh them too
        return LayerParameters(
            "W_router", {at: lambda at=at: _parameter(self._moe(at), path)[:rows] for at in self.moe_layers}
        )

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
        return LayerParameters("W_out", {at: lambda at=at: self._experts(at).second()[0] for at in self.moe_layers})

    def _first(self, name: str, branch: int) -> LayerParameters:
        return LayerParameters(name, {at: lambda at=at: self._experts(at).branch(branch) for at in self.moe_layers})

    @property
    def W_U(self) -> Tensor:
        """The unembedding, [d_model, d_vocab]."""
        with _at_hand(self.unembed) as away:
            found = super().W_U
        return found.as_subclass(ReadOnly) if away else found

    @property
    def W_E(self) -> Tensor:
        """The embedding, [d_vocab, d_model]."""
        with _at_hand(self.embed) as away:
            found = super().W_E
        return found.as_subclass(ReadOnly) if away else found

    def _stack_block_params(self, attr_path: str, reshape_fn: Any = None) -> Tensor:
        """TransformerLens's, for W_Q and its like: a copy of what all layers have."""
        blocks: Any = self.blocks
        with _at_hand(*(getattr(block, attr_path.partition(".")[0], None) for block in blocks)):
            return super()._stack_block_params(attr_path, reshape_fn)


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
