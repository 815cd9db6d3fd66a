"""A layer of DeepSeekMoE 16B's shape in bfloat16, int8, nf4 and fp4: how long a pass takes, and how large it is.

    python -m benchmarks.packed_speed [--device cpu] [--rounds 7] [--tokens 1 16 128 1024]

Random weights, a small vocabulary, and one MoE layer (64 experts of width 1,408, top-6, two shared), since each layer
costs the same. All passes run in turn in one process; the ratio is the median over rounds of that to bfloat16. The
first column is a token of a text that is being generated: six experts are unpacked. The last is a pass of the last
number of tokens forward and backward, with gradients of what was embedded.
"""

import argparse
import warnings
from functools import partial
from typing import Any, get_args

import torch

from benchmarks.measuring import interleaved, machine
from moe_lens import HookedMoE
from moe_lens.model.experts.quantised import Scheme
from moe_lens.model.loading.quantising import packed_in
from scripts.gpu import FULL, random_model

SHAPE: dict[str, Any] = {**FULL, "vocab_size": 4096, "num_hidden_layers": 1, "first_k_dense_replace": 0}


@torch.no_grad()
def forward(model: HookedMoE, tokens: torch.Tensor) -> None:
    """A pass whose logits are those of the last token."""
    model(tokens, use_cache=False, logits_to_keep=1)


def backward(model: HookedMoE, tokens: torch.Tensor) -> None:
    """A pass and its gradients with respect to the embedded tokens."""

    def keep(act: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        return act.detach().requires_grad_()

    model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[("hook_embed", keep)]).backward()


def size(model: HookedMoE) -> int:
    """Bytes of all weights."""
    return sum(p.nbytes for p in (*model.original_model.parameters(), *(packed for _, packed in packed_in(model))))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    models = {
        name: random_model(SHAPE, args.device, None if name == "bfloat16" else name)
        for name in ("bfloat16", *get_args(Scheme))
    }
    batches = [torch.randint(SHAPE["vocab_size"], (1, count), device=args.device) for count in args.tokens]
    runs = [*((forward, batch) for batch in batches), (backward, batches[-1])]
    titles = [f"{n:,} token{'s' if n > 1 else ''}" for n in args.tokens]
    rows: dict[str, list[str]] = {name: [f"{size(model) / 1e9:.2f} GB"] for name, model in models.items()}
    for run, batch in runs:
        turns = {name: partial(run, model, batch) for name, model in models.items()}
        for name, timed in interleaved(turns, args.rounds, args.device).items():
            of_first = f"{1000 * timed.seconds:,.0f} ms"
            rows[name].append(of_first if name == "bfloat16" else f"{timed.ratio:.2f} ×")
    print("| | " + " | ".join(["weights", *titles, f"{titles[-1]} and back"]) + " |")
    print("|" + "---|" * (3 + len(titles)))
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\n{machine(args.device)}; medians of {args.rounds} rounds")


if __name__ == "__main__":
    main()
