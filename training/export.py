"""Write a training state as a checkpoint in the original DeepSeekMoE format, bfloat16.

python training/export.py --folder training/run --out moe_lens/assets/tiny-deepseekmoe
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from model import Shape
from prepare import BOS, EOS
from safetensors.torch import save_file
from torch import Tensor


def original_names(state: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Tensors under the names of the original code; the training's `routed_gain` is folded into `down_proj`."""
    out = {
        "model.embed_tokens.weight": state["embed"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["unembed"],
    }
    for layer in range(shape.num_hidden_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        out[theirs + "input_layernorm.weight"] = state[ours + "norm1.weight"]
        out[theirs + "post_attention_layernorm.weight"] = state[ours + "norm2.weight"]
        for name, matrix in zip("qkv", state[ours + "attention.qkv"], strict=True):
            out[f"{theirs}self_attn.{name}_proj.weight"] = matrix
        out[theirs + "self_attn.o_proj.weight"] = state[ours + "attention.out"]

        def mlp(source: str, target: str, gain: float = 1.0, expert: int | None = None) -> None:
            gate_up, down = state[source + "gate_up"], state[source + "down"]
            if expert is not None:
                gate_up, down = gate_up[expert], down[expert]
            out[target + "gate_proj.weight"], out[target + "up_proj.weight"] = gate_up
            out[target + "down_proj.weight"] = down * gain

        if layer < shape.first_k_dense_replace:
            mlp(ours + "mlp.", theirs + "mlp.")
            continue
        out[theirs + "mlp.gate.weight"] = state[ours + "mlp.router"]
        mlp(ours + "mlp.shared.", theirs + "mlp.shared_experts.")
        for e in range(shape.n_routed_experts):
            mlp(ours + "mlp.", f"{theirs}mlp.experts.{e}.", shape.routed_gain, e)
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in out.items()}


def config(shape: Shape, balance: float) -> dict[str, object]:
    """config.json in the words of the original code, without its `auto_map`."""
    return {
        "architectures": ["DeepseekForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": balance,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": shape.first_k_dense_replace,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "model_type": "deepseek",
        "moe_intermediate_size": shape.moe_intermediate_size,
        "moe_layer_freq": 1,
        "n_routed_experts": shape.n_routed_experts,
        "n_shared_experts": shape.n_shared_experts,
        "norm_topk_prob": False,
        "num_attention_heads": shape.num_attention_heads,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_attention_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "scoring_func": "softmax",
        "seq_aux": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": EOS,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 512,
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def main() -> None:
    """Export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    state = torch.load(args.folder / "state.pt", map_location="cpu", weights_only=True)
    shape = Shape(max_position_embeddings=state["args"]["length"])
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(original_names(state["model"], shape), args.out / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": config(shape, state["args"]["balance"]),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1},
        "tokenizer_config.json": TOKENIZER,
    }
    for name, content in files.items():
        (args.out / name).write_text(json.dumps(content, indent=2) + "\n")
    shutil.copy(args.folder / "tokenizer.json", args.out / "tokenizer.json")
    print(f"step {state['step']}, {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
