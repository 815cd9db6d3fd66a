"""Training a TunedLens: KL to the model's own final distribution, over a stream of text, with checkpoints."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from moe_lens.by_value import digest_of
from moe_lens.errors import InputError, several
from moe_lens.lenses.token_rows import Rows, endless, of_item, padded, row_batches, rows, shuffled
from moe_lens.lenses.training_summary import TrainingSummary
from moe_lens.lenses.tuned_loss import Streams, TranslatedLens, divergences, sites
from moe_lens.model.hooks.edits import edits
from moe_lens.model.loading.parameters_digest import parameters_digest
from moe_lens.storage import load_tensors, save_tensors

HELD_OUT = 32
"""Rows that are held out of a corpus when no others are given."""

_KIND = "TunedLens training"


@dataclass(frozen=True)
class TrainingSettings:
    """What the result of a training depends on, beside the texts."""

    steps: int
    batch: int
    context: int
    lr: float
    seed: int
    mid: bool

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.lr > 0:
            raise InputError(f"lr is {self.lr}; expected a positive number")

    def rate(self, step: int) -> float:
        """Warm-up over a twentieth of the steps, then linear decay to zero; a share of `lr`."""
        return min((step + 1) / max(1, self.steps // 20), 1 - step / self.steps)


def train(
    lens: TranslatedLens,
    texts: Iterable[Any],
    held_out: Iterable[Any] | None,
    settings: TrainingSettings,
    *,
    checkpoint: Path | None = None,
    every: int = 50,
    progress: bool = True,
) -> TrainingSummary:
    """Train a lens in place; see `TunedLens.fit`.

    Raises:
        InputError: nothing to train or to train on, a checkpoint of another training, or a divergence that is not
            finite.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("training a lens needs gradients, which torch.inference_mode() forbids: leave it out")
    if not sites(lens):
        raise InputError(
            "the model has one layer, and the stream that leaves the last one needs no translator: there is nothing to "
            "train. Pass mid=True, or read with a LogitLens"
        )
    model = lens.model
    texts = several(texts, "texts")
    skip, kept = (
        _held_out(model, texts, settings.context) if held_out is None else (0, rows(model, held_out, settings.context))
    )
    kept = list(kept)
    evaluation = [padded(kept[i : i + settings.batch]) for i in range(0, len(kept), settings.batch)]
    before, scale, held_out_tokens = divergences(lens, evaluation)
    optimizer = _optimizer(lens, scale.tolist(), settings)
    run = {**asdict(settings), "fingerprint": lens.unembedding_digest(), "held_out_tokens": held_out_tokens}
    run |= {"held_out": digest_of(kept), "hooks": edits(model)}
    step = tokens = 0
    if checkpoint is not None:  # it takes a reading of all parameters
        run["model"] = parameters_digest(model.original_model)
    stream = endless(model, texts, settings.context, skip)
    batches = islice(row_batches(shuffled(stream, settings.seed), settings.batch), settings.steps)
    trained = hashlib.sha256()
    if checkpoint is not None and checkpoint.exists():
        step, tokens = _resume(checkpoint, optimizer, run, batches, trained)
    with _bar(progress, step, settings.steps) as show:
        for batch in batches:
            _note(trained, batch)
            streams = Streams(lens, batch)
            with torch.enable_grad():  # also where autograd was switched off for the rest of a notebook
                loss = _gradients(lens, streams)
            _check_finite(loss, step, settings)
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * settings.rate(step)
            optimizer.step()
            step, tokens = step + 1, tokens + streams.tokens
            show(loss)
            if checkpoint is not None and (step % every == 0 or step == settings.steps):
                _save(checkpoint, optimizer, {**run, "step": step, "tokens": tokens, "texts": trained.hexdigest()})
    after = divergences(lens, evaluation)[0]
    _check_finite(float(after.sum()), step, settings)
    for site in sites(lens):
        for parameter in site.parameters:
            parameter.requires_grad_(False)
    return _summary(model, settings, tokens, held_out_tokens, before, after)


def _check_finite(divergence: float, step: int, settings: TrainingSettings) -> None:
    if not math.isfinite(divergence):
        raise InputError(
            f"training failed: after {step} steps the divergence is {divergence}. Lower lr, which is {settings.lr}; if "
            "that does not help, the model's dtype may be too narrow"
        )


def _held_out(model: Any, texts: Iterable[Any], context: int) -> tuple[int, list[list[int]]]:
    """How many of the first items of a corpus are held out, and their rows."""
    if iter(texts) is texts:
        raise InputError("a corpus that can be read once cannot also be held out from: pass held_out, or a list")
    kept: list[list[int]] = []
    for number, item in enumerate(texts):
        kept += [row for row in of_item(model, item, context) if row]
        if len(kept) >= HELD_OUT:
            return number + 1, kept
    raise InputError(f"the corpus has {len(kept)} rows, too few to hold {HELD_OUT} out of it: pass held_out")


