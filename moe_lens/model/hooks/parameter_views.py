"""`model.W_*`: parameters in TransformerLens's orientation, wherever they are kept."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from moe_lens.checked import Natural
from moe_lens.errors import AbsentParameterError, UnsupportedModelError
from moe_lens.model.experts.layer_parameters import LayerParameters
from moe_lens.model.experts.offloaded_experts import at_hand, numbers_of
from moe_lens.model.experts.packed import Matrices, ReadOnly
from moe_lens.model.hooks.components import LayerPart
from moe_lens.model.hooks.hook_table import HookTable
from moe_lens.model.hooks.named_parameters import absent

_SWITCHED_ON = {
    "use_attn_result": "hook_result",
    "use_split_qkv_input": "hook_q_input",
    "use_attn_in": "hook_attn_in",
    "use_hook_mlp_in": "hook_mlp_in",
}


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
        return _own(super().W_U, self.unembed)

    @property
    def W_E(self) -> Tensor:
        """The embedding, [d_vocab, d_model]."""
        self._check_places()
        return _own(super().W_E, self.embed)

    def get_params(self) -> dict[str, Tensor]:
        """TransformerLens's: parameters outside experts, by its names; read-only copies where some are not in memory.

        TransformerLens would leave out those that are not.
        """
        self._check_places()
        blocks: Any = self.blocks
        parts = [
            part
            for at, block in enumerate(blocks)
            for name, part in block._modules.items()
            if name != "mlp" or at not in self.moe_layers
        ]
        with at_hand(self.embed, self.unembed, self.ln_final, *parts) as away:
            found = super().get_params()
        return {name: value.as_subclass(ReadOnly) for name, value in found.items()} if away else found

    def _stack_block_params(self, attr_path: str, reshape_fn: Any = None) -> Tensor:
        """TransformerLens's, for W_Q and its like: a copy of what all layers have."""
        self._check_places()
        blocks: Any = self.blocks
        part, _, name = attr_path.partition(".")
        parts = [found for block in blocks if (found := block._modules.get(part)) is not None]
        if not parts:
            raise AbsentParameterError(f"{name}: no layer of this model has {part} hooks")
        try:
            return super()._stack_block_params(attr_path, reshape_fn)
        except (AttributeError, ValueError) as error:  # a bias that is not there; layers of several sizes
            if isinstance(error, AbsentParameterError):
                raise
            raise absent(name, parts[0].original_component) from None

    def accumulated_bias(self, layer: Natural, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        """As TransformerLens's: the output biases of attention that the stream before a layer has in it.

        Args:
            layer: The layer.
            mlp_input: Whether that layer's own attention is counted.
            include_mlp_biases: Whether those of dense MLPs are.

        Raises:
            AbsentParameterError: attention is shown whole, and its output has a bias.
        """
        blocks: Any = self.blocks
        for block in blocks:
            for part in block.children():
                inner = part.original_component if isinstance(part, LayerPart) else None
                if getattr(getattr(inner, "o_proj", None), "bias", None) is not None:
                    raise absent("accumulated_bias", inner)
        return self._accumulated_bias(layer, mlp_input, include_mlp_biases)

    def _accumulated_bias(self, layer: int, mlp_input: bool, include_mlp_biases: bool) -> Tensor:
        """The same of those parts of layers that TransformerLens takes apart."""
        blocks: Any = self.blocks
        dense = [block for at, block in enumerate(blocks) if include_mlp_biases and at not in self.moe_layers]
        parts = [(block, "attn") for block in blocks] + [(block, "mlp") for block in dense]
        with at_hand(*(block._modules.get(part) for block, part in parts)):
            return super().accumulated_bias(layer, mlp_input, include_mlp_biases)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """As TransformerLens's.

        Args:
            use_hook_mlp_in: Whether `hook_mlp_in` fires.

        Raises:
            UnsupportedModelError: the family has no such hook.
        """
        if use_hook_mlp_in:
            self._check_has("use_hook_mlp_in", "mlp.hook_in shows what MLPs read, ln2.hook_in what norms do")
        super().set_use_hook_mlp_in(use_hook_mlp_in)

    def _validate_attention_fork_supported(self, flag_name: str) -> None:
        self._check_has(flag_name, "model.hook_dict lists those that it has")
        super()._validate_attention_fork_supported(flag_name)

    def _check_has(self, flag: str, instead: str) -> None:
        """Nothing, where the model has hooks that one of TransformerLens's flags switches on."""
        hook = _SWITCHED_ON[flag]
        if not any(name.endswith(f".{hook}") for name in self._all_hooks):
            raise UnsupportedModelError(f"{flag}: layers of {self.family.model_type} have no {hook}; {instead}")


def _own(found: Tensor, module: Any) -> Tensor:
    """A view of a module's parameters; what is computed of them, as by torch's `prune`, refuses to be written to."""
    at = found.untyped_storage().data_ptr()
    own = found.is_meta or any(at == part.untyped_storage().data_ptr() for part in module.parameters())
    return found if own else found.as_subclass(ReadOnly)


def _parameter(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    found = numbers_of(module.get_submodule(owner), name)
    if found.element_size() == 1:
        kind = type(module.get_submodule(owner)).__name__
        raise UnsupportedModelError(
            f"W_router: a {kind} has its numbers packed; load the folder with HookedMoE.from_pretrained"
        )
    return found
