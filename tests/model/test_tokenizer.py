"""BOS is added as tokenizer_config.json says: once, also around chat messages."""

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moe_lens.data import Domain, Passage, Reading, shards, tokenize
from moe_lens.errors import CheckpointError, InputError, SelfCheckError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.lenses import expert_vocabulary
from moe_lens.model.loading.pretrained import load_pretrained, load_tokenizer
from moe_lens.studies.model_facts import model_facts
from moe_lens.studies.prompt_pairs import encode
from tests.matrix.configs import build
from tests.model.tiny import TINY, random_tensors, write_checkpoint

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEXT = "The experts of 2024 route\n  été, naïve: x = [1, 22, 333]"

# The chat template of DeepSeek's first models, whose text begins with the BOS token.
CHAT = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def backend(extra: int = 0) -> Tokenizer:
    """A byte-level BPE with a pre-tokenizer as DeepSeek's: words, digits one by one, then bytes."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<reserved {i}>": len(vocabulary) + i for i in range(extra)}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(BOS, normalized=True), AddedToken(EOS, normalized=True)])
    return tokenizer


def added_token(content: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content: dict[str, Any] = {
        "bos_token": added_token(BOS),
        "eos_token": added_token(EOS),
        "pad_token": added_token(EOS),
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 4096,
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def ids(tokenizer: PreTrainedTokenizerBase, text: str = TEXT) -> list[Any]:
    return tokenizer(text).input_ids


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("add_eos", [True, False, None])
def test_bos_and_eos_are_added_as_the_config_says(tmp_path: Path, add_bos: bool | None, add_eos: bool | None) -> None:
    raw = backend()
    settings = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    tokenizer: Any = load_tokenizer(str(write_tokenizer(tmp_path, raw, **settings)))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (bos, eos) == (raw.token_to_id(BOS), raw.token_to_id(EOS))
    expected = [bos] * bool(add_bos) + raw.encode(TEXT).ids + [eos] * bool(add_eos)
    assert ids(tokenizer) == expected
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == raw.encode(TEXT).ids
    assert tokenizer.decode(raw.encode(TEXT).ids) == TEXT
    padded = tokenizer([TEXT, "x"], padding=True).input_ids
    assert all(row.count(bos) == bool(add_bos) for row in padded)


def test_transformers_alone_forgets_the_bos(tmp_path: Path) -> None:
    """Why load_tokenizer exists; when this fails, transformers has mended it."""
    folder = write_tokenizer(tmp_path, backend(), add_bos_token=True)
    assert ids(AutoTokenizer.from_pretrained(folder))[0] != load_tokenizer(str(folder)).bos_token_id


def test_arguments_win_over_the_config(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, backend(), add_bos_token=True)
    tokenizer = load_tokenizer(str(folder), add_bos_token=False)
    assert tokenizer.bos_token_id not in ids(tokenizer)
    assert load_tokenizer(str(folder), padding_side="left").padding_side == "left"


def test_chat_messages_begin_with_one_bos(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, backend(), add_bos_token=True, chat_template=CHAT)
    tokenizer: Any = load_tokenizer(str(folder))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert isinstance(chat, list) and chat[0] == bos and chat.count(bos) == 1 and chat.count(eos) == 1
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert text == f"{BOS}Be brief.\n\nUser: Hi\n\nAssistant: Hello{EOS}User: Bye\n\nAssistant:"
    assert tokenizer.decode(chat) == text
    assert tokenizer(text, add_special_tokens=False).input_ids == chat  # the text has its BOS
    again = tokenizer.apply_chat_template([MESSAGES, MESSAGES[:2]], return_dict=True, padding=True)
    assert all(row.count(bos) == 1 for row in again["input_ids"])


def test_saving_keeps_the_bos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path / "a", backend(), add_bos_token=True, chat_template=CHAT)))
    tokenizer.save_pretrained(tmp_path / "b")
    again = load_tokenizer(str(tmp_path / "b"))
    assert ids(again) == ids(tokenizer)
    assert ids(again).count(tokenizer.bos_token_id) == 1


def test_a_vocabulary_of_deepseek_s_size_is_left_as_it_is(tmp_path: Path) -> None:
    """Above 100,000 tokens transformers looks for Mistral's faulty pre-tokenizer and may replace it."""
    raw = backend(extra=102_100)
    folder = write_tokenizer(tmp_path, raw, add_bos_token=True)
    (folder / "config.json").write_text(json.dumps(TINY))
    tokenizer = load_tokenizer(str(folder))
    assert len(tokenizer) > 100_000
    assert ids(tokenizer)[1:] == raw.encode(TEXT).ids


