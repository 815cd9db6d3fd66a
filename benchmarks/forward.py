"""Forward and cache time of a HookedMoE against plain transformers, and import time.

python benchmarks/forward.py [--rounds 9] [--threads 2] [--device cpu]

A random DeepSeekMoE of 70 M parameters (d_model 256, 8 layers, 64 experts, top-6), 4 × 256 tokens. The plain model is a
second instance with the same weights at its fastest (sdpa attention, grouped_mm experts). All variants run in turn in
one process, round after round; the ratio is that of medians. Set OMP_WAIT_POLICY=passive.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from moe_lens import HookedMoE, names
from moe_lens.model.families.deepseek import DeepseekConfig, DeepseekForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
    "intermediate_size": 1024, "moe_intermediate_size": 176, "n_routed_experts": 64, "num_experts_per_tok": 6,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "max_position_embeddings": 512,
}  # fmt: skip


def import_seconds() -> float:
    """Median wall time of `import moe_lens` in a fresh process."""

    def once(code: str) -> float:
        script = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
        return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)

    return statistics.median(once("import moe_lens") for _ in range(3))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = DeepseekConfig(**SHAPE, moe_layer_freq=1)
    plain: Any = DeepseekForCausalLM(config)
    plain = plain.eval().to(device=args.device, dtype=getattr(torch, args.dtype))
    hooked = HookedMoE.from_hf(copy.deepcopy(plain))
    tokens = torch.randint(config.vocab_size, (4, 256), device=args.device)
    some = [
        names.mlp(name, layer)
        for layer in hooked.moe_layers
        for name in (names.ROUTER_LOGITS, names.EXPERT_OUT, names.EXPERT_WEIGHTED)
    ]
    variants: dict[str, Callable[[], Any]] = {
        "plain transformers": lambda: plain(tokens, use_cache=False).logits,
        "HookedMoE, no hooks": lambda: hooked(tokens, use_cache=False),
        "HookedMoE, router logits, expert_out, expert_weighted cached": lambda: hooked.run_with_cache(
            tokens, names_filter=some, use_cache=False
        ),
        "plain transformers again (noise)": lambda: plain(tokens, use_cache=False).logits,
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        plainly, ours = (variants[name]().float() for name in ("plain transformers", "HookedMoE, no hooks"))
        differ = float((plainly - ours).abs().max())
        assert differ == 0 or args.device != "cpu", "on a CPU logits are plain transformers' to the bit"
        assert differ <= 0.02 * float(plainly.abs().max()), f"logits differ by {differ}"
        del plainly, ours
        for _ in range(args.rounds + 1):
            for name, run in variants.items():
                start = time.perf_counter()
                run()
                if args.device != "cpu":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
    base = statistics.median(times["plain transformers"][1:])
    million = sum(p.numel() for p in plain.parameters()) / 1e6
    run = f"{tokens.numel()} tokens, {args.dtype}, {args.threads} threads, {args.rounds} rounds"
    print(f"{million:.1f} M parameters, {run}")
    print(f"logits of the two differ by {differ:.2g} at most")
    for name, seconds in times.items():
        median = statistics.median(seconds[1:])
        print(f"{name:62s} {1000 * median:8.1f} ms  {median / base:5.3f} ×")
    print(f"import moe_lens: {import_seconds():.2f} s (torch, transformers and transformer_lens included)")


if __name__ == "__main__":
    main()
