"""How good the embedded model is, beside baselines that a reader can judge it by.

python training/evaluate.py --model MODEL --texts EVAL_FOLDER [--run training/run] [--half a|b|both]

Every `*.jsonl` of the folder is one domain file (fields text and source). Per file: loss in nats per token and per byte
(each passage alone, after BOS, truncated to the context), perplexity without routed experts and with one of them, and
how routing is specialised; for the same texts a bigram model (absolute discounting, trained on the training tokens) and
gzip. Sources are split in two halves by a hash: choices are made on half `a`, published numbers come from half `b`.
"""

import argparse
import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prepare import held_out
from torch import Tensor

from moe_lens import HookedMoE, names

DISCOUNT = 0.75


class Bigram:
    """P(token | previous) with absolute discounting, backing off to smoothed token frequencies."""

    def __init__(self, files: list[Path], vocab: int):
        counts = np.zeros((vocab, vocab), dtype=np.float32)
        for file in files:
            ids = np.load(file).astype(np.int64)
            counts += np.bincount(ids[:-1] * vocab + ids[1:], minlength=vocab * vocab).reshape(vocab, vocab)
        self.unigram = (counts.sum(0) + 1) / (counts.sum() + vocab)
        self.total = counts.sum(1)
        self.kinds = (counts > 0).sum(1)
        self.counts = counts

    def nats(self, ids: np.ndarray) -> np.ndarray:
        """Negative log-probability of every token but the first."""
        previous, token = ids[:-1], ids[1:]
        total = np.maximum(self.total[previous], 1)
        seen = np.maximum(self.counts[previous, token] - DISCOUNT, 0) / total
        rest = np.where(self.total[previous] > 0, DISCOUNT * self.kinds[previous] / total, 1.0)
        return -np.log(seen + rest * self.unigram[token])


def batches(model: HookedMoE, rows: list[dict[str, str]], size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens, right-padded, and the mask of real ones."""
    encoded = [model.to_tokens(row["text"])[0] for row in rows]
    for start in range(0, len(encoded), size):
        part = encoded[start : start + size]
        tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        lengths = torch.tensor([len(ids) for ids in part])
        yield tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def keep(model: HookedMoE, k: int) -> list[Any]:
    """Hooks that leave the k experts with the largest weights, unnormalised."""

    def cut(weights: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return weights * (torch.arange(weights.shape[-1]) < k)

    return [(names.mlp(names.ROUTING_WEIGHTS, layer), cut) for layer in model.moe_layers]


@torch.no_grad()
def evaluate(model: HookedMoE, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Loss sums with all, one and no routed expert, and the load of every expert."""
    sums = {"loss": 0.0, "top1": 0.0, "none": 0.0}
    load = torch.zeros(len(model.moe_layers), model.n_experts)
    weight = torch.zeros(len(model.moe_layers))
    scored = tokens_seen = 0
    for tokens, mask in batches(model, rows):
        scores = mask[:, 1:]
        for key, hooks in (("loss", []), ("top1", keep(model, 1)), ("none", keep(model, 0))):
            loss = model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss", loss_per_token=True)
            sums[key] += loss[scores].double().sum().item()
        real = mask.clone()
        real[:, 0] = False
        routing = model.routing(tokens)
        for i in range(len(model.moe_layers)):
            load[i] += torch.bincount(routing.indices[i][real].flatten(), minlength=model.n_experts)
            weight[i] += routing.weights[i][..., 0][real].sum()
        scored += int(scores.sum())
        tokens_seen += int(real.sum())
    size = sum(len(row["text"].encode()) for row in rows)
    return {"tokens": scored, "bytes": size, **sums, "load": load / tokens_seen, "top_weight": weight / tokens_seen}


def js_divergence(distributions: Tensor) -> Tensor:
    """Jensen–Shannon divergence in bits between the rows of [domain, layer, expert], per layer."""

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.clamp_min(1e-12).log2()).sum(-1)

    return entropy(distributions.mean(0)) - entropy(distributions).mean(0)


def experts_for_half(load: Tensor) -> Tensor:
    """How few experts take half of a layer's assignments, per layer of [layer, expert]."""
    share = load.sort(-1, descending=True).values.cumsum(-1) / load.sum(-1, keepdim=True)
    return (share < 0.5).sum(-1) + 1


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=None, help="folder with the training tokens, for the bigram model")
    parser.add_argument("--half", choices=("a", "b", "both"), default="b")
    parser.add_argument("--limit", type=int, default=None, help="passages per file")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    model = HookedMoE.from_pretrained(args.model, dtype=torch.float32)
    bigram = Bigram(sorted(args.run.glob("*.npy")), model.cfg.d_vocab) if args.run else None
    results: dict[str, dict[str, Any]] = {}
    loads = []
    print("loss in nats; ratios of perplexity without routed experts and with one of them")
    print(f"{'file':18s}  tokens  a token  a byte  bigram  gzip a byte  none  top-1  busiest expert of each MoE layer")
    for path in sorted(args.texts.glob("*.jsonl")):
        rows = held_out(path, args.half)[: args.limit]
        found = evaluate(model, rows)
        loss = found["loss"] / found["tokens"]
        ids = [model.to_tokens(row["text"])[0].numpy() for row in rows]
        text = "\n".join(row["text"] for row in rows).encode()
        load = found["load"]
        loads.append(load / load.sum(-1, keepdim=True))
        results[path.stem] = {
            "tokens": found["tokens"],
            "sources": len({row["source"] for row in rows}),
            "nats_per_token": loss,
            "nats_per_byte": found["loss"] / found["bytes"],
            "bigram_nats_per_token": float(np.concatenate([bigram.nats(i) for i in ids]).mean()) if bigram else None,
            "gzip_nats_per_byte": len(gzip.compress(text, 9)) * 8 * math.log(2) / len(text),
            "perplexity_ratio_no_routed": math.exp((found["none"] - found["loss"]) / found["tokens"]),
            "perplexity_ratio_top1": math.exp((found["top1"] - found["loss"]) / found["tokens"]),
            "busiest_expert": load.max(-1).values.tolist(),
            "top_weight": found["top_weight"].tolist(),
            "half_of_assignments": experts_for_half(load).tolist(),
        }
        r = results[path.stem]
        busiest = " ".join(f"{x:.2f}" for x in r["busiest_expert"])
        print(
            f"{path.stem:18s} {r['tokens']:7d}  {loss:7.3f}  {r['nats_per_byte']:6.3f}  "
            f"{r['bigram_nats_per_token'] or math.nan:6.3f}  {r['gzip_nats_per_byte']:11.3f}  "
            f"{r['perplexity_ratio_no_routed']:4.1f}  {r['perplexity_ratio_top1']:5.2f}  {busiest}"
        )
    stacked = torch.stack(loads)
    summary = {
        "js_divergence_bits": js_divergence(stacked).tolist(),
        "least_used_expert": stacked.mean(0).min(-1).values.mul(model.n_experts).tolist(),
        "mean_nats_per_token": float(np.mean([r["nats_per_token"] for r in results.values()])),
    }
    print(f"mean of files: {summary['mean_nats_per_token']:.3f} nats/token")
    print("JS divergence between files, bits a layer:", " ".join(f"{x:.3f}" for x in summary["js_divergence_bits"]))
    print("least used expert, share of uniform:", " ".join(f"{x:.3f}" for x in summary["least_used_expert"]))
    if args.out:
        args.out.write_text(json.dumps({"half": args.half, "files": results, **summary}, indent=1) + "\n")


if __name__ == "__main__":
    main()
