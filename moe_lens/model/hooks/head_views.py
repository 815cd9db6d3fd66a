"""TransformerLens's views of attention by heads, as classes that pickle finds: its own are local to a function."""

from typing import Any

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from moe_lens.model.tl_compat import BaseTensorConversion


class ReshapeForAttentionHeads(BaseTensorConversion):
    """[batch, pos, d_model] shown as [batch, pos, head, d_head]."""

    splits_attention_heads = True
    """Read by TransformerLens: the position axis is two from the end."""
    n_heads: int
    d_head: int

    def handle_conversion(self, input_value: Tensor, *_: Any) -> Tensor:
        """To heads."""
        if input_value.dim() == 3 and input_value.shape[-1] == self.n_heads * self.d_head:
            return input_value.view(*input_value.shape[:2], self.n_heads, self.d_head)
        return input_value

    def revert(self, input_value: Tensor, *_: Any) -> Tensor:
        """From heads."""
        if input_value.dim() == 4 and input_value.shape[-2:] == (self.n_heads, self.d_head):
            return input_value.flatten(2)
        return input_value


class TransposeRotaryHeads(BaseTensorConversion):
    """[batch, head, pos, d_head] shown as [batch, pos, head, d_head]."""

    def handle_conversion(self, input_value: Tensor, *_: Any) -> Tensor:
        """Swap the axes of heads and positions."""
        return input_value.transpose(1, 2) if input_value.dim() == 4 else input_value

    def revert(self, input_value: Tensor, *_: Any) -> Tensor:
        """Swap them back."""
        return self.handle_conversion(input_value)


_AFTER_HEADS = 2
"""Where positions are in [batch, head, pos, d_head]."""
_KINDS = {kind.__name__: kind for kind in (ReshapeForAttentionHeads, TransposeRotaryHeads)}


def name_conversion(point: HookPoint) -> None:
    """Give a hook point's conversion the class here that does what its local one does."""
    conversion = point.hook_conversion
    if conversion is not None and "<locals>" in type(conversion).__qualname__:
        conversion.__class__ = _KINDS[type(conversion).__name__]


def view_as_others(attention: Any) -> None:
    """Show heads of DeepSeek-V2's and V3's attention as those of other families: [batch, pos, head, width].

    TransformerLens shows queries, keys and values there with heads before positions, which its own code takes for
    positions; and divides what the output projection reads by `cfg.d_head`, which is the width of a key's rotary part:
    `hook_z` then has twice the heads, each half as wide.
    """
    module: Any = attention.original_component
    width, heads = getattr(module, "v_head_dim", 0), getattr(module, "num_heads", 0)
    view = getattr(getattr(getattr(attention, "o", None), "hook_in", None), "hook_conversion", None)
    if isinstance(view, ReshapeForAttentionHeads) and width and view.n_heads * view.d_head == width * heads:
        view.n_heads, view.d_head = heads, width
        attention.__dict__["_v_head_dim"] = width  # TransformerLens learns it in the first pass; W_O is divided by it
    for point in (getattr(attention, f"hook_{name}", None) for name in "qkv"):
        if isinstance(point, HookPoint) and point.pos_dim == _AFTER_HEADS:
            point.hook_conversion, point.pos_dim = TransposeRotaryHeads(), None
