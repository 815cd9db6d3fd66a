"""The main job: the study run into a folder, and the pages written beside it."""

from collections.abc import Callable
from pathlib import Path

from moe_lens.atlas.asked_knockouts import FOLDER, one_by_one
from moe_lens.atlas.pages import check_place, write_atlas
from moe_lens.checked import AnyModel, Positive
from moe_lens.data import Domains, Reading
from moe_lens.selection import Experts
from moe_lens.studies import Atlas
from moe_lens.studies import run as run_study
from moe_lens.studies.run_study import agreed

READING = Reading(tokens=4096, context=128)
"""How texts are read if nothing else is asked for: short windows, so that few tokens are of many sources."""
STUDY = "study"
"""The folder of the study in that of the pages."""


def run(
    model: AnyModel,
    domains: Domains,
    out: str | Path,
    *,
    study: Atlas | None = None,
    reading: Reading = READING,
    knock_out: Experts | None = None,
    name: str | None = None,
    batch_tokens: Positive | None = None,
    command: str | None = None,
    watch: Callable[[str, int], None] = lambda what, tokens: None,  # noqa: ARG005
    say: Callable[[str], None] = lambda line: None,  # noqa: ARG005
) -> Path:
    """Run the study `atlas`, or resume where it was interrupted, and write the pages; the path of the first.

    Args:
        model: A `HookedMoE`.
        domains: Texts in memory or corpora, each with a name of its own; or a dictionary `{name: texts}`.
        out: The folder: the study is saved in the folder `study` in it.
        study: With its settings.
        reading: How texts are read.
        knock_out: Experts to take out exactly, each by itself, beside the two most specialised ones of each layer and
            domain: on all texts, with controls. They can be asked for when the atlas is complete, too.
        name: What the model was loaded as.
        batch_tokens: Rows × columns that the model reads at once to begin with; see `studies.run`.
        command: For the record; the arguments of this process if not given.
        watch: Called with what is being read and how many tokens were, after every shard.
        say: Called with what there is to do, if that is known before.

    Raises:
        HookError: A layer of `knock_out` has no experts.
        InputError: The texts or the model cannot be worked with, there is no such expert, or the folder holds the atlas
            of something else.
    """
    how = {"reading": reading, "name": name, "batch_tokens": batch_tokens, "command": command}
    agreed(lambda: check_place(out))
    asked = one_by_one(model, knock_out)
    result = run_study(study or Atlas(), model, domains, out=Path(out) / STUDY, watch=watch, say=say, **how)
    for folder, each in asked.items():
        run_study(each, model, domains, out=Path(out) / FOLDER / folder, watch=watch, say=say, **how)
    return agreed(lambda: write_atlas(result, out))
