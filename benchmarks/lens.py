"""Memory and time of a lens over many layers, sums and tokens of a large vocabulary.

python benchmarks/lens.py [--tokens 512] [--layers 28] [--read 28] [--threads 2] [--rounds 7] [--device cpu]
                          [--dtype float32]

The sizes of DeepSeekMoE 16B (d_model 2048, vocabulary 102400, 6 active experts), without its weights: a lens needs the
final norm and the unembedding alone, which are random here, and so is the cache. It reads the paper's Figure 2 (8 sums)
and the residual alone. Memory is measured once, over everything (or a cache of everything, of which the last `--read`
layers are read: no layer needs more than another); time on `--time-tokens` of the tokens and
`--time-layers` of the layers, in rounds that take turns with the bare matrix products that the same reading needs:
final prediction, ensemble, layer output and sums, over the same rows at a time. Set OMP_WAIT_POLICY=passive.
"""

import argparse
import resource
import statistics
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens import LogitLens, MoECache, PartialSum, names
from moe_lens.lenses.decoding import CHUNK

D_MODEL, D_VOCAB, TOP_K, N_EXPERTS = 2048, 102400, 6, 64


class Head:
    """What a lens needs of a model: its sizes, its final norm and its unembedding."""

    def __init__(self, n_layers: int, device: str, dtype: torch.dtype):
        self.ln_final = nn.RMSNorm(D_MODEL, device=device, dtype=dtype)
        self.unembed = nn.Linear(D_MODEL, D_VOCAB, bias=False, device=device, dtype=dtype)
        self.cfg = SimpleNamespace(n_layers=n_layers, d_model=D_MODEL, d_vocab=D_VOCAB, model_name="random head")
        self.adapter = SimpleNamespace(apply_output_logits_transform=lambda logits: logits)
        self.family = SimpleNamespace(score="softmax")
        self.moe_layers = tuple(range(1, n_layers))  # the first is dense
        self.n_experts, self.top_k, self.n_shared_experts, self.tokenizer = N_EXPERTS, TOP_K, 2, None

    @property
    def W_U(self) -> Tensor:
        return self.unembed.weight.T

    def has_shared(self, layer: int) -> bool:
        return layer in self.moe_layers


def random_cache(model: Any, lens: LogitLens, sums: tuple[PartialSum, ...], n_tokens: int, device: str) -> MoECache:
    """One text of random activations, in the model's precision."""
    dtype = model.W_U.dtype
    kept: dict[str, Tensor] = {}
    for name in lens.hooks(sums=sums):
        if name.endswith(names.EXPERT_INDICES):
            kept[name] = torch.rand(1, n_tokens, N_EXPERTS, device=device).topk(TOP_K).indices
        elif name.endswith(names.ROUTING_WEIGHTS):
            kept[name] = torch.rand(1, n_tokens, TOP_K, device=device, dtype=dtype).sort(descending=True).values
        else:
            slots = (TOP_K,) if name.endswith(names.EXPERT_WEIGHTED) else ()
            kept[name] = torch.randn(1, n_tokens, *slots, D_MODEL, device=device, dtype=dtype)
    tokens = torch.randint(D_VOCAB, (1, n_tokens))
    return MoECache(kept, model, tokens=tokens, following=tokens.roll(-1, 1))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """The greatest resident memory while it is entered, looked at every millisecond."""

    def __enter__(self) -> "Peak":
        self.most, self._done = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def products(model: Any, layers: int, n_sums: int, n_tokens: int, resid: Tensor) -> int:
    """The matrix products of a reading and nothing else; how many rows were multiplied."""
    weight, rows = model.unembed.weight, max(1, CHUNK // D_VOCAB)
    # The layer output and the ensemble are among the sums of Figure 2; a dense layer has two sums and the residual.
    times = 1 + (layers - 1) * n_sums + 2
    for start in range(0, n_tokens, rows):
        part = resid[start : min(start + rows, n_tokens)]
        for _ in range(times):
            torch.nn.functional.linear(part, weight)
    return times * n_tokens


def seconds(run: Any, device: str) -> float:
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--read", type=int, default=None)
    parser.add_argument("--time-tokens", type=int, default=163)
    parser.add_argument("--time-layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-memory", action="store_true", help="time only: the whole takes minutes on a processor")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    sums = (*PartialSum.figure2(TOP_K), PartialSum(ranks=[]))
    print(f"{args.layers} layers × {len(sums)} sums × {args.tokens} tokens, {args.dtype}, {args.threads} threads")
    with torch.no_grad():
        if not args.no_memory:
            memory(args, dtype, sums)
        timing(args, dtype, sums)


def memory(args: argparse.Namespace, dtype: torch.dtype, sums: tuple[PartialSum, ...]) -> None:
    model: Any = Head(args.layers, args.device, dtype)
    lens = LogitLens(model)
    lens.logits(torch.zeros(1, D_MODEL, device=args.device, dtype=dtype), 0)  # what libraries allocate once is not ours
    on_gpu = args.device != "cpu"
    before = torch.cuda.memory_allocated() if on_gpu else resident()
    cache = random_cache(model, lens, sums, args.tokens, args.device)
    held = (torch.cuda.memory_allocated() if on_gpu else resident()) - before
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    layers = range(args.layers - (args.read or args.layers), args.layers)
    with Peak() as peak:
        took = seconds(lambda: lens.decode(cache, sums, layers=layers), args.device)
    most = (torch.cuda.max_memory_allocated() if on_gpu else peak.most) - before
    print(f"model {model.W_U.nbytes / 1e9:.2f} GB; above it: cache {held / 1e9:.2f} GB, peak {most / 1e9:.2f} GB")
    print(f"of which decoding {(most - held) / 1e9:.2f} GB; {len(layers)} layers in {took:.1f} s")


def timing(args: argparse.Namespace, dtype: torch.dtype, sums: tuple[PartialSum, ...]) -> None:
    model: Any = Head(args.time_layers, args.device, dtype)
    lens = LogitLens(model)
    cache = random_cache(model, lens, sums, args.time_tokens, args.device)
    resid = cache[names.block(names.RESID_MID, 0)][0]
    times: dict[str, list[float]] = {"decode": [], "matrix products alone": []}
    rows = 0
    for _ in range(args.rounds + 1):
        times["decode"].append(seconds(lambda: lens.decode(cache, sums), args.device))
        start = time.perf_counter()
        rows = products(model, args.time_layers, len(sums), args.time_tokens, resid)
        if args.device != "cpu":
            torch.cuda.synchronize()
        times["matrix products alone"].append(time.perf_counter() - start)
    whole, alone = (statistics.median(values[1:]) for values in times.values())
    share = statistics.median(a / w for w, a in zip(*(values[1:] for values in times.values()), strict=True))
    print(f"{args.time_layers} layers × {args.time_tokens} tokens, {args.rounds} rounds: decode {whole:.2f} s, "
          f"products alone {alone:.2f} s ({2 * rows * D_MODEL * D_VOCAB / alone / 1e9:.0f} GFLOP/s)")  # fmt: skip
    print(f"share of the matrix products: {share:.0%}")


if __name__ == "__main__":
    main()
