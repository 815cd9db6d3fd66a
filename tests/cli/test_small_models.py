"""What makes a small model quick: memory that is kept, and a second process that nothing depends on."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_lens import freed_memory
from moe_lens.cli import model_loading
from moe_lens.cli import second_process as module
from moe_lens.cli.second_process import TOLD, second_process, worth_it
from moe_lens.data import Domain, Passage, Reading
from moe_lens.report import run
from moe_lens.studies import Localisation, PruningStudy
from tests.planted import planted_domains, planted_model
from tests.test_docs import DOCS, code_of

FAULTS = """
import resource, torch
torch.set_num_threads(1)
{first}
def several():
    held = [torch.ones(2**n) for n in range(18, 24)]
    return [one + 1 for one in held]
def work():
    several()
    torch.ones(2**23)  # alone at the end of the heap, where freed memory is given back
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(first: str) -> int:
    script = FAULTS.format(first=first)
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def test_memory_that_is_kept_as_the_page_says_is_not_cleared_anew_for_every_tensor():
    glibc = platform.libc_ver()[0] == "glibc"
    page = code_of(DOCS / "performance.md")
    kept = faults(f"{page}\nassert keep_freed_memory() is {glibc}")  # other C libraries are left as they are
    assert not glibc or kept < faults("") / 5


def test_a_large_model_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch):
    """What is freed of one lies between what is not: kept, it would add up to gigabytes."""
    kept: list[str] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(model_loading, "keep_freed_memory", lambda: kept.append("kept"))
    model_loading.load_model("tiny-deepseekmoe", "auto", "cpu")
    assert kept == ["kept"]
    monkeypatch.setattr(model_loading, "SMALL", 2**20)
    model_loading.load_model("tiny-deepseekmoe", "auto", "cpu")
    assert kept == ["kept"]


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", code])


def test_a_process_that_has_said_itself_what_memory_stays_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", None)  # which it would need
    assert freed_memory.keep_freed_memory() is False


def test_a_second_process_is_told_what_it_is_and_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "told"
    child(monkeypatch, f"import os, time; time.sleep(.5); open({str(path)!r}, 'w').write(os.environ[{TOLD!r}])")
    with second_process(True) as wait:
        assert not path.exists()
        wait()
        assert path.read_text() == "1"
    path.unlink()
    with second_process(False) as wait:
        wait()
    assert not path.exists()


def test_it_ends_with_the_first_whatever_ends_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    child(monkeypatch, "import time; time.sleep(600)")
    started: list[Any] = []
    popen = subprocess.Popen

    def spied(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(module.subprocess, "Popen", spied)
    with pytest.raises(KeyboardInterrupt), second_process(True):
        raise KeyboardInterrupt
    assert started[0].poll() is not None and not list(tmp_path.iterdir())


def test_it_is_started_for_a_small_model_by_our_own_program_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts, folders = [Domain("a", (Passage("b c", "d", "e:1"),))], [tmp_path / "pruning"]
    monkeypatch.setattr("moe_lens.model.loading.machine.free_memory", lambda: 2**40)
    monkeypatch.setattr(module, "_cores", lambda: 2)
    monkeypatch.delenv(TOLD, raising=False)

    def asked(program: str = "/bin/moe-lens", *, small: bool = True, domains: list = texts) -> bool:
        monkeypatch.setattr(sys, "argv", [program, "report"])
        return worth_it(small, domains, folders)

    assert asked() and asked("/lib/moe_lens/__main__.py")
    assert not asked("/home/me/my_script.py"), "which would be run twice"
    assert not asked(small=False) and not asked(domains=[object()])
    with monkeypatch.context() as patched:
        patched.setattr(module, "_cores", lambda: 1)
        assert not asked()
    with monkeypatch.context() as patched:
        patched.setattr("moe_lens.model.loading.machine.free_memory", lambda: 2**30)
        assert not asked()
    with monkeypatch.context() as patched:
        patched.setenv(TOLD, "1")
        assert not asked(), "a second process starts no third"
    folders[0].mkdir()
    assert not asked(), "there is nothing left to make"


def test_what_another_process_has_made_meanwhile_is_taken_and_the_page_is_the_same(tmp_path: Path, monkeypatch):
    few = {"pruning": PruningStudy(random=3), "localisation": Localisation(experts=1, matched=3, controls="primary")}
    monkeypatch.setattr("moe_lens.report.run_report.STUDIES", {})
    monkeypatch.setattr("moe_lens.report.run_report.OF_HALVES", few)
    how: dict[str, Any] = {"reading": Reading(tokens=600, context=24)}
    model, texts = planted_model(), planted_domains(words=12)
    alone = run(model, texts, tmp_path / "alone", command="c", **how)
    out = tmp_path / "out"
    assert run(model, texts, out, part="second", command="c", **how) == out
    assert {path.name for path in out.iterdir()} == set(few)
    monkeypatch.setattr(PruningStudy, "step", None)  # nothing is run again
    monkeypatch.setattr(Localisation, "step", None)
    waited = []
    page = run(model, texts, out, wait=lambda: waited.append(1), command="c", **how)
    assert waited == [1] and page.read_bytes() == alone.read_bytes()
