"""Which families are supported, and what differs between them: a table; what is not in it is refused.

A family is supported when its MoE block follows the contract of transformers 5: a router module that returns
`(logits, weights, indices)` after one linear product, and an experts module with packed parameters that is called as
`experts(hidden, indices, weights)`. What is not in the table is refused by name.
"""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from moe_lens.errors import CheckpointError, UnsupportedModelError
from moe_lens.model.families.family import Family, Layout, dotted
from moe_lens.model.families.refusals import refusal
from moe_lens.model.hf_compat import RELEASE

__all__ = ["FAMILIES", "Family", "Layout", "family_of"]

LLAMA = Layout()
"""Norm, attention, add; norm, MLP, add: what most families have."""
OFFSET = Layout(offset=True)
SANDWICH = Layout(ln1_post="post_attention_layernorm", ln2="pre_mlp_layernorm", ln2_post="post_mlp_layernorm")
GRANITE = Layout(
    mlp="block_sparse_moe",
    multiplier="residual_multiplier",
    embed_multiplier="embedding_multiplier",
    logits_divisor="logits_scaling",
)
STREAMS = Layout(stream="other", streams=True)
# DeepSeek-V3's rule: sigmoid, a bias and groups for the choice, then normalisation and a scale.
V3: dict[str, Any] = {
    "score": "sigmoid",
    "bias": True,
    "groups": 2,
    "normalised": "config",
    "scaled": "routed_scaling_factor",
}
V3_SHARED: dict[str, Any] = {**V3, "shared": "shared_experts", "layout": LLAMA}
QWEN: dict[str, Any] = {"shared": "shared_expert", "shared_gate": "shared_expert_gate"}
NARROW = (
    "experts compute in a narrower space: hook_expert_out, hook_expert_weighted and hook_routed_out are as wide as that"
)
MANY_STREAMS = "several residual streams, mixed again by every part: no hook_resid_*, hook_attn_out or hook_mlp_out"

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "afmoe",
            router="router",
            router_weight="gate.weight",
            shared="shared_experts",
            score="sigmoid",
            bias=True,
            normalised="always",
            scaled="route_scale",
            layout=SANDWICH,
        ),
        Family("aria_text", router="router", shared="shared_experts", normalised="always", layout=LLAMA, since=(5, 21)),
        Family(
            "axk1",
            **{**V3_SHARED, "layout": Layout(ln2_post="mlp.post_mlp_layernorm")},
            note="the MoE block ends with a norm: mlp.hook_out is its input, hook_mlp_out its output",
        ),
        Family("axk2", **V3_SHARED),
        Family("bailing_hybrid", **V3_SHARED),
        Family(
            "bailing_moe",
            shared="shared_experts",
            normalised="config",
            layout=LLAMA,
            note="Ling and Ring, first generation; W_U is normed where the checkpoint says so (norm_head)",
        ),
        Family(
            "bailing_moe_v2",
            **{**V3_SHARED, "normalised": "always"},
            note="Ling and Ring, second generation: on the hub, bailing_moe with another architecture",
        ),
        Family(
            "beam",
            score="sigmoid",
            bias=True,
            groups=2,
            normalised="config",
            scaled="routed_scaling_factor",
            scaled_after=True,
            layout=Layout(
                ln1_post="post_attention_layernorm",
                ln2="pre_feedforward_layernorm",
                ln2_post="post_feedforward_layernorm",
                stream="other",
            ),
            note="the residual stream is rescaled at every addition: no hook_resid_mid, hook_attn_out or hook_mlp_out",
            since=(5, 20, 1),
        ),
        Family(
            "cohere2_moe",
            shared="shared_experts",
            averaged="shared_expert_combination_strategy",
            score_field="expert_selection_fn",
            normalised="config",
            layout=Layout(ln2=None, stream="parallel", logits_multiplier="logit_scale"),
            note="attention and experts read the same norm and are added together: no hook_resid_mid",
        ),
        Family(
            "dbrx",
            router="router",
            router_weight="layer.weight",
            experts="dbrx",
            normalised="always",
            layout=Layout(
                decoder="transformer",
                layers="blocks",
                embed="wte",
                final_norm="norm_f",
                ln1="norm_attn_norm.norm_1",
                attn="norm_attn_norm.attn",
                ln2="norm_attn_norm.norm_2",
                mlp="ffn",
            ),
            note="weights are divided by their norm of order moe_normalize_expert_weights (by default 1: their sum)",
        ),
        Family("deepseek", shared="shared_experts", normalised="config"),
        # V2 rotates by complex numbers: there are no cosines and sines to hook.
        Family(
            "deepseek_v2",
            shared="shared_experts",
            groups=1,
            scaled="routed_scaling_factor",
            dead=(".hook_cos", ".hook_sin"),
        ),
        Family("deepseek_v3", shared="shared_experts", **V3),
        Family("deepseek_v32", **V3_SHARED),
        Family(
            "deepseek_v4",
            shared="shared_experts",
            score="sqrtsoftplus",
            score_field="scoring_func",
            bias=True,
            normalised="always",
            scaled="routed_scaling_factor",
            select="token",
            layout=STREAMS,
            note=MANY_STREAMS
            + "; the first layers select experts by the token's id: router logits only set their weights; texts in a "
            "batch are padded on the right: attention would read padding on the left",
            reads_front=True,
        ),
        Family("dots1", **V3_SHARED),
        Family("dots3_note_text", **V3_SHARED, since=(5, 23)),
        Family("ernie4_5_moe", shared="shared_experts", bias=True, normalised="always", layout=LLAMA),
        Family(
            "ernie4_5_vl_moe",
            shared="shared_experts",
            bias=True,
            normalised="always",
            layout=Layout(decoder="model.language_model", inner="text_moe"),
            note="multimodal: the text part is hooked, and in it the experts for text; images have experts of their "
            "own, and hooks on routing and experts raise an error for input with images",
        ),
        Family("exaone_moe", **V3_SHARED),
        Family(
            "flex_olmo",
            normalised="config",
            layout=Layout(
                ln1=None, ln1_post="post_attention_layernorm", ln2=None, ln2_post="post_feedforward_layernorm"
            ),
        ),
        Family("flint", shared="shared_expert", score="sigmoid", normalised="config", layout=LLAMA, since=(5, 21)),
        Family(
            "gemma4_text",
            router="router",
            router_weight="proj.weight",
            normalised="always",
            scaled="per_expert_scale",
            top_k="top_k_experts",
            reads_own=True,
            layout=Layout(
                mlp="experts",
                bare=True,
                ln1_post="post_attention_layernorm",
                ln2="pre_feedforward_layernorm",
                ln2_post="post_feedforward_layernorm",
                others=(
                    ("dense_mlp", "mlp"),
                    ("ln_dense", "post_feedforward_layernorm_1"),
                    ("ln_experts", "post_feedforward_layernorm_2"),
                ),
                stream="rescaled",
            ),
            note="experts run beside a dense MLP (dense_mlp); both outputs are normed (ln_experts, ln_dense), added "
            "and normed again (ln2_post), and the layer rescales its output: no hook_mlp_out or hook_shared_out; "
            "mlp.hook_in is what the experts read; the router reads the residual stream through a norm of its own",
        ),
        Family("glm4_moe", **V3_SHARED),
        Family("glm4_moe_lite", **V3_SHARED),
        Family("glm_moe_dsa", **V3_SHARED),
        # gpt-oss applies its softmax to the selected logits alone: the affinity of all, renormalised over the selected.
        Family("gpt_oss", router="router", interleaved=True, normalised="always"),
        Family("granitemoe", router="router", normalised="always", layout=GRANITE, since=(5, 21)),
        Family("granitemoe_swa", router="router", shared="shared_mlp", normalised="always", layout=GRANITE),
        Family(
            "granitemoehybrid", router="router", shared="shared_mlp", normalised="always", layout=GRANITE, since=(5, 21)
        ),
        Family(
            "granitemoeshared", router="router", shared="shared_mlp", normalised="always", layout=GRANITE, since=(5, 21)
        ),
        Family("hunyuan_v1_moe", router_weight="wg.weight", shared="shared_mlp", normalised="always", layout=LLAMA),
        Family(
            "hy_v3",
            shared="shared_experts",
            score="sigmoid",
            bias=True,
            normalised="always",
            scaled="router_scaling_factor",
            layout=LLAMA,
        ),
        Family("hy_v4", **{**V3_SHARED, "layout": STREAMS}, note=MANY_STREAMS),
        Family(
            "inkling_text",
            shared="shared_experts",
            score="sigmoid",
            bias=True,
            normalised="always",
            scaled="route_scale",
            shared_logits=True,
            layout=Layout(ln1_post="attn_sconv", ln2_post="mlp_sconv", logits_divisor="logits_mup_width_multiplier"),
            note="weights are normalised together with those of the shared experts; a short convolution follows the "
            "MoE block: mlp.hook_out is its input, hook_mlp_out its output",
        ),
        Family(
            "inkling2_text",
            score="sqrtsoftplus",
            score_field="scoring_func",
            bias=True,
            normalised="always",
            scaled="routed_scaling_factor",
            layout=Layout(
                ln1_post="post_attention_convolution",
                ln2_post="post_mlp_convolution",
                stream="other",
                streams=True,
            ),
            note="every part reads a mixture of earlier streams: no hook_resid_*, hook_attn_out or hook_mlp_out",
            since=(5, 23),
        ),
        Family(
            "jamba",
            router="router",
            layout=Layout(mlp="feed_forward", ln2="pre_ff_layernorm", final_norm="final_layernorm"),
            one_by_one=True,
            note="continues from a key-value cache one token at a time",
            since=(5, 21),
        ),
        Family(
            "jetmoe",
            router="router",
            router_weight="layer.weight",
            experts="jetmoe",
            normalised="always",
            constant="bias",
            resident=("self_attention.experts",),
            layout=Layout(attn="self_attention"),
            note="the MoE block adds a bias at its end: hook_shared_out is that constant, and there are no shared "
            "experts; attention has experts too, which have no hooks",
        ),
        Family("kimi_linear", **V3_SHARED),
        Family(
            "kolibri1",
            shared="shared_experts",
            score="sigmoid",
            bias=True,
            normalised="config",
            layout=Layout(ln1_post="post_self_attn_layernorm", ln2_post="post_mlp_layernorm"),
        ),
        Family(
            "laguna",
            shared="shared_experts",
            score="sigmoid",
            bias=True,
            normalised="always",
            scaled="routed_scaling_factor",
            scaled_after=True,
            logits_factor="router_logit_softcapping",
            layout=LLAMA,
        ),
        Family("lara_mini", shared="shared_expert", normalised="config", layout=LLAMA, since=(5, 24)),
        Family(
            "lfm2_moe",
            score="sigmoid",
            bias=True,
            normalised="config",
            scaled="routed_scaling_factor",
            layout=Layout(mlp="feed_forward", ln1="operator_norm", ln2="ffn_norm", final_norm="embedding_norm"),
        ),
        Family(
            "llama4_text",
            router="router",
            shared="shared_expert",
            score="sigmoid",
            experts="llama4",
            weighs_input=True,
            resident=("embed_tokens",),
            layout=Layout(mlp="feed_forward"),
            note="weights multiply what an expert reads: hook_expert_out is E(g x), and hook_expert_weighted equals it",
        ),
        Family(
            "longcat_flash",
            router="router",
            router_weight="classifier.weight",
            experts="longcat",
            resident=("router.classifier",),
            bias=True,
            scaled="routed_scaling_factor",
            layout=Layout(
                attn="self_attn.0",
                ln1="input_layernorm.0",
                ln2="post_attention_layernorm.0",
                others=(
                    ("dense", "mlps.0"),
                    ("ln1_second", "input_layernorm.1"),
                    ("attn_second", "self_attn.1"),
                    ("ln2_second", "post_attention_layernorm.1"),
                    ("dense_second", "mlps.1"),
                ),
                added=("dense", "attn_second", "dense_second"),
                stream="shortcut",
            ),
            note="the last ids are identity experts, n_identity_experts of n_experts: they return their input, and "
            "their neurons are shown as zeros; a layer has two attentions and two dense MLPs (attn, dense, "
            "attn_second, dense_second), and its experts' output is added after them: no hook_resid_mid, "
            "hook_attn_out or hook_mlp_out",
        ),
        Family("mellum", normalised="config", layout=LLAMA),
        Family("mimo_v2_flash", **V3, layout=LLAMA),
        Family(
            "minimax",
            normalised="always",
            layout=Layout(stream="other"),
            note="the residual stream itself is normed: no hook_resid_mid, hook_attn_out or hook_mlp_out",
        ),
        Family("minimax_m2", score="sigmoid", bias=True, normalised="always", layout=LLAMA),
        Family(
            "minimax_m3_vl_text",
            shared="shared_experts",
            score="sigmoid",
            bias=True,
            normalised="always",
            scaled="routed_scaling_factor",
            scaled_after=True,
            layout=OFFSET,
        ),
        Family(
            "mistral4",
            shared="shared_experts",
            groups=2,
            normalised="config",
            scaled="routed_scaling_factor",
            layout=LLAMA,
        ),
        Family("mixtral", normalised="always"),
        Family(
            "muse_spark",
            score="sigmoid",
            bias=True,
            normalised="always",
            scaled="routed_scaling_factor",
            logits_factor="output_multiplier",
            narrows=("pre_expert_proj", "pre_expert_norm"),
            widens="post_expert_proj",
            layout=Layout(
                decoder="model.language_model",
                ln1_post="post_attention_layernorm",
                ln2="pre_feedforward_layernorm",
                ln2_post="post_feedforward_layernorm",
                logits_multiplier="output_multiplier",
                offset=True,
                stream="other",
            ),
            note=f"multimodal: the text part is hooked; {NARROW}; what a layer adds is mixed into the stream by "
            "learned gates: no hook_resid_mid, hook_attn_out or hook_mlp_out",
        ),
        Family(
            "nemotron_h",
            **V3,
            shared="shared_experts",
            layout=Layout(mlp="mixer", embed="embeddings", ln1="norm", ln2="norm", final_norm="norm_f"),
            narrows=("fc1_latent_proj",),
            widens="fc2_latent_proj",
            narrow_field="moe_latent_size",
            note="a layer either mixes positions or is an MLP; only MoE layers have hook_resid_mid and hook_mlp_out; "
            f"with moe_latent_size, {NARROW}",
        ),
        Family("olmoe", normalised="config"),
        Family(
            "phimoe",
            router="router",
            select="sparsemixer",
            layout=LLAMA,
            note="experts are chosen one after the other; each weight is a softmax over the logits close to the "
            "largest remaining one, and a forced expert counts as close",
        ),
        Family("qwen2_moe", **QWEN, normalised="config"),
        Family("qwen3_5_moe_text", **QWEN, normalised="always", layout=OFFSET),
        Family("qwen3_moe", normalised="config"),
        Family("qwen3_next", **QWEN, normalised="config", layout=OFFSET),
        Family(
            "qwen4_exp_text",
            **QWEN,
            normalised="config",
            layout=Layout(
                stream="other", streams=True, offset=True, ln1=None, ln2=None, final_norm="hyper_connection_mixer"
            ),
            note=MANY_STREAMS,
        ),
        Family("solar_open", **V3_SHARED),
        Family(
            "step3p7",
            shared="shared_experts",
            score="sigmoid",
            experts="looped",
            bias=True,
            normalised="always",
            scaled="routed_scaling_factor",
            scaled_after=True,
            layout=Layout(decoder="model.language_model", offset=True),
            note="multimodal: the text part is hooked",
        ),
    )
}


