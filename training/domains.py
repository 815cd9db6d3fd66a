"""Write the five domains that ship with the package from the held-out passages.

python training/domains.py --texts TEXTS --out moe_lens/assets/domains

`TEXTS/eval/*.jsonl` hold one passage a line with `text`, `source` and `licence`. The French and German editions of the
Handbook are translated in part only, and English paragraphs stand between translated ones. A paragraph is left out when
it has more English function words than words of its own language; one without any of either goes with the paragraph
before it. A passage of which fewer than 200 characters are left is left out as a whole.
"""

import argparse
import json
import re
from pathlib import Path

FILES = {
    "english": "english_handbook",
    "french": "french_handbook",
    "german": "german_handbook",
    "math": "math_symbolic",
    "code": "code_stdlib",
}

# Frequent words that no two of the three languages share.
WORDS = {
    "english": "the of and to is that this with for are it you be or not can by from which have has will your if when",
    "french": "le la les du et un une est que dans pour par sur ne pas qui au aux ce il cette vous sont avec plus se",
    "german": "der die das und ist zu den von mit für ein eine nicht auf dem sich werden wird oder im sie als dass zum",
}
SHORTEST = 200


def function_words(text: str, language: str) -> int:
    """How many words of the text are among the frequent words of the language."""
    known = set(WORDS[language].split())
    return sum(word in known for word in re.findall(r"\w+", text.lower()))


def translated(text: str, language: str) -> str:
    """The paragraphs of a passage that are in the language."""
    kept, keep = [], True
    for paragraph in text.split("\n"):
        own, english = function_words(paragraph, language), function_words(paragraph, "english")
        if own or english:
            keep = own >= english
        if keep:
            kept.append(paragraph)
    return "\n".join(kept)


def short_source(source: str) -> str:
    """`debian-handbook/usr/…/html/fr-FR/sect.backup.html` → `debian-handbook/fr-FR/sect.backup.html`."""
    return re.sub(r"^debian-handbook/.*/html/", "debian-handbook/", source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for domain, stem in FILES.items():
        with (args.texts / "eval" / f"{stem}.jsonl").open(encoding="utf-8") as lines:
            passages = [json.loads(line) for line in lines]
        rows, paragraphs, left = [], 0, 0
        for passage in passages:
            text = translated(passage["text"], domain) if domain in ("french", "german") else passage["text"]
            paragraphs += passage["text"].count("\n") + 1
            if len(text) < (SHORTEST if domain in ("french", "german") else 1):
                continue
            left += text.count("\n") + 1
            rows.append({**passage, "text": text, "source": short_source(passage["source"])})
        written = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / f"{domain}.jsonl").write_text(written, "utf-8")
        print(
            f"{domain:8s} {len(rows)} of {len(passages)} passages, {left} of {paragraphs} paragraphs,"
            f" {len({row['source'] for row in rows})} sources, {sum(len(row['text']) for row in rows):,} characters"
        )


if __name__ == "__main__":
    main()
