"""What transformers' loader lets pass: whole numbers, other shapes, files that change, words that it does not know."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from tests.matrix.configs import build, tokens

ON_DISK = {"device_map": {"model": "disk", "lm_head": "disk"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("mixtral").save_pretrained(tmp_path)
    return tmp_path


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens())


def change(folder: Path, name: str, value: Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), name: value.contiguous()}, file, {"format": "pt"})


@pytest.mark.parametrize("said", ["float99", "torch.bfloat16", "auto", 3, True, "float8_e4m3fn", "int8"])
def test_a_config_s_dtype_that_nothing_is_computed_in_is_refused(said: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for place in ({"dtype": said}, {"dtype": None, "text_config": {"torch_dtype": said}}):
        (folder / "config.json").write_text(json.dumps({**config, **place}))
        with pytest.raises(
            CheckpointError, match=rf"dtype is {said!r}; expected bfloat16, float16, float32 or float64"
        ):
            HookedMoE.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": said}))
    if said not in ("float99", "torch.bfloat16", "auto"):
        model = HookedMoE.from_pretrained(folder, dtype="float32", check=False)  # as transformers
        assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek"])
def test_a_loaded_model_stays_as_it_is_when_its_file_is_written_to(model_type: str, tmp_path: Path) -> None:
    build(model_type).save_pretrained(tmp_path)
    model = HookedMoE.from_pretrained(tmp_path)
    expected = logits(model).clone()
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as handle:  # in place, as `cp` and `rsync --inplace` do it
        size = 8 + int.from_bytes(handle.read(8), "little")
        handle.seek(size)
        handle.write(bytes(file.stat().st_size - size))
    assert torch.equal(logits(model), expected)
    assert not load_file(file)["lm_head.weight"].any(), "the file itself has changed"


@pytest.mark.parametrize("how", [{}, {"quantize": "int8"}, ON_DISK], ids=["memory", "int8", "disk"])
@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.block_sparse_moe.experts.3.w2.weight"]
)
def test_stored_tensors_of_another_kind_or_shape_are_refused(name: str, how: dict[str, Any], folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")[name]
    asked = "config.json asks for|automatic conversion"  # that of transformers, which stacks experts
    for value, said in [(whole.int(), f"{name} is I32, expected floating-point"), (whole[:-8], asked)]:
        change(folder, name, value)
        with pytest.raises(CheckpointError, match=said):
            HookedMoE.from_pretrained(folder, check=False, **how)
    change(folder, name, whole)
    HookedMoE.from_pretrained(folder, check=False, **how)


@pytest.mark.parametrize("how", [{}, ON_DISK], ids=["memory", "disk"])
def test_a_token_has_as_many_experts_as_there_are_at_most(how: dict[str, Any], folder: Path) -> None:
    for top_k in (0, 9):
        with pytest.raises(UnsupportedModelError, match=rf"is to have {top_k} experts, and a layer has 8: expected 1"):
            HookedMoE.from_pretrained(folder, num_experts_per_tok=top_k, **how)
    assert HookedMoE.from_pretrained(folder, num_experts_per_tok=8, **how).top_k == 8


@pytest.mark.parametrize("asked", ["nonsense", "float8_e4m3fn", torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_no_model_computes_in_is_answered_by_those_that_there_are(asked: Any, folder: Path) -> None:
    for word in ("dtype", "torch_dtype"):
        with pytest.raises(InputError, match=rf"{word} is .*; expected 'auto' or one of torch.bfloat16, torch.float16"):
            HookedMoE.from_pretrained(folder, **{word: asked})
    assert HookedMoE.from_pretrained(folder, dtype="torch.bfloat16").cfg.dtype == torch.bfloat16


def test_sizes_that_do_not_match_cannot_be_ignored(folder: Path) -> None:
    with pytest.raises(InputError, match="ignore_mismatched_sizes=True is not taken; a tensor of another shape"):
        HookedMoE.from_pretrained(folder, ignore_mismatched_sizes=True)
    HookedMoE.from_pretrained(folder, ignore_mismatched_sizes=False)


def test_adapters_do_not_go_onto_a_wrapped_model(folder: Path) -> None:
    model: Any = HookedMoE.from_pretrained(folder)
    for method in (model.load_adapter, model.original_model.load_adapter, model.original_model.add_adapter):
        with pytest.raises(UnsupportedModelError, match="adapters of PEFT do not go onto a wrapped model"):
            method("folder")
    model.save_pretrained(folder / "saved")
    assert torch.equal(logits(HookedMoE.from_pretrained(folder / "saved")), logits(model))


@pytest.mark.typed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT reads it
def test_peft_is_refused_before_it_touches_a_wrapped_model(folder: Path) -> None:
    """PEFT's tuners ask a model for `peft_config` first; the library itself is tried where it is installed."""
    model: Any = HookedMoE.from_pretrained(folder).requires_grad_(False)
    before, modules = logits(model), list(model.modules())
    with pytest.raises(UnsupportedModelError, match="adapters of PEFT do not go onto a wrapped model: .*merge them"):
        hasattr(model, "peft_config")
    assert dict(inspect.getmembers(model))["top_k"] == model.top_k  # reads all that `dir` lists
    peft = pytest.importorskip("peft")
    for targets in (["q_proj"], "all-linear"):
        for task in ("CAUSAL_LM", None):
            with pytest.raises(UnsupportedModelError, match="adapters of PEFT do not go onto a wrapped model"):
                peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, task_type=task))
    with pytest.raises(UnsupportedModelError, match="adapters of PEFT do not go onto a wrapped model"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    assert torch.equal(logits(model), before) and list(map(id, model.modules())) == list(map(id, modules))
    merged = peft.get_peft_model(build("deepseek"), peft.LoraConfig(target_modules=["q_proj"])).merge_and_unload()
    assert logits(HookedMoE.from_hf(merged)).isfinite().all(), "a control: what the message says to do is done"


@pytest.mark.parametrize("family", ["deepseek", "olmoe"])
@pytest.mark.parametrize("how", [{}, ON_DISK], ids=["memory", "disk"])
def test_a_config_is_taken_by_folder_file_or_name(family: str, how: dict[str, Any], tmp_path: Path) -> None:
    """Negative control: without it, the config of the weights' own folder counts."""
    build(family).save_pretrained(tmp_path / "model")
    AutoConfig.from_pretrained(tmp_path / "model", num_experts_per_tok=2).save_pretrained(tmp_path / "other")

    def load(config: Any, **words: Any) -> HookedMoE:
        return HookedMoE.from_pretrained(tmp_path / "model", config=config, **how, **words).requires_grad_(False)

    right, own = logits(load(AutoConfig.from_pretrained(tmp_path / "other"))), logits(load(None))
    assert not torch.equal(right, own) and load(None).top_k == 3
    for config in (tmp_path / "other", str(tmp_path / "other"), str(tmp_path / "other" / "config.json")):
        assert torch.equal(logits(load(config)), right)
    assert load(str(tmp_path / "other"), num_experts_per_tok=4, dtype="bfloat16").top_k == 4
    for config, says in (
        (
            str(tmp_path / "nothing"),
            "nothing', which cannot be read .*expected a config of transformers, or",
        ),
        (
            {"num_experts_per_tok": 2},
            "config is a dict; expected a config of transformers, or the folder",
        ),
    ):
        with pytest.raises(InputError, match=says):
            load(config)
    build("mixtral").config.save_pretrained(tmp_path / "mixtral")
    with pytest.raises(InputError, match=f"mixtral' is of the type mixtral, and .*model holds a {family}"):
        load(str(tmp_path / "mixtral"))
    if family == "deepseek":
        file = tmp_path / "other" / "config.json"
        said = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in said.items() if key != "num_experts_per_tok"}))
        with pytest.raises(CheckpointError, match="other lacks num_experts_per_tok"):
            load(str(tmp_path / "other"))


