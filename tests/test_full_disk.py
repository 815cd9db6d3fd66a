"""Whatever writes a file or a folder says in a line that the disk is full, and leaves no folder that it made."""

import resource
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
from transformers.utils import logging

from moe_lens import HookedMoE, TunedLens
from moe_lens.data import Domain, Reading, embedded_domains, tokenize
from moe_lens.errors import InputError
from moe_lens.pruning import export, plan, score
from moe_lens.report import OutputFolder
from moe_lens.scratch import folder_made, make_folder, unmake
from moe_lens.studies import Comparison, RoutingStudy, collect, run
from moe_lens.viz import save_figure
from moe_lens.viz.coloured_tokens import TokensHTML

TEXT = "The old man looked at the river, and the river looked at him."
SHORT = Reading(tokens=32, context=16)


@contextmanager
def full_disk() -> Generator[None]:
    """No file can hold a byte: what the system says of a full disk, it says of a limit, too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.fixture(scope="module")
def model() -> Generator[HookedMoE]:
    logging.disable_progress_bar()  # which would be written to a file, too
    yield HookedMoE.from_pretrained("tiny-deepseekmoe", check=False)
    logging.enable_progress_bar()


def domain() -> Domain:
    return Domain.of("a", [TEXT, TEXT[::-1]])


def pruned(model: HookedMoE) -> Any:
    texts = [tokenize(one, model, n_tokens=128, context=64) for one in embedded_domains()[:1]]
    return plan(score(model, texts, "frequency"), 0.5)


def report(path: Path) -> None:
    def page(into: Path) -> None:
        (into / "page.html").write_text(TEXT, encoding="utf-8")

    with OutputFolder(path) as folder:
        folder.fill(page)


WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "a model": lambda model, path: model.save_pretrained(path),
    "a smaller model": lambda model, path: export(model, pruned(model), path),
    "a smaller model of a checkpoint": lambda model, path: export("tiny-deepseekmoe", pruned(model), path),
    "a lens": lambda model, path: TunedLens(model).save_pretrained(path),
    "a cache": lambda model, path: model.run_with_cache(TEXT)[1].to_disk(path),
    "routing": lambda model, path: model.routing(TEXT).save(path),
    "a figure": lambda model, path: save_figure(go.Figure(), path.with_suffix(".html")),  # noqa: ARG005
    "a page": lambda model, path: TokensHTML(TEXT).save(path),  # noqa: ARG005
    "a table": lambda model, path: Comparison("routing", ("a", "b"), {}, {}, pd.DataFrame({"a": [1]})).save(path),  # noqa: ARG005
    "a report": lambda model, path: report(path),  # noqa: ARG005
    "a study": lambda model, path: run(RoutingStudy(), model, [domain()], reading=SHORT, out=path),
    "activations": lambda model, path: collect(model, [domain()], path, reading=SHORT),
    "an atlas": lambda model, path: model.atlas([domain()], path),
}


@pytest.mark.typed
@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_is_a_line_and_leaves_no_folder(what: str, model: HookedMoE, tmp_path: Path) -> None:
    out, write = tmp_path / "a" / "b" / "out", WRITERS[what]
    with pytest.raises(InputError, match=rf"^{out}[^\n]*(File too large|os error 27)[^\n]*$"), full_disk():
        write(model, out)
    assert list(tmp_path.iterdir()) == []
    if what != "an atlas":  # which takes a minute, and has tests of its own
        write(model, out)
        assert list(out.parent.glob("out*")), "a control: with room it is written there"


def test_what_others_put_into_a_folder_keeps_it(tmp_path: Path) -> None:
    for inside, whole in ((tmp_path / "a" / "b", False), (tmp_path / "a" / "c", True)):
        with pytest.raises(ZeroDivisionError), folder_made(inside, whole=whole):
            (tmp_path / "a" / "others").touch()
            (inside / "half").touch()
            raise ZeroDivisionError
        assert (tmp_path / "a" / "others").exists() and inside.exists() != whole
    with pytest.raises(ZeroDivisionError), folder_made(tmp_path / "a", whole=True):
        raise ZeroDivisionError
    assert (tmp_path / "a" / "others").exists(), "it was there before"
    for path in (tmp_path / "a" / "others", tmp_path / "a" / "others" / "b"):
        with pytest.raises(FileExistsError):
            make_folder(path)
    made = make_folder(tmp_path / "c" / "d")
    (tmp_path / "c" / "d").rmdir()
    unmake(made)
    assert not (tmp_path / "c").exists()
