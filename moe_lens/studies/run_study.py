"""Running a study: domains read shard by shard, progress kept, work shared among processes, a frozen result at the end.

After every shard the accumulators are saved: a study that was interrupted, in whatever way, goes on from there, and as
it then adds the same numbers in the same order, ends with the same result.
"""

import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_lens import distributed
from moe_lens.checked import AnyModel, Positive
from moe_lens.data import Corpus, Domain, Domains, Reading, Shard, as_domains, batch_windows, shards
from moe_lens.errors import InputError, UnfitError, UnsupportedModelError
from moe_lens.model.loading import batch_sizes
from moe_lens.model.loading.dispatch import places
from moe_lens.stats.observation import check_packing
from moe_lens.studies.batch_halving import Halving
from moe_lens.studies.forecast import Forecast
from moe_lens.studies.model_facts import model_facts
from moe_lens.studies.study import TEXTS, Gathered, Study
from moe_lens.studies.study_folder import StudyFolder
from moe_lens.studies.study_result import StudyResult
from moe_lens.studies.texts_read import TextStats


def run(
    study: Study,
    model: AnyModel,
    domains: Domains,
    *,
    reading: Reading | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    batch_tokens: Positive | None = None,
    command: str | None = None,
    watch: Callable[[str, int], None] = lambda what, tokens: None,  # noqa: ARG005
    say: Callable[[str], None] = lambda line: None,  # noqa: ARG005
    forecast: Forecast | None = None,
) -> StudyResult:
    """Run a study, or resume an interrupted one.

    Under `torch.distributed` each process reads its share and all return the same result; the first one writes it.

    Args:
        study: Which.
        model: A `HookedMoE`.
        domains: Texts in memory or corpora, each with a name of its own; or a dictionary `{name: texts}`.
        reading: How texts are read.
        out: The folder that will hold the result; progress is kept beside it. None: nothing is written.
        name: What the model was loaded as.
        batch_tokens: Rows × columns that the model reads at once to begin with; halved where memory runs out. 2,048 if
            not given, and 8,192 where parameters are read from disk in every pass.
        command: For the record; the arguments of this process if not given.
        watch: Called with what is being read and how many tokens were, after every shard.
        say: Called with what there is to do, before anything is done, and now and then with how long it will take.
        forecast: Of this study among others, in folders of one folder; it then says so itself.

    Raises:
        InputError: The texts, the settings or the folder cannot be worked with.
    """
    domains = as_domains(domains)
    study.check(model)
    reading = study.read_as(Reading() if reading is None else reading)
    if reading.packed:
        check_packing(model)
    domains = pinned(domains)
    plan = {
        "study": study.name,
        "settings": study.settings(),
        "reading": vars(reading),
        "model": model_facts(model, name or str(model.cfg.model_name), saved=out is not None),
        "domains": [{"name": domain.name, **domain.identity} for domain in domains],
        "processes": distributed.world_size(),
    }
    folder = None if out is None else StudyFolder(Path(out), plan)
    if folder is not None and out is not None:
        if agreed(folder.finished):
            return StudyResult.load(out)
        agreed(folder.begin)
    part = "" if forecast is None or out is None else Path(out).name
    whole = forecast or Forecast(model, [(part, study, reading)], [domain.name for domain in domains], say)

    def seen(each: str, domain: str, tokens: int) -> None:
        watch(f"{each}: {domain}{whole.seen(part, each, domain, tokens)}", tokens)

    with nullcontext() if folder is None else folder.filled():
        whole.begin()
        if batch_tokens is None:
            batch_tokens = batch_sizes.batch_tokens(model, kept=study.keeps)
        try:
            earlier = _read(study, model, domains, reading, batch_tokens, folder, seen)
            results = {domain.name: study.results(earlier[domain.name]) for domain in domains}
            tables = study.tables(plan["model"], results)
            tables |= study.read_off(model, results, tables)
        except (UnfitError, UnsupportedModelError):  # nothing can come of what was done
            if folder is not None and distributed.rank() == 0:  # if not all have met it, nobody can wait for all
                folder.discard()
            raise
        texts = {domain.name: earlier[domain.name][study.passes[0]][TEXTS].result() for domain in domains}
        manifest = {
            "plan": plan,
            "read": [{"name": domain, **of.facts()} for domain, of in texts.items()],
            "bytes_in": {str(place): bytes_ for place, bytes_ in places(model.original_model).items()},
            "versions": versions(),
            "command": command or shlex.join(sys.argv),
        }
        result = StudyResult(manifest, tables, {domain: study.kept(of) for domain, of in results.items()})
        if folder is not None:
            agreed(lambda: _finish(folder, result))
    return result if out is None else StudyResult.load(out)


