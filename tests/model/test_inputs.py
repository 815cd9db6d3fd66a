"""What people bring: every form of an input gives the same numbers, without padding; oddities are refused."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import BatchEncoding, GenerationConfig

from moe_lens import HookedMoE
from moe_lens.data import Domain, Passage, TokenBatch, tokenize
from moe_lens.errors import InputError
from moe_lens.interventions.expert_means import ExpertMeans
from tests.families import build, tokens
from tests.matrix.configs import build as tiny
from tests.matrix.configs import tokens as of_matrix

TEXTS = ["The old man looked at the sea and thought of the fish.", "Der Hund", "Le chat dort sur la table."]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "verbose": False}


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32, check=False)


def single_losses(model: HookedMoE) -> tuple[float, list[torch.Tensor]]:
    """The token-weighted mean of the texts' own losses, and each text's losses by token."""
    with torch.no_grad():
        losses = [model(text, return_type="loss", loss_per_token=True)[0] for text in TEXTS]
    return float(torch.cat(losses).mean()), losses


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_texts_leaves_padding_out(model: HookedMoE, side: str) -> None:
    right, losses = single_losses(model)
    how: dict[str, Any] = {"return_type": "loss", "padding_side": side}
    with torch.no_grad():
        found = [
            model(TEXTS, **how),
            model.run_with_hooks(TEXTS, fwd_hooks=[], **how),
            model.run_with_cache(TEXTS, names_filter=[], **how)[0],
            model(TEXTS, **{**how, "return_type": "both"})[1],
        ]
        by_token = model(TEXTS, loss_per_token=True, **how)
        counted = model(model.to_tokens(TEXTS, padding_side=side), return_type="loss")
    assert [float(loss) for loss in found] == pytest.approx([right] * 4, abs=1e-5)
    for row, alone in zip(by_token, losses, strict=True):
        n = len(alone)
        kept, padding = (row[-n:], row[:-n]) if side == "left" else (row[:n], row[n:])
        assert torch.allclose(kept, alone, atol=1e-4) and not padding.any()
    assert abs(float(counted) - right) > 1, "negative control: ids without a mask are all real"


def routed(name: str) -> bool:
    return name.endswith(("expert_indices", "routing_weights"))


def forms(model: HookedMoE) -> dict[str, Any]:
    tokenizer: Any = model.tokenizer
    encoding = tokenizer(TEXTS, return_tensors="pt", padding=True)
    rows = tokenizer(TEXTS)["input_ids"]
    passages = tuple(Passage(text, f"{at}", f"{at}") for at, text in enumerate(TEXTS))
    batch = next(iter(tokenize(Domain("texts", passages), model, n_tokens=10**6, context=64)))
    order = np.argsort([int(source) for source in batch.sources])
    return {
        "texts": TEXTS,
        "tuple": tuple(TEXTS),
        "array": np.array(TEXTS),
        "series": pd.Series(TEXTS),
        "encoding": encoding,
        "dict": dict(encoding),
        "encoding of lists": tokenizer(TEXTS),
        "ragged lists of ids": rows,
        "padded on the left": tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left"),
        "numpy": {name: value.numpy() for name, value in encoding.items()},
        "batch": TokenBatch(batch.tokens[order], batch.mask[order], batch.counted[order], ("",) * 3),
    }


FORMS = ["texts", "tuple", "array", "series", "encoding", "dict", "encoding of lists", "ragged lists of ids"]
FORMS += ["padded on the left", "numpy", "batch"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_input_is_read_alike(model: HookedMoE, form: str) -> None:
    given, (right, _) = forms(model)[form], single_losses(model)
    with torch.no_grad():
        loss, cache = model.run_with_cache(given, names_filter=routed, return_type="loss")
        routing, alone = model.routing(given), [model.routing(text) for text in TEXTS]
    assert float(loss) == pytest.approx(right, abs=1e-5)
    mask = cache.routing(2).mask
    assert mask is not None and routing.mask is not None and torch.equal(mask, routing.mask)
    for row, one in enumerate(alone):
        assert torch.equal(routing.indices[:, row][:, mask[row]], one.indices[:, 0])
    together = model.generate(given, return_type="str", **GREEDY)
    assert together == [model.generate(text, **GREEDY) for text in TEXTS]
    assert model.hf_generate(given, 4, do_sample=False, return_type="str") == together
    pieces = list(model.generate_stream(given, return_type="str", **GREEDY))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == together
    assert [model.tokenizer.decode(row, skip_special_tokens=True) for row in model.to_tokens(given)] == TEXTS


def test_a_text_is_read_alike_in_every_form(model: HookedMoE) -> None:
    tokenizer: Any = model.tokenizer
    tokens = model.to_tokens(TEXTS[0])
    ids = tokens[0].tolist()
    right = model(tokens)
    for given in (TEXTS[0], [TEXTS[0]], ids, [ids], tuple(ids), np.array(ids, dtype=np.int32), tokens[0], tokens.int()):
        assert torch.equal(model(given), right)
    for encoding in (tokenizer(TEXTS[0]), tokenizer(TEXTS[0], return_tensors="pt"), {"input_ids": tokens}):
        assert torch.equal(model(encoding), right)
    hf: Any = model.original_model
    assert torch.equal(model(hf.get_input_embeddings()(tokens)), right)


def test_chats_are_inputs(model: HookedMoE) -> None:
    tokenizer: Any = model.tokenizer
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    chat = [{"role": "user", "content": "Who sleeps?"}, {"role": "assistant", "content": "Le chat."}]
    encoding = tokenizer.apply_chat_template(chat, chat_template=template, return_tensors="pt", return_dict=True)
    assert isinstance(encoding, BatchEncoding)
    rendered = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    assert torch.equal(model(encoding), model(rendered))
    with pytest.raises(InputError, match="apply_chat_template"):
        model(chat)


def test_a_mask_of_four_axes_says_what_is_padding(model: HookedMoE) -> None:
    encoding = dict(model.tokenizer(TEXTS, return_tensors="pt", padding=True))
    real = encoding["attention_mask"].bool()
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    allowed = causal[None, None] & real[:, None, None, :]
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    flat = model.routing(encoding)
    with torch.no_grad():
        loss, cache = model.run_with_cache(
            encoding["input_ids"], names_filter=routed, attention_mask=additive, return_type="loss"
        )
    mask = cache.routing(2).mask
    assert mask is not None and torch.equal(mask, real), "the axes of batch and position, as the indices have"
    assert torch.equal(cache.routing(2).indices[real], flat.layer(2).indices[real])
    assert float(loss) == pytest.approx(single_losses(model)[0], abs=1e-5)


ODD: dict[str, tuple[Any, str]] = {
    "floats": (torch.rand(1, 4), "no token ids"),
    "floats of embeddings' rank": (torch.rand(1, 4, 7), "embeddings, which are"),
    "negative": (torch.tensor([[1, -1]]), "from -1 to 1; the model embeds 0 to 4095"),
    "out of range": ([4096], "from 4096 to 4096"),
    "three axes": (torch.zeros(1, 2, 3, dtype=torch.long), "expected \\[batch, pos\\]"),
    "no axis": (torch.tensor(3), "shape \\(\\)"),
    "booleans": (torch.tensor([[True]]), "torch.bool"),
    "booleans in a list": ([True, 1], "list of bool, int"),
    "complex": (torch.tensor([[1j]]), "complex"),
    "no batch": (torch.zeros(0, 4, dtype=torch.long), "empty"),
    "no position": (torch.zeros(1, 0, dtype=torch.long), "empty"),
    "an empty list": ([], "empty list"),
    "no shape but a place": (torch.zeros(1, 4, dtype=torch.long, device="meta"), "meta device"),
    "nothing": (None, "NoneType"),
    "a number": (5, "type int"),
    "bytes": (b"text", "type bytes"),
    "a mixture": (["text", 3], "list of int, str"),
    "a row among ids": ([1, [2]], "list of int, list"),
    "texts in lists": ([["a"], ["b"]], "list of str"),
    "a dictionary of something else": ({"text": "a"}, "expected input_ids"),
    "a dictionary with a word of nobody": ({"input_ids": [1, 2], "colour": 3}, "no argument 'colour'"),
    "a huge number": ([2**70], "no token ids"),
}


@pytest.mark.untyped
@pytest.mark.parametrize("what", ODD)
def test_an_odd_input_is_one_clear_error(model: HookedMoE, what: str) -> None:
    given, match = ODD[what]
    with pytest.raises(InputError, match=match):
        model(given)
    with pytest.raises(InputError, match="colour" if "nobody" in what else match):
        model.generate(given, **GREEDY)
    if "colour" not in match:
        with pytest.raises(InputError, match=match):
            model.routing(given)


def test_an_empty_text_is_its_bos_or_refused(model: HookedMoE) -> None:
    assert model("").shape == (1, 1, 4096), "as in TransformerLens: generation may begin from BOS alone"
    assert model.to_tokens("", prepend_bos=False).shape == (1, 0)
    with pytest.raises(InputError, match="text 1 of 2 is empty"):
        model(["a", ""], prepend_bos=False)
    for nothing_follows in ("", torch.tensor([[3]]), ["", ""]):
        with pytest.raises(InputError, match="no token follows another"):
            model(nothing_follows, return_type="loss")


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.ones(2, 4), "expected \\[1, 4\\]"),
        (torch.ones(1, 3), "expected \\[1, 4\\]"),
        (torch.tensor([[0.0, 0, -1e9, -1e9]]), "other numbers than 1"),
        (torch.ones(1, 1, 2, 4, dtype=torch.bool), "query row"),
        ("1111", "type str"),
    ],
)
def test_an_odd_mask_is_refused(model: HookedMoE, mask: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        model(torch.tensor([[1, 2, 3, 4]]), attention_mask=mask)


@pytest.mark.typed
@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("nonsense", "no argument 'nonsense'"),
        ("temprature", "did you mean 'temperature'"),
        ("num_beams", r"model\.hf_generate\(…, num_beams=…\)"),
        ("position_ids", "no argument"),
    ],
)
def test_generation_refuses_what_it_does_not_do(model: HookedMoE, word: str, match: str) -> None:
    for generate in (model.generate, model.generate_stream):
        with pytest.raises(InputError, match=match):
            generate("The old", **{**GREEDY, word: 2})
    with pytest.raises(InputError, match="return_type is 'logits'"):
        model.generate("The old", return_type="logits")
    with pytest.raises(InputError, match="freq_penalty is 5.0, and counts in sampling alone"):
        model.generate("The old", **GREEDY, freq_penalty=5.0)


def test_penalties_do_not_count_padding_as_text(model: HookedMoE) -> None:
    """TransformerLens's sampling gets the padded ids; transformers' own gives each prompt what it gives it alone."""
    texts, how = ["The old", "The old man looked at the sea"], {**GREEDY, "repetition_penalty": 0.1}
    for words in (how, {"freq_penalty": 0.5, "verbose": False}):
        for generate in (model.generate, model.generate_stream):
            with pytest.raises(InputError, match="would count the padding in front of shorter prompts as text"):
                generate(texts, **words)
    alone = [model.generate(text, **how) for text in texts]  # nothing is padded there
    assert model.hf_generate(texts, 4, do_sample=False, repetition_penalty=0.1) == alone
    assert alone != model.generate(texts, **GREEDY), "negative control: penalties count"


def test_a_text_ends_where_the_generation_config_says(model: HookedMoE) -> None:
    """Chats end in several tokens, of which config.json and the tokenizer name one."""
    config: Any = model.original_model.generation_config
    words: dict[str, Any] = {**GREEDY, "max_new_tokens": 8}
    tokens = model.to_tokens("The old man looked at the sea and thought of the fish.")
    written = model.generate(tokens, **words)
    before, later, earlier = config.eos_token_id, int(written[0, -2]), int(written[0, -5])
    assert earlier not in written[0, tokens.shape[1] : -5] and before not in written
    try:
        config.eos_token_id = [later, earlier]
        right = model.hf_generate(tokens, 8, do_sample=False)
        assert torch.equal(right, written[:, :-4])
        assert torch.equal(model.generate(tokens, **words), right)
        *_, streamed = model.generate_stream(tokens, **words)
        assert torch.equal(streamed[0, -right.shape[1] + tokens.shape[1] :], right[0, tokens.shape[1] :])
        # What the caller says counts first.
        assert torch.equal(model.generate(tokens, **words, stop_at_eos=False), written)
        assert torch.equal(model.generate(tokens, **words, eos_token_id=later), written[:, :-1])
    finally:
        config.eos_token_id = before


def test_texts_that_end_first_are_not_filled_up_with_what_ended_them(model: HookedMoE) -> None:
    texts = ["The old man looked at the sea and", "Der Hund lief durch den Wald und"]
    comma = model.to_single_token(",")
    words: dict[str, Any] = {**GREEDY, "max_new_tokens": 20}
    alone = [model.generate(text, **words, eos_token_id=comma) for text in texts]
    assert alone[0].endswith(",") and len(alone[0]) < len(model.generate(texts[0], **words)), "a control: it ends there"
    for end in (comma, [comma]):
        assert model.generate(texts, **words, eos_token_id=end) == alone
    *_, streamed = model.generate_stream(model.to_tokens(texts), **words, eos_token_id=comma)
    assert int((streamed[0] == comma).sum()) == 1
    assert model.hf_generate(texts, 20, do_sample=False, eos_token_id=comma) == alone


def test_stop_strings_need_no_tokenizer_named(model: HookedMoE) -> None:
    words: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    text = "The old man looked at the sea and thought of the fish."
    whole = model.hf_generate(text, **words)
    end = whole[len(text) + 3 : len(text) + 8]
    stopped = model.hf_generate(text, **words, stop_strings=[end])
    assert end in stopped[len(text) :] and len(stopped) < len(whole) and whole.startswith(stopped)
    assert model.hf_generate(text, **words, stop_strings=["no such words"]) == whole


def test_beams_are_transformers_own(model: HookedMoE) -> None:
    tokens = model.to_tokens("The old")
    beams = model.hf_generate(tokens, 6, num_beams=4, do_sample=False)
    hf: Any = model.original_model
    assert torch.equal(beams, hf.generate(tokens, max_new_tokens=6, num_beams=4, do_sample=False))
    with model.keep_top(1):
        assert not torch.equal(model.hf_generate(tokens, 6, num_beams=4, do_sample=False), beams), "hooks fire"
    with pytest.raises(ValueError, match="nonsense"):
        model.hf_generate(tokens, nonsense=3)


def test_what_is_said_of_transformers_generation_counts(model: HookedMoE) -> None:
    hf: Any = model.original_model
    tokens = model.to_tokens("The old")
    one_by_one = GenerationConfig(max_new_tokens=4, do_sample=False, repetition_penalty=1.5)
    for words in (
        {"generation_config": one_by_one},
        {"generation_config": one_by_one, "max_new_tokens": 3},
        {"max_length": tokens.shape[1] + 2, "do_sample": False},
    ):
        right = hf.generate(tokens, **words)
        assert torch.equal(model.hf_generate("The old", return_type="tokens", **words), right), words
        assert right.shape[1] < tokens.shape[1] + 10, "negative control: TransformerLens's default is 10"
    greedy: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    out = model.hf_generate(tokens, return_dict_in_generate=True, use_cache=False, **greedy)
    assert out.past_key_values is None
    assert model.hf_generate(tokens, return_dict_in_generate=True, **greedy).past_key_values is not None
    end = int(hf.generate(tokens, **greedy)[0, tokens.shape[1] + 1])
    ended = hf.generate(tokens.repeat(2, 1), **greedy, eos_token_id=[end], pad_token_id=7)
    assert ended.shape[1] == tokens.shape[1] + 2
    hf.generation_config.eos_token_id = [end, hf.generation_config.eos_token_id]
    try:  # a chat model's further ends
        assert torch.equal(model.hf_generate(tokens.repeat(2, 1), pad_token_id=7, **greedy), ended)
        four = GenerationConfig(max_new_tokens=4, do_sample=False)
        for words, new in (({"generation_config": four}, 2), ({**greedy, "eos_token_id": None}, 4)):
            right = hf.generate(tokens, **words)
            assert torch.equal(model.hf_generate(tokens, **words), right) and right.shape[1] == tokens.shape[1] + new
        assert model.hf_generate(tokens, stop_at_eos=False, **greedy).shape[1] == tokens.shape[1] + 4
    finally:
        hf.generation_config.eos_token_id = hf.generation_config.eos_token_id[1]


def test_none_turns_off_what_it_is_said_of(model: HookedMoE) -> None:
    def sampled(generate: Any, **words: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return generate(model.to_tokens("The old"), max_new_tokens=30, do_sample=True, eos_token_id=None, **words)

    for words in ({"top_k": None}, {"top_k": None, "temperature": None, "top_p": None}):
        assert torch.equal(sampled(model.hf_generate, **words), sampled(model.original_model.generate, **words))
    assert not torch.equal(sampled(model.hf_generate, top_k=None), sampled(model.hf_generate))  # the control: of 50


def test_transformers_generation_goes_on_with_embeddings(model: HookedMoE) -> None:
    hf: Any = model.original_model
    tokens = model.to_tokens("The old man")
    embeddings = hf.get_input_embeddings()(tokens).detach()
    right = hf.generate(tokens, max_new_tokens=4, do_sample=False)[:, tokens.shape[1] :]
    for given in (embeddings, {"inputs_embeds": embeddings, "attention_mask": torch.ones_like(tokens)}):
        assert torch.equal(model.hf_generate(given, 4, do_sample=False), right)
    said = model.hf_generate(embeddings, 4, do_sample=False, return_type="str")
    assert said == model.tokenizer.decode(right[0])
    for word in ("inputs_embeds", "input_ids"):
        with pytest.raises(InputError, match=f"hf_generate has no argument '{word}'; expected the (embeddings|ids)"):
            model.hf_generate(**{word: embeddings})


def test_without_a_tokenizer_transformers_generation_gives_tokens() -> None:
    model, plain, tokens = HookedMoE.from_hf(build("mixtral")), build("mixtral"), torch.tensor([[3, 5, 7]])
    greedy: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.hf_generate(tokens, **greedy), plain.generate(tokens, **greedy))  # pyright: ignore[reportCallIssue]
    with pytest.raises(InputError, match="tokenizer"):
        model.hf_generate(tokens, return_type="str", **greedy)


def test_a_row_of_padding_leaves_the_others_alone_and_is_not_continued(model: HookedMoE) -> None:
    tokens = model.to_tokens(TEXTS[0])
    rows, mask = torch.cat([tokens, tokens]), torch.ones(2, tokens.shape[1], dtype=torch.long)
    mask[1] = 0
    right = model(tokens)
    for names in ([], [f"blocks.{layer}.attn.hook_pattern" for layer in range(6)]):  # without and with eager attention
        logits, cache = model.run_with_cache(rows, attention_mask=mask, names_filter=names)
        assert torch.allclose(logits[:1], right, atol=1e-4) and not logits.isnan().any()
        assert not any(value.isnan().any() for value in cache.values())
    for made in (model.generate, model.hf_generate):
        with pytest.raises(InputError, match="row 1 of the prompt is all padding"):
            made(rows, max_new_tokens=1, attention_mask=mask)


def test_a_column_of_a_dataset_is_a_list_of_texts(model: HookedMoE) -> None:
    column = Dataset.from_dict({"text": TEXTS})["text"]
    assert not isinstance(column, list), "negative control"
    assert torch.equal(model.to_tokens(column), model.to_tokens(TEXTS))
    for texts in (column, pd.Series(TEXTS)):
        assert torch.equal(model.to_tokens(texts, padding_side="left"), model.to_tokens(TEXTS, padding_side="left"))


def test_a_reference_is_read_alike(model: HookedMoE) -> None:
    given, right = forms(model), ExpertMeans.measure(model, TEXTS)
    for form in ("encoding", "padded on the left", "batch"):
        means = ExpertMeans.measure(model, given[form])
        assert torch.equal(means.counts, right.counts)
        assert torch.allclose(means.experts, right.experts, atol=1e-4, equal_nan=True)
        assert model.ablate({3: [int(right.counts[2].argmax())]}, how="mean", reference=given[form])
    padded = ExpertMeans.measure(model, given["encoding"]["input_ids"])
    assert padded.counts.sum() > right.counts.sum(), "negative control: ids without a mask are all real"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"return_type": "logit"}, "return_type is 'logit'; expected one of 'logits'"),
        ({"nonsense": 1}, "forward has no argument 'nonsense'"),
        ({"atention_mask": 1}, "did you mean 'attention_mask'"),
        ({"past_kv_cache": 1}, "past_key_values"),
        ({"fwd_hooks": []}, "run_with_hooks"),
    ],
)
def test_forward_refuses_what_it_does_not_read(model: HookedMoE, words: dict[str, Any], match: str) -> None:
    for run in (model, model.routing, model.run_with_cache):
        if run == model.routing and "return_type" in words:
            continue
        with pytest.raises(InputError, match=match):
            run("The old", **words)
    with pytest.raises(InputError, match=r"model\(encoding\)"):
        model(**model.tokenizer("The old", return_tensors="pt"))
    assert torch.equal(model("The old", output_router_logits=False, use_cache=False), model("The old"))


@pytest.mark.untyped
def test_interventions_hold_in_a_stream_and_nowhere_else(model: HookedMoE) -> None:
    free, top = model.generate("The old", **GREEDY), model.keep_top(1)
    ablated, logits = model.generate("The old", interventions=[top], **GREEDY), model("The old")
    assert ablated != free
    pieces = []
    for piece in model.generate_stream("The old", interventions=[top], max_tokens_per_yield=1, **GREEDY):
        pieces.append(piece)
        assert torch.equal(model("The old"), logits), "between two pieces nothing is ablated"
    assert len(pieces) == 4 and "".join(pieces) == ablated
    unfinished = model.generate_stream("The old", interventions=[top], max_tokens_per_yield=1, **GREEDY)
    next(unfinished)
    unfinished.close()
    assert torch.equal(model("The old"), logits)
    with pytest.raises(InputError, match="expected an Intervention in it, not 'top'"):
        model.generate_stream("The old", interventions=["top"], **GREEDY)  # pyright: ignore[reportArgumentType]


@pytest.mark.untyped
def test_what_is_said_twice_must_be_the_same(model: HookedMoE) -> None:
    texts = ["The old man", "The old man looked at the sea"]
    encoding = dict(model.tokenizer(texts, return_tensors="pt", padding=True))
    mask = encoding["attention_mask"]
    assert not bool(mask.all())
    right = model(encoding)
    batch = TokenBatch(encoding["input_ids"], mask.bool(), mask.bool(), ("a", "b"))
    for run in (model, model.read, model.run_with_cache, model.routing):
        for given in (encoding, batch, model.read(encoding)):
            run(given, attention_mask=mask)
            with pytest.raises(InputError, match="differ in what is padding; pass one of them"):
                run(given, attention_mask=torch.ones_like(mask))
    assert torch.equal(model(encoding, attention_mask=mask), right)
    rows = [row[kept.bool()].tolist() for row, kept in zip(encoding["input_ids"], mask, strict=True)]
    assert torch.equal(model(rows, attention_mask=mask, padding_side="right")[1], right[1])
    with pytest.raises(InputError, match="attention_mask is not 0 where shorter rows are padded, on the right"):
        model(rows, attention_mask=torch.ones_like(mask), padding_side="right")
    places = torch.arange(mask.shape[1])[None].expand_as(mask)
    model({**encoding, "position_ids": places}, position_ids=places.clone())
    with pytest.raises(InputError, match="position_ids is passed by name, and the input brings another"):
        model({**encoding, "position_ids": places}, position_ids=places + 1)
    with pytest.raises(InputError, match="input_ids and inputs_embeds"):
        model({**encoding, "inputs_embeds": torch.zeros(2, 3, model.cfg.d_model)})


@pytest.mark.untyped
def test_what_is_said_of_texts_needs_texts(model: HookedMoE) -> None:
    ids, text = model.to_tokens("The old"), "The old"
    for run in (model, model.to_tokens, model.run_with_cache, model.routing):
        run(text, prepend_bos=True, padding_side="left")
        run([text, "The"], prepend_bos=True, padding_side="left")
        run(ids, prepend_bos=False)
        for given in (ids, ids.tolist(), {"input_ids": ids}):
            with pytest.raises(InputError, match="prepend_bos=True is about texts"):
                run(given, prepend_bos=True)
        for given in (ids, {"input_ids": ids}):
            with pytest.raises(InputError, match="padding_side='left' is about texts, or rows of ids.*attention_mask="):
                run(given, padding_side="left")
    with pytest.raises(InputError, match="prepend_bos=True is about texts"):
        model.generate(ids, prepend_bos=True, max_new_tokens=1)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_a_token_that_a_mask_leaves_out_has_no_position_whatever_the_input(name: str) -> None:
    """Ids, embeddings and streams with a hole are the text without it; plain transformers counts the hole."""
    hooked, ids = HookedMoE.from_hf(build(name), check=False), tokens()
    inside: Any = hooked.original_model
    mask = torch.ones_like(ids)
    mask[0, 4:6] = 0
    short = torch.cat([ids[:1, :4], ids[:1, 6:]], 1)
    with torch.no_grad():
        _, cache = hooked.run_with_cache(ids, attention_mask=mask, names_filter="blocks.1.hook_resid_pre")
        inputs: list[tuple[torch.Tensor, dict[str, Any]]] = [
            (ids, {}),
            (inside.get_input_embeddings()(ids), {}),
            (cache["blocks.1.hook_resid_pre"], {"start_at_layer": 1}),
        ]
        wanted, counted = hooked(short)[0], inside(ids, attention_mask=mask).logits[0]
        for given, words in inputs:
            found = hooked(given, attention_mask=mask, **words)
            assert (torch.cat([found[0, :4], found[0, 6:]]) - wanted).abs().max() <= 2e-5
            assert (found[1] - hooked(ids)[1]).abs().max() <= 2e-5
        assert (counted[-1] - wanted[-1]).abs().max() > 0.01


def test_generation_from_embeddings_with_padding_is_that_of_transformers() -> None:
    hooked, ids = HookedMoE.from_hf(build("olmoe"), check=False), tokens()
    inside: Any = hooked.original_model
    embeddings = inside.get_input_embeddings()(ids).detach()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for call in (hooked.generate, hooked.generate_stream):
        with pytest.raises(InputError, match="hf_generate"):
            list(call(embeddings, attention_mask=mask, max_new_tokens=2))
    greedy: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_type": "tokens"}
    found = hooked.hf_generate(embeddings, attention_mask=mask, stop_at_eos=False, **greedy)
    wanted = hooked.generate(ids, attention_mask=mask, stop_at_eos=False, verbose=False, **greedy)
    assert torch.equal(found, wanted[:, -4:])
    whole = hooked.generate(embeddings, attention_mask=torch.ones_like(ids), stop_at_eos=False, verbose=False, **greedy)
    assert torch.equal(whole, hooked.generate(ids, stop_at_eos=False, verbose=False, **greedy)[:, -4:])


@pytest.mark.typed
def test_embeddings_are_refused_where_experts_are_chosen_by_ids() -> None:
    model: Any = HookedMoE.from_hf(tiny("deepseek_v4"), check=False)
    embedded = model.embed(of_matrix()[:1])
    uses = (
        lambda: model(embedded),
        lambda: model.generate(embedded, max_new_tokens=1, verbose=False),
        lambda: model.hf_generate(embedded, max_new_tokens=1),
        lambda: model.original_model(inputs_embeds=embedded),
    )
    for use in uses:
        with pytest.raises(InputError, match="^layer 0 chooses experts by the ids of tokens, and embeddings came"):
            use()
    moved = [("hook_embed", lambda value, hook: embedded)]
    assert torch.equal(model.run_with_hooks(of_matrix()[:1], fwd_hooks=moved), model(of_matrix()[:1]))
    none: Any = HookedMoE.from_hf(tiny("deepseek_v4", mlp_layer_types=["moe"] * 4), check=False)
    torch.testing.assert_close(none(none.embed(of_matrix()[:1])), none(of_matrix()[:1]))  # negative control


@pytest.mark.typed
def test_placeholders_that_are_looked_up_are_no_embeddings_of_the_text() -> None:
    """Given embeddings, Gemma 4 looks for those of its placeholders, which it asks its embedding for."""
    hf: Any = tiny("gemma4")
    config = hf.config
    config.image_token_id, config.video_token_id, config.audio_token_id = 90, 91, 92
    model, ids = HookedMoE.from_hf(hf, check=False), of_matrix(2, 7) % 90
    seen: list[Any] = []
    watch = [(name, lambda value, hook: seen.append(tuple(value.shape))) for name in ("embed.hook_in", "hook_embed")]
    embedded = model(ids, stop_at_layer=0)
    found = model.run_with_hooks(embedded, fwd_hooks=watch)
    assert not seen, "as in every other family"
    expected = model.run_with_hooks(ids, fwd_hooks=watch)
    assert seen == [(2, 7), (2, 7, model.cfg.d_model)]  # negative control
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # float32


@pytest.mark.typed
def test_the_loss_of_ids_that_are_embedded_and_not_predicted_is_one_line() -> None:
    """Inkling's vocabulary is padded, and its unembedding is not."""
    model: Any = HookedMoE.from_hf(tiny("inkling_text", unpadded_vocab_size=90), check=False)
    ids = of_matrix(2, 7) % 90
    odd = ids.clone()
    odd[1, 4:] = 95
    with pytest.raises(InputError, match="expected ids from 0 to 89, or -100"):
        model(ids, return_type="loss", labels=odd)
    for words in ({}, {"loss_per_token": True}):
        with pytest.raises(InputError, match="^the loss of token 95: the model predicts ids from 0 to 89"):
            model(odd, return_type="loss", **words)
    mask = torch.ones_like(odd)
    mask[1, 4:] = 0
    per_token = model(odd, return_type="loss", attention_mask=mask, loss_per_token=True)
    assert not per_token[1, 3:].any()
    torch.testing.assert_close(per_token[0], model(ids[:1], return_type="loss", loss_per_token=True)[0])
    torch.testing.assert_close(per_token[1, :3], model(ids[1:, :4], return_type="loss", loss_per_token=True)[0])