def _optimizer(lens: TranslatedLens, scale: list[float], settings: TrainingSettings) -> torch.optim.Adam:
    """Adam. A step moves a translated stream by about `lr` of its size, whatever the width and size of the stream."""
    groups = []
    for site, rms in zip(sites(lens), scale, strict=True):
        weight, bias = (parameter.requires_grad_() for parameter in site.parameters)
        groups += [
            {"params": [weight], "full": settings.lr / lens.model.cfg.d_model},
            {"params": [bias], "full": settings.lr / lens.model.cfg.d_model**0.5 * rms},
        ]
    return torch.optim.Adam(groups)


def _gradients(lens: TranslatedLens, streams: Streams) -> float:
    """Put the gradients of the mean KL into `.grad`; the mean over sites, in nats a token."""
    every = sites(lens)
    total = 0.0
    for site in every:
        for parameter in site.parameters:
            parameter.grad = torch.zeros_like(parameter)
    for part in streams.chunks():
        for site in every:
            loss = streams.divergence(site, *part).sum() / streams.tokens
            # Not backward(): the model's own parameters need no gradients.
            found = torch.autograd.grad(loss, site.parameters)
            for parameter, gradient in zip(site.parameters, found, strict=True):
                assert parameter.grad is not None
                parameter.grad += gradient
            total += loss.item()
    return total / len(every)


def _summary(
    model: Any, settings: TrainingSettings, tokens: int, held_out_tokens: int, before: Tensor, after: Tensor
) -> TrainingSummary:
    n_layers = model.cfg.n_layers

    def split(values: Tensor) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
        numbers = [round(value, 6) for value in values.tolist()]
        return (*numbers[: n_layers - 1], 0.0), tuple(numbers[n_layers - 1 :]) if settings.mid else None

    (post_before, mid_before), (post_after, mid_after) = split(before), split(after)
    return TrainingSummary(
        steps=settings.steps,
        tokens=tokens,
        batch=settings.batch,
        context=settings.context,
        lr=settings.lr,
        seed=settings.seed,
        held_out_tokens=held_out_tokens,
        post_before=post_before,
        post_after=post_after,
        mid_before=mid_before,
        mid_after=mid_after,
    )


def _save(file: Path, optimizer: torch.optim.Adam, header: dict[str, Any]) -> None:
    tensors = {}
    for i, group in enumerate(optimizer.param_groups):
        (parameter,) = group["params"]
        state = optimizer.state[parameter]
        parts = {"value": parameter, **{name: state[name] for name in ("step", "exp_avg", "exp_avg_sq")}}
        tensors.update({f"{i}.{name}": value.detach().cpu().clone() for name, value in parts.items()})
    save_tensors(file, _KIND, tensors, header)


def _note(trained: Any, batch: Rows) -> None:
    """Count a batch into the digest of what was trained on."""
    for part in (batch.tokens, batch.mask):
        trained.update(f"{tuple(part.shape)}".encode() + part.cpu().numpy().tobytes())


def _resume(
    file: Path, optimizer: torch.optim.Adam, run: dict[str, Any], batches: Iterator[Rows], trained: Any
) -> tuple[int, int]:
    """Take up a checkpoint, and pass over the batches that it has trained on: the steps and tokens that are done."""
    tensors, header = load_tensors(file, _KIND)
    other = {name: header.get(name) for name, value in run.items() if header.get(name) != value}
    if other:
        raise InputError(
            f"{file} is of another training: it has {json.dumps(other)}, this one "
            f"{json.dumps({name: run[name] for name in other})}. Call with the same arguments, or delete it"
        )
    for batch in islice(batches, int(header["step"])):
        _note(trained, batch)
    if header.get("texts") != trained.hexdigest():
        raise InputError(
            f"{file} is of another training: the texts of its {header['step']} steps are others than these. Call with "
            "the same texts in the same order, or delete it"
        )
    for i, group in enumerate(optimizer.param_groups):
        (parameter,) = group["params"]
        with torch.no_grad():
            parameter.copy_(tensors[f"{i}.value"])
        state = {name: tensors[f"{i}.{name}"] for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {
            "step": tensors[f"{i}.step"],
            **{name: value.to(parameter) for name, value in state.items()},
        }
    return int(header["step"]), int(header["tokens"])


def _bar(progress: bool, done: int, steps: int) -> Any:
    """A context that gives what is to be called after every step, with its loss."""
    return _Bar(done, steps) if progress else nullcontext(lambda loss: None)  # noqa: ARG005


class _Bar:
    def __init__(self, done: int, steps: int):
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("tuning", total=steps, completed=done)

    def __enter__(self) -> Any:
        self._progress.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, loss: float) -> None:
        self._progress.update(self._task, advance=1, description=f"tuning, KL {loss:.3f}")
