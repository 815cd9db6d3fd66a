"""Time and memory of moe_lens beside plain transformers, hooks by hand, nnsight and TransformerLens's own bridge.

python -m benchmarks.side_by_side [--rounds 9] [--threads 1] [--only families memory …] [--write PAGE]

`make bench` runs it where the peers are installed, and fills the tables of docs/performance.md. Families: random models
of one shape (d_model 256, 8 layers, 64 experts of width 176, top-6; 4 × 128 tokens, float32), whose plain twin computes
at its fastest (sdpa attention, grouped_mm experts). Every number is a ratio of runs that take turns, of processor time.
"""

import argparse
import copy
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moe_lens.model.families.deepseek as _registers  # noqa: F401  # pyright: ignore[reportUnusedImport]
from benchmarks import peers
from benchmarks.measuring import Run, interleaved, machine, peak_memory, tensor_memory
from moe_lens import HookedMoE, LogitLens, PartialSum, Selection, names
from moe_lens.data import TokenBatch, embedded_domains
from moe_lens.errors import InputError
from moe_lens.freed_memory import keep_freed_memory
from moe_lens.interventions import Loss, expert_attribution
from moe_lens.stats import PairStats, RoutingStats, observe

COMMON: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
    "intermediate_size": 176, "max_position_embeddings": 4096, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHARED = {"n_shared_experts": 2, "first_k_dense_replace": 1, "intermediate_size": 1024}
