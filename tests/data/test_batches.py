"""Token batches: each passage on its own row, counted once, and nothing else counted."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moe_lens.data import Domain, Passage, tokenize
from moe_lens.errors import InputError

BOS, PAD = 0, 1


class Letters:
    """A tokenizer of letters; "~" is the literal text of a special token."""

    all_special_ids = [BOS, PAD, 126]
    pad_token_id = PAD
    bos_token_id: int | None = BOS

    def __init__(self, bos: bool = True):
        self.tokenizer = self
        self.cfg = SimpleNamespace(d_vocab=128)
        self.bos = bos

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def own_ids(self, text: str) -> tuple[list[int], list[int]]:
        return [BOS] * self.bos, self(text)["input_ids"]


def domain(*texts: tuple[str, str]) -> Domain:
    return Domain("d", tuple(Passage(text, source, f"f:{i}") for i, (text, source) in enumerate(texts, start=1)))


words = st.text("abcdefgh", min_size=2, max_size=30)


@given(st.lists(st.tuples(words, st.sampled_from("xyz")), min_size=1, max_size=12), st.booleans(), st.integers(4, 40))
@example([("abcd", "x")], True, 4)
@example([("abcde", "x")], False, 4)
def test_with_room_every_letter_is_there_once(texts, bos, context):
    tokens = tokenize(domain(*texts), Letters(bos), n_tokens=10**6, context=context, batch_tokens=64)
    seen: Counter[str] = Counter()
    for batch in tokens:
        assert batch.tokens.shape[1] <= context
        assert batch.tokens.numel() <= 64 or len(batch.sources) == 1
        assert torch.equal(batch.counted, batch.mask & (batch.tokens != BOS))
        assert (batch.mask.int().diff(dim=1) <= 0).all()  # padding stands on the right
        if bos:
            assert (batch.tokens[:, 0] == BOS).all()
        seen += Counter(chr(i) for i in batch.tokens[batch.counted].tolist())
    whole = Counter("".join(text for text, _ in texts))
    alone = Counter() if bos else Counter(text[-1] for text, _ in texts if len(text) % context == 1)
    assert seen == whole - alone, "a letter alone in the last window has nothing before it, unless BOS opens it"
    assert tokens.n_tokens == seen.total()


@pytest.mark.parametrize(("bos", "room"), [(True, 3), (False, 2)])
def test_a_window_without_room_for_two_tokens_is_said_of_the_window(bos, room):
    """And not of the texts, which are long enough."""
    encoder = Letters(bos=bos)
    assert tokenize(Domain.of("d", ["abcd"]), encoder, n_tokens=4, context=room).n_tokens == 4
    with pytest.raises(InputError, match=f"a window of {room - 1} tokens, {int(bos)} of which open it, has no room"):
        tokenize(Domain.of("d", ["abcd"]), encoder, n_tokens=4, context=room - 1)


def test_special_tokens_inside_a_text_are_not_counted():
    (batch,) = tokenize(domain(("ab~c", "x")), Letters(), n_tokens=10, context=16)
    assert batch.counted.tolist() == [[False, True, True, False, True]]


def test_windows_of_special_tokens_alone_are_left_out():
    """They have nothing to measure: a source of them alone would count as one, and has no half of its own."""
    (batch,) = tokenize(domain(("~~~~abc~", "x")), Letters(), n_tokens=10, context=5)
    assert [window.start for window in batch.windows] == [4], "four letters of text in a window"
    assert batch.windows[0].counted == 3
    with pytest.raises(InputError, match="f:1: a text of 0 tokens, special ones not counted; at least two"):
        tokenize(domain(("~~~~", "x")), Letters(), n_tokens=10, context=5)


def test_budget_is_spread_over_sources():
    texts = [("a" * 10, f"long{i}") for i in range(5) for _ in range(20)]
    tokens = tokenize(domain(*texts), Letters(), n_tokens=50, context=16)
    assert tokens.n_tokens == 50
    assert len(tokens.sources) == 5


def test_a_long_passage_does_not_take_the_budget_of_other_sources():
    texts = [("a" * 100, "long"), ("b" * 10, "x"), ("c" * 10, "y")]
    tokens = tokenize(domain(*texts), Letters(), n_tokens=30, context=11)
    assert tokens.sources == ("long", "x", "y")


def test_tokens_that_the_model_lacks_are_refused():
    with pytest.raises(InputError, match="f:1: the tokenizer gives token 233, and the model has 128;"):
        tokenize(domain(("caf\u00e9", "x")), Letters(), n_tokens=30, context=11)


def test_same_seed_same_choice_and_another_seed_another():
    texts = [(letter * 5, letter) for letter in "abcdefghijklmnop"]
    chosen = [tokenize(domain(*texts), Letters(), n_tokens=20, context=16, seed=seed).sources for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.typed
def test_text_of_one_token_is_named():
    with pytest.raises(InputError, match="f:2: a text of 1 token"):
        tokenize(domain(("ab", "x"), ("a", "y")), Letters(), n_tokens=100, context=16)
