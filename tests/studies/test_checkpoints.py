"""Two checkpoints: the same one twice, one whose routers alone differ, and one whose experts alone do."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.cli import main
from moe_lens.data import Reading
from moe_lens.errors import InputError
from moe_lens.interventions.router_swap import swapped_routers
from moe_lens.model.loading.tokenizer import load_tokenizer
from moe_lens.studies import Checkpoints, StudyResult, run
from tests.families import build
from tests.matrix import configs
from tests.studies.tiny import TOKENIZER, domain, save_checkpoint, tiny_hf, tiny_model, write_jsonl

READING = Reading(tokens=None, context=48)


def v3() -> HookedMoE:
    """Routers that have a bias beside their weight."""
    hf = build("deepseek_v3", vocab_size=4096, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return HookedMoE.from_hf(hf, load_tokenizer(str(TOKENIZER))).requires_grad_(False)


@torch.no_grad()
def perturbed(model: HookedMoE, part: str) -> HookedMoE:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.original_model.named_parameters():
        if part in name:
            parameter.add_(parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


def study(model: HookedMoE, other: HookedMoE) -> StudyResult:
    return run(Checkpoints(other), model, [domain("a", n=12)], reading=READING)


def tables(model: HookedMoE, other: HookedMoE) -> tuple[Any, Any]:
    found = study(model, other).tables
    return found["overlap"].set_index(["pair", "layer"]), found["losses"].set_index("run")


@pytest.mark.parametrize("make", [tiny_model, v3])
def test_a_checkpoint_is_itself_and_routers_that_are_the_same_change_nothing(make):
    overlap, losses = tables(make(), make())
    assert (overlap[["overlap", "low", "high", "top1", "top1_low"]] == 1).all(axis=None)
    assert (losses[["added", "low", "high"]] == 0).all(axis=None) and (overlap["by_load"] < 1).all()


def test_windows_are_within_the_context_of_both():
    """In both orders the same windows are read, as if the shorter context had been asked for."""
    long, short = tiny_model(), tiny_model(max_position_embeddings=8)
    orders = [study(*order).manifest["read"] for order in ((long, short), (short, long), (long, long))]
    assert orders[0] == orders[1] != orders[2]  # control: alone it reads longer ones


def test_negative_control_a_copy_with_other_routers_differs_by_them_and_by_nothing_else():
    model = tiny_model()
    overlap, losses = tables(model, perturbed(tiny_model(), "gate.weight"))
    routers = overlap.loc["routers"]
    assert (routers["high"] < 0.95).all() and (overlap.loc["all but routers", "overlap"] == 1).all()
    assert overlap.loc["checkpoints"].equals(routers)
    assert losses["loss"]["first with the other's routers"] == losses["loss"]["other"] != losses["loss"]["first"]
    assert losses["loss"]["other with the first's routers"] == losses["loss"]["first"]


def test_a_copy_with_other_experts_differs_from_the_second_layer_on_and_not_by_its_routers():
    overlap, losses = tables(tiny_model(), perturbed(tiny_model(), "experts.down_proj"))
    first, *later = overlap.loc["checkpoints", "overlap"]
    assert first == 1 and all(share < 1 for share in later)
    assert (overlap.loc["routers", "overlap"] == 1).all() and losses["added"].abs().max() == 0


def test_overlap_is_that_counted_by_hand_and_the_swap_is_undone():
    model, other = tiny_model(), perturbed(tiny_model(), "gate.weight")
    given = domain("a", n=4, sources=4)
    found = run(Checkpoints(other), model, [given], reading=READING).tables["overlap"]
    own = model.W_router[model.moe_layers[0]].clone()
    same = torch.zeros(len(model.moe_layers))
    n = 0
    for passage in given.passages:
        one, two = (of.routing(passage.text).indices[:, 0, 1:] for of in (model, other))
        same += (one[..., None] == two[..., None, :]).any(-1).sum((-1, -2))
        n += one.shape[1]
    by_hand = (same / n / model.top_k).tolist()
    assert found.query("pair == 'checkpoints'")["overlap"].tolist() == pytest.approx(by_hand, abs=1e-6)  # float32
    with pytest.raises(ZeroDivisionError), swapped_routers(model, other):
        assert not torch.equal(model.W_router[model.moe_layers[0]], own)
        raise ZeroDivisionError
    assert torch.equal(model.W_router[model.moe_layers[0]], own)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["afmoe", "hy_v3", "lfm2_moe", "minimax_m2", "ernie4_5_moe", "deepseek_v3"])
def test_a_swap_brings_the_bias_for_the_choice_wherever_a_family_keeps_it(model_type):
    """On one input, swapped routers choose as the other model's own; with its rows alone they do not."""
    model, other = (HookedMoE.from_hf(configs.build(model_type, seed=seed)) for seed in (0, 1))
    layer, tokens = model.moe_layers[0], configs.tokens(3, 10)
    read, chosen = (f"blocks.{layer}.mlp.{name}" for name in ("hook_in", "hook_expert_indices"))
    before = {name: value.clone() for name, value in model.original_model.state_dict().items()}
    with swapped_routers(model, other):
        _, got = model.run_with_cache(tokens, names_filter=[read, chosen])

    def same() -> bool:
        with other.hooks([(read, lambda value, hook: got[read])]):
            _, right = other.run_with_cache(tokens, names_filter=chosen)
        return torch.equal(got[chosen].sort(-1).values, right[chosen].sort(-1).values)

    assert same() and all(torch.equal(value, before[name]) for name, value in model.original_model.state_dict().items())
    biases = [
        (value, model.original_model.state_dict()[name])
        for name, value in other.original_model.state_dict().items()
        if name.endswith(("expert_bias", "e_score_correction_bias"))
    ]
    for value, own in biases:
        value.copy_(own)
    assert biases and not same()


@pytest.mark.typed
def test_the_command_and_checkpoints_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_checkpoint(tmp_path / "model")
    write_jsonl(tmp_path / "a.jsonl", n=4, sources=4)
    command = ["checkpoints", "--model", f"{tmp_path}/model", "--domain", f"a={tmp_path}/a.jsonl", "--tokens", "60"]
    for more in ([], ["--quantize", "int8"], ["--dtype", "bfloat16"]):  # of both alike
        out = tmp_path / "-".join(["two", *more])
        assert main([*command, *more, "--other", f"{tmp_path}/model", "--out", str(out)]) == 0
        overlap: Any = StudyResult.load(out).tables["overlap"]
        assert (overlap["overlap"] == 1).all()
    capsys.readouterr()
    assert main([*command, "--other", f"{tmp_path}/none", "--out", f"{tmp_path}/three"]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if "error" in line]) == 1
    with pytest.raises(InputError, match="routers of layer 1 have .*expected the same"):
        Checkpoints(v3()).check(tiny_model())
    wider = HookedMoE.from_hf(tiny_hf(n_routed_experts=16), load_tokenizer(str(TOKENIZER)))
    with pytest.raises(InputError, match="'experts': 16.*expected two of one shape"):
        Checkpoints(wider).check(tiny_model())
