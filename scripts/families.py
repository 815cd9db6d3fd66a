"""Run every check of tests/matrix on every family and write docs/families.md; `--check` only compares.

With names of model types, those alone are run, and nothing is written. Families that are not to be had on the installed
transformers are left out. Also the end of `make test-latest`: which checks fail on the installed versions.
"""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from moe_lens.errors import UntestedVersionWarning  # noqa: E402

warnings.filterwarnings("ignore", category=UntestedVersionWarning)  # newer releases are what this is also run on

from moe_lens.model.families.family import dotted  # noqa: E402
from moe_lens.model.families.refusals import ABSENT, REFUSED  # noqa: E402
from moe_lens.model.families.table import FAMILIES, here  # noqa: E402
from moe_lens.model.hf_compat import NEWEST, OLDEST  # noqa: E402
from moe_lens.model.loading.formats.view import FORMATS, UNREAD  # noqa: E402

DENSE = {"bamba"}
"""Model types whose source speaks of experts, and which have none."""

Outcome = Mapping[str, Mapping[str, str]]
"""By model type and check: empty where it passes, else what failed."""

FOUND = {
    "`model.gguf`": "`--model model.gguf`, or `gguf_file=` with a folder or a name on the hub: read, with its config "
    "and tokenizer, if transformers knows its architecture, else refused by name; join a file in several parts first",
    "weights in `.bin`": "refused, with the command that converts them; or read with `use_safetensors=False`",
    "names with a prefix `_orig_mod.`, `module.`, `base_model.model.`, … of a training framework": "the prefix is "
    "removed, and a message says so",
    "other names of tensors": "pass `key_mapping={pattern: replacement}`, as in transformers",
    "`inv_freq` tables, or an unembedding that is the embedding": "ignored; for DeepSeekMoE, an unembedding that "
    "differs from the embedding to which it is tied is refused",
    "a PEFT adapter alone": "refused; the error names its base model",
    "a PEFT adapter beside weights": "refused: merge it first (`merge_and_unload`)",
    "a tokenizer with code of its own": '`trust_remote_code="tokenizer"` or `--trust-tokenizer-code` runs this code '
    "and no other",
    "a tokenizer that cannot be read": "the model is loaded without it, and a message says why",
    "more layers than you need": "`first_n_layers=n` loads the first n (transformers' `num_hidden_layers=n`, too, "
    "where a config has that); layers for multi-token prediction are left out",
}
"""What lies in folders of checkpoints, and what becomes of it."""

