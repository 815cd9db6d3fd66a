"""Batch and position stay what they are: padding on either side, and generation with a cache of keys and values."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.interventions import ExpertMeans
from tests.families import CONFIGS, build, tokens
from tests.wrapped import as_hook, deviation, untouched, wrapped

FP32 = 1e-5
families = pytest.mark.parametrize("family", CONFIGS)
sides = pytest.mark.parametrize("side", ["left", "right"])


def padded(side: str) -> tuple[Tensor, Tensor, list[tuple[int, slice]]]:
    """Texts of 9, 5 and 12 tokens in one batch: tokens, mask, and where each text is."""
    lengths = [9, 5, 12]
    ids = torch.zeros(3, 12, dtype=torch.long)
    mask = torch.zeros_like(ids)
    places = []
    for row, length in enumerate(lengths):
        where = slice(12 - length, 12) if side == "left" else slice(0, length)
        ids[row, where] = tokens(1, length, seed=row)[0]
        mask[row, where] = 1
        places.append((row, where))
    return ids, mask, places


@families
def test_reading_attention_leaves_texts_that_are_padded_on_the_left_as_they_are_in_float64(family: str) -> None:
    """Its softmax is in float32, where a mask of float64 is infinite."""
    case = wrapped(family, torch.float64)
    ids, mask, _ = padded("left")
    with torch.no_grad():
        plain = case.model(ids, attention_mask=mask)[mask.bool()]
        read, cache = case.model.run_with_cache(ids, attention_mask=mask)
    assert deviation(read[mask.bool()], plain) <= FP32 * plain.abs().max().item()
    assert cache["resid_post", case.last].isfinite().all()


@families
@sides
def test_padding_changes_nothing_on_real_tokens(family: str, side: str) -> None:
    case = wrapped(family)
    ids, mask, places = padded(side)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    kept = [names.mlp(n, case.last) for n in (names.ROUTER_LOGITS, names.EXPERT_INDICES, names.EXPERT_OUT)]
    with torch.no_grad():
        theirs = case.hf(ids, attention_mask=mask, position_ids=position_ids).logits
        ours, cache = case.model.run_with_cache(ids, attention_mask=mask, names_filter=kept)
        for row, where in places:
            alone, single = case.model.run_with_cache(ids[row : row + 1, where], names_filter=kept)
            scale = alone.abs().max().item()
            assert deviation(ours[row, where], theirs[row, where]) <= FP32 * scale
            assert deviation(ours[row, where], alone[0]) <= FP32 * scale
            assert torch.equal(cache[kept[1]][row, where], single[kept[1]][0])
            for name in (kept[0], kept[2]):
                assert deviation(cache[name][row, where], single[name][0]) <= 2 * FP32 * single[name].abs().max().item()


@families
def test_every_hook_has_the_batch_in_front_and_is_cut_by_positions(family: str) -> None:
    """Also where transformers computes on flat tokens (Qwen2-MoE's shared experts); rotary angles have no batch."""
    case = wrapped(family)
    _, whole = case.model.run_with_cache(ids := tokens(3, 7))
    _, cut = case.model.run_with_cache(ids, pos_slice=(2, 5))
    for name, value in whole.items():
        if name.endswith(("hook_cos", "hook_sin")):
            continue
        assert len(value) == 3, name
        axes = [axis for axis, size in enumerate(value.shape) if size == 7]
        assert any(torch.equal(value.narrow(axis, 2, 3), cut[name]) for axis in axes), name


@families
@sides
def test_an_edit_at_one_position_hits_that_token(family: str, side: str) -> None:
    case = wrapped(family)
    ids, mask, places = padded(side)
    for hook in (names.ROUTING_WEIGHTS, names.EXPERT_OUT, names.ROUTER_LOGITS):
        name = names.mlp(hook, case.model.moe_layers[0])

        def change(value: Tensor, row: int, position: int) -> Tensor:
            value = value.clone()
            value[row, position] = value[row, position].flip(0) * 2 + 0.3
            return value

        for row, where in places[:2]:
            third = where.start + 2  # the third token of the text, wherever the text is
            with torch.no_grad():
                plain = case.model(ids, attention_mask=mask)
                edit = as_hook(lambda v, r=row, p=third: change(v, r, p))
                with untouched(case.model), case.model.hooks([(name, edit)]):
                    ours = case.model(ids, attention_mask=mask)
                with untouched(case.model), case.model.hooks([(name, as_hook(lambda v: change(v, 0, 2)))]):
                    alone = case.model(ids[row : row + 1, where])
            assert deviation(ours[row, where], alone[0]) <= 2 * FP32 * alone.abs().max().item()
            assert deviation(ours[row, where], plain[row, where]) > 1e-3
            others = [r for r in range(3) if r != row]
            # Other tokens are untouched, but for the rounding of products whose groups of rows became other ones.
            assert deviation(ours[others], plain[others]) <= FP32 * plain.abs().max().item()
            assert deviation(ours[row, where][:2], plain[row, where][:2]) <= FP32 * plain.abs().max().item()


def words(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of a hundred words w3 … w100."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 101)}}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="</s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> HookedMoE:
    return HookedMoE.from_hf(build("deepseek"), words(tmp_path_factory.mktemp("words")))


@sides
def test_texts_of_different_lengths_equal_each_alone(speaking: HookedMoE, side: str) -> None:
    texts = ["w5 w9 w77 w12 w6 w30", "w44 w3", "w8 w9 w10"]
    with torch.no_grad():
        together, cache = speaking.run_with_cache(
            texts, padding_side=side, names_filter="blocks.2.hook_expert_out", prepend_bos=False
        )
        for row, text in enumerate(texts):
            alone, single = speaking.run_with_cache(text, names_filter="blocks.2.hook_expert_out", prepend_bos=False)
            length = alone.shape[1]
            assert length == len(text.split())
            where = slice(-length, None) if side == "left" else slice(0, length)
            assert deviation(together[row, where], alone[0]) <= FP32 * alone.abs().max().item()
            theirs, ours = single["expert_out", 2][0], cache["expert_out", 2][row, where]
            assert deviation(ours, theirs) <= FP32 * theirs.abs().max().item()


@families
def test_a_row_that_is_all_padding_has_no_part_in_anything(family: str) -> None:
    """Negative control: where the row is real, each of the values is another one."""
    case = wrapped(family)
    ids, others = case.tokens[[0, 1, 0]].clone(), [0, 2]
    ids[2] = ids[2].roll(1)
    mask = torch.ones_like(ids)
    mask[2, :3] = 0
    empty = mask.clone()
    empty[1] = 0

    def values(ids: Tensor, mask: Tensor) -> list[Tensor]:
        model, real = case.model, mask.bool()
        routing = model.routing(ids, attention_mask=mask)
        means = ExpertMeans.measure(model, {"input_ids": ids, "attention_mask": mask})
        with model.ablate(ranks=[0], how="mean", reference=means.filled()):
            ablated = model(ids, attention_mask=mask, return_type="loss")
        with model.ablate(ranks=[0], how="resample", fallback="mean", reference=means.filled()):
            resampled = model(ids, attention_mask=mask, return_type="loss")
        cache = DynamicCache()
        model(ids, attention_mask=mask, past_key_values=cache)
        longer = torch.cat([mask, mask[:, -1:].expand(-1, 2)], 1)
        later = model(ids[:, :2], attention_mask=longer, past_key_values=cache)
        return [
            model(ids, attention_mask=mask)[real].mean(),
            model(ids, attention_mask=mask, return_type="loss"),
            torch.tensor(routing.to_frame().weight.to_numpy()).sum(),
            means.counts.float(),
            ablated,
            resampled,
            later[real[:, -1]].mean(),
        ]

    with torch.no_grad(), untouched(case.model):
        expected = values(ids[others], mask[others])
        for found, right, control in zip(values(ids, empty), expected, values(ids, mask), strict=True):
            assert (found - right).abs().max() <= 1e-4 * (1 + right.abs().max())
            assert (control - right).abs().max() > 1e-4 * (1 + right.abs().max())
        assert not case.model(ids, attention_mask=empty).isnan().any()
        with pytest.raises(InputError, match="no token follows another"):
            case.model(ids, attention_mask=torch.zeros_like(ids), return_type="loss")
        with pytest.raises(InputError, match="row 1 of the prompt is all padding"):
            case.model.generate({"input_ids": ids, "attention_mask": empty})


# --- generation ---


def generate(model: HookedMoE, prompt: Tensor, cached: bool, count: int = 6) -> Tensor:
    with torch.no_grad():
        out = model.generate(
            prompt, max_new_tokens=count, do_sample=False, stop_at_eos=False, use_past_kv_cache=cached,
            verbose=False, return_type="tokens",
        )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


@families
def test_greedy_tokens_are_those_of_transformers_with_and_without_cache(family: str) -> None:
    case = wrapped(family)
    prompt = case.tokens[:1, :5]
    with torch.no_grad():
        theirs: Any = case.hf.generate(  # pyright: ignore[reportCallIssue]
            prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(prompt)
        )
    assert torch.equal(generate(case.model, prompt, cached=True), theirs)
    assert torch.equal(generate(case.model, prompt, cached=False), theirs)


@families
def test_during_generation_the_position_is_the_new_token(family: str) -> None:
    case = wrapped(family)
    prompt = case.tokens[:, :5]
    name, mid = names.mlp(names.EXPERT_OUT, case.last), names.block(names.RESID_MID, case.last)
    indices = names.mlp(names.EXPERT_INDICES, case.last)
    seen: dict[str, list[Tensor]] = {name: [], indices: [], mid: []}
    watch = [(n, lambda value, hook, n=n: seen[n].append(value.clone())) for n in seen]
    with untouched(case.model), case.model.hooks(watch):
        out = generate(case.model, prompt, cached=True)
    assert [value.shape[1] for value in seen[name]] == [5, 1, 1, 1, 1, 1]
    with torch.no_grad():
        _, cache = case.model.run_with_cache(out[:, :-1], names_filter=list(seen))
    for n, values in seen.items():
        whole = torch.cat(values, 1)
        if whole.is_floating_point():
            assert deviation(whole, cache[n]) <= 2 * FP32 * cache[n].abs().max().item(), n
        else:
            assert torch.equal(whole, cache[n])


@families
@pytest.mark.parametrize("hook", [names.EXPERT_WEIGHTED, names.ROUTER_LOGITS, names.EXPERT_INDICES, "hook_resid_mid"])
def test_an_edit_during_generation_is_the_edit_of_the_whole(family: str, hook: str) -> None:
    """Tokens chosen step by step with a cache are the argmax of one edited pass over all of them."""
    case = wrapped(family)
    layer = case.model.moe_layers[0]
    name = names.block(hook, layer) if "resid" in hook else names.mlp(hook, layer)

    def change(value: Tensor) -> Tensor:
        return (value + 3) % 8 if not value.is_floating_point() else value.flip(-1) * 1.5

    prompt = case.tokens[:, :5]
    with untouched(case.model), case.model.hooks([(name, as_hook(change))]):
        out = generate(case.model, prompt, cached=True)
        with torch.no_grad():
            logits = case.model(out[:, :-1])
        assert torch.equal(generate(case.model, prompt, cached=False), out)
    assert torch.equal(out[:, 5:], logits[:, 4:].argmax(-1))
    assert not torch.equal(out, generate(case.model, prompt, cached=True)), "the edit was felt"
