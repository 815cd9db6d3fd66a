"""Whatever comes on the command line ends in one line and a code: no traceback, no waiting."""

import json
import os
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from moe_lens.cli import main
from moe_lens.errors import InputError
from moe_lens.studies.study_folder import folder_meant

command_line = sys.modules[main.__module__]


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("moe-lens: error: "), line
    return line


def config(folder: Path, **changes: object) -> str:
    embedded = json.loads((files("moe_lens") / "assets/tiny-deepseekmoe/config.json").read_text(encoding="utf-8"))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**embedded, **changes}))
    return str(folder)


def test_a_config_that_would_take_for_ever_is_refused_before_it_is_tried(tmp_path, capsys):
    with pytest.MonkeyPatch.context() as before_torch:
        before_torch.setitem(sys.modules, "moe_lens.model.loading.model_info", None)  # which imports it
        for name in ("num_hidden_layers", "n_routed_experts", "num_nextn_predict_layers"):
            said = refused(capsys, "info", config(tmp_path, **{name: 10**9}))
            assert f"config.json: {name} is 1,000,000,000, which is more than any model has" in said
    assert "depth is 1,000,000,000" in refused(capsys, "info", config(tmp_path, vision_config={"depth": 10**9}))
    assert "vocab_size is 1,000,000,000,000,000, which" in refused(capsys, "info", config(tmp_path, vocab_size=10**15))
    assert "a number of 30 digits" in refused(capsys, "info", config(tmp_path, vocab_size=10**29))
    assert main(["info", config(tmp_path)]) == 0  # as it is, it is fine
    capsys.readouterr()
    for name, value, told in (
        ("rms_norm_eps", float("nan"), "is nan"), ("rope_theta", float("inf"), "is inf"), ("rope_theta", -1.0, "is -1"),
        ("rms_norm_eps", 1e9, "is 1000000000.0; expected at most 1"), ("hidden_size", -64, "is -64"),
        ("max_position_embeddings", -1, "is -1"), ("hidden_size", 10**9, "is 1,000,000,000, which is more"),
        ("num_attention_heads", 10**6, "is 1,000,000, which is more"), ("hidden_size", 1.5, "StrictDataclass"),
    ):  # fmt: skip
        assert f"{name} {told}" in (said := refused(capsys, "info", config(tmp_path, **{name: value}))) or told in said
    assert "DeepSeekMoE does not know" in refused(capsys, "info", config(tmp_path, time_step_limit=float("inf")))
    assert main(["info", config(tmp_path, pad_token_id=-1)]) == 0
    capsys.readouterr()
    for content, message in (
        ("[" * 100_000, "nested too deeply"),
        ('{"model_type": "deepseek", "x": ' + "[" * 60 + "]" * 60 + "}", "nested more than 50 deep"),
        ('{"model_type": "deepseek", "vocab_size": ' + "1" * 5000 + "}", "a number of thousands of digits"),
    ):
        (tmp_path / "config.json").write_text(content)
        assert message in refused(capsys, "info", str(tmp_path))


def test_pipes_and_devices_are_no_files(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    for name in ("pipe.toml", "zero.toml"):
        assert "is a pipe or a device" in refused(capsys, "routing", "--config", str(tmp_path / name))
    assert "is a folder" in refused(capsys, "routing", "--config", str(tmp_path))
    os.mkfifo(tmp_path / "config.json")
    refused(capsys, "info", str(tmp_path))
    os.mkfifo(tmp_path / "manifest.json")
    assert "a pipe or a device" in refused(capsys, "compare", str(tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tokens = " + "1" * 5000, "not TOML"),
        ("a = " + "[" * 100_000, "not TOML (nested too deeply)"),
        ('[domains.a]\npath = "a\\u0000b.jsonl"', "the character 0"),
        ("\ud800", "not TOML"),
    ],
)
def test_a_config_file_that_cannot_be_read(content, message, tmp_path, capsys):
    path = tmp_path / "study.toml"
    path.write_bytes(content.encode(errors="surrogatepass"))
    assert message in refused(capsys, "routing", "--config", str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch-tokens = 64\nbatch_tokens = 65", "batch_tokens is given twice, once with a hyphen"),
        ("out = 5", "out = 5; expected text in quotes"),
        ("out = ''", "out is empty; leave it out"),
        ("max-memory = []", "max_memory is empty; leave it out"),
        ("text-column = ['a']", 'text_column = ["a"]; expected one value'),
        ("max-memory = 'cpu=1GiB'", "expected a list"),
        ("text-column = 'body'", "--text-column is about --domain, and there is none: give your texts"),
        ("[domains.english]\nstreaming = true", "'english' is a known one, of which streaming cannot be chosen"),
        ("[domains.x]\npath = 'x.jsonl'\nsplit = 'test'", "'x' is a file, of which split cannot be chosen"),
    ],
)
def test_a_config_file_that_says_what_cannot_be_or_has_no_effect(content, message, tmp_path, capsys):
    (tmp_path / "c.toml").write_text(content)
    assert message in refused(capsys, "routing", "--config", str(tmp_path / "c.toml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["routing", "--config", "a.toml", "--config=b.toml"], "--config is given 2 times; expected once"),
        (["routing", "--tokens", "5", "--tokens", "6"], "--tokens is given 2 times"),
        (["atlas", "--contexts", "--no-contexts"], "--contexts and --no-contexts are given"),
        (["routing", "--source-column", "book"], "--source-column is about --domain, and there is none"),
        (["routing", "--domain", "english", "--streaming"], "none of the domains has that to choose"),
        (["localise", "--facts", "small", "--seed", "4"], "--seed applies to texts, and --facts reads none"),
        (["report", "saved", "--tokens", "5"], "--tokens applies to studies that are run"),
        (["compare", ".", "."], ".: holds no result of a study"),
        (["routing", "--out=~nobody-of-this-name/x"], "there is no user of this name"),
    ],
)
def test_options_that_contradict_each_other_or_have_no_effect(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "content", "message"),
    [
        ("experts-per-token", "k = [true]", "k = [true]; expected a list of values"),
        ("experts-per-token", "k = [[2]]", "k = [[2]]; expected a list of values"),
        ("experts-per-token", "mass = []", "mass is empty; leave it out"),
        ("prune", "against = []", "against is empty; leave it out"),
        ("collect", "kind = 'parquet'", "unknown key 'kind'"),
        ("collect", "format = 'parket'", "'parket' is not one of"),
    ],
)
def test_a_file_has_the_names_of_the_command_line_and_lists_hold_what_it_takes(
    command, content, message, tmp_path, capsys
):
    (tmp_path / "c.toml").write_text(content)
    assert message in refused(capsys, command, "--config", str(tmp_path / "c.toml"))


