"""Everything that only a GPU can show, in under ten minutes, and one table of it.

    .venv/bin/python scripts/gpu.py [--dry]

The tests that need a GPU; `benchmarks/forward.py` in bfloat16; the full shape of DeepSeekMoE 16B in bfloat16 and in 4
bits, with random weights made on the device; and a routing study of 100,000 tokens. What does not fit the device is
left out, and said. `--dry` runs the same code on the processor, with tiny shapes, in under a minute: it tries the
script.
"""

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device

from moe_lens import HookedMoE
from moe_lens.data import Reading, embedded_domains
from moe_lens.model.families.deepseek import DeepseekConfig, DeepseekForCausalLM
from moe_lens.model.loading.device_map import gibibytes
from moe_lens.model.loading.pretrained import EMBEDDED, load_tokenizer, resolve_name
from moe_lens.model.loading.quantising import matrices_of
from moe_lens.studies import RoutingStudy, run

ROOT = Path(__file__).parents[1]
FULL: dict[str, Any] = {
    "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 16, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "max_position_embeddings": 4096,
}  # fmt: skip
TINY: dict[str, Any] = {
    **FULL, "vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 128, "moe_intermediate_size": 64, "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    device: str
    shape: dict[str, Any]
    batch: tuple[int, int]
    """Texts and tokens of a forward pass."""
    study_tokens: int
    rounds: int


REAL = Scale("cuda", FULL, (8, 512), 100_000, 9)
DRY = Scale("cpu", TINY, (2, 16), 2_000, 1)


def parameters_of(shape: dict[str, Any]) -> int:
    """Of a DeepSeekMoE."""
    with torch.device("meta"):
        return sum(p.numel() for p in DeepseekForCausalLM(DeepseekConfig(**shape, moe_layer_freq=1)).parameters())


def random_model(shape: dict[str, Any], device: str, scheme: Any = None) -> HookedMoE:
    """A DeepSeekMoE in bfloat16 with random weights, made on the device one after another, packed or not."""
    with init_empty_weights(include_buffers=False):
        hf: Any = DeepseekForCausalLM(DeepseekConfig(**shape, moe_layer_freq=1))
        hf = hf.to(torch.bfloat16)
    places = matrices_of(hf, scheme) if scheme else {}
    torch.manual_seed(0)
    for name, parameter in list(hf.named_parameters()):
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        value.fill_(1) if "norm" in name else value.normal_(std=0.02)
        if name in places:
            places[name].pack(value, scheme)
        else:
            set_module_tensor_to_device(hf, name, device, value=value)
    tokenizer = load_tokenizer(resolve_name(EMBEDDED))
    return HookedMoE.from_hf(hf.to(device).eval(), tokenizer).requires_grad_(False)


def synchronised(device: str) -> float:
    """The time, when the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def speed(model: HookedMoE, scale: Scale) -> str:
    """Tokens a second of a forward pass and of decoding, and the memory that they took."""
    tokens = torch.randint(scale.shape["vocab_size"], scale.batch, device=scale.device)
    seconds = []
    for _ in range(4):
        start = synchronised(scale.device)
        model(tokens, return_type=None)
        seconds.append(synchronised(scale.device) - start)
    new = 32
    start = synchronised(scale.device)
    model.generate(tokens[:1, :16], max_new_tokens=new, do_sample=False, stop_at_eos=False, verbose=False)
    decoding = new / (synchronised(scale.device) - start)
    peak = f", {gibibytes(torch.cuda.max_memory_allocated())}" if scale.device == "cuda" else ""
    return f"{tokens.numel() / sorted(seconds)[1]:,.0f} tokens/s, {decoding:,.1f} decoded/s{peak}"


def study(model: HookedMoE, scale: Scale) -> str:
    """A routing study of the embedded texts."""
    domains = embedded_domains()
    start = synchronised(scale.device)
    result = run(RoutingStudy(), model, domains, reading=Reading(tokens=scale.study_tokens // len(domains)))
    seconds = synchronised(scale.device) - start
    tokens = sum(domain["tokens"] for domain in result.manifest["read"])
    return f"{tokens:,} tokens of {len(domains)} domains in {seconds:,.1f} s: {tokens / seconds:,.0f} tokens/s"


def models(scale: Scale) -> list[tuple[str, Callable[[], str]]]:
    """A row for each dtype, and for the study on the widest that fits."""
    free = torch.cuda.mem_get_info()[0] if scale.device == "cuda" else sys.maxsize
    count, rows, studied = parameters_of(scale.shape), list[tuple[str, Callable[[], str]]](), False
    for name, scheme, width in (("bfloat16", None, 2.0), ("nf4", "nf4", 0.6)):
        needed = int(width * count) + (2**31 if scale.device == "cuda" else 0)  # activations
        if needed > free:
            rows.append((f"full shape, {name}", lambda needed=needed: f"left out: needs {gibibytes(needed)}"))
            continue
        with_study, studied = not studied, True

        def both(scheme: Any = scheme, with_study: bool = with_study) -> str:
            if scale.device == "cuda":
                gc.collect()  # the model before this one
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            model = random_model(scale.shape, scale.device, scheme)
            found = speed(model, scale)
            return f"{found}; routing study: {study(model, scale)}" if with_study else found

        rows.append((f"full shape, {name}", both))
    return rows


def child(*arguments: str) -> str:
    """What a Python program prints last; its whole output is the error if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{done.stdout}\n{done.stderr}")
    return done.stdout.strip()


def tests() -> str:
    """Those that need a GPU; without one they are skipped."""
    marked = [
        str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text("utf-8")
    ]
    return child("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *marked).splitlines()[-1]


def forward(scale: Scale) -> str:
    """The lines of `benchmarks/forward.py` that say how much slower than plain transformers, and how logits differ."""
    how = ["--device", scale.device, "--dtype", "bfloat16", "--rounds", str(scale.rounds)]
    lines = child("benchmarks/forward.py", *how).splitlines()
    return "; ".join(" ".join(line.split()) for line in lines if line.startswith(("HookedMoE", "logits")))


def main(arguments: list[str] | None = None) -> int:
    """Run everything; print a table, and what failed in full."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the processor, with tiny shapes")
    scale = DRY if parser.parse_args(arguments).dry else REAL
    if scale is REAL and not torch.cuda.is_available():
        print("there is no CUDA device; --dry runs the same code on the processor", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if scale is REAL else "processor, dry"
    steps = [("gpu tests", tests), ("benchmarks/forward.py, bfloat16", lambda: forward(scale)), *models(scale)]
    failed: list[str] = []
    table = [("step", "seconds", f"found on {name}")]
    for step, work in steps:
        start = time.perf_counter()
        try:
            found = work()
        except Exception as error:
            failed.append(f"{step}: {error}")
            found = f"FAILED: {type(error).__name__}"
        table.append((step, f"{time.perf_counter() - start:.0f}", found))
        print(f"{step}: {found}", flush=True)
    wide = [max(len(row[column]) for row in table) for column in (0, 1)]
    print("\n" + "\n".join(f"{a:{wide[0]}}  {b:>{wide[1]}}  {c}" for a, b, c in table))
    print(*failed, sep="\n\n", end="" if not failed else "\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
