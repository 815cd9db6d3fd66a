"""Running studies: what is counted, and that neither shards, packing, interruption nor memory change it."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.data import Domain, Passage, Reading, batch_windows, from_generator, from_hub, shards, token_batches
from moe_lens.errors import InputError
from moe_lens.model.loading.tokenizer import load_tokenizer
from moe_lens.stats import RoutingResult, observation
from moe_lens.studies import RoutingStudy, SingleExpertStudy, StudyResult, collect, run
from moe_lens.studies.model_facts import tokenizer_digest
from moe_lens.studies.study_folder import SPACE
from tests.families import build
from tests.studies.tiny import TOKENIZER, assert_same, domain, passages, tiny_hf, tiny_model

SMALL = Reading(tokens=None, context=24, shard_tokens=100)


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return tiny_model()


def cut(model: HookedMoE, texts: Domain, context: int) -> list[torch.Tensor]:
    """The windows of all texts, one row each, made without the package's own."""
    rows = []
    for passage in texts.passages:
        ids = model.to_tokens(passage.text, truncate=False)[0].tolist()
        body = ids[1:]
        for start in range(0, len(body), context - 1):
            window = body[start : start + context - 1]
            rows.append(torch.tensor([[ids[0], *window]]))
    return rows


def test_routing_is_that_of_every_text_read_alone(model):
    texts = domain("d")
    result = run(RoutingStudy(), model, [texts], reading=SMALL, batch_tokens=200)
    found = result.results["d"]["model routing"]
    assert isinstance(found, RoutingResult)
    counts = torch.zeros(len(model.moe_layers), model.n_experts, dtype=torch.long)
    rows = cut(model, texts, 24)
    for row in rows:
        indices = model.routing(row).indices[:, 0, 1:]  # BOS is not counted
        for at in range(len(model.moe_layers)):
            counts[at] += torch.bincount(indices[at].flatten(), minlength=model.n_experts)
    assert torch.equal(found.assignments.sum(0), counts)
    (read,) = result.manifest["read"]
    assert read == {
        "name": "d",
        "tokens": sum(row.shape[1] - 1 for row in rows),
        "windows": len(rows),
        "sources": 12,
        "left_out": 0,
    }
    assert set(result.tables) == {"specialisation", "most_specialised", "layers", "pairs", "persistence", "vocabulary"}


def test_domains_are_compared_and_nulls_stand_beside(model):
    result = run(
        RoutingStudy(nulls=True),
        model,
        [domain("a"), domain("b", seed=1)],
        reading=SMALL,
    )
    tests = result.tables["domain_layers"]
    assert set(tests["routing"]) == {"model", "random_router", "token_unigram", "uniform"}
    for name in ("domain_layers", "given_token_layers"):
        uniform = result.tables[name].query("routing == 'uniform'")
        assert min(uniform["p_value"]) > 0.01  # no expert has anything to do with the domain
    shares = result.tables["specialisation"].pivot_table(
        index=["domain", "routing", "layer"], values="share", aggfunc="sum"
    )
    assert ((shares["share"] - model.top_k).abs() < 1e-9).all()


@pytest.mark.typed
def test_packing_is_refused_where_attention_would_reach_across(model, tmp_path):
    """In gpt-oss, whose mask knows no positions; transformers packs it all the same, as the matrix shows."""
    hf = build("gpt_oss", vocab_size=4096, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    mixing, texts = HookedMoE.from_hf(hf, model.tokenizer), [domain("d")]
    reading = Reading(**{**vars(SMALL), "packed": True})
    why = "cannot be packed into one row for gpt_oss: .* leave out --packed"
    with pytest.raises(InputError, match=why):
        run(RoutingStudy(), mixing, texts, reading=reading, out=tmp_path / "run")
    with pytest.raises(InputError, match=why):
        collect(mixing, texts, tmp_path / "collected", reading=reading)
    assert not list(tmp_path.iterdir())
    (shard,) = shards(domain("d", n=4), mixing, Reading(tokens=None, context=24))
    batch = next(iter(batch_windows(shard.windows, mixing, batch_tokens=150, packed=24)))
    with pytest.raises(InputError, match="cannot be packed"):
        observation.observe(mixing, batch)
    assert run(RoutingStudy(), mixing, [domain("d", n=4)], reading=SMALL).tables


@pytest.mark.parametrize("study", [RoutingStudy(), SingleExpertStudy(k=(1,), layers="both")], ids=["routing", "single"])
def test_packing_changes_nothing_because_no_attention_reaches_across(model, study, monkeypatch):
    texts = [domain("d")]
    alone = run(study, model, texts, reading=SMALL)
    packed = Reading(**{**vars(SMALL), "packed": True})
    together = run(study, model, texts, reading=packed)
    assert_same(alone, together, 2e-6)
    # The control: positions that run on make one text of the row, and then the results differ.
    whole = token_batches.packed_rows

    def runs_on(*args):
        made = whole(*args)
        return token_batches.Packing(made.tokens, torch.arange(made.tokens.shape[1]).expand(made.tokens.shape), made.at)

    monkeypatch.setattr(token_batches, "packed_rows", runs_on)
    with pytest.raises(AssertionError):
        assert_same(alone, run(study, model, texts, reading=packed), 2e-6)


@pytest.mark.parametrize("study", [RoutingStudy(nulls=True), SingleExpertStudy(k=(1,))], ids=["routing", "single"])
@pytest.mark.parametrize("after", [2, 5])
def test_interrupted_it_goes_on_and_ends_with_the_same(model, study, after, tmp_path):
    texts = [domain("a", n=8), domain("b", n=8, seed=1)]
    shards = seen = 0

    def number(what: str, tokens: int) -> None:
        nonlocal shards
        shards += 1

    whole = run(study, model, texts, reading=SMALL, out=tmp_path / "whole", watch=number)

    def interrupt(what: str, tokens: int) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, model, texts, reading=SMALL, out=tmp_path / "again", watch=interrupt)
    assert not (tmp_path / "again").exists()
    calls = 0

    def count(what: str, tokens: int) -> None:
        nonlocal calls
        calls += 1

    again = run(study, model, texts, reading=SMALL, out=tmp_path / "again", watch=count)
    assert_same(whole, again)
    assert calls == shards - after  # what was done was not done again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "whole"]  # and nothing is left of it