def _multimodal(
    model_type: str, text: str, inside: str = "model.language_model", head: str = "lm_head", **changes: Any
) -> Family:
    """A model type whose text part, at the path `inside`, is that of another family."""
    family = FAMILIES[text]
    layout = replace(family.layout or LLAMA, decoder=inside, head=head)
    note = "; ".join(part for part in ("multimodal: the text part is hooked", family.note) if part)
    return replace(family, model_type=model_type, layout=layout, dead=(), note=note, **changes)


FAMILIES |= {
    family.model_type: family
    for family in (
        _multimodal("aria", "aria_text"),
        _multimodal("deepseek_ocr2", "deepseek_v2"),
        _multimodal("gemma4", "gemma4_text"),
        _multimodal("glm4v_moe", "glm4_moe"),
        _multimodal("glm5_next", "hy_v4"),
        _multimodal("hy_v4_vl", "hy_v4", since=(5, 24)),
        _multimodal("inkling2", "inkling2_text"),
        _multimodal("inkling_mm_model", "inkling_text"),
        _multimodal("kimi_k25", "deepseek_v3"),
        # On 5.24 transformers fails in its own forward, which asks its text model for images.
        _multimodal(
            "llama4",
            "llama4_text",
            inside="language_model.model",
            head="language_model.lm_head",
            until=(5, 24),
        ),
        _multimodal("minimax_m3_vl", "minimax_m3_vl_text"),
        _multimodal("mistral_large4", "mistral4", normalised="always", since=(5, 22)),
        _multimodal("qwen3_5_moe", "qwen3_5_moe_text"),
        _multimodal("qwen3_vl_moe", "qwen3_moe", normalised="always"),
        _multimodal("qwen4_exp", "qwen4_exp_text"),
        _multimodal("unlimited_ocr", "deepseek_v2"),
    )
}