def test_load_pretrained_brings_the_tokenizer(tmp_path: Path) -> None:
    config = {**TINY, "vocab_size": 320}
    folder = write_checkpoint(tmp_path, config, random_tensors(config))
    assert load_pretrained(str(folder))[1] is None
    write_tokenizer(folder, backend(), add_bos_token=True)
    tokenizer = load_pretrained(str(folder))[1]
    assert tokenizer is not None and ids(tokenizer)[0] == tokenizer.bos_token_id


def test_ids_that_the_model_does_not_embed_are_a_warning(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, TINY, random_tensors(TINY))
    write_tokenizer(folder, backend())
    with pytest.warns(UserWarning, match="has ids up to 2.., the model embeds 96"):
        load_pretrained(str(folder))
    config = {**TINY, "vocab_size": 400}
    write_checkpoint(folder, config, random_tensors(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(str(folder))


def test_tokenizers_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, backend(), add_bos_token=True, bos_token=None)
    with pytest.raises(CheckpointError, match="has add_bos_token, but no bos_token"):
        load_tokenizer(str(folder))
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(str(folder))
    write_tokenizer(folder, backend())
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(str(folder))


def test_remote_tokenizer_code_is_not_run(tmp_path: Path) -> None:
    auto_map = {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}
    folder = write_tokenizer(tmp_path, backend(), add_bos_token=True, auto_map=auto_map)
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    tokenizer = load_tokenizer(str(folder))
    assert ids(tokenizer)[0] == tokenizer.bos_token_id
    write_tokenizer(folder, backend(), auto_map=auto_map, tokenizer_class="EvilTokenizer")
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        load_tokenizer(str(folder))


def test_a_tokenizer_s_code_can_be_trusted_alone_and_one_that_cannot_be_read_does_not_bar_the_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path, wide := {**TINY, "vocab_size": 320}, random_tensors(wide))
    write_tokenizer(
        folder, backend(), auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]}, tokenizer_class="OwnTokenizer"
    )
    base = "PreTrainedTokenizerFast"
    (folder / "own.py").write_text(f"from transformers import {base}\nclass OwnTokenizer({base}):\n    pass\n")
    with caplog.at_level(logging.WARNING):
        assert load_pretrained(str(folder))[1] is None
    assert 'trust_remote_code="tokenizer" runs it and no other' in caplog.messages[-1]
    assert "reads tokens but no text" in caplog.messages[-1]
    model, tokenizer = load_pretrained(str(folder), trust_remote_code="tokenizer")
    assert type(tokenizer).__name__ == "OwnTokenizer" and model is not None
    (folder / "own.py").write_text("raise RuntimeError('no such library')")
    assert load_pretrained(str(folder), trust_remote_code="tokenizer")[1] is None
    config = json.loads((folder / "config.json").read_text())
    code = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps({**config, **code}))
    with pytest.raises(UnsupportedModelError, match="model_type 'own' is unknown"):  # the model's own is never run
        load_pretrained(str(folder), trust_remote_code="tokenizer")


# --- the tokenizer of a model: the one that was passed, as it is ---


def in_memory(opening: list[str] | None = None, closing: list[str] | None = None, **settings: Any) -> Any:
    """A tokenizer that was loaded from nowhere, with what it puts around a text."""
    raw = backend()
    raw.add_special_tokens(["[gMASK]", "<sop>"])
    around = [*(opening or []), "$A", *(closing or [])]
    special = [(token, raw.token_to_id(token)) for token in (BOS, EOS, "[gMASK]", "<sop>")]
    raw.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **settings)


def holding(tokenizer: Any) -> HookedMoE:
    return HookedMoE.from_hf(build("mixtral", vocab_size=320), tokenizer, check=False).requires_grad_(False)


def known_of(tokenizer: Any) -> list[Any]:
    """All that a tokenizer is."""
    state = {name: copy.copy(value) for name, value in vars(tokenizer).items() if name != "_tokenizer"}
    return [id(tokenizer), type(tokenizer), tokenizer.backend_tokenizer.to_str(), repr(state)]


TEXTS = ["The experts of 2024 route", "x = [1, 22", "été"]


