"""A whole checkpoint loads, bit for bit and without spending memory; one that is not whole is refused by name."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    conversion_mapping,
)

from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError
from moe_lens.model.families import deepseek
from moe_lens.model.families.deepseek import DeepseekConfig, DeepseekForCausalLM, DeepseekModel
from moe_lens.model.loading.checkpoint import Checkpoint
from moe_lens.model.loading.lazy_parameters import parameter_shapes, stored_shapes
from moe_lens.model.loading.pretrained import EMBEDDED, load_pretrained, resolve_name
from tests.model.tiny import BASE, TINY, original_shapes, prompts, random_tensors, write_checkpoint

EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"
ROUTER = "model.layers.2.mlp.gate.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "whole", TINY, random_tensors(TINY))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", TINY, random_tensors(TINY), shards=3)


def load(folder: Path | str, **kwargs: Any) -> PreTrainedModel:
    return load_pretrained(str(folder), **kwargs)[0]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(prompts()).logits


@pytest.mark.parametrize("pickled", [False, True])
def test_original_names_are_known_from_the_first_model_on(pickled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        data = pickle.dumps(DeepseekForCausalLM(DeepseekConfig(**TINY)))
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", None)
    deepseek._register_names.cache_clear()
    assert conversion_mapping.get_checkpoint_conversion_mapping("deepseek") is None
    model = pickle.loads(data) if pickled else DeepseekForCausalLM(DeepseekConfig(**TINY))
    assert type(model) is DeepseekForCausalLM
    assert conversion_mapping.get_checkpoint_conversion_mapping("deepseek")


# ---------------------------------------------------------------------------------------------------- what is whole


def test_names_and_shapes_are_the_original_s() -> None:
    config = json.loads((Path(__file__).parent / "deepseek_moe_16b.json").read_text())
    with torch.device("meta"):
        model = DeepseekForCausalLM(DeepseekConfig(**config))
    ours = stored_shapes(parameter_shapes(model))
    assert ours == original_shapes(config)
    assert len(ours) == 5466
    assert ours["model.layers.27.mlp.experts.63.gate_proj.weight"] == (1408, 2048)
    assert ours["model.layers.1.mlp.shared_experts.down_proj.weight"] == (2048, 2816)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_number_arrives(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    tensors = random_tensors(TINY)
    state = load(write_checkpoint(tmp_path, TINY, tensors, shards), dtype=dtype).state_dict()
    m = TINY["moe_intermediate_size"]
    for name, value in tensors.items():
        if ".mlp.experts." in name:
            layer, _, rest = name.partition(".experts.")
            e, matrix, _ = rest.split(".")
            packed = state[f"{layer}.experts.{'down_proj' if matrix == 'down_proj' else 'gate_up_proj'}"][int(e)]
            ours = {"down_proj": packed, "gate_proj": packed[:m], "up_proj": packed[m:]}[matrix]
        else:
            ours = state[name]
        assert ours.dtype == dtype and torch.equal(ours, value.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_pretrained_writes_the_original_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = random_tensors(TINY, dtype)
    config = {**TINY, "torch_dtype": str(dtype).removeprefix("torch.")}
    model = load(write_checkpoint(tmp_path / "a", config, tensors, shards=2))
    model.save_pretrained(tmp_path / "b")
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(again[name].dtype == dtype and torch.equal(again[name], value) for name, value in tensors.items())
    assert torch.equal(logits(load(tmp_path / "b")), logits(model))
    model.save_pretrained(tmp_path / "c", max_shard_size="20KB")
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path / "c")), logits(model))


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 3.0}, {"type": "dynamic", "factor": 2.0}])
def test_the_config_is_written_in_the_original_s_words(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    config = {**TINY, "rope_scaling": scaling, "rope_theta": 500}
    folder = write_checkpoint(tmp_path / "a", config, random_tensors(config))
    for model in (load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        model.save_pretrained(tmp_path / "b")
        written = json.loads((tmp_path / "b" / "config.json").read_text())
        written["torch_dtype"] = written.pop("dtype")
        assert {key: written[key] for key in config} == config
        assert torch.equal(logits(load(tmp_path / "b")), logits(model))


def test_plain_transformers_classes_read_and_write_it_too(folder: Path, tmp_path: Path) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(model), logits(load(folder)))
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == random_tensors(TINY).keys()
    assert isinstance(AutoConfig.from_pretrained(folder), DeepseekConfig)
    inner = DeepseekModel.from_pretrained(folder)
    with torch.no_grad():
        hidden = inner(prompts()).last_hidden_state
        assert torch.equal(model.lm_head(hidden), logits(model))


def test_remote_code_is_never_run(folder: Path) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    write_checkpoint(folder, TINY, random_tensors(TINY), auto_map=auto_map)
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    for kwargs in ({}, {"trust_remote_code": True}):
        assert type(load(folder, **kwargs)) is DeepseekForCausalLM
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is DeepseekForCausalLM


@pytest.mark.typed
def test_dtype_auto_is_the_config_s_or_else_the_tensors(tmp_path: Path) -> None:
    tensors = random_tensors(TINY, torch.bfloat16)
    assert load(write_checkpoint(tmp_path / "a", TINY, tensors), dtype="auto").dtype == torch.float32
    silent = {key: value for key, value in TINY.items() if key != "torch_dtype"}
    assert load(write_checkpoint(tmp_path / "b", silent, tensors), dtype="auto").dtype == torch.bfloat16
    tensors[ROUTER] = tensors[ROUTER].float()
    assert load(write_checkpoint(tmp_path / "c", silent, tensors)).dtype == torch.float32
    for wrong in ("int8", "float31", torch.int64):
        with pytest.raises(InputError, match="dtype is"):
            load(tmp_path / "a", dtype=wrong)


def test_loading_arguments_of_transformers_pass_through(folder: Path, tmp_path: Path) -> None:
    plain = logits(load(folder))
    assert torch.equal(logits(load(folder, device_map="cpu")), plain)
    assert torch.equal(logits(load(folder, device_map="auto", max_memory={"cpu": "1GiB"})), plain)
    assert torch.equal(logits(load(folder, low_cpu_mem_usage=True, use_safetensors=True)), plain)
    assert torch.equal(logits(load(folder, key_mapping={"nothing": "else"})), plain)
    assert load(folder, attn_implementation="eager").config._attn_implementation == "eager"
    assert load(folder, num_experts_per_tok=1).config.num_experts_per_tok == 1
    assert load(folder, config=DeepseekConfig(**{**TINY, "num_experts_per_tok": 2})).config.num_experts_per_tok == 2
    nested = write_checkpoint(tmp_path / "repo" / "inner", TINY, random_tensors(TINY))
    assert torch.equal(logits(load(nested.parent, subfolder="inner")), plain)
    shutil.move(folder / "model.safetensors", folder / "model.fp32.safetensors")
    assert torch.equal(logits(load(folder, variant="fp32")), plain)
    with pytest.raises(CheckpointError, match="no weights"):
        load(folder)
    with pytest.raises(InputError, match="MixtralConfig"):
        load(folder, config=MixtralConfig())
    with pytest.raises(InputError, match="no argument 'colour'"):
        load(folder, variant="fp32", colour="red")


def test_a_package_that_an_argument_needs_and_that_is_not_installed_is_said_in_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the tests run: as if it were not there, or no device for it."""
    loading = DeepseekForCausalLM._check_and_adjust_attn_implementation

    def lacking(self: Any, asked: str | None, *args: Any, **kwargs: Any) -> Any:
        if asked == "flash_attention_2":
            raise ImportError(
                "FlashAttention2 has been toggled on,\nbut the package for it doesn't seem to be installed."
            )
        return loading(self, asked, *args, **kwargs)

    monkeypatch.setattr(DeepseekForCausalLM, "_check_and_adjust_attn_implementation", lacking)
    with pytest.raises(InputError, match="transformers cannot load .*FlashAttention2.* installed") as error:
        load(folder, attn_implementation="flash_attention_2")
    assert "\n" not in str(error.value)
    assert torch.equal(logits(load(folder, attn_implementation="sdpa")), logits(load(folder)))