def _read(
    study: Study,
    model: Any,
    domains: Sequence[Domain | Corpus],
    reading: Reading,
    batch_tokens: int,
    folder: StudyFolder | None,
    seen: Callable[[str, str, int], None],
) -> dict[str, dict[str, Gathered]]:
    """All passes over all domains."""
    earlier: dict[str, dict[str, Gathered]] = {domain.name: {} for domain in domains}
    for place, each in enumerate(study.chosen_passes()):
        for number, domain in enumerate(domains):
            into = {**study.begin(model, each), **({TEXTS: TextStats()} if place == 0 else {})}
            key = f"{place}-{each}-{number:02d}-{distributed.rank()}of{distributed.world_size()}"
            prepared = study.prepare(model, each, domain.name, earlier)
            _Pass(study, model, domain, reading, each, into, prepared, batch_tokens, folder, key).go(
                partial(seen, each, domain.name)
            )
            for accumulator in into.values():
                accumulator.all_reduce()
            if place == 0 and not into[TEXTS].result().sources:
                raise UnfitError(f"domain {domain.name!r} holds no text of two tokens or more")
            earlier[domain.name][each] = into
    return earlier


def pinned(domains: Sequence[Domain | Corpus]) -> list[Domain | Corpus]:
    """The domains, those from the hub at a commit that all processes agree on, which the plan then names."""
    open_ = {domain.name: domain.pin for domain in domains if isinstance(domain, Corpus) and domain.pin is not None}
    commits = agreed(lambda: {name: pin(None).identity["revision"] for name, pin in open_.items()})
    return [open_[domain.name](commits[domain.name]) if domain.name in open_ else domain for domain in domains]


class _Pass:
    """One reading of one domain by this process."""

    def __init__(
        self,
        study: Study,
        model: Any,
        domain: Domain | Corpus,
        reading: Reading,
        name: str,
        into: Gathered,
        prepared: Any,
        batch_tokens: int,
        folder: StudyFolder | None,
        key: str,
    ):
        self.study, self.model, self.domain, self.reading, self.name = study, model, domain, reading, name
        self.into, self.prepared, self.folder, self.key = into, prepared, folder, key
        self.halving = Halving(batch_tokens)
        self._before = self._state()

    def go(self, watch: Callable[[int], None]) -> None:
        """Read all shards that were not read before."""
        done = self._resume()
        places = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        for shard in shards(self.domain, self.model, self.reading, start=done, **places):
            self.halving.run(self._shard, shard)
            self._keep(shard.number + 1)
            watch(sum(window.counted for window in shard.windows))

    def _shard(self, batch_tokens: int, shard: Shard) -> None:
        # Where memory runs out this is called again, and the batches that were counted must not count twice.
        self._restore(self._before)
        packed = min(self.reading.context, int(self.model.cfg.n_ctx)) if self.reading.packed else None
        for batch in batch_windows(shard.windows, self.model, batch_tokens=batch_tokens, packed=packed):
            self.study.step(self.model, self.name, batch, self.into, self.prepared)
            if isinstance(texts := self.into.get(TEXTS), TextStats):
                texts.update(batch)
        if isinstance(texts := self.into.get(TEXTS), TextStats):
            texts.leave_out(shard.short)

    def _state(self) -> dict[str, dict[str, Tensor]]:
        return {name: accumulator.state_dict() for name, accumulator in self.into.items()}

    def _restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, accumulator in self.into.items():
            accumulator.load_state_dict(state[name])

    def _keep(self, done: int) -> None:
        self._before = self._state()
        if self.folder is not None:
            flat = {f"{name}/{key}": value for name, part in self._before.items() for key, value in part.items()}
            self.folder.save(self.key, flat, {"shards": done, "batch_tokens": self.halving.batch_tokens})

    def _resume(self) -> int:
        found = self.folder.load(self.key) if self.folder is not None else None
        if found is None:
            return 0
        state: dict[str, dict[str, Tensor]] = {name: {} for name in self.into}
        for name, value in found[0].items():
            accumulator, _, key = name.partition("/")
            state[accumulator][key] = value
        self._restore(state)
        self._before = state
        self.halving.batch_tokens = int(found[1]["batch_tokens"])
        return int(found[1]["shards"])


def _finish(folder: StudyFolder, result: StudyResult) -> None:
    scratch = folder.scratch()
    try:
        manifest = result.write(scratch)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{folder.path}: could not be written ({reason}); {folder.unfinished} is kept") from None
    folder.finish(scratch, manifest)


def agreed(action: Callable[[], Any]) -> Any:
    """What the first process finds, in all of them; an error that it meets is raised in all of them."""
    found: tuple[Any, str | None] = (None, None)
    if distributed.rank() == 0:
        try:
            found = (action(), None)
        except InputError as error:
            found = (None, str(error))
    value, error = distributed.gather(found)[0]
    if error is not None:
        raise InputError(error)
    return value


def versions() -> dict[str, str]:
    """Of everything that has a say in the numbers."""
    import moe_lens

    found = {"moe_lens": moe_lens.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "transformer-lens", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # pragma: no cover  # a vendored installation
            found[name] = "unknown"
    return found