def test_tuples_of_transformers_are_refused_in_every_way(folder: Path) -> None:
    """Negative control: plain transformers gives a tuple for the word, and fails where the config says it."""
    plain = build("olmoe")
    assert isinstance(plain(tokens(), return_dict=False), tuple)
    plain.config.return_dict = False
    with pytest.raises(AttributeError):
        plain(tokens())
    with pytest.raises(UnsupportedModelError, match="return_dict is False in the config"):
        HookedMoE.from_hf(plain)
    around = build("kimi_k25")  # multimodal: the config around the text part's says it, too
    around.config.return_dict = False
    with pytest.raises(UnsupportedModelError, match="return_dict is False in the config"):
        HookedMoE.from_hf(around)
    model: Any = HookedMoE.from_pretrained(folder)
    right = logits(model)
    for run in (model, model.run_with_cache, model.run_with_hooks, model.routing):
        with pytest.raises(InputError, match="no output of transformers: return_dict=False; return_type"):
            run(tokens(), return_dict=False)
    with pytest.raises(InputError, match="^hf_generate takes no return_dict; return_dict_in_generate says"):
        model.hf_generate(tokens(), max_new_tokens=1, return_dict=False)
    assert torch.equal(logits(model), right)
    model.original_model.config.return_dict = False
    for run in (model, model.run_with_cache, model.generate, model.hf_generate):
        with pytest.raises(UnsupportedModelError, match="return_dict is False in the config"):
            run(tokens())
    with pytest.raises(UnsupportedModelError, match="return_dict is False in the config"):
        HookedMoE.from_pretrained(folder, return_dict=False)