def test_a_finished_study_is_not_run_again(model, tmp_path):
    texts = [domain("a", n=6)]
    first = run(RoutingStudy(), model, texts, reading=SMALL, out=tmp_path / "out")
    read: list[int] = []
    again = run(RoutingStudy(), model, texts, reading=SMALL, out=tmp_path / "out", watch=lambda what, n: read.append(n))
    assert not read
    assert_same(first, again)
    assert StudyResult.load(tmp_path / "out").manifest["plan"]["model"]["experts"] == 8


def test_the_plan_names_the_commit_that_was_read(model, tmp_path, monkeypatch):
    newest = "a" * 40
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, revision: SimpleNamespace(sha=newest))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: iter(passages(n=6)))
    studied = tmp_path / "studied"
    work = {"reading": SMALL, "out": studied}
    result = run(RoutingStudy(), model, [from_hub("d", "o/d", source="source")], **work)
    collect(model, [from_hub("d", "o/d", source="source")], tmp_path / "collected", reading=SMALL)
    for folder in (studied, tmp_path / "collected"):
        (domain_,) = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["plan"]["domains"]
        assert (domain_["hub"], domain_["revision"]) == ("o/d", "a" * 40)
    newest = "b" * 40
    with pytest.raises(InputError, match='"revision": "aaaaa'):  # the texts may have changed: it is another study
        run(RoutingStudy(), model, [from_hub("d", "o/d", source="source")], **work)
    again = run(RoutingStudy(), model, [from_hub("d", "o/d", source="source", revision="a" * 40)], **work)
    assert_same(result, again)


def test_a_study_does_not_go_on_with_another_tokenizer(tmp_path):
    """With the same weights and texts: it cuts them otherwise."""
    plain, other = load_tokenizer(str(TOKENIZER)), load_tokenizer(str(TOKENIZER))
    other.add_tokens(["the old"])
    first, second = (HookedMoE.from_hf(tiny_hf(), tokenizer) for tokenizer in (plain, other))
    texts = [domain("a", n=6)]
    assert first.own_ids("the old man") != second.own_ids("the old man")
    found = run(RoutingStudy(), first, texts, reading=SMALL, out=tmp_path / "out")
    with pytest.raises(InputError, match=r"holds the result of another study \(routing\) – model.tokenizer: "):
        run(RoutingStudy(), second, texts, reading=SMALL, out=tmp_path / "out")
    plain(["a", "the old man"], padding=True, truncation=True, max_length=2)  # is remembered, and changes no text
    assert_same(found, run(RoutingStudy(), first, texts, reading=SMALL, out=tmp_path / "out"))
    python = SimpleNamespace(get_vocab=lambda: {"a": 0})
    assert tokenizer_digest(python) == tokenizer_digest(SimpleNamespace(get_vocab=lambda: {"a": 0}))
    assert tokenizer_digest(python) != tokenizer_digest(SimpleNamespace(get_vocab=lambda: {"b": 0}))
    assert tokenizer_digest(None) is None


