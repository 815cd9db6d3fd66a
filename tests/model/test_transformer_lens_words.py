"""TransformerLens's words: done as they mean, or answered by what to write; its hook names are answered by ours."""

import copy
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

from moe_lens import HookedMoE
from moe_lens.errors import HookError, InputError, UnsupportedModelError
from moe_lens.lenses import LogitLens
from moe_lens.model.families.table import FAMILIES
from moe_lens.model.loading.pretrained import load_pretrained
from moe_lens.model.loading.transformer_lens_words import PROCESSING
from moe_lens.model.unknown_hooks import instead_of
from tests.matrix.configs import build
from tests.wrapped import wrapped

EMBEDDED = "tiny-deepseekmoe"
OFF = dict.fromkeys(PROCESSING, False)
TOKENS = torch.tensor([[0, 5, 6, 7]])


# --- loading ---


@pytest.mark.typed
def test_loading_words_do_what_they_mean() -> None:
    plain = HookedMoE.from_pretrained(EMBEDDED, check=False)
    words: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "n_devices": 1, "move_to_device": True, **OFF}
    words |= {"default_prepend_bos": False, "default_padding_side": "left", "tokenizer": plain.tokenizer}
    model = HookedMoE.from_pretrained_no_processing(EMBEDDED, check=False, **words)
    assert (model.cfg.dtype, model.W_out[3].device.type) == (torch.float32, "cpu")
    assert model.tokenizer is plain.tokenizer or model.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    tokens, long = model.to_tokens(["a b c d", "b"]), model.to_tokens("a b c d")
    assert torch.equal(tokens[:1], long) and tokens[1, 0] == model.tokenizer.pad_token_id
    assert torch.equal(plain.to_tokens("a b c d")[:, 1:], long), "BOS is the difference"
    assert model.tokenizer.padding_side == "right", "the tokenizer is left as it was"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"device": "gpu"}, "device is 'gpu'; expected one such as 'cpu'"),
    ({"device": "cpu", "device_map": "auto"}, "expected one of them"),
    ({"n_devices": 2}, 'device_map="auto"'),
    ({"move_to_device": False}, 'device="cpu"'),
    ({"hf_model": 3}, r"HookedMoE\.from_hf\(hf_model, tokenizer\)"),
    ({"n_ctx": 8}, "max_position_embeddings"),
    ({"checkpoint_index": 3}, "revision="),
    ({"load_weights": False}, "from_config"),
    ({"default_padding_side": "up"}, "'left' or 'right'"),
    ({"default_prepend_bos": "yes"}, "True or False"),
    ({"nonsense": 3}, "no argument 'nonsense'"),
]


