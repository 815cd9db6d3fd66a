"""How well cheap attributions agree with exact knock-outs, on the embedded model: the tables of docs/attribution.md.

python benchmarks/attribution_fidelity.py [--tokens 2560] [--out attribution-fidelity]

Takes every one of 5 × 64 experts out of every text, twice (later layers choosing again, or not): minutes on a CPU. What
was done is kept in OUT.unfinished, and the same command goes on from there; a finished OUT is read and printed.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from moe_lens import HookedMoE
from moe_lens.data import Reading, embedded_domains
from moe_lens.studies.attribution_fidelity import AttributionFidelity
from moe_lens.studies.run_study import run

REFERENCES = {"knockout": "free", "knockout_frozen": "frozen", "direct_knockout": "direct path"}


def cell(row: Any, name: str) -> str:
    """A number and its interval."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    interval = "" if pd.isna(low) else f" [{low:.2f}, {high:.2f}]"
    return f"{row[name]:.2f}{interval}"


def markdown(rows: list[dict[str, str]]) -> str:
    """A table."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([row[head] for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run the study and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2560, help="of each domain")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("attribution-fidelity"))
    args = parser.parse_args()
    model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32, device_map=args.device)
    result = run(
        AttributionFidelity(),
        model,
        embedded_domains(),
        reading=Reading(tokens=args.tokens, context=args.context, shard_tokens=512),
        out=args.out,
        name="tiny-deepseekmoe",
        batch_tokens=1024,
        watch=lambda what, tokens: print(f"{what}: {tokens} tokens", flush=True),
    )
    fidelity: Any = result.tables["fidelity"]
    whole = fidelity[fidelity["layer"].isna()]
    print("\nAll layers, all domains together\n")
    together = whole[whole["domain"] == "all"]
    print(
        markdown(
            [
                {
                    "method": row["method"],
                    "knock-out": REFERENCES[row["reference"]],
                    "Spearman": cell(row, "spearman"),
                    "Pearson": cell(row, "pearson"),
                    "top 10": cell(row, "top10"),
                }
                for _, row in together.iterrows()
            ]
        )
    )
    for reference in ("knockout", "knockout_frozen"):
        of = fidelity[fidelity["reference"] == reference]
        methods = list(dict.fromkeys(of["method"]))
        for what, rows in (
            ("domain, all layers", of[of["layer"].isna()].assign(key=lambda f: f["domain"])),
            ("layer, all domains", of[(of["domain"] == "all") & of["layer"].notna()].assign(key=lambda f: f["layer"])),
        ):
            print(f"\nSpearman with knock-out, {REFERENCES[reference]}, by {what}\n")
            found = rows.set_index(["key", "method"])["spearman"]
            keys = list(dict.fromkeys(rows["key"]))
            print(markdown([{"": str(key)} | {m: f"{found[key, m]:.2f}" for m in methods} for key in keys]))
    print("\nRe-routing: mean |effect| over active pairs, in 1e-3 nats per token\n")
    rerouting: Any = result.tables["rerouting"]
    print(
        markdown(
            [
                {
                    "domain": row["domain"],
                    "layer": str(row["layer"]),
                    **{name: f"{1000 * row[name]:.2f}" for name in ("free", "frozen", "difference")},
                    "share": f"{row['share']:.0%}",
                }
                for _, row in rerouting.iterrows()
            ]
        )
    )
    print(
        "\nRead: "
        + "; ".join(f"{r['name']} {r['tokens']} tokens, {r['sources']} sources" for r in result.manifest["read"])
    )


if __name__ == "__main__":
    main()
