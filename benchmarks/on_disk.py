"""A model that is mostly on disk: passes of moe_lens, beside plain transformers' and beside reading the files once.

    python benchmarks/on_disk.py FOLDER [--layers 28] [--memory 6GiB] [--tokens 128 1024] [--rounds 3]

FOLDER gets a checkpoint in DeepSeekMoE 16B's shape, names and files with random weights in bfloat16, unless there is
one: 1.2 GB for each layer, 33 GB in all; plain transformers writes what is on disk once more, below FOLDER. Both models
are loaded with the same limit of main memory, and run in turn. Seconds are wall time, since a pass waits for the disk.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.measuring import peak_memory
from moe_lens import HookedMoE
from moe_lens.model.families.deepseek import DeepseekConfig, DeepseekForCausalLM
from moe_lens.model.loading.lazy_parameters import parameter_shapes, stored_shapes
from scripts.gpu import FULL

SHARD = 2**32
"""Bytes of a file of the checkpoint, at most."""
GB = 1e9
LAST: dict[str, Any] = {"logits_to_keep": 1}


def write_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """Random weights, one file after another; the index last, so that what was cut off is written anew."""
    folder.mkdir(parents=True, exist_ok=True)
    config = DeepseekConfig(**shape, moe_layer_freq=1, dtype="bfloat16")
    config.architectures = [DeepseekForCausalLM.__name__]
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = stored_shapes(parameter_shapes(DeepseekForCausalLM(config)))
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    for number, some in enumerate(_shards(names)):
        file = f"model-{number:05}.safetensors"
        tensors = {}
        for name in some:
            value = torch.empty(names[name], dtype=torch.bfloat16)
            tensors[name] = value.fill_(1) if "norm" in name else value.normal_(std=0.02, generator=generator)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _shards(names: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    some: list[str] = []
    size = 0
    for name, shape in names.items():
        more = 2 * torch.Size(shape).numel()
        if some and size + more > SHARD:
            yield some
            some, size = [], 0
        some.append(name)
        size += more
    yield some


def bytes_read() -> int:
    """What this process has read so far, from the disk or from the cache of files."""
    return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])


def read_once(folder: Path) -> None:
    """Every byte of the checkpoint, in large pieces."""
    room = bytearray(2**24)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(room):
                pass


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@torch.no_grad()
def passes(models: dict[str, Any], n_tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of a pass of one text of so many tokens, logits of its last position alone.

    A first pass is not counted: parameters are checked when they are first read.
    """
    tokens = torch.randint(0, 4096, (1, n_tokens), generator=torch.Generator().manual_seed(n_tokens))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            seconds[name].append(timed(partial(model, tokens, **LAST)))
    return {name: statistics.median(of[1:]) for name, of in seconds.items()}


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--memory", default="6GiB", help="of each of the two models")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not (args.folder / "model.safetensors.index.json").is_file():
        write_checkpoint(args.folder, {**FULL, "num_hidden_layers": args.layers})
    size = sum(file.stat().st_size for file in args.folder.glob("*.safetensors"))
    print(f"{size / GB:.1f} GB, {args.memory} of main memory for each model; reading the files once takes ", end="")
    print(f"{statistics.median(timed(lambda: read_once(args.folder)) for _ in range(args.rounds)):.1f} s", flush=True)

    load: dict[str, Any] = {"dtype": torch.bfloat16, "max_memory": {"cpu": args.memory}}
    offloaded = args.folder / "offloaded"
    models: dict[str, Any] = {}

    def add(name: str, make: Callable[[], Any]) -> None:
        seconds = timed(lambda: models.update({name: make()}))
        written = sum(file.stat().st_size for file in offloaded.glob("*"))
        print(f"{name}: loaded in {seconds:.0f} s, {written / GB:.1f} GB written", flush=True)

    add("moe_lens", lambda: HookedMoE.from_pretrained(args.folder, check=False, **load))
    once: Callable[[], Any] = partial(models["moe_lens"], torch.zeros(1, args.tokens[0], dtype=torch.long), **LAST)
    with torch.no_grad():
        peak, before = peak_memory(once), bytes_read()
        once()
    print(f"a pass of moe_lens reads {(bytes_read() - before) / GB:.1f} GB and takes {peak / GB:.1f} GB of memory")
    try:
        where: dict[str, Any] = {"device_map": "auto", "offload_folder": offloaded}
        add("transformers", lambda: DeepseekForCausalLM.from_pretrained(args.folder, **where, **load))
        for n_tokens in args.tokens:
            found = passes(models, n_tokens, args.rounds)
            for name, seconds in found.items():
                speed, ratio = n_tokens / seconds, seconds / found["transformers"]
                print(f"{n_tokens} tokens, {name}: {seconds:.1f} s, {speed:.1f} tokens/s, {ratio:.2f} ×", flush=True)
    finally:
        shutil.rmtree(offloaded, ignore_errors=True)


if __name__ == "__main__":
    main()
