"""A model whose layers are on several devices has every hook; one that is split within its layers is refused."""

import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moe_lens import HookedMoE
from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.model.loading import dispatch, through_transformers
from tests.families import build, tokens
from tests.forked import group
from tests.wrapped import wrapped

SPLIT = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.norm": "disk",
    "lm_head": "disk",
}


@pytest.mark.parametrize("family", ["deepseek", "mixtral"])
def test_every_hook_works_where_layers_are_split_over_devices(family, tmp_path, capfd):
    build(family).save_pretrained(tmp_path / "model")
    whole = HookedMoE.from_pretrained(tmp_path / "model").requires_grad_(False)
    split = HookedMoE.from_pretrained(tmp_path / "model", device_map=SPLIT, offload_folder=str(tmp_path / "off"))
    elsewhere = {
        name.split(".")[2] for name, p in split.original_model.named_parameters() if p.is_meta and "layers" in name
    }
    assert elsewhere == {"0", "1"}  # the test is of a split that happened
    ids = tokens(2, 9)
    with torch.no_grad():
        plain, expected = whole.run_with_cache(ids)
        logits, cache = split.run_with_cache(ids)
        assert torch.equal(logits, plain)
        assert set(cache.keys()) == set(expected.keys())
        assert all(torch.equal(cache[name], expected[name]) for name in cache.keys())  # noqa: SIM118
        mute = lambda value, hook: value * 0  # noqa: E731
        for name in ("mlp.hook_expert_out", "mlp.hook_router_logits", "mlp.experts.3.hook_out", "hook_resid_mid"):
            hooks: Any = [(f"blocks.1.{name}", mute)]
            edited = split.run_with_hooks(ids, fwd_hooks=hooks)
            assert torch.equal(edited, whole.run_with_hooks(ids, fwd_hooks=hooks))
            assert not torch.allclose(edited, plain, atol=1e-2)
    capfd.readouterr()


@pytest.mark.parametrize("argument", ["tp_plan", "tp_size", "distributed_config"])
def test_a_plan_to_split_layers_is_refused_before_loading(argument):
    given = {"tp_plan": "auto", "tp_size": 2, "distributed_config": DistributedConfig(tp_size=2, ep_size=2)}[argument]
    said = rf"^{argument} splits .*would see one process's shard of them.*device_map=\"auto\""
    with pytest.raises(UnsupportedModelError, match=said):
        HookedMoE.from_pretrained("tiny-deepseekmoe", **{argument: given})


PLANS: list[tuple[dict[str, Any], int]] = [
    ({"tp_size": 2}, 2),
    ({"tp_size": 2, "ep_size": 2}, 0),
    ({"fsdp_size": 2}, 0),
]


def split_and_wrap(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo")
    for plan, dim in PLANS:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**plan))
        down = model.model.layers[1].mlp.experts.down_proj  # [expert, d_model, d_expert]
        assert type(down).__name__ == "DTensor" and [place.dim for place in down.placements] == [dim]
        try:
            HookedMoE.from_hf(model)
        except Exception as error:
            sys.stdout.write(json.dumps([plan, type(error).__name__, str(error)]) + "\n")
        torch.distributed.barrier()  # the first process holds the store by which the other finds it
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_half_of_every_layer_each_are_refused(tmp_path):
    """Half of every expert's neurons each, half of the experts each, and half of everything until it is used."""
    build("mixtral").save_pretrained(tmp_path / "model")
    ended = [process.end() for process in group(2, split_and_wrap, tmp_path / "model", said=tmp_path)]
    said = [json.loads(line) for _, out, _ in ended for line in out.splitlines() if line.startswith("[{")]
    plans = [plan for plan, _ in PLANS]
    assert sorted(map(str, (plan for plan, _, _ in said))) == sorted(map(str, 2 * plans)), ended
    for _, kind, message in said:
        assert kind == "UnsupportedModelError"
        assert message.startswith("this model was loaded with tensor or expert parallelism, or fully sharded (")
        assert "torchrun" in message and 'device_map="auto"' in message


