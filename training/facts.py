"""Facts that the embedded model knows, for `moe-lens localise --facts small`: `python -m training.facts`.

It is far too small to know capitals or names. What it does know is form: that verbs agree with their subjects, that
brackets and quotes are closed with what opened them, and sums of single digits as they stand in word problems.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from moe_lens import HookedMoE
from moe_lens.interventions.trace_prompt import single_token
from moe_lens.interventions.traced_fact import Fact

TARGET = Path("moe_lens/assets/facts/small.jsonl")
WANTED = 24
"""Facts of each kind, each with a source of its own."""

NOUNS = """package system user file server program version problem command service network password machine computer
directory message option script developer process partition kernel interface address disk tool image question document
configuration administrator connection"""
NAMES = """name value item path line key text data node args index result self.name self.value other.value func obj cls
message start end count size width source target option default parent child self.path self.data"""


def candidates() -> Iterator[Fact]:
    """Many more than are wanted, the surest forms first."""
    for noun in NOUNS.split():
        yield Fact(f"These {noun}s", f" {noun}s", " are", " is", "agreement", noun)
        yield Fact(f"This {noun}", f" {noun}", " is", " are", "agreement", noun)
    brackets = [("[", "]", ")", "value = table"), ("(", ")", "]", "result = len")]
    for number, name in enumerate(NAMES.split()):
        for opened, closed, other, before in brackets[:: 1 if number % 2 else -1]:
            yield Fact(f"        {before}{opened}{name}", opened, closed, other, "brackets", name)
    for a in range(1, 10):
        for b in range(1, 10):
            for sign, value in (("+", a + b), ("*", a * b)):
                if value < 10:
                    prompt = f"Tom has {a}{sign}{b}=<<{a}{sign}{b}="
                    yield Fact(prompt, f"{a}{sign}{b}", str(value), str(value % 9 + 1), "digits", f"{a}{sign}{b}")
    quotes = [('"', "'"), ("'", '"')]
    for number, name in enumerate(NAMES.split()):
        word = name.split(".")[-1]
        for opened, other in quotes[:: 1 if number % 2 else -1]:
            yield Fact(f"        self.{word} = {opened}{word}", opened, opened, other, "quotation", word)


def main() -> None:
    """Keep those whose answer the model holds likelier than the foil and among its first three, one of each source."""
    model = HookedMoE.from_pretrained("tiny-deepseekmoe")
    kept: dict[tuple[str, str], Fact] = {}
    for fact in candidates():
        if (fact.kind, fact.source) in kept or sum(kind == fact.kind for kind, _ in kept) == WANTED:
            continue
        logits = model(fact.prompt)[0, -1]
        answer, foil = (logits[single_token(model, fact.prompt, token)] for token in (fact.answer, fact.foil))
        if answer > foil + 1 and int((logits > answer).sum()) < 3:
            kept[fact.kind, fact.source] = fact
    TARGET.parent.mkdir(exist_ok=True)
    rows = [json.dumps(vars(fact), ensure_ascii=False) for fact in kept.values()]
    TARGET.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