@pytest.mark.typed
def test_a_tokenizer_is_used_as_it_is_and_never_changed(tmp_path: Path) -> None:
    tokenizer = in_memory(padding_side="left", chat_template="{{ messages[0]['content'] }}!")
    tokenizer.add_tokens(["<think>"])
    assert [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token] == [None] * 3
    before = known_of(tokenizer)
    model = holding(tokenizer)
    assert model.tokenizer is tokenizer
    thought = tokenizer("<think> a", add_special_tokens=False).input_ids
    assert model.to_tokens("<think> a").tolist() == [thought] and thought[0] == len(tokenizer) - 1
    for what in ({}, {"padding_side": "right", "return_type": "loss"}):
        model(TEXTS, **what)
    model.generate(TEXTS, max_new_tokens=2, eos_token_id=5, verbose=False)
    for reads in (model.run_with_cache, model.routing, model.input_to_embed, model.to_str_tokens):
        reads(TEXTS)
    model.save_pretrained(tmp_path)
    assert known_of(tokenizer) == before
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("<think> a").input_ids == thought
    assert (again.pad_token, again.chat_template) == (None, tokenizer.chat_template)


def test_a_refused_model_leaves_its_tokenizer_alone() -> None:
    tokenizer = in_memory(padding_side="left")
    before = known_of(tokenizer)
    hf: Any = build("mixtral", vocab_size=320)
    hf.get_output_embeddings().register_forward_hook(lambda m, a, out: out * torch.nan)
    with pytest.raises(SelfCheckError):
        HookedMoE.from_hf(hf, tokenizer)
    assert known_of(tokenizer) == before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("own", [{}, {"eos_token": EOS}, {"pad_token": EOS, "bos_token": EOS}])
def test_padding_needs_no_pad_token_and_is_seen_by_nothing(side: str, own: dict[str, Any]) -> None:
    model = holding(in_memory(padding_side=side, **own))
    single = [model(text)[0] for text in TEXTS]
    together = model(TEXTS)
    for row, alone in zip(together, single, strict=True):
        real = row[-len(alone) :] if side == "left" else row[: len(alone)]
        assert torch.allclose(real, alone, atol=2e-5)
    said = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    for row, text in zip(model.generate(TEXTS, **said), TEXTS, strict=True):
        assert torch.equal(row[-3:], model.generate(text, **said)[0, -3:])
    embedded, tokens, _, mask = model.input_to_embed(TEXTS)
    assert embedded.shape[:2] == tokens.shape and (mask is None) == (side == "right")


def test_another_tokenizer_can_take_its_place_as_it_is() -> None:
    model, other = holding(in_memory(bos_token=BOS)), in_memory(eos_token=EOS)
    before = known_of(other)
    model.tokenizer = other
    assert model.tokenizer is other and known_of(other) == before and model.cfg.d_vocab == 320
    assert model.to_tokens(TEXT).tolist() == [other(TEXT).input_ids]
    with pytest.raises(InputError, match="expected a tokenizer of transformers"):
        model.tokenizer = "gpt2"


OPENINGS = [
    # what the tokenizer names, what it puts around a text, what to_tokens opens a text with, what studies do
    ({}, [], [], [], []),
    ({"eos_token": EOS, "pad_token": EOS}, [], [], [], []),  # OLMoE, GLM, Qwen3-Next
    ({"eos_token": EOS}, [], [EOS], [], []),
    ({"bos_token": BOS}, [BOS], [], [BOS], [BOS]),  # Mixtral, DeepSeek
    ({"bos_token": BOS, "eos_token": EOS}, [BOS], [EOS], [BOS], [BOS]),
    ({"bos_token": BOS}, [], [], [BOS], []),  # gpt-oss
    ({"bos_token": EOS, "eos_token": EOS}, [], [], [EOS], []),
    ({"eos_token": EOS}, ["[gMASK]", "<sop>"], [], ["[gMASK]", "<sop>"], ["[gMASK]", "<sop>"]),  # GLM-4
]


