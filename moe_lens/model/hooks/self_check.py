"""Check at load, on a few tokens, that the parts of a model sum to the whole.

A family may look like the contract and differ in one place: this finds it before a user's result does.
"""

import math
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_lens import names
from moe_lens.errors import SelfCheckError, UnsupportedModelError, one_line
from moe_lens.model.hooks.bypassed import refuse_replaced, refuse_torch_hooks
from moe_lens.model.hooks.components import Attention
from moe_lens.model.hooks.transaction import modes_kept

TOKENS = 8
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest deviation, relative to the largest value of the whole."""
RECONSTRUCTED = 1e-2
"""The same for attention that is computed again: products may be rounded to TF32, and mistakes are larger."""


def self_check(model: Any) -> dict[str, float]:
    """Check properties 1 and 2 of the hook table on random tokens; the largest relative deviation of each.

    Raises:
        SelfCheckError: names the property, the layer, and the deviation; or the model cannot be run at all.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (1, TOKENS), generator=generator).to(model.cfg.device)
    of_block = {names.RESID_PRE, names.ATTN_OUT, names.RESID_MID, names.BLOCK_MLP_OUT, names.RESID_POST}
    of_mlp = {names.EXPERT_WEIGHTED, names.ROUTED_OUT, names.SHARED_OUT, names.MLP_OUT}
    wanted = {names.block(name, layer) for name in of_block for layer in range(model.cfg.n_layers)}
    wanted |= {names.mlp(name, layer) for name in of_mlp for layer in model.moe_layers}
    with modes_kept(model), torch.no_grad():
        model.eval()  # what dropout and jitter change is not for this to find
        with reconstructing(model):
            plain = _run(model, tokens)
        logits, cache = model.run_with_cache(tokens, names_filter=sorted(wanted & model.hook_dict.keys()))
    if plain.isnan().any():
        flow = (names.RESID_PRE, names.ATTN_OUT, names.RESID_MID, names.BLOCK_MLP_OUT, names.RESID_POST)
        points = [names.block(name, layer) for layer in range(model.cfg.n_layers) for name in flow]
        bad = next((name for name in points if name in cache and not cache[name].isfinite().all()), None)
        where = f"at {bad} (layer {bad.split('.')[1]})" if bad else "after the last layer"
        raise SelfCheckError(
            f"the logits hold NaN; the first values that are not finite are {where}. A parameter may be broken, or the "
            "dtype too narrow; check=False loads it nevertheless"
        )
    if not torch.equal(plain, logits):
        raise SelfCheckError(
            f"observing changed the logits by {(plain - logits).abs().max():.2e}; expected identical bits. "
            "Please report the model; check=False loads it nevertheless"
        )
    deviations = {"routed_out": 0.0, "mlp_out": 0.0, "resid_mid": 0.0, "resid_post": 0.0}
    for layer in range(model.cfg.n_layers):
        laws = []
        at = {name: cache[full] for name in of_block if (full := names.block(name, layer)) in cache}
        mid, post = at.get(names.RESID_MID), at.get(names.RESID_POST)
        added = [at[n] for n in (names.ATTN_OUT, names.BLOCK_MLP_OUT) if n in at]
        if mid is not None and post is not None and names.BLOCK_MLP_OUT in at:
            laws.append(("resid_post", mid + at[names.BLOCK_MLP_OUT], post, "resid_mid + mlp_out = resid_post"))
        elif mid is None and post is not None and added:
            laws.append(("resid_post", sum(added, at[names.RESID_PRE]), post, "resid_pre + parts = resid_post"))
        if mid is not None and names.ATTN_OUT in at:
            laws.append(
                ("resid_mid", at[names.RESID_PRE] + at[names.ATTN_OUT], mid, "resid_pre + attn_out = resid_mid")
            )
        if layer in model.moe_layers:
            routed, mlp_out = (cache[names.mlp(name, layer)] for name in (names.ROUTED_OUT, names.MLP_OUT))
            weighted = cache[names.mlp(names.EXPERT_WEIGHTED, layer)]
            ranks = weighted.sum(2)
            if weighted.shape[2] != model.top_k:
                raise SelfCheckError(
                    f"layer {layer} gives a token {weighted.shape[2]} experts, and the config says {model.top_k}: the "
                    f"family does not read that. Write {weighted.shape[2]} into the config; check=False loads it "
                    "nevertheless, with a wrong top_k"
                )
            whole = model.to_model_width(layer, routed)
            whole = whole + cache[names.mlp(names.SHARED_OUT, layer)] if model.has_shared(layer) else whole
            laws += [
                ("routed_out", ranks, routed, "Σ expert_weighted = routed_out"),
                ("mlp_out", whole, mlp_out, "routed_out + shared_out = mlp_out"),
            ]
        for name, parts, total, law in laws:
            scale = max(total.abs().max().item(), torch.finfo(total.dtype).tiny)
            deviation = (parts - total).abs().max().item() / scale
            deviations[name] = max(deviations[name], deviation)
            if not deviation <= TOLERANCE[total.dtype]:
                raise SelfCheckError(
                    f"layer {layer}: {law} fails by {deviation:.2e} of the largest value; expected at most "
                    f"{TOLERANCE[total.dtype]:.0e} in {total.dtype}. Please report the model; "
                    "check=False loads it nevertheless"
                )
    return deviations


@contextmanager
def reconstructing(model: Any) -> Generator[None]:
    """In a run in here that nobody hears, attention is also reconstructed, and one that comes out otherwise is marked.

    Hooks inside attention are then refused: they would change the logits by being there.
    """

    def compare(attention: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        own = out[0] if isinstance(out, tuple) else out
        try:
            refuse_replaced(attention.original_component)
            refuse_torch_hooks(attention.original_component)
            again = attention.reconstructed(*args, past=None, **kwargs)
        except UnsupportedModelError:  # what its owner has changed is not looked into
            return
        except RuntimeError as error:  # of shapes that do not fit, or TransformerLens refuses the config
            if _is_of_memory(error):
                raise
            deviation = math.inf
        else:
            again = again[0] if isinstance(again, tuple) else again
            scale = max(own.abs().max().item(), torch.finfo(own.dtype).tiny)
            deviation = (again - own).abs().max().item() / scale
        if not deviation <= max(TOLERANCE[own.dtype], RECONSTRUCTED):
            attention.misread = deviation

    with ExitStack() as stack:
        for part in model.modules():
            if isinstance(part, Attention):
                stack.callback(nn.Module.register_forward_hook(part, compare, with_kwargs=True).remove)
        yield


def _run(model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
    try:
        return model(tokens)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if _is_of_memory(error):
            raise
        raise SelfCheckError(
            f"the model cannot be run: {type(error).__name__}: {one_line(error)}. Do the sizes in its "
            "config fit one another? check=False loads it nevertheless"
        ) from error


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
