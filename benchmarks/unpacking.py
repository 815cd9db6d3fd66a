"""How fast matrices that are kept packed are unpacked: those that moe_lens packs, and those in a checkpoint's bits.

Run `python benchmarks/unpacking.py [DEVICE]`; needs `pip install 'moe-lens[quant]'`. It prints millions of numbers a
second, of one matrix of gpt-oss's experts, in bfloat16: the median of some runs, of processor time on the CPU.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from moe_lens.model.experts.packed import Packed
from moe_lens.model.experts.quantised import PackedMatrices
from moe_lens.model.experts.stored_bits import KeptMatrices, Parts, Whole
from moe_lens.model.loading.formats import bitsandbytes, fp8_mxfp4

ROWS, COLUMNS, RUNS = 5760, 2880, 7


def kept(parts: Parts, unpack: Callable[[Parts], torch.Tensor], rows: int = ROWS, columns: int = COLUMNS) -> Packed:
    """A matrix in the bits of a checkpoint."""
    return KeptMatrices(Whole.of(parts, unpack, (rows, columns), torch.bfloat16), "")


def random(*shape: int) -> torch.Tensor:
    """Bytes that are no NaN in any format."""
    return torch.randint(0, 120, shape, dtype=torch.uint8)


def matrices() -> dict[str, Packed]:
    """The same size of matrix, kept in several ways."""
    weight, blocks = torch.randn(1, ROWS, COLUMNS).bfloat16(), ROWS * COLUMNS // 64
    four = {"blocksize": 64, "shape": [ROWS, COLUMNS]}
    fp8 = {
        "weight": random(ROWS, COLUMNS).view(torch.float8_e4m3fn),
        "scale": torch.rand(ROWS // 128, -(-COLUMNS // 128)),
    }
    mxfp4 = {"weight": random(ROWS, COLUMNS // 32, 16), "scale": random(ROWS, COLUMNS // 32)}
    bnb = {"weight": random(ROWS * COLUMNS // 2, 1), "absmax": torch.rand(blocks), "quant_map": torch.randn(16)}
    return {
        "nf4": PackedMatrices.pack(weight, "nf4"),
        "int8": PackedMatrices.pack(weight, "int8"),
        "stored: fp8 in blocks": kept(fp8, partial(fp8_mxfp4._floats, (128, 128), False)),
        "stored: mxfp4": kept(mxfp4, fp8_mxfp4._mxfp4, COLUMNS, ROWS),
        "stored: bitsandbytes 4 bits": kept(bnb, partial(bitsandbytes._four_bits, four)),
    }


def main() -> None:
    """Print the table."""
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for name, packed in matrices().items():
        packed.to(device).read()
        took = list[float]()
        for _ in range(RUNS):
            begun = clock()
            packed.read()
            if device.type == "cuda":
                torch.cuda.synchronize()
            took.append(clock() - begun)
        print(f"{name:28}{ROWS * COLUMNS / statistics.median(took) / 1e6:8,.0f} million numbers a second")


if __name__ == "__main__":
    main()
