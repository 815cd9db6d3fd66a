"""Run every family against every law, and write docs/families.md from the outcome; `--check` only compares.

Also what `make test-latest` ends with: which laws fail on the versions that are installed.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from moe_lens.model.families import FAMILIES  # noqa: E402
from moe_lens.model.refusals import REFUSED  # noqa: E402

DENSE = {"bamba", "gemma4_unified", "gemma4_unified_text", "qwen3_5", "qwen3_5_text", "youtu"}
"""Model types whose source speaks of experts, and which have none."""

Outcome = Mapping[str, Mapping[str, str]]
"""By model type and law: empty where the law holds, else what failed."""

HEAD = """# Families

{green} model types of transformers obey every law below; {partly}. The hook table is the same for all of them.
This page is written by `scripts/families.py` from a run of the laws on tiny random models of every model type
(`tests/matrix`), which CI runs too.

| law | what holds |
|---|---|
{laws}

`moe-lens models` prints the table on the command line; `moe-lens info NAME_OR_PATH` says what one model is, from its
config alone.

## Supported

**Adapter**: *TransformerLens* gives all hooks of its own inside attention too; *ours* hooks the boundaries of a layer's
parts: embedding, residual stream, norms, attention (or the state-space or convolution layer in its place), MLP, and
everything inside the experts. **Factors**: where a family multiplies after the experts, or multiplies what a layer
adds, hooks show the product, which is what the residual stream gets.

| model type | experts are chosen and weighed | shared experts | adapter | particular |
|---|---|---|---|---|
{families}

A multimodal model is wrapped with its text part: hooks are those of the decoder, and images go through transformers.

## Quantised experts

Experts in MXFP4, FP8 or bitsandbytes formats are other modules, on which hooks would not fire: such a model is refused.
Dequantise it while loading, where transformers can:

```python
from transformers import FineGrainedFP8Config, Mxfp4Config

model = HookedMoE.from_pretrained("openai/gpt-oss-20b", quantization_config=Mxfp4Config(dequantize=True))
```

## Refused

A model type that is not in the table is refused by name. These have experts, and are refused because hooks would not be
true there:

| model type | why |
|---|---|
{refused}
"""


def unlisted() -> list[str]:
    """Model types of transformers that have experts, by their source, and are in neither table."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    listed = {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    listed |= {*modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    found = []
    for model_type in listed - {*FAMILIES, *REFUSED, *DENSE}:
        folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
        sources = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
        if "use_experts_implementation" in sources or "num_experts" in sources:
            found.append(model_type)
    return sorted(found)


def cell(text: str) -> str:
    """Text that can stand in a table."""
    return text.replace("|", "\\|")


def page(outcome: Outcome, laws: Mapping[str, str]) -> str:
    """The page for an outcome; `laws` says what each law is."""
    rows, green = [], 0
    for name, family in sorted(FAMILIES.items()):
        failed = [law for law, error in outcome[name].items() if error]
        green += not failed
        notes = [family.note] if family.note else []
        notes += [f"**fails: {', '.join(failed)}**"] if failed else []
        adapter = "ours" if family.layout else "TransformerLens"
        shared = "gated" if family.shared_gate else "yes" if family.shared else ""
        rows.append(f"| `{name}` | {cell(family.rule())} | {shared} | {adapter} | {cell('; '.join(notes))} |")
    left = len(FAMILIES) - green
    return HEAD.format(
        green=green,
        partly=f"{left} obey some of them" if left else "none obeys only some",
        laws="\n".join(f"| {law} | {cell(text)} |" for law, text in laws.items()),
        families="\n".join(rows),
        refused="\n".join(f"| `{name}` | {cell(why)} |" for name, why in sorted(REFUSED.items())),
    )


def run() -> Outcome:
    """Every family against every law."""
    import torch
    import transformers

    from tests.matrix.laws import LAWS, Case

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    outcome: dict[str, dict[str, str]] = {}
    for name in sorted(FAMILIES):
        try:
            case = Case(name)
        except Exception as error:  # noqa: BLE001  # whatever breaks is what this is to find
            outcome[name] = dict.fromkeys(LAWS, f"{type(error).__name__}: {error}")
        else:
            outcome[name] = {}
            for law, holds in LAWS.items():
                try:
                    holds(case)
                    outcome[name][law] = ""
                except Exception as error:  # noqa: BLE001
                    outcome[name][law] = f"{type(error).__name__}: {error}"
        failed = {law: error for law, error in outcome[name].items() if error}
        print(f"{name}: " + ("; ".join(f"{law}: {error}" for law, error in failed.items()) or "every law holds"))
    return outcome


def main() -> int:
    """Run, and write or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare the page with the outcome and write nothing")
    check = parser.parse_args().check
    warnings.simplefilter("ignore")
    from tests.matrix.laws import WORDS

    outcome = run()
    text = page(outcome, WORDS)
    failures = sum(bool(error) for laws in outcome.values() for error in laws.values())
    installed = ", ".join(f"{name} {version(name)}" for name in ("transformers", "transformer-lens"))
    print(f"{installed}: {failures} failures")
    if new := unlisted():
        print(f"model types that have experts and are neither supported nor refused: {', '.join(new)}")
        failures += len(new)
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif text != PAGE.read_text(encoding="utf-8"):
        print(f"{PAGE} is out of step with the outcome")
        return 1
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
