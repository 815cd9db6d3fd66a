"""A tiny model with a real tokenizer, and texts of several sources, for tests of studies."""

import json
import random
from pathlib import Path
from typing import Any

import torch

import moe_lens
from moe_lens import HookedMoE
from moe_lens.data import Domain, Passage
from moe_lens.model.loading.tokenizer import load_tokenizer
from tests.families import build

TOKENIZER = Path(moe_lens.__file__).parent / "assets" / "tiny-deepseekmoe"
TEXT = "the old man looked at sea and said that one must not go there again before winter comes"
WORDS = TEXT.split()


def tiny_hf(**changes: Any) -> Any:
    return build("deepseek", vocab_size=4096, bos_token_id=0, eos_token_id=1, pad_token_id=1, **changes)


def tiny_model(**changes: Any) -> HookedMoE:
    return HookedMoE.from_hf(tiny_hf(**changes), load_tokenizer(str(TOKENIZER))).requires_grad_(False)


def save_checkpoint(folder: Path) -> None:
    tiny_hf().save_pretrained(folder)
    load_tokenizer(str(TOKENIZER)).save_pretrained(folder)


def passages(n: int = 24, sources: int = 12, seed: int = 0) -> list[dict[str, str]]:
    """Texts of 4 to 40 words; a source has several of them."""
    draw = random.Random(seed)
    return [
        {"text": " ".join(draw.choices(WORDS, k=draw.randint(4, 40))), "source": f"s{seed}-{i % sources}"}
        for i in range(n)
    ]


def domain(name: str, **kwargs: Any) -> Domain:
    rows = passages(**kwargs)
    return Domain(name, tuple(Passage(row["text"], row["source"], f"{name}:{i}") for i, row in enumerate(rows, 1)))


def write_jsonl(path: Path, **kwargs: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in passages(**kwargs)), encoding="utf-8")
    return path


def assert_same(one: Any, other: Any, tolerance: float = 0.0) -> None:
    """Two study results: counts exactly equal, floats within a tolerance, everything else equal."""
    assert one.results.keys() == other.results.keys()
    for name, results in one.results.items():
        assert results.keys() == other.results[name].keys()
        for kind, result in results.items():
            for field, value in vars(result).items():
                theirs = getattr(other.results[name][kind], field)
                if not isinstance(value, torch.Tensor):
                    assert value == theirs, (name, kind, field)
                elif value.dtype.is_floating_point:
                    # Relative to the greatest value: sums over tokens are compared.
                    scale = max(1.0, float(value.nan_to_num().abs().max())) if value.numel() else 1.0
                    assert torch.allclose(value, theirs, atol=tolerance * scale, rtol=0, equal_nan=True), (kind, field)
                else:
                    assert torch.equal(value, theirs), (name, kind, field)
