"""Files of `Routing`, `Scores` and `Plan` whose headers or numbers were edited by hand are refused when they load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_lens import Routing
from moe_lens.errors import InputError
from moe_lens.pruning import Scores, plan

SCORES = Scores(
    method="frequency", model={"name": "m"}, layers=(1, 2), top_k=2, domains=("a", "b"), tokens=(5, 6), texts="0",
    values=torch.arange(16.0).view(2, 2, 4),
)  # fmt: skip
PLAN = plan(SCORES, 0.75)
ROUTING = Routing(
    layers=(1, 2), n_experts=4, indices=torch.tensor([0, 3]).expand(2, 1, 3, 2), weights=torch.ones(2, 1, 3, 2)
)


def edited(saved: Any, path: Path, change: Any) -> None:
    """Save, and change the header, or a tensor, as somebody with an editor would."""
    saved.save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["moe_lens"])
    change(header, tensors)
    save_file(tensors, path, {"moe_lens": json.dumps(header)})


def put(name: str, value: Any) -> Any:
    return lambda header, tensors: header.update({name: value})


def fill(name: str, value: float, at: int = 0) -> Any:
    def change(header: Any, tensors: Any) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[at] = value

    return change


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("saved", "change", "message"),
    [
        (ROUTING, lambda h, t: h.pop("layers"), "lacks 'layers'"),
        (ROUTING, put("layers", 3), "layers is 3; expected whole numbers"),
        (ROUTING, put("layers", ["1", "2"]), "expected whole numbers"),
        (ROUTING, put("layers", [1]), "expected 2 different ones"),
        (ROUTING, put("n_experts", 3), "indices go from 0 to 3; expected expert ids from 0 to 2"),
        (ROUTING, put("n_experts", "4"), "n_experts is"),
        (ROUTING, put("n_experts", -4), "n_experts is"),
        (ROUTING, fill("indices", 4), "expected expert ids from 0 to 3"),
        (ROUTING, fill("indices", -1), "expected expert ids from 0 to 3"),
        (ROUTING, fill("weights", float("nan")), "weights hold NaN"),
        (ROUTING, lambda h, t: t.update(indices=t["indices"].float()), "whole numbers"),
        (ROUTING, lambda h, t: t.update(foreign=t["weights"].clone()), "unexpected keyword"),
        (SCORES, lambda h, t: h.pop("texts"), "lacks 'texts'"),
        (SCORES, put("top_k", -1), "top_k is"),
        (SCORES, put("top_k", 5), "top_k is 5; expected 1 to 4"),
        (SCORES, put("top_k", True), "top_k is"),
        (SCORES, put("layers", [1, 2, 3]), "expected 2 domains × 3 layers"),
        (SCORES, put("domains", 7), "not iterable"),
        (SCORES, put("model", "m"), "model is 'm'"),
        (SCORES, fill("values", float("nan")), "values hold NaN"),
        (SCORES, lambda h, t: t.pop("values"), "lacks 'values'"),
        (PLAN, lambda h, t: h.pop("method"), "lacks 'method'"),
        (PLAN, put("top_k", -2), "top_k is"),
        (PLAN, put("top_k", 4), "keep 3 experts, and every token needs 4"),
        (PLAN, put("fewer", [[7, 1]]), "layer 7 has no experts"),
        (PLAN, put("fewer", [[1]]), "was it edited"),
        (PLAN, put("layers", [1]), "a plan for the layers"),
        (PLAN, put("model", None), "model is None"),
        (PLAN, fill("values", float("nan")), "hold NaN"),
        (PLAN, lambda h, t: t.update(kept=t["kept"][:1]), "keeps experts in 1"),
    ],
)
def test_what_was_edited_by_hand_is_refused_at_load(saved, change, message, tmp_path):
    path = tmp_path / "edited.safetensors"
    edited(saved, path, lambda header, tensors: None)
    type(saved).load(path)  # the tool alone breaks nothing
    edited(saved, path, change)
    with pytest.raises(InputError) as error:
        type(saved).load(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
