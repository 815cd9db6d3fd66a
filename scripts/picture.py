"""Draw the README's picture: which experts of the embedded model serve which domain.

    .venv/bin/python scripts/picture.py

A row is a domain, a block of columns a layer, a column one of its experts; the darker, the larger the share of the
domain's tokens that have the expert among their six. Within a layer, experts are ordered by the domain that uses them
most. SVG of our own making: no browser is needed to draw it, and it is small.
"""

from pathlib import Path

import torch

from moe_lens import HookedMoE
from moe_lens.data import Reading, embedded_domains
from moe_lens.stats import RoutingResult
from moe_lens.studies import RoutingStudy, run
from moe_lens.viz.style import FONT, GRID, INK, MUTED, PALETTE

TOKENS = 8192
CELL, ROW, GAP, LEFT, TOP = 2.6, 34, 10, 78, 58
TARGET = Path(__file__).parents[1] / "docs" / "assets" / "specialisation.svg"


def ordered(shares: torch.Tensor) -> torch.Tensor:
    """Experts of a layer ([domain, expert]), grouped by the domain that uses each most, the most used first."""
    top, domain = shares.max(0)
    return (domain * 2 - top).argsort()


def draw(shares: torch.Tensor, domains: list[str], layers: tuple[int, ...], baseline: float) -> str:
    """SVG of [domain, layer, expert] shares."""
    n_experts = shares.shape[-1]
    block = n_experts * CELL + GAP
    width, height = LEFT + block * len(layers), TOP + (ROW + 4) * len(domains) + 28
    full = shares.max().item()
    text = f'font-family="{FONT}" fill="{INK}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img">',
        "<title>Which experts of tiny-deepseekmoe serve which domain</title>",
        f'<rect width="100%" height="100%" fill="white"/><text x="{LEFT}" y="20" font-size="14" {text}>'
        "Which of the 64 experts of each layer serve which domain (tiny-deepseekmoe, held-out texts)</text>",
    ]
    for column, layer in enumerate(layers):
        x = LEFT + column * block
        parts.append(f'<text x="{x:.1f}" y="{TOP - 10}" font-size="12" {text}>layer {layer}</text>')
        for row, domain in enumerate(domains):
            y = TOP + row * (ROW + 4)
            if column == 0:
                at = f'x="{LEFT - 8}" y="{y + ROW / 2 + 4}"'
                parts.append(f'<text {at} font-size="13" text-anchor="end" {text}>{domain}</text>')
            parts.append(f'<g fill="{PALETTE[row % len(PALETTE)]}">')
            for place, expert in enumerate(ordered(shares[:, column]).tolist()):
                share = shares[row, column, expert].item()
                if share >= 0.005:
                    parts.append(
                        f'<rect x="{x + place * CELL:.1f}" y="{y}" width="{CELL}" height="{ROW}" '
                        f'opacity="{(share / full) ** 0.6:.2f}"/>'
                    )
            parts.append("</g>")
            frame = f'x="{x:.1f}" y="{y}" width="{n_experts * CELL:.1f}" height="{ROW}"'
            parts.append(f'<rect {frame} fill="none" stroke="{GRID}"/>')
    parts.append(
        f'<text x="{LEFT}" y="{height - 8}" font-size="11" font-family="{FONT}" fill="{MUTED}">'
        f"darkest: {full:.0%} of the domain's tokens have the expert among their six; evenly spread it would be "
        f"{baseline:.1%}</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Measure and draw."""
    model = HookedMoE.from_pretrained("tiny-deepseekmoe")
    results = run(RoutingStudy(), model, embedded_domains(), reading=Reading(tokens=TOKENS)).results
    counts = [of["model routing"] for of in results.values()]
    shares = torch.stack([of.specialisation for of in counts if isinstance(of, RoutingResult)])
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(draw(shares, list(results), model.moe_layers, model.top_k / model.n_experts), encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
