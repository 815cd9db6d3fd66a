"""Write the model card and the loss curve from the training log and the evaluation, so that no number is typed by hand.

python training/card.py --log training/log.jsonl --settings training/settings.json --shipped training/results_shipped.json
    --others training/results.json --model moe_lens/assets/tiny-deepseekmoe
"""

import argparse
import json
from pathlib import Path
from typing import Any

SHIPPED = {
    "english": "English, Debian handbook",
    "french": "French, Debian handbook",
    "german": "German, Debian handbook",
    "math": "mathematics, symbolic templates",
    "code": "Python standard library",
}
"""The domains of the package, by file name."""

OTHERS = {
    "english_novels": "English novels",
    "french_novels": "French novels",
    "german_novels": "German novels",
    "math_gsm8k_test": "mathematics, GSM8K test",
}
"""Texts that cannot ship."""

AIM = ("english_novels", "french_novels", "german_novels", "math_gsm8k_test", "code_stdlib")


def loss_curve(entries: list[dict[str, Any]], width: int = 640, height: int = 260) -> str:
    """Training loss (mean of 10 entries) and held-out loss of the five aims, as SVG."""
    training = [(e["step"], e["loss"]) for e in entries if "loss" in e]
    smooth = [
        (training[i][0], sum(v for _, v in training[max(0, i - 9) : i + 1]) / min(i + 1, 10))
        for i in range(len(training))
    ]
    held_out = [(e["step"], sum(e["held_out"][n] for n in AIM) / len(AIM)) for e in entries if "held_out" in e]
    last, low, high = training[-1][0], 2.5, 6.0

    def points(series: list[tuple[int, float]]) -> str:
        return " ".join(
            f"{50 + (width - 70) * step / last:.1f},{20 + (height - 60) * (high - min(value, high)) / (high - low):.1f}"
            for step, value in series
        )

    grid = "".join(
        f'<line x1="50" x2="{width - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        f'<text x="44" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        for value in (3, 4, 5, 6)
        for y in [20 + (height - 60) * (high - value) / (high - low)]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
        f'<rect width="{width}" height="{height}" fill="white"/>{grid}'
        f'<polyline fill="none" stroke="#888" points="{points(smooth)}"/>'
        f'<polyline fill="none" stroke="#c2410c" stroke-width="2" points="{points(held_out)}"/>'
        f'<text x="50" y="{height - 12}">0</text><text x="{width - 20}" y="{height - 12}" text-anchor="end">step {last + 1}'
        f'</text><text x="{width // 2}" y="{height - 12}" text-anchor="middle">nats a token: training mixture (grey), '
        "held-out mean of five domains (red)</text></svg>\n"
    )