@pytest.mark.parametrize(("own", "opening", "closing", "opened", "studied"), OPENINGS)
def test_bos_opens_a_text_where_there_is_one_and_studies_read_as_the_tokenizer_does(
    own: dict[str, Any], opening: list[str], closing: list[str], opened: list[str], studied: list[str]
) -> None:
    tokenizer = in_memory(opening, closing, **own)
    model = holding(tokenizer)
    plain = tokenizer(TEXT, add_special_tokens=False).input_ids
    first, instead = (tokenizer.convert_tokens_to_ids(tokens) for tokens in (opened, studied))
    assert model.to_tokens(TEXT).tolist() == [first + plain]
    assert model.to_tokens(TEXT, prepend_bos=False).tolist() == [plain]
    assert model.to_single_token("x") == tokenizer.convert_tokens_to_ids("x")
    if "bos_token" in own:
        assert model.to_tokens(TEXT, prepend_bos=True).tolist() == [first + plain]
    else:
        with pytest.raises(InputError, match="has no BOS token; leave prepend_bos out"):
            model(TEXT, prepend_bos=True)
    assert model.own_ids(TEXT) == (instead, plain)
    assert instead + plain + tokenizer.convert_tokens_to_ids(closing) == tokenizer(TEXT).input_ids
    tokens = tokenize(Domain("d", (Passage(TEXT, "s", "f:1"),)), model, n_tokens=10**6, context=8)
    rows = [list(window.ids) for batch in tokens.batches for window in batch.windows]
    assert all(row[: len(instead)] == instead for row in rows)
    assert sum((row[len(instead) :] for row in sorted(rows, key=lambda row: -len(row))), [])[:4] == plain[:4]
    assert model_facts(model, "m")["texts_open_with"] == studied
    model.cfg.default_prepend_bos = False
    assert model.to_tokens(TEXT).tolist() == [plain]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_the_tokenizer_decides_on_bos_in_every_family(family: str) -> None:
    """TransformerLens has BOS off for Qwen, whose own tokenizers have none."""
    model = HookedMoE.from_hf(build(family, vocab_size=320), in_memory([BOS], bos_token=BOS), check=False)
    own = sum(model.own_ids(TEXT), [])
    assert model.to_tokens(TEXT).tolist() == [own] == [model.tokenizer(TEXT).input_ids]
    model.tokenizer = in_memory(eos_token=EOS)  # negative control: none
    assert model.to_tokens(TEXT).tolist() == [own[1:]]


def test_what_a_tokenizer_marks_as_special_is_no_text_whatever_its_role() -> None:
    """As in the chat format of gpt-oss, whose special tokens are in no role; an added token that is none is text."""
    tokenizer = in_memory()
    tokenizer.add_tokens(["<think>"])
    assert tokenizer.all_special_ids == []
    model, text = holding(tokenizer), "<sop>user[gMASK]<think> a"
    user, think = ids(tokenizer, "user"), ids(tokenizer, "<think> a")
    (batch,) = tokenize(Domain.of("chat", [text]), model, n_tokens=100, context=32)
    assert batch.tokens[batch.counted].tolist() == [*user, *think] and batch.windows[0].counted == len([*user, *think])
    (shard,) = shards(Domain.of("chat", [text]), model, Reading(tokens=None, context=32))
    assert shard.windows == batch.windows
    (encoded,) = encode(model, [text], [None]).looked_at
    assert encoded.tolist() == batch.counted[0].tolist()
    assert expert_vocabulary(model, 1, 0, [text]).tokens == batch.windows[0].counted
    (x,) = ids(tokenizer, "x")  # marked nowhere, but what the tokenizer puts before texts as a special token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="x $A", special_tokens=[("x", x)])
    (batch,) = tokenize(Domain.of("chat", [text]), model, n_tokens=100, context=32)
    assert batch.tokens[0, 0] == x and batch.tokens[batch.counted].tolist() == [*user, *think]


@pytest.mark.parametrize(("own", "opening", "closing", "opened", "studied"), OPENINGS)
def test_a_text_that_opens_itself_is_not_opened_twice(
    own: dict[str, Any], opening: list[str], closing: list[str], opened: list[str], studied: list[str]
) -> None:
    tokenizer = in_memory(opening, closing, **own)
    model = holding(tokenizer)
    rendered = "".join(opened) + TEXT
    assert model.to_tokens(rendered).tolist() == [tokenizer(rendered, add_special_tokens=False).input_ids]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_long_text_is_cut_where_the_tokenizer_says_and_keeps_its_bos(side: str) -> None:
    model = holding(in_memory([BOS], bos_token=BOS, truncation_side=side))
    model.cfg.n_ctx = 5
    whole = model.to_tokens(TEXT, truncate=False)[0].tolist()
    kept = whole[-4:] if side == "left" else whole[1:5]
    with pytest.warns(UserWarning, match=f"a text of {len(whole)} tokens is cut to the model's context, 5"):
        assert model.to_tokens(TEXT).tolist() == [[whole[0], *kept]]
    model.cfg.n_ctx = len(whole)
    assert model.to_tokens(TEXT).tolist() == [whole]  # negative control: without a warning, which is an error here
