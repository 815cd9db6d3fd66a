"""What interventions cost, as ratios to a plain forward pass.

python -m benchmarks.interventions [--rounds 9] [--sweeps 3] [--threads 2] [--device cpu]

4 × 128 tokens through the embedded model (its own held-out texts, one domain an item) and through a random DeepSeekMoE
of 70 M parameters, that of forward.py (random tokens). All variants run in turn in one process, round after round; a
ratio is the median of the rounds' ratios to the plain pass of the same round, so that a slow moment of the machine
falls on both. Set OMP_WAIT_POLICY=passive.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.forward import SHAPE
from moe_lens import HookedMoE, names
from moe_lens.data import embedded_domains
from moe_lens.interventions import CleanRun, Loss, expert_attribution
from moe_lens.interventions.coalitions import added_losses
from moe_lens.model.families.deepseek import DeepseekConfig, DeepseekForCausalLM

PLAIN = "HookedMoE, no hooks"
PAIRS = 16
"""Of the naive knock-outs, how many are timed at a time."""
COALITIONS = 40


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
        "attribution of all pairs, gradient": lambda: expert_attribution(model, tokens, Loss(tokens)),
        "attribution of all pairs, direct": lambda: expert_attribution(model, tokens, Loss(tokens), method="direct"),
    }


def knockouts(model: HookedMoE, tokens: torch.Tensor, rounds: int, device: str) -> tuple[int, float, float, float]:
    """Exact knock-out of all pairs of layer and expert: how many, seconds, seconds one by one, and their ratio.

    One by one is a full forward pass with a hook, and the loss, for each pair; `PAIRS` of them are timed in each round.
    """
    pairs = [(layer, expert) for layer in model.moe_layers for expert in range(model.n_experts)]
    indices, loss = model.routing(tokens), Loss(tokens)

    def one(layer: int, expert: int) -> torch.Tensor:
        others = (indices.layer(layer).indices != expert)[..., None]
        hook: Any = (names.mlp(names.EXPERT_WEIGHTED, layer), lambda weighted, hook: weighted * others)  # noqa: ARG005
        return loss(model.run_with_hooks(tokens, fwd_hooks=[hook], use_cache=False))

    def some() -> None:
        for layer, expert in pairs[:: len(pairs) // PAIRS][:PAIRS]:
            one(layer, expert)

    runs = {"naive": some, "sweep": lambda: expert_attribution(model, tokens, loss, method="knockout")}
    times = measure(runs, rounds, device)
    naive, ratio = times["naive"][0] * len(pairs) / PAIRS, len(pairs) / PAIRS / times["sweep"][1]
    return len(pairs), times["sweep"][0], naive, ratio


def coalitions(model: HookedMoE, tokens: torch.Tensor, rounds: int, device: str) -> tuple[float, float, float]:
    """`COALITIONS` of a sixteenth of each layer's experts, re-routed: seconds at once, one by one, and their ratio.

    At once is what localisation and its 40 controls do; one by one is a forward pass with `ablate` for each.
    """
    shape = (COALITIONS, len(model.moe_layers), model.n_experts)
    each = max(1, model.n_experts // 16)
    members = torch.zeros(shape, dtype=torch.bool).scatter(-1, torch.rand(shape).topk(each, -1).indices, True)
    pairs = torch.cartesian_prod(torch.arange(COALITIONS), torch.arange(len(tokens)))
    loss = Loss(tokens)

    def at_once() -> torch.Tensor:
        return added_losses(model, CleanRun.of(model, tokens), loss, members, pairs, "reroute")

    def one_by_one() -> None:
        for one in members:
            experts = [(model.moe_layers[row], expert) for row, expert in one.nonzero().tolist()]
            with model.ablate(experts, how="reroute"):
                loss(model(tokens, use_cache=False))

    times = measure({"one by one": one_by_one, "at once": at_once}, rounds, device)
    return times["at once"][0], times["one by one"][0], 1 / times["at once"][1]


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


def models(device: str) -> dict[str, tuple[HookedMoE, torch.Tensor]]:
    """The embedded model and a larger one with random weights; for each, 4 × 128 tokens."""
    torch.manual_seed(0)
    random: Any = DeepseekForCausalLM(DeepseekConfig(**SHAPE, moe_layer_freq=1)).eval()
    larger = HookedMoE.from_hf(random.to(device))
    model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32, device_map=device)
    texts = [" ".join(passage.text for passage in domain.passages) for domain in embedded_domains()[:4]]
    return {
        "embedded": (model, torch.cat([model.to_tokens(text)[:, :128] for text in texts])),
        "random": (larger, torch.randint(larger.cfg.d_vocab, (4, 128), device=device)),
    }


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sweeps", type=int, default=3, help="rounds of exact knock-outs of all experts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, (model, tokens) in models(args.device).items():
        million = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name} model, {million:.1f} M parameters, 4 × 128 tokens, {args.threads} threads, {args.rounds} rounds")
        with torch.no_grad():
            for variant, (median, ratio) in measure(variants(model, tokens), args.rounds, args.device).items():
                print(f"  {variant:40s} {1000 * median:8.1f} ms  {ratio:5.3f} ×")
            count, sweep, naive, ratio = knockouts(model, tokens, args.sweeps, args.device)
            coalition, single, times = coalitions(model, tokens, args.sweeps, args.device)
        told = f"{sweep:.1f} s; a forward pass for each: {naive:.1f} s, {ratio:.1f} × as long"
        print(f"  exact knock-out of all {count} pairs: {told} ({args.sweeps} rounds)")
        told = f"{coalition:.1f} s; a forward pass for each: {single:.1f} s, {times:.1f} × as long"
        print(f"  {COALITIONS} coalitions re-routed: {told} ({args.sweeps} rounds)")


if __name__ == "__main__":
    main()
