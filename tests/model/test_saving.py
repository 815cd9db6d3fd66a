"""What is saved is the family's own checkpoint, with nothing of ours in it: transformers and moe_lens read it."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, MixtralForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.cache.identity import identity
from moe_lens.model.loading import saving
from moe_lens.model.loading.gguf_file import read_gguf_config
from moe_lens.model.loading.quantising import quantise
from moe_lens.model.loading.through_transformers import UNREADABLE
from moe_lens.pruning import Plan, export
from tests.families import CONFIGS, build, tokens
from tests.matrix.configs import build as matrix_build
from tests.matrix.configs import tokens as matrix_tokens
from tests.wrapped import wrapped

families = pytest.mark.parametrize("family", CONFIGS)


def stored(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


@families
def test_a_saved_model_is_read_by_transformers_and_by_us(family: str, tmp_path: Path) -> None:
    case = wrapped(family)
    case.model.save_pretrained(tmp_path / "ours")
    case.hf.save_pretrained(tmp_path / "theirs")
    ours, theirs = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert ours.keys() == theirs.keys(), "no bias of TransformerLens's, no name of its wrappers"
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs")]
    assert configs[0] == configs[1]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(plain(case.tokens).logits, case.logits)
        assert torch.equal(HookedMoE.from_pretrained(tmp_path / "ours")(case.tokens), case.logits)


def test_an_edited_weight_is_saved(tmp_path: Path) -> None:
    model = HookedMoE.from_hf(build("deepseek"), check=False)
    with torch.no_grad():
        model.W_out[1, 3].zero_()
        expected = model(wrapped("deepseek").tokens)
    model.save_pretrained(tmp_path)
    assert not stored(tmp_path)["model.layers.1.mlp.experts.3.down_proj.weight"].any()
    with torch.no_grad():
        assert torch.equal(HookedMoE.from_pretrained(tmp_path)(wrapped("deepseek").tokens), expected)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    hf = build("deepseek", tie_word_embeddings=True)
    ids = wrapped("deepseek").tokens
    with torch.no_grad():
        before = hf(ids).logits
    model = HookedMoE.from_hf(hf, check=False)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in stored(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids), before)
        again = HookedMoE.from_pretrained(tmp_path)
        assert torch.equal(again(ids), before)
    assert again.unembed.weight.data_ptr() == again.embed.weight.data_ptr()


def test_several_shards(tmp_path: Path) -> None:
    case = wrapped("deepseek")
    case.model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(HookedMoE.from_pretrained(tmp_path)(case.tokens), case.logits)


# --- however a model was loaded, what is saved is the whole of it, or nothing is written ---


@pytest.mark.typed
@pytest.mark.parametrize("variant", [None, "fp32"])
@pytest.mark.parametrize("sizes", [("1MB", "20KB"), ("20KB", "1MB"), ("20KB", "30KB"), ("1MB", "1MB")])
def test_what_is_saved_takes_the_place_of_what_was(sizes: tuple[str, str], variant: str | None, tmp_path: Path) -> None:
    """transformers leaves an older model.safetensors beside new shards, and reads that."""
    model = HookedMoE.from_hf(build("olmoe"))
    model.save_pretrained(tmp_path, max_shard_size=sizes[0], variant=variant)
    other = "model.other.safetensors"
    (tmp_path / other).write_bytes(b"somebody's own")
    with torch.no_grad():
        before = model(tokens())
        model.W_E.mul_(1.5)
        edited = model(tokens())
        model.save_pretrained(tmp_path, max_shard_size=sizes[1], variant=variant)
        for read in (HookedMoE, AutoModelForCausalLM):
            found = read.from_pretrained(tmp_path, variant=variant)(tokens())
            assert torch.equal(getattr(found, "logits", found), edited) and not torch.equal(edited, before)
    model.save_pretrained(tmp_path, max_shard_size=sizes[0], variant=variant, is_main_process=False)
    assert torch.equal(HookedMoE.from_pretrained(tmp_path, variant=variant)(tokens()), edited), "nothing is written"
    dot = f".{variant}" if variant else ""
    ways = {f"model{dot}.safetensors", f"model.safetensors.index{dot}.json"}
    assert len(ways & {file.name for file in tmp_path.iterdir()}) == 1 and (tmp_path / other).exists()


def rewritten(folder: Path, change: Any, **config: Any) -> Path:
    """A checkpoint with tensors and config changed on disk."""
    file = folder / "model.safetensors"
    tensors = change(stored(folder))
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))
    return folder


def in_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix of the layers in eight bits, with a scale for each block of 8 × 8."""
    found = {}
    for name, value in tensors.items():
        found[name] = value
        if "proj" in name or ".w1." in name or ".w2." in name or ".w3." in name:
            rows, columns = value.shape
            scale = torch.rand(rows // 8, columns // 8, generator=torch.Generator().manual_seed(rows)) + 0.5
            found[name] = value.to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = scale
    return found


def in_mxfp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts as gpt-oss stores them: blocks of 32 numbers in 4 bits, and their scales."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, value in tensors.items():
        found[name] = value.to(torch.bfloat16)
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, rows, columns = found.pop(name).shape
            shape = experts, columns, rows // 32
            found[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            found[f"{name}_scales"] = torch.randint(120, 124, shape, generator=generator, dtype=torch.uint8)
    return found


def fp8(folder: Path) -> HookedMoE:
    rewritten(folder, in_fp8, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    how = FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 8))
    return HookedMoE.from_pretrained(folder, quantization_config=how, dtype=torch.float32)


def mxfp4(folder: Path) -> HookedMoE:
    rewritten(folder, in_mxfp4, quantization_config={"quant_method": "mxfp4"}, dtype="bfloat16")
    return HookedMoE.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))


