"""Train the tokeniser and turn the training texts into token files.

python training/prepare.py --texts TEXTS --out training/run

`TEXTS/train/*.txt` hold documents separated by a line `<|doc|>`. A byte-level BPE of 4096 tokens is trained on equal
amounts of every domain; every text file becomes `NAME.npy` (uint16), each document opened by the BOS token.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
VOCAB = 4096
SEPARATOR = "<|doc|>"


def documents(path: Path) -> list[str]:
    """The documents of one training file."""
    return [d for d in (part.strip("\n") for part in path.read_text("utf-8").split(SEPARATOR)) if d]


def domain_of(name: str) -> str:
    """`french_novels` → `french`."""
    return name.split("_")[0]


def balanced(texts: dict[str, list[str]], characters_per_domain: int) -> Iterator[str]:
    """Pieces of every domain, evenly spread over its documents, the same number of characters from each domain."""
    for domain in sorted({domain_of(n) for n in texts}):
        docs = [d for name in sorted(texts) if domain_of(name) == domain for d in texts[name]]
        share = min(1.0, characters_per_domain / sum(map(len, docs)))
        for d in docs:
            yield d[: int(len(d) * share) + 1]


def train_tokenizer(pieces: Iterator[str]) -> Tokenizer:
    """Byte-level BPE in the manner of DeepSeek: digits stand alone, no prefix space; nothing is unknown."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(pieces, trainer)
    tok.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)])
    return tok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--characters-per-domain", type=int, default=3_000_000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    texts = {p.stem: documents(p) for p in sorted((args.texts / "train").glob("*.txt"))}
    tok = train_tokenizer(balanced(texts, args.characters_per_domain))
    tok.save(str(args.out / "tokenizer.json"))
    for name, docs in texts.items():
        ids = [i for e in tok.encode_batch(docs) for i in e.ids]
        np.save(args.out / f"{name}.npy", np.array(ids, dtype=np.uint16))
        characters = sum(map(len, docs))
        print(f"{name:16s} {len(docs):5d} documents {len(ids):9,d} tokens {characters / len(ids):.2f} characters a token")


if __name__ == "__main__":
    main()
