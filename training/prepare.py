"""Train the tokeniser and turn the training texts into token files.

python training/prepare.py --texts TEXTS --out training/run

`TEXTS/train/*.txt` hold documents separated by a line `<|doc|>`, `TEXTS/eval/*.jsonl` held-out passages. A byte-level
BPE of 4096 tokens is trained on equal amounts of every domain; every file becomes `NAME.npy` (uint16), each document or
passage opened by the BOS token. Of the held-out passages only the half on which choices are made goes to `eval/`.
"""

import argparse
import hashlib
import json
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
    tok.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tok


def half(source: str) -> str:
    """`a` (choices are made on it) or `b` (published) for a source of the held-out texts."""
    return "ab"[hashlib.sha256(source.encode()).digest()[0] % 2]


def held_out(path: Path, wanted: str) -> list[dict[str, str]]:
    """The passages of a jsonl file whose source is in the half; with fewer than four sources, split by passage."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    key = "text" if len({row["source"] for row in rows}) < 4 else "source"
    return [row for row in rows if wanted in (half(row[key]), "both")]


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
        print(
            f"{name:20s} {len(docs):5d} documents {len(ids):9,d} tokens {characters / len(ids):.2f} characters a token"
        )
    (args.out / "eval").mkdir(exist_ok=True)
    for path in sorted((args.texts / "eval").glob("*.jsonl")):
        passages = [row["text"] for row in held_out(path, "a")]
        ids = [i for e in tok.encode_batch(passages) for i in e.ids]
        np.save(args.out / "eval" / f"{path.stem}.npy", np.array(ids, dtype=np.uint16))
        print(f"{path.stem:20s} {len(passages):5d} passages  {len(ids):9,d} tokens")


if __name__ == "__main__":
    main()