# They make the mask without positions, or have a state that runs on: convolutions, recurrences, compressed keys.
_MIX_PACKED = (
    "afmoe",
    "bailing_hybrid",
    "deepseek_v4",
    "ernie4_5_vl_moe",
    "glm4v_moe",
    "glm5_next",
    "gpt_oss",
    "granitemoehybrid",
    "inkling2",
    "inkling2_text",
    "inkling_mm_model",
    "inkling_text",
    "jamba",
    "kimi_linear",
    "lfm2_moe",
    "minimax",
    "nemotron_h",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
    "qwen4_exp",
    "qwen4_exp_text",
)
FAMILIES |= {name: replace(FAMILIES[name], mixes_packed=True) for name in _MIX_PACKED}


def here(release: tuple[int, ...] = RELEASE) -> list[str]:
    """The model types that are supported on a release of transformers, the installed one if none is given."""
    return sorted(name for name, family in FAMILIES.items() if family.holds_on(release))


def check_release(model_type: str) -> None:
    """Refuse a family where the installed transformers is too old or too new for it; other model types pass.

    Raises:
        UnsupportedModelError: with the releases that will do.
    """
    family = FAMILIES.get(model_type)
    if family is not None and not family.holds_on(RELEASE):
        raise UnsupportedModelError(
            f"model_type {model_type!r} needs {family.releases()}, and {dotted(RELEASE)} is installed: "
            f"pip install 'transformers{family.specifier()}'"
        )