def table(results: dict[str, Any], names: dict[str, str]) -> str:
    """Loss, baselines and the weight of routed experts, one row a file."""
    head = (
        "| text | tokens | nats/token | bigram | nats/byte | gzip | routed experts off | top-1 of 6 |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    rows = []
    for name, label in names.items():
        r = results["files"][name]
        rows.append(
            f"| {label} | {r['tokens']:,} | **{r['nats_per_token']:.3f}** | {r['bigram_nats_per_token']:.3f} | "
            f"{r['nats_per_byte']:.3f} | {r['gzip_nats_per_byte']:.3f} | × {r['perplexity_ratio_no_routed']:.1f} | "
            f"× {r['perplexity_ratio_top1']:.2f} |"
        )
    return head + "\n".join(rows)


def busiest(results: dict[str, Any], names: dict[str, str]) -> str:
    """Share of tokens whose top-6 contains the busiest expert of the layer."""
    layers = range(len(next(iter(results["files"].values()))["busiest_expert"]))
    head = "| text | " + " | ".join(f"layer {i + 1}" for i in layers) + " |\n|---|" + "---|" * len(layers) + "\n"
    return head + "\n".join(
        f"| {label} | " + " | ".join(f"{100 * x:.0f} %" for x in results["files"][name]["busiest_expert"]) + " |"
        for name, label in names.items()
    )


def curve_table(entries: list[dict[str, Any]]) -> str:
    """Held-out loss by training step."""
    rows = [(e["step"] + 1, sum(e["held_out"][n] for n in AIM) / len(AIM)) for e in entries if "held_out" in e]
    steps, losses = " | ".join(str(step) for step, _ in rows), " | ".join(f"{loss:.2f}" for _, loss in rows)
    return f"| step | {steps} |\n|---|{'---|' * len(rows)}\n| loss | {losses} |"


def card(
    entries: list[dict[str, Any]], shipped: dict[str, Any], others: dict[str, Any], settings: dict[str, Any]
) -> str:
    """The model card."""
    last = [e for e in entries if "loss" in e][-1]
    aim = sum(others["files"][n]["nats_per_token"] for n in AIM) / len(AIM)
    ships = sum(shipped["files"][n]["nats_per_token"] for n in SHIPPED) / len(SHIPPED)
    off = [r["perplexity_ratio_no_routed"] for r in shipped["files"].values()]
    divergence = " / ".join(f"{x:.2f}" for x in shipped["js_divergence_bits"])
    least = " / ".join(f"{x:.2f}" for x in shipped["least_used_expert"])
    later = settings.get("balance_later")
    balance = f"{settings['balance']:g}" + (f", from step {later[0]:.0f} on {later[1]:g}" if later else "")
    return f"""---
license: mit
language: [en, fr, de]
library_name: transformers
pipeline_tag: text-generation
---

# tiny-deepseekmoe

A DeepSeekMoE (arXiv 2401.06066) that is small enough to ship with a package and was trained on real text, so that
interpretability tools have trained experts to study. It is not an assistant, and does not write well.

The architecture is that of DeepSeekMoE 16B, scaled down: softmax router without renormalisation, 64 routed experts of which 6
are active, 2 shared experts, first layer dense; 6 layers, width 128, 4 heads, experts of width 64, dense layer of width
352, byte-level BPE of 4096 tokens with single digits, context 512. 9.73 M parameters, bfloat16, original tensor names.

## How good it is

Loss on held-out texts, each passage run on its own after BOS. The last two columns are perplexity without any routed
expert, and with only the top expert of six, each divided by the whole model's. The bigram model (absolute discounting)
was fitted to the same training tokens. gzip -9 compresses each text as one file; its column is in nats a byte.

Texts that are part of the package (`python training/evaluate.py --model tiny-deepseekmoe --texts moe_lens/assets/domains`):

{table(shipped, SHIPPED)}

Texts that are not part of the package:

{table(others, OTHERS)}

Mean over the five shipped texts {ships:.3f} nats a token; over novels, GSM8K test and code {aim:.3f}. These are the sources
of half b; all choices in training were made on half a. Switching off all routed experts multiplies the perplexity of the
shipped texts by {min(off):.0f} to {max(off):.0f}.

Handbook and code are held-out chapters and modules of books and libraries whose other parts were in the training texts.
The training texts contain no mathematics in French or German.

Held-out loss while training (mean of the novels, GSM8K test and code, half a), nats a token:

{curve_table(entries)}

## Its routing

Share of a text's tokens whose top 6 contains the busiest expert of the layer (uniform: 9.4 %):

{busiest(shipped, SHIPPED)}

{busiest(others, OTHERS)}

Jensen–Shannon divergence between the five shipped texts, layers 1 to 5: {divergence} bits. Load of the least used expert
on these texts, divided by the uniform load: {least}.

## Training

{last["tokens"] / 1e6:.1f} M tokens in {last["step"] + 1} steps of {last["tokens"] // (last["step"] + 1):,} tokens, two processes with one CPU thread each; seed {settings["seed"]}. The run was interrupted and resumed.

```sh
python training/prepare.py --texts TEXTS --out training/run
torchrun --nproc-per-node 2 training/train.py --folder training/run --steps {settings["steps"]} --batch {settings["batch"]}{" --balance-later " + " ".join(f"{x:g}" for x in later) if later else ""} --no-compile
python training/export.py --folder training/run --out moe_lens/assets/tiny-deepseekmoe
```

Muon (lr {settings["muon_lr"]:g}) for matrices, AdamW (lr {settings["adam_lr"]:g}) for embedding, unembedding, routers and norms; warm-up {settings["warmup"]} steps,
hold, linear decay to zero over the last {100 * settings["decay"]:.0f} %. Expert-level balance loss over the batch, α = {balance}. The summed
output of the routed experts was multiplied by 16 in training and the factor folded into `down_proj` on export.

Data: ELTeC novels (public domain) in three languages, Debian handbook and GNOME documentation in three languages
(CC-BY-SA-3.0), GSM8K training problems (MIT), the CPython standard library (PSF-2.0); mixture 22 % a language,
13 % mathematics, 21 % code.

## Limits

One seed, one configuration, tens of millions of tokens. What its experts do shows how the tools work, not how large models behave.

Licence of the weights: MIT.
"""


def main() -> None:
    """Write the card into the model's folder and the curve into docs/assets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--settings", type=Path, required=True, help="JSON of the training arguments")
    parser.add_argument("--shipped", type=Path, required=True, help="evaluation of the texts of the package")
    parser.add_argument("--others", type=Path, required=True, help="evaluation of those that cannot ship")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--curve", type=Path, default=Path("docs/assets/loss.svg"))
    args = parser.parse_args()
    # A resumed run logs some steps again.
    logged = [json.loads(line) for line in args.log.read_text().splitlines()]
    entries = list({(entry["step"], "held_out" in entry): entry for entry in logged}.values())
    entries.sort(key=lambda entry: entry["step"])
    shipped, others, settings = (json.loads(path.read_text()) for path in (args.shipped, args.others, args.settings))
    args.curve.write_text(loss_curve(entries))
    (args.model / "README.md").write_text(card(entries, shipped, others, settings))


if __name__ == "__main__":
    main()
