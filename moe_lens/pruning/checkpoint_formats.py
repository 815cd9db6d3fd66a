"""How checkpoints name routers and experts, and what a family's config can say; anything else is refused."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_lens.errors import UnsupportedModelError
from moe_lens.model.loading.depth import PREDICTING
from moe_lens.model.loading.formats.view import packing_of
from moe_lens.model.loading.quantising import METHOD

_EXPERT = re.compile(
    r"(?P<layer>(?:.*\.)?layers\.(?P<n>\d+)\.(?:mlp|block_sparse_moe))\.experts\.(?P<expert>\d+)\.(?P<rest>.+)"
)
_PACKED = re.compile(r"(?:.*\.)?layers\.(?P<n>\d+)\.mlp\.experts\.(?:gate_up_proj|down_proj)(?:_bias|_blocks|_scales)?")
_ROUTER = re.compile(
    r"(?:.*\.)?layers\.(?P<n>\d+)\.(?:mlp|block_sparse_moe)\.(?:gate|router)\.(?:weight|bias|e_score_correction_bias)"
)


_NUMBERED = re.compile(r'"[^"]*\bexperts\\*\.\(?\d[^"]*"')
"""A name, or a pattern of names, of single experts."""
_LAYER = re.compile(r"(?P<layer>(?:model\.)?layers\.(?P<n>\d+))\.")
_MTP = re.compile(r"(?:model\.)?mtp\.")


@dataclass(frozen=True)
class ExpertTensor:
    """A stored tensor of one expert."""

    layer: int
    expert: int
    prefix: str
    """Of the layer's MLP."""
    rest: str
    """What follows the expert's number."""

    def named(self, expert: int) -> str:
        """The tensor of the same kind of another expert."""
        return f"{self.prefix}.experts.{expert}.{self.rest}"


def parse_expert(name: str) -> ExpertTensor | None:
    """The expert that a stored tensor belongs to; None for all other tensors."""
    found = _EXPERT.fullmatch(name)
    return ExpertTensor(int(found["n"]), int(found["expert"]), found["layer"], found["rest"]) if found else None


def parse_rows(name: str) -> int | None:
    """The layer of a stored tensor whose first axis counts experts: a router's, or packed ones; None for others."""
    found = _PACKED.fullmatch(name) or _ROUTER.fullmatch(name)
    return int(found["n"]) if found else None


def parse_router(name: str) -> int | None:
    """The layer whose router's rows a stored tensor is; None for all others."""
    found = _ROUTER.fullmatch(name) if name.endswith(".weight") else None
    return int(found["n"]) if found else None


@dataclass(frozen=True)
class Format:
    """What is particular to the checkpoints of a model type."""

    model_type: str
    normalizes: bool | None = None
    """Whether weights of the selected experts are rescaled to a fixed sum; None: config's `norm_topk_prob` says."""
    normalizes_one: bool = True
    """Whether the weight of a single one is, too, in a family that rescales."""


FORMATS = {
    entry.model_type: entry
    for entry in (
        Format("deepseek", normalizes_one=False),
        Format("deepseek_v2", normalizes=False),  # transformers' V2 never normalises, whatever the config
        Format("deepseek_v3"),
        Format("gpt_oss", normalizes=True),  # softmax over the selected logits
        Format("mixtral", normalizes=True),
        Format("olmoe"),
        Format("qwen2_moe"),
        Format("qwen3_moe"),
    )
}

_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
"""Names that configs have for the number of routed experts."""


_ACTIVE = ("experts_per_token",)
"""Further names that configs have for the number of experts a token uses: gpt-oss's says it twice."""


def prediction(names: Iterable[str], n_layers: int) -> dict[str, str]:
    """The stored tensors of layers that predict several tokens ahead, and what those layers are called.

    transformers does not load them: they stand behind the last of `n_layers` layers, or under `mtp`.
    """
    numbered = {name: found for name in names if (found := _LAYER.match(name))}
    ahead = {name: found["layer"] for name, found in numbered.items() if int(found["n"]) >= n_layers}
    return ahead | {name: "mtp" for name in names if _MTP.match(name)}


def format_of(model_type: str) -> Format:
    """The format of a model type.

    Raises:
        UnsupportedModelError: it is not in the table.
    """
    if model_type in FORMATS:
        return FORMATS[model_type]
    raise UnsupportedModelError(
        f"pruned checkpoints of model_type {model_type!r} cannot be written; supported: {', '.join(sorted(FORMATS))}. "
        "A plan's preview works on every family"
    )


def normalizes(config: Any, top_k: int) -> bool:
    """Whether a family rescales the weights of `top_k` selected experts to a fixed sum."""
    format = format_of(config.model_type)
    if top_k == 1 and not format.normalizes_one:
        return False
    return bool(getattr(config, "norm_topk_prob", False)) if format.normalizes is None else format.normalizes


def refuse_packing(raw: Mapping[str, Any]) -> None:
    """Refuse experts whose packing cannot be kept: what `quantize` packed, and names of single experts.

    Raises:
        UnsupportedModelError: names the scheme; or a name in `quantization_config`, as experts get other numbers.
    """
    said = packing_of(raw)
    if said is not None and said.get("quant_method") == METHOD:
        raise UnsupportedModelError(
            f"experts packed by quantize={said.get('scheme')!r} are not exported. The plan is for the checkpoint that "
            'they were loaded from, too: export("its name or folder", plan, folder) prunes that'
        )
    if found := _NUMBERED.search(json.dumps(said)):
        raise UnsupportedModelError(
            f"quantization_config names single experts ({found[0]}), and those that stay get other numbers. Load the "
            "model and export it: export(HookedMoE.from_pretrained(…), plan, folder) writes it unpacked"
        )


def smaller_config(raw: Mapping[str, Any], n_experts: int, top_k: int) -> dict[str, Any]:
    """A config.json for a model that has `n_experts` experts a layer and uses `top_k`."""
    counts = [name for name in _COUNTS if name in raw]
    if not counts:
        raise UnsupportedModelError(f"config.json says the number of experts under none of {', '.join(_COUNTS)}")
    active = ["num_experts_per_tok", *(name for name in _ACTIVE if name in raw)]
    predicting = [name for name in PREDICTING if name in raw]
    changed = {**raw, **dict.fromkeys(counts, n_experts), **dict.fromkeys(active, top_k)}
    changed |= dict.fromkeys(predicting, 0)  # the layers are left out: see `prediction`
    # The original repository's own code knows nothing of fewer experts, and is not copied.
    changed.pop("auto_map", None)
    return changed
