"""A model of which a part stays in its checkpoint is the model itself, bit for bit, and nothing is written."""

import errno
import os
import pickle
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_lens import HookedMoE
from moe_lens.errors import CheckpointError, InputError
from moe_lens.model.families.table import FAMILIES, here
from moe_lens.model.loading import dispatch, stored_file, through_transformers
from moe_lens.model.loading.checkpoint import Checkpoint
from moe_lens.model.loading.checksum import checksum
from moe_lens.model.loading.depth import read_depth
from moe_lens.model.loading.stored_parts import stored_parameters
from moe_lens.model.loading.streamed_weights import StreamedWeights, streamed_weights
from tests.families import build, tokens
from tests.matrix import configs
from tests.model.test_stored_formats import in_mxfp4, pack

OTHERS = ["dbrx", "deepseek_v3", "flint", "gpt_oss", "jetmoe", "llama4_text", "muse_spark"]
"""Families of transformers' that are stored in different ways."""
EXPERTS = {
    "": "cpu",
    "model.layers.1.mlp.experts": "disk",
    "model.layers.2.mlp.experts": "disk",
}
ALL = {"model": "disk", "lm_head": "disk"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stored")
    build("deepseek").save_pretrained(path / "model", max_shard_size="60KB")
    assert len(list((path / "model").glob("*.safetensors"))) > 2, "experts of one layer straddle files"
    return path / "model"


@pytest.fixture(scope="module")
def whole(folder) -> HookedMoE:
    return HookedMoE.from_pretrained(folder).requires_grad_(False)


def streamed(folder: Path, places: dict[str, Any], **how: Any) -> tuple[HookedMoE, StreamedWeights]:
    model = HookedMoE.from_pretrained(folder, device_map=places, **how).requires_grad_(False)
    weights = streamed_weights(model.original_model)
    assert weights is not None
    return model, weights


@pytest.mark.parametrize("places", [EXPERTS, ALL], ids=["experts", "all"])
def test_every_activation_is_the_plain_model_s_and_every_byte_is_read_once(folder, whole, places, monkeypatch):
    monkeypatch.setattr(dispatch, "_new_folder", lambda _: pytest.fail("nothing is written"))
    model, weights = streamed(folder, places)
    elsewhere = [p for p in model.original_model.parameters() if p.is_meta]
    size = sum(p.numel() * p.element_size() for p in elsewhere)
    assert size == dispatch.places(model.original_model)["disk"] > 0
    with torch.no_grad():
        plain, expected = whole.run_with_cache(tokens(2, 9))
        for _ in range(2):
            logits, cache = model.run_with_cache(tokens(2, 9))
            assert torch.equal(logits, plain)
            assert all(torch.equal(cache[name], expected[name]) for name in expected.keys())  # noqa: SIM118
    with torch.no_grad():
        model(tokens(2, 9))
        read = weights.settled()
        model(tokens(2, 9))
    assert weights.settled() - read == size, "each pass reads each byte once, ahead of the next what it was given"
    assert all(p.is_meta for p in elsewhere), "nothing stays behind a pass"


def test_a_plan_that_divides_keeps_all_but_experts_and_is_what_is_really_placed(folder, whole, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_new_folder", lambda _: pytest.fail("nothing is written"))
    clean = lambda name: name.replace("_original_component.", "")  # noqa: E731
    sizes = {clean(name): p.numel() * p.element_size() for name, p in whole.original_model.named_parameters()}
    experts = {name for name in sizes if ".mlp.experts." in name}
    # What comes and goes needs the room of both layers' experts, and for all the rest a byte is lacking.
    model = HookedMoE.from_pretrained(folder, max_memory={"cpu": sum(sizes.values()) - 1}).requires_grad_(False)
    found = {clean(name) for name, p in model.original_model.named_parameters() if p.is_meta}
    assert found == {*experts, "lm_head.weight"}
    elsewhere = sum(sizes[name] for name in found)
    assert dispatch.places(model.original_model) == {"cpu": sum(sizes.values()) - elsewhere, "disk": elsewhere}
    assert "does not fit into memory" in caplog.text and "on disk, read in every pass" in caplog.text
    assert torch.equal(model(tokens(2, 9)), whole(tokens(2, 9)))


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek"])
def test_words_of_loading_mean_the_same_where_weights_stay_on_disk(model_type: str, tmp_path: Path) -> None:
    configs.build(model_type).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({f"x.{name}": value for name, value in load_file(file).items()}, file, {"format": "pt"})
    words: dict[str, Any] = {"key_mapping": {r"^x\.": ""}, "weights_only": True, "adapter_kwargs": {}, "check": False}
    words |= dict.fromkeys(("quantization_config", "tp_plan", "variant", "generation_config"))
    whole = HookedMoE.from_pretrained(tmp_path, **words).requires_grad_(False)
    model = HookedMoE.from_pretrained(tmp_path, device_map={"": "disk"}, **words).requires_grad_(False)
    assert streamed_weights(model.original_model) is not None
    assert torch.equal(model(tokens()), whole(tokens()))
    with pytest.raises(InputError, match="from_pretrained has no argument 'weights'"):
        HookedMoE.from_pretrained(tmp_path, device_map={"": "disk"}, **words, weights=True)


@pytest.mark.parametrize("wrong", ["model.layer.1", "model.layers.99", "model.layers.1."])
def test_a_place_for_what_is_not_there_is_refused(folder: Path, wrong: str) -> None:
    """accelerate would leave it all in memory."""
    with pytest.raises(
        InputError, match=rf"device_map: '{wrong}' is no module .* such as 'model' or 'model\.layers\.0'"
    ):
        HookedMoE.from_pretrained(folder, device_map={"": "cpu", wrong: "disk"})
    one = {"": "cpu", "model.layers.1": "disk", "model.layers.2.input_layernorm.weight": "disk"}  # a control
    assert any(p.is_meta for p in HookedMoE.from_pretrained(folder, device_map=one).original_model.parameters())


def test_an_error_in_a_pass_of_weights_on_disk_is_not_taken_for_weights_that_are_nowhere(folder):
    model, _ = streamed(folder, ALL)

    def fail(value: torch.Tensor, hook: Any) -> None:  # noqa: ARG001
        raise RuntimeError("the hook's own")

    with pytest.raises(RuntimeError, match="^the hook's own$"):
        model.run_with_hooks(tokens(2, 9), fwd_hooks=[("blocks.1.hook_resid_post", fail)])


@pytest.mark.typed
def test_files_that_change_while_they_are_read_are_an_error(folder, whole, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied")
    model, _ = streamed(copied, EXPERTS)
    ids = tokens(2, 9)
    assert torch.equal(model(ids), whole(ids))
    files = sorted(copied.glob("*.safetensors"))
    for file in files:
        os.utime(file, (1, 1))
    with pytest.raises(CheckpointError, match=r"safetensors has changed since the model was loaded.*Load it again"):
        model(ids)
    for file in files:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"safetensors has changed since the model was loaded"):
        model(ids)


def other_numbers(file: Path) -> bytes:
    """A file with the same header and size, in which the middle of every tensor holds other numbers."""
    state = load_file(file)
    for value in state.values():
        value.view(-1)[value.numel() // 2] += 1
    save_file(state, other := file.with_suffix(".other"), {"format": "pt"})
    content = other.read_bytes()
    other.unlink()
    return content


@pytest.mark.parametrize("renamed", [True, False], ids=["renamed", "written over"])
@pytest.mark.parametrize("way", ["", "fp8 in blocks"])
def test_a_file_in_the_place_of_another_of_equal_size_and_time_is_an_error(way, renamed, tmp_path):
    """Negative control: name, size and time of change alone are those of the file that was loaded."""
    if way:
        pack(tmp_path, way, "deepseek")
    else:
        build("deepseek").save_pretrained(tmp_path)
    model, weights = streamed(tmp_path, {"": "disk"}, check=False)
    copy, ids = pickle.dumps(weights), tokens(2, 9)
    plain = model(ids)
    (file,) = tmp_path.glob("*.safetensors")
    before, content = file.stat(), other_numbers(file) if not way else file.read_bytes()
    target = tmp_path / "new" if renamed else file
    target.write_bytes(content)
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    target.replace(file)
    now = file.stat()
    assert (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed since the model was loaded"):
        model(ids)
    with pytest.raises(CheckpointError, match=r"has changed since the model was loaded"):
        weights.checksums()
    with pytest.raises(CheckpointError, match=r"has changed since the model was loaded"):
        pickle.loads(copy)
    again = streamed(tmp_path, {"": "disk"}, check=False)[0](ids)
    assert torch.equal(again, plain) == bool(way), "what was there to be overlooked"


def test_numbers_are_proved_finite_in_the_first_pass(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    (file,) = (f for f in copied.glob("*.safetensors") if name in load_file(f))
    state = load_file(file)
    state[name][3, 4] = float("nan")
    save_file(state, file, {"format": "pt"})
    model, _ = streamed(copied, EXPERTS)
    for _ in range(2):  # what is broken stays so
        with pytest.raises(CheckpointError, match=rf"{name} has 1 numbers that are NaN or infinite, of 512"):
            model(tokens(2, 9))


def test_what_is_stored_in_another_dtype_comes_in_the_model_s(folder):
    whole = HookedMoE.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    model, weights = streamed(folder, ALL, dtype=torch.bfloat16)
    ids = tokens(2, 9)
    assert torch.equal(model(ids), whole(ids))
    assert model(ids).dtype == torch.bfloat16
    assert weights.settled() > 0


def test_buffers_serve_again_only_when_nobody_looks_at_them(folder):
    _, weights = streamed(folder, EXPERTS)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    first = weights[name]
    view, kept = first[3], first.clone()
    at, read = first.data_ptr(), weights.settled()
    assert weights[name].data_ptr() == at and weights.settled() == read, "what is there is not read again"
    del first
    other = name.replace("layers.1", "layers.2")
    assert all(weights[other].data_ptr() != at for _ in range(4)), "a view is left"
    assert torch.equal(view, kept[3])
    del view
    assert at in {weights[which].data_ptr() for which in 3 * (name, other)}, "and then it does"


def test_a_file_system_that_knows_no_other_way_is_read_through_its_cache(folder, whole, monkeypatch):
    """Opening past the cache fails on some, and reading on others."""
    opened = os.open
    model, _ = streamed(folder, EXPERTS)

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(stored_file.os, "open", refuse)
    for model_ in (model, streamed(folder, EXPERTS)[0]):
        assert torch.equal(model_(tokens(2, 9)), whole(tokens(2, 9)))


@pytest.mark.typed
def test_a_copy_reads_for_itself(folder, whole):
    _, weights = streamed(folder, EXPERTS)
    copy = pickle.loads(pickle.dumps(weights))
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(copy[name], weights[name])
    assert torch.equal(copy[name], whole.original_model.get_parameter(name))


def stored(model_type: str, path: Path, dtype: torch.dtype = torch.bfloat16) -> HookedMoE:
    """A family's model in its own checkpoint format, and loaded into memory."""
    configs.build(model_type, dtype).save_pretrained(path, max_shard_size="60KB")
    return HookedMoE.from_pretrained(path, check=False).requires_grad_(False)


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_families_are_read_from_their_own_files_too(model_type, tmp_path, monkeypatch):
    """In bfloat16, where some keep a few numbers in float32."""
    whole = stored(model_type, tmp_path)
    monkeypatch.setattr(dispatch, "_new_folder", lambda _: pytest.fail("nothing is written"))
    half = sum(p.nbytes for p in whole.original_model.parameters()) // 2
    plain = whole(tokens())
    ways: list[dict[str, Any]] = [{"device_map": {"": "disk"}}, {"max_memory": {"cpu": half}}]
    for how in ways:
        model = HookedMoE.from_pretrained(tmp_path, check=False, **how).requires_grad_(False)
        assert streamed_weights(model.original_model) is not None
        assert dispatch.places(model.original_model)["disk"] > 0
        for _ in range(2):
            assert torch.equal(model(tokens()), plain)
        names = [name for name in whole.hook_dict if "expert" in name or "resid" in name]
        cache, expected = (each.run_with_cache(tokens(), names_filter=names)[1] for each in (model, whole))
        assert all(torch.equal(cache[name], expected[name]) for name in expected.keys())  # noqa: SIM118
        layer = whole.moe_layers[-1]
        assert torch.equal(model.W_out[layer, 2], whole.W_out[layer, 2])
        assert [p.dtype for p in model.original_model.parameters()] == [
            p.dtype for p in whole.original_model.parameters()
        ]


CONVERTED = ["bailing_hybrid", "deepseek_v4", "ernie4_5_vl_moe", "inkling2_text", "qwen3_vl_moe", "step3p7"]
"""Matrices joined, parted by modality, interleaved, transposed; buffers of integers."""


@pytest.mark.parametrize("model_type", [name for name in CONVERTED if name in here()])
def test_what_transformers_converts_is_converted_when_it_is_read(model_type, tmp_path, monkeypatch):
    whole = stored(model_type, tmp_path)
    monkeypatch.setattr(dispatch, "_new_folder", lambda _: pytest.fail("nothing is written"))
    model, weights = streamed(tmp_path, {"": "disk"}, check=False)
    for _ in range(2):
        read = weights.settled()
        assert torch.equal(model(tokens()), whole(tokens()))
        assert weights.settled() > read
    layer, some = whole.moe_layers[-1], [5, 2]
    assert torch.equal(model.W_out[layer, some], whole.W_out[layer, some])
    assert torch.equal(model.W_in[layer, 3], whole.W_in[layer, 3])
    again = pickle.loads(pickle.dumps(weights))
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    sums = weights.checksums()
    assert all(sums[name] == checksum(weights[name]) for name in sums)
    assert len(sums) == sum(parameter.is_meta for parameter in model.original_model.parameters())


def test_a_conversion_that_these_tensors_do_not_fit_is_left_to_the_loader(tmp_path):
    hf = configs.build("bailing_hybrid")
    hf.save_pretrained(tmp_path)
    depth, (file,) = read_depth(hf.config, hf.config), tmp_path.glob("*.safetensors")
    asked = partial(stored_parameters, hf, dtype=torch.float32, depth=depth)
    whole, name = load_file(file), "model.layers.0.attention.q_conv1d.weight"
    assert asked(Checkpoint.locate(str(tmp_path), {}))
    for value in (whole[name][1:].clone(), whole[name][:, :, 1:].clone(), None):
        changed = {**whole, name: value}
        save_file({name: value for name, value in changed.items() if value is not None}, file, {"format": "pt"})
        assert asked(Checkpoint.locate(str(tmp_path), {})) is None


PACKED = [
    ("fp8 in blocks", "qwen3_moe"),
    ("gptq 4 bits", "deepseek"),
    ("awq gemm", "qwen3_moe"),
    ("bitsandbytes 4 bits", "deepseek"),
    ("compressed-tensors pack-quantized", "qwen3_moe"),
    ("mxfp4", "gpt_oss"),
]


@pytest.mark.parametrize(("way", "model_type"), PACKED)
def test_what_is_packed_is_unpacked_when_it_is_read(way, model_type, tmp_path, monkeypatch):
    in_mxfp4(tmp_path) if way == "mxfp4" else pack(tmp_path, way, model_type)
    size = sum(stored.nbytes for stored in Checkpoint.locate(str(tmp_path), {}).tensors.values())
    monkeypatch.setattr(dispatch, "_new_folder", lambda _: pytest.fail("nothing is written"))
    whole = HookedMoE.from_pretrained(tmp_path, dtype=torch.bfloat16).requires_grad_(False)
    model, weights = streamed(tmp_path, {"": "disk"}, dtype=torch.bfloat16)
    plain, cached = whole.run_with_cache(tokens())
    logits, cache = model.run_with_cache(tokens())
    assert torch.equal(logits, plain)
    assert all(torch.equal(cache[name], cached[name]) for name in cached.keys())  # noqa: SIM118
    assert torch.equal(model(tokens()), whole(tokens()))
    read = weights.settled()
    model(tokens())
    assert 0.9 * size < weights.settled() - read <= size, "in a pass, what is stored is read once"
    layer, some = whole.moe_layers[-1], [2, 5, 2, 1]
    for of in ("W_gate", "W_in", "W_out"):
        assert torch.equal(getattr(model, of)[layer, some], getattr(whole, of)[layer, some])
    read = weights.settled()
    assert torch.equal(model.W_out[layer, 4], whole.W_out[layer, 4])
    assert way == "mxfp4" or weights.settled() - read < size / 20, "a matrix of its own is read alone"
    room = {"cpu": sum(p.nbytes for p in whole.original_model.parameters()) - 1}
    planned = HookedMoE.from_pretrained(tmp_path, dtype=torch.bfloat16, max_memory=room).requires_grad_(False)
    assert 0 < dispatch.places(planned.original_model)["disk"] <= size, "counted as it is stored"
    assert torch.equal(planned(tokens()), whole(tokens()))
    for file in tmp_path.glob("*.safetensors"):
        os.utime(file, (1, 1))
    with pytest.raises(CheckpointError, match="has changed since the model was loaded"):
        model(tokens())


def test_what_is_packed_is_proved_finite_when_it_is_read(tmp_path):
    pack(tmp_path, "fp8 in blocks", "qwen3_moe")
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"
    whole[name].view(-1)[0] = float("nan")
    save_file(whole, file, {"format": "pt"})
    model, _ = streamed(tmp_path, {"": "disk"}, check=False)
    with pytest.raises(CheckpointError, match=r"2\.up_proj\.weight is NaN or infinite in places, as is .*_inv"):
        model(tokens())


def test_what_transformers_writes_down_comes_in_the_dtypes_that_it_loads(tmp_path):
    """Weights that are no safetensors: they are kept in a folder of their own."""
    whole = stored("deepseek_v4", tmp_path)
    assert any(p.dtype == torch.float32 for p in whole.original_model.parameters()), "kept so in a model in bfloat16"
    state = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    for file in tmp_path.glob("*safetensors*"):
        file.unlink()
    how: dict[str, Any] = {"use_safetensors": False, "device_map": {"": "disk"}, "check": False}
    model = HookedMoE.from_pretrained(tmp_path, **how).requires_grad_(False)
    assert streamed_weights(model.original_model) is None
    assert torch.equal(model(tokens()), whole(tokens()))


def test_what_transformers_writes_down_is_proved_and_watched_too(tmp_path):
    """Negative control: a plain model of transformers, with another one in its folder, computes with that one's."""
    build("deepseek_v3").save_pretrained(tmp_path / "one")
    build("deepseek_v3", seed=1).save_pretrained(tmp_path / "two")
    for folder in (tmp_path / "one", tmp_path / "two"):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    how: dict[str, Any] = {
        "use_safetensors": False, "device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off"),
    }  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "one", **how)
    ids, right = tokens(2, 9), HookedMoE.from_pretrained(tmp_path / "one", use_safetensors=False)(tokens(2, 9))
    wrapped = HookedMoE.from_hf(AutoModelForCausalLM.from_pretrained(tmp_path / "one", **how))
    assert torch.equal(wrapped(ids), right) and torch.equal(plain(ids).logits, right)
    model = HookedMoE.from_pretrained(tmp_path / "one", **how)
    assert torch.equal(model(ids), right)
    HookedMoE.from_pretrained(tmp_path / "two", **how)
    for each in (model, wrapped):
        with pytest.raises(CheckpointError, match=r"off/model\.embed_tokens\..*has changed since the model was loaded"):
            each(ids)
    assert not torch.equal(plain(ids).logits, right)

    state = torch.load(tmp_path / "one" / "pytorch_model.bin")
    state["model.layers.2.self_attn.o_proj.weight"][1, 1] = torch.inf
    torch.save(state, tmp_path / "one" / "pytorch_model.bin")
    broken = HookedMoE.from_pretrained(tmp_path / "one", **how)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"model\.layers\.2\.self_attn\.o_proj\.weight is NaN or infinite"):
            broken(ids)


def test_what_a_family_reads_by_itself_stays_in_memory(tmp_path, monkeypatch):
    whole = stored("longcat_flash", tmp_path, torch.float32)
    plain = whole(tokens())
    how: dict[str, Any] = {"device_map": {"": "disk"}, "check": False}
    assert torch.equal(HookedMoE.from_pretrained(tmp_path, **how)(tokens()), plain)
    with monkeypatch.context() as patch:
        patch.setattr(through_transformers, "_readable", lambda *_: None)  # as if it had to be converted
        with pytest.raises(InputError, match=r"mlp.router.classifier would be on disk, and longcat_flash reads it"):
            HookedMoE.from_pretrained(tmp_path, **how)
    monkeypatch.setitem(FAMILIES, "longcat_flash", replace(FAMILIES["longcat_flash"], resident=()))
    assert not torch.equal(HookedMoE.from_pretrained(tmp_path, **how)(tokens()), plain), "a control: no error says so"


def test_one_expert_of_a_layer_that_is_stored_whole_is_read_alone(tmp_path):
    whole = stored("gpt_oss", tmp_path)
    model = HookedMoE.from_pretrained(tmp_path, check=False, device_map={"": "disk"}).requires_grad_(False)
    weights = streamed_weights(model.original_model)
    assert weights is not None
    model(tokens())
    read = weights.settled()
    assert torch.equal(model.W_out[2, 3], whole.W_out[2, 3])
    assert weights.settled() - read == whole.W_out[2, 3].nbytes


def test_more_than_ten_experts_are_in_the_order_of_their_numbers(tmp_path):
    build("qwen3_moe", num_experts=12).save_pretrained(tmp_path)
    whole = HookedMoE.from_pretrained(tmp_path, check=False).requires_grad_(False)
    model = HookedMoE.from_pretrained(tmp_path, check=False, device_map={"": "disk"}).requires_grad_(False)
    assert streamed_weights(model.original_model) is not None
    assert torch.equal(model(tokens()), whole(tokens()))
    assert all(torch.equal(model.W_out[2, expert], whole.W_out[2, expert]) for expert in range(12))


def test_a_tensor_that_a_conversion_leaves_is_not_passed_over(tmp_path):
    hf = configs.build("qwen3_moe")
    hf.save_pretrained(tmp_path)
    depth = read_depth(hf.config, hf.config)
    assert stored_parameters(hf, Checkpoint.locate(str(tmp_path), {}), torch.float32, depth)
    (file,) = tmp_path.glob("*.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"  # beside the matrices that it is stacked of
    save_file({**load_file(file), name: hf.get_parameter(name).detach()}, file, {"format": "pt"})
    assert stored_parameters(hf, Checkpoint.locate(str(tmp_path), {}), torch.float32, depth) is None


def test_a_tensor_without_a_place_is_refused_on_disk_as_in_memory(tmp_path, monkeypatch):
    """Not one that transformers passes over; nor layers that are left out because fewer were asked for."""
    hf = configs.build("qwen3_moe")
    hf.save_pretrained(tmp_path)
    (file,), right = tmp_path.glob("*.safetensors"), hf(tokens()).logits
    state = load_file(file)
    ways: list[dict[str, Any]] = [{}, {"device_map": {"": "disk"}}, {"max_memory": {"cpu": "130KB"}}]
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.gate.e_score_correction_bias"):
        save_file({**state, name: torch.ones(8)}, file, {"format": "pt"})
        for how in ways:
            with pytest.raises(CheckpointError, match=rf"{name} is unexpected"):
                HookedMoE.from_pretrained(tmp_path, check=False, **how)
    save_file({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file, {"format": "pt"})
    monkeypatch.setattr(dispatch, "_new_folder", lambda _: pytest.fail("nothing is written"))
    assert torch.equal(streamed(tmp_path, {"": "disk"}, check=False)[0](tokens()), right)


def test_a_tied_embedding_that_is_stored_as_the_head_is_read(tmp_path):
    configs.build("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    state = load_file(file)
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, file, {"format": "pt"})
    model, _ = streamed(tmp_path, {"": "disk"}, check=False)
    assert torch.equal(model(tokens()), HookedMoE.from_pretrained(tmp_path, check=False)(tokens()))


def test_layers_behind_the_last_are_left_out_and_what_does_not_fit_is_said(tmp_path):
    stored("qwen3_moe", tmp_path)
    how: dict[str, Any] = {"num_hidden_layers": 2, "check": False}
    some = HookedMoE.from_pretrained(tmp_path, **how).requires_grad_(False)
    model = HookedMoE.from_pretrained(tmp_path, device_map={"": "disk"}, **how).requires_grad_(False)
    assert streamed_weights(model.original_model) is not None and model.cfg.n_layers == 2
    assert torch.equal(model(tokens()), some(tokens()))
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    (file,) = (file for file in tmp_path.glob("*.safetensors") if name in load_file(file))
    state = load_file(file)
    for change, said in (
        (lambda: state[name].view(-1).__setitem__(7, float("inf")), rf"{name} has 1 numbers that are NaN or infinite"),
        (lambda: state.__setitem__(name, state[name][1:].clone()), "transformers cannot load"),
    ):
        change()
        save_file(state, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            HookedMoE.from_pretrained(tmp_path, device_map={"": "disk"}, check=False)(tokens())
