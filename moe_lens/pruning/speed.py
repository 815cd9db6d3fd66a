"""Size and speed of checkpoints in plain transformers."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from moe_lens.model.hf_compat import cache_of, cache_word
from moe_lens.model.loading.dispatch import input_device

PROMPT, NEW, ROUNDS = 128, 32, 7
"""Tokens of a prompt, tokens decoded after it, and repetitions of which the median counts."""
BATCHES = (1, 8)
SPEED = ("model", "phase", "batch", "tokens_per_second", "ratio")
"""Columns of what is measured."""


@torch.no_grad()
def speed(models: Mapping[str, Any], *, watch: Callable[[], None] = lambda: None) -> pd.DataFrame:
    """Time plain transformers models in turn, round after round, so that a busy machine is busy for all of them.

    Args:
        models: Loaded models by name; the first is what others are compared with.
        watch: Called after every round.

    Returns:
        One row per model, phase and batch: tokens_per_second (median), ratio (to the first model; median over rounds of
        the ratio in each). "prefill" reads prompts of `PROMPT` tokens; "decode" adds `NEW` tokens, one at a time.
    """
    seconds: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(ROUNDS + 1):  # the first round warms up
        for batch in BATCHES:
            for name, model in models.items():
                for phase, took in _once(model, batch).items():
                    seconds.setdefault((phase, name, batch), []).append(took)
        watch()
    rows = []
    first = next(iter(models))
    for (phase, name, batch), all_ in seconds.items():
        took, reference = all_[1:], seconds[phase, first, batch][1:]
        tokens = batch * (PROMPT if phase == "prefill" else NEW)
        ratio = statistics.median(there / here for there, here in zip(reference, took, strict=True))
        rows.append((name, phase, batch, tokens / statistics.median(took), ratio))
    return pd.DataFrame(rows, columns=[*SPEED])


def _once(model: Any, batch: int) -> dict[str, float]:
    device = input_device(model)
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (batch, PROMPT), generator=generator).to(device)
    began = _now(device)
    out = model(tokens, use_cache=True)
    read = _now(device)
    word, cache, following = cache_word(type(model).forward), cache_of(out), out.logits[:, -1:].argmax(-1)
    for _ in range(NEW):
        out = model(following, **{word: cache}, use_cache=True)
        following = out.logits[:, -1:].argmax(-1)
    return {"prefill": read - began, "decode": _now(device) - read}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(model: Any) -> int:
    """Bytes of a model's parameters and buffers."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors)
