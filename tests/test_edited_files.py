"""Files of results whose headers or tensors were edited by hand are refused when they load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_lens import PartialSum, Routing
from moe_lens.errors import InputError
from moe_lens.interventions import ExpertAttribution, PatchResult, TraceResult
from moe_lens.interventions.trace_result import SiteEffects
from moe_lens.lenses import LensResult
from moe_lens.lenses.lens_result import blank
from moe_lens.pruning import Scores, plan
from moe_lens.storage import digest

SCORES = Scores(
    method="frequency", model={"name": "m"}, layers=(1, 2), top_k=2, domains=("a", "b"), tokens=(5, 6), texts="0",
    values=torch.arange(16.0).view(2, 2, 4),
)  # fmt: skip
PLAN = plan(SCORES, 0.75)
ROUTING = Routing(
    layers=(1, 2), n_experts=4, indices=torch.tensor([0, 3]).expand(2, 1, 3, 2), weights=torch.ones(2, 1, 3, 2)
)

ATTRIBUTION = ExpertAttribution(
    method="integrated", routing="free", baseline="zero", metric="m", clean=1.0, unit="expert", layers=(1, 2),
    values=torch.rand(2, 4), count=torch.ones(2, 4, dtype=torch.long), difference=torch.rand(2),
)  # fmt: skip
TRACE = TraceResult(
    sites={"expert": SiteEffects(torch.rand(3, 2, 4), {"layer": (1, 2), "expert": (0, 1, 2, 3)})},
    clean=1.0, corrupted=torch.rand(3), score="probability", tokens=("a", "b"), subject=(0,), at=(0,), noise_std=1.0,
    seed=0, routing="free", level=0.95,
)  # fmt: skip
PATCH = PatchResult(
    values=torch.rand(2, 4), axes={"layer": (1, 2), "expert": (0, 1, 2, 3)}, site="expert_weighted", metric="m",
    direction="denoising", routing="free", clean=1.0, corrupted=0.0, n=1,
)  # fmt: skip
LENS = LensResult(
    layers=(1, 2), sums=(PartialSum(ranks=[0]), PartialSum()), positions=(0, 1, 2), dense=(), never_selected=(),
    texts={1: "a"}, targets=torch.ones(1, 3, dtype=torch.long), **blank(2, 2, 1, 3, 2, torch.float32),
)  # fmt: skip


def edited(saved: Any, path: Path, change: Any, *, forged: bool = True) -> None:
    """Save, and change the header, or a tensor, as somebody with an editor would; who forges makes the digest fit."""
    saved.save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["moe_lens"])
    change(header, tensors)
    if forged:
        header.pop("digest")
        header["digest"] = digest(tensors, header)
    save_file(tensors, path, {"moe_lens": json.dumps(header)})


def put(name: str, value: Any) -> Any:
    return lambda header, tensors: header.update({name: value})


def fill(name: str, value: float, at: int = 0) -> Any:
    def change(header: Any, tensors: Any) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[at] = value

    return change


def drop(name: str) -> Any:
    return lambda header, tensors: (header if name in header else tensors).pop(name)


def double(name: str, dim: int = 0) -> Any:
    """The last row or column a second time."""

    def change(header: Any, tensors: Any) -> None:
        value = tensors[name]
        tensors[name] = torch.cat([value, value.narrow(dim, value.shape[dim] - 1, 1)], dim)

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
        (SCORES, fill("values", float("nan")), "values hold NaN or infinity"),
        (SCORES, lambda h, t: t.pop("values"), "lacks 'values'"),
        (PLAN, lambda h, t: h.pop("method"), "lacks 'method'"),
        (PLAN, put("top_k", -2), "top_k is"),
        (PLAN, put("top_k", 4), "keep 3 experts, and every token needs 4"),
        (PLAN, put("fewer", [[7, 1]]), "layer 7 has no experts"),
        (PLAN, put("fewer", [[1]]), "was it edited"),
        (PLAN, put("layers", [1]), "a plan for the layers"),
        (PLAN, put("model", None), "model is None"),
        (PLAN, fill("values", float("nan")), "hold NaN"),
        (PLAN, lambda h, t: t.update(kept=t["kept"][:1]), "expected one shape"),
        (PLAN, double("values", 1), "expected one shape"),
        (PLAN, put("model", {"n_experts": 5}), "scores of 4 experts a layer; the model has 5"),
        (PLAN, put("model", {"moe_layers": [0, 1]}), "scores of the layers [1, 2]; the model has experts in [0, 1]"),
        (SCORES, put("model", {"moe_layers": "12"}), "scores of the layers [1, 2]; the model has experts in '12'"),
        (SCORES, put("model", {"n_experts": 5}), "scores of 4 experts a layer; the model has 5"),
        *(
            (saved, drop(name), f"lacks '{name}'")
            for saved, name in (
                (ATTRIBUTION, "clean"),
                (TRACE, "level"),
                (TRACE, "corrupted"),
                (TRACE, "site.expert"),
                (PATCH, "axes"),
                (PATCH, "values"),
                (PATCH, "tokens"),
            )
        ),
        (ATTRIBUTION, drop("count"), "was it edited"),
        (ATTRIBUTION, put("layers", 7), "layers is 7; expected whole numbers"),
        (ATTRIBUTION, put("layers", [1, 1]), "layers are (1, 1); expected each once"),
        (ATTRIBUTION, put("clean", "1"), "clean is '1'"),
        (ATTRIBUTION, double("difference"), "difference has shape (3,)"),
        (ATTRIBUTION, double("values"), "values has 3 as its 'layer'"),
        (TRACE, put("axes", 7), "was it edited"),
        (TRACE, put("axes", {"expert": [["layer", [1, 2]]]}), "shape (2, 4); expected 2 layer, as axes has it"),
        (TRACE, put("level", 7), "level is 7; expected a number between 0 and 1"),
        (TRACE, put("level", float("nan")), "level is nan"),
        (TRACE, put("at", [2]), "at is (2,); expected positions of the 2 tokens"),
        (TRACE, put("tokens", "ab"), "tokens is 'ab'; expected a list of words"),
        (TRACE, double("corrupted"), "expected as many"),
        (TRACE, double("site.expert"), "expected as many"),
        (TRACE, double("site.expert", 2), "shape (2, 5); expected 2 layer × 4 expert"),
        (
            PATCH,
            put("axes", [["layer", [1, 1]], ["expert", [0, 1, 2, 3]]]),
            "layer (1, 1); expected each once",
        ),
        (PATCH, put("axes", [["layer", [1, 2]], ["expert", [0, 1, 2, 3]]] * 2), "expected each once"),
        (PATCH, put("axes", ["x"]), "was it edited"),
        (PATCH, double("values"), "shape (3, 4); expected 2 layer × 4 expert"),
        (PATCH, lambda h, t: t.update(values=t["values"].flatten()), "shape (8,)"),
        (LENS, put("layers", 7), "was it edited"),
        (LENS, put("layers", [1]), "2 layers × 2 sums × 3 positions; expected 1 × 2 × 3"),
        (LENS, put("positions", [0, 1]), "2 layers × 2 sums × 3 positions; expected 2 × 2 × 2"),
        (LENS, put("sums", ["x"]), "was it edited"),
        (LENS, put("texts", {"a": 1}), "was it edited"),
        (LENS, double("entropy"), "entropy has shape (3, 2, 1, 3)"),
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


@pytest.mark.parametrize(
    ("saved", "name"),
    [
        (ROUTING, "weights"),
        (SCORES, "values"),
        (PLAN, "values"),
        (ATTRIBUTION, "values"),
        (TRACE, "corrupted"),
        (PATCH, "values"),
        (LENS, "entropy"),
    ],
)
def test_values_that_could_be_are_refused_too_where_they_are_not_those_that_were_saved(saved, name, tmp_path):
    path = tmp_path / "edited.safetensors"
    edited(saved, path, lambda header, tensors: None, forged=False)
    type(saved).load(path)
    for change in (fill(name, 0.25), put("note", "mine"), drop("digest")):
        edited(saved, path, change, forged=False)
        with pytest.raises(InputError, match=f"{path} is not as moe_lens wrote it; was it edited"):
            type(saved).load(path)


@pytest.mark.typed
def test_a_digest_knows_names_dtypes_shapes_and_every_number():
    one = {"a": torch.arange(6.0), "b": torch.tensor([True, False]), "c": torch.ones((), dtype=torch.bfloat16)}
    others = [
        one | {"a": torch.arange(6.0).view(2, 3)},
        one | {"a": torch.arange(6.0).nextafter(torch.ones(6) * 9)},
        one | {"b": torch.tensor([1, 0], dtype=torch.uint8)},
        {"A": one["a"], "b": one["b"], "c": one["c"]},
        one | {"d": torch.zeros(0)},
    ]
    found = [digest(tensors, {"x": [1, None]}) for tensors in (one, *others)] + [digest(one, {"x": [1]})]
    assert len(set(found)) == len(found)
    assert digest(dict(reversed(one.items())), {"x": [1, None]}) == found[0]
