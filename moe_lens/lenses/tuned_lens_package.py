"""Lenses of the package tuned-lens: a folder of `config.json` and `params.pt`, read for a `HookedMoE`.

Its translator i reads the stream *before* block i, ours of layer l the stream *after* it: theirs of l + 1 is ours of l.
Theirs of block 0 reads the embeddings, for which there is no lens here; at the last layer both are the model itself.
"""

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.json_files import read_json

CONFIG, PARAMETERS = "config.json", "params.pt"


def read_translators(folder: Path, model: Any, *, strict: bool) -> tuple[list[Tensor], list[Tensor]]:
    """A_l and b_l of each layer of a model, by its own count of layers.

    Args:
        folder: What `tuned_lens.TunedLens.save` wrote.
        model: The model to read.
        strict: Whether to refuse a model of another name or with another unembedding.

    Raises:
        InputError: No such lens there, a broken one, or one of another model.
    """
    config = _config(folder)
    shape, expected = (model.cfg.n_layers, model.cfg.d_model), (config["num_hidden_layers"], config["d_model"])
    theirs, ours = str(config["base_model_name_or_path"]), str(model.cfg.model_name)
    if shape != expected:
        raise InputError(
            f"the lens at {folder} is of {theirs} ({expected[0]} layers of width {expected[1]}); this model is {ours} "
            f"({shape[0]} of {shape[1]})"
        )
    if strict and _last_part(theirs) != _last_part(ours):
        raise InputError(
            f"the lens at {folder} was trained for {theirs}; this model is called {ours}. If it is the same model, "
            "pass strict=False"
        )
    if strict and config.get("unembed_hash") not in (None, _digest(model)):
        raise InputError(
            f"the lens at {folder} was trained for another unembedding than that of this model ({ours}). Fit a lens "
            "for it, or pass strict=False to read it with this one all the same"
        )
    state = _state(folder / PARAMETERS)
    n_layers, d_model = expected
    names = [f"{layer}.{kind}" for layer in range(n_layers) for kind in ("weight", "bias")]
    if not config.get("bias", True):
        state.update({f"{layer}.bias": torch.zeros(d_model) for layer in range(n_layers)})
    shapes = {name: (d_model,) if name.endswith("bias") else (d_model, d_model) for name in names}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != shapes:
        raise InputError(
            f"{folder / PARAMETERS} holds {len(found)} tensors; expected weight and bias of {n_layers} translators of "
            f"width {d_model}, named 0.weight to {n_layers - 1}.bias"
        )
    weights, biases = ([state[f"{i}.{kind}"] for i in range(1, n_layers)] for kind in ("weight", "bias"))
    return [*weights, torch.zeros(d_model, d_model)], [*biases, torch.zeros(d_model)]


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = read_json(file)
    except OSError as error:
        raise InputError(
            f"there is no lens at {folder}: {file.name} cannot be read. Expected a folder that TunedLens.save of the "
            "package tuned-lens wrote"
        ) from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    needed = {"base_model_name_or_path", "d_model", "num_hidden_layers"}
    if not isinstance(config, dict) or not needed <= config.keys():
        ours = isinstance(config, dict) and "kind" in config
        hint = "; TunedLens.from_pretrained reads this one" if ours else ""
        raise InputError(f"{file} is not the configuration of a lens of the package tuned-lens{hint}")
    if (kind := config.get("lens_type", "linear_tuned_lens")) != "linear_tuned_lens":
        raise InputError(f"{file}: lens_type is {kind!r}; expected linear_tuned_lens")
    return config


def _state(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        why = str(error).partition("\n")[0]
        raise InputError(f"{file} cannot be read as tensors (nothing else is loaded from it): {why}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{file} holds something else than tensors by their names")
    if bad := sorted(name for name, value in state.items() if not value.isfinite().all()):
        raise InputError(f"{file}: {bad[0]} holds NaN or infinities")
    return dict(state)


def _digest(model: Any) -> str:
    """As `tuned_lens.utils.tensor_hash`: of the unembedding as numpy abbreviates it, whatever the dtype."""
    matrix = model.original_model.get_output_embeddings().weight.detach().float().cpu().numpy()
    with np.printoptions(threshold=1000, edgeitems=3, linewidth=75):
        return hashlib.sha256(np.array_str(matrix, precision=1).encode()).hexdigest()


def _last_part(name: str) -> str:
    return name.rstrip("/").split("/")[-1]