HEAD = """# Families

{green} model types of transformers pass every check below{partly}. The hook table is the same for all of them. This
page is written by `scripts/families.py` from a run of the checks on a tiny random model of every model type
(`tests/matrix`); CI runs them too.

| check | what holds |
|---|---|
{laws}

Where the adapter is TransformerLens's, there are hooks inside attention, on scores, patterns, and rotated queries and
keys. Reading one of them selects eager attention; `run_with_cache` without a filter reads them all. Logits then differ
by at most 1e-5 of the largest logit in float32. In bfloat16 they differ visibly (on the embedded model by up to 0.6,
where the largest logit is 21), and sometimes a different expert is chosen. If you name the hooks that you cache, and
these are not among them, no bit changes.

`moe-lens models` prints the table of families; `moe-lens info NAME_OR_PATH` describes one model, from its config
alone.

Releases of transformers from {oldest} to {newest} are tested. Where a family needs a newer or an older one, the table
says so, and other releases are refused. On a newer transformers, moe_lens warns once (`UntestedVersionWarning`) and
relies on the self-check that runs when a model is wrapped. TransformerLens must be of one minor version, 4.3, because
parts of its internals are replaced. `make test-latest` shows what newer versions break.

## Supported

**Adapter**: with *TransformerLens*, its hooks inside attention exist too; with *ours*, there are hooks on the inputs
and outputs of the parts of the model (embedding, residual stream, norms, attention or the state-space or convolution
layer in its place, MLP) and on everything inside the experts. **Factors**: where a family multiplies the experts'
outputs, or what a layer adds, by a factor, hooks show the product, which is what is added to the residual stream.
**Several streams**: where there is no `hook_resid_pre`, no one tensor says what a layer reads. `stop_at_layer` returns
what the layer is given (all streams, or the newest in Inkling 2), and `start_at_layer`, patching, tracing and sweeps
are refused.
**Blocks of their own**: DBRX, JetMoE, Llama 4, LongCat-Flash and Step 3.7 do not use transformers' experts interface.
Their experts are computed with the same products in the same order as in transformers, so that the first check holds
for them too. (The rounding of a matrix product may depend on its number of rows, so each expert of Llama 4 is
multiplied with all tokens, as in transformers.)

| model type | how experts are selected and weighted | shared experts | adapter | notes |
|---|---|---|---|---|
{families}

Of a multimodal model the text decoder is hooked; images are processed by transformers. *No packed windows*:
transformers lets texts that are packed into one row reach one another, so `--packed` is refused.

## Layers that differ

All layers with experts must have the same number of experts and of active experts per token; a model in which these
differ is refused. Only two model types can differ: `hunyuan_v1_moe`, whose `moe_topk` can be a list by layer, and the
image encoder of `dots3_note`.

## Checkpoints as they lie on disk

Matrices that are stored packed are unpacked one at a time while they are read, in float32, and kept in the requested
dtype. This needs neither the format's own library (torchao's excepted) nor a GPU. `quantize="stored"` keeps the stored
bits in memory instead, with the same numbers, and `quantize="nf4"` (or `"int8"`) packs the numbers anew
([Experts in 4 and 8 bits](quantised.md)). A model that was unpacked is saved unpacked.

| `quant_method` | what happens |
|---|---|
{formats}

A matrix without its scales, or with scales of a wrong shape, raises an error that names it; a format that is not in the
table is refused. Scales of activations are ignored: activations are computed in the model's dtype.

| what the folder contains | what happens |
|---|---|
{found}

`from_hf` wraps a model that transformers itself loaded with bitsandbytes or in FP8: its linear layers stay packed, and
it cannot be saved. If transformers replaced the experts by other modules, the model is refused.

## Refused

A model type that is not in the table above is refused. The following have experts, but the hooks would show wrong
values, or none:

| model type | why |
|---|---|
{refused}

vLLM's list of architectures (`registry.py`) names 40 kinds of text models with experts. Thirty-two are in the table
of supported types, one (Mistral Large 3) was not tried, and the others have no code in transformers and are refused by
name:
{absent}.
"""