def renamed(folder: Path) -> HookedMoE:
    rewritten(folder, lambda tensors: {name.replace("model.", "trunk."): value for name, value in tensors.items()})
    hf = AutoModelForCausalLM.from_pretrained(folder, key_mapping={r"^trunk\.": "model."})
    return HookedMoE.from_hf(hf)


def on_disk(folder: Path) -> HookedMoE:
    last = json.loads((folder / "config.json").read_text())["num_hidden_layers"] - 1
    places = {f"model.layers.{layer}": "cpu" for layer in range(last)} | {f"model.layers.{last}": "disk"}
    places |= dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    return HookedMoE.from_pretrained(folder, device_map=places, offload_folder=folder / "offload")


def as_it_is(folder: Path) -> HookedMoE:
    return HookedMoE.from_pretrained(folder)


def in_a_base_model(folder: Path) -> HookedMoE:
    """Stored without the prefix of the model around it."""
    change: Any = lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()}  # noqa: E731
    return HookedMoE.from_hf(AutoModelForCausalLM.from_pretrained(rewritten(folder, change)))


GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}
"""What tensors of a Qwen3-MoE are called in GGUF files."""
NUMBERED = r"model\.layers\.\d+\.|mlp\.experts\.\d+\."


def gguf(folder: Path) -> HookedMoE:
    """Read from a GGUF file alone, whose numbers are not packed."""
    writer: Any = pytest.importorskip("gguf").GGUFWriter(folder / "model.gguf", "qwen3moe")
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = hf(matrix_tokens()).logits
    config: Any = hf.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_string("qwen3moe.rope.scaling.type", config.rope_parameters["rope_type"])
    writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)][: config.vocab_size - 3]
    vocabulary = [*letters, "th", "the", "<|end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * (len(vocabulary) - 1) + [3])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(len(vocabulary) - 1)
    writer.add_pad_token_id(len(vocabulary) - 1)
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, value in stored(folder).items():
        layer, expert = (re.search(rf"{of}\.(\d+)\.", name) for of in ("layers", "experts"))
        called = f"{GGUF[re.sub(NUMBERED, '', name.removesuffix('.weight'))]}.weight"
        called = f"blk.{layer[1]}.{called}" if layer else called
        stacks.setdefault(called, {})[int(expert[1]) if expert else 0] = value
    for called, values in stacks.items():
        whole = torch.stack([values[expert] for expert in range(len(values))]) if "_exps" in called else values[0]
        writer.add_tensor(called, whole.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for file in (*folder.glob("*.safetensors"), folder / "config.json"):
        file.unlink()
    config.save_pretrained(folder.parent)
    for given in (config, folder.parent):
        configured = HookedMoE.from_pretrained(folder / "model.gguf", config=given, check=False)
        assert torch.equal(configured(matrix_tokens()), logits), "a config beside it counts, and says its sizes"
    model = HookedMoE.from_pretrained(folder / "model.gguf")
    for scheme in ("int8", "stored"):
        with pytest.raises(InputError, match=f"quantize='{scheme}': the matrices of a GGUF file are unpacked"):
            HookedMoE.from_pretrained(folder / "model.gguf", quantize=cast(Any, scheme))
    for word in ("first_n_layers", "num_hidden_layers"):
        with pytest.raises(InputError, match=f"reads all layers of a GGUF file: leave {word} out"):
            HookedMoE.from_pretrained(folder / "model.gguf", **cast(Any, {word: 1}))
    read: Any = model.tokenizer
    assert read.tokenize("the") == ["the"], "its tokenizer is the file's"
    with torch.no_grad():
        assert torch.equal(model(matrix_tokens()), logits), "as transformers computes it"
    return model


def in_memory(model: Any) -> Any:
    """A model whose numbers begin where tensors do: in a file they begin anywhere, and products may differ."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64, "moe_intermediate_size": 32}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize(
    ("model_type", "way"),
    [
        *[(model_type, way) for model_type in ("mixtral", "qwen3_moe") for way in (as_it_is, fp8, renamed, on_disk)],
        ("deepseek_v3", on_disk),
        ("deepseek", on_disk),
        ("gpt_oss", mxfp4),
        ("gpt_oss", on_disk),
        ("mixtral", in_a_base_model),
        ("qwen3_moe", gguf),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_saved_however_it_was_loaded(model_type: str, way: Any, tied: bool, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {} if way is on_disk else WIDE
    if way is gguf:
        yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4}
        # transformers reads neither: it would take 768, and no scaling
        sizes = {**WIDE, "moe_intermediate_size": 96, "rope_parameters": yarn}
    matrix_build(model_type, tie_word_embeddings=tied, **sizes).save_pretrained(tmp_path / "stored")
    model = way(tmp_path / "stored")
    with torch.no_grad():
        logits = model(matrix_tokens())
    assert logits.isfinite().all()
    model.save_pretrained(tmp_path / "saved")
    assert not {"quantization_config"} & json.loads((tmp_path / "saved" / "config.json").read_text()).keys()
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    plain, info = loaded
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(in_memory(plain).eval()(matrix_tokens()).logits, logits)
        hooked = HookedMoE.from_pretrained(tmp_path / "saved")
        in_memory(hooked.original_model)
        assert torch.equal(hooked(matrix_tokens()), logits)
    model.save_pretrained(tmp_path / "again")
    saved, again = stored(tmp_path / "saved"), stored(tmp_path / "again")
    assert saved.keys() == again.keys() and all(torch.equal(again[name], saved[name]) for name in saved)


def test_a_dequantised_model_can_be_pruned(tmp_path: Path) -> None:
    matrix_build("gpt_oss", **WIDE).save_pretrained(tmp_path / "stored")
    model = mxfp4(tmp_path / "stored")
    kept = tuple(tuple(range(6)) for _ in model.moe_layers)
    values = torch.zeros(len(kept), model.n_experts)
    plan = Plan(identity(model), model.moe_layers, kept, model.top_k, values, "by hand")
    export(model, plan, tmp_path / "smaller")
    smaller = HookedMoE.from_pretrained(tmp_path / "smaller")
    assert smaller.n_experts == 6
    assert torch.equal(smaller.W_out[0], model.W_out[0][:6])


def test_what_would_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with the dequantisation undone, as transformers did before 5.24, every expert would be lost."""
    matrix_build("gpt_oss", **WIDE).save_pretrained(tmp_path / "stored")
    model = mxfp4(tmp_path / "stored")
    hf: Any = model.original_model

    def loaded_by() -> Any:
        return vars(hf).get("_weight_conversions")  # before transformers 5.24

    before = loaded_by()
    packed = ("experts.gate_up_proj", "experts.down_proj")
    undone = {f"{name}_blocks" if name.endswith(packed) else name: at for name, at in model.state_dict().items()}
    monkeypatch.setattr(saving, "revert_weight_conversion", lambda *_: undone)
    with pytest.raises(UnsupportedModelError, match=r"write model\.layers\.0.*_blocks and 7 more under names"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert loaded_by() == before, "as it was"
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "saved")
    assert loaded_by() == before


class Quantiser:
    """As one of transformers says of itself."""

    class quantization_config:
        quant_method = "bitsandbytes_4bit"


def test_a_quantised_model_is_not_written(tmp_path: Path) -> None:
    model = HookedMoE.from_hf(build("mixtral"), check=False)
    object.__setattr__(model.original_model, "hf_quantizer", Quantiser())
    with pytest.raises(UnsupportedModelError, match="quantised .by bitsandbytes_4bit"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("how", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_what_bitsandbytes_packed_is_not_written(how: dict[str, Any], tmp_path: Path) -> None:
    """Its experts stay as they are, so that it can be wrapped; the rest are bytes."""
    pytest.importorskip("bitsandbytes")
    matrix_build("qwen3_moe", **WIDE).save_pretrained(tmp_path / "stored")
    packed = BitsAndBytesConfig(**how)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", quantization_config=packed, dtype=torch.float32)
    model = HookedMoE.from_hf(hf, check=False)  # from_pretrained would pack the experts too, and in our way
    for refused in (lambda: model.save_pretrained(tmp_path / "saved"), model.state_dict):
        with pytest.raises(UnsupportedModelError, match=r"quantised .*q_proj.weight is torch.u?int8"):
            refused()
    assert not (tmp_path / "saved").exists()


@pytest.mark.typed
def test_a_gguf_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00")
    (tmp_path / "other.gguf").write_bytes(b"GG" * 100)
    for name, says in {
        "no": "has no file no.gguf",
        "short": "cannot read .*short",
        "other": "cannot read .*other",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            HookedMoE.from_pretrained(tmp_path, gguf_file=f"{name}.gguf")
    (tmp_path / "large-00001-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match="one of 3 parts of a model. Join them"):
        HookedMoE.from_pretrained(tmp_path / "large-00001-of-00003.gguf")
    writer: Any = pytest.importorskip("gguf").GGUFWriter(tmp_path / "v2.gguf", "deepseek2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="does not read GGUF files of the architecture 'deepseek2'"):
        HookedMoE.from_pretrained(tmp_path / "v2.gguf")


YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 8}


@pytest.mark.typed
def test_what_a_gguf_file_says_of_rotary_angles_is_read_or_refused(tmp_path: Path) -> None:
    library: Any = pytest.importorskip("gguf")

    def read(scaling: dict[str, Any], architecture: str = "qwen3moe", *given: str) -> Any:
        writer = library.GGUFWriter(tmp_path / "m.gguf", architecture)
        for key, value in scaling.items():
            if key.startswith("rope_"):
                writer.add_tensor(f"{key}.weight", numpy.ones(4, dtype=numpy.float32))
                continue
            add = writer.add_string if isinstance(value, str) else writer.add_float32
            add(f"{architecture}.rope.{key}", value)
        parts = writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file
        for write in (*parts, writer.close):
            write()
        return read_gguf_config(str(tmp_path), "m.gguf", {}, UNREADABLE, given)[2].get("rope_parameters")

    yarn: dict[str, Any] = {f"scaling.{key}": value for key, value in YARN.items()}
    assert not read({}) and not read({**yarn, "scaling.type": "none"}), "a control: as nothing is said of it"
    found = read({**yarn, "scaling.yarn_beta_fast": 16.0, "scaling.finetuned": 1.0})
    assert {**found, "rope_theta": 0} == {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16.0},
        "rope_theta": 0,
    }
    for linear in ({"scaling.type": "linear", "scaling.factor": 2.0}, {"scale_linear": 2.0}):
        assert read(linear).items() >= {"rope_type": "linear", "factor": 2.0}.items()
    for strange, says in (
        ({"scaling.type": "longrope"}, r"rope\.scaling\.type = 'longrope' is not read .* Pass rope_parameters="),
        ({"scaling.attn_factor": 2.0}, r"rope\.scaling\.attn_factor = 2\.0 is not read"),
        ({"rope_freqs": 1}, r"the scaling in rope_freqs\.weight is not read"),
    ):
        for others in (yarn, {}):
            with pytest.raises(UnsupportedModelError, match=says) as refused:
                read(others | strange)
            assert "\n" not in str(refused.value)
        assert read(yarn | strange, "qwen3moe", "rope_parameters") is None, "what is passed counts"
    with pytest.raises(UnsupportedModelError, match=r"misreads rope\.scaling of the architecture 'gpt-oss'"):
        read(yarn, "gpt-oss")


class ByHand(torch.nn.Module):
    """A low-rank adapter such as people write."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base = base
        self.A = torch.nn.Parameter(torch.randn(2, base.in_features))
        self.B = torch.nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


def with_adapters(hf: Any) -> None:
    for layer in hf.model.layers:
        layer.self_attn.q_proj = ByHand(layer.self_attn.q_proj)


def with_a_bias(hf: Any) -> None:
    hf.lm_head = torch.nn.Linear(hf.lm_head.in_features, hf.lm_head.out_features, bias=True)


def with_fewer_layers(hf: Any) -> None:
    hf.model.layers = hf.model.layers[:2]


def with_fewer_tokens(hf: Any) -> None:
    hf.lm_head = torch.nn.Linear(hf.lm_head.in_features, 7, bias=False)


NOT_OF_THE_CLASS = [
    ("mixtral", with_adapters, r"q_proj\.A is \(2, \d+\), and absent in a MixtralForCausalLM .* and \d+ more differ"),
    ("mixtral", with_a_bias, r"lm_head\.bias is \(\d+,\), and absent in a Mixtral.* config; nothing was written"),
    ("glm4_moe", with_fewer_layers, r"layers\.2\.\S+ is absent, and \(.* in a Glm4MoeForCausalLM of its config"),
    ("glm4_moe", with_fewer_tokens, r"lm_head\.weight is \(7, \d+\), and \(\d+, \d+\) in a Glm4MoeForCausalLM"),
]


@pytest.mark.parametrize(("model_type", "change", "says"), NOT_OF_THE_CLASS)
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_modules_that_the_family_has_not_are_not_written(
    model_type: str, change: Any, says: str, scheme: Any, tmp_path: Path
) -> None:
    hf = matrix_build(model_type)
    change(hf)
    if scheme is not None:
        quantise(hf, scheme)
    with pytest.raises(UnsupportedModelError, match=f"^what would be written does not load as this model: .*{says}"):
        HookedMoE.from_hf(hf, check=False).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_class_of_one_s_own_is_held_against_the_family_s(tmp_path: Path) -> None:
    class Mine(MixtralForCausalLM):
        def __init__(self, config: Any, adapters: bool):
            super().__init__(config)
            if adapters:
                with_adapters(self)

    config = matrix_build("mixtral").config
    HookedMoE.from_hf(Mine(config, False), check=False).save_pretrained(tmp_path / "plain")
    HookedMoE.from_pretrained(tmp_path / "plain")
    with pytest.raises(UnsupportedModelError, match="absent in a MixtralForCausalLM"):
        HookedMoE.from_hf(Mine(config, True), check=False).save_pretrained(tmp_path / "saved")


def test_a_config_that_no_model_has_is_not_written(tmp_path: Path) -> None:
    model = HookedMoE.from_hf(matrix_build("mixtral"), check=False)
    hf: Any = model.original_model
    hf.config.hidden_act = "none"
    with pytest.raises(UnsupportedModelError, match="^no MixtralForCausalLM can be made of this config: .*none"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_deepseek_is_not_written_under_names_that_are_not_read(tmp_path: Path) -> None:
    """Of other families, transformers' own names are read too."""
    with pytest.raises(
        InputError, match="under the names of its original checkpoint alone; leave save_original_format"
    ):
        wrapped("deepseek").model.save_pretrained(tmp_path / "deepseek", save_original_format=False)
    assert not (tmp_path / "deepseek").exists()
    model = wrapped("mixtral").model
    model.save_pretrained(tmp_path / "mixtral", save_original_format=False)
    again = HookedMoE.from_pretrained(tmp_path / "mixtral", check=False)
    assert torch.equal(again(tokens()), model(tokens()))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("")
    with pytest.raises(InputError, match="is a file; expected a folder"):
        HookedMoE.from_hf(build("mixtral"), check=False).save_pretrained(tmp_path / "saved")


def test_parameters_that_are_computed_are_not_written(tmp_path: Path) -> None:
    for make, undo in (
        (partial(prune.random_unstructured, amount=0.5), prune.remove),
        (
            partial(parametrize.register_parametrization, parametrization=torch.nn.Tanh()),
            parametrize.remove_parametrizations,
        ),
    ):
        hf = build("mixtral")
        model = HookedMoE.from_hf(hf)
        plain, name = model(ids := matrix_tokens()), "gate_up_proj"
        experts: Any = hf.model.layers[2].mlp.experts
        make(experts, name)
        assert not torch.equal(model(ids), plain), "it is used"
        with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.experts\.gate_up_proj is computed from"):
            model.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()
        with pytest.raises(UnsupportedModelError, match="make it permanent first"):
            model.state_dict()
        undo(experts, name)
        model.save_pretrained(tmp_path / "permanent")
        assert torch.equal(HookedMoE.from_pretrained(tmp_path / "permanent")(ids), model(ids))


@pytest.mark.typed
@pytest.mark.parametrize("model_type", ["mixtral", "bailing_hybrid"])
def test_files_that_a_model_is_read_from_are_not_written_over(model_type: str, tmp_path: Path) -> None:
    matrix_build(model_type).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    ids = matrix_tokens()
    model = HookedMoE.from_pretrained(tmp_path / "model", device_map={"model": "disk", "lm_head": "disk"})
    expected = model(ids)
    with pytest.raises(InputError, match="holds the files that this model reads its parameters from in every pass"):
        model.save_pretrained(tmp_path / "other" / ".." / "model")
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == files
    model.save_pretrained(tmp_path / "copy")
    assert torch.equal(HookedMoE.from_pretrained(tmp_path / "copy")(ids), expected)
