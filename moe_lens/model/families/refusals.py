"""Model types with experts that are refused, and why: what a hook would show there would not be true."""

from collections.abc import Iterable

NO_TABLE = "its multimodal wrapper is not in the table: wrap its text model"
LOOPED = (
    "it runs some of its layers several times in one forward pass, and the hook table has one place for a layer: what "
    "is cached or counted there would be from the last pass only"
)
ENCODER = "it has an encoder and a decoder; only decoder-only models are wrapped"

REFUSED = {
    "diffusion_gemma": "it denoises blocks of text instead of predicting the next token",
    "doge": "its experts are rows of an embedding, retrieved by product keys: they have no matrices",
    "dots3_note": "its image encoder has experts of its own; load its text model, dots3_note_text",
    "inkling2_loop": LOOPED,
    "inkling2_loop_text": LOOPED,
    "nemo_speechlm": f"{NO_TABLE}, nemotron_h",
    "nemotron_h_omni": f"{NO_TABLE}, nemotron_h",
    "nllb-moe": ENCODER,
    "openai_privacy_filter": "it labels tokens instead of predicting the next one",
    "qwen3_omni_moe": "it is several models, one for text and one for speech, each with experts",
    "qwen3_omni_moe_thinker": "with a key-value cache it computes positions of the whole text for the one new token, "
    "unless they are passed: generation would fail",
    "switch_transformers": ENCODER,
    "zaya": "its router can skip the experts, and passes a state from layer to layer: the hook table has no place for "
    "either",
}

ABSENT = {
    "arctic": "Snowflake Arctic",
    "grok-1": "Grok-1",
    "minimax_m1": "MiniMax-M1",
    "minimax_text_01": "MiniMax-Text-01",
    "pangu_ultra_moe": "openPangu Ultra",
    "PanguProMoE": "Pangu Pro",
    "step3_text": "Step 3",
}
"""Model types with experts that people use and that transformers has no code for. Code that comes with a checkpoint is
no way in: what is hooked has to be known, and such code is written for other releases."""


def refusal(model_type: str, supported: Iterable[str]) -> str:
    """What a user is told of a model type that is not in the table: why, what to do, and what works."""
    why = REFUSED.get(model_type)
    return (
        f"model_type {model_type!r} is not supported"
        + (f": {why}. " if why else ". A model without experts belongs in TransformerLens's TransformerBridge. ")
        + f"Supported, and explained by `moe-lens models`: {', '.join(sorted(supported))}"
    )
