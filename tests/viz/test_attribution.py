"""Figures of attributions show the numbers of the result, and nothing where there is none."""

import pytest
import torch

from moe_lens.interventions import Loss, expert_attribution
from moe_lens.viz import attribution_agreement, attribution_map
from tests.studies.test_attribution_fidelity import made
from tests.wrapped import wrapped


@pytest.mark.typed
def test_the_map_shows_totals_where_anything_was_routed() -> None:
    case = wrapped("deepseek")
    for found in (
        expert_attribution(case.model, case.tokens[:, :3], Loss(case.tokens[:, :3])),
        expert_attribution(case.model, case.tokens, Loss(case.tokens), unit="rank", per_position=False),
    ):
        heat = attribution_map(found).to_dict()["data"][0]
        shown = torch.tensor(heat["z"])
        assert torch.equal(shown.isnan(), found.used() == 0)
        assert torch.allclose(shown.nan_to_num().float(), found.total())
        assert heat["zmax"] == -heat["zmin"] >= found.total().abs().max() - 1e-6
        assert list(heat["y"]) == [f"layer {layer}" for layer in found.layers]


@pytest.mark.typed
def test_agreement_shows_the_table_with_its_intervals() -> None:
    frame = made().fidelity(resamples=20)
    frame.insert(0, "domain", "all")
    figure = attribution_agreement(frame).to_dict()
    assert [len(bars["x"]) for bars in figure["data"]] == [5, 5, 1]
    rows = frame[frame["layer"].isna() & (frame["reference"] == "knockout")]
    assert list(figure["data"][0]["y"]) == list(rows["spearman"])
    assert max(figure["data"][0]["error_y"]["array"]) > 0
