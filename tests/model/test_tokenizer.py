"""BOS is added as tokenizer_config.json says: once, also around chat messages."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe_lens.errors import CheckpointError
from moe_lens.model.loading.pretrained import load_pretrained, load_tokenizer
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
