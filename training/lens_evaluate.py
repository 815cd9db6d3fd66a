"""Measure the TunedLens of the embedded model on held-out texts, beside the LogitLens; write its card and its curve.

python training/lens_evaluate.py --texts moe_lens/assets/domains --lens moe_lens/assets/tiny-deepseekmoe-lens

Every `*.jsonl` of each `--texts` folder is one file (fields text and source), of which the half of the sources that
nothing was chosen on is read. KL(final ‖ lens) in nats, mean over all tokens but the first of each passage; every lens
reads the layer's output, which the translators were trained on, and partial sums, which they were not.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from domains import FILES
from prepare import held_out

from moe_lens import HookedMoE, PartialSum
from moe_lens.lenses import Lens, LogitLens, TunedLens

SUMS = {
    "layer output": PartialSum(shared=True),
    "u + all routed experts": PartialSum(),
    "u + top expert": PartialSum(ranks=[0]),
    "u + last of six": PartialSum(ranks=[5]),
    "u alone": PartialSum(ranks=[]),
}
COLOURS = {"LogitLens": "#888888", "TunedLens": "#c2410c", "TunedLens of u": "#1d4ed8"}


def measure(lenses: dict[str, Lens], model: HookedMoE, passages: list[str], n_tokens: int) -> dict[str, Any]:
    """Mean KL by lens, sum and layer over the first passages that make up `n_tokens`; None for what does not exist."""
    sums = list(SUMS.values())
    totals = {name: torch.zeros(model.cfg.n_layers, len(sums), dtype=torch.float64) for name in lenses}
    tokens = 0
    for text in passages:
        if tokens >= n_tokens:
            break
        ids = model.to_tokens(text)[:, : model.cfg.n_ctx]
        if ids.shape[1] < 2:
            continue
        with torch.no_grad():
            _, cache = model.run_with_cache(ids, names_filter=LogitLens(model).hooks(sums=sums))
        tokens += ids.shape[1] - 1
        for name, lens in lenses.items():
            read = lens.decode(cache, sums, positions=range(1, ids.shape[1]), top=1)
            totals[name] += read.kl_final.double().sum((-1, -2))
    means = {name: (total / tokens).T.tolist() for name, total in totals.items()}
    plain = {name: [[None if x != x else round(x, 4) for x in row] for row in rows] for name, rows in means.items()}
    return {"tokens": tokens, "kl": {name: dict(zip(SUMS, rows, strict=True)) for name, rows in plain.items()}}


def mean(files: dict[str, Any], lens: str, which: str, layer: int) -> float | None:
    """Over files, each counting the same."""
    values = [file["kl"][lens][which][layer] for file in files.values()]
    return None if None in values else sum(values) / len(values)


def table(files: dict[str, Any], rows: list[tuple[str, str]], n_layers: int) -> str:
    """One row per sum and lens, one column per layer."""
    lines = ["| read | by | " + " | ".join(f"layer {layer}" for layer in range(n_layers)) + " |"]
    lines.append("|---" * (n_layers + 2) + "|")
    for which, lens in rows:
        values = [mean(files, lens, which, layer) for layer in range(n_layers)]
        shown = " | ".join("–" if value is None else f"{value:.3f}" for value in values)
        lines.append(f"| {which} | {lens} | {shown} |")
    return "\n".join(lines)


def worst(files: dict[str, Any], lens: str, which: str, layers: range) -> tuple[float, str, int]:
    """The largest ratio of a lens's KL to the LogitLens's, over files and layers; below 1, it is nearer everywhere."""
    return max(
        (file["kl"][lens][which][layer] / file["kl"]["LogitLens"][which][layer], name, layer)
        for name, file in files.items()
        for layer in layers
    )


def picture(files: dict[str, Any], n_layers: int, width: int = 720, height: int = 300) -> str:
    """Mean KL by layer: the layer's output on the left, u alone on the right."""
    panels = [
        ("layer output", ["LogitLens", "TunedLens"]),
        ("u alone", ["LogitLens", "TunedLens", "TunedLens of u"]),
    ]
    found = {
        (which, lens): [
            (layer, value) for layer in range(n_layers) if (value := mean(files, lens, which, layer)) is not None
        ]
        for which, lenses in panels
        for lens in lenses
    }
    top = max(value for points in found.values() for _, value in points)
    inner, bottom = (width - 120) / 2, height - 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        "<title>KL to the model's final distribution by layer, LogitLens and TunedLens</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for panel, (which, lenses) in enumerate(panels):
        left = 50 + panel * (inner + 40)
        for tick in range(int(top) + 1):
            y = bottom - tick / top * (bottom - 40)
            parts.append(f'<path d="M{left:.0f} {y:.1f}h{inner:.0f}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 6:.0f}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
        parts.append(f'<text x="{left:.0f}" y="20" font-size="13">{which}</text>')
        for layer in range(n_layers):
            x = left + layer / (n_layers - 1) * inner
            parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{layer}</text>')
        for number, lens in enumerate(lenses):
            points = [
                (left + layer / (n_layers - 1) * inner, bottom - value / top * (bottom - 40))
                for layer, value in found[which, lens]
            ]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline fill="none" stroke="{COLOURS[lens]}" stroke-width="2" points="{line}"/>')
            x, y = left + inner - 100, 40 + 15 * number
            parts.append(f'<text x="{x:.0f}" y="{y}" fill="{COLOURS[lens]}">{lens}</text>')
    parts.append(
        f'<text x="{width // 2}" y="{height - 10}" text-anchor="middle">layer; nats a token, KL(final ‖ lens), mean of '
        "five held-out domains</text></svg>"
    )
    return "\n".join(parts) + "\n"


def card(lens: TunedLens, shipped: dict[str, Any], others: dict[str, Any], note: str) -> str:
    """README.md of the lens."""
    n_layers, tuning = lens.model.cfg.n_layers, lens.tuning
    assert tuning
    everywhere = {**shipped, **others}
    inner = range(n_layers - 1)
    ratio, name, layer = worst(everywhere, "TunedLens", "layer output", inner)
    ratio_mid, name_mid, layer_mid = worst(everywhere, "TunedLens of u", "u alone", range(n_layers))
    both = [("layer output", "LogitLens"), ("layer output", "TunedLens"), ("u alone", "LogitLens")]
    both += [("u alone", "TunedLens of u")]
    unseen = [(which, by) for which in list(SUMS)[1:] for by in COLOURS]
    count = sum(file["tokens"] for file in shipped.values())
    return f"""# The TunedLens of tiny-deepseekmoe

One affine translator for the stream that leaves each layer (`resid_post`) but the last, and one for the stream between
attention and experts (u, `resid_mid`) of each layer; float32. `TunedLens.from_pretrained("tiny-deepseekmoe")` loads it.

## How good it is

KL(final ‖ lens), nats a token, on held-out texts: mean of the five shipped domains ({count:,} tokens, sources on
which no choice was based).

{table(shipped, both, n_layers)}

The output of layer {n_layers - 1} is what the model itself reads: both lenses are exact there. Everywhere else the
TunedLens is nearer to the final prediction than the LogitLens, in each of the {len(everywhere)} files (the shipped ones
and {", ".join(sorted(others))}): its KL is at most {ratio:.2f} of the LogitLens's at a layer's output (layer
{layer}, {name}), and at most {ratio_mid:.2f} at u (layer {layer_mid}, {name_mid}).

## On partial sums, which it was not trained on

{table(shipped, unseen, n_layers)}

Layer 0 is dense: its MLP takes the place of all experts, and there are no sums of some experts. The translators of a
layer's output are trained for sums near it, those of u for u alone; which of the two is better in between differs
by layer.

## Training

```sh
python training/lens.py --folder training/run --out moe_lens/assets/tiny-deepseekmoe-lens --steps {tuning.steps}
python training/lens_evaluate.py --texts moe_lens/assets/domains --others TEXTS/eval
```

{tuning.tokens:,} tokens of the model's own training mixture, windows of {tuning.context}; Adam, {tuning.steps} steps of
{tuning.batch} windows, lr {tuning.lr}, seed {tuning.seed}, one CPU thread, float32. {note}

The lens has the model's limits: it says what a TunedLens does, not how large models behave. Licence: MIT.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="the shipped domains")
    parser.add_argument("--others", type=Path, default=None, help="held-out files that cannot be shipped")
    parser.add_argument("--lens", type=Path, default=Path("moe_lens/assets/tiny-deepseekmoe-lens"))
    parser.add_argument("--tokens", type=int, default=2000, help="of each shipped file; half of it of the others")
    parser.add_argument("--results", type=Path, default=Path("training/lens_results.json"))
    parser.add_argument("--curve", type=Path, default=Path("docs/assets/tuned-lens.svg"))
    parser.add_argument("--note", default="", help="what else is to be said of the training")
    parser.add_argument("--drawn", action="store_true", help="measure nothing: write card and curve from the results")
    args = parser.parse_args()
    model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
    tuned = TunedLens.from_pretrained(args.lens, model)
    assert tuned.mid
    lenses: dict[str, Lens] = {"LogitLens": LogitLens(model), "TunedLens": tuned, "TunedLens of u": tuned.mid}
    found: dict[str, Any] = {"shipped": {}, "others": {}}
    if args.drawn:
        found = json.loads(args.results.read_text())
    else:
        for kind, folder, count in (("shipped", args.texts, args.tokens), ("others", args.others, args.tokens // 2)):
            for path in sorted(folder.glob("*.jsonl")) if folder else []:
                if kind == "others" and path.stem in FILES.values():
                    continue  # what the shipped files were made of
                passages = [row["text"] for row in held_out(path, "b")]
                found[kind][path.stem] = measure(lenses, model, passages, count)
                print(path.stem, found[kind][path.stem]["tokens"], flush=True)
        args.results.write_text(json.dumps(found, indent=1) + "\n")
    args.curve.write_text(picture(found["shipped"], model.cfg.n_layers))
    (args.lens / "README.md").write_text(card(tuned, found["shipped"], found["others"], args.note))


if __name__ == "__main__":
    main()