@pytest.mark.parametrize(
    "arguments",
    [["report", ""], ["show", ""], ["routing", "--out", ""], ["routing", "--out="], ["routing", "--model", ""]],
)
def test_a_variable_of_the_shell_that_is_not_set_is_not_the_working_directory(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is empty; is a variable of the shell not set?" in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_options_that_may_be_repeated_and_a_mark_before_the_first_key_are_read(tmp_path, capsys):
    (tmp_path / "c.toml").write_text("k = [1, 99]\ntokens = 5", encoding="utf-8-sig")  # as some editors save it
    command = ["single-expert", "--config", str(tmp_path / "c.toml"), "--k", "2", "--k", "2", "--treatment", "nonsense"]
    assert "'nonsense' is not one of" in refused(capsys, *command)


def test_a_result_goes_where_a_link_leads(tmp_path):
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "loop").symlink_to("loop")
    assert folder_meant(tmp_path / "link") == tmp_path / "real"
    assert folder_meant(Path("~/x")) == Path.home() / "x" and folder_meant(tmp_path / "x") == tmp_path / "x"
    with pytest.raises(InputError, match="a link that leads to itself"):
        folder_meant(tmp_path / "loop")


@pytest.mark.parametrize("out", [".", "..", "/", "a/.."])
def test_progress_needs_a_place_beside_the_result(out, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "so it needs a name" in refused(capsys, "routing", "--tokens", "50", "--domain", "english", "--out", out)
    assert list(tmp_path.iterdir()) == []


def test_a_working_directory_that_was_removed_is_said(tmp_path, capsys, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    said = refused(capsys, "routing", "--domain", "english", "--tokens", "50", "--out", "x")
    assert "the working directory is not there any more" in said


def test_devices_without_numbers_and_python_without_docstrings_are_said(tmp_path, capsys):
    english = ["--domain", "english", "--tokens", "50", "--out", str(tmp_path / "x")]
    assert "--device meta: Cannot copy out of meta tensor" in refused(capsys, "routing", *english, "--device", "meta")
    for optimised, code in (("-OO", 2), ("-O", 0)):
        ran = subprocess.run(
            [sys.executable, optimised, "-m", "moe_lens", "--version"], capture_output=True, text=True, check=False
        )
        assert ran.returncode == code and ("drops docstrings" in ran.stderr) == bool(code), ran


def test_arguments_in_another_encoding_are_named(capsys):
    assert "argument 2 (caf\\xe9) is not UTF-8" in refused(capsys, "info", "caf\udce9")


def test_termination_is_a_line_and_cleans_up(capsys, monkeypatch):
    def end(*arguments: object, **named: object) -> None:
        signal.raise_signal(signal.SIGTERM)  # to this very thread: a test process has others

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(command_line, "defaults", end)
    assert main(["models"]) == 143
    assert capsys.readouterr().err.startswith("moe-lens: terminated; no progress is kept")
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(["atlas", "--tokens", "9"]) == 143
    assert "terminated; any progress is kept: run the same command to go on" in capsys.readouterr().err
    monkeypatch.setattr(command_line, "defaults", lambda *_: signal.raise_signal(signal.SIGINT))
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        assert main(["models"]) == 130
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
    assert capsys.readouterr().err.startswith("moe-lens: interrupted")


FREED = """
import contextlib, signal, time
from moe_lens.cli.main import no_interrupt_lost
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
class Freed:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)  # Ctrl-C at this moment: Python prints it, and goes on
with {kept}():
    Freed()
    time.sleep(2)
"""


def test_an_interrupt_while_an_object_is_freed_is_not_lost():
    ends = [
        subprocess.run([sys.executable, "-c", FREED.format(kept=kept)], capture_output=True, text=True)
        for kept in ("no_interrupt_lost", "contextlib.nullcontext")
    ]
    assert ends[0].returncode in (1, -signal.SIGINT, 130) and ends[0].stderr.count("KeyboardInterrupt") == 1
    assert ends[1].returncode == 0 and "Exception ignored" in ends[1].stderr, "a control: by itself it is lost"


def test_memory_that_runs_out_is_a_line_and_a_bug_is_not_hidden(capsys, monkeypatch):
    def fail(error: Exception) -> None:
        def raise_it(*_: object) -> None:
            raise error

        monkeypatch.setattr(command_line, "defaults", raise_it)

    fail(MemoryError())
    assert "out of memory" in refused(capsys, "models")
    fail(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"))
    assert "out of memory" in refused(capsys, "models")
    fail(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["models"])


def test_a_reader_that_has_read_enough_is_no_error():
    code = f"{sys.executable} -m moe_lens models | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "" and "supported model types" in done.stdout