def test_what_does_not_fit_is_kept_elsewhere_and_nothing_is_left_behind(tmp_path, monkeypatch, caplog):
    """A checkpoint whose experts transformers has to convert: nobody need name a folder."""
    monkeypatch.setattr(through_transformers, "_readable", lambda *_: None)
    monkeypatch.setattr(dispatch, "HF_HOME", str(tmp_path / "home"))
    build("mixtral").save_pretrained(tmp_path / "model")
    whole = HookedMoE.from_pretrained(tmp_path / "model").requires_grad_(False)
    size = sum(p.numel() * p.element_size() for p in whole.original_model.parameters())
    assert dispatch.places(whole.original_model) == {"cpu": size}
    assert not (tmp_path / "home").exists(), "a model that fits is not split"
    killed = tmp_path / "home" / "moe_lens-offload" / "killed"
    killed.mkdir(parents=True)
    split = HookedMoE.from_pretrained(tmp_path / "model", max_memory={"cpu": int(size * 0.8)}).requires_grad_(False)
    found = dispatch.places(split.original_model)
    assert found.keys() == {"cpu", "disk"} and sum(found.values()) == size
    assert "does not fit into memory" in caplog.text and "on disk, read in every pass" in caplog.text
    said = caplog.records[0].getMessage()
    assert f"first written to {tmp_path / 'home' / 'moe_lens-offload'}" in said, "before it is"
    assert said.endswith(", which is removed with the model")
    assert not killed.exists(), "what a killed process left is removed"
    ids = tokens(2, 9)
    assert torch.equal(split(ids), whole(ids))
    folders = list((tmp_path / "home" / "moe_lens-offload").glob("*/*"))
    assert folders
    del split
    gc.collect()
    assert not list((tmp_path / "home" / "moe_lens-offload").glob("*/*"))


def test_room_is_asked_of_the_disk_that_is_written_to(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(through_transformers, "_readable", lambda *_: None)  # as if transformers had to convert it
    build("mixtral").save_pretrained(tmp_path / "model")
    disks = {tmp_path / "small": 10, tmp_path / "large": 10**9}
    monkeypatch.setattr(dispatch.Machine, "here", lambda folder: dispatch.Machine({}, 10**9, disks[Path(folder)]))
    given: Any = {"max_memory": {"cpu": 200_000}, "check": False}
    with pytest.raises(InputError, match="more than memory has room for, and the disk has 0.0 MiB"):
        HookedMoE.from_pretrained(tmp_path / "model", offload_folder=str(tmp_path / "small"), **given)
    HookedMoE.from_pretrained(tmp_path / "model", offload_folder=str(tmp_path / "large"), **given)
    assert caplog.messages[0].endswith(f"What is on disk is first written to {tmp_path / 'large'}"), "and it stays"
    assert list((tmp_path / "large").iterdir())


@pytest.mark.untyped
@pytest.mark.parametrize("device", ["cuda:99", "mps", "xpu", "hpu", "xla", "gpu", "CPU", 1.5])
def test_a_device_that_is_not_here_is_refused_in_a_line_wherever_one_is_named(device: Any) -> None:
    model = wrapped("mixtral").model
    _, cache = model.run_with_cache(tokens(), names_filter="hook_embed")
    for call in (
        lambda: model.to(device),
        lambda: model.to(device=device),
        lambda: cache.to(device),
        lambda: model.run_with_cache(tokens(), device=device),
        lambda: model.get_caching_hooks(device=device),
        lambda: model.routing(tokens(), device=device),
        lambda: HookedMoE.from_pretrained("tiny-deepseekmoe", device=device),
    ):
        with pytest.raises(InputError, match=r"device is [^\n]*$"):
            call()
    assert model.cfg.device == "cpu" and all(value.device.type == "cpu" for value in model.state_dict().values())


def test_what_is_kept_has_numbers() -> None:
    model = wrapped("mixtral").model
    with pytest.raises(InputError, match="device is 'meta', which holds shapes and no numbers"):
        model.run_with_cache(tokens(), device="meta")
    _, cache = model.run_with_cache(tokens(), names_filter="hook_embed")
    with pytest.raises(InputError, match=r"dtype is torch.int8; expected a floating-point one"):
        cache.to("cpu", torch.int8)
    assert cache["hook_embed"].dtype == torch.float32


def test_a_model_may_be_put_on_the_meta_device_for_its_shapes() -> None:
    for model in (
        HookedMoE.from_hf(build("mixtral"), check=False).to("meta"),
        HookedMoE.from_pretrained("tiny-deepseekmoe", device="meta", check=False),
    ):
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("part", "lacking"),
    [
        ("", "model.embed_tokens.weight"),
        ("model.layers.1", "model.layers.1.self_attn.q_proj.weight"),
        ("model.rotary_emb", "model.rotary_emb.inv_freq"),
    ],
)
@pytest.mark.typed
def test_a_model_on_the_meta_device_does_not_run(part: str, lacking: str) -> None:
    hf: Any = build("mixtral")
    hf.get_submodule(part).to("meta")
    model = HookedMoE.from_hf(hf, check=False)
    for call in (model.forward, model.run_with_cache, model.routing, model.generate):
        with pytest.raises(InputError, match=rf"^{lacking} is on the meta device and holds no numbers: load [^\n]*$"):
            call(tokens())


def test_who_names_a_device_gets_it(monkeypatch):
    monkeypatch.setattr(dispatch, "plan_memory", lambda *_: pytest.fail("nothing is open"))
    given: dict[str, Any]
    for given in ({"device": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": None}):
        HookedMoE.from_pretrained("tiny-deepseekmoe", **given)
    with torch.device("meta"):
        assert not dispatch.is_open({})
