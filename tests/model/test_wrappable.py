"""What `from_hf` is given: something else than a language model is refused with what to do; odd states are kept."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    MixtralModel,
    Qwen3NextForSequenceClassification,
    Qwen3NextModel,
)

from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from tests.matrix.configs import build, config, tokens


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("olmoe", "got str. HookedMoE.from_pretrained loads a model by its name or folder"),
        (None, "got NoneType"),
        (nn.Linear(2, 2), "got Linear. HookedMoE.from_pretrained"),
    ],
)
def test_what_is_no_model_is_refused(given: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"expected a causal language model of transformers, {said}"):
        HookedMoE.from_hf(given)


@pytest.mark.untyped
@pytest.mark.parametrize("around", [lambda hf: torch.compile(hf, backend="eager"), nn.DataParallel, nn.Sequential])
def test_a_model_inside_another_module_is_refused_with_the_way_in(around: Any) -> None:
    hf = build("mixtral")
    with pytest.raises(
        InputError, match=r"got \w+ around a MixtralForCausalLM: pass that one itself.*_orig_mod.*merge_and_unload"
    ):
        HookedMoE.from_hf(around(hf))
    assert HookedMoE.from_hf(hf).top_k == 3, "nothing was wrapped yet"


@pytest.mark.parametrize(
    ("cls", "model_type"),
    [
        (MixtralModel, "mixtral"),  # by TransformerLens's adapter
        (MixtralForSequenceClassification, "mixtral"),
        (Qwen3NextModel, "qwen3_next"),  # by ours
        (Qwen3NextForSequenceClassification, "qwen3_next"),
    ],
)
def test_a_model_without_an_unembedding_is_refused(cls: Any, model_type: str) -> None:
    hf = cls(config(model_type))
    with pytest.raises(UnsupportedModelError, match=rf"{cls.__name__} does not predict tokens.*AutoModelForCausalLM"):
        HookedMoE.from_hf(hf)


@pytest.mark.untyped
def test_a_model_is_wrapped_once() -> None:
    hf: Any = build("mixtral")
    hooked: Any = HookedMoE.from_hf(hf)
    for again in (hf, hooked):
        with pytest.raises(UnsupportedModelError, match="already wrapped"):
            HookedMoE.from_hf(again)


def test_a_dense_model_belongs_elsewhere() -> None:
    dense = LlamaConfig(
        vocab_size=101, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match="'llama' is not supported. .* TransformerLens's TransformerBridge"):
        HookedMoE.from_hf(LlamaForCausalLM(dense))


@pytest.mark.untyped
def test_a_tokenizer_by_its_name_is_refused() -> None:
    with pytest.raises(InputError, match="expected a tokenizer of transformers, as AutoTokenizer.* got str"):
        HookedMoE.from_hf(build("mixtral"), "gpt2")  # pyright: ignore[reportArgumentType]


def test_a_model_without_a_tokenizer_reads_tokens_and_says_what_text_needs() -> None:
    hooked = HookedMoE.from_hf(build("mixtral"), check=False)
    assert hooked(tokens()).shape == (2, 12, 101)
    with pytest.raises(InputError, match=r"has no tokenizer.*pass token ids.*from_hf\(model, tokenizer\)"):
        hooked("text")


@pytest.mark.parametrize("model_type", ["olmoe", "phimoe"])
def test_a_model_in_training_mode_stays_there_and_its_dropout_is_no_reason_to_refuse_it(model_type: str) -> None:
    hf: Any = build(model_type, attention_dropout=0.5).train()
    hooked = HookedMoE.from_hf(hf)
    assert hooked.training and all(module.training for module in hf.modules())
    with torch.no_grad():
        assert not torch.equal(hooked(tokens()), hooked(tokens())), "dropout is still there"


def test_gradient_checkpointing_gives_the_same_gradients_and_hooks_fire() -> None:
    plain, saving = build("mixtral").train(), build("mixtral").train()
    saving.activation_checkpointing_enable()
    seen = []
    found = []
    for hf in (plain, saving):
        hooked = HookedMoE.from_hf(hf)
        with hooked.hooks(fwd_hooks=[("blocks.2.hook_expert_out", lambda value, hook: seen.append(value.shape))]):
            hooked(tokens(), return_type="loss").backward()
        found.append({name: parameter.grad for name, parameter in hf.named_parameters()})
    assert len(seen) >= 2
    assert all(torch.allclose(found[0][name], grad, atol=1e-6) for name, grad in found[1].items() if grad is not None)


def test_a_model_on_the_meta_device_is_wrapped_unchecked() -> None:
    with torch.device("meta"):
        hf = MixtralForCausalLM._from_config(config("mixtral"))
    hooked = HookedMoE.from_hf(hf)
    assert (hooked.moe_layers, hooked.n_experts) == ((0, 1, 2, 3), 8)
    assert hooked.W_out[2].is_meta and hooked.W_out[2].shape == (8, 56, 40)
