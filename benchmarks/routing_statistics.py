"""Tokens per second of routing statistics against the plain forward pass over the same batches, and their memory.

python -m benchmarks.routing_statistics [--rounds 9] [--threads 2] [--model tiny-deepseekmoe]

Speed: the model that `benchmarks/forward.py` describes (random, 70 M parameters), or a named one, reads batches of
4 × 256 tokens: plain transformers at its fastest, HookedMoE without hooks, and with `RoutingStats` and `PairStats`
updated, in turn in one process, round after round. The ratio of tokens per second is that of each round's pair; the
median is given, and that of processor time, which other work on the machine disturbs less. Memory: the process's peak,
and the size of the state, as synthetic routing of 2 layers, 16 experts and top-4 is counted from 10⁵ to 10⁷ tokens.
"""

import argparse
import copy
import resource
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.forward import SHAPE
from moe_lens import HookedMoE
from moe_lens.model.deepseek import DeepseekConfig, DeepseekForCausalLM
from moe_lens.routing import Routing
from moe_lens.stats import Accumulator, PairStats, RoutedBatch, RoutingStats, VocabularyStats, observe


def speed(model: HookedMoE, plain: Any, tokens: torch.Tensor, rounds: int) -> None:
    """Print the median time of each variant and its tokens per second beside the plain forward's."""
    batch: Any = SimpleNamespace(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        counted=torch.ones_like(tokens, dtype=torch.bool),
        sources=tuple(f"s{i}" for i in range(len(tokens))),
    )
    size = model.moe_layers, model.n_experts, model.top_k
    routing, pairs = RoutingStats(*size), PairStats(*size)
    mask = batch.mask.long()

    def counted(*stats: Accumulator[Any]) -> Callable[[], Any]:
        def run() -> None:
            seen: Any = observe(model, batch)
            for one in stats:
                one.update(seen)

        return run

    variants: dict[str, Callable[[], Any]] = {
        "plain transformers": lambda: plain(tokens, attention_mask=mask, use_cache=False).logits,
        "HookedMoE, no hooks": lambda: model(tokens, attention_mask=mask, use_cache=False),
        "RoutingStats": counted(routing),
        "RoutingStats and PairStats": counted(routing, pairs),
        "plain transformers again (noise)": lambda: plain(tokens, attention_mask=mask, use_cache=False).logits,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, run in variants.items():
                start = time.perf_counter(), time.process_time()
                run()
                times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    base = times["plain transformers"][1:]
    for name, seconds in times.items():
        wall, cpu = (statistics.median(a[i] / b[i] for a, b in zip(base, seconds[1:], strict=True)) for i in range(2))
        spent = 1000 * statistics.median(wall for wall, _ in seconds[1:])
        print(f"{name:34s} {spent:8.1f} ms  {wall:5.3f} × tokens/s of plain ({cpu:5.3f} by processor time)")


def memory(totals: tuple[int, ...] = (10**5, 10**6, 10**7), layers: int = 2) -> None:
    """Print peak memory and the size of the state at each total number of tokens."""
    generator = torch.Generator().manual_seed(0)
    size = range(layers), 16, 4
    stats: list[Accumulator[Any]] = [RoutingStats(*size), PairStats(*size), VocabularyStats(*size, 1000)]
    batches: list[Any] = []
    for i in range(4):
        logits = torch.randn(layers, 8, 1250, 16, generator=generator)
        weights, indices = logits.softmax(-1).topk(4)
        routing = Routing(
            layers=tuple(range(layers)),
            n_experts=16,
            indices=indices,
            weights=weights,
            logits=logits,
            probs=logits.softmax(-1),
        )
        tokens = torch.randint(1000, (8, 1250), generator=generator)
        batches.append((routing, tokens, [f"s{8 * i + j}" for j in range(8)]))
    done, start = 0, time.perf_counter()
    for total in totals:
        while done < total:
            routing, tokens, sources = batches[done // 10_000 % len(batches)]
            batch: Any = RoutedBatch(routing=routing, tokens=tokens, sources=sources)
            for one in stats:
                one.update(batch)
            done += 10_000
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
        state = sum(value.nbytes for one in stats for value in one.state_dict().values()) / 2**20
        rate = done / (time.perf_counter() - start)
        print(f"{done:10d} tokens: peak {peak:7.0f} MiB, state {state:6.2f} MiB, {rate:8.0f} tokens/s")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", help="a name that HookedMoE.from_pretrained takes; random if not given")
    parser.add_argument("--only", choices=["speed", "memory"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.only != "speed":
        memory()
    if args.only == "memory":
        return
    if args.model:
        from moe_lens.model.loading import load_pretrained

        plain: Any = load_pretrained(args.model, trust_remote_code=False)[0].eval()
        model = HookedMoE.from_pretrained(args.model)
    else:
        plain = DeepseekForCausalLM(DeepseekConfig(**SHAPE, moe_layer_freq=1)).eval()
        model = HookedMoE.from_hf(copy.deepcopy(plain))
    tokens = torch.randint(3, plain.config.vocab_size, (4, min(256, plain.config.max_position_embeddings)))
    print(f"{tokens.numel()} tokens a batch, float32, {args.threads} threads, {args.rounds} rounds")
    speed(model, plain, tokens, args.rounds)


if __name__ == "__main__":
    main()