@pytest.mark.parametrize(("words", "match"), REFUSED)
def test_loading_words_that_have_another_name_say_it(words: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        HookedMoE.from_pretrained(EMBEDDED, check=False, **words)


def test_a_bos_that_there_is_not_cannot_be_the_default(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)  # without a tokenizer
    with pytest.raises(InputError, match="default_prepend_bos=True, and there is no tokenizer with a BOS token"):
        HookedMoE.from_pretrained(tmp_path, default_prepend_bos=True)
    assert HookedMoE.from_pretrained(tmp_path, default_prepend_bos=False).tokenizer is None
    assert HookedMoE.from_pretrained(EMBEDDED, default_prepend_bos=True).to_tokens("a")[0, 0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_said() -> None:
    with pytest.raises(InputError, match="finds no CUDA device"):
        HookedMoE.from_pretrained(EMBEDDED, device="cuda")


@pytest.mark.typed
@pytest.mark.parametrize("word", PROCESSING)
def test_processing_is_refused_at_loading(word: str) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        HookedMoE.from_pretrained(EMBEDDED, **cast(Any, {word: True}))
    with pytest.raises(InputError, match=r"HookedMoE\.from_pretrained"):
        HookedMoE.boot_transformers(EMBEDDED)
    for argument in (None, EMBEDDED, build("olmoe")):
        with pytest.raises(InputError, match=r"HookedMoE.from_hf\(model, tokenizer\)"):
            HookedMoE(argument)


# --- compatibility mode ---


@pytest.mark.typed
def test_no_processing_is_no_processing() -> None:
    model = wrapped("deepseek").model
    before, hooks = model(TOKENS), list(model.hook_dict)
    model.enable_compatibility_mode(no_processing=True)
    model.enable_compatibility_mode(True, **OFF)
    model.process_weights(**OFF)
    assert torch.equal(model(TOKENS), before) and list(model.hook_dict) == hooks
    for real in ({}, {"no_processing": False}, {**OFF, "fold_ln": True}, {"fold_ln": False}):
        with pytest.raises(UnsupportedModelError, match="model's own"):
            model.enable_compatibility_mode(**real)
    with pytest.raises(UnsupportedModelError, match="fold_ln"):
        model.process_weights()
    with pytest.raises(InputError, match="did you mean 'fold_ln'"):
        model.enable_compatibility_mode(fold_lm=False)


def plain_bridge(hf: Any, tokenizer: Any = None) -> Any:
    config = build_bridge_config_from_hf(hf.config, type(hf).__name__, "tiny", torch.float32)
    return TransformerBridge(hf, ArchitectureAdapterFactory.select_architecture_adapter(config), tokenizer)


@pytest.mark.typed
def test_a_plain_bridge_refuses_to_process_deepseek() -> None:
    bridge = plain_bridge(*load_pretrained(EMBEDDED, dtype=torch.float32))
    before = bridge(TOKENS)
    for process in (bridge.enable_compatibility_mode, bridge.process_weights):
        with pytest.raises(UnsupportedModelError, match="fold_ln"):
            process()
        bridge._weights_processed = False  # TransformerLens's mark, which it sets before it begins
    assert torch.equal(bridge(TOKENS), before)
    bridge.enable_compatibility_mode(no_processing=True)
    assert torch.equal(bridge(TOKENS), before)


# --- hooks that stay ---


@torch.no_grad()
def test_a_hook_that_stays_has_the_level_of_its_context_as_in_transformer_lens() -> None:
    """Added at level 1, at level 2, and by `add_hook`, which has none; a context and a copy leave all three alone."""
    fired: dict[str, list[list[str]]] = {"ours": [], "theirs": []}
    seen: list[str] = []

    def run(model: Any, of: str) -> None:
        seen.clear()
        model(TOKENS)
        fired[of].append(sorted(seen))

    def note(what: str) -> tuple[str, Any]:
        return "hook_embed", lambda value, hook: seen.append(what)

    for of, model in (("ours", wrapped("mixtral").model), ("theirs", plain_bridge(build("mixtral")))):
        model.add_hook(*note("added"))
        with model.hooks([note("outer")], reset_hooks_end=False):
            model.run_with_hooks(TOKENS, fwd_hooks=[note("inner")], reset_hooks_end=False)
        with model.hooks([note("gone")]):
            pass
        run(model, of)
        if of == "ours":
            copied = copy.deepcopy(model)
            copied.reset_hooks(level=2)
            run(copied, of)
            assert fired[of].pop() == ["added", "outer"]
        for level in (3, 1, 2, None):
            model.reset_hooks(level=level)
            run(model, of)
    expected = [["added", "inner", "outer"], ["added", "inner", "outer"], ["added", "inner"], ["added"], []]
    assert fired["ours"] == fired["theirs"] == expected


# --- hooks that are not there ---

UNKNOWN = {
    "blocks.2.mlp.hook_expert_weights": "here it is blocks.2.mlp.hook_routing_weights",
    "blocks.2.hook_expert_weights": "here it is blocks.2.mlp.hook_routing_weights",
    "blocks.2.mlp.hook_router_scores": "here it is blocks.2.mlp.hook_router_logits.*hook_routing_weights after",
    "blocks.2.mlp.gate.hook_out": "here it is blocks.2.mlp.hook_router_logits",
    "blocks.2.mlp.gate.hook_in": "here it is blocks.2.mlp.hook_in",
    "blocks.2.mlp.hook_post": "here it is blocks.2.mlp.hook_expert_post",
    "blocks.2.mlp.hook_pre": "here it is blocks.2.mlp.hook_expert_pre,",
    "blocks.2.mlp.hook_pre_linear": "here it is blocks.2.mlp.hook_expert_pre_linear",
    "blocks.2.mlp.experts.hook_out": "here it is blocks.2.mlp.hook_routed_out",
    "blocks.2.mlp.experts.5.hook_gate": "here it is blocks.2.mlp.experts.5.hook_pre",
    "blocks.2.mlp.experts.5.hook_outt": "did you mean 'blocks.2.mlp.experts.5.hook_out'",
    "blocks.2.mlp.hook_expert_outt": "did you mean 'blocks.2.mlp.hook_expert_out'",
    "blocks.2.hook_resid_prre": "did you mean 'blocks.2.hook_resid_pre'",
    "hook_embd": "did you mean 'hook_embed'",
    "hook_expert_out": r"blocks\.\{layer\}\.hook_expert_out",
    "expert_out": r"blocks\.\{layer\}\.hook_expert_out",
    "blocks.99.hook_resid_pre": "the model has layers 0 to",
    "blocks.0.mlp.hook_expert_weights": "layer 0 has no experts",
    "hook_pos_embed": "never fires",
    "something else": "model.hook_dict lists",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_hook_is_answered_by_ours(name: str) -> None:
    model, match = wrapped("deepseek").model, UNKNOWN[name]
    for ask in (
        lambda: model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda value, hook: value)]),
        lambda: model.add_hook(name, lambda value, hook: value),
        lambda: model.run_with_cache(TOKENS, names_filter=name),
        lambda: model.run_with_cache(TOKENS, names_filter=[name]),
    ):
        with pytest.raises(HookError, match=match):
            ask()


