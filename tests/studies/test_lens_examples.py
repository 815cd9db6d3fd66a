"""The example of a domain is chosen by its rule, and read where the rule says, however the texts are read."""

import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.data import Domain, Passage, Reading
from moe_lens.studies import LensExample, LensStudy, StudyResult, run
from moe_lens.studies.lens_examples import EXAMPLE_TOKENS
from tests.studies.tiny import assert_same, domain, tiny_model

LONG = "one two three four five six seven eight nine ten " * 3


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return tiny_model()


def read(model: HookedMoE, *texts: str, **how) -> StudyResult:
    given = Domain("d", tuple(Passage(text, f"s{i}", f"f:{i}") for i, text in enumerate(texts, start=1)))
    return run(LensStudy(), model, [given], reading=Reading(tokens=None, context=64, **how))


def example(result: StudyResult) -> LensExample:
    found = result.results["d"]["example"]
    assert isinstance(found, LensExample)
    return found


def test_first_passage_that_is_long_enough_is_read_at_its_24th_token(model):
    found = example(read(model, "short text", LONG, LONG + "even longer", shard_tokens=1))
    ids = model.to_tokens(LONG)[0].tolist()
    assert found.source == "s2"
    assert list(found.prompt) == ids[1 : EXAMPLE_TOKENS + 1]
    assert found.target == ids[EXAMPLE_TOKENS + 1]
    assert found.positions == (EXAMPLE_TOKENS,)
    logits = model(torch.tensor([ids[: EXAMPLE_TOKENS + 1]]))[0, -1]
    assert found.predicted == int(logits.argmax())
    assert found.text(found.target) == model.tokenizer.decode([found.target])
    occurring = set(found.top_tokens.unique().tolist()) - {-1}
    assert occurring | {*found.prompt, found.target} == found.texts.keys()
    loss = -logits.detach().log_softmax(-1)[found.target]
    assert float(found.cross_entropy[-1, 0, 0, 0]) == pytest.approx(float(loss), abs=1e-5)


def test_otherwise_the_longest_at_its_last_but_one(model):
    found = example(read(model, "a few", "a few words more"))
    ids = model.to_tokens("a few words more")[0].tolist()
    assert (list(found.prompt), found.target, found.source) == (ids[1:-1], ids[-1], "s2")


def test_a_study_that_was_interrupted_saved_and_loaded_has_the_same_example(model, tmp_path):
    texts, reading = [domain("a", n=6, sources=6)], Reading(tokens=None, context=64, shard_tokens=40)
    whole, shards = run(LensStudy(), model, texts, reading=reading), 0

    def interrupt(what: str, tokens: int) -> None:
        nonlocal shards
        shards += 1
        if shards == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(LensStudy(), model, texts, reading=reading, out=tmp_path / "lens", watch=interrupt)
    assert_same(whole, run(LensStudy(), model, texts, reading=reading, out=tmp_path / "lens"))
    again = StudyResult.load(tmp_path / "lens")
    assert_same(whole, again)
    assert again.tables["examples"].equals(whole.tables["examples"])
    with pytest.raises(AssertionError):  # the control: another domain has another
        assert_same(whole, run(LensStudy(), model, [domain("a", n=6, sources=6, seed=1)], reading=reading))