WRONG: dict[str, tuple[Any, ...]] = {
    "a string": ({"variant": 3}, {"revision": ["main"]}, {"variant": {}}),
    "True or False": ({"use_safetensors": "no"}, {"local_files_only": 0}, {"weights_only": "yes"}),
    "a path": ({"offload_folder": 3}, {"gguf_file": ["a"]}, {"subfolder": {}}, {"cache_dir": 1.5}),
    "a dtype": ({"dtype": 3.7}, {"torch_dtype": ["float32"]}),
    "a name": ({"attn_implementation": 3}, {"experts_implementation": ["eager"]}),
    "a GenerationConfig": ({"generation_config": {"do_sample": True}}, {"generation_config": "greedy"}),
    "a dictionary": ({"max_memory": 3}, {"max_memory": "9GiB"}, {"key_mapping": ["a"]}, {"key_mapping": {"a": 1}}),
    "a whole number": ({"num_hidden_layers": "2"}, {"num_hidden_layers": True}, {"num_hidden_layers": [1]}),
    "a config of transformers": ({"quantization_config": "nf4"}, {"quantization_config": 4}),
    "no argument is one": tuple(
        {word: torch.ones(3, 3)} for word in ("device", "dtype", "fold_ln", "n_ctx", "variant", "num_experts_per_tok")
    ),
}


@pytest.mark.typed
@pytest.mark.parametrize("family", ["mixtral", "deepseek"])
def test_a_value_of_another_kind_than_a_loading_word_takes_is_one_line(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    for expected, calls in WRONG.items():
        for words in calls:
            ((word, value),) = words.items()
            with pytest.raises(InputError, match=rf"^from_pretrained: {word} (is|holds) .*{expected}") as caught:
                HookedMoE.from_pretrained(tmp_path, **words)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 200, value
    with pytest.raises(
        InputError, match=r"^from_pretrained: state_dict=\(a dict\) is not taken; .*load_state_dict"
    ) as caught:
        HookedMoE.from_pretrained(tmp_path, state_dict={"a": torch.ones(100, 100)})
    whole: dict[str, Any] = dict.fromkeys(("variant", "subfolder", "max_memory", "generation_config", "key_mapping"))
    words = {"use_safetensors": True, "dtype": "float32", "num_hidden_layers": 2, "local_files_only": True}
    assert HookedMoE.from_pretrained(tmp_path, **whole, **words).cfg.n_layers == 2, "a control: what is meant is taken"


@pytest.mark.typed
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
@pytest.mark.parametrize("word", ["rope_scaling", "rope_parameters"])
def test_rotary_angles_that_transformers_cannot_make_are_one_line(word: str, folder: Path) -> None:
    load: Any = HookedMoE.from_pretrained
    whole = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    odd: list[Any] = [
        {**whole, "rope_type": "nonsense"},
        {**whole, "rope_type": ["linear"]},
        {**whole, "rope_theta": "many"},
        {name: value for name, value in whole.items() if name != "rope_theta"},
        {name: value for name, value in whole.items() if name != "factor"},
    ]
    for value in odd:
        with pytest.raises(
            InputError, match="^transformers makes no rotary angles of rope_parameters[^\n]*expected all"
        ):
            load(folder, **{word: value})
    assert not torch.equal(logits(load(folder, **{word: whole})), logits(load(folder)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": odd[2]}))
    with pytest.raises(InputError, match="rotary angles of rope_parameters"):
        load(folder)
    config["hidden_act"] = "nonsense"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers cannot load .*nonsense"):  # negative control
        load(folder)