def test_disk_offload_computes_the_same(folder: Path, tmp_path: Path) -> None:
    parts = (
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(4)),
    )
    device_map = {part: "disk" if "layers.2" in part else "cpu" for part in parts}
    model = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.get_parameter("model.layers.2.mlp.experts.down_proj").is_meta
    assert torch.equal(logits(model), logits(load(folder)))


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["cuda", "auto", {"": 0}])
def test_cuda(folder: Path, device_map: Any) -> None:
    model = load(folder, device_map=device_map, dtype=torch.float32)
    with torch.no_grad():
        out = model(prompts().cuda()).logits
    assert model.device.type == "cuda"
    assert (out.cpu() - logits(load(folder))).abs().max() < 1e-3


def test_the_generation_config_is_read(folder: Path) -> None:
    made_from_config: Any = load(folder).generation_config
    assert made_from_config.eos_token_id == 1
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7], "max_new_tokens": 3}))
    loaded: Any = load(folder).generation_config
    assert (loaded.eos_token_id, loaded.max_new_tokens) == ([5, 7], 3)


def test_hub_names_are_served_from_the_cache(tmp_path: Path, folder: Path) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--org--model" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    refs = tmp_path / "models--org--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    model = load("org/model", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(logits(model), logits(load(folder)))
    assert model.name_or_path == "org/model"
    assert torch.equal(logits(load("org/model", cache_dir=tmp_path, revision=commit)), logits(model))
    with pytest.raises(CheckpointError, match="org/other"):
        load("org/other", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(CheckpointError, match=r"org/model has no config\.json in its revision 'v2': .* hub"):
        load("org/model", cache_dir=tmp_path, revision="v2", local_files_only=True)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load("org/model", cache_dir=tmp_path, local_files_only=True)
    write_checkpoint(snapshot, TINY, random_tensors(TINY), shards=3)
    assert torch.equal(logits(load("org/model", cache_dir=tmp_path)), logits(model))
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks the shard model-00002-of-00003.safetensors"):
        load("org/model", cache_dir=tmp_path, local_files_only=True)


MEMORY = """
import gc, sys, threading, time, torch
from moe_lens.model.loading.pretrained import load_pretrained
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
load_pretrained(sys.argv[1])  # what imports and first calls allocate is not the checkpoint's
for dtype in (torch.bfloat16, torch.float32):
    before, peak, done = anonymous(), 0, threading.Event()
    def watch():
        global peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    model, _ = load_pretrained(sys.argv[2], dtype=dtype)
    done.set()
    watcher.join()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    final = anonymous()
    peak = max(peak, final)  # on a busy machine the watcher may have looked last before the last of the weights
    print((peak - before) / weights, (final - before) / weights)
    del model
    gc.collect()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_weights_also_when_casting(tmp_path: Path, folder: Path) -> None:
    """At most 1.1 × the weights; 150 MB or 300 MB of them, so that noise is small."""
    large = {
        **TINY,
        "vocab_size": 2048,
        "hidden_size": 256,
        "num_hidden_layers": 9,
        "moe_intermediate_size": 288,
        "n_routed_experts": 32,
    }
    shapes = original_shapes(large)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    path = write_checkpoint(tmp_path / "large", large, tensors, shards=3)
    # glibc gives each thread an arena that it does not return: with two it is seen what the loader itself asks for
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", MEMORY, str(folder), str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    ratios = [tuple(map(float, line.split())) for line in output.splitlines()]
    assert len(ratios) == 2
    for peak, final in ratios:
        assert 0.9 < final <= peak <= 1.1


# ---------------------------------------------------------------------------------------------------- what is not


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def poke(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1).__setitem__(3, value)


BROKEN_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no router": (lambda t: t.pop(ROUTER), f"model.safetensors: {ROUTER} is missing"),
    "no head": (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    "no embedding": (lambda t: t.pop("model.embed_tokens.weight"), "embed_tokens.weight is missing"),
    "no final norm": (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    "no matrix of one expert": (lambda t: t.pop(EXPERT), f"model.safetensors: {EXPERT} is missing"),
    "no shared experts": (
        lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp.shared" in name],
        "model.layers.1.mlp.shared_experts.gate_proj.weight is missing",
    ),
    "a ninth expert": (
        lambda t: t.update({EXPERT.replace(".5.", ".8."): t[EXPERT].clone()}),
        f"model.safetensors: {EXPERT.replace('.5.', '.8.')} is unexpected",
    ),
    "a fifth layer": (
        lambda t: t.update({"model.layers.4.input_layernorm.weight": torch.ones(32)}),
        "model.layers.4.input_layernorm.weight is unexpected",
    ),
    "a bias": (lambda t: t.update({f"{ROUTER[:-6]}bias": torch.ones(8)}), "mlp.gate.bias is unexpected"),
    "packed parameters": (
        lambda t: t.update({"model.layers.2.mlp.experts.down_proj": torch.ones(8, 32, 16)}),
        "model.layers.2.mlp.experts.down_proj is unexpected",
    ),
    "a router for seven": (
        lambda t: t.update({ROUTER: t[ROUTER][:7].clone()}),
        f"model.safetensors: {ROUTER} has shape (7, 32), config.json asks for (8, 32)",
    ),
    "a transposed expert": (
        lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}),
        f"{EXPERT} has shape (16, 32), config.json asks for (32, 16)",
    ),
    "a longer head": (lambda t: t.update({"lm_head.weight": torch.ones(97, 32)}), "lm_head.weight has shape (97, 32)"),
    "a scalar": (lambda t: t.update({"model.norm.weight": torch.ones(())}), "model.norm.weight has shape ()"),
    "an int8 expert": (lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)}), f"{EXPERT} is I8"),
    "an 8-bit float expert": (lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}), f"{EXPERT} is F8_E4M3"),
    "a boolean norm": (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.bool)}), "weight is BOOL"),
    "NaN in an expert": (poke(EXPERT, float("nan")), f"{EXPERT} has 1 numbers that are NaN or infinite, of 512"),
    "Inf in the router": (poke(ROUTER, float("inf")), f"model.safetensors: {ROUTER} has 1 numbers that are NaN"),
    "-Inf in a norm": (poke("model.norm.weight", -float("inf")), "model.norm.weight has 1 numbers"),
    "NaN in the embedding": (poke("model.embed_tokens.weight", float("nan")), "embed_tokens.weight has 1 numbers"),
    "nothing": (lambda t: t.clear(), "model.safetensors: num_hidden_layers is 4, but all tensors are 0"),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_broken_tensors_are_refused_naming_file_and_tensor(folder: Path, case: str) -> None:
    change, message = BROKEN_TENSORS[case]
    edit_tensors(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError) as raised:
        load(folder)
    assert message in str(raised.value)
    assert "model.safetensors" in str(raised.value)


def test_numbers_that_the_dtype_cannot_hold_are_refused(folder: Path) -> None:
    edit_tensors(folder / "model.safetensors", poke(EXPERT, 1e5))
    load(folder)
    with pytest.raises(CheckpointError, match=r"down_proj.weight reaches 1e\+05, more than torch.float16 can hold"):
        load(folder, dtype=torch.float16)


def test_all_problems_are_counted(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(moe_intermediate_size=17))
    with pytest.raises(CheckpointError, match=r"(?s)has shape.*and 73 more"):
        load(folder)


BROKEN_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: f.write_bytes(b""), r"model.safetensors \(0 bytes\) is no whole safetensors file"),
    "garbage": (lambda f: f.write_bytes(bytes(range(256)) * 64), "is no whole safetensors file"),
    "an HTML page": (lambda f: f.write_text("<html>404</html>" * 9), "is no whole safetensors file"),
    "a git-lfs pointer": (
        lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"),
        "is no whole safetensors file",
    ),
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "is no whole safetensors file"),
    "truncated header": (lambda f: f.write_bytes(f.read_bytes()[:100]), "is no whole safetensors file"),
    "too long": (lambda f: f.write_bytes(f.read_bytes() + b"\0" * 8), "is no whole safetensors file"),
    "absent": (lambda f: f.unlink(), "no weights: neither model.safetensors nor model.safetensors.index.json"),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "model.safetensors is a folder; expected a file"),
    "pickled": (lambda f: f.rename(f.with_name("pytorch_model.bin")), "pickled weights only"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_files_are_refused(folder: Path, case: str) -> None:
    change, message = BROKEN_FILES[case]
    change(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


FIRST = "model-00001-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def places(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / INDEX, lambda index: change(index["weight_map"]))


BROKEN_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing shard": (lambda f: (f / FIRST).unlink(), f"lacks the shard {FIRST}, which should hold"),
    "an empty shard": (lambda f: (f / FIRST).write_bytes(b""), f"{FIRST} \\(0 bytes\\) is no whole"),
    "a truncated shard": (
        lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-9]),
        f"{FIRST} .* is no whole",
    ),
    "a tensor missing from its shard": (
        lambda f: edit_tensors(f / FIRST, lambda t: t.pop(sorted(t)[0])),
        f"says that {FIRST} holds lm_head.weight",
    ),
    "a tensor in two shards": (
        lambda f: edit_tensors(f / FIRST, lambda t: t.update({ROUTER: torch.ones(8, 32)}) if ROUTER not in t else t),
        "is in both|which model.safetensors.index.json does not place there",
    ),
    "an index that names another shard": (
        places(lambda m: m.update({"lm_head.weight": "model-00003-of-00003.safetensors"})),
        "lm_head.weight",
    ),
    "an index that forgets a tensor": (places(lambda m: m.pop("lm_head.weight")), "holds lm_head.weight, which"),
    "an index that invents a tensor": (places(lambda m: m.update({"model.extra": FIRST})), "holds model.extra"),
    "an index that invents a shard": (
        places(lambda m: m.update({"model.extra": "model-00004-of-00003.safetensors"})),
        "lacks the shard model-00004",
    ),
    "a shard outside the folder": (
        places(lambda m: m.update({"lm_head.weight": "../whole/model.safetensors"})),
        "places lm_head.weight in '../whole/model.safetensors'",
    ),
    "an absolute shard": (places(lambda m: m.update({"lm_head.weight": "/etc/x.safetensors"})), "beside the index"),
    "a backslash": (places(lambda m: m.update({"lm_head.weight": "..\\x.safetensors"})), "beside the index"),
    "a pickled shard": (places(lambda m: m.update({"lm_head.weight": "x.bin"})), "beside the index"),
    "a shard that is a number": (places(lambda m: m.update({"lm_head.weight": 7})), "places lm_head.weight in 7"),
    "an index that is not JSON": (lambda f: (f / INDEX).write_text("{"), "cannot be read as JSON"),
    "an index that is a list": (lambda f: (f / INDEX).write_text("[]"), "holds a JSON list; expected an object"),
    "an index without a map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "an empty map": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "has no weight_map"),
    "an index that is a folder": (lambda f: ((f / INDEX).unlink(), (f / INDEX).mkdir()), "is a folder"),
    "NaN in the last shard": (
        lambda f: edit_tensors(f / "model-00003-of-00003.safetensors", lambda t: t[sorted(t)[-1]].fill_(float("nan"))),
        "model-00003-of-00003.safetensors: .* NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_broken_shards_and_indices_are_refused(sharded: Path, case: str) -> None:
    load(sharded)
    change, message = BROKEN_SHARDS[case]
    change(sharded)
    with pytest.raises(CheckpointError, match=message):
        load(sharded)


def test_one_tensor_in_two_shards_is_refused_whatever_the_index_says(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    folder = write_checkpoint(tmp_path, TINY, tensors, shards=2)
    edit_tensors(folder / "model-00001-of-00002.safetensors", lambda t: t.update(tensors))
    with pytest.raises(CheckpointError, match="holds .* which model.safetensors.index.json does not place there"):
        Checkpoint.locate(str(folder), {})


CONFIG_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "contradicts: experts": ({"n_routed_experts": 9}, CheckpointError, "experts.8.gate_proj.weight is missing"),
    "contradicts: layers": ({"num_hidden_layers": 5}, CheckpointError, "model.layers.4.*is missing"),
    "contradicts: fewer layers": ({"num_hidden_layers": 3}, CheckpointError, "model.layers.3.*is unexpected"),
    "contradicts: vocabulary": ({"vocab_size": 100}, CheckpointError, r"shape \(96, 32\), .* \(100, 32\)"),
    "contradicts: shared": ({"n_shared_experts": 1}, CheckpointError, "shared_experts.gate_proj.weight has shape"),
    "contradicts: no shared": ({"n_shared_experts": None}, CheckpointError, "shared_experts.* is unexpected"),
    "contradicts: dense layers": (
        {"first_k_dense_replace": 2},
        CheckpointError,
        "layers.1.mlp.experts.* is unexpected",
    ),
    "contradicts: frequency": ({"moe_layer_freq": 2}, CheckpointError, "layers.1.mlp.experts.* is unexpected"),
    "contradicts: heads": ({"num_key_value_heads": 2}, CheckpointError, "k_proj.weight has shape"),
    "contradicts: bias": ({"attention_bias": True}, CheckpointError, "q_proj.bias is missing"),
    "contradicts: tied": ({"tie_word_embeddings": True}, CheckpointError, "lm_head.weight differs from the embedding"),
    "top-0": ({"num_experts_per_tok": 0}, CheckpointError, "num_experts_per_tok is 0; expected a positive"),
    "top-9 of 8": ({"num_experts_per_tok": 9}, CheckpointError, "num_experts_per_tok is 9, but there are 8"),
    "negative size": ({"moe_intermediate_size": -16}, CheckpointError, "moe_intermediate_size is -16"),
    "negative dense": ({"first_k_dense_replace": -1}, CheckpointError, "first_k_dense_replace is -1"),
    "no layers": ({"num_hidden_layers": 0}, CheckpointError, "num_hidden_layers is 0"),
    "frequency 0": ({"moe_layer_freq": 0}, CheckpointError, "moe_layer_freq is 0"),
    "zero epsilon": ({"rms_norm_eps": 0.0}, CheckpointError, "rms_norm_eps is 0.0"),
    "heads that do not divide": ({"num_attention_heads": 5}, CheckpointError, "5 heads"),
    "groups that do not divide": ({"num_key_value_heads": 3}, CheckpointError, "no multiple of num_key_value_heads"),
    "a size that is text": ({"hidden_size": "32"}, CheckpointError, "hidden_size"),
    "a size that is a fraction": ({"n_routed_experts": 8.5}, CheckpointError, "n_routed_experts"),
    "a switch that is text": ({"norm_topk_prob": "false"}, CheckpointError, "norm_topk_prob"),
    "a billion layers": (
        {"num_hidden_layers": 10**9},
        CheckpointError,
        "num_hidden_layers is 1,000,000,000, which is more than any model has",
    ),
    "a billion experts": ({"n_routed_experts": 10**9}, CheckpointError, "n_routed_experts is 1,000,000,000"),
    "a thousand layers": (
        {"num_hidden_layers": 1000},
        CheckpointError,
        "num_hidden_layers is 1000, but all tensors are 114",
    ),
    "a dtype that is none": ({"torch_dtype": "float31"}, CheckpointError, "float31"),
    "a size that is null": ({"n_routed_experts": None}, CheckpointError, "lacks n_routed_experts"),
    "sigmoid": ({"scoring_func": "sigmoid"}, UnsupportedModelError, "scoring_func = 'sigmoid'"),
    "activation": ({"hidden_act": "quick_gelu"}, UnsupportedModelError, "hidden_act = 'quick_gelu'"),
    "scaling factor": ({"routed_scaling_factor": 2.5}, UnsupportedModelError, "routed_scaling_factor = 2.5"),
    "groups": ({"n_group": 8}, UnsupportedModelError, "n_group = 8"),
    "top groups": ({"topk_group": 3}, UnsupportedModelError, "topk_group = 3"),
    "top-k method": ({"topk_method": "noaux_tc"}, UnsupportedModelError, "topk_method = 'noaux_tc'"),
    "latent attention": ({"kv_lora_rank": 512}, UnsupportedModelError, "kv_lora_rank = 512"),
    "head width": ({"head_dim": 16}, UnsupportedModelError, "head_dim = 16"),
    "sliding window": ({"sliding_window": 128}, UnsupportedModelError, "sliding_window = 128"),
    "unknown key": ({"qk_norm": True}, UnsupportedModelError, "qk_norm = True, which DeepSeekMoE"),
    "layers that differ": ({"per_layer_config": {"0": {}}}, UnsupportedModelError, "per_layer_config"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, UnsupportedModelError, "rope scaling 'yarn'"),
    "rope without factor": ({"rope_scaling": {"type": "linear"}}, CheckpointError, "factor = None"),
    "rope with factor 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, CheckpointError, "factor = 0"),
    "rope with more": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}},
        UnsupportedModelError,
        "unknown keys .*mscale",
    ),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_configs_that_contradict_or_mean_another_model_are_refused(folder: Path, case: str) -> None:
    change, kind, message = CONFIG_ERRORS[case]
    edit_json(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(kind, match=f"(?s){message}"):
        load(folder)


@pytest.mark.parametrize(
    "harmless",
    [
        {"routed_scaling_factor": 1.0, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "head_dim": 8},
        {"aux_loss_alpha": 0.01, "seq_aux": False, "pretraining_tp": 2, "use_cache": False},
        {"temperature": 0.7, "top_p": 0.9, "do_sample": True, "_name_or_path": "elsewhere", "torchscript": False},
        {"unsloth_version": "2025.3.1", "unsloth_fixed": True, "transformers_version": "4.33.1"},
    ],
)
def test_keys_that_change_nothing_are_read_over(folder: Path, harmless: dict[str, Any]) -> None:
    plain = logits(load(folder))
    edit_json(folder / "config.json", lambda config: config.update(harmless))
    assert torch.equal(logits(load(folder)), plain)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "moe_intermediate_size", "num_experts_per_tok"])
def test_configs_that_lack_a_size_are_refused(folder: Path, key: str) -> None:
    edit_json(folder / "config.json", lambda config: config.pop(key))
    with pytest.raises(CheckpointError, match=f"config.json lacks {key}"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("", "cannot be read as JSON"),
        ("{'model_type': 1}", "cannot be read as JSON"),
        ("[1]", "holds a JSON list"),
        ("{}", "has no model_type"),
        ('{"model_type": 3}', "has no model_type"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(folder: Path, content: str | bytes | None, message: str) -> None:
    path = folder / "config.json"
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_unknown_model_types_are_refused_without_asking(folder: Path) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(folder / "config.json", lambda config: config.update(model_type="deepsick", auto_map=auto_map))
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(UnsupportedModelError, match="model_type 'deepsick' is unknown"):
        load(folder)
    edit_json(folder / "config.json", lambda config: config.update(model_type="step3_text"))
    with pytest.raises(UnsupportedModelError, match=r"'step3_text' \(Step 3\) is unknown"):
        load(folder)


def test_names_that_are_nothing_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no-such-folder"):
        load(tmp_path / "no-such-folder")
    with pytest.raises(CheckpointError, match="is a file; expected a checkpoint's folder"):
        load(folder / "model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no config.json"):
        load(tmp_path / "empty")


# ---------------------------------------------------------------------------------------------------- other families


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


def test_another_family_loads_as_transformers_loads_it(mixtral: Path) -> None:
    theirs = MixtralForCausalLM.from_pretrained(mixtral)
    assert torch.equal(small_logits(load(mixtral)), small_logits(theirs))


def small_logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(prompts(vocab=64)).logits


MIXTRAL_ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
MIXTRAL_EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(MIXTRAL_ROUTER), "gate.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t.pop(MIXTRAL_EXPERT), "experts"),
        (lambda t: t.update({"model.other.weight": torch.ones(3)}), "model.other.weight is unexpected"),
        (lambda t: t.update({MIXTRAL_ROUTER: torch.ones(3, 32)}), "gate.weight has shape"),
        (poke(MIXTRAL_EXPERT, float("nan")), "experts.down_proj is NaN or infinite"),
    ],
)
def test_another_family_is_refused_unless_whole(
    mixtral: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_tensors(mixtral / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        load(mixtral)


def test_another_family_s_broken_files_and_configs_are_refused(mixtral: Path) -> None:
    edit_json(mixtral / "config.json", lambda config: config.update(hidden_size="wide"))
    with pytest.raises(CheckpointError, match="hidden_size"):
        load(mixtral)
    (mixtral / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is no whole safetensors file"):
        load(mixtral)
    (mixtral / "model.safetensors").rename(mixtral / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights only"):
        load(mixtral)


def test_an_adapter_beside_the_weights_is_never_left_out(folder: Path, mixtral: Path) -> None:
    for family in (folder, mixtral):
        (family / "adapter_config.json").write_text("{}")
        with pytest.raises(UnsupportedModelError, match=r"adapter_config.json: .* Merge it first"):
            load(family)
        (family / "adapter_config.json").unlink()
        load(family)


def test_pickled_weights_load_when_asked_for(folder: Path) -> None:
    plain = logits(load(folder))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits(load(folder, use_safetensors=False)), plain)
    torch.save({"lm_head.weight": torch.ones(96, 32)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="model.embed_tokens.weight is missing"):
        load(folder, use_safetensors=False)


# ---------------------------------------------------------------------------------------------------- embedded model


def test_the_embedded_model_s_name_is_its_folder() -> None:
    path = Path(resolve_name(EMBEDDED))
    assert path.name == EMBEDDED and (path / "config.json").is_file()
    model, tokenizer = load_pretrained(EMBEDDED)
    assert model.name_or_path == EMBEDDED and tokenizer is not None
    assert model.config.model_type == "deepseek"
    assert resolve_name(str(BASE)) == str(BASE)