def family_of(config: PretrainedConfig) -> Family:
    """The family of a transformers config.

    Raises:
        UnsupportedModelError: its model type is not in the table, or needs another transformers, or a field of it says
            what is not known.
        CheckpointError: its experts cannot stand in the groups that it says.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(refusal(str(model_type), here()))
    check_release(model_type)
    family, text = FAMILIES[model_type], config.get_text_config()
    _check_groups(text, family)
    if family.narrow_field is not None and getattr(text, family.narrow_field) is None:
        family = replace(family, narrows=(), widens=None)
    if family.score_field is None:
        return family
    score = getattr(text, family.score_field)
    if score not in ("softmax", "sigmoid", "sqrtsoftplus"):
        raise UnsupportedModelError(
            f"{family.score_field} of this {model_type} is {score!r}; expected softmax, sigmoid or sqrtsoftplus"
        )
    return replace(family, score=score)


def _check_groups(text: PretrainedConfig, family: Family) -> None:
    """Refuse groups that experts cannot stand in: transformers' router would reshape those of one token into the next.

    And those that hold fewer experts than a token takes: it would take some that are masked out.

    Raises:
        CheckpointError: There are no such groups.
    """
    groups, chosen = getattr(text, "n_group", None), getattr(text, "topk_group", None)
    counts = (getattr(text, name, None) for name in ("n_routed_experts", "num_experts", "num_local_experts"))
    n_experts = next((count for count in counts if isinstance(count, int)), None)
    if not isinstance(groups, int) or n_experts is None or getattr(text, "topk_method", None) == "greedy":
        return  # greedy has no groups, whatever is said of them
    if groups < 1 or n_experts % groups:
        raise CheckpointError(f"n_group is {groups}, and {n_experts} experts cannot stand in so many groups")
    if not isinstance(chosen, int):
        return
    if chosen > groups:
        raise CheckpointError(f"topk_group is {chosen}, and there are {groups} groups (n_group)")
    taken = getattr(text, "num_experts_per_tok", None)
    if family.groups and isinstance(taken, int) and taken > (allowed := chosen * n_experts // groups):
        raise CheckpointError(
            f"num_experts_per_tok is {taken}, and a token may choose among {allowed} experts: those of {chosen} groups "
            f"(topk_group) of {n_experts // groups}"
        )
