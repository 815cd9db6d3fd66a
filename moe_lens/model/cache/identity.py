"""What a model is known by where something was saved of it: sizes, and what its routers are like, not its name."""

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.model.cache.absent_model import AbsentModel

ROUTERS = "routers"
_TOLERANCE = 0.01
"""Of each number of `router_facts`: rounding to bfloat16 or float16 changes them by about a thousandth."""


def identity(model: Any) -> dict[str, Any]:
    """What distinguishes a model from others, wherever it was loaded from and in which precision; and its name."""
    if isinstance(model, AbsentModel):
        return dict(model.sizes)
    sizes = {name: getattr(model.cfg, name) for name in ("n_layers", "d_model", "d_vocab")}
    rows = getattr(model, "W_router", None)  # of a `HookedMoE`
    routers = {} if rows is None else {ROUTERS: router_facts(rows[layer] for layer in model.moe_layers)}
    return {
        "name": PurePath(model.cfg.model_name).name,
        **sizes,
        "n_experts": model.n_experts,
        "top_k": model.top_k,
        "moe_layers": list(model.moe_layers),
        **routers,
    }


@torch.no_grad()
def router_facts(layers: Iterable[Float[Tensor, "n_experts d_model"]]) -> list[float]:
    """A few numbers that other routers do not have: how large rows are, and projections on fixed directions.

    Numbers and not a digest, since a router that was rounded when it was loaded is still the same.

    Args:
        layers: Rows of the router of each layer with experts, in their order.
    """
    found = []
    for rows in layers:
        wide = rows.detach().float()
        across, along = (_waves(length).to(wide.device) for length in wide.shape)
        size = wide.norm()
        # about 1 in size, as a projection of `wide / size` on directions of squared length 1/4 × their numbers is
        projected = (across * (wide @ along.T).T).sum(-1) * 2 / size
        found.append(torch.cat([size.log()[None], projected]).cpu())
    together = torch.stack(found).sum(0) / math.sqrt(len(found))
    return [round(value, 5) for value in together.tolist()]


def _waves(length: int) -> Float[Tensor, "8 length"]:
    at = torch.arange(length, dtype=torch.float64)
    return torch.stack([torch.cos(at * (0.7 + 0.3 * number) + number) for number in range(8)]).float()


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """In what two models differ, as in `is for {difference}`; None where they are one.

    Where the two are called otherwise, a warning says so: a fine-tune that left its routers alone has the same facts.

    Args:
        there: What `identity` said of the model then.
        here: What it says now, or a part of that. Where one of the two says nothing of routers, names are compared.
    """
    routers = there.get(ROUTERS), here.get(ROUTERS)
    apart = {ROUTERS, "name"} if None not in routers else {ROUTERS}
    for what, now in here.items():
        if what not in apart and (then := there.get(what)) != now:
            return f"a model with {what} {then!r}; this one has {now!r}"
    if None in routers:
        return None
    then, now = (torch.tensor(of, dtype=torch.float64) for of in routers)
    names = there.get("name"), here.get("name")
    if then.shape != now.shape or not torch.allclose(then, now, rtol=0, atol=_TOLERANCE, equal_nan=True):
        return f"a model with other router weights than this one; they are called {names[0]!r} and {names[1]!r}"
    if all(names) and names[0] != names[1]:
        warnings.warn(
            f"what was made of {names[0]!r} is used with {names[1]!r}: sizes and routers are alike, so that the two "
            "are taken for one model; a fine-tune may differ elsewhere",
            stacklevel=3,
        )
    return None
