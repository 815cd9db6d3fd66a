"""What pruning costs, by every method, on the embedded model: the tables and figures of docs/pruning.md.

python benchmarks/pruning.py [--tokens 2048] [--out pruning-frontier] [--export-memory]

Cross-fitted: plans are made from one half of each domain's sources and judged on the other. Prints Markdown; the
numbers go to FOLDER as parquet. Knock-out takes every one of 5 × 64 experts out of every calibration text: about half
of the time. `--export-memory` measures the export of a random checkpoint of 2 GB instead.
"""

import argparse
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from moe_lens import HookedMoE, viz
from moe_lens.data import embedded_domains
from moe_lens.model.families.deepseek import DeepseekConfig, DeepseekForCausalLM
from moe_lens.pruning import METHODS, Frontier, Plan, Scores, export, frontier, halved, plan
from moe_lens.pruning.frontier import ALL

KEEP = (0.25, 0.5, 0.75)


def measure(tokens: int, out: Path) -> Frontier:
    """The frontier of all methods; specialists by REAP; fewer active experts."""
    model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
    halves = halved(embedded_domains(), model, n_tokens=tokens, context=256)
    began, batches = time.monotonic(), 0

    def count() -> None:
        nonlocal batches
        batches += 1
        if batches % 200 == 0:
            print(f"  {batches} batches, {time.monotonic() - began:.0f} s", flush=True)

    methods: Any = list(METHODS)
    found = frontier(
        model, halves, methods, KEEP, merged=["frequency", "reap"], specialists="reap", top_k=[1, 2, 3, 4, 5],
        on_batch=count,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / "frontier.safetensors")
    found.to_frame().to_parquet(out / "frontier.parquet", index=False)
    viz.frontier(found).write_html(out / "frontier.html")
    viz.specialists(found, 32).write_html(out / "specialists.html")
    return found


def cell(row: Any) -> str:
    """Ratio and its interval."""
    interval = "" if row["ratio_low"] != row["ratio_low"] else f" ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})"
    return f"{row['ratio']:.2f}{interval}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def report(found: Frontier) -> None:
    """All tables."""
    frame: Any = found.to_frame()
    domains = list(found.domains)
    whole = frame[(frame["share"] == 1) & (frame["top_k"] == found.points[0][4])].set_index("domain")
    told = ", ".join(f"{name} {whole.loc[name, 'tokens']:,} from {whole.loc[name, 'sources']}" for name in domains)
    print(f"\nTokens and sources: {told}.\n")
    alike = frame[(frame["calibrated"] == ALL) & (frame["top_k"] == found.points[0][4]) & (frame["share"] < 1)]
    for kept in sorted(alike["kept"].unique(), reverse=True):
        rows = []
        for (method, treatment), of in alike[alike["kept"] == kept].groupby(["method", "treatment"], sort=False):
            by = of.set_index("domain")
            rows.append(
                [method if treatment == "dropped" else f"{method}, merged", *(cell(by.loc[d]) for d in domains)]
            )
        print(f"\n{kept} of {found.n_experts} experts\n\n{table(['method', *domains], rows)}")
    for kept in (32,):
        special = frame[(frame["method"] == "reap") & (frame["kept"] == kept) & (frame["treatment"] == "dropped")]
        rows = [
            [name, *(cell(special[special["calibrated"] == name].set_index("domain").loc[d]) for d in domains)]
            for name in [ALL, *domains]
        ]
        print(f"\nSpecialists, {kept} of {found.n_experts}\n\n{table(['scored on', *domains], rows)}")
    fewer = frame[(frame["method"] == found.points[0][0])]
    rows = [
        [str(k), *(cell(fewer[fewer["top_k"] == k].set_index("domain").loc[d]) for d in domains)]
        for k in sorted(fewer["top_k"].unique(), reverse=True)
    ]
    print(f"\nActive experts\n\n{table(['top_k', *domains], rows)}")


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: all, and those that no file backs (which cannot be dropped under pressure)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmRSS"].split()[0]), 1024 * int(status["RssAnon"].split()[0])


def build(folder: Path) -> None:
    """A random checkpoint of 2 GB."""
    config = DeepseekConfig(
        vocab_size=8192, hidden_size=1024, num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=8,
        intermediate_size=2048, moe_intermediate_size=640, n_routed_experts=64, num_experts_per_tok=6,
        n_shared_experts=2, first_k_dense_replace=1, moe_layer_freq=1,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model: Any = DeepseekForCausalLM(config)
    HookedMoE.from_hf(model, check=False).save_pretrained(folder, max_shard_size="400MB")


def export_memory() -> None:
    """Peak of memory while a checkpoint is pruned file by file, against its largest shard."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # in a process of its own: memory that it gives back would hide what the export takes
        child = get_context("spawn").Process(target=build, args=(folder / "whole",))
        child.start()
        child.join()
        shards = [file.stat().st_size for file in (folder / "whole").glob("*.safetensors")]
        values = torch.rand(8, 64, dtype=torch.float32)
        model = {"name": "whole", "n_layers": 9, "d_model": 1024, "d_vocab": 8192, "top_k": 6}
        scores = Scores("random", model, tuple(range(1, 9)), 6, ("none",), (0,), "", values[None])
        made: Plan = plan(scores, 0.5)
        peak, done, before = (0, 0), False, resident()

        def watch() -> None:
            nonlocal peak
            while not done:
                now = resident()
                peak = max(peak[0], now[0] - before[0]), max(peak[1], now[1] - before[1])
                time.sleep(0.002)

        thread = threading.Thread(target=watch)
        thread.start()
        began = time.monotonic()
        export(str(folder / "whole"), made, folder / "half")
        done = True
        thread.join()
        print(
            f"checkpoint {sum(shards) / 1e9:.2f} GB in {len(shards)} shards, largest {max(shards) / 1e6:.0f} MB; "
            f"peak {peak[0] / 1e6:.0f} MB = {peak[0] / max(shards):.2f} × the largest shard, of it "
            f"{peak[1] / 1e6:.0f} MB that no file backs; {time.monotonic() - began:.1f} s"
        )


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("pruning-frontier"))
    parser.add_argument("--export-memory", action="store_true")
    args = parser.parse_args()
    if args.export_memory:
        export_memory()
    else:
        report(measure(args.tokens, args.out))


if __name__ == "__main__":
    main()
