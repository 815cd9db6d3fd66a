"""What mkdocs does before it renders a page: `{{ hooks }}` becomes a table made from the module that spells the names.

A page may also take in a Markdown file of the repository, `{{ include PATH }}`: its front matter is dropped, and links
between such files lead to the pages that show them. An atlas that `make atlas` has written becomes a part of the site,
and `{{ atlas }}` a link to it.
"""

# The documentation tools are an extra of their own; types are checked without them too.
# pyright: reportMissingImports=false

import importlib.util
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ATLAS = "moe-lens-atlas"  # where `make atlas` writes


def load(path: Path) -> Any:
    """A module by its file, so that pages can be built without importing the whole package, and torch with it."""
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


names = load(ROOT / "moe_lens" / "names.py")
TABLES = {
    "residual": ("blocks.{layer}.", names.RESIDUAL_HOOKS),
    "mlp": ("blocks.{layer}.mlp.", names.MLP_HOOKS),
    "expert": ("blocks.{layer}.mlp.experts.{expert}.", names.EXPERT_HOOKS),
}
LINKS = {"LICENSE": None, "CHANGELOG.md": "changelog.md", "training/README.md": "embedded-model.md"}


def table(prefix: str, hooks: tuple[Any, ...]) -> str:
    """A Markdown table, one row a hook, in the order of the module."""
    lines = [f"| under `{prefix}` | shape | what it is, and what an edit does |", "|---|---|---|"]
    for hook in hooks:
        cells = (f"`{hook.name}`", hook.shape, hook.edit)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def include(path: str) -> str:
    """The text of a Markdown file of the repository, without front matter, its links led to pages."""
    file = ROOT / path
    if not file.is_file():
        raise PluginError(f"a page includes {path}, and there is no such file")
    text = re.sub(r"\A---\n.*?\n---\n", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)

    def led(link: re.Match[str]) -> str:
        label, target = link[1], link[2]
        if re.match(r"[a-z]+:|#", target):
            return link[0]
        inside = (file.parent / target).resolve().relative_to(ROOT).as_posix()
        page = LINKS.get(inside, inside.removeprefix("docs/") if inside.startswith("docs/") else None)
        return f"[{label}]({page})" if page else label

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", led, text)


def atlas() -> str:
    """Where the site has the atlas of the embedded model, or how it would."""
    if (ROOT / ATLAS / "index.html").is_file():
        return f"**[Open the atlas of the embedded model]({ATLAS}/index.html)**, written by `make atlas`."
    return (
        "`make atlas` writes that of the embedded model; a site that `make docs` builds after it has a link to it here."
    )


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs when it has found its files: the pages of the atlas join them, its study does not."""
    for path in sorted((ROOT / ATLAS).rglob("*")):
        inside = path.relative_to(ROOT)
        if path.is_file() and inside.parts[1] != "study":
            files.append(File(inside.as_posix(), str(ROOT), config.site_dir, use_directory_urls=False))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Called by mkdocs for every page."""
    markdown = markdown.replace("{{ atlas }}", atlas())
    markdown = re.sub(r"\{\{ hooks (\w+) \}\}", lambda found: table(*TABLES[found[1]]), markdown)
    return re.sub(r"\{\{ include (\S+) \}\}", lambda found: include(found[1]), markdown)
