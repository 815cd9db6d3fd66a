"""What interventions cost, as ratios to a plain forward pass.

python -m benchmarks.interventions [--rounds 9] [--threads 2] [--device cpu]

4 × 128 tokens through the embedded model and through a random DeepSeekMoE of 70 M parameters (that of forward.py). All
variants run in turn in one process, round after round; a ratio is the median of the rounds' ratios to the plain pass of
the same round, so that a slow moment of the machine falls on both. Set OMP_WAIT_POLICY=passive.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.forward import SHAPE
from moe_lens import HookedMoE
from moe_lens.model.deepseek import DeepseekConfig, DeepseekForCausalLM

PLAIN = "HookedMoE, no hooks"


def variants(model: HookedMoE, tokens: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; the first is what the others are compared with."""
    layer = model.moe_layers[len(model.moe_layers) // 2]
    busiest = int(model.routing(tokens).layer(layer).indices.flatten().mode().values)

    def forward() -> Any:
        return model(tokens, use_cache=False)

    def inside(intervention: Any) -> Callable[[], Any]:
        def run() -> Any:
            with intervention:
                return forward()

        return run

    return {
        PLAIN: forward,
        "the same again (noise)": forward,
        "ablate one expert, zero": inside(model.ablate({layer: [busiest]})),
        "ablate one expert, zero, renormalised": inside(model.ablate({layer: [busiest]}, renormalize=True)),
        "ablate one expert, mean": inside(
            model.ablate({layer: [busiest]}, how="mean", reference=tokens)  # measured before the clock runs
        ),
        "ablate one expert, resample": inside(model.ablate({layer: [busiest]}, how="resample")),
        "ablate one expert, reroute": inside(model.ablate({layer: [busiest]}, how="reroute")),
        **{f"keep_top({k})": inside(model.keep_top(k)) for k in (0, 1, 2, model.top_k - 1)},
        "force_routing, all layers": inside(model.force_routing(model.routing(tokens))),
    }


def measure(runs: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """Median seconds, and median ratio to the first of the same round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            if device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    plain = times[next(iter(runs))][1:]
    return {
        name: (statistics.median(of[1:]), statistics.median(a / b for a, b in zip(of[1:], plain, strict=True)))
        for name, of in times.items()
    }


def models(device: str) -> dict[str, HookedMoE]:
    """The embedded model and a larger one with random weights."""
    torch.manual_seed(0)
    random: Any = DeepseekForCausalLM(DeepseekConfig(**SHAPE, moe_layer_freq=1)).eval()
    return {
        "embedded": HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32, device_map=device),
        "random": HookedMoE.from_hf(random.to(device)),
    }


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, model in models(args.device).items():
        tokens = torch.randint(model.cfg.d_vocab, (4, 128), device=args.device)
        million = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name} model, {million:.1f} M parameters, 4 × 128 tokens, {args.threads} threads, {args.rounds} rounds")
        with torch.no_grad():
            for variant, (median, ratio) in measure(variants(model, tokens), args.rounds, args.device).items():
                print(f"  {variant:40s} {1000 * median:8.1f} ms  {ratio:5.3f} ×")


if __name__ == "__main__":
    main()