MLA = {"q_lora_rank": 96, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek": {**SHARED, "moe_layer_freq": 1},
    "deepseek_v3": {**SHARED, **MLA, "n_group": 8, "topk_group": 4},
    "olmoe": {},
    "mixtral": {},
    "qwen3_moe": {"head_dim": 32, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gpt_oss": {"head_dim": 32},
}
"""What a family's config has beside `COMMON`, width, and number of experts."""

SIZES = {"tokens": (256, 512, 1024, 2048), "experts": (16, 32, 64, 128), "k": (1, 2, 4, 8), "layers": (2, 4, 8)}
BASE = {"tokens": 512, "experts": 32, "k": 4, "layers": 4}
"""Where growth begins: one of these changes at a time."""

PLAIN = "plain transformers"
Table = tuple[list[str], list[list[str]]]


def random_model(model_type: str, experts: int = 64, k: int = 6, width: int = 176, **changes: Any) -> Any:
    """A random model of a family."""
    counted = "num_local_experts" if model_type in ("mixtral", "gpt_oss") else "num_experts"
    counted = "n_routed_experts" if model_type.startswith("deepseek") else counted
    sizes = {counted: experts, "num_experts_per_tok": k}
    if model_type in ("mixtral", "gpt_oss", "olmoe"):
        sizes["intermediate_size"] = width
    else:
        sizes["moe_intermediate_size"] = width
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**COMMON, **FAMILIES[model_type], **sizes, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def experts_cached(model: HookedMoE) -> list[str]:
    """Hook names of the router's logits and every active expert's output, of all layers."""
    return [names.mlp(name, layer) for layer in model.moe_layers for name in (names.ROUTER_LOGITS, names.EXPERT_OUT)]


def family_runs(plain: Any, tokens: Tensor) -> dict[str, Run]:
    """What is timed for one family; the first is what the others are compared with."""
    hooked = HookedMoE.from_hf(copy.deepcopy(plain))
    wanted = experts_cached(hooked)
    inside_moe = [name for name in hooked.hook_dict if ".mlp." in name]
    nnsight, bridge = peers.nnsight_run(plain, tokens), peers.bridge(plain)
    runs: dict[str, Run] = {
        PLAIN: lambda: plain(tokens, use_cache=False).logits,
        "HookedMoE, no hooks": lambda: hooked(tokens, use_cache=False),
        "HookedMoE, experts": lambda: hooked.run_with_cache(tokens, names_filter=wanted, use_cache=False),
        "by hand, experts": lambda: peers.by_hand(plain, tokens),
    }
    if nnsight is not None:
        runs["nnsight, experts"] = nnsight
    runs["HookedMoE, every hook of the MLPs"] = lambda: hooked.run_with_cache(
        tokens, names_filter=inside_moe, use_cache=False
    )
    runs["HookedMoE, everything"] = lambda: hooked.run_with_cache(tokens, use_cache=False)
    if bridge is not None:
        runs["TransformerLens, no hooks"] = lambda: bridge(tokens, use_cache=False)
        runs["TransformerLens, everything but experts"] = lambda: bridge.run_with_cache(tokens, use_cache=False)
    return runs


def each_family(tokens: tuple[int, int], **sizes: Any) -> Iterator[tuple[str, dict[str, Run]]]:
    """Families with their runs, of models that were seen to compute the same."""
    for family in FAMILIES:
        plain = random_model(family, **sizes)
        runs = family_runs(plain, torch.randint(3, COMMON["vocab_size"], tokens))
        assert torch.equal(runs[PLAIN](), runs["HookedMoE, no hooks"]()), f"{family}: logits differ"
        yield family, runs


def time_table(rounds: int, tokens: tuple[int, int], **sizes: Any) -> Table:
    """Time by run and family."""
    times: dict[str, dict[str, str]] = {}
    for family, runs in each_family(tokens, **sizes):
        for name, timed in interleaved(runs, rounds).items():
            shown = f"{1000 * timed.seconds:.0f} ms" if name == PLAIN else f"{timed.ratio:.2f} ×"
            times.setdefault(name, {})[family] = shown
        tell(f"{family}: {', '.join(f'{name} {of[family]}' for name, of in times.items() if family in of)}")
    return by_family(times)


def kept_table(rounds: int, tokens: tuple[int, int]) -> dict[str, Table]:
    """The same in a process whose C library keeps what is freed, for good."""
    if keep_freed_memory():
        return {"kept": time_table(rounds, tokens)}
    tell("this C library, or MALLOC_TRIM_THRESHOLD_, does not let freed memory be kept: no times with it")
    return {}


def memory_tables(tokens: tuple[int, int], **sizes: Any) -> dict[str, Table]:
    """Memory by run and family: of tensors, to the byte, and of the process."""
    tensors: dict[str, dict[str, str]] = {}
    resident: dict[str, dict[str, str]] = {}
    for family, runs in each_family(tokens, **sizes):
        for name, run in runs.items():
            greatest, left = tensor_memory(run)
            tensors.setdefault(name, {})[family] = f"{greatest / 1e6:.1f} / {left / 1e6:.1f} MB"
            resident.setdefault(name, {})[family] = f"{peak_memory(run) / 1e6:.0f} MB"
        tell(f"{family}: {', '.join(f'{name} {of[family]}' for name, of in tensors.items() if family in of)}")
    return {"tensors": by_family(tensors), "memory": by_family(resident)}


def by_family(cells: dict[str, dict[str, str]]) -> Table:
    """A row for each run."""
    return ["", *FAMILIES], [[name, *(of.get(family, "–") for family in FAMILIES)] for name, of in cells.items()]


def growth_table(rounds: int, base: dict[str, int], sizes: dict[str, tuple[int, ...]]) -> Table:
    """How plain transformers and the cached pass grow, an OLMoE shape's sizes one at a time."""
    runs: dict[str, Run] = {}
    keys: dict[tuple[str, int], str] = {}

    def add(of: dict[str, int]) -> str:
        name = str(of)
        if name not in runs:
            plain = random_model("olmoe", experts=of["experts"], k=of["k"], num_hidden_layers=of["layers"])
            hooked, given = (
                HookedMoE.from_hf(copy.deepcopy(plain)),
                torch.randint(3, COMMON["vocab_size"], (4, of["tokens"] // 4)),
            )
            wanted = experts_cached(hooked)
            runs[name] = lambda: plain(given, use_cache=False).logits
            runs[name + "+"] = lambda: hooked.run_with_cache(given, names_filter=wanted, use_cache=False)
        return name

    first = add(base)
    for what, values in sizes.items():
        for value in values:
            keys[what, value] = add({**base, what: value})
    with torch.no_grad():
        times = interleaved(runs, rounds)
    cached = times[first + "+"].ratio
    return ["", "plain", "experts cached", "cached ÷ plain"], [
        [
            f"{value} {what}" if what != "k" else f"top-{value}",
            f"{times[name].ratio:.2f}",
            f"{times[name + '+'].ratio / cached:.2f}",
            f"{times[name + '+'].ratio / times[name].ratio:.2f}",
        ]
        for (what, value), name in keys.items()
    ]


def work(model: HookedMoE, packed: HookedMoE | None, tokens: Tensor, layer: int) -> dict[str, tuple[str, Run, Run]]:
    """What moe_lens computes beside a pass: its name, what it is compared with, that, and ours."""
    sums = (*PartialSum.figure2(model.top_k), PartialSum(ranks=[]))
    lens, stats = LogitLens(model), (RoutingStats(*sizes_of(model)), PairStats(*sizes_of(model)))
    rows = torch.randn(tokens.numel(), model.cfg.d_model)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    batch = TokenBatch(tokens=tokens, mask=mask, counted=mask, sources=tuple(f"s{i}" for i in range(len(tokens))))
    _, cache = model.run_with_cache(tokens, names_filter=lens.hooks(sums=sums))
    loss, original = Loss(tokens), model.original_model

    def forward() -> Any:
        return model(tokens, use_cache=False)

    def products() -> None:
        for _ in range(1 + len(model.moe_layers) * len(sums)):
            lens.unembed(rows)

    def backward() -> None:
        with torch.enable_grad():
            loss(model(tokens, use_cache=False)).backward()
        original.zero_grad()

    def one_by_one() -> None:
        for expert in range(model.n_experts):
            with model.ablate({layer: [expert]}):
                loss(forward())

    def observed() -> None:
        seen: Any = observe(model, batch, predicted=False)
        for one in stats:
            one.update(seen)

    found: dict[str, tuple[str, Run, Run]] = {
        f"lens: {len(sums)} sums of all layers": (
            "norm and unembedding of as many rows",
            products,
            lambda: lens.decode(cache, sums),
        ),
        "attribution: gradient, all pairs": (
            "a pass forward and backward",
            backward,
            lambda: expert_attribution(model, tokens, loss),
        ),
        f"sweep: exact knock-out, layer {layer}": (
            "a pass for each expert",
            one_by_one,
            lambda: expert_attribution(model, tokens, loss, method="knockout", selection=Selection(layers=[layer])),
        ),
        "statistics: routing and pairs": ("a plain pass", forward, observed),
        "one expert ablated": ("a plain pass", forward, lambda: inside(model.ablate({layer: [0]}), forward)),
        "only the first of six": ("a plain pass", forward, lambda: inside(model.keep_top(1), forward)),
    }
    if packed is not None:
        found["experts in 4 bits (nf4)"] = (
            "the same numbers, unpacked once",
            forward,
            lambda: packed(tokens, use_cache=False),
        )
    return found


def inside(intervention: Any, forward: Run) -> Any:
    """A pass with an intervention."""
    with intervention:
        return forward()


def sizes_of(model: HookedMoE) -> tuple[Any, int, int]:
    """What statistics are made for."""
    return model.moe_layers, model.n_experts, model.top_k


def work_table(rounds: int, tokens: tuple[int, int]) -> Table:
    """Time of studies' steps, on the embedded model, compared with the least work that they need."""
    model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
    try:
        packed = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32, quantize="nf4")
    except Exception as error:  # bitsandbytes is an extra
        tell(f"nf4 is left out: {error}")
        packed = None
    texts = [" ".join(passage.text for passage in domain.passages) for domain in embedded_domains()[: tokens[0]]]
    given = torch.cat([model.to_tokens(text)[:, : tokens[1]] for text in texts])
    rows = []
    with torch.no_grad():
        for name, (against, reference, ours) in work(model, packed, given, model.moe_layers[2]).items():
            ratio = interleaved({"reference": reference, "ours": ours}, rounds)["ours"].ratio
            rows.append(
                [name, against, f"{ratio:.2f} ×", *(f"{peak_memory(r) / 1e6:.0f} MB" for r in (reference, ours))]
            )
            tell(" | ".join(rows[-1]))
    return ["", "compared with", "time", "memory of that", "memory of moe_lens"], rows


STARTS = {
    "`import moe_lens`": "import moe_lens",
    "`from moe_lens import HookedMoE`": "from moe_lens import HookedMoE",
    "the same, and the embedded model": (
        "from moe_lens import HookedMoE; HookedMoE.from_pretrained('tiny-deepseekmoe')"
    ),
    "`import transformers, torch` and a model class": "import torch; from transformers import AutoModelForCausalLM",
    "`from transformer_lens.model_bridge import TransformerBridge`": (
        "from transformer_lens.model_bridge import TransformerBridge"
    ),
    "`import nnsight`": "import nnsight",
}


def start_table(rounds: int, starts: dict[str, str]) -> Table:
    """Processor time of the first statements of a session, each in a fresh process: other work hardly changes it."""
    times: dict[str, list[float]] = {name: [] for name in starts}
    for i in range(rounds + 1):
        for name, code in starts.items():
            script = f"import time; t = time.process_time(); {code}; print(time.process_time() - t)"
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
            if done.returncode == 0 and i:
                times[name].append(float(done.stdout.split()[-1]))
    return ["", "seconds"], [
        [name, f"{statistics.median(of):.2f}" if of else "not installed"] for name, of in times.items()
    ]


def tell(what: str) -> None:
    """Progress, beside what is printed."""
    print(what, file=sys.stderr, flush=True)


def markdown(table: Table) -> str:
    """A table."""
    head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(page: str, blocks: dict[str, str]) -> str:
    """A page with what stands between `<!-- bench NAME -->` and `<!-- end -->` replaced."""
    for name, text in blocks.items():
        pattern = re.compile(rf"(<!-- bench {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, found = pattern.subn(lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page)
        if found != 1:
            raise InputError(
                f"the page has no block {name}: a line `<!-- bench {name} -->` and, after it, `<!-- end -->`"
            )
    return page


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=["families", "memory", "growth", "work", "start", "kept"])
    parser.add_argument("--write", type=Path, help="a page whose tables are filled")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts: dict[str, Callable[[], dict[str, Table]]] = {
        "families": lambda: {"time": time_table(args.rounds, (4, 128))},
        "memory": lambda: memory_tables((4, 128)),
        "growth": lambda: {"growth": growth_table(args.rounds, BASE, SIZES)},
        "work": lambda: {"work": work_table(args.rounds, (4, 128))},
        "start": lambda: {"start": start_table(args.rounds, STARTS)},
        "kept": lambda: kept_table(args.rounds, (4, 128)),  # the last, because it cannot be undone
    }
    blocks: dict[str, str] = {}
    with torch.no_grad():
        for part in args.only or parts:
            where = f"Measured on {machine()}{'' if part == 'memory' else f'; medians of {args.rounds} rounds'}."
            blocks |= {name: f"{markdown(table)}\n\n{where}" for name, table in parts[part]().items()}
    if args.write:
        args.write.write_text(filled(args.write.read_text(encoding="utf-8"), blocks), encoding="utf-8")
    print("\n\n".join(blocks.values()))


if __name__ == "__main__":
    main()
