"""A run starts at a layer where the residual stream is all that the layers from there on read, and nowhere else."""

from typing import Any

import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.interventions.sweep import CleanRun
from moe_lens.model.hooks import block_replay, forward, to_tokens
from tests.matrix.configs import build, tokens


def apart(model: Any, ids: torch.Tensor, layer: int) -> float:
    """How far logits of a run that starts at a layer are from those of the whole run."""
    with torch.no_grad():
        return (model(model(ids, stop_at_layer=layer), start_at_layer=layer) - model(ids)).abs().max().item()


@pytest.mark.typed
@pytest.mark.parametrize("family", ["glm_moe_dsa", "mistral_large4"])
def test_what_an_earlier_layer_selected_is_not_there(family: str, monkeypatch: Any) -> None:
    """Layers 2 and 3 attend to the 4 tokens that layer 1 has selected; up to 4 tokens, these are all."""
    layers = ["full", "full", "shared", "shared"]
    model = HookedMoE.from_hf(build(family, indexer_types=layers, index_topk=4), check=False)
    short, long = tokens(2, 4), tokens(2, 9)
    assert [apart(model, short, layer) for layer in range(4)] == [0, 0, 0, 0]
    assert [apart(model, long, layer) for layer in range(2)] == [0, 0]
    CleanRun.of(model, short)
    with pytest.raises(InputError, match="the 4 tokens that an earlier layer has selected.*got 9 tokens.*at most 4"):
        apart(model, long, 2)
    with pytest.raises(InputError, match="layer 2 attends to the 4 tokens"):
        CleanRun.of(model, long)
    monkeypatch.setattr(forward, "check_start", lambda *_: None)
    assert apart(model, long, 2) > 0.1, "negative control: it lacks them"


@pytest.mark.typed
def test_there_is_no_start_between_layers_that_read_more_than_one_stream(monkeypatch: Any) -> None:
    model, ids = HookedMoE.from_hf(build("inkling2_text"), check=False), tokens(2, 9)
    for call in (lambda: apart(model, ids, 1), lambda: CleanRun.of(model, ids)):
        with pytest.raises(UnsupportedModelError, match="layers of inkling2_text read several streams, or earlier"):
            call()
    monkeypatch.setattr(to_tokens, "check_one_stream", lambda _: None)
    assert apart(model, ids, 1) > 0.1, "negative control: the newest stream alone is not what a layer reads"


def test_keys_values_and_ids_that_later_layers_read_are_not_there(monkeypatch: Any) -> None:
    """Gemma 4, where layers 2 and 3 share keys and values of 0 and 1, and all read the ids."""
    layers = ["sliding_attention", "full_attention"] * 2
    shape = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "layer_types": layers}
    model, ids = HookedMoE.from_hf(build("gemma4_text", **shape), check=False), tokens(2, 9)
    assert apart(model, ids, 0) == 0
    with pytest.raises(InputError, match=r"layer 1 reads the token ids.*a hook on blocks.1.hook_resid_pre"):
        apart(model, ids, 1)
    with pytest.raises(UnsupportedModelError, match="layer 2 attends with keys and values of an earlier layer"):
        CleanRun.of(model, ids)
    monkeypatch.setattr(block_replay, "check_reads", lambda *_: None)
    run, rows = CleanRun.of(model, ids), torch.arange(2)
    with torch.no_grad():
        run.replay.block(0, run.stream(0, rows).flip(0), rows)
        again = run.replay.block(2, run.stream(2, rows), rows)
    assert (again - run.stream(3, rows)).abs().max() > 0.1, "negative control: it has those of another run"
