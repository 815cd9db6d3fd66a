"""Train the TunedLens of the embedded model, on the texts that the model was trained on.

python training/lens.py --folder training/run --out moe_lens/assets/tiny-deepseekmoe-lens

The folder is that of `prepare.py`: token files, and in `eval/` the half of the held-out sources on which choices are
made. The lens is trained on neither half. An interrupted run goes on from `FOLDER/lens.safetensors`.
`lens_evaluate.py` measures what comes out.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from train import Mixture

from moe_lens import HookedMoE
from moe_lens.lenses import TunedLens

CONTEXT = 512


class Windows:
    """The mixture of the model's training, as an endless corpus that is the same whenever it is read."""

    def __init__(self, folder: Path, seed: int):
        self.mixture = Mixture(folder, CONTEXT - 1, seed)

    def __iter__(self) -> Iterator[torch.Tensor]:
        step = 0
        while True:
            yield self.mixture.batch(step, rank=0, size=4)
            step += 1


def held_out(folder: Path, windows: int) -> list[torch.Tensor]:
    """The first windows of every held-out file, each opened by BOS."""
    kept = []
    for path in sorted((folder / "eval").glob("*.npy")):
        ids = torch.from_numpy(np.load(path).astype(np.int64))
        rows = ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)[:windows]
        kept.append(torch.nn.functional.pad(rows, (1, 0), value=0))
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument(
        "--seed", type=int, default=1, help="another one than the model's, whose windows it would see again"
    )
    args = parser.parse_args()
    model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
    lens = TunedLens.fit(
        model,
        Windows(args.folder, args.seed),
        held_out=held_out(args.folder, 4),
        mid=True,
        steps=args.steps,
        batch=4,
        context=CONTEXT,
        lr=args.lr,
        seed=args.seed,
        checkpoint=args.folder / "lens.safetensors",
    )
    lens.save_pretrained(args.out)
    assert lens.tuning
    print(lens.tuning.to_frame().to_string())


if __name__ == "__main__":
    main()