def has_experts(model_type: str) -> bool:
    """Whether a model type of transformers has experts: in its own source, or in the text part that it takes in."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

    if model_type in DENSE:
        return False
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
    if any("experts" in file.read_text(encoding="utf-8") for file in folder.glob("modeling_*.py")):
        return True
    with contextlib.suppress(Exception):  # a config without defaults, or with two texts, names no text part
        return CONFIG_MAPPING[model_type]().get_text_config().model_type in {*FAMILIES, *REFUSED}
    return False


def unlisted() -> list[str]:
    """Model types of transformers that write text, have experts, and are in neither table."""
    from transformers.models.auto import modeling_auto

    heads = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    listed = set().union(*(getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in heads))
    return sorted(filter(has_experts, listed - {*FAMILIES, *REFUSED}))


def cell(text: str) -> str:
    """Text that can stand in a table."""
    return text.replace("|", "\\|")


def page(outcome: Outcome, laws: Mapping[str, str]) -> str:
    """The page for an outcome; `laws` describes each check. Families without one need another transformers."""
    rows, green = [], 0
    for name, family in sorted(FAMILIES.items()):
        failed = [law for law, error in outcome.get(name, {}).items() if error]
        green += not failed
        notes = [note for note in (family.releases(), family.note) if note]
        notes += ["no packed windows"] if family.mixes_packed else []
        notes += [f"**fails: {', '.join(failed)}**"] if failed else []
        adapter = "ours" if family.layout else "TransformerLens"
        shared = "gated" if family.shared_gate else "yes" if family.shared else ""
        rows.append(f"| `{name}` | {cell(family.rule())} | {shared} | {adapter} | {cell('; '.join(notes))} |")
    left = len(FAMILIES) - green
    return HEAD.format(
        green=green,
        partly=f"; {left} pass only some of them" if left else "",
        oldest=dotted(OLDEST),
        newest=dotted(NEWEST),
        laws="\n".join(f"| {law} | {cell(text)} |" for law, text in laws.items()),
        families="\n".join(rows),
        formats=formats(),
        found="\n".join(f"| {what} | {cell(then)} |" for what, then in FOUND.items()),
        absent=", ".join(f"{known} (`{name}`)" for name, known in ABSENT.items()),
        refused="\n".join(f"| `{name}` | {cell(why)} |" for name, why in sorted(REFUSED.items())),
    )


def formats() -> str:
    """The rows of packed formats, read and refused."""
    read = [f"| `{name}` | read: {cell(of.stored)} |" for name, of in sorted(FORMATS.items())]
    return "\n".join([*read, *(f"| `{name}` | refused: {cell(why)} |" for name, why in sorted(UNREAD.items()))])


def obeyed(
    names: Iterable[str], case_of: Callable[[str], Any], laws: Mapping[str, Callable[[Any], None]]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Every check on every family, one after the other; whatever breaks is reported."""
    for name in names:
        try:
            case = case_of(name)
        except Exception as error:  # noqa: BLE001
            yield name, dict.fromkeys(laws, described(error))
            continue
        found = {}
        for law, holds in laws.items():
            try:
                holds(case)
                found[law] = ""
            except Exception as error:  # noqa: BLE001
                found[law] = described(error)
        yield name, found


def described(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def failures(name: str, laws: Mapping[str, str]) -> str:
    """What failed of one family, in one line; empty if nothing did."""
    failed = {law: error for law, error in laws.items() if error}
    if len(set(failed.values())) == 1 and len(failed) == len(laws):
        return f"{name}: every check: {next(iter(failed.values()))}"
    return f"{name}: " + "; ".join(f"{law}: {error}" for law, error in failed.items()) if failed else ""


def report(outcome: Outcome, new: Iterable[str]) -> list[str]:
    """What broke, a line for each family and one for model types that nobody has decided on."""
    lines = [line for name, laws in outcome.items() if (line := failures(name, laws))]
    unknown = ", ".join(new)
    return lines + ([f"have experts and are neither supported nor refused: {unknown}"] if unknown else [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and write or compare; 1 if anything broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare the page with the outcome and write nothing")
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="these alone; nothing is written")
    asked = parser.parse_args(arguments)
    if absent := sorted(set(asked.model_types) - set(here())):
        parser.error(f"{', '.join(absent)}: not supported on transformers {version('transformers')}")
    warnings.simplefilter("ignore")
    import torch
    import transformers

    from tests.matrix.laws import LAWS, WORDS, Case

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    outcome = {}
    for name, laws in obeyed(asked.model_types or here(), Case, LAWS):
        outcome[name] = laws
        print(failures(name, laws) or f"{name}: every check passes", flush=True)
    broken = report(outcome, [] if asked.model_types else unlisted())
    installed = ", ".join(f"{name} {version(name)}" for name in ("transformers", "transformer-lens"))
    print(f"\n{installed}: " + ("nothing broke" if not broken else f"{len(broken)} broken"), *broken, sep="\n  ")
    if asked.model_types:
        return int(bool(broken))
    text = page(outcome, WORDS)
    if not asked.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not broken and text != PAGE.read_text(encoding="utf-8"):
        print(f"{PAGE} is out of step with the outcome: run scripts/families.py")
        return 1
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