def test_a_hook_that_a_family_lacks_is_answered_by_the_reason() -> None:
    """A name that is nearly the same holds something else."""
    model = HookedMoE.from_hf(build("cohere2_moe"))
    _, cache = model.run_with_cache(TOKENS, names_filter="blocks.1.hook_resid_pre")
    why = "of this family: attention and experts read the same norm and are added together: no hook_resid_mid$"
    with pytest.raises(HookError, match=why):
        cache["resid_mid", 1]
    with pytest.raises(HookError, match=why):
        model.run_with_cache(TOKENS, names_filter=LogitLens(model).hooks())
    with pytest.raises(HookError, match=r"did you mean 'blocks\.1\.hook_resid_pre'"):
        cache["resid_prre", 1]
    why = "of this family: several residual streams.*no hook_resid_"
    known = ["blocks.0.mlp.hook_shared_out"]
    assert re.match(why, instead_of("blocks.0.hook_resid_post", known, [0], FAMILIES["hy_v4"].note))
    hybrid = HookedMoE.from_hf(build("nemotron_h"))
    _, cache = hybrid.run_with_cache(TOKENS)
    with pytest.raises(HookError, match="layer 2 has no hook_attn_out.*decompose_experts"):
        cache.decompose_resid()
    parts = cache.decompose_experts(return_labels=False)
    assert torch.allclose(parts.sum(0), cache["resid_post", 3], atol=1e-4)


def test_a_cache_answers_alike() -> None:
    model = wrapped("deepseek").model
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: ".experts." not in name)
    keys: list[tuple[Any, str]] = [
        (("expert_weights", 2), "here it is blocks.2.mlp.hook_routing_weights"),
        (("post", 2), "here it is blocks.2.mlp.hook_expert_post"),
        (("expert_outt", 2), "did you mean 'blocks.2.hook_expert_out'"),
        ("blocks.2.mlp.hook_expert_outt", "did you mean 'blocks.2.mlp.hook_expert_out'"),
        ("blocks.2.mlp.experts.5.hook_out", r"run_with_cache\(…, names_filter=\['blocks.2.mlp.experts.5.hook_out'\]"),
    ]
    for key, match in keys:
        with pytest.raises(HookError, match=match):
            cache[key]
    assert cache["expert_out", 2].shape[2] == model.top_k, "negative control: what is there is found"
