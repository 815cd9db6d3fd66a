"""Draw the pictures of docs/gallery.md, each from the page's own lines, and put them below these. Takes Chromium.

    .venv/bin/python scripts/gallery.py

Drawings of texts are HTML that a notebook shows, and have no picture.
"""

import re
from pathlib import Path
from typing import Any

from plotly.graph_objects import Figure

from moe_lens.viz import save_figure

PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"
PICTURES = PAGE.parent / "assets" / "gallery"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n!\[[^\n]*\n)*", re.DOTALL | re.MULTILINE)
WIDTH = 760
"""Pixels: of the text of the page, or a little more."""
WIDER = {"lens_table": 1280}


def assigned(block: str, values: dict[str, Any]) -> list[str]:
    """Names that a block of the page gives to figures, in its order."""
    names = re.findall(r"^(\w+) = ", block, re.MULTILINE)
    return [name for name in names if isinstance(values.get(name), Figure)]


def main() -> None:
    """Run the page, and write its pictures and their places."""
    text, values = PAGE.read_text(encoding="utf-8"), {}
    exec(compile("\n".join(block[1] for block in BLOCK.finditer(text)), PAGE.name, "exec"), values)
    PICTURES.mkdir(exist_ok=True)
    for old in PICTURES.iterdir():
        old.unlink()

    def with_pictures(block: re.Match[str]) -> str:
        shown = ""
        for name in assigned(block[1], values):
            save_figure(values[name], PICTURES / f"{name}.png", width=WIDER.get(name, WIDTH))
            shown += f"\n![{name}](assets/gallery/{name}.png)\n"
        return f"```python\n{block[1]}```\n{shown}"

    PAGE.write_text(BLOCK.sub(with_pictures, text), encoding="utf-8")


if __name__ == "__main__":
    main()
