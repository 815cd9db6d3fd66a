"""Train the embedded DeepSeekMoE.

    python training/prepare.py --texts TEXTS --out training/run
    torchrun --nproc-per-node 2 training/train.py --folder training/run --steps 9000

One process a core (or a GPU); gradients are averaged. Every batch is a function of (seed, step, rank) and the state is
saved every few minutes, so an interrupted run goes on where it was with the same numbers. The learning rate is held and
then falls linearly to zero over the last `--decay` of the steps: before that, `--steps` may still be changed.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import optimizer as optim
import torch
import torch.distributed as dist
from model import DeepSeekMoE, Shape

MIXTURE = {
    "english_novels": 0.18, "french_novels": 0.18, "german_novels": 0.18,
    "english_docs": 0.04, "french_docs": 0.04, "german_docs": 0.04,
    "math_gsm8k": 0.13, "code_stdlib": 0.21,
}  # fmt: skip
BOS = 0


class Mixture:
    """Random windows of the token files; each opens with the BOS token."""

    def __init__(self, run: Path, length: int, seed: int):
        self.files = {name: np.load(run / f"{name}.npy", mmap_mode="r") for name in MIXTURE}
        self.length, self.seed = length, seed

    def batch(self, step: int, rank: int, size: int) -> torch.Tensor:
        rng = np.random.default_rng((self.seed, step, rank))
        rows = []
        for name in rng.choice(list(MIXTURE), size=size, p=list(MIXTURE.values())):
            file = self.files[name]
            start = int(rng.integers(len(file) - self.length))
            rows.append(np.concatenate([[BOS], file[start : start + self.length]]))
        return torch.from_numpy(np.stack(rows).astype(np.int64))


class HeldOut:
    """The first windows of every held-out file, shared out over the processes."""

    def __init__(self, run: Path, length: int, windows: int, rank: int, world: int):
        self.parts: list[tuple[str, torch.Tensor]] = []
        self.files = [path.stem for path in sorted((run / "eval").glob("*.npy"))]
        for path in sorted((run / "eval").glob("*.npy")):
            ids = torch.from_numpy(np.load(path).astype(np.int64))
            rows = ids[: len(ids) // length * length].view(-1, length)[:windows][rank::world]
            self.parts.append((path.stem, torch.nn.functional.pad(rows, (1, 0), value=BOS)))

    @torch.no_grad()
    def losses(self, model: torch.nn.Module, device: torch.device, micro: int) -> dict[str, float]:
        """Mean nats per token of each file."""
        sums = torch.zeros(len(self.parts), 2, device=device)
        for i, (_, rows) in enumerate(self.parts):
            for part in rows.split(micro):
                losses = model(part.to(device))[0]
                sums[i] += torch.stack([losses.sum(), losses.new_tensor(losses.numel())])
        if dist.is_initialized():
            dist.all_reduce(sums)
        means = (sums[:, 0] / sums[:, 1]).tolist()
        return {name: round(value, 4) for name, value in zip(self.files, means, strict=True)}


def rate(step: int, steps: int, decay: float, warmup: int) -> float:
    """Warm-up, hold, linear decay to zero over the last `decay` of the run."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (steps * decay))


def average_gradients(model: DeepSeekMoE, extra: torch.Tensor) -> torch.Tensor:
    """All-reduce the gradients, and `extra` with them, in one message."""
    params = list(model.parameters())
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in params] + [extra])
    if dist.is_initialized():
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
    offset = 0
    for p in params:
        p.grad = flat[offset : offset + p.numel()].view_as(p)
        offset += p.numel()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    return flat[offset:]


def save(path: Path, state: dict) -> None:
    """Write to a temporary name, then rename: a state file is always whole."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--stop", type=int, default=None, help="leave after this step, to resume later")
    parser.add_argument("--decay", type=float, default=0.35)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="sequences a process and step")
    parser.add_argument("--micro", type=int, default=4, help="sequences at once; on a GPU as many as --batch")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--balance", type=float, default=1e-3)
    parser.add_argument(
        "--balance-later",
        type=float,
        nargs=2,
        default=None,
        metavar=("STEP", "ALPHA"),
        help="another balance from a step on: routing specialises first, and no expert is left behind",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    args = parser.parse_args()

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    torch.manual_seed(args.seed)
    model = DeepSeekMoE(Shape(max_position_embeddings=args.length)).to(device)
    optimizers = optim.build(model, args.muon_lr, args.adam_lr, args.weight_decay)
    data, first, path = Mixture(args.folder, args.length, args.seed), 0, args.folder / "state.pt"
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for o, s in zip(optimizers, state["optimizers"], strict=True):
            o.load_state_dict(s)
        first = state["step"]
    held_out = HeldOut(args.folder, args.length, 16, rank, world)
    run = torch.compile(model) if args.compile else model
    log = (args.folder / "log.jsonl").open("a") if rank == 0 else None
    last = args.steps if args.stop is None else min(args.stop, args.steps)
    saved = began = time.time()

    for step in range(first, last):
        factor = rate(step, args.steps, args.decay, args.warmup)
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = group["peak"] * factor
        alpha = args.balance if not args.balance_later or step < args.balance_later[0] else args.balance_later[1]
        parts = data.batch(step, rank, args.batch).split(args.micro)
        total = torch.zeros(2, device=device)
        for part in parts:
            losses, balance = run(part.to(device))
            loss = losses.mean()
            ((loss + alpha * balance) / len(parts)).backward()
            total += torch.stack([loss.detach(), balance.detach()]) / len(parts)
        total = average_gradients(model, total)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        if log and (step % 20 == 0 or step == last - 1):
            tokens = (step + 1) * args.batch * args.length * world
            speed = (step + 1 - first) * args.batch * args.length * world / (time.time() - began)
            entry = {"step": step, "tokens": tokens, "loss": total[0].item(), "balance": total[1].item(),
                     "rate": factor, "tokens_per_second": round(speed)}  # fmt: skip
            print(json.dumps(entry), file=log, flush=True)
        if step % 250 == 249 or step == last - 1:
            losses = held_out.losses(model, device, args.micro)
            if log:
                print(json.dumps({"step": step, "held_out": losses}), file=log, flush=True)
        if rank == 0 and (time.time() - saved > 60 * args.save_minutes or step == last - 1):
            optimizer_states = [o.state_dict() for o in optimizers]
            settings = vars(args) | {"folder": str(args.folder)}
            whole = {"model": model.state_dict(), "optimizers": optimizer_states, "step": step + 1, "args": settings}
            save(path, whole)
            saved = time.time()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
