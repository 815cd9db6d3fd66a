"""The TunedLens: one affine translator a layer, from the basis of that layer to that of the last."""

import importlib.resources
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import AnyModel, Natural, Positive, Seed
from moe_lens.errors import InputError, a_kind
from moe_lens.hooked_moe import HookedMoE
from moe_lens.json_files import read_json
from moe_lens.lenses.logit_lens import LogitLens
from moe_lens.lenses.training_summary import TrainingSummary
from moe_lens.lenses.tuned_lens_package import read_translators
from moe_lens.lenses.tuned_loss import TranslatedLens
from moe_lens.lenses.tuned_training import TrainingSettings, train
from moe_lens.manifest import file_digest, seal
from moe_lens.model.loading.dispatch import output_place
from moe_lens.model.loading.pretrained import EMBEDDED
from moe_lens.scratch import folder_made
from moe_lens.storage import believed, load_tensors, save_tensors, written_whole

_CONFIG, _TENSORS, _KIND = "config.json", "lens.safetensors", "TunedLens"


class TunedLens(TranslatedLens):
    """Reads a point of the residual stream at layer l as FinalNorm(h + A_l h + b_l) W_U (Belrose et al. 2023).

    The translators (A_l, b_l) are trained so that the lens's prediction at `resid_post` of layer l is close to the
    model's own prediction: they minimise KL(final ‖ lens) in nats (arXiv 2303.08112, section 3). A new lens has A = 0
    and b = 0, and is then the LogitLens; so is every TunedLens at the last layer, whose output the model itself reads.
    Translators are kept and applied in float32 at least, whatever the model's dtype.

    They are trained on `resid_post` only: applying them to a partial sum is extrapolation. `mid`, if trained, is a
    second lens with translators for `resid_mid`, the stream before the experts:
    `lens.mid.decode(cache, PartialSum(ranks=[]))`.

    Args:
        model: A `HookedMoE`.
        weights: A_l of each layer; zeros if not given.
        biases: b_l of each layer; zeros if not given.
        mid: The lens of `resid_mid`.
        tuning: How the translators were trained.
    """

    def __init__(
        self,
        model: AnyModel,
        weights: Sequence[Float[Tensor, "d_model d_model"]] | None = None,
        biases: Sequence[Float[Tensor, " d_model"]] | None = None,
        *,
        mid: "TunedLens | None" = None,
        tuning: TrainingSummary | None = None,
    ):
        super().__init__(model)
        n_layers, d_model = model.cfg.n_layers, model.cfg.d_model
        device, dtype = output_place(model.original_model)
        wide = torch.promote_types(dtype, torch.float32)
        zeros = [torch.zeros(d_model, d_model, dtype=wide, device=device) for _ in range(n_layers)]
        self.weights = list(zeros if weights is None else (weight.to(device, wide) for weight in weights))
        self.biases = list(
            [zero[0].clone() for zero in zeros] if biases is None else (b.to(device, wide) for b in biases)
        )
        self.mid = mid
        self.tuning = tuning
        shapes = {tuple(weight.shape) for weight in self.weights} | {(*bias.shape, d_model) for bias in self.biases}
        if {len(self.weights), len(self.biases)} != {n_layers} or shapes != {(d_model, d_model)}:
            raise InputError(
                f"{len(self.weights)} weights and {len(self.biases)} biases of shapes {sorted(shapes)}; the model has "
                f"{n_layers} layers of width {d_model}"
            )

    def translate(self, resid: Float[Tensor, "*axes d_model"], layer: Natural) -> Float[Tensor, "*axes d_model"]:
        """The residual stream at a layer in the basis of the last: h + A_l h + b_l, in the dtype of h.

        Args:
            resid: Any points of the residual stream.
            layer: Their layer, 0 to n_layers − 1.
        """
        self._check_point(resid, layer)
        weight, bias = self.weights[layer], self.biases[layer]
        wide = resid.to(torch.promote_types(resid.dtype, weight.dtype))
        change = torch.nn.functional.linear(wide, weight.to(wide), bias.to(wide))
        return (wide + change).to(resid.dtype)

    def _facts(self) -> dict[str, Any]:
        trained = None if self.tuning is None else f"{self.tuning.steps} steps, {self.tuning.tokens:,} tokens"
        return {
            **super()._facts(),
            "reads": "resid_post" if self.mid is None else "resid_post, resid_mid",
            "trained": trained,
        }

    @classmethod
    def fit(
        cls,
        model: AnyModel,
        texts: Iterable[Any],
        *,
        held_out: Iterable[Any] | None = None,
        mid: bool = False,
        steps: Positive = 250,
        batch: Positive = 16,
        context: Positive | None = None,
        lr: float = 0.3,
        seed: Seed = 0,
        checkpoint: str | Path | None = None,
        every: Positive = 50,
        progress: bool = True,
    ) -> "TunedLens":
        """Train translators on a corpus, by Adam on KL(final ‖ lens) averaged over tokens.

        The corpus is streamed: items are read as they are needed, from the start again when it ends, and their rows are
        shuffled in a buffer. After an interruption, a call with the same arguments continues from the checkpoint and
        ends with the same translators; the corpus must then yield the same items again.

        Args:
            model: A `HookedMoE`.
            texts: Texts, token ids [pos] or [batch, pos], or batches with `tokens` and `mask`.
            held_out: Texts to evaluate on at start and end; they are read once and kept. If not given, the first 32
                rows of `texts`, which are then never trained on.
            mid: Whether to train a second lens on `resid_mid`.
            steps: Optimisation steps.
            batch: Number of rows in a step.
            context: Maximum length of a row in tokens; the model's if not given.
            lr: Learning rate: a step moves a translated stream by about `lr` of its size (the rate of the matrices is
                lr / d_model). It is warmed up over 5 % of the steps, then falls linearly to zero.
            seed: Random seed of the order of rows.
            checkpoint: A file for the state of the training, written every `every` steps; training resumes from it.
            every: Steps between two checkpoints.
            progress: Whether to show a progress bar, on stderr.

        Returns:
            The lens; `lens.tuning` holds its held-out KL before and after training.

        Raises:
            InputError: A corpus that is too short or holds something else, a checkpoint of another training or of
                other texts, a training that diverges, or a model with nothing to train.
        """
        settings = TrainingSettings(
            steps=steps, batch=batch, context=context or int(model.cfg.n_ctx), lr=lr, seed=seed, mid=mid
        )
        file = None if checkpoint is None else Path(checkpoint)
        lens = cls(model, mid=cls(model) if mid else None)
        lens.tuning = train(lens, texts, held_out, settings, checkpoint=file, every=every, progress=progress)
        return lens

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `lens.safetensors`, each under a temporary name first.

        Args:
            folder: The folder; created if it does not exist.

        Raises:
            InputError: The folder cannot be written.
        """
        target = Path(folder)
        sites = {"post": self} if self.mid is None else {"post": self, "mid": self.mid}
        tensors = {}
        for name, lens in sites.items():
            tensors[f"{name}.weight"] = torch.stack([weight.detach().cpu() for weight in lens.weights])
            tensors[f"{name}.bias"] = torch.stack([bias.detach().cpu() for bias in lens.biases])
        config: dict[str, Any] = {
            "kind": _KIND,
            "model_name": self.model.cfg.model_name,
            "fingerprint": self.unembedding_digest(),
            "n_layers": self.model.cfg.n_layers,
            "d_model": self.model.cfg.d_model,
            "tuning": None if self.tuning is None else asdict(self.tuning),
        }
        try:
            with folder_made(target, whole=True):
                save_tensors(target / _TENSORS, _KIND, tensors, {"fingerprint": config["fingerprint"]})
                config["file"] = self.digest_of(target)
                config = json.loads(json.dumps(config))
                config["seal"] = seal(config)
                with written_whole(target / _CONFIG) as temporary:
                    temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{target} cannot be written: {error}") from error

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, model: AnyModel | None = None, *, strict: bool = True
    ) -> "TunedLens":
        """Load a lens for a model.

        Args:
            name_or_path: A folder that `save_pretrained` wrote, or "tiny-deepseekmoe": the embedded model's lens.
            model: The model to read; if not given, the one that the lens was trained for is loaded by its name.
            strict: Whether to refuse a model of another name, or with another final norm or unembedding, than the one
                the lens was trained for. Names are compared without what stands before their last slash.

        Raises:
            InputError: No lens there, a broken one, or one of another model.
        """
        folder = _folder(name_or_path)
        config = _read_config(folder)
        if model is None:
            model = HookedMoE.from_pretrained(config["model_name"])
        _check_model(folder, config, model, strict)
        tensors, _ = load_tensors(folder / _TENSORS, _KIND)
        if cls.digest_of(folder) != config["file"]:
            raise InputError(f"{folder}: {_CONFIG} and {_TENSORS} are not of the same lens; save it again")
        _check_tensors(folder / _TENSORS, tensors, config["n_layers"], config["d_model"])
        mid = cls(model, list(tensors["mid.weight"]), list(tensors["mid.bias"])) if "mid.bias" in tensors else None
        with believed(folder / _CONFIG, _KIND):
            tuning = None if config["tuning"] is None else TrainingSummary.from_json(config["tuning"])
        return cls(model, list(tensors["post.weight"]), list(tensors["post.bias"]), mid=mid, tuning=tuning)

    @staticmethod
    def digest_of(name_or_path: str | Path) -> str:
        """SHA-256 of the translators of a saved lens: lenses with equal digests have equal translators.

        Args:
            name_or_path: As in `from_pretrained`.

        Raises:
            InputError: They cannot be read.
        """
        file = _folder(name_or_path) / _TENSORS
        try:
            return file_digest(file)
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None

    @classmethod
    def from_tuned_lens(cls, folder: str | Path, model: AnyModel, *, strict: bool = True) -> "TunedLens":
        """Load a lens that the package tuned-lens trained and saved.

        In tuned-lens, translator i reads the stream before block i, which is the output of layer i − 1; here it becomes
        the translator of layer i − 1. Translator 0, for the embeddings, is left out. Only tensors are loaded from the
        file, so that no code in it is run.

        Args:
            folder: The folder that `save` of that package wrote, with `config.json` and `params.pt`.
            model: The `HookedMoE` to read.
            strict: Whether to refuse a model of another name or with another unembedding than the one the lens was
                trained for. Names are compared without what stands before their last slash.

        Raises:
            InputError: No lens there, a broken one, or one of another model.
        """
        return cls(model, *read_translators(Path(folder), model, strict=strict))


def _folder(name_or_path: str | Path) -> Path:
    if name_or_path == EMBEDDED:
        return Path(str(importlib.resources.files("moe_lens") / "assets" / f"{EMBEDDED}-lens"))
    return Path(name_or_path)


def _check_tensors(file: Path, tensors: dict[str, Tensor], n_layers: int, d_model: int) -> None:
    """Refuse translators of other shapes, or with numbers that no lens can read with."""
    shapes = {"weight": (n_layers, d_model, d_model), "bias": (n_layers, d_model)}
    sites = ("post", "mid") if any(name.startswith("mid.") for name in tensors) else ("post",)
    expected = {f"{site}.{part}": shape for site in sites for part, shape in shapes.items()}
    if (found := {name: tuple(tensor.shape) for name, tensor in tensors.items()}) != expected:
        raise InputError(f"{file} holds {found}; expected {expected}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            kind = "NaN or infinities" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{file}: {name} holds {kind}; expected finite floating-point numbers")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG
    try:
        config = read_json(file)
    except OSError as error:
        raise InputError(
            f"there is no lens at {folder}: {file.name} cannot be read. Expected a folder that "
            f"TunedLens.save_pretrained wrote, or {EMBEDDED!r}"
        ) from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    needed = {"kind": str, "model_name": str, "fingerprint": str, "n_layers": int, "d_model": int, "file": str}
    if not isinstance(config, dict) or config.get("kind") != _KIND or not {*needed, "tuning"} <= config.keys():
        raise InputError(f"{file} is not the configuration of a TunedLens; it may be a model's")
    if config.pop("seal", None) != seal(config):
        raise InputError(f"{file} is not as save_pretrained wrote it; was it edited? Save the lens again")
    for key, kind in needed.items():
        if type(config[key]) is not kind:
            raise InputError(f"{file}: {key} is {config[key]!r:.80}; expected {a_kind(kind)}. Was it edited?")
    return config


def _check_model(folder: Path, config: dict[str, Any], model: Any, strict: bool) -> None:
    name = str(model.cfg.model_name)
    shape, expected = (model.cfg.n_layers, model.cfg.d_model), (config["n_layers"], config["d_model"])
    if shape != expected:
        raise InputError(
            f"the lens at {folder} is of {config['model_name']} ({expected[0]} layers of width {expected[1]}); this "
            f"model is {name} ({shape[0]} of {shape[1]})"
        )
    if not strict:
        return
    if LogitLens(model).unembedding_digest() != config["fingerprint"]:
        raise InputError(
            f"the lens at {folder} was trained for {config['model_name']}; the final norm or the unembedding of this "
            f"model ({name}) is another. Fit a lens for it, or pass strict=False to read it with this one all the same"
        )
    if name.rstrip("/").split("/")[-1] != config["model_name"].rstrip("/").split("/")[-1]:
        raise InputError(
            f"the lens at {folder} was trained for {config['model_name']}; this model is called {name}, though its "
            "unembedding is the same. If it is the same model, pass strict=False"
        )
