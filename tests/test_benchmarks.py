"""The pieces of `make bench` run and compute the same thing; nothing here asserts a speed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measuring, on_disk, packed_speed, peers, side_by_side
from moe_lens import names
from moe_lens.errors import CheckpointError, InputError
from scripts import gpu
from tests.families import build, tokens
from tests.wrapped import wrapped

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SAME = 1e-5  # of outputs near 1 in float32: a product of fewer rows may be rounded differently


@pytest.mark.parametrize("family", ["deepseek_v3", "olmoe", "gpt_oss"])
def test_hooks_by_hand_give_what_the_cache_holds(family: str) -> None:
    """The peer's work is the same work: sorted by weight, its outputs are `hook_expert_out`."""
    case = wrapped(family)
    with torch.no_grad():
        hand = peers.by_hand(build(family), tokens())
    wanted = [*side_by_side.experts_cached(case.model), *(names.mlp(names.EXPERT_INDICES, 2),)]
    _, cache = case.model.run_with_cache(tokens(), names_filter=wanted)
    assert {layer for _, layer in hand} == set(case.model.moe_layers)
    for layer in case.model.moe_layers:
        ours = cache["expert_out", layer].flatten(0, 1)
        theirs = hand["expert_out", layer]
        nearest = (ours[:, :, None] - theirs[:, None]).abs().amax(-1).amin(-1)  # each rank in some slot
        assert nearest.max() <= SAME * theirs.abs().max()
        assert torch.equal(hand["router_logits", layer].flatten(), cache["router_logits", layer].flatten())


def test_runs_take_turns_and_memory_is_seen() -> None:
    called: list[str] = []
    found = measuring.interleaved({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 2)
    assert called == ["a", "b", "b", "a", "a", "b"]
    assert found["a"].ratio == 1
    few, many = (measuring.peak_memory(lambda n=n: torch.zeros(n, 2**20)) for n in (1, 8))  # 4 MiB each
    assert few < many
    assert 28 * 2**20 <= many <= 64 * 2**20


def test_bytes_of_tensors_are_counted_exactly_at_their_greatest_and_as_they_are_left() -> None:
    """One tensor is returned, one was freed meanwhile; whatever pages the system gave."""

    def run() -> torch.Tensor:
        passing = torch.empty(3 * 2**20)
        return passing[: 2**20].clone()

    assert measuring.tensor_memory(run) == (4 * 4 * 2**20, 4 * 2**20)
    assert measuring.tensor_memory(lambda: run()[:1].clone()) == (4 * 4 * 2**20, 4)


def test_every_table_of_the_page_can_be_filled() -> None:
    """Names of blocks and rows in the page are those that the command makes."""
    page = PAGE.read_text(encoding="utf-8")
    blocks = {name: f"THE {name}" for name in ("time", "kept", "tensors", "memory", "growth", "work", "start")}
    filled = side_by_side.filled(page, blocks)
    assert all(text in filled for text in blocks.values()) and filled.count("| --- |") == 0
    with pytest.raises(InputError, match="no block speed"):
        side_by_side.filled(page, {"speed": ""})
    for family in side_by_side.FAMILIES:
        assert f" {family} |" in page, "written by hand, or before a family was added: run `make bench`"


@pytest.mark.slow
def test_the_tables_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny shapes: every part of the command runs."""
    small: dict[str, Any] = {**side_by_side.COMMON, "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setattr(side_by_side, "COMMON", small)
    monkeypatch.setattr(side_by_side, "FAMILIES", {"olmoe": {}})
    with torch.no_grad():
        sizes = {"experts": 8, "k": 2, "width": 16}
        tables = {"time": side_by_side.time_table(1, (2, 8), **sizes), **side_by_side.memory_tables((2, 8), **sizes)}
        base = {"tokens": 16, "experts": 8, "k": 2, "layers": 1}
        growth = side_by_side.growth_table(1, base, {"tokens": (16, 32)})
    assert [row[0] for row in tables["time"][1]] == [row[0] for row in tables["memory"][1]]
    assert [row[0] for row in tables["time"][1]] == [row[0] for row in tables["tensors"][1]]
    assert {"plain transformers", "HookedMoE, experts", "by hand, experts"} <= {row[0] for row in tables["time"][1]}
    assert [row[0] for row in growth[1]] == ["16 tokens", "32 tokens"]
    assert growth[1][0][1:3] == ["1.00", "1.00"]
    head, rows = side_by_side.start_table(1, {"nothing": "pass", "absent": "import no_such_module"})
    assert head == ["", "seconds"] and rows[1] == ["absent", "not installed"]


@pytest.mark.slow
def test_a_model_on_disk_is_written_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tiny shape: what is written is a whole checkpoint, read in every pass."""
    monkeypatch.setattr(on_disk, "FULL", gpu.TINY)
    monkeypatch.setattr(on_disk, "SHARD", 2**18)
    folder = tmp_path / "made"
    options = [str(folder), "--layers", "4", "--memory", "2MB", "--tokens", "8", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["on_disk.py", *options])
    on_disk.main()
    said = capsys.readouterr().out
    assert "8 tokens, moe_lens: " in said and "transformers: loaded in" in said
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and not (folder / "offloaded").exists()
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("experts.3.up_proj", "experts.3.gone"))
    with pytest.raises(CheckpointError, match=r"holds .*experts\.3\.gone"):
        on_disk.main()  # which takes the folder as it is


def test_packed_models_are_timed_beside_bfloat16(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packed_speed, "SHAPE", {**gpu.TINY, "num_hidden_layers": 1, "first_k_dense_replace": 0})
    monkeypatch.setattr("sys.argv", ["packed_speed.py", "--rounds", "1", "--tokens", "1", "8"])
    packed_speed.main()
    head, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert head == ["weights", "1 token", "8 tokens", "8 tokens and back"]
    assert [row[0] for row in rows] == ["bfloat16", "nf4", "fp4", "int8"]
    assert all(cell.endswith(" ×") for row in rows[1:] for cell in row[2:])


def test_a_pass_of_the_packed_benchmark_has_a_gradient_of_what_was_embedded() -> None:
    model, seen = gpu.random_model(gpu.TINY, "cpu", "nf4"), list[torch.Tensor]()
    tokens = torch.randint(gpu.TINY["vocab_size"], (1, 8))
    model.add_hook("blocks.0.hook_resid_pre", lambda grad, hook: seen.append(grad), dir="bwd")
    packed_speed.forward(model, tokens)
    assert not seen
    packed_speed.backward(model, tokens)
    assert seen and bool(seen[0].any())
