"""Keys and values of DeepSeek-V2 and V3 in a key-value cache: as latents, with hooks or without.

transformers stores what `kv_b_proj` reads and the rotated part that all heads share. TransformerLens's attention, which
runs while somebody listens inside, asks the cache for whole keys and values: it gets them from what is stored.
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from moe_lens.errors import HookError

_EDITED = "_moe_lens_edited_keys"


class LatentCache:
    """A cache as TransformerLens's attention sees it, in one pass through one layer."""

    def __init__(self, cache: Any, attention: Any, listens: bool):
        self.cache, self.attention, self.listens = cache, attention, listens
        self.latent: Tensor | None = None
        self.rotated: Tensor | None = None

    def update(
        self,
        keys: Float[Tensor, "batch head new d_key"],
        values: Float[Tensor, "batch head new d_value"],
        layer: int,
        *_: Any,
    ) -> tuple[Float[Tensor, "batch head pos d_key"], Float[Tensor, "batch head pos d_value"]]:
        """Store the latents of new tokens; keys and values of all of them, as hooks have left the new ones."""
        assert self.latent is not None and self.rotated is not None
        latent = self.latent[:, None]
        past, new = int(self.cache.get_seq_length(layer)), latent.shape[-2]
        all_keys, all_values = self._expanded(*self.cache.update(latent, self.rotated, layer))
        if not self.listens:
            return all_keys, all_values
        if not all(map(torch.equal, self._expanded(latent, self.rotated), (keys, values))):
            self.cache.__dict__.setdefault(_EDITED, set()).add(layer)
        return _with(all_keys, keys, past, new), _with(all_values, values, past, new)

    def _expanded(
        self, latent: Float[Tensor, "batch 1 pos rank"], rotated: Float[Tensor, "batch 1 pos d_rotated"]
    ) -> tuple[Float[Tensor, "batch head pos d_key"], Float[Tensor, "batch head pos d_value"]]:
        """As transformers' `expand_kv`, past the hooks on `kv_b_proj`: they see new tokens alone."""
        attention = self.attention
        widths = [attention.qk_nope_head_dim, attention.v_head_dim]
        both = attention.kv_b_proj.original_component(latent)[:, 0].unflatten(-1, (-1, sum(widths))).transpose(1, 2)
        keys, values = both.split(widths, -1)
        return torch.cat([keys, rotated.expand(-1, keys.shape[1], -1, -1)], -1), values


def _with(whole: Tensor, new: Tensor, past: int, count: int) -> Tensor:
    """Keys or values of all tokens, those after the first `past` replaced."""
    return torch.cat([whole[..., :past, :], new, whole[..., past + count :, :]], -2)


def check_keys_are_stored(cache: Any, layer: int) -> None:
    """Refuse to go on with what a cache holds of a layer where hooks have put other keys or values in its place.

    Raises:
        HookError: a hook has edited keys or values that a run before this one computed.
    """
    if layer in getattr(cache, _EDITED, ()):
        raise HookError(
            f"a hook has edited keys or values of layer {layer} (attn.hook_k, attn.hook_v, attn.kv_b_proj), and this "
            "key-value cache holds the latents before them: what follows would read them unedited. Edit "
            "attn.hook_kv_latent or attn.hook_rot_k, which are what is stored, or run without a cache "
            "(use_cache=False; in generate, use_past_kv_cache=False)"
        )


def check_all_stored(cache: Any) -> None:
    """Refuse to go on with a cache before it is changed; see `check_keys_are_stored`.

    Args:
        cache: The key-value cache; None if there is none.

    Raises:
        HookError: A hook has edited keys or values of some layer.
    """
    for layer in sorted(getattr(cache, _EDITED, ())):
        check_keys_are_stored(cache, layer)


@contextmanager
def latents_of(attention: Any, rotated: HookPoint, cache: Any, listens: bool) -> Generator[LatentCache]:
    """A view of `cache` that learns what one pass through the layer stores.

    Args:
        attention: transformers' module.
        rotated: where the rotated part of the keys passes.
        cache: transformers' key-value cache.
        listens: whether hooks may have something to do with new keys or values.
    """
    view = LatentCache(cache, attention, listens)

    def note_latent(_: Any, inputs: tuple[Tensor, ...]) -> None:
        view.latent = inputs[0]

    def note_rotated(_: Any, __: Any, output: Tensor) -> None:
        view.rotated = output

    with ExitStack() as stack:
        stack.callback(attention.kv_b_proj.register_forward_pre_hook(note_latent).remove)
        stack.callback(rotated.register_forward_hook(note_rotated).remove)
        yield view
