"""The main job: the studies of the paper run into one folder, and the page that is drawn from it."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from moe_lens.checked import AnyModel, Positive
from moe_lens.data import Domains, Reading, as_domains
from moe_lens.errors import UnfitError, UnsupportedModelError
from moe_lens.manifest import studies_in
from moe_lens.report.report_files import REPORT, check_place
from moe_lens.report.report_page import write_page
from moe_lens.stats.observation import check_packing
from moe_lens.studies import LensStudy, Localisation, PruningStudy, RoutingStudy, SingleExpertStudy, Study
from moe_lens.studies import run as run_study
from moe_lens.studies.forecast import Forecast
from moe_lens.studies.run_study import agreed, pinned

STUDIES: Mapping[str, Study] = {
    "routing": RoutingStudy(nulls=True),
    "single-expert": SingleExpertStudy(treatments=("dropped", "random", "replaced")),
    "lens": LensStudy(),
}
"""By the folder in the report's folder that each is saved in."""

OF_HALVES: Mapping[str, Study] = {"pruning": PruningStudy(), "localisation": Localisation(controls="primary")}
"""Those that take two sources of every domain, and many passes: they read a quarter as much, and are left out where
they cannot be made."""

READING = Reading(tokens=2048, context=128)
"""How texts are read if nothing else is asked for: short windows, so that few tokens are of many sources."""

SECOND = ("routing", "pruning", "localisation")
"""What a second process runs, where there is one: about as much work as the others."""

Part = Literal["all", "second"]

SHORT = 32
"""Tokens of a window for `OF_HALVES`, at most."""


def run(
    model: AnyModel,
    domains: Domains,
    out: str | Path,
    *,
    reading: Reading = READING,
    name: str | None = None,
    batch_tokens: Positive | None = None,
    command: str | None = None,
    part: Part = "all",
    wait: Callable[[], None] | None = None,
    watch: Callable[[str, int], None] = lambda what, tokens: None,  # noqa: ARG005
    say: Callable[[str], None] = lambda line: None,  # noqa: ARG005
) -> Path:
    """Run the five studies of the report, or resume where they were interrupted, and write the page; its path.

    The studies are those of `STUDIES`, and of `OF_HALVES` where the texts have sources enough.

    Args:
        model: A `HookedMoE`.
        domains: Texts in memory or corpora, each with a name of its own; or a dictionary `{name: texts}`.
        out: The folder: each study has one of its own in it, and the page stands beside them.
        reading: How texts are read.
        name: What the model was loaded as.
        batch_tokens: Rows × columns that the model reads at once to begin with; see `studies.run`.
        command: For the record; the arguments of this process if not given.
        part: "second" runs those of `SECOND` alone and writes no page: what another process calls meanwhile.
        wait: Called when all but those of `SECOND` are done, if there is another process: what that has finished by
            its end is not run again.
        watch: Called with what is being read and how many tokens were, after every shard.
        say: Called with what there is to do, before anything is done, and now and then with how long it will take.

    Raises:
        InputError: The texts or the model cannot be worked with, or the folder holds the report of something else.
    """
    for study in STUDIES.values():
        study.check(model)
    if reading.packed:
        check_packing(model)
    agreed(lambda: check_place(out, REPORT))
    domains = pinned(as_domains(domains))
    few = None if reading.tokens is None else max(2, reading.tokens // 4)
    short = replace(reading, tokens=few, context=min(reading.context, SHORT))
    every = [(folder, study, reading) for folder, study in STUDIES.items()]
    halved = [(folder, study, short) for folder, study in OF_HALVES.items()]
    forecast = Forecast(model, [*every, *halved], [domain.name for domain in domains], say)
    how = {"name": name, "batch_tokens": batch_tokens, "command": command, "forecast": forecast}

    def go(folder: str, study: Study, reading: Reading) -> None:
        def watch_one(what: str, tokens: int) -> None:
            watch(f"{folder}, {what}", tokens)

        run_study(study, model, domains, out=Path(out) / folder, reading=reading, watch=watch_one, **how)

    jobs = {each[0]: each for each in (*every, *halved)}
    others = [folder for folder in jobs if folder not in SECOND]
    meanwhile = [folder for folder in jobs if folder in SECOND]
    order = meanwhile if part == "second" else list(jobs) if wait is None else [*others, *meanwhile]
    for folder in order:
        if wait is not None and folder in meanwhile[:1]:
            wait()
        unfit = (UnfitError, UnsupportedModelError) if folder in OF_HALVES else ()
        with suppress(*unfit):  # the verdict says what was not run
            go(*jobs[folder])
    if part == "second":
        return Path(out)
    return agreed(lambda: write_page(studies_in(out), out))
