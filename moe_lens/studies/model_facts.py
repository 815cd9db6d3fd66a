"""What a study notes of its model."""

import hashlib
import json
from typing import Any

from moe_lens.model.hooks.edits import edits
from moe_lens.model.loading.dispatch import places
from moe_lens.model.loading.parameters_digest import parameters_digest
from moe_lens.model.loading.quantising import packed_in


def model_facts(model: Any, name: str, *, saved: bool = True) -> dict[str, Any]:
    """Name, sizes and digest of parameters of a `HookedMoE`, and what opens the texts that it reads, as plain values.

    Under hooks, also which these are: what was saved without them, or under others, is then of another model.

    Args:
        model: The model.
        name: What it was loaded as.
        saved: Whether what comes of it is kept in a folder, where other work must be told from it.

    Raises:
        InputError: A hook cannot be told from others, and must be.
    """
    hf, tokenizer = model.original_model, model.tokenizer
    hooks = edits(model, saved)
    return {
        **({"hooks": hooks} if hooks else {}),
        "name": name,
        "type": hf.config.model_type,
        "fingerprint": parameters_digest(hf),
        "dtype": str(next(hf.parameters()).dtype).removeprefix("torch."),
        "device": model_device(hf),
        "quantised": next((part.scheme for _, part in packed_in(hf)), "no"),
        "parameters": sum(part.numel() for part in (*hf.parameters(), *(part for _, part in packed_in(hf)))),
        "layers": int(model.cfg.n_layers),
        "moe_layers": list(model.moe_layers),
        "experts": int(model.n_experts),
        "top_k": int(model.top_k),
        "shared_experts": int(model.n_shared_experts),
        "d_model": int(model.cfg.d_model),
        "vocabulary": int(model.cfg.d_vocab),
        "tokenizer": tokenizer_digest(tokenizer),
        "texts_open_with": [] if tokenizer is None else tokenizer.convert_ids_to_tokens(model.own_ids("")[0]),
    }


def tokenizer_digest(tokenizer: Any) -> str | None:
    """A hash of how a tokenizer of transformers cuts texts, whatever it was last asked to pad; None without one."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # in Python, or of sentencepiece
        of = {"kind": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        of = {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]


def model_device(hf: Any) -> str:
    """The kind of device that computes: "cpu" or "cuda". Numbers are not the same on another to the last bit."""
    place = next((at for at in places(hf) if at not in ("cpu", "disk")), "cpu")
    return "cuda" if isinstance(place, int) else place