def test_folders_of_other_work_are_refused(model, tmp_path):
    texts = [domain("a", n=6)]
    run(RoutingStudy(), model, texts, reading=SMALL, out=tmp_path / "out")
    with pytest.raises(
        InputError, match=r"holds the result of another study \(routing\) – settings\.layers.*; study: "
    ):
        run(SingleExpertStudy(), model, texts, reading=SMALL, out=tmp_path / "out")
    with pytest.raises(InputError, match="domains: "):
        run(RoutingStudy(), model, [domain("a", n=6, seed=3)], reading=SMALL, out=tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds no result of a study"):
        run(RoutingStudy(), model, texts, reading=SMALL, out=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match=r"inner: is inside of .*out, which holds what a study saved"):
        run(RoutingStudy(), model, texts, reading=SMALL, out=tmp_path / "out" / "deep" / "inner")
    assert not (tmp_path / "out" / "deep").exists()
    (tmp_path / "mine" / "manifest.json").write_text("{}")  # of something else
    long = [domain("n" * 300, n=6), domain("n" * 301, n=6, seed=1)]
    found = run(RoutingStudy(), model, long, reading=SMALL, out=tmp_path / "mine" / "inner")
    assert_same(found, StudyResult.load(tmp_path / "mine" / "inner"))

    def stop(what: str, tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(RoutingStudy(), model, texts, reading=SMALL, out=tmp_path / "begun", watch=stop)
    with pytest.raises(
        InputError, match="begun.unfinished: holds the beginning of other work – reading.shard_tokens: "
    ):
        run(RoutingStudy(), model, texts, reading=Reading(context=24), out=tmp_path / "begun")


def test_a_full_disk_and_a_place_that_cannot_be_written_are_found_before_the_work(model, tmp_path, monkeypatch):
    read: list[int] = []
    work = {"reading": SMALL, "watch": lambda what, n: read.append(n)}
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run(RoutingStudy(), model, [domain("a")], out=tmp_path / "file" / "out", **work)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(SPACE * 10, SPACE * 10, SPACE - 1))
    with pytest.raises(InputError, match="64 MiB are free there, and this may need 64 MiB"):
        run(RoutingStudy(), model, [domain("a")], out=tmp_path / "out", **work)
    assert not read
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_on_the_way_keeps_what_was_done(model, tmp_path, monkeypatch):
    texts = [domain("a")]

    def full(self, path, index):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pandas.DataFrame.to_parquet", full)
        with pytest.raises(InputError, match=r"No space left on device\); .*out.unfinished is kept"):
            run(RoutingStudy(), model, texts, reading=SMALL, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    read: list[int] = []
    run(RoutingStudy(), model, texts, reading=SMALL, out=tmp_path / "out", watch=lambda what, n: read.append(n))
    assert not read


def test_out_of_memory_halves_the_batch(model, monkeypatch):
    texts = [domain("d")]
    whole = run(RoutingStudy(), model, texts, reading=SMALL)
    plainly, sizes = observation.forward, []

    def scarce(model, batch, hooks, **how):
        logits = plainly(model, batch, hooks, **how)
        sizes.append(batch.tokens.numel())
        if batch.tokens.numel() > limit:  # after the hooks have run: what they noted must not count
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logits

    monkeypatch.setattr(observation, "forward", scarce)
    limit = 60
    assert_same(whole, run(RoutingStudy(), model, texts, reading=SMALL, batch_tokens=400), 2e-6)
    assert max(sizes) > 60 and sum(size > 60 for size in sizes) <= 4  # it does not try again what did not fit
    limit = 10
    with pytest.raises(InputError, match="out of memory with a single window of 24 tokens"):
        run(RoutingStudy(), model, texts, reading=SMALL)


@pytest.mark.typed
def test_nan_is_traced_to_its_layer():
    hf = tiny_hf()
    with torch.no_grad():
        hf.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    model = HookedMoE.from_hf(hf, load_tokenizer(str(TOKENIZER)), check=False).requires_grad_(False)
    with pytest.raises(InputError, match=r"NaN in a text of source 's0-.*blocks.1.hook_resid_mid \(layer 1\)"):
        run(RoutingStudy(), model, [domain("d")], reading=SMALL)


@pytest.mark.typed
def test_domains_without_text_or_with_one_name(model):
    empty = from_generator("e", lambda: iter(()))
    single = from_generator("s", lambda: iter([" ", "a"]))
    with pytest.raises(InputError, match="domain 'e' holds no text of two tokens or more"):
        run(RoutingStudy(), model, [empty], reading=Reading(context=24))
    with pytest.raises(InputError, match="domain 's' holds no text"):
        run(RoutingStudy(), model, [single], reading=SMALL)
    with pytest.raises(InputError, match="two domains are called 'a'"):
        run(RoutingStudy(), model, [domain("a"), domain("a", seed=1)])
    with pytest.raises(InputError, match="no domain"):
        run(RoutingStudy(), model, [])


def test_passages_of_one_token_are_left_out_and_told(model):
    rows = [{"text": row["text"], "source": row["source"]} for row in passages(n=12)]
    stream = from_generator("d", lambda: iter([{"text": ""}, *rows, {"text": "a"}, rows[0]]))
    result = run(RoutingStudy(), model, [stream], reading=SMALL)
    assert result.manifest["read"][0]["left_out"] == 2
    memory = Domain(
        "d", tuple(Passage(row["text"], row["source"], "f:1") for row in [*rows, {"text": "a", "source": "x"}])
    )
    assert run(RoutingStudy(), model, [memory], reading=SMALL).manifest["read"][0]["left_out"] == 1


def test_a_tokenizer_without_a_pad_token(tmp_path: Path):
    tokenizer = load_tokenizer(str(TOKENIZER))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    model = HookedMoE.from_hf(tiny_hf(), load_tokenizer(str(tmp_path))).requires_grad_(False)
    assert_same(
        run(RoutingStudy(), model, [domain("d")], reading=SMALL),
        run(RoutingStudy(), tiny_model(), [domain("d")], reading=SMALL),
    )
