"""Where parameters go is a function of numbers: machines that nobody here has are tried too."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.errors import InputError
from moe_lens.model.loading import device_map, pretrained
from moe_lens.model.loading.device_map import SHARE, Place, Size, plan_memory, slow_dtype
from moe_lens.model.loading.dispatch import places
from moe_lens.model.loading.key_mapping import WRAPPER
from moe_lens.model.loading.machine import Machine, free_disk, free_memory, slowdown
from moe_lens.model.loading.model_info import here, model_info
from moe_lens.model.loading.quantising import Packer, packed_in
from moe_lens.model.loading.sizes import size_of
from tests.families import build

GIB = 2**30
SIZE = Size(total=30 * GIB, largest=GIB)


def machine(*gpus: float, memory: float = 64, disk: float = 500) -> Machine:
    """A machine by its free GiB, of which all is usable."""
    usable = lambda gib: round(gib * GIB / SHARE) + 1  # noqa: E731
    return Machine({at: usable(gib) for at, gib in enumerate(gpus)}, usable(memory), int(disk * GIB))


@pytest.mark.parametrize(
    ("where", "places", "device_map"),
    [
        (machine(), {"cpu": 30}, None),
        (machine(80), {0: 30}, {"": 0}),
        (machine(30), {0: 30}, {"": 0}),  # it fits to the byte
        (machine(24, 80), {1: 30}, {"": 1}),  # never split where one GPU has room
        (machine(80, 80), {0: 30}, {"": 0}),
        (machine(24, 24), {0: 24, 1: 6}, "auto"),
        (machine(24), {0: 23, "cpu": 7}, "auto"),  # a layer's room is kept for those that come and go
        (machine(8, 8), {0: 7, 1: 8, "cpu": 15}, "auto"),
        (machine(24, memory=4), {0: 23, "cpu": 4, "disk": 3}, "auto"),
        (machine(memory=10), {"cpu": 9, "disk": 21}, "auto"),
    ],
)
def test_a_model_goes_to_the_first_places_that_hold_it(where, places, device_map):
    plan = plan_memory(SIZE, where)
    assert {place: round(n / GIB, 3) for place, n in plan.places.items()} == places
    assert sum(plan.places.values()) == SIZE.total
    assert plan.arguments.get("device_map") == device_map
    assert plan.offloads == plan.places.get("disk", 0)
    if device_map == "auto":
        assert plan.arguments["max_memory"].keys() >= places.keys() - {"disk"}


def test_what_max_memory_names_is_all_that_is_used_and_as_far_as_it_says():
    plan = plan_memory(SIZE, machine(80), {"cpu": "11GiB"})
    assert plan.places == {"cpu": 10 * GIB, "disk": 20 * GIB}
    assert plan.arguments == {"device_map": "auto", "max_memory": {"cpu": 11 * GIB}}
    assert plan_memory(SIZE, machine(memory=1), {"cpu": 40 * GIB}).arguments == {}, "who says so knows better"
    assert str(plan) == "10.0 GiB in main memory, 20.0 GiB on disk, read in every pass"
    assert str(plan_memory(SIZE, machine(24, 24))) == "24.0 GiB on GPU 0, 6.0 GiB on GPU 1"


MODULES = {"embed": 2, "attn": 4, "head": 2, "0.experts": 8, "1.experts": 8, "2.experts": 6}
STREAMED = Size(total=30 * GIB, largest=9 * GIB, modules={name: n * GIB for name, n in MODULES.items()})


@pytest.mark.parametrize(
    ("where", "max_memory", "places", "on_disk"),
    [
        (machine(memory=30), None, {"cpu": 30}, []),
        (machine(memory=29), {"cpu": "29GiB"}, {"cpu": 8, "disk": 22}, ["0", "1", "2"]),  # two that come and go are 16
        (machine(), {"cpu": 32 * GIB - 1}, {"cpu": 30}, []),
        (machine(24, memory=29), None, {0: 8, "cpu": 8, "disk": 14}, ["1", "2"]),
        (machine(24, memory=64), None, {0: 8, "cpu": 22}, []),
        (machine(8), {0: "8GiB"}, {"disk": 30}, ["0", "1", "2", "embed", "attn", "head"]),
    ],
)
def test_what_can_be_read_from_the_checkpoint_leaves_memory_to_what_every_token_needs(
    where, max_memory, places, on_disk
):
    plan = plan_memory(STREAMED, where, max_memory)
    assert {place: round(n / GIB, 3) for place, n in plan.places.items()} == places
    found = plan.arguments.get("device_map", {})
    kept = {name.removesuffix(".experts") for name, place in found.items() if place == "disk"}
    assert kept == set(on_disk)


PACKED = Size(total=9 * GIB, largest=GIB, packed=True)


@pytest.mark.parametrize(
    ("where", "places", "device_map"),
    [
        (machine(12), {0: 9}, {"": 0}),
        (machine(6, 6), {0: 6, 1: 3}, "auto"),
        (machine(6), {"cpu": 9}, None),  # where the same bytes, not packed, would be divided
        (machine(5, 4), {"cpu": 9}, None),
        (machine(memory=9), {"cpu": 9}, None),
    ],
)
def test_a_packed_model_is_on_gpus_or_in_main_memory_as_a_whole(where, places, device_map):
    plan = plan_memory(PACKED, where)
    assert {place: round(n / GIB, 3) for place, n in plan.places.items()} == places
    assert plan.arguments.get("device_map") == device_map
    assert "cpu" not in plan.arguments.get("max_memory", {})


def test_a_model_that_is_read_in_every_pass_leaves_over_half_of_main_memory_to_batches():
    modules = {"head": 2 * GIB, "attn": 4 * GIB, **{f"{layer}.experts": GIB for layer in range(24)}}
    size = Size(total=30 * GIB, largest=GIB, modules=modules)
    # 11.2 GiB; the two that come and go take 2 × 4: the rest is the head and, as attention has no room, experts
    assert plan_memory(size, Machine({}, 28 * GIB, 0)).places == {"cpu": 3 * GIB, "disk": 27 * GIB}
    assert plan_memory(size, Machine({}, 28 * GIB, 0), {"cpu": "28GiB"}).places == {"cpu": 20 * GIB, "disk": 10 * GIB}


@pytest.mark.parametrize(
    ("where", "max_memory", "told"),
    [
        (machine(memory=0.5), None, r"largest layer takes 1.0 GiB, and main memory has 512.0 MiB for it"),
        (machine(0.5), None, r"largest layer takes 1.0 GiB, and GPU 0 has 512.0 MiB"),
        (machine(memory=10, disk=5), None, r"takes 30.0 GiB: 21.0 GiB more than memory .* disk has 5.0 GiB. .*HF_HOME"),
        (machine(), {0: "9GiB"}, r"max_memory names 0; there is 'cpu'"),
        (machine(), {"cpu": "much"}, r"expected sizes such as '9GiB'"),
    ],
)
def test_no_room_is_said_with_numbers(where, max_memory, told):
    with pytest.raises(InputError, match=told):
        plan_memory(SIZE, where, max_memory)


def test_packed_numbers_are_not_kept_on_disk():
    told = r"packed, the model takes 9.0 GiB, and GPU 0 has 6.0 GiB and main memory has 4.0 GiB for it"
    with pytest.raises(InputError, match=told):
        plan_memory(PACKED, machine(6, memory=4))


def group(folder: Path, limit: str, *, used: int, files: int, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    prefix = "" if version == 2 else "total_"
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {files}\n{prefix}active_file 0\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_what_its_groups_leave(tmp_path, version, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB}))
    mount = tmp_path / "groups" if version == 2 else tmp_path / "groups" / "memory"
    own = tmp_path / "own"
    own.write_text("0::/pods/one\n" if version == 2 else "9:name=systemd:/\n4:cpu,memory:/pods/one\n")
    left = lambda: free_memory(tmp_path / "groups", own)  # noqa: E731
    assert left() == 64 * GIB, "no group at all"
    unlimited = "max" if version == 2 else str(2**63 - 4096)
    group(mount / "pods" / "one", unlimited, used=GIB, files=0, version=version)
    assert left() == 64 * GIB
    group(mount / "pods" / "one", str(16 * GIB), used=10 * GIB, files=4 * GIB, version=version)
    assert left() == 10 * GIB, "what is used, but for pages of files"
    group(mount / "pods", str(12 * GIB), used=11 * GIB, files=0, version=version)
    assert left() == GIB, "the group around it is the narrower one"
    own.write_text("0::/elsewhere\n" if version == 2 else "4:memory:/elsewhere\n")
    group(mount, str(8 * GIB), used=2 * GIB, files=0, version=version)
    assert left() == 6 * GIB, "its own group is mounted as the root"
    assert free_memory(tmp_path / "groups", tmp_path / "absent") == 64 * GIB, "no Linux"


def test_a_disk_that_is_closed_to_this_process_has_no_room(tmp_path, monkeypatch):
    """Such as the home of another user, in a container: what fits into memory is loaded all the same."""
    inside = tmp_path / "home" / "cache" / "offload"
    assert free_disk(inside) == shutil.disk_usage(tmp_path).free > 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # noqa: ARG005  # whoever runs tests may write anywhere
    assert free_disk(inside) == 0

    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", closed)  # as Python 3.11 has it
    assert free_disk(inside) == 0


def test_a_model_s_config_tells_how_it_would_be_loaded_on_a_machine(tmp_path):
    shutil.copy(Path(__file__).parent / "deepseek_moe_16b.json", tmp_path / "config.json")
    sixteen = model_info(tmp_path)
    said = lambda where: dict(here(sixteen, where))  # noqa: E731
    assert said(machine(80)) == {"in bfloat16": "fits: 30.5 GiB on GPU 0", "in nf4": "fits: 9.1 GiB on GPU 0"}
    assert said(machine(memory=19))["in nf4"] == "fits: 9.1 GiB in main memory"
    on_disk = said(machine(memory=19))["in bfloat16"]
    assert on_disk.startswith("30.5 GiB: ") and on_disk.endswith(" on disk, read in every pass")
    assert "largest module takes 1.0 GiB, and main memory has" in said(machine(memory=1))["in bfloat16"]


@pytest.mark.typed
def test_a_processor_that_is_slow_in_a_model_s_dtype_is_named_where_it_computes(tmp_path, monkeypatch):
    shutil.copy(Path(__file__).parent / "deepseek_moe_16b.json", tmp_path / "config.json")
    slow = lambda dtype: 7.4 if dtype == torch.bfloat16 else 1.0  # noqa: E731
    found = dict(here(model_info(tmp_path), replace(machine(memory=80), slowdown=slow)))
    assert found["in float32"] == "fits: 61.0 GiB in main memory" and found["in bfloat16"].startswith("fits: 30.5")
    assert found["speed"].startswith("this processor takes 7 times as long for a product in bfloat16 as in float32")
    assert "speed" not in dict(here(model_info(tmp_path), machine(memory=80))), "one that is not"
    assert "speed" not in dict(here(model_info(tmp_path), replace(machine(80), slowdown=slow))), "a GPU computes"
    cases: list[tuple[torch.dtype, dict[Place, int], bool]] = [
        (torch.float32, {"cpu": 8 * GIB}, False),
        (torch.bfloat16, {"cpu": 9}, False),
        (torch.bfloat16, {"cpu": GIB, "disk": GIB}, True),
        (torch.bfloat16, {0: GIB}, False),
    ]
    for dtype, where, told in cases:
        assert (slow_dtype(dtype, where, slow) is not None) == told
    # By a clock that says so: a product in bfloat16 takes 6 s, one in float32 two, and every third run is disturbed.
    clock = iter([t for seconds in (6, 2) for run in range(6) for t in (0.0, seconds + 9.0 * (run % 3 == 0))])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert slowdown(torch.bfloat16) == 3.0


def test_who_loads_a_large_model_is_told_that_its_dtype_is_slow(monkeypatch, caplog):
    monkeypatch.setattr(pretrained, "slowdown", lambda dtype: 10.6 if dtype == torch.bfloat16 else 1.0)
    for large, dtype, told in ((1, "bfloat16", True), (1, "float32", False), (2**40, "bfloat16", False)):
        monkeypatch.setattr(device_map, "LARGE", large)
        caplog.clear()
        HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=dtype)
        assert (
            'takes 11 times as long for a product in bfloat16 as in float32. dtype="float32"' in caplog.text
        ) == told


def test_what_is_read_from_disk_is_counted_as_it_is_stored(tmp_path):
    model: Any = build("deepseek")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    where_ = {"": "cpu", "model.layers.1.mlp.experts": "disk"}
    loaded = [HookedMoE.from_pretrained(tmp_path, dtype=dtype, device_map=where_) for dtype in ("bfloat16", "float32")]
    stored, wider = (places(model.original_model) for model in loaded)
    assert wider["cpu"] == 2 * stored["cpu"] and wider["disk"] == stored["disk"]
    size = size_of({"a.experts.x": 10, "b.x": 4}, torch.float32, streamed=True, stored={"a.experts.x": 20, "b.x": 8})
    assert (size.total, size.modules) == (56, {"b": 16, "a.experts": 40}), (
        "memory holds it in the dtype that it is loaded in"
    )
    assert plan_memory(size, Machine({}, 200, 0), {"cpu": 55}).places == {"disk": 28}
    assert plan_memory(size, Machine({}, 200, 0), {"cpu": 99}).places == {"cpu": 56}


@pytest.mark.typed
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_transformers_divides_a_packed_model_by_its_packed_bytes(tmp_path, monkeypatch, scheme):
    model: Any = build("olmoe")
    model.save_pretrained(tmp_path)
    asked: dict[str, float] = {}
    width = Packer.param_element_size

    def noted(self: Packer, model: Any, name: str, parameter: torch.Tensor) -> float:
        asked[name] = parameter.numel() * width(self, model, name, parameter)
        return asked[name] / parameter.numel()

    monkeypatch.setattr(Packer, "param_element_size", noted)
    packed = HookedMoE.from_pretrained(tmp_path, quantize=scheme, device_map="sequential").original_model
    names = {name.replace(WRAPPER, "").replace(".packed", ".weight") for name, _ in packed_in(packed)}
    assert names and sum(asked[name] for name in names) == sum(one.nbytes for _, one in packed_in(packed))
    assert asked["lm_head.weight"] == 4 * model.lm_head.weight.numel(), "what is not packed is as wide as it is"
