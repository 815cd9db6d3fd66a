"""Tokens per second of routing statistics against the plain forward pass over the same batches, and their memory.

python -m benchmarks.routing_statistics [--rounds 9] [--threads 2] [--model tiny-deepseekmoe]

Speed: the model that `benchmarks/forward.py` describes (random, 70 M parameters), or a named one, reads batches of
4 × 256 tokens: plain transformers at its fastest, HookedMoE without hooks, and with `RoutingStats` and `PairStats`
updated, with and without the logits, which plain transformers always computes; and a batch of the study `routing`,
which counts by input, next and predicted token, too. A round is plain, variant, variant, plain. The median over rounds
of the ratio of tokens per second is given, and that of processor time, which other work on the machine disturbs less;
plain beside itself shows the noise.

Memory: the process's peak, and the size of the state, as synthetic routing of 2 layers, 16 experts and top-4 is counted
from 10⁵ to 10⁷ tokens.
"""

import argparse
import copy
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.forward import SHAPE
from moe_lens import HookedMoE
from moe_lens.data import TokenBatch
from moe_lens.model.families.deepseek import DeepseekConfig, DeepseekForCausalLM
from moe_lens.routing import Routing
from moe_lens.stats import Accumulator, PairStats, RoutedBatch, RoutingStats, VocabularyStats, observe
from moe_lens.studies import RoutingStudy


def speed(model: HookedMoE, plain: Any, tokens: torch.Tensor, rounds: int) -> None:
    """Print the median time of each variant and its tokens per second beside the plain forward's."""
    batch = TokenBatch(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        counted=torch.ones_like(tokens, dtype=torch.bool),
        sources=tuple(f"s{i}" for i in range(len(tokens))),
    )
    size = model.moe_layers, model.n_experts, model.top_k
    routing, pairs = RoutingStats(*size), PairStats(*size)
    mask = batch.mask.long()

    study = RoutingStudy()
    gathered = study.begin(model, "model")

    def counted(*stats: Accumulator[Any], logits: bool = False) -> Callable[[], Any]:
        def run() -> None:
            seen: Any = observe(model, batch, predicted=logits)
            for one in stats:
                one.update(seen)

        return run

    variants: dict[str, Callable[[], Any]] = {
        "plain transformers": lambda: plain(tokens, attention_mask=mask, use_cache=False).logits,
        "HookedMoE, no hooks": lambda: model(tokens, attention_mask=mask, use_cache=False),
        "RoutingStats": counted(routing),
        "RoutingStats and PairStats": counted(routing, pairs),
        "the same, with all logits": counted(routing, pairs, logits=True),
        "the study `routing`": lambda: study.step(model, "model", batch, gathered, None),
    }
    plain_forward = variants["plain transformers"]
    with torch.no_grad():
        for name, run in variants.items():
            ratios, seconds = [], []
            for i in range(rounds + 1):
                before, once, again, after = (timed(one) for one in (plain_forward, run, run, plain_forward))
                if i:  # the first round warms up
                    ratios.append([(before[j] + after[j]) / (once[j] + again[j]) for j in range(2)])
                    seconds.append((once[0] + again[0]) / 2)
            wall, cpu = (statistics.median(ratio[j] for ratio in ratios) for j in range(2))
            spent = 1000 * statistics.median(seconds)
            print(f"{name:28s} {spent:8.1f} ms  {wall:5.3f} × tokens/s of plain ({cpu:5.3f} by processor time)")


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor time in seconds."""
    start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start[0], time.process_time() - start[1]


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
        from moe_lens.model.loading.pretrained import load_pretrained

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
