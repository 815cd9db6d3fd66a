"""A digest of a whole model: what is kept of work on it is then of this model and no other."""

import hashlib
import json
from typing import Any

from moe_lens.model.loading.load_streamed import checksum_of
from moe_lens.model.loading.quantising import packed_in


def parameters_digest(hf: Any) -> str:
    """A hash of a transformers model's config and of all numbers that it is saved with: one changed number shows.

    Those are parameters, and buffers such as DeepSeek-V3's selection bias. Where they are kept makes no difference.
    What is read from a checkpoint in every pass is read once for it.
    """
    config = {key: value for key, value in hf.config.to_dict().items() if key not in _VOLATILE and key[0] != "_"}
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    numbers = dict(hf.named_parameters())
    numbers |= {f"{name}.{of}": bits for name, part in packed_in(hf) for of, bits in part.named_buffers()}
    for of, module in hf.named_modules():
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        numbers |= {f"{of}.{name}": module._buffers[name] for name in kept if module._buffers[name] is not None}
    for name, parameter in sorted(numbers.items()):
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        found.update(checksum_of(hf, name, parameter))
    return found.hexdigest()[:16]


_VOLATILE = {"transformers_version", "torch_dtype", "dtype", "architectures"}
